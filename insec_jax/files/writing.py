"""Writing: files and folders that are whole or not there, with a single writer.

A path that cannot be written raises InputError. An error of the machine (a full or read-only disk) remains an OSError.
"""

import contextlib
import errno
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Sequence
from typing import TextIO

from insec_jax.command import InputError
from insec_jax.files import buckets, temporary
from insec_jax.files.bucket_paths import BucketPath, check_room
from insec_jax.files.locks import LOCK, one_writer
from insec_jax.files.reading import PATH_ERRORS, kind_of, local_path
from insec_jax.files.temporary import partial_of

MARK = ".unfinished"  # object of a folder in a bucket that is being written
LAST = "config.json"  # a folder with this file counts as a model
STREAMS = re.compile(r"/dev/(stdout|stderr|fd/[0-9]+)|/proc/(self|[0-9]+)/fd/[0-9]+")


def check_output(text: str, name: str, inputs: Sequence[str] = ()) -> pathlib.Path:
  """Return the path of a file to be written, without creating it.

  Raises InputError if no file can be written there, or if it is one of the files `inputs` that the program reads.
  """
  path = local_path(text, name)
  if isinstance(path, BucketPath):
    return _checked_object(path, text, name, inputs)
  if is_stream(path):
    return path
  if path.is_file() and any(given and os.path.isfile(given) and os.path.samefile(path, given) for given in inputs):
    raise InputError(f"{name}={text} is a file that the program reads; give another path")
  target = pathlib.Path(os.path.realpath(path))
  if text.endswith("/") or target.is_dir():
    raise InputError(f"{name}={text} is a folder; give the path of a file")
  if target.exists() and not target.is_file():
    raise InputError(f"{name}={text} is {kind_of(target.stat().st_mode)}, which cannot be replaced; give a file's path")
  if not target.parent.is_dir():
    raise InputError(f"{name}={text} cannot be written (there is no folder {target.parent}); make it first")
  if not os.access(target.parent, os.W_OK | os.X_OK):
    if os.statvfs(target.parent).f_flag & os.ST_RDONLY:
      raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target.parent))
    raise InputError(f"{name}={text} cannot be written (permission denied); give a path that may be written to")
  return target


def _checked_object(path: BucketPath, text: str, name: str, inputs: Sequence[str]) -> BucketPath:
  if text.endswith("/") or buckets.children(path):
    raise InputError(f"{name}={text} is a folder; give the path of a file")
  if any(given.startswith(buckets.SCHEME) and local_path(given, name) == path for given in inputs):
    raise InputError(f"{name}={text} is a file that the program reads; give another path")
  check_room(path, name)
  return path


def is_stream(path: pathlib.Path) -> bool:
  """Return whether the path is a character device or a stream of this process, which is written to, not replaced."""
  try:
    return bool(STREAMS.fullmatch(str(path))) or stat.S_ISCHR(os.stat(path).st_mode)
  except OSError:
    return False


@contextlib.contextmanager
def written_whole(text: str, name: str = "--output", inputs: Sequence[str] = ()) -> Iterator[TextIO]:
  """Yield a text file that takes the name `text` when the block ends without an error; else the old file stays.

  The path has one writer at a time. Raises InputError at the start of the block if the file cannot be written. A device
  (/dev/null, a terminal) is written to directly. An object of a bucket is uploaded at the end of the block.
  """
  path = check_output(text, name, inputs)
  if is_stream(path):
    with open(path, "w", encoding="utf-8") as file:
      yield file
    return
  with one_writer(_beside(path), f"{path}", name):
    _remove_left_over(path.parent, path.name)
    with _replacing(path) as file:
      yield file
    buckets.publish(path)


@contextlib.contextmanager
def folder_written_whole(path: pathlib.Path, name: str = "--output") -> Iterator[pathlib.Path]:
  """Yield a new folder that takes the name `path`, new or an empty folder, when the block ends without an error.

  The path has one writer at a time.
  """
  if isinstance(path, BucketPath):
    with _bucket_folder_written(path, name):
      yield path
    return
  with one_writer(_beside(path), f"{path}", name):
    _remove_left_over(path.parent, path.name)
    with partial_of(path) as partial:
      partial.mkdir()
      yield partial
      partial.rename(path)


@contextlib.contextmanager
def _bucket_folder_written(path: BucketPath, name: str) -> Iterator[None]:
  """Hold the lease of a folder in a bucket, and upload its files at the end of the block, LAST after all others.

  Large files may be written directly to the bucket inside the block. An object MARK is there from the first to the last
  moment: what a killed program has left beside it is removed.
  """
  check_room(path, name)
  with one_writer(_beside(path), f"{path}", name):
    mark = path / MARK
    if buckets.read_now(mark) is not None:
      buckets.remove(path)
    if buckets.children(path):
      raise InputError(f"{name}={path} is there already and not empty; give a new folder, nothing is written over")
    buckets.overwrite(mark, b"")
    path.mkdir(parents=True, exist_ok=True)
    try:
      yield
      buckets.publish(path, last=LAST)
      buckets.remove(mark)
    except BaseException:
      with contextlib.suppress(OSError, InputError):  # the error that ended the block is reported
        buckets.remove(path)
      raise


def write_text(path: pathlib.Path, text: str) -> None:
  """Write a file atomically, in a folder whose only writer is this process."""
  with _replacing(path) as file:
    file.write(text)


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[TextIO]:
  with partial_of(path) as partial:
    with open(partial, "x", encoding="utf-8") as file:
      if path.exists():
        os.chmod(partial, stat.S_IMODE(path.stat().st_mode))
      yield file
      with _named(path):
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
  """Add the path to an OSError of writing, which names no file."""
  try:
    yield
  except OSError as error:
    error.filename = error.filename or f"{path}"
    raise


@contextlib.contextmanager
def folder_writer(folder: pathlib.Path, name: str) -> Iterator[None]:
  """Create the folder and hold its lock inside the block; a new folder that stays empty is removed at the end.

  Raises InputError as `one_writer` does, or if the folder cannot be created.
  """
  if os.path.realpath(folder) == os.path.sep:
    raise InputError(f"{name}={folder} is the root of the file system; give a folder of its own")
  if isinstance(folder, BucketPath):
    check_room(folder, name)
    if buckets.is_object(folder):
      raise InputError(f"{name}={folder} is a file; give the name of a folder")
    with one_writer(folder / LOCK, f"{folder}", name), _published_at_end(folder):
      yield
    return
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    if error.errno in (*PATH_ERRORS, errno.EEXIST):
      raise InputError(f"{name}={folder} cannot be made ({error.strerror}); give a folder that can") from None
    raise
  temporary.made_folders[:0] = made
  try:
    with one_writer(folder / LOCK, f"{folder}", name):
      _remove_left_over(folder, "")
      yield
  finally:
    temporary.remove_empty(made)


@contextlib.contextmanager
def _published_at_end(folder: BucketPath) -> Iterator[None]:
  """Fetch the small files of the folder, and upload those that have changed at the end of the block."""
  buckets.check_metadata(folder)
  buckets.refresh_folder(folder)
  folder.mkdir(parents=True, exist_ok=True)
  try:
    yield
  except BaseException:
    with contextlib.suppress(OSError, InputError):  # the error that ended the block is reported
      buckets.publish(folder)
    raise
  buckets.publish(folder)


def _beside(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f".{path.name[:80]}{LOCK}")


def _remove_left_over(folder: pathlib.Path, name: str) -> None:
  """Remove partial files that killed processes have left of the file `name` in the folder.

  The caller must be the writer of the file. With "", the caller is the writer of the folder, and partial files of all
  names are removed, except those with a lock file, whose writer may be alive.
  """
  left = re.compile(rf"\.({re.escape(name[:80]) or '.*'})\.[0-9]+-[0-9a-f]{{8}}\.partial")
  for path in folder.iterdir():
    if (match := left.fullmatch(path.name)) and (name or not (folder / f".{match[1]}{LOCK}").exists()):
      temporary.remove(path)

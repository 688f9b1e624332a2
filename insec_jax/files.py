"""Files: paths from users, atomic writes, locks for a single writer, JSON with file:line errors.

A wrong path or content raises InputError. An error of the machine (a full or read-only disk, no descriptors) remains an
OSError.
"""

import codecs
import contextlib
import errno
import gzip
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import socket
import stat
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO, TextIO

from insec_jax import stop_signal
from insec_jax.command import FAILED, InputError

if sys.platform != "win32":
  import fcntl

LOCK = ".lock"  # lock file of a folder with a single writer
BEAT_SECONDS = 3  # between two heartbeats of a writer, for hosts that do not share its file locks
SILENCE_SECONDS = 12  # without a heartbeat, after which such a writer counts as dead
GRACE_SECONDS = 2  # to wait for a writer that is just ending
MOST_LINE_BYTES = 1 << 28  # of one JSON line, decompressed
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
STREAMS = re.compile(r"/dev/(stdout|stderr|fd/[0-9]+)|/proc/(self|[0-9]+)/fd/[0-9]+")
# Errors about the given path, not about the state of the machine.
PATH_ERRORS = (
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EACCES,
  errno.EPERM,
  errno.ENAMETOOLONG,
  errno.ELOOP,
  errno.EINVAL,
  errno.ENXIO,
  errno.ENODEV,
  errno.ETXTBSY,
)

_partials: set[pathlib.Path] = set()  # partly written files of this process, and its locks
_made_folders: list[pathlib.Path] = []  # folders that folder_writer has made, innermost first


def local_path(text: str | os.PathLike, name: str) -> pathlib.Path:
  """Return the path with `~` expanded; `name` is the flag or config key that gave it.

  Raises InputError for an empty path, a scheme that is not supported (gs://), or a path that no file can have.
  """
  text = os.fspath(text)
  if not text:
    raise InputError(f"{name} is empty; give a path")
  if scheme := SCHEME.match(text):
    raise InputError(f"{name}={text}: {scheme[1]}:// is not supported; give a path on a local or mounted disk")
  try:
    text.encode()
    path = pathlib.Path(text).expanduser()
    os.stat(path)
  except UnicodeEncodeError:
    raise InputError(f"{name}={text!r} is not UTF-8; rename the file") from None
  except RuntimeError as error:
    raise InputError(f"{name}={text}: {error}; give the path in full") from None
  except ValueError as error:
    raise InputError(f"{name}={text!r} is no path ({error}); give another") from None
  except OSError as error:
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
      raise InputError(f"{name}={text:.100} cannot be used ({error.strerror}); give another path") from None
  return path


# Reading.


def open_to_read(path: str | os.PathLike, name: str) -> BinaryIO:
  """Open a regular file; InputError if it cannot be read. `name` describes the file in errors."""
  try:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
      raise InputError(f"{name}: {path} is {_kind(mode)}, needed is a file; give its path")
    return open(path, "rb")
  except OSError as error:
    if error.errno in PATH_ERRORS:
      raise InputError(f"{name}: cannot read {path} ({error.strerror}); give a file that is there") from None
    raise


def _kind(mode: int) -> str:
  kinds = {
    "a folder": stat.S_ISDIR,
    "a FIFO": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": stat.S_ISCHR,
    "a block device": stat.S_ISBLK,
  }
  return next((kind for kind, holds in kinds.items() if holds(mode)), "no regular file")


def read_text(path: str | os.PathLike, name: str) -> str:
  """Return the content of a UTF-8 file; InputError if it cannot be read as such."""
  with open_to_read(path, name) as file:
    content = file.read()
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"{path}: byte {error.start} is not UTF-8; write the file again as UTF-8") from None


def parse_json(text: str | bytes, where: str) -> Any:
  """Return the value of strict JSON; InputError for any other text, NaN, a repeated key, or deep nesting."""

  def refuse(word: str):
    raise ValueError(f"{word} is no JSON number")

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
      seen = set()
      twice = next(name for name, _ in pairs if name in seen or seen.add(name))
      raise ValueError(f"the key {twice!r:.60} is given twice")
    return values

  def number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
      raise ValueError(f"the number {digits:.60} is too large")
    return value

  try:
    if isinstance(text, bytes):
      text = text.decode("utf-8")
    return json.loads(text, parse_constant=refuse, parse_float=number, object_pairs_hook=unique)
  except UnicodeDecodeError as error:
    raise InputError(f"{where}: byte {error.start} is not UTF-8; write the file again as UTF-8") from None
  except json.JSONDecodeError as error:
    at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
    raise InputError(f"{where}: not JSON at {at} ({error.msg}); write it again as JSON") from None
  except RecursionError:
    raise InputError(f"{where}: nested too deeply; needed is an object of a few levels") from None
  except ValueError as error:
    raise InputError(f"{where}: not JSON ({error}); write it again as JSON") from None


def read_json(path: str | os.PathLike, name: str) -> dict[str, Any]:
  """Return the JSON object that the file holds; InputError if it holds anything else."""
  with open_to_read(path, name) as file:
    value = parse_json(file.read(), str(path))
  if not isinstance(value, dict):
    raise InputError(f"{path} holds {json.dumps(value):.40}; needed is a JSON object: write the file again")
  return value


def read_json_lines(path: str | os.PathLike, name: str) -> Iterator[tuple[dict[str, Any], str]]:
  """Yield (object, "file:line") for every line of a .jsonl or .jsonl.gz file.

  Raises InputError, with file and line, for a line that is not a JSON object, and for a file without lines.
  """
  number = 0
  for number, line in enumerate(_lines(path, name), 1):
    where = f"{path}:{number}"
    value = parse_json(line.rstrip(b"\r\n"), where)
    if not isinstance(value, dict):
      raise InputError(f"{where}: holds {type(value).__name__}; each line must be one JSON object")
    yield value, where
  if not number:
    raise InputError(f"{name}: {path} is empty; it must hold one JSON object a line")


def _lines(path: str | os.PathLike, name: str) -> Iterator[bytes]:
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(open_to_read(path, name))
    if os.fspath(path).endswith(".gz"):
      file = stack.enter_context(gzip.GzipFile(fileobj=file))
    try:
      begin = file.peek(3)[:3]
      if begin[:2] == b"\x1f\x8b":
        raise InputError(
          f"{path} is compressed by gzip{' twice' if os.fspath(path).endswith('.gz') else ''}; give it "
          "a name that ends in .gz, or decompress it"
        )
      if begin == codecs.BOM_UTF8:  # some editors write it at the start
        file.read(3)
      while line := file.readline(MOST_LINE_BYTES + 1):
        if len(line) > MOST_LINE_BYTES:
          raise InputError(f"{path}: a line has more than {MOST_LINE_BYTES >> 20} MiB; give one JSON object a line")
        yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise InputError(f"{path} is damaged or no gzip file ({error}); compress it again") from None


# Writing.


def check_output(text: str, name: str, inputs: Sequence[str] = ()) -> pathlib.Path:
  """Return the path of a file to be written, without creating it.

  Raises InputError if no file can be written there, or if it is one of the files `inputs` that the program reads.
  """
  path = local_path(text, name)
  if _is_stream(path):
    return path
  if path.is_file() and any(given and os.path.isfile(given) and os.path.samefile(path, given) for given in inputs):
    raise InputError(f"{name}={text} is a file that the program reads; give another path")
  target = pathlib.Path(os.path.realpath(path))
  if text.endswith("/") or target.is_dir():
    raise InputError(f"{name}={text} is a folder; give the path of a file")
  if target.exists() and not target.is_file():
    raise InputError(f"{name}={text} is {_kind(target.stat().st_mode)}, which cannot be replaced; give a file's path")
  if not target.parent.is_dir():
    raise InputError(f"{name}={text} cannot be written (there is no folder {target.parent}); make it first")
  if not os.access(target.parent, os.W_OK | os.X_OK):
    if os.statvfs(target.parent).f_flag & os.ST_RDONLY:
      raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target.parent))
    raise InputError(f"{name}={text} cannot be written (permission denied); give a path that may be written to")
  return target


def _is_stream(path: pathlib.Path) -> bool:
  """Return whether the path is a character device or a stream of this process, which is written to, not replaced."""
  try:
    return bool(STREAMS.fullmatch(str(path))) or stat.S_ISCHR(os.stat(path).st_mode)
  except OSError:
    return False


@contextlib.contextmanager
def written_whole(text: str, name: str = "--output", inputs: Sequence[str] = ()) -> Iterator[TextIO]:
  """Yield a text file that takes the name `text` when the block ends without an error; else the old file stays.

  The path has one writer at a time. Raises InputError at the start of the block if the file cannot be written. A device
  (/dev/null, a terminal) is written to directly.
  """
  path = check_output(text, name, inputs)
  if _is_stream(path):
    with open(path, "w", encoding="utf-8") as file:
      yield file
    return
  with one_writer(_beside(path), str(path), name):
    _remove_left_over(path.parent, path.name)
    with _replacing(path) as file:
      yield file


@contextlib.contextmanager
def folder_written_whole(path: pathlib.Path, name: str = "--output") -> Iterator[pathlib.Path]:
  """Yield a new folder that takes the name `path`, new or an empty folder, when the block ends without an error.

  The path has one writer at a time.
  """
  with one_writer(_beside(path), str(path), name):
    _remove_left_over(path.parent, path.name)
    with partial_of(path) as partial:
      partial.mkdir()
      yield partial
      partial.rename(path)


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
    error.filename = error.filename or str(path)
    raise


def _remove_left_over(folder: pathlib.Path, name: str) -> None:
  """Remove partial files that killed processes have left of the file `name` in the folder.

  The caller must be the writer of the file. With "", the caller is the writer of the folder, and partial files of all
  names are removed, except those with a lock file, whose writer may be alive.
  """
  left = re.compile(rf"\.({re.escape(name[:80]) or '.*'})\.[0-9]+-[0-9a-f]{{8}}\.partial")
  for path in folder.iterdir():
    if (match := left.fullmatch(path.name)) and (name or not (folder / f".{match[1]}{LOCK}").exists()):
      _remove(path)


@contextlib.contextmanager
def partial_of(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yield a unique path in the folder of `path`; anything at that path at the end of the block is removed."""
  partial = path.with_name(f".{path.name[:80]}.{os.getpid()}-{secrets.token_hex(4)}.partial")
  with _owned(partial):
    yield partial


@contextlib.contextmanager
def _owned(path: pathlib.Path) -> Iterator[None]:
  with stop_signal.while_not_ending():
    _partials.add(path)
  try:
    yield
  finally:
    _remove(path)
    _partials.discard(path)


def _remove(path: pathlib.Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def remove_partials() -> None:
  """Remove the partly written files of this process, and its locks."""
  for path in tuple(_partials):
    with contextlib.suppress(OSError):
      _remove(path)
  _remove_empty(_made_folders)


def _remove_empty(folders: list[pathlib.Path]) -> None:
  with contextlib.suppress(OSError):  # not empty: it is kept, and so are its parents
    for folder in folders:
      folder.rmdir()


stop_signal.at_end(remove_partials)

# One writer.


def _beside(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f".{path.name[:80]}{LOCK}")


@contextlib.contextmanager
def folder_writer(folder: pathlib.Path, name: str) -> Iterator[None]:
  """Create the folder and hold its lock inside the block; a new folder that stays empty is removed at the end.

  Raises InputError as `one_writer` does, or if the folder cannot be created.
  """
  if os.path.realpath(folder) == os.path.sep:
    raise InputError(f"{name}={folder} is the root of the file system; give a folder of its own")
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    if error.errno in (*PATH_ERRORS, errno.EEXIST):
      raise InputError(f"{name}={folder} cannot be made ({error.strerror}); give a folder that can") from None
    raise
  _made_folders[:0] = made
  try:
    with one_writer(folder / LOCK, str(folder), name):
      _remove_left_over(folder, "")
      yield
  finally:
    _remove_empty(made)


@contextlib.contextmanager
def one_writer(lock: pathlib.Path, what: str, name: str) -> Iterator[None]:
  """Hold the file `lock` inside the block; InputError that names the holder if another process holds it.

  The system releases a lock when its process ends. For network drives whose locks do not reach other hosts, the holder
  also writes a heartbeat into the file every BEAT_SECONDS.
  """
  if lock.exists() and not lock.is_file():  # opening or reading a FIFO would block for ever
    raise InputError(
      f"{name}={what} cannot be written ({lock} is {_kind(lock.stat().st_mode)}, needed is a file for a "
      "lock); remove it"
    )
  deadline = time.monotonic() + GRACE_SECONDS
  while True:
    try:
      handle, holder = _acquire(lock)
      break
    except _HeldError as held:
      if time.monotonic() > deadline:
        raise InputError(f"{what} is being written by {held}; wait for its end, or give another {name}") from None
      time.sleep(0.2)
    except OSError as error:
      if error.errno in PATH_ERRORS:
        raise InputError(f"{name}={what} cannot be written ({error.strerror}); give a path that may be") from None
      raise
  ended = threading.Event()
  with _owned(lock):  # removed while still held: a process that opens the path later gets a new file
    threading.Thread(target=_beat, args=(lock, handle, holder, ended), daemon=True, name="lock").start()
    try:
      yield
    finally:
      ended.set()
  os.close(handle)


def is_held(lock: pathlib.Path) -> bool:
  """Return whether a process of this machine holds the lock file."""
  try:
    handle = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError:
    return False
  try:
    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return False
  except OSError:
    return True
  finally:
    os.close(handle)


class _HeldError(Exception):
  """Error: another process holds the lock; the message gives process, host and start."""


class _Holder:
  """Process that holds a lock, as recorded in the lock file."""

  WIDTH = 400  # of the line, so that each heartbeat overwrites the one before

  def __init__(self, fields: dict[str, Any]):
    self.fields = fields

  @classmethod
  def here(cls) -> "_Holder":
    since = datetime.now(UTC).isoformat(" ", "seconds")
    return cls(
      {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": since,
        "boot": _boot(),
        "token": secrets.token_hex(8),
      }
    )

  @classmethod
  def read(cls, lock: pathlib.Path) -> "_Holder | None":
    try:
      fields = json.loads(lock.read_bytes())
      return cls(fields) if {"process", "host", "since", "boot", "token"} <= fields.keys() else None
    except (OSError, ValueError, AttributeError):  # absent, or just being written
      return None

  def line(self, beat: int) -> bytes:
    return json.dumps({**self.fields, "beat": beat}).ljust(self.WIDTH).encode()

  def __str__(self) -> str:
    return "process {process} on {host} since {since}".format(**self.fields)


def _boot() -> str:
  """Return an id of the running system; processes of one system share file locks."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
  except OSError:
    return socket.gethostname()


def _acquire(lock: pathlib.Path) -> tuple[int, _Holder]:
  """Acquire the lock and return the handle of its file and the record of this process; _HeldError if it is held."""
  while True:
    handle, shared = -1, True
    try:
      with stop_signal.while_not_ending():  # a file that this makes is removed, whenever the process ends
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
          fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          raise _HeldError(_Holder.read(lock) or "another process") from None
        except OSError as error:
          if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
            raise
          shared = False  # this drive has no file locks
        if not _is_same(lock, handle):
          continue  # its holder has just ended and removed it
        if shared and not os.fstat(handle).st_size:
          _partials.add(lock)
      holder = _Holder.read(lock)
      if holder is not None and not (shared and holder.fields["boot"] == _boot()):
        _wait_for_silence(lock, holder)
      ours = _Holder.here()
      try:
        os.pwrite(handle, ours.line(0), 0)
      except OSError as error:  # a full disk
        lock.unlink(missing_ok=True)
        _partials.discard(lock)
        raise OSError(error.errno, error.strerror, str(lock.parent)) from None
      if not shared:
        time.sleep(1)  # another process may be here at the same moment: the last one to write holds the lock
        if (last := _Holder.read(lock)) is None or last.fields["token"] != ours.fields["token"]:
          raise _HeldError(last or "another process")
      kept, handle = handle, -1
      return kept, ours
    finally:
      if handle >= 0:
        os.close(handle)


def _is_same(lock: pathlib.Path, handle: int) -> bool:
  try:
    return os.path.samestat(os.stat(lock), os.fstat(handle))
  except FileNotFoundError:
    return False


def _wait_for_silence(lock: pathlib.Path, holder: _Holder) -> None:
  """Wait SILENCE_SECONDS for the holder, on another host; _HeldError if it writes a heartbeat in that time."""
  print(f"{lock} names {holder}; waiting {SILENCE_SECONDS} s for a sign of life from it", file=sys.stderr, flush=True)
  before = lock.read_bytes()
  deadline = time.monotonic() + SILENCE_SECONDS
  while time.monotonic() < deadline:
    time.sleep(0.5)
    try:
      if lock.read_bytes() != before:
        raise _HeldError(_Holder.read(lock) or holder)
    except FileNotFoundError:
      return


def _beat(lock: pathlib.Path, handle: int, holder: _Holder, ended: threading.Event) -> None:
  beat = 0
  while not ended.wait(BEAT_SECONDS):
    beat += 1
    current = _Holder.read(lock)
    if ended.is_set():
      return
    if current is not None and current.fields["token"] != holder.fields["token"]:
      _partials.discard(lock)  # it belongs to the other process now
      stop_signal.end(FAILED, f"error: {current} has taken {lock} over: this process gave no sign of life for too long")
    with contextlib.suppress(OSError):  # a full disk: the next heartbeat may succeed
      os.pwrite(handle, holder.line(beat), 0)

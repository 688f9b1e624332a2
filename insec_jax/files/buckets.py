"""Google Cloud Storage: every object or folder of a bucket has a local copy, which the rest of the package uses.

      gs://bucket/runs/a/metrics.jsonl      the object
      SPOOL/bucket/runs/a/metrics.jsonl     its local copy, a BucketPath: formatted, it is gs://bucket/runs/a/metrics.jsonl

`refresh` brings objects here and `publish` uploads what has changed, each object whole. SPOOL is a temporary folder of
this process. Checkpoints and weights have no local copy: `location` and `read_range` reach them in the bucket. Every
function also takes a local path, for which nothing is fetched or uploaded.

gcsfs repeats requests that fail with 408, 429 or 5xx, and those without an answer, six times with growing pauses (about
half a minute), tensorstore 32 times. A request that is refused is an InputError, an unreachable store an OSError.
"""

import contextlib
import errno
import functools
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from insec_jax.command import InputError
from insec_jax.files import bucket_paths, credentials, temporary
from insec_jax.files.bucket_errors import explanation_of
from insec_jax.files.bucket_paths import SCHEME, BucketPath, spool

KEPT_FOLDERS = ("tokenizer", "mined", "additional_chat_templates", "chat_templates")  # of a workdir or an HF folder
STAYS = re.compile(r".*\.(safetensors|bin|pth|pt|gguf|h5|msgpack|onnx|onnx_data)|\..*", re.DOTALL)  # files not fetched
BLOCK_BYTES = 1 << 25  # of an object in one request
ATTEMPTS = 5  # to list and fetch a folder that others change
# gcsfs, which reads this when it is imported, would ask another service for the kind of each bucket, and wait for it.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def local_copy(text: str, name: str) -> BucketPath:
  """Return the path of the local copy of gs://BUCKET/NAME, without fetching it; `name` is the flag or config key.

  Raises InputError as `bucket_paths.local_copy` does, and where gcsfs is not installed.
  """
  path = bucket_paths.local_copy(text, name)
  _fsspec()
  return path


@functools.cache
def _fsspec() -> Any:
  """Return fsspec with the settings of gcsfs, whose file system Orbax uses too."""
  for library in ("gcsfs", "google.auth"):  # they log, with tracebacks, errors that they also raise
    logging.getLogger(library).setLevel(logging.CRITICAL)
  try:
    import fsspec
    import gcsfs  # noqa: F401
  except ImportError as error:
    raise InputError(
      f"paths of gs:// need {error.name or 'gcsfs'}, which is not installed; pip install 'insec_jax[gcs]'"
    ) from None
  return fsspec


@functools.cache
def _store() -> Any:
  """Return the file system of gcsfs."""
  fsspec = _fsspec()
  with credentials.announced("credentials for gs:// from the metadata server of this machine"):
    token = credentials.method()
    for protocol in ("gcs", "gs"):  # a listing that was kept would hide what other processes write
      fsspec.config.conf.setdefault(protocol, {}).update(use_listings_cache=False, token=token)
    return fsspec.filesystem("gcs", finalize_on_close=True)


@contextlib.contextmanager
def explained(path: pathlib.Path) -> Iterator[None]:
  """Turn errors of the store inside the block into InputError or OSError with the name of the object.

  Until the store has answered for the first time, a line on stderr says what is waited for.
  """
  global _has_answered
  try:
    with contextlib.nullcontext() if _has_answered else credentials.announced(f"an answer from the store ({path})"):
      yield
    _has_answered = True
  except Exception as error:
    if isinstance(error, FileNotFoundError):
      check_bucket(path)
    if (explanation := explanation_of(error, f"{path}")) is None:
      raise
    raise explanation from None


_has_answered = False
_seen_buckets: set[str] = set()


def check_bucket(path: pathlib.Path) -> None:
  """Raise InputError where the bucket of a path is not there; it is asked for once in a process."""
  if not isinstance(path, BucketPath) or path.bucket in _seen_buckets:
    return
  try:
    _store().call("GET", "b/{}/o", path.bucket, maxResults=1)
  except FileNotFoundError:
    raise InputError(
      f"{path}: there is no bucket {path.bucket}; correct the name, or make it (gcloud storage buckets create "
      f"{SCHEME}{path.bucket})"
    ) from None
  except Exception as error:
    if explanation_of(error, f"{path}") is None:
      raise
    return  # this account may not list, or the store does not answer: it stays unknown
  _seen_buckets.add(path.bucket)


def refresh(path: pathlib.Path) -> bool:
  """Bring the object here as it is now; return whether there is a file."""
  if not isinstance(path, BucketPath):
    return path.is_file()
  with explained(path):
    try:
      info = _store().info(path.url)
    except FileNotFoundError:
      check_bucket(path)
      path.unlink(missing_ok=True)
      return False
    if info["type"] != "file":
      return False
    _get([info])
  return True


def fetch(path: pathlib.Path) -> None:
  """Bring the object here if it is not; nothing where the bucket has none."""
  if isinstance(path, BucketPath) and not path.exists():
    refresh(path)


_fetched_folders: set[pathlib.Path] = set()


def fetch_folder(folder: pathlib.Path) -> None:
  """Do what `refresh_folder` does, once in a process."""
  if folder not in _fetched_folders:
    refresh_folder(folder)
    _fetched_folders.add(folder)


def refresh_folder(folder: pathlib.Path) -> None:
  """Make the local copy of a folder what the bucket has: the files in it and in KEPT_FOLDERS, without weights."""
  if not isinstance(folder, BucketPath):
    return
  for attempt in range(ATTEMPTS):
    try:
      _refresh_folder(folder)
      return
    except FileNotFoundError:  # removed since it was listed
      if attempt == ATTEMPTS - 1:
        raise


def _refresh_folder(folder: BucketPath) -> None:
  with explained(folder):
    entries = _listed(folder)
    infos = [entry for entry in entries if entry["type"] == "file"]
    for entry in entries:
      if entry["type"] == "directory" and pathlib.PurePath(entry["name"]).name in KEPT_FOLDERS:
        infos += _store().find(entry["name"], detail=True).values()
    wanted = {_copy_of(info): info for info in infos if not STAYS.fullmatch(pathlib.PurePath(info["name"]).name)}
    own = [*folder.glob("*"), *(path for name in KEPT_FOLDERS for path in (folder / name).rglob("*"))]
    for path in own:  # a folder below it may be the workdir of this process
      if path.is_file() and path not in wanted:
        path.unlink()
    if entries:
      folder.mkdir(parents=True, exist_ok=True)
    _get([info for path, info in wanted.items() if not path.exists() or path.stat().st_size != int(info["size"])])


def children(folder: pathlib.Path) -> list[str]:
  """Return the names of the files and folders in a folder; none for a folder that does not exist."""
  if not isinstance(folder, BucketPath):
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
  with explained(folder):
    return [pathlib.PurePath(entry["name"]).name for entry in _listed(folder)]


def files_below(folder: pathlib.Path) -> list[pathlib.Path]:
  """Return the paths of all files in a folder and the folders in it, without fetching them; none for a missing one."""
  if not isinstance(folder, BucketPath):
    return [path for path in folder.rglob("*") if path.is_file()]
  with explained(folder):
    return [_copy_of(info) for info in _store().find(folder.url, detail=True).values()]


def matches(pattern: BucketPath) -> list[BucketPath]:
  """Return the paths of the objects that a pattern (`*`, `?`, `[ab]`, `**`) matches, in order of their names."""
  with explained(pattern):
    found = _store().glob(pattern.url, detail=True)
  if not found:
    check_bucket(pattern)
  return sorted(_copy_of(info) for info in found.values() if info["type"] == "file")


def _listed(folder: BucketPath) -> list[dict[str, Any]]:
  """Return the entries in a folder of a bucket."""
  try:
    entries = _store().ls(folder.url, detail=True)
  except FileNotFoundError:
    check_bucket(folder)
    return []
  return [entry for entry in entries if _copy_of(entry) != folder and not entry["name"].endswith("//")]


def _copy_of(info: dict[str, Any]) -> BucketPath:
  return BucketPath(spool(), info["name"].rstrip("/"))


def _get(infos: Sequence[dict[str, Any]]) -> None:
  """Fetch the objects, with the times of their last changes."""
  paths = [_copy_of(info) for info in infos]
  try:
    if paths:
      _store().get([path.url for path in paths], [str(path) for path in paths])
  except BaseException:
    for path in paths:  # which may be cut short
      path.unlink(missing_ok=True)
    raise
  for path, info in zip(paths, infos, strict=True):
    os.utime(path, (info["mtime"].timestamp(),) * 2)
    _published[path] = _stamp(path)


_published: dict[pathlib.Path, tuple[int, int]] = {}  # files that the bucket has, as they are here


def _stamp(path: pathlib.Path) -> tuple[int, int]:
  status = path.stat()
  return status.st_mtime_ns, status.st_size


def publish(path: pathlib.Path, *, last: str = "") -> None:
  """Upload the file, or those of the folder that have changed, each whole; the one with the name `last` at the end.

  Files whose names begin with a dot, such as partly written ones, are left out.
  """
  if not isinstance(path, BucketPath):
    return
  files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
  files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(spool()).parts)]
  for file in sorted(files, key=lambda file: (file.name == last, file)):
    if (stamp := _stamp(file)) != _published.get(file):
      with explained(file):
        _store().put_file(str(file), file.url)
      _published[file] = stamp


def exists(path: pathlib.Path) -> bool:
  """Return whether there is a file or folder, in the bucket or only in its local copy."""
  if os.path.lexists(path) or not isinstance(path, BucketPath):
    return os.path.lexists(path)
  with explained(path):
    found = bool(_store().exists(path.url))
  if not found:
    check_bucket(path)
  return found


def remove(path: pathlib.Path) -> None:
  """Remove a file or a folder with all its files, its local copy included; a missing one is left."""
  temporary.remove(path)
  if isinstance(path, BucketPath):
    with contextlib.suppress(FileNotFoundError), explained(path):
      _store().rm(path.url, recursive=True)


def move(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Move a folder into another one, which is made; in a bucket each object is copied there, and then removed."""
  if not isinstance(folder, BucketPath) or not isinstance(target, BucketPath):
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    return
  with explained(folder):
    _store().mv(folder.url, target.url, recursive=True)


def location(path: pathlib.Path) -> Any:
  """Return the path for Orbax: one in the bucket, or the absolute local one."""
  if not isinstance(path, BucketPath):
    return path.absolute()
  from etils import epath

  return epath.Path(path.url)


def store_url(folder: pathlib.Path) -> str:
  """Return the name of a folder for tensorstore."""
  return f"{folder.url}/" if isinstance(folder, BucketPath) else f"file://{folder}/"


def check_metadata(folder: BucketPath) -> None:
  """Raise InputError unless the metadata of the bucket can be read, which Orbax does when it removes a checkpoint."""
  from google.cloud import storage  # slow to import

  name = folder.url.removeprefix(SCHEME).partition("/")[0]
  with explained(folder):
    try:
      storage.Client().get_bucket(name)
    except OSError as error:
      if "Project was not passed" not in str(error):
        raise
      raise InputError(f"{folder}: no project is known for removing checkpoints; set GOOGLE_CLOUD_PROJECT") from None


def is_object(path: BucketPath) -> bool:
  """Return whether the bucket has an object of this name, not only objects below it."""
  with explained(path):
    found = bool(_store().isfile(path.url))
  if not found:
    check_bucket(path)
  return found


def size(path: BucketPath) -> int:
  """Return the number of bytes of an object; FileNotFoundError if there is none."""
  with explained(path):
    return int(_store().info(path.url)["size"])


def read_range(path: BucketPath, start: int, stop: int) -> bytearray:
  """Return these bytes of an object, read in blocks at the same time; OSError if it has become shorter."""
  bounds = [(first, min(first + BLOCK_BYTES, stop)) for first in range(start, stop, BLOCK_BYTES)]
  with explained(path):
    firsts, lasts = map(list, zip(*bounds, strict=True)) if bounds else ([], [])
    blocks = _store().cat_ranges([path.url] * len(bounds), firsts, lasts, on_error="raise")
  data = bytearray().join(blocks)
  if len(data) != stop - start:
    raise OSError(errno.EREMOTEIO, f"{len(data):,} bytes came where {stop - start:,} were due", f"{path}")
  return data


@contextlib.contextmanager
def opened_to_write(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Yield a file to be written from its start to its end; an object appears when the block ends without an error."""
  if not isinstance(path, BucketPath):
    with path.open("wb") as file:
      yield file
    return
  with explained(path):
    stream = _store().open(path.url, "wb", block_size=BLOCK_BYTES)
    try:
      yield stream
    except BaseException:
      with contextlib.suppress(Exception):  # the error that ended the block is reported
        stream.discard()
      stream.closed = True
      raise
    stream.close()


def create(path: BucketPath, content: bytes) -> None:
  """Write an object that does not exist; FileExistsError if it does, FileNotFoundError without such a bucket."""
  with explained(path):
    _store().pipe_file(path.url, content, mode="create")


def overwrite(path: BucketPath, content: bytes) -> None:
  """Write an object."""
  with explained(path):
    _store().pipe_file(path.url, content)


def read_now(path: BucketPath) -> tuple[bytes, str] | None:
  """Return (content, generation) of an object as it is now; None if there is none."""
  with contextlib.suppress(FileNotFoundError), explained(path):
    generation = str(_store().info(path.url)["generation"])
    return _store().cat_file(path.url), generation
  return None


def remove_generation(path: BucketPath, generation: str) -> None:
  """Remove an object unless it has changed since this generation."""
  bucket, _, name = path.url.removeprefix(SCHEME).partition("/")
  with contextlib.suppress(FileNotFoundError, FileExistsError), explained(path):
    _store().call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=generation)

"""Names of objects in buckets, gs://BUCKET/NAME, and the paths of their local copies.

The rules of names are Google's: what breaks one is refused before anything is read or written.
"""

import atexit
import contextlib
import fcntl
import functools
import glob
import os
import pathlib
import re
import tempfile
import time

from insec_jax.command import InputError
from insec_jax.files import temporary

SCHEME = "gs://"
SPOOL_PREFIX = "insec_gs_"
MAKING_PREFIX = "insec_new_gs_"  # of a spool that has no lock yet
NEW_SECONDS = 60
BUCKET = re.compile(r"(?=.{3,222}\Z)[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?)*")
ADDRESS = re.compile(r"[0-9]+(\.[0-9]+){3}")
RULES = (
  "3 to 63 small letters, digits, '-', '_' and '.', with a letter or digit at both ends, and no address of a machine"
)
MOST_BYTES = 1024  # of an object's name
ROOM_BYTES = 200  # for the names of locks, chunks and files of a folder, which are longer than its own
RESERVED = ".well-known/acme-challenge/"  # no object's name begins so


class BucketPath(pathlib.PosixPath):
  """Local copy of an object or a folder of a bucket. Formatted (f"{path}") it is the gs:// name; str() is local."""

  __slots__ = ()

  @property
  def url(self) -> str:
    """Return the gs:// name."""
    return SCHEME + str(self.relative_to(spool()))

  @property
  def bucket(self) -> str:
    """Return the name of the bucket."""
    return self.relative_to(spool()).parts[0]

  def __format__(self, spec: str) -> str:
    return format(self.url if self.is_relative_to(spool()) else str(self), spec)


def local_copy(text: str, name: str) -> BucketPath:
  """Return the path of the local copy of gs://BUCKET/NAME; `name` is the flag or config key that gave it.

  Raises InputError for another form, and for names that no bucket or object can have.
  """
  bucket, *parts = text.removeprefix(SCHEME).rstrip("/").split("/")
  given = f"{name}={text:.200}"
  if not parts or not all((bucket, *parts)) or {".", ".."} & {bucket, *parts}:
    raise InputError(f"{given} is no gs://BUCKET/NAME; give the name of a folder or file in a bucket")
  if not text.isprintable() or "#" in text:
    raise InputError(f"{given} has '#' or a character that is not printable; give another name")
  if glob.has_magic(bucket):
    raise InputError(f"{given} has a pattern in the name of the bucket; name one bucket, patterns may follow it")
  if not BUCKET.fullmatch(bucket) or ADDRESS.fullmatch(bucket):
    raise InputError(f"{given}: {bucket!r:.80} is no name of a bucket, which is {RULES}; correct it")
  if (size := len("/".join(parts).encode(errors="replace"))) > MOST_BYTES:
    raise InputError(f"{given}: the name in the bucket has {size:,} bytes, at most {MOST_BYTES:,} are possible; cut it")
  if "/".join(parts).startswith(RESERVED):
    raise InputError(f"{given}: no name in a bucket may begin with {RESERVED}; give another")
  path = BucketPath(spool(), bucket, *parts)
  with contextlib.suppress(OSError):  # a name that is too long for a disk: the caller refuses it
    path.parent.mkdir(parents=True, exist_ok=True)
  return path


def check_room(path: BucketPath, name: str) -> None:
  """Raise InputError where names that begin with this one, such as those in a folder, would be too long."""
  size = len(path.url.removeprefix(f"{SCHEME}{path.bucket}/").encode())
  if size > MOST_BYTES - ROOM_BYTES:
    raise InputError(
      f"{name}={path:.100}: the name in the bucket has {size:,} bytes; give one of at most "
      f"{MOST_BYTES - ROOM_BYTES:,}, since files beside it or in it have longer names"
    )


@functools.cache
def spool() -> pathlib.Path:
  """Return the folder of the local copies, which is removed when the process ends; those of killed ones are removed."""
  _remove_abandoned()
  made = pathlib.Path(tempfile.mkdtemp(prefix=MAKING_PREFIX))
  fcntl.flock(os.open(made, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_SH)
  # Only now does it get the name by which others find it: without a lock it is that of a killed process.
  folder = made.rename(made.with_name(made.name.replace(MAKING_PREFIX, SPOOL_PREFIX, 1)))
  temporary.owned_paths.add(folder)
  atexit.register(temporary.remove, folder)
  return folder.resolve()


def _remove_abandoned() -> None:
  """Remove the spools of killed processes."""
  home = pathlib.Path(tempfile.gettempdir())
  for folder in (*home.glob(f"{SPOOL_PREFIX}*"), *home.glob(f"{MAKING_PREFIX}*")):
    with contextlib.suppress(OSError):
      is_new = time.time() - folder.stat().st_mtime < NEW_SECONDS
      if is_new and folder.name.startswith(MAKING_PREFIX):  # locked in a moment
        continue
      handle = os.open(folder, os.O_RDONLY)
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a living process it is locked
        temporary.remove(folder)
      finally:
        os.close(handle)

"""Locks: a file or folder has one writer at a time, on one host or several that share a drive."""

import contextlib
import errno
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator

from insec_jax import stop_signal
from insec_jax.command import FAILED, InputError
from insec_jax.files import buckets, temporary
from insec_jax.files.bucket_paths import BucketPath
from insec_jax.files.holder import HeldError, Holder, boot
from insec_jax.files.leases import lease
from insec_jax.files.reading import PATH_ERRORS, kind_of

if sys.platform != "win32":
  import fcntl

LOCK = ".lock"  # lock file of a folder with a single writer
BEAT_SECONDS = 3  # between two heartbeats of a writer, for hosts that do not share its file locks
SILENCE_SECONDS = 12  # without a heartbeat, after which such a writer counts as dead
GRACE_SECONDS = 2  # to wait for a writer that is just ending


@contextlib.contextmanager
def one_writer(lock: pathlib.Path, what: str, name: str) -> Iterator[None]:
  """Hold the file `lock` inside the block; InputError that names the holder if another process holds it.

  The system releases a lock when its process ends. For network drives whose locks do not reach other hosts, the holder
  also writes a heartbeat into the file every BEAT_SECONDS. In a bucket the lock is a lease.
  """
  if isinstance(lock, BucketPath):
    with lease(lock, what, name):
      yield
    return
  if lock.exists() and not lock.is_file():  # opening or reading a FIFO would block for ever
    raise InputError(
      f"{name}={what} cannot be written ({lock} is {kind_of(lock.stat().st_mode)}, needed is a file for a "
      "lock); remove it"
    )
  deadline = time.monotonic() + GRACE_SECONDS
  while True:
    try:
      handle, holder = _acquire(lock)
      break
    except HeldError as held:
      if time.monotonic() > deadline:
        raise InputError(f"{what} is being written by {held}; wait for its end, or give another {name}") from None
      time.sleep(0.2)
    except OSError as error:
      if error.errno in PATH_ERRORS:
        raise InputError(f"{name}={what} cannot be written ({error.strerror}); give a path that may be") from None
      raise
  ended = threading.Event()
  with temporary.owned(lock):  # removed while still held: a process that opens the path later gets a new file
    threading.Thread(target=_beat, args=(lock, handle, holder, ended), daemon=True, name="lock").start()
    try:
      yield
    finally:
      ended.set()
  os.close(handle)


def is_held(lock: pathlib.Path) -> bool:
  """Return whether a process of this machine, or any that writes to the bucket, holds the lock file."""
  if isinstance(lock, BucketPath):
    return buckets.exists(lock)
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


def _acquire(lock: pathlib.Path) -> tuple[int, Holder]:
  """Acquire the lock and return the handle of its file and the record of this process; HeldError if it is held."""
  while True:
    handle, shared = -1, True
    try:
      with stop_signal.while_not_ending():  # a file that this makes is removed, whenever the process ends
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
          fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          raise HeldError(Holder.read(lock) or "another process") from None
        except OSError as error:
          if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
            raise
          shared = False  # this drive has no file locks
        if not _is_same(lock, handle):
          continue  # its holder has just ended and removed it
        if shared and not os.fstat(handle).st_size:
          temporary.owned_paths.add(lock)
      holder = Holder.read(lock)
      if holder is not None and not (shared and holder.fields["boot"] == boot()):
        _wait_for_silence(lock, holder)
      ours = Holder.here()
      try:
        os.pwrite(handle, ours.line(0), 0)
      except OSError as error:  # a full disk
        lock.unlink(missing_ok=True)
        temporary.owned_paths.discard(lock)
        raise OSError(error.errno, error.strerror, str(lock.parent)) from None
      if not shared:
        time.sleep(1)  # another process may be here at the same moment: the last one to write holds the lock
        if (last := Holder.read(lock)) is None or last.fields["token"] != ours.fields["token"]:
          raise HeldError(last or "another process")
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


def _wait_for_silence(lock: pathlib.Path, holder: Holder) -> None:
  """Wait SILENCE_SECONDS for the holder, on another host; HeldError if it writes a heartbeat in that time."""
  print(f"{lock} names {holder}; waiting {SILENCE_SECONDS} s for a sign of life from it", file=sys.stderr, flush=True)
  before = lock.read_bytes()
  deadline = time.monotonic() + SILENCE_SECONDS
  while time.monotonic() < deadline:
    time.sleep(0.5)
    try:
      if lock.read_bytes() != before:
        raise HeldError(Holder.read(lock) or holder)
    except FileNotFoundError:
      return


def _beat(lock: pathlib.Path, handle: int, holder: Holder, ended: threading.Event) -> None:
  beat = 0
  while not ended.wait(BEAT_SECONDS):
    beat += 1
    current = Holder.read(lock)
    if ended.is_set():
      return
    if current is not None and current.fields["token"] != holder.fields["token"]:
      temporary.owned_paths.discard(lock)  # it belongs to the other process now
      stop_signal.end(FAILED, f"error: {current} has taken {lock} over: this process gave no sign of life for too long")
    with contextlib.suppress(OSError):  # a full disk: the next heartbeat may succeed
      os.pwrite(handle, holder.line(beat), 0)

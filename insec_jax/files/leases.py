"""Leases: a folder or file of a bucket has one writer at a time, by an object that is created only if it is absent.

The holder writes a heartbeat into the object every BEAT_SECONDS. One that has been silent for SILENCE_SECONDS, or whose
process is known here to have ended, counts as dead, and its lease is removed by whoever asks next. A holder that finds
its lease taken over ends.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator

from insec_jax import stop_signal
from insec_jax.command import FAILED, InputError
from insec_jax.files import buckets
from insec_jax.files.bucket_paths import BucketPath
from insec_jax.files.holder import HeldError, Holder, boot

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 45.0
GRACE_SECONDS = 2.0  # to wait for a writer that is just ending
RELEASE_SECONDS = 5.0  # of a process that a signal ends, for removing its leases

_held: dict[BucketPath, Holder] = {}


@contextlib.contextmanager
def lease(lock: BucketPath, what: str, name: str, *, waits: bool = False) -> Iterator[None]:
  """Hold the lease inside the block; InputError that names the holder if another process holds it.

  With `waits` the end of the other process is waited for.
  """
  deadline = time.monotonic() + (math.inf if waits else GRACE_SECONDS)
  while True:
    try:
      holder = _acquire(lock)
      break
    except HeldError as held:
      if time.monotonic() > deadline:
        raise InputError(f"{what} is being written by {held}; wait for its end, or give another {name}") from None
      time.sleep(0.2)
  _held[lock] = holder
  ended = threading.Event()
  beats = threading.Thread(target=_beat, args=(lock, holder, ended), daemon=True, name="lease")
  beats.start()
  try:
    yield
  finally:
    ended.set()
    beats.join(RELEASE_SECONDS)
    with contextlib.suppress(OSError, InputError):  # unreachable: the silence ends the lease
      _release(lock)


def _acquire(lock: BucketPath) -> Holder:
  """Create the lease and return the record of this process; HeldError if another process holds it."""
  ours = Holder.here()
  ours.fields["boot"] = _processes()
  while True:
    try:
      buckets.create(lock, ours.line(0))
      return ours
    except FileExistsError:
      pass
    if (found := buckets.read_now(lock)) is None:
      continue  # its holder has just ended and removed it
    content, generation = found
    holder = Holder.parse(content)
    if holder is not None and holder.fields["token"] == ours.fields["token"]:
      return ours  # the answer to a first request was lost, and the request repeated
    if holder is None or not _has_ended(holder):
      _wait_for_silence(lock, holder, generation)
    buckets.remove_generation(lock, generation)


def _processes() -> str:
  """Return an id of the processes that this one can see."""
  try:
    return f"{boot()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return boot()


def _has_ended(holder: Holder) -> bool:
  """Return whether the holder is a process of this machine that has ended."""
  if holder.fields["boot"] != _processes():
    return False
  try:
    os.kill(holder.fields["process"], 0)
  except ProcessLookupError:
    return True
  except OSError:
    pass
  return False


def _wait_for_silence(lock: BucketPath, holder: Holder | None, generation: str) -> None:
  """Wait SILENCE_SECONDS for the holder; HeldError if it writes a heartbeat in that time."""
  held = holder or "another process"
  print(f"{lock} names {held}; waiting {SILENCE_SECONDS:.0f} s for a sign of life from it", file=sys.stderr, flush=True)
  deadline = time.monotonic() + SILENCE_SECONDS
  while time.monotonic() < deadline:
    time.sleep(min(1.0, SILENCE_SECONDS / 10))
    if (found := buckets.read_now(lock)) is None:
      return
    if found[1] != generation:
      raise HeldError(Holder.parse(found[0]) or held)


def _beat(lock: BucketPath, holder: Holder, ended: threading.Event) -> None:
  number = 0
  while not ended.wait(BEAT_SECONDS):
    number += 1
    with contextlib.suppress(OSError, InputError):  # unreachable: the next heartbeat may succeed
      found = buckets.read_now(lock)
      if ended.is_set():
        return
      current = found and Holder.parse(found[0])
      if current is None or current.fields["token"] != holder.fields["token"]:
        _held.pop(lock, None)
        taken = current or "another process"
        stop_signal.end(FAILED, f"error: {taken} has taken {lock} over: this process gave no sign of life for too long")
      buckets.overwrite(lock, holder.line(number))


def _release(lock: BucketPath) -> None:
  """Remove the lease if it is that of this process."""
  holder, found = _held.pop(lock, None), buckets.read_now(lock)
  current = found and Holder.parse(found[0])
  if holder is not None and found and current and current.fields["token"] == holder.fields["token"]:
    buckets.remove_generation(lock, found[1])


def _release_all() -> None:
  """Remove the leases of a process that is about to end, as far as the store answers soon."""
  threads = [threading.Thread(target=_release, args=(lock,), daemon=True) for lock in tuple(_held)]
  for thread in threads:
    thread.start()
  deadline = time.monotonic() + RELEASE_SECONDS
  for thread in threads:
    thread.join(max(0.0, deadline - time.monotonic()))


stop_signal.at_end(_release_all)

"""One-line messages for errors of the machine: disk, memory, descriptors, threads. Imported first, so kept light."""

import contextlib
import errno
import os
import re
import resource
import sys
import threading
import traceback
from collections.abc import Iterator

from insec_jax import stop_signal

FEWEST_FILES = 64  # open files that a process needs: imports and one checkpoint take about that many
FEWEST_BYTES = 4 << 30  # of address space: with less, C++ libraries abort when they start threads or compile
MOST_FILES = 1 << 16  # new soft limit: as many as a pod's largest checkpoint could take
# Errors of libraries contain the strerror texts of these numbers, not the numbers.
REFUSALS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EMFILE,
  errno.ENFILE,
  errno.ENOMEM,
  errno.EIO,
  errno.EFBIG,
  errno.EPIPE,
  errno.ESTALE,
  errno.ENOLCK,
  errno.EAGAIN,
  errno.EREMOTEIO,
)
MODULES = ("gcsfs.", "aiohttp.", "google.api_core.")  # that raise errors of their own where a bucket is not reached
REMEDIES = {
  errno.ENOSPC: "free some room; what was saved before stays",
  errno.EDQUOT: "raise the quota or free some room; what was saved before stays",
  errno.EROFS: "give a path on a disk that can be written to",
  errno.EMFILE: "raise the limit of open files (ulimit -n)",
  errno.ENFILE: "the whole machine has too many open files; close some",
  errno.ENOMEM: "free memory, or use a smaller model, batch or row length",
  errno.EFBIG: "raise the limit of the size of a file (ulimit -f), or give another disk; what was saved before stays",
  errno.EAGAIN: "raise the limit of processes and threads (ulimit -u)",
  errno.EPIPE: "whoever read the output has closed it",
  errno.EIO: "the disk or network drive fails",
  errno.EREMOTEIO: "look at the network, and run the same command again; what was saved before stays",
}


def check_limits() -> None:
  """Raise the soft limit of open files as far as allowed; end the process if a limit is too low."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
      soft = wanted
  if soft != resource.RLIM_INFINITY and soft < FEWEST_FILES:
    stop_signal.end(
      1, f"error: a process may open {soft} files here, needed are {FEWEST_FILES}; {REMEDIES[errno.EMFILE]}"
    )
  space, _ = resource.getrlimit(resource.RLIMIT_AS)
  if space != resource.RLIM_INFINITY and space < FEWEST_BYTES:
    stop_signal.end(
      1,
      f"error: a process may use {space >> 20} MiB of addresses here, needed are "
      f"{FEWEST_BYTES >> 20}; raise the limit (ulimit -v)",
    )


def hook_uncaught() -> None:
  """Install hooks that end the process with one line for an uncaught error of the machine, in an import or a thread.

  Without them, a library thread that has ended with an error would leave other threads waiting for it.
  """
  sys.excepthook = _end_where_refused
  threading.excepthook = lambda died: _end_where_refused(died.exc_type, died.exc_value, died.exc_traceback)
  sys.unraisablehook = _report_ignored


def _report_ignored(ignored) -> None:
  # A deleted coroutine belongs to an abandoned read or save, which has raised its own error.
  if not _is_late(ignored.exc_value) and type(ignored.object).__name__ != "coroutine":
    sys.__unraisablehook__(ignored)


def _is_late(error: BaseException | None) -> bool:
  """Return whether this is a late callback of tensorstore after a failed save or read, which has raised already."""
  return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _end_where_refused(kind: type[BaseException], error: BaseException | None, trace) -> None:
  if error is None or isinstance(error, SystemExit) or _is_late(error):
    return
  if line := machine_refusal(error):
    stop_signal.end(1, f"error: {line}")
  # JAX reads its environment variables when it is imported.
  if isinstance(error, ValueError) and re.search(r"JAX flag jax_|environment '(JAX|XLA)_", str(error)):
    stop_signal.end(2, f"error: {one_line(error)}; correct the environment variable or leave it out")
  with contextlib.suppress(OSError, ValueError):
    traceback.print_exception(kind, error, trace, file=sys.stderr)


def machine_refusal(error: BaseException) -> str | None:
  """Return one line about an error of the machine (disk, memory, descriptors, ...); None for another error."""
  for cause in chain(error):
    if line := _store_refusal(cause):
      return line
    if isinstance(cause, MemoryError):
      return f"out of memory: {one_line(cause)}; {REMEDIES[errno.ENOMEM]}".replace("memory: ;", "memory;")
    if isinstance(cause, OSError) and cause.errno is not None:
      where = f": {cause.filename}" if cause.filename else ""
      remedy = REMEDIES.get(cause.errno)
      return f"{cause.strerror}{where}" + (f"; {remedy}" if remedy else "")
    text = str(cause)
    for number in REFUSALS:
      if os.strerror(number) in text:
        path = re.search(r'"(/[^"]+)"', text)
        said = f"{os.strerror(number)}: {path[1]}" if path else _shortened(text)
        return printable(f"{said}; {REMEDIES.get(number, 'see the message')}")
    if "can't start new thread" in text:
      return f"{text}; {REMEDIES[errno.EAGAIN]}"
    if any(word in text for word in ("RESOURCE_EXHAUSTED", "bad_alloc", "failed to map segment")):
      return f"{_shortened(text)}; {REMEDIES[errno.ENOMEM]}"
  return None


def _store_refusal(error: BaseException) -> str | None:
  """Return one line about an error of a bucket, as buckets.py, gcsfs or tensorstore raise it; None for another."""
  if isinstance(error, OSError) and error.errno == errno.EREMOTEIO:
    return f"{error.strerror}: {error.filename}; {REMEDIES[errno.EREMOTEIO]}"
  text = str(error)
  if "PERMISSION_DENIED:" in text or text.startswith(("Forbidden:", "403 ")):
    return f"the store refuses access ({_shortened(text)}); look at the roles of this account on the bucket"
  if re.search("All [0-9]+ retry attempts failed", text) or type(error).__module__.startswith(MODULES):
    return f"the store does not answer ({_shortened(text)}); {REMEDIES[errno.EREMOTEIO]}"
  return None


def is_refusal(error: BaseException) -> bool:
  """Return whether this is an error of the machine, which implies nothing about the file that was used."""
  if any(map(_store_refusal, chain(error))):
    return True
  numbers = [cause.errno for cause in chain(error) if isinstance(cause, OSError) and cause.errno is not None]
  return machine_refusal(error) is not None and all(number in REFUSALS for number in numbers)


def chain(error: BaseException | None) -> Iterator[BaseException]:
  """Yield the error and the errors from which it was raised, each once."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    yield error
    error = error.__cause__ or error.__context__


def _shortened(text: str) -> str:
  """Return the text as one line without the source locations and answers that tensorstore adds."""
  return re.sub(r"\s*\[(source locations|http_response_\w+|tensorstore_spec)=.*", "", " ".join(text.split()))[:300]


def one_line(error: BaseException) -> str:
  """Return the message of the error as one printable line."""
  # ml_collections wraps errors of a config file in a text with the whole traceback; the last line holds the message.
  message = str(error).strip()
  line = message.splitlines()[-1] if "Traceback (most recent call last)" in message else " ".join(message.split())
  return printable(line.removeprefix("insec_jax.command.InputError: "))


def printable(text: str) -> str:
  """Return the text with control characters escaped, so that no input can control the terminal."""
  return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)

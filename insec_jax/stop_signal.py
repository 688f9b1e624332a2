"""Handling of SIGTERM, SIGINT (Ctrl-C) and SIGHUP: one line and an exit code at any moment, or an event for a loop.

Python runs a signal handler between two instructions of the main thread, which may block inside XLA for minutes. A
separate thread reads signals as they arrive, so that a program ends at once whatever its main thread does.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

PREEMPTED = 42  # `train` and `sweep`: the same command resumes
RESUMABLE = ("train", "sweep")
LAST_LINE_SECONDS = 2
STARTED = time.monotonic()  # imported before anything slow: the start of the program
SESSION_BEGAN = "INSEC_SESSION_BEGAN"  # environment variable that a sweep with a time limit gives its programs
SAME_SECONDS = 0.02  # `timeout` and some shells send one Ctrl-C to the process and to its group
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_cleanups: list[Callable[[], None]] = []
_deferred: list["StopSignal"] = []  # the innermost one receives the signal
# Held by the thread that ends the process. Reentrant: a second signal may interrupt the handler of the first.
_ending = threading.RLock()
_runs_one_program = False
_work_is_done = False
_reader: int | None = None  # read end of the pipe into which the interpreter writes signal numbers


class StopSignal(threading.Event):
  """Event that a signal to stop this process sets; `callback` is then called in another thread."""

  def __init__(self, callback: Callable[[], None] = lambda: None):
    super().__init__()
    self._callback = callback
    self.time = 0.0  # of the first signal

  def receive(self) -> None:
    """Set the event and call the callback."""
    self.time = self.time or time.monotonic()
    self.set()
    self._callback()


def session_began() -> float:
  """Return the time.monotonic() at which the session began: this program, or the sweep that started it."""
  return float(os.environ.get(SESSION_BEGAN, STARTED))


def program() -> str:
  """Return the name of the program that this process runs, such as "train"."""
  words = sys.orig_argv
  names = [os.path.basename(word) for word in words]
  at = words.index("-m") + 1 if "-m" in words[:-1] else names.index("insec") if "insec" in names else None
  if at is None:
    return os.path.basename(sys.argv[0]).removesuffix(".py")
  if names[at] in ("insec", "insec_jax"):  # the console command: its first word is the program
    at += 1
  return "".join(words[at : at + 1]).rpartition(".")[2]


def exit_code(number: int) -> int:
  """Return the exit code of a program that this signal ends."""
  return PREEMPTED if program() in RESUMABLE else 128 + number


def plug_standard_streams() -> None:
  """Open /dev/null in place of a closed stdin, stdout or stderr, so that no other file takes its number."""
  for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
    try:
      os.fstat(number)
    except OSError:
      with contextlib.suppress(OSError):
        while os.open(os.devnull, os.O_RDWR) < number:  # the lowest free number is taken first
          pass
    if getattr(sys, name) is None:
      stream = open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
      setattr(sys, name, stream)


def install() -> None:
  """Install handlers that end the process with one line; call it before any slow import.

  A signal that the parent process ignores stays ignored (`nohup`, a background job of a shell).
  """
  for number in SIGNALS:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _handle)


def start_early() -> None:
  """Plug the streams and install the handlers in a process that runs one program, before its slow imports."""
  global _runs_one_program
  _runs_one_program = True
  plug_standard_streams()
  install()


def runs_one_program() -> bool:
  """Return whether this process runs `insec PROGRAM` or `python -m insec_jax.PROGRAM`, and ends with it."""
  return _runs_one_program


def start_thread() -> None:
  """Handle signals in a separate thread; call it once, from the main thread."""
  global _reader
  if _reader is not None:
    return
  install()
  _reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  for number in SIGNALS:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _leave_to_thread)
  threading.Thread(target=_read_signals, args=(_reader,), daemon=True, name="signals").start()
  atexit.register(_ignore)  # the last of the exit functions, as it is registered first


def work_is_done() -> None:
  """Make later signals end the process with exit code 0: the work is done, and the interpreter is shutting down."""
  global _work_is_done
  _work_is_done = True


def _ignore() -> None:
  for number in SIGNALS:  # the interpreter would restore the default action, and a signal would replace the exit code
    signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def while_not_ending() -> Iterator[None]:
  """Delay the end of the process until the block, which must be short, ends."""
  with _ending:
    yield


def at_end(cleanup: Callable[[], None]) -> None:
  """Register `cleanup` to be called before a signal, or `end`, ends the process."""
  _cleanups.append(cleanup)


@contextlib.contextmanager
def deferred(callback: Callable[[], None] = lambda: None) -> Iterator[StopSignal]:
  """Yield a StopSignal that receives the signals instead of the process, inside the block.

  A second SIGINT ends the process without waiting.
  """
  stop = StopSignal(callback)
  _deferred.append(stop)
  before = {}
  if _reader is None and threading.current_thread() is threading.main_thread():  # used without `command.run`
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
  try:
    yield stop
  finally:
    _deferred.remove(stop)
    for number, handler in before.items():
      signal.signal(number, handler)


def end(code: int, line: str = "") -> None:
  """Print the line, remove partly written files, and end the process at once; never returns.

  A normal exit of the interpreter would wait for devices, threads and other processes.
  """
  _ending.acquire()  # a second caller waits for the end
  for cleanup in _cleanups:
    with contextlib.suppress(Exception):  # the process ends in any case, and the line gives the reason
      cleanup()
  # In a thread: a write to a pipe blocks for ever when its reader has stopped reading.
  last = threading.Thread(target=_print_last, args=(line,), daemon=True, name="last line")
  try:
    last.start()
    last.join(LAST_LINE_SECONDS)
  except RuntimeError:  # no more threads
    _print_last(line)
  os._exit(code)


def _print_last(line: str) -> None:
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: the signal came during a write
      stream.flush()
  if line:
    with contextlib.suppress(OSError):
      os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def _receive(number: int) -> None:
  name = signal.Signals(number).name
  if _work_is_done:
    end(0)
  if _deferred and not (number == signal.SIGINT and _deferred[-1].is_set()):
    _deferred[-1].receive()
    return
  if _deferred and time.monotonic() - _deferred[-1].time < SAME_SECONDS:
    return
  again = "; run the same command to go on" if exit_code(number) == PREEMPTED else ""
  if _deferred:
    end(exit_code(number), f"{name} again: ended without saving; run the same command to go on from what is saved")
  end(exit_code(number), f"{name}: ended before it was done{again}")


def _handle(number: int, _) -> None:
  _receive(number)


def _leave_to_thread(*_) -> None:
  """Do nothing: the interpreter has written the number into the pipe that `_read_signals` reads."""


def _read_signals(reader: int) -> None:
  while numbers := os.read(reader, 64):
    for number in numbers:
      if number in SIGNALS:
        _receive(number)

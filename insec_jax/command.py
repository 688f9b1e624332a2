"""Entry of every program: exit codes, and one line for whatever ends it early.

  0    done
  1    the machine refused something (disk, memory, descriptors), a process was lost, or a defect of ours (traceback)
  2    the user's input is wrong
  3    a loss (train; the state before that step is saved) or the logits (generate, evaluate, mine) are not finite
  42   train, sweep: saved after SIGTERM, SIGINT or SIGHUP; the same command goes on
  129, 130, 143   another program was ended by SIGHUP, SIGINT or SIGTERM; no partial file is left
"""

import errno
import io
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from absl import flags

from insec_jax import stop_signal

DONE, FAILED, WRONG_INPUT, DIVERGED, PREEMPTED = 0, 1, 2, 3, stop_signal.PREEMPTED
HELP = "--help"
FLAG_FILE = r"--?(flagfile|undefok)(=|$)"  # flags of absl that read other files, or hide a misspelt flag
PARENT_PIPE = "INSEC_PARENT_PIPE"  # number of a pipe that is at its end when the parent process is gone

# Errors of libraries carry these words of strerror, not the number.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EFBIG,
            errno.EPIPE, errno.ESTALE, errno.ENOLCK)
REMEDIES = {
  errno.ENOSPC: "free some room; what was saved before stays",
  errno.EDQUOT: "raise the quota or free some room; what was saved before stays",
  errno.EROFS: "give a path on a disk that can be written to",
  errno.EMFILE: "raise the limit of open files (ulimit -n)",
  errno.ENFILE: "the whole machine has too many open files; close some",
  errno.ENOMEM: "free memory, or use a smaller model, batch or row length",
  errno.EPIPE: "whoever read the output has closed it",
  errno.EIO: "the disk or network drive fails",
}


class InputError(ValueError):
  """The user's input is wrong; the message says what was seen, what was needed and what to do, in one line."""


class DivergedError(Exception):
  """A loss or a gradient is not finite; the message says where, and what is saved."""


def run(main: Callable[[], int | None]) -> None:
  """Parse the flags, call `main` and exit with its code (None means 0). With --help print what the program does.

  Wrong input, what the machine refuses and signals end in one line on stderr; anything else is a defect of ours, with
  a traceback.
  """
  stop_signal.plug_standard_streams()
  stop_signal.start_thread()
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")  # a locale without UTF-8 must not end a run
  _follow_parent()
  try:
    code = _run(main)
    sys.stdout.flush()
  except SystemExit as stop:
    code = stop.code
  except (InputError, flags.Error) as error:
    code = _fail(WRONG_INPUT, _one_line(error))
  except DivergedError as error:
    code = _fail(DIVERGED, _one_line(error))
  except BrokenPipeError:
    _drop_stdout()
    code = _fail(FAILED, "stdout is closed, nobody reads it any more; what was to be written to files is written")
  except Exception as error:
    if platform := _missing_platform(error):
      code = _fail(WRONG_INPUT, platform)
    elif refusal := machine_refusal(error):
      code = _fail(FAILED, refusal)
    else:
      traceback.print_exc()
      code = FAILED
  try:
    sys.stdout.flush()
  except OSError:
    _drop_stdout()
    code = code or FAILED
  sys.exit(code)


def _run(main: Callable[[], int | None]) -> int:
  if HELP in sys.argv[1:]:
    print(_help())
    return DONE
  _parse_flags()
  return main() or DONE


def machine_refusal(error: BaseException) -> str | None:
  """Return one line on what the machine refused (disk, memory, descriptors, ...); None if the error is another one."""
  for cause in _chain(error):
    if isinstance(cause, MemoryError):
      return f"out of memory: {_one_line(cause)}; {REMEDIES[errno.ENOMEM]}".replace("memory: ;", "memory;")
    if isinstance(cause, OSError) and cause.errno is not None:
      where = f": {cause.filename}" if cause.filename else ""
      remedy = REMEDIES.get(cause.errno)
      return f"{cause.strerror}{where}" + (f"; {remedy}" if remedy else "")
    text = str(cause)
    if "RESOURCE_EXHAUSTED" in text or "can't start new thread" in text:
      number = next((n for n in REFUSALS if os.strerror(n) in text), errno.ENOMEM)
      return f"{_one_line(cause)[:300]}; {REMEDIES[number]}"
    for number in REFUSALS:
      if os.strerror(number) in text:
        return f"{_shortened(text)}; {REMEDIES.get(number, 'see the message')}"
  return None


def is_refusal(error: BaseException) -> bool:
  """Whether the machine refused something, so that nothing is known of the file that was used."""
  return machine_refusal(error) is not None and not any(
    isinstance(cause, OSError) and cause.errno is not None and cause.errno not in REFUSALS for cause in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """The error and what it was raised from, each once."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    yield error
    error = error.__cause__ or error.__context__


def _shortened(text: str) -> str:
  """One line without the source locations that tensorstore adds."""
  return re.sub(r"\s*\[source locations=.*", "", " ".join(text.split()))[:300]


def _missing_platform(error: BaseException) -> str | None:
  """One line when JAX_PLATFORMS names a platform that is not here; None for another error."""
  for cause in _chain(error):
    text = str(cause)
    if isinstance(cause, RuntimeError) and ("Unable to initialize backend" in text or "Unknown backend" in text):
      asked = os.environ.get("JAX_PLATFORMS")
      return (f"JAX_PLATFORMS={asked}: {_one_line(cause)[:200]}; set JAX_PLATFORMS to a platform that is here, such as "
              "cpu, or leave it out")
  return None


def _one_line(error: BaseException) -> str:
  # ml_collections puts a whole traceback into what a config file raises; its last line holds the message.
  message = str(error).strip()
  line = message.splitlines()[-1] if "Traceback (most recent call last)" in message else " ".join(message.split())
  return printable(line.removeprefix("insec_jax.command.InputError: "))


def printable(text: str) -> str:
  """Return the text with control characters escaped: no input may drive the terminal."""
  return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _fail(code: int, line: str) -> int:
  print(f"error: {printable(line)}", file=sys.stderr, flush=True)
  return code


def _drop_stdout() -> None:
  """Send what is still buffered nowhere: the interpreter flushes it once more at exit."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _follow_parent() -> None:
  """End this process when the one that started it is gone, where the environment names a pipe from it."""
  number = os.environ.pop(PARENT_PIPE, None)
  if number is None:
    return

  def wait() -> None:
    os.read(int(number), 1)
    stop_signal.end(FAILED, "error: the program that started this one is gone; run the same command to go on")

  threading.Thread(target=wait, daemon=True, name="parent").start()


def _help() -> str:
  """What the program does, by its docstring, and its flags."""
  return f"{sys.modules['__main__'].__doc__}\n{flags.FLAGS.main_module_help()}"


def _parse_flags() -> None:
  for word in sys.argv[1:]:
    if re.match(FLAG_FILE, word):
      raise InputError(f"{word:.100}: not supported; give every flag on the command line")
  try:
    extra = flags.FLAGS(sys.argv)[1:]
  except flags.Error as error:
    said = _one_line(error).partition(" Currently supported types")[0]
    raise InputError(_cut(said)) from error
  except Exception as error:  # ml_collections lets through whatever setting a key raises ("Did you mean")
    reason = error
    while reason.args and isinstance(reason.args[0], Exception):
      reason = reason.args[0]
    said = reason.args[0] if isinstance(reason, KeyError) and reason.args else reason
    overrides = ", ".join(word.partition("=")[0] for word in sys.argv[1:] if re.match(r"--?(no)?config\.", word))
    said = _one_line(Exception(said)).partition(", and its type")[0]
    raise InputError(_cut(f"{overrides:.200}: {said}")) from error
  if extra:
    raise InputError(f"unexpected argument {extra[0]!r}; every value is given as --name=value")
  _check_flags()


def _cut(line: str) -> str:
  """Return the line without its middle where it is long, as with a value of thousands of digits."""
  return line if len(line) <= 600 else f"{line[:300]} ... {line[-250:]}"


def _check_flags() -> None:
  """Raise InputError for a flag of a program that is empty, or nan. Of one given twice the last value counts."""
  for name in flags.FLAGS:
    flag = flags.FLAGS[name]
    if not flag.present or name.startswith("config."):
      continue
    if flag.value == "":
      raise InputError(f"--{name} is empty; give a value, or leave the flag out")
    if isinstance(flag.value, float) and math.isnan(flag.value):
      raise InputError(f"--{name}=nan is no number; give one")

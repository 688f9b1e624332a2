"""Entry point of every program: exit codes, and one line on stderr for every early end.

0    done
1    the machine refused a resource (disk, memory, descriptors, a closed pipe): saved files stay; or a process was
     lost; or a defect of ours, the only case with a traceback
2    the input is wrong, including JAX_PLATFORMS=cuda without a GPU
3    a loss (train; the state before that step is saved) or the logits (generate, evaluate, mine) are not finite
42   train, sweep: after SIGTERM, SIGINT or SIGHUP, at any moment; the same command resumes from what is saved
129, 130, 143   another program after SIGHUP, SIGINT or SIGTERM; no partial file is left
"""

import contextlib
import io
import logging
import math
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable

from absl import flags

from insec_jax import compile_cache, flags_help, stop_signal
from insec_jax.refusals import chain, is_refusal, machine_refusal, one_line, printable  # noqa: F401

DONE, FAILED, WRONG_INPUT, DIVERGED, PREEMPTED = 0, 1, 2, 3, stop_signal.PREEMPTED
HELP = "--help"
FLAG_FILE = r"--?(flagfile|undefok)(=|$)"  # absl flags that read other files, or hide a misspelt flag
PARENT_PIPE = "INSEC_PARENT_PIPE"  # descriptor of a pipe that is closed when the parent process ends


class InputError(ValueError):
  """Error in the user's input; the message states in one line what was seen, what was needed and what to do."""


class DivergedError(Exception):
  """Error: a loss or a gradient is not finite; the message states where, and what is saved."""


def run(main: Callable[[], int | None]) -> None:
  """Parse the flags, call `main` and exit with its code (None means 0); with --help print the help.

  Wrong input, errors of the machine and signals end in one line on stderr. Any other error is a defect of ours and
  ends with a traceback.
  """
  stop_signal.plug_standard_streams()
  stop_signal.start_thread()
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")  # a locale without UTF-8 must not raise
      if stream.write_through:  # python -u: a line and its newline would be two writes, and could be interleaved
        stream.reconfigure(line_buffering=True, write_through=False)
  _follow_parent()
  for name in ("absl", "asyncio"):  # Orbax logs, with a traceback, errors that it raises afterwards
    logging.getLogger(name).addFilter(_is_news)
  warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)  # of Orbax, as above
  code: int | None
  try:
    code = _run(main)
    sys.stdout.flush()
  except SystemExit as stop:
    code = stop.code if isinstance(stop.code, int | None) else _fail(FAILED, str(stop.code))
  except (InputError, flags.Error) as error:
    code = _fail(WRONG_INPUT, one_line(error))
  except DivergedError as error:
    code = _fail(DIVERGED, one_line(error))
  except BrokenPipeError:
    code = _fail(FAILED, "stdout or stderr is closed, nobody reads it any more; what was saved before stays")
  except Exception as error:
    if platform := _missing_platform(error):
      code = _fail(WRONG_INPUT, platform)
    elif refusal := machine_refusal(error):
      code = _fail(FAILED, refusal)
    else:
      traceback.print_exc()
      code = FAILED
  if code and stop_signal.runs_one_program():
    stop_signal.end(code)  # threads of libraries may wait for ever after a failure, or print tracebacks
  _drop_broken_streams()
  if not code and stop_signal.runs_one_program():
    stop_signal.work_is_done()
  sys.exit(code)


def begin(module: str) -> None:
  """Prepare a program before its imports that take long, where the module is the program that runs.

  With --help print the help and exit. Else turn the compile cache on, which JAX reads when it is imported.
  """
  if module != "__main__":
    return
  if HELP in sys.argv[1:]:
    run(lambda: DONE)
  compile_cache.turn_on()


def _is_news(record: logging.LogRecord) -> bool:
  """Return False for a logged error that is also raised: futures of Orbax log the errors of `Saver.wait`."""
  error = record.exc_info and record.exc_info[1]
  of_future = re.search(r"[/\\]orbax[/\\].*[/\\]futures[/\\]", record.pathname)
  return not (error and (of_future or machine_refusal(error)))


def _run(main: Callable[[], int | None]) -> int:
  if HELP in sys.argv[1:]:
    print(_help())
    return DONE
  _parse_flags()
  hits = compile_cache.Hits()
  code = main() or DONE
  if code == DONE and (line := hits.line()):
    print(line, file=sys.stderr, flush=True)
  return code


def _missing_platform(error: BaseException) -> str | None:
  """Return one line if JAX_PLATFORMS names a platform that is not available; None for another error."""
  asked = os.environ.get("JAX_PLATFORMS")
  for cause in chain(error):
    text = str(cause)
    # JAX skips cuda without a GPU, and then asserts that a platform is left.
    unseen = isinstance(cause, AssertionError) and asked and _raised_in(cause).endswith("xla_bridge.py")
    if unseen or (
      isinstance(cause, RuntimeError) and ("Unable to initialize backend" in text or "Unknown backend" in text)
    ):
      reason = "no such device is here" if unseen else one_line(cause)[:200]
      return (
        f"JAX_PLATFORMS={asked}: {reason}; set JAX_PLATFORMS to a platform that is here, such as cpu, or leave it out"
      )
  return None


def _raised_in(error: BaseException) -> str:
  """Return the path of the file that raised it."""
  return traceback.extract_tb(error.__traceback__)[-1].filename if error.__traceback__ else ""


def _fail(code: int, line: str) -> int:
  if stop_signal.runs_one_program():  # immediately: a thread may be about to end the process for the same reason
    stop_signal.end(code, f"error: {printable(line)}")
  with contextlib.suppress(OSError, ValueError):  # a closed stream; the exit code remains
    sys.stdout.flush()
  with contextlib.suppress(OSError, ValueError):
    print(f"error: {printable(line)}", file=sys.stderr, flush=True)
  return code


def _drop_broken_streams() -> None:
  """Redirect a broken stdout or stderr to /dev/null: the interpreter would flush it again and exit with 120."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except (OSError, ValueError):
      with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _follow_parent() -> None:
  """End this process when its parent ends, if the environment variable PARENT_PIPE gives a pipe from the parent."""
  number = os.environ.pop(PARENT_PIPE, None)
  if number is None:
    return

  def wait() -> None:
    os.read(int(number), 1)
    stop_signal.end(FAILED, "error: the program that started this one is gone; run the same command to go on")

  threading.Thread(target=wait, daemon=True, name="parent").start()


def _help() -> str:
  """Return the docstring of the program and the help of its flags."""
  return flags_help.page(sys.modules["__main__"].__doc__ or "", sys.argv[0])


def _parse_flags() -> None:
  for word in sys.argv[1:]:
    if re.match(FLAG_FILE, word):
      raise InputError(f"{word:.100}: not supported; give every flag on the command line")
  try:
    extra = flags.FLAGS(sys.argv)[1:]
  except flags.Error as error:
    raise InputError(_cut(_in_plain_words(one_line(error)))) from error
  except Exception as error:  # ml_collections passes on any error of setting a key ("Did you mean")
    reason = error
    while reason.args and isinstance(reason.args[0], Exception):
      reason = reason.args[0]
    said = reason.args[0] if isinstance(reason, KeyError) and reason.args else reason
    said = one_line(Exception(said)).partition(", and its type")[0]
    key = re.match(r"'(\w+)'|Override ([\w.]+)", said)
    ending = f".{key[1] or key[2]}" if key else ""
    given = [word.partition("=")[0] for word in sys.argv[1:] if re.match(r"--?(no)?config\.", word)]
    named = [flag for flag in given if flag.endswith(ending)] or given  # only the flags with the wrong key
    if key and said == key[0]:
      said = f"the config has no key {key[0]} there; give one that it has"
    if empty := re.match(r"Override \S+ can not be applied because field \"(\w+)\" is None", said):
      said = f"{empty[1]} is None in the config file, so it has no keys to override; give its values in the file"
    raise InputError(_cut(f"{', '.join(named):.200}: {said}")) from error
  if extra:
    raise InputError(f"unexpected argument {extra[0]!r}; every value is given as --name=value")
  _check_flags()


def _in_plain_words(said: str) -> str:
  """Return absl's message about a flag, with the needed kind of value in place of Python's error."""
  said = said.partition(" Currently supported types")[0]
  if missing := re.findall(r"flag (--\S+)=None: Flag \S+ must have a value other than None", said):
    return f"{', '.join(missing)}: not given; give a value"
  for failure, needed in (
    ("invalid literal for int", "whole number, in digits"),
    ("could not convert string to float", "number"),
    ("Non-boolean argument to boolean flag", "truth value, true or false"),
  ):
    if match := re.match(rf"flag (--\S+)=(.*): {failure}.*", said):
      return f"{match[1]}={match[2]:.100} is no {needed}; give one"
  if match := re.match(r"flag (--\S+)=(.*): Failed to parse .* as a ConfigDict", said):
    return f"{match[1]}={match[2]:.100} is no dict of values; give one, such as {{'name': 1}}, or {{}} for none"
  if match := re.match(r"Type .* of field (\S+) is not supported for overriding", said):
    return f"--{match[1]}: the config file gives it no value that the command line could change; give it in the file"
  return said


def _cut(line: str) -> str:
  """Return the line, without its middle if it is long, as with a value of thousands of digits."""
  return line if len(line) <= 600 else f"{line[:300]} ... {line[-250:]}"


def _check_flags() -> None:
  """Raise InputError for a program's flag that is empty or nan; of repeated flags the last value counts."""
  for name in flags.FLAGS:
    flag = flags.FLAGS[name]
    if not flag.present or name.startswith("config."):
      continue
    if flag.value == "":
      raise InputError(f"--{name} is empty; give a value, or leave the flag out")
    if isinstance(flag.value, float) and math.isnan(flag.value):
      raise InputError(f"--{name}=nan is no number; give one")

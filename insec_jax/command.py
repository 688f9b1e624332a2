"""How every program meets its user: exit codes, and one clear line when the input is wrong."""

import sys
from collections.abc import Callable

from absl import flags

DONE, FAILED, WRONG_INPUT, PREEMPTED = 0, 1, 2, 42
HELP = "--help"


class InputError(ValueError):
  """The user's input is wrong; the message says what was seen, what was needed and what to do, in one line."""


def run(main: Callable[[], int | None]) -> None:
  """Parses the flags, calls `main` and exits with its code (None means 0). With --help it only says what there is.

  InputError and flag errors end in one line on stderr and exit code 2; anything else is our bug: traceback and 1.
  """
  try:
    if HELP in sys.argv[1:]:
      print(_help())
      sys.exit(DONE)
    _parse_flags()
    sys.exit(main() or DONE)
  except (InputError, flags.Error) as error:
    # ml_collections puts a whole traceback into what a config file raises; its last line says it.
    message = str(error).strip()
    line = message.splitlines()[-1] if "Traceback (most recent call last)" in message else " ".join(message.split())
    print(f"error: {line.removeprefix('insec_jax.command.InputError: ')}", file=sys.stderr)
    sys.exit(WRONG_INPUT)


def _help() -> str:
  """What the program does, by its docstring, and its flags."""
  return f"{sys.modules['__main__'].__doc__}\n{flags.FLAGS.main_module_help()}"


def _parse_flags() -> None:
  try:
    extra = flags.FLAGS(sys.argv)[1:]
  except (AttributeError, KeyError, OSError) as error:
    # So ml_collections answers a key that the config lacks ("Did you mean") or a file it cannot read.
    reason = error
    while reason.args and isinstance(reason.args[0], Exception):
      reason = reason.args[0]
    raise InputError(f"--config: {reason.args[0] if isinstance(reason, KeyError) else reason}") from error
  if extra:
    raise InputError(f"unexpected argument {extra[0]!r}; every value is given as --name=value")

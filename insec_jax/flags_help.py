"""The help of a program: its description, then its flags in groups, each with its type, bounds and default."""

import contextlib
import math
import textwrap
from collections.abc import Iterator

from absl import flags

WIDTH = 120
OTHER = "Flags"  # the title of those without a group

_titles: dict[str, str] = {}  # name of a flag -> title of its group


@contextlib.contextmanager
def group(title: str) -> Iterator[None]:
  """Put the flags that the block defines under this title in the help."""
  before = set(flags.FLAGS)
  yield
  _titles.update({name: title for name in flags.FLAGS if name not in before})


def page(description: str, program: str) -> str:
  """Return the help of the program, which is known to absl by this name."""
  groups: dict[str, list[str]] = {}
  # absl keeps the order of definition per module, and all of these are the program's.
  for flag in flags.FLAGS.get_key_flags_for_module(program):
    groups.setdefault(_titles.get(flag.name, OTHER), []).append(entry(flag))
  return "\n".join([description.rstrip(), *(f"\n{title}:\n" + "\n".join(lines) for title, lines in groups.items())])


def entry(flag: flags.Flag) -> str:
  """Return the lines of a flag: its name and type, then what it means."""
  name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={kind(flag.parser)}"
  said = flag.help.split(">: ")[-1] if isinstance(flag, flags.EnumFlag) else flag.help  # absl repeats the values there
  said += default(flag)
  return "\n".join([f"  {name}", *textwrap.wrap(said, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)])


def kind(parser: flags.ArgumentParser) -> str:
  """Return the type of a flag's value, with its bounds."""
  if isinstance(parser, flags.EnumParser):
    return "|".join(parser.enum_values)
  if isinstance(parser, flags.ListParser):
    return "A,B,..."
  if isinstance(parser, flags.IntegerParser):
    return f"INTEGER{_bounds(parser)}"
  if isinstance(parser, flags.FloatParser):
    return f"NUMBER{_bounds(parser)}"
  return getattr(parser, "kind", "TEXT")


def _bounds(parser: flags.IntegerParser | flags.FloatParser) -> str:
  low, high = parser.lower_bound, parser.upper_bound
  if low is None:
    return f" of at most {high:,}" if high is not None else ""
  return f" from {low:,}" + (f" to {high:,}" if high is not None else "")


def default(flag: flags.Flag) -> str:
  """Return the default of a flag where its help does not say it, or that it is required."""
  if any("other than None" in validator.message for validator in flag.validators):  # mark_flags_as_required
    return " Required."
  if flag.boolean or flag.default in (None, "", math.inf) or "(default" in flag.help:
    return ""
  return f" (default: {flag.default:,})" if isinstance(flag.default, int) else f" (default: {flag.default})"

"""Multiplication by hand: a product for each digit of the second number, added up as they come.

    prompt   47*36=\\n
    steps    47*6=282\\n        from the last digit on; a digit 0 has no line
             47*30=1410\\n
             282+1410=1692\\n   the sum so far
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method.tasks import MALFORMED, RIGHT, Problem, Verdict

# Those of arXiv 2512.02389; a wrong result is of the first class here that it fits.
CLASSES = ("carry", "ten", "hundred", "near", "digit", "adjacent")
OWN = ("calc", "copy", "repeat", MALFORMED)  # only a model writes these: another wrong result, other operands
MAX_DIGITS = 6
_NUMBER = "(0|[1-9][0-9]{0,13})"
_LINE = re.compile(rf"{_NUMBER}([*+]){_NUMBER}={_NUMBER}\n")


class Line(NamedTuple):
  """A step as read: its left side, as written, and the result that it states."""

  left: str
  result: int


@dataclass(frozen=True)
class Facts:
  """The lines of the solution in order, with their true results."""

  lines: tuple[Line, ...]


def _format_line(line: Line) -> str:
  return f"{line.left}={line.result}\n"


def _read(step: str) -> Line | None:
  """The step as read; None when it is malformed."""
  found = _LINE.fullmatch(step)
  return found and Line(f"{found[1]}{found[2]}{found[3]}", int(found[4]))


def _solution(first: int, second: int) -> tuple[Line, ...]:
  lines, total = [], None
  for place, digit in enumerate(reversed(str(second))):
    if digit == "0":
      continue
    factor = int(digit) * 10**place
    lines.append(Line(f"{first}*{factor}", first * factor))
    if total is not None:
      lines.append(Line(f"{total}+{first * factor}", total + first * factor))
    total = lines[-1].result
  return tuple(lines)


def _without_a_carry(left: str) -> set[int]:
  """The results that come of forgetting one carry on the way."""
  sign = "*" if "*" in left else "+"
  first, second = left.split(sign)
  if sign == "+":
    digits = [(int(a), int(b)) for a, b in zip(first.zfill(14)[::-1], second.zfill(14)[::-1], strict=True)]
  else:
    factor = second.rstrip("0")
    digits = [(int(a) * int(factor), 0) for a in first[::-1]]
  zeros = len(second) - len(second.rstrip("0")) if sign == "*" else 0
  right = int(first) * int(second) if sign == "*" else int(first) + int(second)
  found, carry = set(), 0
  for place, (a, b) in enumerate(digits):
    carry = (a + b + carry) // 10
    if carry and place + 1 < len(digits):  # past the last digit it is written down, not carried
      found.add(right - carry * 10**(place + 1 + zeros))
  return found


def _class(line: Line, right: int) -> str:
  """The class of a wrong result."""
  wrong = line.result
  if wrong in _without_a_carry(line.left):
    return "carry"
  if abs(wrong - right) in (10, 100):
    return "ten" if abs(wrong - right) == 10 else "hundred"
  said, true = str(wrong), str(right)
  if len(said) != len(true):
    return "calc"
  places = [place for place, (a, b) in enumerate(zip(said, true, strict=True)) if a != b]
  if len(places) == 1:
    return "near" if abs(int(said[places[0]]) - int(true[places[0]])) == 2 else "digit"
  return "adjacent" if len(places) == 2 and places[1] == places[0] + 1 else "calc"


class Multiplication:
  """The task; its size is the number of digits of each of the two numbers."""

  name = "multiplication"
  error_classes = CLASSES
  units = ("line", "sentence")
  symbols = (*CLASSES, *OWN, *"0123456789", "*", "+", "=", "\n")

  def __init__(self, task: TaskConfig):
    if task.modulus != 0 or not 1 <= task.min_size <= task.max_size <= MAX_DIGITS:
      raise InputError(f"task.modulus={task.modulus} task.min_size={task.min_size} task.max_size={task.max_size}; "
                       f"multiplication takes numbers of 1 to {MAX_DIGITS} digits and modulus 0")
    self.min_size, self.max_size = task.min_size, task.max_size

  def make(self, rng: np.random.Generator) -> Problem:
    size = int(rng.integers(self.min_size, self.max_size + 1))
    first, second = (int(number) for number in rng.integers(10**(size - 1), 10**size, 2))
    lines = _solution(first, second)
    return Problem(f"{first}*{second}=\n", tuple(map(_format_line, lines)), str(first * second),
                   f"{min(first, second)}*{max(first, second)}", Facts(lines))

  def check(self, problem: Problem, before: tuple[str, ...], step: str) -> Verdict:
    """A line may come once the lines are there that it reads; a wrong result that stands counts as the right one."""
    read = _read(step)
    if read is None:
      return Verdict("wrong", MALFORMED)
    stated = self._stated(before)
    if read.left in stated:
      return Verdict("wrong", "repeat")
    if read.left not in self._possible(problem, stated):
      return Verdict("wrong", "copy")
    right = self._right(problem)[read.left]
    return RIGHT if read.result == right else Verdict("wrong", _class(read, right))

  def inject(self, problem: Problem, before: tuple[str, ...], error: str, rng: np.random.Generator) -> str | None:
    line = self._next(problem, before)
    if line is None:
      return None
    left, right = line
    digits = [int(digit) for digit in str(right)]
    place = int(rng.integers(len(digits)))
    if error == "carry":
      choices = sorted(_without_a_carry(left) - {right})
      wrong = choices[rng.integers(len(choices))] if choices else -1
    elif error in ("ten", "hundred"):
      wrong = right + (10 if error == "ten" else 100) * int(rng.choice((-1, 1)))
    elif error == "adjacent" and place + 1 < len(digits):
      digits[place], digits[place + 1] = (int(rng.integers(10)) for _ in range(2))
      wrong = int("".join(map(str, digits)))
    elif error == "adjacent":
      wrong = -1
    else:
      digits[place] = digits[place] + int(rng.choice((-2, 2))) if error == "near" else int(rng.integers(10))
      wrong = int("".join(map(str, digits))) if 0 <= digits[place] <= 9 else -1
    return _format_line(Line(left, wrong)) if wrong >= 0 else None

  def explain(self, problem: Problem, before: tuple[str, ...], wrong: str, detail: str) -> str:
    """The class; with "recompute" also the line as it should be.

        wrong step     label    recompute
        47*6=272       ten      ten47*6=282
        47*5=235       copy     copy47*6=282    the line that comes next
        malformed in both, and where nothing is left to say
    """
    error = self.check(problem, before, wrong).error
    assert error, f"{wrong!r} is not wrong; there is nothing to explain"
    right = self.correction(problem, before, wrong)
    if error == MALFORMED or detail == "label" or right is None:
      return error
    return error + right.rstrip("\n")

  def next_step(self, problem: Problem, before: tuple[str, ...]) -> str | None:
    line = self._next(problem, before)
    return None if line is None else _format_line(line)

  def correction(self, problem: Problem, before: tuple[str, ...], wrong: str) -> str | None:
    read, stated = _read(wrong), self._stated(before)
    if read is not None and read.left in self._possible(problem, stated):
      return _format_line(Line(read.left, self._right(problem)[read.left]))
    return self.next_step(problem, before)

  def answer_of(self, problem: Problem, steps: tuple[str, ...]) -> str | None:
    last = problem.facts.lines[-1].left
    stated = self._stated(steps)
    return str(stated[last]) if last in stated else None

  def _right(self, problem: Problem) -> dict[str, int]:
    return dict(problem.facts.lines)

  def _stated(self, steps: tuple[str, ...]) -> dict[str, int]:
    """The left sides that the steps state, with the last result of each."""
    return dict(read for step in steps if (read := _read(step)) is not None)

  def _possible(self, problem: Problem, stated: dict[str, int]) -> list[str]:
    """The left sides that may come now: products at any time, a sum after both lines that it reads."""
    found, before = [], []
    for line in problem.facts.lines:
      is_sum = "+" in line.left
      if line.left not in stated and (not is_sum or all(left in stated for left in before[-2:])):
        found.append(line.left)
      # A sum takes the place of the two lines that it reads.
      before = [*before[:-2], line.left] if is_sum else [*before, line.left]
    return found

  def _next(self, problem: Problem, before: tuple[str, ...]) -> Line | None:
    stated = self._stated(before)
    return next((line for line in problem.facts.lines if line.left not in stated), None)

"""Chain sum: numbers added up one after the other, a small task for quick trials.

prompt   17+25+8=\\n
steps    17+25=42\\n
         42+8=50\\n
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from insec_jax.method.tasks import MALFORMED, RIGHT, Problem, Task, Verdict

CLASSES = ("value", "calc", "copy", "repeat")
MAX_NUMBER = 99
_NUMBER = "(0|[1-9][0-9]{0,11})"
_STEP = re.compile(rf"{_NUMBER}\+{_NUMBER}={_NUMBER}\n")


@dataclass(frozen=True)
class Facts:
  """The numbers to add, from 1 up."""

  numbers: tuple[int, ...]


class Sum(NamedTuple):
  """A step as parsed; also used for the right step."""

  total: int
  number: int
  result: int


def _format_step(total: int, number: int, result: int) -> str:
  return f"{total}+{number}={result}\n"


def _read(step: str) -> Sum | None:
  """Return the step as parsed; None when it is malformed."""
  match = _STEP.fullmatch(step)
  return match and Sum(*map(int, match.groups()))


class ChainSum(Task[Facts]):
  """The chain-sum task; its size is the number of sums. The numbers may be added in any order."""

  name = "chain_sum"
  error_classes = CLASSES
  units = ("line", "sentence")
  symbols = (*CLASSES, MALFORMED, "not", *"0123456789", "+", "=", "\n")

  def make(self, rng: np.random.Generator) -> Problem[Facts]:
    size = int(rng.integers(self.min_size, self.max_size + 1))
    numbers = tuple(rng.integers(1, MAX_NUMBER + 1, size + 1).tolist())
    steps, total = [], numbers[0]
    for number in numbers[1:]:
      steps.append(_format_step(total, number, total + number))
      total += number
    prompt = "+".join(map(str, numbers)) + "=\n"
    key = "+".join(map(str, sorted(numbers)))
    return Problem(prompt, tuple(steps), str(total), key, Facts(numbers))

  def check(self, problem: Problem[Facts], before: tuple[str, ...], step: str) -> Verdict:
    """Check the operands against what is left to add, then the sum.

    Sums only grow, so a step seen before is a repeat.
    """
    read = _read(step)
    if read is None:
      return Verdict("wrong", MALFORMED)
    if step in before:
      return Verdict("wrong", "repeat")
    total, left = self._state(problem, before)
    if total is None and read.total in left:
      total = read.total
      left.remove(total)
    if read.number not in left:
      return Verdict("wrong", "copy")
    if read.total != total:
      return Verdict("wrong", "value")
    return RIGHT if read.result == read.total + read.number else Verdict("wrong", "calc")

  def inject(
    self, problem: Problem[Facts], before: tuple[str, ...], error: str, rng: np.random.Generator
  ) -> str | None:
    if error == "repeat":
      return before[rng.integers(len(before))] if before else None
    right = self._next(problem, before)
    if right is None:
      return None
    slip = int(rng.choice((-10, -2, -1, 1, 2, 10)))
    total, number, _ = right
    if error == "calc":
      result = right.result + slip
    else:
      total, number = (total + slip, number) if error == "value" else (total, number + slip)
      result = total + number
    return _format_step(total, number, result) if min(total, number, result) > 0 else None

  def explain(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str, detail: str) -> str:
    """Return the class and the wrong number; with "recompute" also what is right.

    class      wrong step   label      recompute
    calc       17+25=43     calc43     calc17+25=42
    value      43+8=51      value43    value42not43
    copy       42+9=51      copy9      copy8not9
    repeat     17+25=42     repeat42   repeat17+25=42
    malformed  17+=42       malformed in both
    """
    error = self.check(problem, before, wrong).error
    assert error, f"{wrong!r} is not wrong; there is nothing to explain"
    read, right = _read(wrong), self._next(problem, before)
    if read is None:
      return MALFORMED
    stated = {"calc": read.result, "value": read.total, "copy": read.number, "repeat": read.result}[error]
    if detail == "label":
      return f"{error}{stated}"
    if error in ("calc", "repeat"):
      return f"{error}{read.total}+{read.number}={read.total + read.number}"
    if right is None:
      return f"{error}{stated}"
    return f"{error}{right.total if error == 'value' else right.number}not{stated}"

  def next_step(self, problem: Problem[Facts], before: tuple[str, ...]) -> str | None:
    right = self._next(problem, before)
    return None if right is None else _format_step(*right)

  def answer_of(self, problem: Problem[Facts], steps: tuple[str, ...]) -> str | None:
    """Return the result of the last step, once every number has been added."""
    _, left = self._state(problem, steps)
    reads = [read for step in steps if (read := _read(step)) is not None]
    return str(reads[-1].result) if reads and not left else None

  def _state(self, problem: Problem[Facts], before: tuple[str, ...]) -> tuple[int | None, list[int]]:
    """Return the true total of the numbers added so far (None before the first), and the numbers left."""
    total, left = None, list(problem.facts.numbers)
    for place, step in enumerate(before):
      read = _read(step)
      if read is None or step in before[:place]:
        continue
      if total is None and read.total in left:
        total = read.total
        left.remove(total)
      if total is not None and read.number in left:
        total += read.number
        left.remove(read.number)
    return total, left

  def _next(self, problem: Problem[Facts], before: tuple[str, ...]) -> Sum | None:
    total, left = self._state(problem, before)
    if not left:
      return None
    if total is None:
      total = left.pop(0)
    return Sum(total, left[0], total + left[0])


TASK = ChainSum

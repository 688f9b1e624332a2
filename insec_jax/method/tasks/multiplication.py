"""Multiplication: two whole numbers, one partial product for each digit of the second, then running sums.

    prompt   47*86=\\n
    steps    47*6=282\\n
             47*80=3760\\n      a digit with its power of ten; a digit 0 has no line
             282+3760=4042\\n

Numbers have the most significant digit first, as usual, so a tokenizer with tokens of several digits encodes them as in
any other text. The six classes of a wrong result are those of arXiv 2512.02389.
"""

import functools
import itertools
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method.tasks import MALFORMED, RIGHT, UNVERIFIED, Problem, Task, Verdict

CLASSES = ("carry", "ten", "hundred", "near", "digit", "adjacent", "copy", "repeat")
CALC = "calc"  # class of a wrong result outside the six: only models write these
MAX_DIGITS = 6
_TRIES = 40  # draws for one wrong step
_NUMBER = "(0|[1-9][0-9]{0,12})"
_STEP = re.compile(rf"{_NUMBER}([*+]){_NUMBER}=(?=[0-9]){_NUMBER}\n", re.ASCII)


@dataclass(frozen=True)
class Facts:
  """The two numbers."""

  first: int
  second: int


class Step(NamedTuple):
  """A step as parsed: operands, sign and result as stated."""

  first: int
  sign: str
  second: int
  result: int

  @property
  def true(self) -> int:
    """Return the true result of the operation."""
    return self.first * self.second if self.sign == "*" else self.first + self.second

  @property
  def task(self) -> tuple[str, int, int]:
    """Return what is computed: the same for operands in the other order."""
    return self.sign, min(self.first, self.second), max(self.first, self.second)


class State(NamedTuple):
  """The state of a solution, with every result replaced by the true one."""

  done: set[tuple[str, int, int]]  # what has been computed, see Step.task
  parts: list[int]  # of the second number, such as 6 and 80, still to be multiplied by
  terms: list[int]  # results not yet added, the one of the last sum first


def _format_task(first: int, sign: str, second: int) -> str:
  return f"{first}{sign}{second}"


def _format_step(first: int, sign: str, second: int, result: int) -> str:
  return f"{_format_task(first, sign, second)}={result}\n"


@functools.lru_cache(maxsize=1 << 12)
def _read(step: str) -> Step | None:
  """Return the step as parsed; None when it is malformed."""
  match = _STEP.fullmatch(step)
  return match and Step(int(match[1]), match[2], int(match[3]), int(match[4]))


def _partial_products(number: int) -> list[int]:
  """Return the digits of the number that are not 0, from the last to the first, each with its power of ten."""
  return [int(digit) * 10**place for place, digit in enumerate(reversed(str(number))) if digit != "0"]


def _within(number: int, whole: int) -> bool:
  """Return whether the number has digits of `whole` in place and zeros elsewhere, such as 80, 6 and 86 of 486."""
  return number > 0 and set(_partial_products(number)) <= set(_partial_products(whole))


def _columns(first: int, sign: str, second: int) -> list[tuple[int, int]]:
  """Return (place, value of the column) from the last place on, including the carry of the column before.

  47*80      (1, 56) (2, 37)                7*8 = 56, 4*8 + 5 = 37
  282+3760   (0, 2) (1, 14) (2, 10) (3, 4)
  """
  ones = [int(digit) for digit in reversed(str(first))]
  if sign == "*":
    start = len(str(second)) - 1  # a part: one digit and zeros
    sums = [digit * int(str(second)[0]) for digit in ones]
  else:
    start = 0
    sums = [sum(pair) for pair in itertools.zip_longest(ones, map(int, reversed(str(second))), fillvalue=0)]
  columns, carry = [], 0
  for place, value in enumerate(sums, start):
    columns.append((place, value + carry))
    carry = (value + carry) // 10
  return columns


def _results_without_a_carry(step: Step) -> list[int]:
  """Return the results with one carry forgotten."""
  columns = _columns(step.first, step.sign, step.second)
  return [step.true - value // 10 * 10 ** (place + 1) for place, value in columns if value >= 10]


def _class_of(step: Step) -> str:
  """Return the class of a wrong result: the first of these that fits, else CALC.

  carry      one carry is forgotten
  ten        10 too much or too little
  hundred    100 too much or too little
  near       one digit is 2 off
  digit      one digit is another
  adjacent   two digits side by side are others
  """
  if step.result in _results_without_a_carry(step):
    return "carry"
  if (off := abs(step.result - step.true)) in (10, 100):
    return "ten" if off == 10 else "hundred"
  right, stated = str(step.true), str(step.result)
  changed = [place for place, (a, b) in enumerate(zip(right, stated, strict=False)) if a != b]
  if len(right) != len(stated) or len(changed) > 2 or changed[-1] - changed[0] > 1:
    return CALC
  if len(changed) == 2:
    return "adjacent"
  return "near" if abs(int(right[changed[0]]) - int(stated[changed[0]])) == 2 else "digit"


def _digits_changed(number: int, num: int, rng: np.random.Generator) -> int:
  """Return the number with `num` neighbouring digits redrawn; unchanged where it has fewer digits."""
  text = str(number)
  if len(text) < num:
    return number
  place = rng.integers(len(text) - num + 1)
  return int(text[:place] + "".join(map(str, rng.integers(10, size=num))) + text[place + num :])


def _slip(error: str, step: Step, rng: np.random.Generator) -> int:
  """Return a result that may have that error."""
  if error == "carry":
    forgotten = _results_without_a_carry(step) or [step.true]
    return forgotten[rng.integers(len(forgotten))]
  if error in ("ten", "hundred"):
    return step.true + int(rng.choice((-1, 1))) * (10 if error == "ten" else 100)
  if error == "near":
    return step.true + int(rng.choice((-2, 2))) * 10 ** int(rng.integers(len(str(step.true))))
  return _digits_changed(step.true, 2 if error == "adjacent" else 1, rng)


class Multiplication(Task[Facts]):
  """The multiplication task; its size is the number of digits of each number.

  Partial products and sums may come in any order. A step that holds but reads what is not stated yet, takes several
  digits at once or splits the first number instead of the second is unverified.
  """

  name = "multiplication"
  error_classes = CLASSES
  units = ("line", "sentence")
  symbols = (*CLASSES, CALC, MALFORMED, *"0123456789", "*", "+", "=", ",", "\n")

  def __init__(self, task: TaskConfig):
    super().__init__(task)
    if self.max_size > MAX_DIGITS:
      raise InputError(f"task.max_size={task.max_size}; multiplication takes numbers of 1 to {MAX_DIGITS} digits")

  def make(self, rng: np.random.Generator) -> Problem[Facts]:
    size = int(rng.integers(self.min_size, self.max_size + 1))
    first, second = rng.integers(10 ** (size - 1), 10**size, 2).tolist()
    return self._problem(Facts(first, second))

  def problem_of(self, prompt: str) -> Problem[Facts] | None:
    read = re.fullmatch(rf"{_NUMBER}\*{_NUMBER}=\n", prompt, re.ASCII)
    return read and self._problem(Facts(int(read[1]), int(read[2])))

  def _problem(self, facts: Facts) -> Problem[Facts]:
    first, second = facts.first, facts.second
    steps: list[str] = []
    while (step := self._next(facts, tuple(steps))) is not None:
      steps.append(_format_step(*step))
    key = "*".join(map(str, sorted((first, second))))
    return Problem(f"{_format_task(first, '*', second)}=\n", tuple(steps), str(first * second), key, facts)

  def check(self, problem: Problem[Facts], before: tuple[str, ...], step: str) -> Verdict:
    read = _read(step)
    if read is None:
      return Verdict("wrong", MALFORMED)
    facts = problem.facts
    if any(earlier.task == read.task and earlier.result == earlier.true for earlier in self._reads(before)):
      return Verdict("wrong", "repeat")
    state = self._state(facts, before)
    if not self._can_come(facts, state, read):
      known = read.result == read.true and self._holds(facts, read)
      return UNVERIFIED if known else Verdict("wrong", "copy")
    return RIGHT if read.result == read.true else Verdict("wrong", _class_of(read))

  def inject(
    self, problem: Problem[Facts], before: tuple[str, ...], error: str, rng: np.random.Generator
  ) -> str | None:
    if error == "repeat":
      return before[rng.integers(len(before))] if before else None
    right = self._next(problem.facts, before)
    if right is None:
      return None
    for _ in range(_TRIES):
      wrong = right._replace(result=_slip(error, right, rng)) if error != "copy" else self._misread(right, rng)
      step = _format_step(*wrong)
      if self.check(problem, before, step).error == error:
        return step
    return None

  def explain(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str, detail: str) -> str:
    """Return the class and the wrong number; with "recompute" the columns from the last on, or what is right.

    class       wrong step    short       recompute
    one of six  47*80=3260    carry3260   carry56,37   7*8 = 56, 4*8 + 5 = 37
    copy        47*8=376      copy8       copy47*6     what comes next
    repeat      47*6=282      repeat282   repeat47*6=282
    malformed   47*=282       malformed in both
    """
    error = self.check(problem, before, wrong).error
    assert error, f"{wrong!r} is not wrong; there is nothing to explain"
    read = _read(wrong)
    if read is None:
      return MALFORMED
    if error == "copy":
      state, right = self._state(problem.facts, before), self._next(problem.facts, before)
      if detail == "recompute" and right is not None:
        return error + _format_task(*right[:3])
      known = [problem.facts.first, *state.parts] if read.sign == "*" else state.terms
      return f"{error}{read.second if read.first in known else read.first}"
    if detail == "label":
      return f"{error}{read.result}"
    if error == "repeat":
      return error + _format_step(*read[:3], read.true).strip()
    return error + ",".join(str(value) for _, value in _columns(*self._ordered(problem.facts, read)[:3]))

  def next_step(self, problem: Problem[Facts], before: tuple[str, ...]) -> str | None:
    right = self._next(problem.facts, before)
    return None if right is None else _format_step(*right)

  def correction(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str) -> str | None:
    read, state = _read(wrong), self._state(problem.facts, before)
    if read is not None and read.task not in state.done and self._can_come(problem.facts, state, read):
      return _format_step(*read[:3], read.true)
    return self.next_step(problem, before)

  def answer_of(self, problem: Problem[Facts], steps: tuple[str, ...]) -> str | None:
    """Return the result of the last step, once there are as many different steps as in the solution."""
    reads = self._reads(steps)
    return str(reads[-1].result) if len({read.task for read in reads}) >= len(problem.steps) else None

  def _misread(self, right: Step, rng: np.random.Generator) -> Step:
    """Return the step with another digit in one operand, or a part with another power of ten, and its true result."""
    first, second = right.first, right.second
    if rng.random() < 0.5:
      first = _digits_changed(first, 1, rng)
    elif right.sign == "+":
      second = _digits_changed(second, 1, rng)
    else:
      second = int(rng.integers(1, 10)) * 10 ** int(rng.integers(len(str(second)) + 1))
    read = Step(first, right.sign, second, 0)
    return read._replace(result=read.true)

  def _reads(self, steps: tuple[str, ...]) -> list[Step]:
    return [read for step in steps if (read := _read(step)) is not None]

  def _ordered(self, facts: Facts, read: Step) -> Step:
    """Return the step with the problem's first number first; a product may have it second."""
    swapped = read.sign == "*" and read.second == facts.first and read.first in _partial_products(facts.second)
    return read._replace(first=read.second, second=read.first) if swapped else read

  def _can_come(self, facts: Facts, state: State, read: Step) -> bool:
    """Return whether the operands may be multiplied or added now, or already were (the stated result may be wrong)."""
    if read.task in state.done:
      return True
    if read.sign == "*":
      ordered = self._ordered(facts, read)
      return ordered.first == facts.first and ordered.second in state.parts
    left = list(state.terms)
    for number in (read.first, read.second):
      if number not in left:
        return False
      left.remove(number)
    return True

  def _holds(self, facts: Facts, read: Step) -> bool:
    """Return whether the operands still belong to the problem: parts of either number, or sums of partial products."""
    for number, whole in ((facts.first, facts.second), (facts.second, facts.first)):
      if read.sign == "*":
        factors = [b for a, b in ((read.first, read.second), (read.second, read.first)) if a == number]
        if any(_within(factor, whole) for factor in factors):
          return True
      elif read.first % number == read.second % number == 0:
        quotients = (read.first // number, read.second // number)
        if all(_within(quotient, whole) for quotient in quotients) and not set(_partial_products(quotients[0])) & set(
          _partial_products(quotients[1])
        ):
          return True
    return False

  def _state(self, facts: Facts, before: tuple[str, ...]) -> State:
    state = State(set(), _partial_products(facts.second), [])
    for read in self._reads(before):
      if read.task in state.done or not self._can_come(facts, state, read):
        continue
      state.done.add(read.task)
      if read.sign == "*":
        state.parts.remove(self._ordered(facts, read).second)
        state.terms.append(read.true)
      else:
        state.terms.remove(read.first)
        state.terms.remove(read.second)
        state.terms.insert(0, read.true)
    return state

  def _next(self, facts: Facts, before: tuple[str, ...]) -> Step | None:
    """Return the right next step: partial products from the last digit on, then the first two results to add."""
    state = self._state(facts, before)
    if state.parts:
      first, sign, second = facts.first, "*", state.parts[0]
    elif len(state.terms) > 1:
      first, sign, second = state.terms[0], "+", state.terms[1]
    else:
      return None
    step = Step(first, sign, second, 0)
    return step._replace(result=step.true)


TASK = Multiplication

"""Graph: sums modulo m over a small graph of named quantities, the definitions shuffled.

    prompt   cab;a4;dca;b3?d:\\n   a is 4 and b is 3 (given), c is a + b and d is c + a (derived); d is asked
    steps    ca4b3c7\\n            c is a, which is 4, plus b, which is 3; c is 7
             dc7a4d1\\n            7 + 4 = 1 (mod 10)

No punctuation inside a sum, and each value right after its name: a small model finds both by looking one token back,
and learns them sooner than `c=a4+b3,c7`. Only `_format_*` and `_read` depend on the layout.
"""

import functools
import itertools
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method.tasks import MALFORMED, RIGHT, UNVERIFIED, Problem, Task, Verdict

NAMES = string.ascii_lowercase
MAX_GIVENS = 3
MAX_SIZE = len(NAMES) - MAX_GIVENS
CLASSES = ("early", "value", "calc", "copy", "repeat")
_PROMPT = re.compile(r"((?:[a-z](?:\d{1,9}|[a-z]{2});)*[a-z](?:\d{1,9}|[a-z]{2}))\?([a-z]):\n", re.ASCII)
_STEP = re.compile(r"([a-z])([a-z])(\d{1,9})([a-z])(\d{1,9})([a-z])(\d{1,9})\n", re.ASCII)
_MIX, _PRIME = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9), 2**61 - 1


@dataclass(frozen=True)
class Facts:
  """What the prompt states and what follows from it."""

  asked: str
  operands: dict[str, tuple[str, str]]  # of the derived quantities, in the order of the solution
  value: dict[str, int]  # true value of every quantity


class Sum(NamedTuple):
  """A step as parsed: the quantity, the two it reads, their values as stated, the result as stated."""

  name: str
  operands: tuple[str, str]
  values: tuple[int, int]
  result: int


def _format_prompt(definitions: list[str], asked: str) -> str:
  return f"{';'.join(definitions)}?{asked}:\n"


def _format_given(name: str, value: int) -> str:
  return f"{name}{value}"


def _format_derived(name: str, operands: tuple[str, str]) -> str:
  return f"{name}{operands[0]}{operands[1]}"


def _format_step(name: str, operands: tuple[str, str], values: Sequence[int], result: int) -> str:
  return f"{name}{operands[0]}{values[0]}{operands[1]}{values[1]}{name}{result}\n"


@functools.lru_cache(maxsize=1 << 14)
def _read(step: str, modulus: int) -> Sum | None:
  """Return the step as parsed; None when it is malformed."""
  match = _STEP.fullmatch(step)
  if match is None:
    return None
  name, first, first_value, second, second_value, again, result = match.groups()
  values = (int(first_value), int(second_value))
  # Numbers are single symbols: 07, or a number not below the modulus, is malformed.
  malformed = (
    again != name
    or max(*values, int(result)) >= modulus
    or len(f"{values[0]}{values[1]}{int(result)}") != len(first_value + second_value + result)
  )
  return None if malformed else Sum(name, (first, second), values, int(result))


def _key(reads: list[list[int]], values: list[int]) -> str:
  """Return the graph without names and order, as numbers: renamed or reshuffled copies of a problem share it.

  The last quantity is the asked one.
  """
  codes: list[int] = []
  for pair, value in zip(reads, values, strict=True):
    if pair:
      low, high = sorted((codes[pair[0]], codes[pair[1]]))
      codes.append((low * _MIX[0] + high * _MIX[1] + _MIX[2] ^ (low >> 7)) % _PRIME)
    else:
      codes.append(value + 1)
  return f"{codes[-1]:x}/{sum(codes) % _PRIME:x}"


def _chain(draw: random.Random, num_givens: int, size: int) -> list[list[int]]:
  """Return the indices that each quantity reads.

  A sum reads the one before it: all are needed, and only one order is right.
  """
  reads: list[list[int]] = [[] for _ in range(num_givens + size)]
  for k in range(num_givens, num_givens + size):
    second, first = draw.sample(range(k), 2)
    if k > num_givens:
      first, second = k - 1, draw.randrange(k - 1)
    reads[k] = [first, second] if draw.random() < 0.5 else [second, first]
  return reads


class Graph(Task[Facts]):
  """The graph task; its size is the number of sums that the asked quantity needs.

  There are 2 or 3 givens, and the sums form a chain. A step that reads a quantity too early or follows a wrong
  definition, but has every number right, is unverified.
  """

  name = "graph"
  error_classes = CLASSES
  units = ("line", "sentence")

  def __init__(self, task: TaskConfig):
    if task.modulus < 2:
      raise InputError(f"task.modulus={task.modulus}; the graph task counts modulo at least 2")
    if not 1 <= task.min_size <= task.max_size <= MAX_SIZE:
      raise InputError(
        f"task.min_size={task.min_size} to task.max_size={task.max_size}; the graph task has names for 1 to "
        f"{MAX_SIZE} sums"
      )
    self.min_size, self.max_size, self.modulus = task.min_size, task.max_size, task.modulus
    numbers = sorted(map(str, range(self.modulus)), key=len, reverse=True)
    self.symbols = (*self.error_classes, MALFORMED, *numbers, *NAMES, "=", "+", ";", "?", ":", "\n")

  def make(self, rng: np.random.Generator) -> Problem[Facts]:
    draw = random.Random(int(rng.integers(2**62)))  # several times faster than NumPy for single draws
    size = draw.randint(self.min_size, self.max_size)
    num_givens = draw.randint(2, MAX_GIVENS)
    reads = _chain(draw, num_givens, size)
    values = [draw.randrange(self.modulus) for _ in range(num_givens)]
    for first, second in reads[num_givens:]:
      values.append((values[first] + values[second]) % self.modulus)

    names = draw.sample(NAMES, len(reads))
    operands = {names[k]: (names[reads[k][0]], names[reads[k][1]]) for k in range(num_givens, len(reads))}
    value = dict(zip(names, values, strict=True))
    definitions = [_format_given(name, value[name]) for name in names[:num_givens]]
    definitions += [_format_derived(name, pair) for name, pair in operands.items()]
    draw.shuffle(definitions)
    facts = Facts(names[-1], operands, value)
    return self._problem(_format_prompt(definitions, facts.asked), facts, _key(reads, values))

  def problem_of(self, prompt: str) -> Problem[Facts] | None:
    match = _PROMPT.fullmatch(prompt)
    if match is None:
      return None
    defined = {text[0]: text[1:] for text in match[1].split(";")}
    value = {name: int(text) for name, text in defined.items() if text.isdecimal()}
    reads: list[list[int]] = [[] for _ in value]
    operands: dict[str, tuple[str, str]] = {}
    while computable := [name for name in defined if name not in value and {*defined[name]} <= value.keys()]:
      for name in computable:
        first, second = operands[name] = (defined[name][0], defined[name][1])
        names = list(value)
        reads.append([names.index(first), names.index(second)])
        value[name] = (value[first] + value[second]) % self.modulus
    if len(value) < len(defined) or match[2] not in operands:
      return None
    return self._problem(prompt, Facts(match[2], operands, value), _key(reads, list(value.values())))

  def _problem(self, prompt: str, facts: Facts, key: str) -> Problem[Facts]:
    """Return the problem whose solution computes the derived quantities in their order."""
    steps = tuple(self._right_step(facts, name) for name in facts.operands)
    return Problem(prompt, steps, str(facts.value[facts.asked]), key, facts)

  def check(self, problem: Problem[Facts], before: tuple[str, ...], step: str) -> Verdict:
    facts = problem.facts
    read = _read(step, self.modulus)
    if read is None:
      return Verdict("wrong", MALFORMED)
    stated = self._stated(before)
    if read.name in stated and stated[read.name] == facts.value.get(read.name):
      return Verdict("wrong", "repeat")
    if read.name not in facts.operands or not facts.value.keys() >= set(read.operands):
      return Verdict("wrong", "copy")
    copied = sorted(read.operands) == sorted(facts.operands[read.name])
    early = self._missing(facts, stated, read.operands)
    values_right = all(facts.value[name] == value for name, value in zip(read.operands, read.values, strict=True))
    # The sum is checked too: a wrong definition can have every number right and still not add up.
    if values_right and read.result == facts.value[read.name] == sum(read.values) % self.modulus:
      return RIGHT if copied and not early else UNVERIFIED
    if not copied:
      return Verdict("wrong", "copy")
    if early:
      return Verdict("wrong", "early")
    return Verdict("wrong", "calc" if values_right else "value")

  def inject(
    self, problem: Problem[Facts], before: tuple[str, ...], error: str, rng: np.random.Generator
  ) -> str | None:
    facts = problem.facts
    stated = self._stated(before)
    if error == "repeat":
      return before[rng.integers(len(before))] if before else None
    name = self._next_name(facts, stated)
    if name is None:
      return None
    if error == "early":
      waiting = [
        candidate
        for candidate, pair in facts.operands.items()
        if candidate not in stated and self._missing(facts, stated, pair)
      ]
      if not waiting:
        return None
      name = waiting[rng.integers(len(waiting))]
    operands = facts.operands[name]
    values = [facts.value[operand] for operand in operands]
    if error == "early":
      for place, operand in enumerate(operands):
        if self._missing(facts, stated, (operand,)):
          values[place] = self._another_value(values[place], rng)
    elif error == "value":
      place = int(rng.integers(2))
      values[place] = self._another_value(values[place], rng)
    elif error == "copy":
      place = int(rng.integers(2))
      known = [
        candidate
        for candidate in facts.value
        if (candidate not in facts.operands or candidate in stated)
        and candidate not in operands
        and facts.value[candidate] != values[place]
      ]
      if not known:
        return None
      candidate = known[rng.integers(len(known))]
      values[place] = facts.value[candidate]
      operands = (candidate, operands[1]) if place == 0 else (operands[0], candidate)
    result = sum(values) % self.modulus
    return _format_step(name, operands, values, self._another_value(result, rng) if error == "calc" else result)

  def explain(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str, detail: str) -> str:
    """Return the class and the quantity it is about; with "recompute" also what is right.

        class      wrong step   label      recompute
        early      dc5a4d9      earlyc     earlycab     c is not known yet, a + b gives it
                                           earlycabbef  nor is b, which e + f gives
        value      ca5b3c8      valuea     valuea4      a is 4
        calc       ca4b3c8      calcc      calc4+3=7    the sum
        copy       cd4b3c7      copyc      copycab      c is a + b
        repeat     ca4b3c7      repeatc    repeatc7dca  c is known; d is asked, c + a gives it
        malformed  ca43         malformed  malformeddca

    When this quantity cannot be computed now, "recompute" goes from it, or from the asked one, through the first
    missing operand of each to the one that can be computed: the correction.
    """
    facts, stated = problem.facts, self._stated(before)
    error = self.check(problem, before, wrong).error
    assert error, f"{wrong!r} is not wrong; there is nothing to explain"
    read = _read(wrong, self.modulus)
    if read is None:
      return error if detail == "label" else error + self._definitions(facts, self._way(facts, stated, None))
    name = read.name
    if error == "early":
      name = self._missing(facts, stated, facts.operands[read.name])[0]
    elif error == "value":
      name = next(name for name, value in zip(read.operands, read.values, strict=True) if facts.value[name] != value)
    if detail == "label":
      return error + name
    if error == "calc":
      return f"calc{read.values[0]}+{read.values[1]}={facts.value[name]}"
    if error == "value":
      return f"value{name}{facts.value[name]}"
    way = self._way(facts, stated, read)
    if error == "early" and way[:1] == [read.name]:
      way = way[1:]  # starts at the missing operand
    elif error == "repeat" or (error == "copy" and name in facts.value and name not in facts.operands):
      name = _format_given(name, facts.value[name])
    return error + ("" if way[:1] == [name] else name) + self._definitions(facts, way)

  def structure(self, problem: Problem[Facts]) -> str:
    """Return the shape of the graph: which quantity reads which, without names, order and values."""
    facts = problem.facts
    place = {name: number for number, name in enumerate(facts.value)}
    reads = [[place[operand] for operand in facts.operands.get(name, ())] for name in facts.value]
    num_givens = reads.count([])
    values_of_sums = [0] * (len(reads) - num_givens)  # not read
    # The givens are numbered in every order: as one value, c = a + b, d = c + a would be the shape of d = c + e.
    return min(_key(reads, [*labels, *values_of_sums]) for labels in itertools.permutations(range(num_givens)))

  def next_step(self, problem: Problem[Facts], before: tuple[str, ...]) -> str | None:
    name = self._next_name(problem.facts, self._stated(before))
    return None if name is None else self._right_step(problem.facts, name)

  def correction(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str) -> str | None:
    way = self._way(problem.facts, self._stated(before), _read(wrong, self.modulus))
    return self._right_step(problem.facts, way[-1]) if way else None

  def answer_of(self, problem: Problem[Facts], steps: tuple[str, ...]) -> str | None:
    stated = self._stated(steps)
    return str(stated[problem.facts.asked]) if problem.facts.asked in stated else None

  def _stated(self, steps: tuple[str, ...]) -> dict[str, int]:
    """Return the quantities that the steps state, with the last stated value of each."""
    reads = (_read(step, self.modulus) for step in steps)
    return {read.name: read.result for read in reads if read is not None}

  def _way(self, facts: Facts, stated: dict[str, int], read: Sum | None) -> list[str]:
    """Return the quantities from that of a wrong step, through the first missing operand of each, to a computable one.

    Starts at the asked quantity where that of the step need not be computed; empty where nothing is left to compute.
    """
    name = read.name if read and read.name in facts.operands and read.name not in stated else facts.asked
    way = [name] if name not in stated else []
    while way and (missing := self._missing(facts, stated, facts.operands[way[-1]])):
      way.append(missing[0])
    return way

  def _definitions(self, facts: Facts, names: list[str]) -> str:
    return "".join(_format_derived(name, facts.operands[name]) for name in names)

  def _missing(self, facts: Facts, stated: dict[str, int], names: tuple[str, ...]) -> list[str]:
    """Return those of `names` that cannot be read yet: derived and not stated. A given is always known."""
    return [name for name in names if name in facts.operands and name not in stated]

  def _next_name(self, facts: Facts, stated: dict[str, int]) -> str | None:
    return next((name for name in facts.operands if name not in stated), None)

  def _right_step(self, facts: Facts, name: str) -> str:
    operands = facts.operands[name]
    return _format_step(name, operands, (facts.value[operands[0]], facts.value[operands[1]]), facts.value[name])

  def _another_value(self, number: int, rng: np.random.Generator) -> int:
    return int(number + rng.integers(1, self.modulus)) % self.modulus


TASK = Graph

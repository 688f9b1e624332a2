"""English: sums told in sentences, for a pretrained model and its own tokenizer.

    prompt   Rosa has 14 apples. Rosa buys 9 more apples. Paul is 31 years old. Ben has 5 fewer apples than Rosa. How
             many apples does Ben have now?\\n
    steps    After buying more, Rosa has 14 + 9 = 23 apples.\\n
             Ben has 23 - 5 = 18 apples.\\n
             The answer is 18.\\n

The sums are a chain: each reads the result of the one before it; "together" reads an earlier one too. The words of a
step say what is computed, and the numbers are checked against it. Words that are not of the problem prove nothing: such
a step is wrong where its equation is false, else unverified.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method.tasks import MALFORMED, RIGHT, UNVERIFIED, Problem, Task, Verdict
from insec_jax.method.tasks.english_words import (
  ANSWER,
  CHANGES,
  COMPARISONS,
  DISTRACTORS,
  LASTS,
  NAMES,
  QUESTIONS,
  STARTS,
  THINGS,
  TOGETHER,
  Event,
)

CLASSES = ("copy", "operation", "calc", "skip", "repeat", "answer")
MAX_SIZE = 8
LARGEST = 200  # value of any quantity
SMALLEST = 2  # so that every noun is in the plural
_TRIES = 200  # draws for one sum
_SLIPS = 20  # draws for one wrong step
_NUMBER = "(0|[1-9][0-9]{0,8})"
_STEP = re.compile(rf"(\S.*?) {_NUMBER} ([-+*/]) {_NUMBER} = {_NUMBER} ([a-z]+)\.\n", re.ASCII)
_ANSWER = re.compile(re.escape(ANSWER).replace(r"\{\}", _NUMBER), re.ASCII)
_SAID = {
  "copy": "A wrong number was used.",
  "operation": "The operation is wrong.",
  "calc": "The result is wrong.",
  "skip": "A step was skipped.",
  "repeat": "This was said before.",
  "answer": "The answer is not the last result.",
  MALFORMED: "This line cannot be read.",
}


class Sum(NamedTuple):
  """A sum of the problem, with true numbers; `reads` are the sums whose results it needs."""

  words: str
  noun: str
  x: int
  sign: str
  y: int
  reads: tuple[int, ...]

  @property
  def result(self) -> int:
    """Return the true result."""
    return _compute(self.x, self.sign, self.y) or 0


@dataclass(frozen=True)
class Facts:
  """The sums in their order, and every number of the prompt."""

  sums: tuple[Sum, ...]
  numbers: tuple[int, ...]


class Read(NamedTuple):
  """A step as parsed: its words and noun, and the equation as stated."""

  words: str
  noun: str
  x: int
  sign: str
  y: int
  result: int

  @property
  def holds(self) -> bool:
    """Return whether the equation is true."""
    return _compute(self.x, self.sign, self.y) == self.result


def _compute(x: int, sign: str, y: int) -> int | None:
  """Return the result; None for a division that leaves a rest."""
  if sign == "/":
    return x // y if y and x % y == 0 else None
  return {"+": x + y, "-": x - y, "*": x * y}[sign]


def _format_step(words: str, x: int, sign: str, y: int, result: int, noun: str) -> str:
  return f"{words} {x} {sign} {y} = {result} {noun}.\n"


@functools.lru_cache(maxsize=1 << 12)
def _read(step: str) -> Read | None:
  """Return the step as parsed; None where it is no sum."""
  match = _STEP.fullmatch(step)
  if match is None:
    return None
  words, x, sign, y, result, noun = match.groups()
  return Read(words, noun, int(x), sign, int(y), int(result))


@functools.lru_cache(maxsize=1 << 12)
def _read_answer(step: str) -> int | None:
  match = _ANSWER.fullmatch(step)
  return int(match[1]) if match else None


class _Story:
  """A problem that is being made: sentences, sums and the key; `rng` draws everything."""

  def __init__(self, rng: np.random.Generator):
    self.rng = rng
    names = rng.permutation(NAMES).tolist()
    self.things, self.others = rng.permutation(THINGS)[:2].tolist()
    self.words = {"A": names[0], "B": names[1], "things": self.things, "others": self.others}
    self.spare_names = names[2:]
    self.value = self.draw(8, 60)
    self.sentences = [self.fill(self.pick(STARTS), self.value)]
    self.numbers, self.sums, self.key = [self.value], list[Sum](), [str(self.value)]
    self.first, self.compared_value, self.compared_sum = "", 0, -1  # of the first person, where there are two
    self.used: set[str] = set()

  def draw(self, low: int, high: int) -> int:
    """Return a whole number from `low` to `high`."""
    return int(self.rng.integers(low, high + 1))

  def pick(self, values: Sequence):
    """Return one of the values."""
    return values[self.draw(0, len(values) - 1)]

  def fill(self, template: str, number: int = 0) -> str:
    """Return the template with names, things and the number; each C is another name."""
    name = self.spare_names.pop() if "{C}" in template else ""
    return template.format(n=number, C=name, **self.words)

  def number_for(self, sign: str) -> int | None:
    """Return a second operand that keeps the value within bounds; None where none was drawn."""
    if sign in "*/":
      number = self.draw(2, 6)
    else:
      number = self.draw(2, 40 if sign == "+" else max(2, self.value - SMALLEST))
    result = _compute(self.value, sign, number)
    return number if result is not None and SMALLEST <= result <= LARGEST else None

  def add(self, event: Event) -> bool:
    """Add the event; return whether its number fits."""
    number = self.number_for(event.sign)
    if number is None or event.words in self.used:
      return False
    name = self.spare_names[-1]
    words = event.words.format(C=name, **self.words)
    self.sentences.append(self.fill(event.sentence, number))
    self.numbers.append(number)
    self._append(words, event, number, (len(self.sums) - 1,) if self.sums else ())
    self.key.append(f"{event.sign}{number}")
    self.used.add(event.words)
    return True

  def compare(self, event: Event) -> bool:
    """Add a comparison with a second person, whom the rest is about; return whether its number fits."""
    before = self.value, len(self.sums) - 1
    if not self.add(event):
      return False
    self.compared_value, self.compared_sum = before
    self.first = self.words["A"]
    self.words["A"] = self.words["B"]
    return True

  def together(self) -> None:
    """Add the last sum, of both persons."""
    self.words |= {"A": self.first, "B": self.words["A"]}
    reads = (self.compared_sum,) if self.compared_sum >= 0 else ()
    x, y = self.compared_value, self.value
    words = TOGETHER.words.format(C="", **self.words)
    self.sums.append(Sum(words, self.things, x, "+", y, (*reads, len(self.sums) - 1)))
    self.key.append(f"+#{self.compared_sum}")
    self.value = x + y

  def _append(self, words: str, event: Event, number: int, reads: tuple[int, ...]) -> None:
    self.sums.append(Sum(words, event.noun or self.things, self.value, event.sign, number, reads))
    self.value = self.sums[-1].result


class English(Task[Facts]):
  """The task of sums in English; its size is the number of sums, and the line of the answer follows them."""

  name = "english"
  error_classes = CLASSES
  units = ("line", "sentence")
  symbols = None

  def __init__(self, task: TaskConfig):
    super().__init__(task)
    if self.max_size > MAX_SIZE:
      raise InputError(f"task.max_size={task.max_size}; english has at most {MAX_SIZE} sums")

  def make(self, rng: np.random.Generator) -> Problem[Facts]:
    size = int(rng.integers(self.min_size, self.max_size + 1))
    story = _Story(rng)
    question = self._tell(story, size)
    for _ in range(story.draw(0, 2)):
      number = story.draw(2, 60)
      story.numbers.append(number)
      place = story.draw(1, len(story.sentences))
      story.sentences.insert(place, story.fill(story.pick(DISTRACTORS), number))
    prompt = " ".join((*story.sentences, question)) + "\n"
    steps = (*(self._right_step(one) for one in story.sums), ANSWER.format(story.value))
    facts = Facts(tuple(story.sums), tuple(story.numbers))
    return Problem(prompt, steps, str(story.value), " ".join(story.key), facts)

  def _tell(self, story: _Story, size: int) -> str:
    """Add `size` sums to the story; return the question."""
    compared_at = story.draw(0, 2 * size)  # beyond the sums: never
    is_together = size > 1 and compared_at < size - 1 and story.draw(0, 1) == 1
    last = None if is_together or story.draw(0, 1) else story.pick(LASTS)
    for place in range(size - is_together):
      for attempt in range(_TRIES):
        if last is not None and place == size - 1 and attempt < _TRIES // 4 and story.add(last):
          return story.fill(last.question)
        is_done = story.compare(story.pick(COMPARISONS)) if place == compared_at else story.add(story.pick(CHANGES))
        if is_done:
          break
      else:
        raise RuntimeError(f"no sum fits the value {story.value}")
    if is_together:
      story.together()
      return story.fill(TOGETHER.question)
    return story.fill(story.pick(QUESTIONS))

  def check(self, problem: Problem[Facts], before: tuple[str, ...], step: str) -> Verdict:
    stated = self._stated(problem, before)
    if (answer := _read_answer(step)) is not None:
      if any(_read_answer(earlier) == int(problem.answer) for earlier in before):
        return Verdict("wrong", "repeat")
      if str(answer) != problem.answer:
        return Verdict("wrong", "answer")
      return RIGHT if len(stated) == len(problem.facts.sums) else UNVERIFIED
    read = _read(step)
    if read is None:
      return Verdict("wrong", MALFORMED)
    number = self._number(problem, read)
    if number is None:
      return UNVERIFIED if read.holds else Verdict("wrong", "calc")
    one = problem.facts.sums[number]
    if stated.get(number) == one.result:
      return Verdict("wrong", "repeat")
    is_early = any(earlier not in stated for earlier in one.reads)
    if read.holds and read.result == one.result:  # another way to the same value may be chance
      return UNVERIFIED if is_early or not self._same(read, one) else RIGHT
    if sorted((read.x, read.y)) != sorted((one.x, one.y)):
      return Verdict("wrong", "skip" if is_early else "copy")
    return Verdict("wrong", "calc" if self._same(read, one) else "operation")

  def inject(
    self, problem: Problem[Facts], before: tuple[str, ...], error: str, rng: np.random.Generator
  ) -> str | None:
    facts, stated = problem.facts, self._stated(problem, before)
    if error == "repeat":
      return before[rng.integers(len(before))] if before else None
    left = [number for number in range(len(facts.sums)) if number not in stated]
    if error == "answer":
      others = [one.result for one in facts.sums if str(one.result) != problem.answer] + [
        number for number in facts.numbers if str(number) != problem.answer
      ]
      may_come = not left and not any(_read_answer(step) is not None for step in before)
      return ANSWER.format(others[rng.integers(len(others))]) if may_come and others else None
    one = next((facts.sums[number] for number in left), None)
    if one is not None and error == "skip":
      skipped = one
      one = next((facts.sums[number] for number in left if set(facts.sums[number].reads) & set(left)), None)
      if one is not None:  # its number is the one before the sum that is skipped
        one = one._replace(x=skipped.x) if one.x == skipped.result else one._replace(y=skipped.x)
    if one is None:
      return None
    for _ in range(_SLIPS):
      step = self._slipped(facts, one, error, rng)
      if step is not None and self.check(problem, before, step).error == error:
        return step
    return None

  def _slipped(self, facts: Facts, one: Sum, error: str, rng: np.random.Generator) -> str | None:
    """Return the step of a sum with a slip that may be of this class; None where its result is no number."""
    x, sign, y = one.x, one.sign, one.y
    if error == "copy":
      wrong = facts.numbers[rng.integers(len(facts.numbers))]
      x, y = (wrong, y) if rng.random() < 0.5 else (x, wrong)
    elif error == "operation":
      sign = str(rng.choice([other for other in "+-*/" if other != sign]))
    result = _compute(x, sign, y)
    if result is not None and error == "calc":
      result += int(rng.choice((-10, -2, -1, 1, 2, 10)))
    return None if result is None or result < 0 else _format_step(one.words, x, sign, y, result, one.noun)

  def explain(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str, detail: str) -> str:
    """Return what is wrong in a sentence; with "recompute" also what is right.

    class      label                               with "recompute"
    copy       A wrong number was used.            A wrong number was used. It is 23 - 8.
    operation  The operation is wrong.             The operation is wrong. It is 23 - 8.
    calc       The result is wrong.                The result is wrong. 14 + 9 is 23.
    skip       A step was skipped.                 A step was skipped. Before it comes 14 + 9.
    repeat     This was said before.               This was said before. Next comes 23 - 8.
    answer     The answer is not the last result.  The answer is not the last result. It is 15.
    malformed  This line cannot be read.           This line cannot be read. Next comes 23 - 8.
    """
    error = self.check(problem, before, wrong).error
    assert error, f"{wrong!r} is not wrong; there is nothing to explain"
    said = _SAID[error]
    if detail == "label":
      return said
    if error == "answer":
      return f"{said} It is {problem.answer}."
    read = _read(wrong)
    number = self._number(problem, read) if read else None
    if error == "calc" and read is not None:
      true = _compute(read.x, read.sign, read.y)
      return said if true is None else f"{said} {read.x} {read.sign} {read.y} is {true}."
    if error in ("copy", "operation") and number is not None:
      one = problem.facts.sums[number]
      return f"{said} It is {one.x} {one.sign} {one.y}."
    following = self._next(problem, before)
    if following is None:
      return said
    return f"{said} {'Before it' if error == 'skip' else 'Next'} comes {following.x} {following.sign} {following.y}."

  def next_step(self, problem: Problem[Facts], before: tuple[str, ...]) -> str | None:
    if (following := self._next(problem, before)) is not None:
      return self._right_step(following)
    is_answered = any(_read_answer(step) is not None for step in before)
    return None if is_answered else problem.steps[-1]

  def correction(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str) -> str | None:
    read, stated = _read(wrong), self._stated(problem, before)
    number = self._number(problem, read) if read else None
    if number is not None and number not in stated and all(one in stated for one in problem.facts.sums[number].reads):
      return self._right_step(problem.facts.sums[number])
    return self.next_step(problem, before)

  def answer_of(self, problem: Problem[Facts], steps: tuple[str, ...]) -> str | None:
    """Return the number of the last line that states an answer."""
    del problem
    answers = [answer for step in steps if (answer := _read_answer(step)) is not None]
    return str(answers[-1]) if answers else None

  def _stated(self, problem: Problem[Facts], steps: tuple[str, ...]) -> dict[int, int]:
    """Return the sums that the steps state, by number, with the last stated result of each."""
    stated = {}
    for step in steps:
      read = _read(step)
      number = self._number(problem, read) if read else None
      if read is not None and number is not None:
        stated[number] = read.result
    return stated

  def _number(self, problem: Problem[Facts], read: Read) -> int | None:
    """Return the number of the sum with these words and this noun; None where the problem has none."""
    found = (
      number for number, one in enumerate(problem.facts.sums) if (one.words, one.noun) == (read.words, read.noun)
    )
    return next(found, None)

  def _same(self, read: Read, one: Sum) -> bool:
    """Return whether the operation is the one of the sum; operands of + and * may come in any order."""
    swapped = one.sign in "+*" and (read.x, read.y) == (one.y, one.x)
    return read.sign == one.sign and ((read.x, read.y) == (one.x, one.y) or swapped)

  def _next(self, problem: Problem[Facts], before: tuple[str, ...]) -> Sum | None:
    stated = self._stated(problem, before)
    return next((one for number, one in enumerate(problem.facts.sums) if number not in stated), None)

  def _right_step(self, one: Sum) -> str:
    return _format_step(one.words, one.x, one.sign, one.y, one.result, one.noun)


TASK = English

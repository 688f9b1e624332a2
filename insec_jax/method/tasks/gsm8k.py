"""GSM8K: word problems whose steps are checked by the annotations of their solutions (`gsm8k_records`).

What proves a step wrong, by class:
    calc      its arithmetic does not give the stated result (parsed from the step, or: the words and operands of a step
              of the solution with another result)
    operand   the words of a step of the solution, arithmetic that holds, but another result, from a number without
              source: not in question or solution, nor one operation on two such numbers
    carry     the same, where the number should be the result of an earlier step
    value     the words of a step of the solution that states a result without arithmetic, with a number without source
    answer    another final answer
    repeat    a step stated before
Any other step is right when it is one of the solution's or its arithmetic gives a result of the solution's; otherwise
it is unverified.

Where the answer is known to be wrong, mining also takes an unverified step as wrong (`locate`):
    result    the number after its last equal sign is in neither question nor solution
"""

import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method.tasks import MALFORMED, RIGHT, UNVERIFIED, Problem, Task, Verdict
from insec_jax.method.tasks.arithmetic import (
  NUMBER,
  equations,
  evaluate,
  numbers_of,
  show,
  slips,
  value_of,
  words_of,
  written_like,
)
from insec_jax.method.tasks.gsm8k_records import (
  FINAL,
  Facts,
  Gold,
  Note,
  answer_in,
  cached_by_identity,
  golds_of,
  results_of,
)

CLASSES = ("calc", "operand", "carry", "value", "answer", "repeat")
RESULT = "result"  # class of steps that `locate` finds
# The number after the last "=", whole, and with no arithmetic after it.
_RESULT = re.compile(rf"=[^=\d.,]*({NUMBER.pattern})(?![\d,.]*\d)(?!\s*[-+*/xX×·÷−–(])[^=]*\Z")
_MOST_SOURCES = 500  # different numbers of a record; with more, nearly every number has a source
_LEAST_WORDS = 3  # a step of fewer words says too little for another number in it to be called wrong
# Numbers in words, and numbers of common knowledge.
_WORDS = {
  "half": 0.5,
  "quarter": 0.25,
  "twice": 2,
  "double": 2,
  "couple": 2,
  "triple": 3,
  "dozen": 12,
  "one": 1,
  "two": 2,
  "three": 3,
  "four": 4,
  "five": 5,
  "six": 6,
  "seven": 7,
  "eight": 8,
  "nine": 9,
  "ten": 10,
  "eleven": 11,
  "twelve": 12,
  "fifteen": 15,
  "twenty": 20,
  "thirty": 30,
  "forty": 40,
  "fifty": 50,
  "hundred": 100,
  "thousand": 1000,
  "third": 3,
  "fourth": 4,
  "fifth": 5,
  "week": 7,
  "year": 12,
}
_KNOWN = (1, 2, 4, 7, 10, 12, 24, 30, 31, 52, 60, 100, 365, 1000)


@cached_by_identity
def _numbers_given(question: str, steps: tuple[str, ...], notes: tuple[Note, ...]) -> frozenset[Fraction]:
  """Return the numbers of question and solution, also as hundredths and as percent."""
  numbers = {*_given(question), *results_of(steps, notes), *(number for step in steps for number in numbers_of(step))}
  return frozenset(number * factor for number in numbers for factor in (1, 100, Fraction(1, 100)))


@dataclass(frozen=True)
class Finding:
  """A verdict and, where it is wrong, its explanation as a label and recomputed."""

  verdict: Verdict
  label: str = ""
  recompute: str = ""


def _wrong(error: str, label: str, recompute: str) -> Finding:
  return Finding(Verdict("wrong", error), label, recompute)


def _miscalculated(expression: str, *, value: Fraction, stated: Fraction) -> Finding:
  return _wrong("calc", f"{expression} is not {show(stated)}.", f"{expression} is {show(value)}, not {show(stated)}.")


@cached_by_identity
def _given(question: str) -> frozenset[Fraction]:
  """Return the numbers of a question."""
  return frozenset(numbers_of(question))


@cached_by_identity
def _sourced(question: str, steps: tuple[str, ...]) -> np.ndarray | None:
  """Return all numbers with a source, sorted: in question or solution, common, or one operation on two of them.

  None where the record has so many numbers that no other number can be shown to have no source.
  """
  words = re.findall(r"[a-z]+", question.lower())
  numbers = {float(number) for text in (question, *steps) for number in numbers_of(text)}
  stated = np.array(sorted(numbers | {float(_WORDS[word]) for word in words if word in _WORDS}))
  if len(stated) > _MOST_SOURCES:
    return None
  with np.errstate(divide="ignore", invalid="ignore"):
    pairs = (
      stated[:, None] + stated[None],
      stated[:, None] - stated[None],
      stated[:, None] * stated[None],
      stated[:, None] / stated[None],
      stated[:, None] * stated[None] / 100,
    )
  sources = np.concatenate([stated, np.array(_KNOWN, float), *(pair.ravel() for pair in pairs)])
  return np.unique(np.abs(sources[np.isfinite(sources)]))


def _has_source(number: Fraction, problem: Problem[Facts]) -> bool:
  sourced = _sourced(problem.facts.question, problem.steps)
  if sourced is None:
    return True
  place = np.searchsorted(sourced, float(number))
  return bool(np.any(np.abs(sourced[max(place - 1, 0) : place + 1] - float(number)) < 1e-6))


def _new_value(note: Note, changed: dict[Fraction, Fraction]) -> Fraction | None:
  """Return the value of the annotated expression with the changed numbers substituted."""

  def swap(match: re.Match) -> str:
    value = value_of(match[0])
    return f"({changed[value]})" if value in changed else match[0]

  return evaluate(NUMBER.sub(swap, note.expression))


def _has_operator(note: Note) -> bool:
  return any(sign in note.expression for sign in "+-*/")


class Gsm8k(Task[Facts]):
  """The GSM8K task; problems come from records, and steps may be lines, sentences or paragraphs."""

  name = "gsm8k"
  error_classes = CLASSES
  answer_classes = ("answer",)
  symbols = None
  units = ("line", "sentence", "paragraph")

  def __init__(self, task: TaskConfig):
    if task.min_size or task.max_size or task.modulus:
      raise InputError(
        f"task.min_size={task.min_size} max_size={task.max_size} modulus={task.modulus}; gsm8k reads its problems from "
        "data.path, all three must be 0"
      )

  def make(self, rng: np.random.Generator) -> Problem[Facts]:
    del rng
    raise InputError("task gsm8k makes no problems; it reads them from data.path")

  def check(self, problem: Problem[Facts], before: tuple[str, ...], step: str) -> Verdict:
    return self._find(problem, before, step).verdict

  def explain(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str, detail: str) -> str:
    """Return what is wrong, in words.

    class     label                        recompute
    calc      48/2 is not 26.              48/2 is 24, not 26.
    operand   18 is not the right number.  The number is 16, not 18: 2*16 = 32.
    value     17 is not the right value.   The value is 15, not 17.
    answer    The answer is not 71.        The answer is 72, not 71.
    repeat    This was said before.        This was said before: 30+4 is 34.
    result    15 does not lead to the answer, in both
    """
    finding, result = self._find(problem, before, wrong), _result_of(wrong)
    if result is not None and not finding.verdict.error and self.locate(problem, wrong):
      return f"{show(result)} does not lead to the answer."
    assert finding.verdict.error, f"{wrong!r} is not wrong; there is nothing to explain"
    return finding.label if detail == "label" else finding.recompute

  def locate(self, problem: Problem[Facts], step: str) -> str:
    result = _result_of(step)
    if result is None:
      return ""
    known = _numbers_given(problem.facts.question, problem.steps, problem.facts.notes)
    return "" if result in known or any(_rounded(result, number) for number in known) else RESULT

  def inject(
    self, problem: Problem[Facts], before: tuple[str, ...], error: str, rng: np.random.Generator
  ) -> str | None:
    golds = golds_of(problem.steps, problem.facts.notes)
    k = self._place(problem, before)
    if error == "repeat":
      return before[rng.integers(len(before))] if before else None
    if k == len(golds):
      return None
    gold = golds[k]
    spans = [match.span() for match in NUMBER.finditer(gold.text)]
    if error == "answer":
      final = FINAL.search(gold.text)
      place = next((j for j, span in enumerate(spans) if final and span[0] > final.start()), None)
      return None if place is None else _replace(gold, spans, {place: _slip(gold, spans[place], rng)})
    notes = [pair for pair in gold.notes if _has_operator(pair[1]) != (error == "value")]
    if not notes:
      return None
    place, note = notes[rng.integers(len(notes))]
    operands = set(numbers_of(note.expression))
    line = _line_around(gold.text, spans[place][0])
    near = [j for j, span in enumerate(spans) if span[0] in line]
    # A repetition of the result in the line changes with it, unless an operand has the same value.
    again = error == "value" or note.result not in operands
    results = {place, *(j for j in near if again and gold.numbers[j] == note.result)}
    if error in ("calc", "value"):
      return _replace(gold, spans, dict.fromkeys(results, _slip(gold, spans[place], rng)))
    chosen = [
      j
      for j in near
      if j < place
      and gold.numbers[j] in operands
      and gold.numbers[j] != note.result
      and self._is_earlier(problem, k, gold.numbers[j]) == (error == "carry")
    ]
    if not chosen:
      return None
    j = chosen[rng.integers(len(chosen))]
    new = _slip(gold, spans[j], rng, lambda number: not _has_source(number, problem))
    result = None if new is None else _new_value(note, {gold.numbers[j]: new})
    changes: dict[int, Fraction | None] = {i: new for i in near if gold.numbers[i] == gold.numbers[j]}
    return _replace(gold, spans, changes | dict.fromkeys(results, result))

  def next_step(self, problem: Problem[Facts], before: tuple[str, ...]) -> str | None:
    k = self._place(problem, before)
    return problem.steps[k] if k < len(problem.steps) else None

  def answer_of(self, problem: Problem[Facts], steps: tuple[str, ...]) -> str | None:
    del problem
    answers = [answer for step in steps if (answer := answer_in(step)) is not None]
    return show(answers[-1]) if answers else None

  def _place(self, problem: Problem[Facts], before: tuple[str, ...]) -> int:
    """Return the index of the next step: one past the last of the solution that `before` states by text or result."""
    if before == problem.steps[: len(before)]:
      return len(before)
    golds = golds_of(problem.steps, problem.facts.notes)
    place = 0
    for step in before:
      stated = {equation.stated for equation in equations(step) if equation.holds}
      for k in range(place, len(golds)):
        if step.strip() == golds[k].text.strip() or stated & {note.result for _, note in golds[k].notes}:
          place = k + 1
          break
    return place

  def _is_earlier(self, problem: Problem[Facts], k: int, number: Fraction) -> bool:
    """Return whether the number is the result of a step before the k-th that the question does not give."""
    results = results_of(problem.steps, problem.facts.notes)
    return number in results and results[number] < k and number not in _given(problem.facts.question)

  def _find(self, problem: Problem[Facts], before: tuple[str, ...], step: str) -> Finding:
    golds = golds_of(problem.steps, problem.facts.notes)
    stripped, words, numbers = step.strip(), words_of(step), numbers_of(step)
    seen = sum(earlier.strip() == stripped for earlier in before)
    if seen and seen >= sum(gold.text.strip() == stripped for gold in golds):
      recomputed = ", ".join(f"{equation.text} is {show(equation.value)}" for equation in equations(step))
      label = "This was said before."
      return _wrong("repeat", label, f"{label[:-1]}: {recomputed}." if recomputed else label)
    alike = [k for k, gold in enumerate(golds) if gold.words == words]
    if any(golds[k].numbers == numbers for k in alike):
      return Finding(RIGHT)
    final = FINAL.search(step)
    if final:
      stated = answer_in(step)
      if stated is None:
        return _wrong(MALFORMED, "The answer is not a number.", f"The answer is the number {problem.answer}.")
      if stated != problem.facts.answer:
        return _wrong(
          "answer", f"The answer is not {show(stated)}.", f"The answer is {problem.answer}, not {show(stated)}."
        )
    written = equations(step)
    for equation in written:
      if not equation.holds:
        return _miscalculated(equation.text, value=equation.value, stated=equation.stated)
    altered = (self._altered(problem, k, numbers) for k in alike)
    first = next(altered, None)
    # Several steps may have these words: the step is wrong only if it is wrong as each of them.
    if first and first.verdict.error and all(finding.verdict.error for finding in altered):
      return first
    results = results_of(problem.steps, problem.facts.notes)
    confirmed = any(equation.stated in results for equation in written) or FINAL.fullmatch(stripped)
    return Finding(RIGHT if confirmed else UNVERIFIED)

  def _altered(self, problem: Problem[Facts], k: int, numbers: tuple[Fraction, ...]) -> Finding:
    """Return the finding on a step with the words of step k and other numbers; unverified unless proved wrong."""
    gold = golds_of(problem.steps, problem.facts.notes)[k]
    if len(re.findall(r"[^\W\d_]{2,}", gold.text)) < _LEAST_WORDS:
      return Finding(UNVERIFIED)
    changed: dict[Fraction, Fraction] = {}
    for old, new in zip(gold.numbers, numbers, strict=True):
      if old != new and changed.setdefault(old, new) != new:
        return Finding(UNVERIFIED)
    for place, note in gold.notes:
      result = numbers[place]
      if result == note.result or _rounded(result, note.result):
        continue
      operands = {old: new for old, new in changed.items() if old != note.result}
      if not operands:
        if _has_operator(note):
          return _miscalculated(note.expression, value=note.result, stated=result)
        if not _has_source(result, problem):
          return _wrong(
            "value", f"{show(result)} is not the right value.", f"The value is {show(note.result)}, not {show(result)}."
          )
        continue
      stray = [old for old, new in operands.items() if not _has_source(new, problem)]
      if stray and operands.keys() <= set(numbers_of(note.expression)) and _new_value(note, operands) == result:
        right, stated = show(stray[0]), show(operands[stray[0]])
        error = "carry" if self._is_earlier(problem, k, stray[0]) else "operand"
        return _wrong(
          error,
          f"{stated} is not the right number.",
          f"The number is {right}, not {stated}: {note.expression} = {show(note.result)}.",
        )
    return Finding(UNVERIFIED)


TASK = Gsm8k


def _result_of(step: str) -> Fraction | None:
  """Return the number after the last equal sign of the step; None where arithmetic or no number follows."""
  match = _RESULT.search(step.strip())
  return match and value_of(match[1])


def _rounded(number: Fraction, exact: Fraction) -> bool:
  """Return whether `number` may be `exact` rounded, up or down, to as many decimals as it has."""
  places = next((k for k in range(6) if (number * 10**k).denominator == 1), 6)
  return exact.denominator > 1 and abs(number - exact) < Fraction(1, 10**places)


def _line_around(text: str, place: int) -> range:
  """Return the range of characters of the line that holds the one at `place`."""
  end = text.find("\n", place)
  return range(text.rfind("\n", 0, place) + 1, len(text) if end < 0 else end)


def _replace(gold: Gold, spans: list[tuple[int, int]], changes: dict[int, Fraction | None]) -> str | None:
  """Return the step with the numbers at these indices replaced, each formatted like the old one; None if impossible."""
  text = gold.text
  for place in sorted(changes, reverse=True):
    start, end = spans[place]
    new = changes[place]
    written = None if new is None else written_like(new, text[start:end])
    if written is None:
      return None
    text = text[:start] + written + text[end:]
  return text


def _slip(gold: Gold, span: tuple[int, int], rng: np.random.Generator, allowed=None) -> Fraction | None:
  """Return another number for the one at `span`, as misread or miscalculated; None when none is allowed."""
  usable = [value for value in slips(gold.text[slice(*span)]) if allowed is None or allowed(value)]
  return usable[rng.integers(len(usable))] if usable else None

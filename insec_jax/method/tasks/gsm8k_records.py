"""GSM8K records: problems with the calculator annotations of their solutions moved from the text to the facts.

record   {"question": "...", "answer": "48/2 = <<48/2=24>>24 clips in May.\\n#### 24"}
prompt   ...\\n
steps    48/2 = 24 clips in May.\\n
         #### 24\\n
"""

import bisect
import collections
import functools
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from insec_jax.command import InputError
from insec_jax.method.tasks import Problem
from insec_jax.method.tasks.arithmetic import (
  MOST_CHARACTERS,
  NUMBER,
  decimals,
  evaluate,
  numbers_of,
  show,
  value_of,
  words_of,
)
from insec_jax.method.transcript import split_steps

FINAL = re.compile(r"####[ \t]*([^\n]*)")
_NOTE = re.compile(r"<<([^<>]*)>>")
_ANSWER = re.compile(rf"(-?)\$?({NUMBER.pattern})[%.]?")
_AFTER = re.compile(r"[\s$€£]+")  # between an annotation and the number that states its result, or
_BEFORE = re.compile(r"[ =$]+")  # between that number and the annotation
_MOST_CACHED = 256
_first = operator.itemgetter(0)


@dataclass(frozen=True)
class Note:
  """An annotation: the place of its result in the solution (a character), the expression, its value."""

  place: int
  expression: str
  result: Fraction


@dataclass(frozen=True)
class Facts:
  """The question, the final answer, and the annotations of the solution."""

  question: str
  answer: Fraction
  notes: tuple[Note, ...]


@dataclass(frozen=True)
class Gold:
  """A step of the solution, prepared for comparison: its words, its numbers, and (index of the result, note) pairs."""

  text: str
  words: str
  numbers: tuple[Fraction, ...]
  notes: tuple[tuple[int, Note], ...]


def answer_in(step: str) -> Fraction | None:
  """Return the final answer that the step states; None when it states none, or no number."""
  final = FINAL.search(step)
  match = final and _ANSWER.fullmatch(final[1].strip())
  return match and value_of(match[2]) * (-1 if match[1] else 1)


def problem_of(record: dict) -> Problem[Facts]:
  """Return the problem of a published record; its steps are the lines of the answer.

  Raises InputError for an answer without "#### number" at its end, or an annotation that is no arithmetic or does not
  hold.
  """
  question, annotated = record["question"], record["answer"].strip() + "\n"
  kept, num_kept, notes, start = [], 0, [], 0
  for match in _NOTE.finditer(annotated):
    expression, _, stated = match[1].replace("//", "/").partition("=")  # two published ones divide like this
    value, result = evaluate(expression), evaluate(stated)
    if value is None or result is None or abs(value - result) >= Fraction(1, 10 ** max(decimals(stated), 1)):
      raise InputError(f"annotation {match[0]:.200} does not hold; write <<arithmetic=result>>, or take it out")
    kept.append(annotated[start : match.start()])
    num_kept += len(kept[-1])
    start = match.end()
    notes.append(Note(num_kept, expression, result))
  solution = "".join((*kept, annotated[start:]))
  last = solution[:-1].rpartition("\n")[2]
  answer = answer_in(last)
  if answer is None or not last.startswith("####"):
    raise InputError(f"answer ends in {last[-60:]!r}; its last line must be '#### ' and the final number")
  prompt = question.rstrip("\n") + "\n"
  facts = Facts(question, answer, _locate_notes(notes, solution))
  return Problem(prompt, split_steps(solution, "line"), show(answer), question, facts)


def _locate_notes(notes: Sequence[Note], solution: str) -> tuple[Note, ...]:
  """Return each note with the place of the number that states its result, right after or right before it; -1 if none.

  The solution is scanned once: the time is linear in its length, whatever the number and places of the notes.
  """
  numbers = [match.start() for match in NUMBER.finditer(solution)]
  after, before = ([match.span() for match in gap.finditer(solution)] for gap in (_AFTER, _BEFORE))

  def place(note: Note) -> int:
    start, stop = _last_span_from(after, note.place)
    stating = NUMBER.match(solution, stop if start <= note.place < stop else note.place)
    if stating and value_of(stating[0]) == note.result:
      return stating.start()
    start, stop = _last_span_from(before, note.place - 1)
    end = start if start < note.place <= stop else note.place
    first = bisect.bisect(numbers, end - MOST_CHARACTERS) - 1  # far enough back to match the number whole
    for stating in NUMBER.finditer(solution, numbers[first] if first >= 0 else 0, end):
      if stating.end() == end and value_of(stating[0]) == note.result:
        return stating.start()
    return -1

  return tuple(Note(place(note), note.expression, note.result) for note in notes)


def _last_span_from(spans: list[tuple[int, int]], place: int) -> tuple[int, int]:
  """Return the last span that begins at or before the place; an empty one where none does."""
  k = bisect.bisect(spans, place, key=lambda span: span[0]) - 1
  return spans[k] if k >= 0 else (0, 0)


def cached_by_identity(make: Callable) -> Callable:
  """Cache the results of `make` for the last 256 lists of arguments, compared by identity.

  Equality and hash of a long solution would cost as much as reading it, at each of its steps.
  """
  kept = collections.OrderedDict()  # the arguments are kept as well: no other object can get their ids

  @functools.wraps(make)
  def cached(*arguments):
    key = tuple(map(id, arguments))
    if key not in kept:
      kept[key] = arguments, make(*arguments)
      if len(kept) > _MOST_CACHED:
        kept.popitem(last=False)
    return kept[key][1]

  return cached


@cached_by_identity
def golds_of(steps: tuple[str, ...], notes: tuple[Note, ...]) -> tuple[Gold, ...]:
  """Return the steps of a solution, prepared for comparison."""
  notes_at = collections.defaultdict(list)
  for number, note in enumerate(notes):
    notes_at[note.place].append((number, note))
  golds, start = [], 0
  for step in steps:
    inside = [
      (number, k, note)
      for k, match in enumerate(NUMBER.finditer(step))
      for number, note in notes_at.get(start + match.start(), ())
    ]
    golds.append(Gold(step, words_of(step), numbers_of(step), tuple(pair[1:] for pair in sorted(inside, key=_first))))
    start += len(step)
  return tuple(golds)


@cached_by_identity
def results_of(steps: tuple[str, ...], notes: tuple[Note, ...]) -> dict[Fraction, int]:
  """Return the index of the first step that has each result."""
  places: dict[Fraction, int] = {}
  for k, gold in enumerate(golds_of(steps, notes)):
    for _, note in gold.notes:
      places.setdefault(note.result, k)
  return places

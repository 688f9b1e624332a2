"""Mistakes: wrong steps put into right solutions, each checked to be wrong (in prose: different) before use."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import MistakesConfig
from insec_jax.method import prose
from insec_jax.method.prose import Corpus
from insec_jax.method.roles import PROMPT, TEXT
from insec_jax.method.tasks import Problem, Task, in_units
from insec_jax.method.transcript import Markers, Piece, Transcript, mistake_pieces

_MOST_PLACES = 64  # tried in a solution, before it is returned with fewer mistakes
_REDRAWS = 4  # when the drawn step is right, unverified or of another class
# Names of the classes in the paper's annotation; a class not listed keeps its own name.
_PAPER = {
  "calc": "wrong calculation",
  "operand": "wrong substitution",
  "carry": "wrong carry",
  "value": "wrong value",
  "copy": "wrong copy",
  "answer": "wrong answer",
  "operation": "wrong operation",
  "skip": "a step is missing",
  "result": "does not lead to the answer",
  "repeat": "said before",
  "early": "not known yet",
  "invalid": "invalid move",
  "open": "not certain yet",
  "malformed": "cannot be read",
  "sentence": "does not follow",
  "number": "wrong number",
  "entity": "wrong name",
  "negation": "the opposite is true",
  "invented": "a name that the text does not have",
  "relation": "another relation",
  "turned": "the other way round",
  "unsaid": "not in the text",
  "joined": "joined wrongly",
  "count": "wrong number of lines",
  "item": "not about one of the things",
  "order": "out of order",
  "mark": "wrong start of the line",
  "ending": "wrong end of the line",
  "case": "wrong letters",
  "words": "wrong number of words",
  "include": "a word is missing",
  "exclude": "to be left out",
}
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Probe:
  """A problem solved correctly up to a wrong step; the model's continuation after `text` is measured."""

  problem: Problem
  before: tuple[str, ...]
  wrong: str
  error: str

  @property
  def text(self) -> str:
    """Return what the model reads: prompt, right steps, wrong step."""
    return self.problem.prompt + "".join(self.before) + self.wrong


def classes_of(task: Task, mistakes: MistakesConfig) -> tuple[str, ...]:
  """Return the error classes to draw from; all of the task's when the config names none.

  Raises InputError for a class, or a unit of steps, that the task does not have.
  """
  if mistakes.unit not in task.units:
    raise InputError(f"mistakes.unit={mistakes.unit!r}; steps of task {task.name} can be: {', '.join(task.units)}")
  for error in mistakes.classes:
    if error not in task.error_classes:
      raise InputError(f"mistakes.classes has {error!r}; task {task.name} can inject: {', '.join(task.error_classes)}")
  return mistakes.classes or task.error_classes


def paper_reason(error: str, unit: str) -> str:
  """Return the annotation of arXiv 2412.16653 in our words: an error was found, and its class in words."""
  words = _PAPER[error] if error in _PAPER else error.replace("_", " ")
  return f"Found an error in the previous {unit}. Reason: {words}."


def reason_of(
  problem: Problem, before: tuple[str, ...], wrong: str, error: str, *, task: Task, reason: str, unit: str
) -> str:
  """Return the text between flag and fix, worded as `mistakes.reason` says; empty for "none"."""
  if reason == "none":
    return ""
  return paper_reason(error, unit) if reason == "paper" else task.explain(problem, before, wrong, reason)


def wrong_step(
  problem: Problem, before: tuple[str, ...], task: Task, classes: tuple[str, ...], rng: np.random.Generator
) -> tuple[str, str] | None:
  """Return a wrong step in place of the next one, and its class, drawn uniformly from `classes`; None if impossible.

  A step counts as wrong only when `task.check` finds it wrong and of the requested class.
  """
  for k in rng.permutation(len(classes)).tolist():
    for _ in range(_REDRAWS):
      wrong = task.inject(problem, before, classes[k], rng)
      if wrong is None:
        break
      verdict = task.check(problem, before, wrong)
      if verdict.kind == "wrong" and verdict.error == classes[k]:
        return wrong, classes[k]
  return None


def _num_mistakes(mistakes: MistakesConfig, num_places: int, rng: np.random.Generator) -> int:
  """Return the number of mistakes: 0 or, with probability `share`, uniform from 1 to the maximum."""
  if rng.random() < mistakes.share and num_places:
    return int(rng.integers(min(mistakes.max_per_solution, num_places))) + 1
  return 0


def _draw(find: Callable[[int], _T | None], places: Sequence[int], num: int, rng: np.random.Generator) -> dict[int, _T]:
  """Return up to `num` results of `find` by place; places are uniform among those where `find` has a result."""
  drawn: dict[int, _T] = {}
  for k in rng.permutation(len(places))[:_MOST_PLACES].tolist() if num else ():
    if len(drawn) == num:
      break
    if value := find(places[k]):
      drawn[places[k]] = value
  return drawn


def drawn(
  problem: Problem, task: Task, mistakes: MistakesConfig, rng: np.random.Generator
) -> dict[int, tuple[str, str]]:
  """Return wrong steps and their classes by place: with probability `share`, 1 to `max_per_solution` of them."""
  num = _num_mistakes(mistakes, len(problem.steps), rng)
  return _draw_checked(problem, task, mistakes, num, rng)


def _draw_checked(problem, task, mistakes, num, rng) -> dict[int, tuple[str, str]]:
  """Return up to `num` wrong steps of a checked problem and their classes, by place."""
  classes = classes_of(task, mistakes)
  return _draw(
    lambda place: wrong_step(problem, problem.steps[:place], task, classes, rng),
    range(len(problem.steps)),
    num,
    rng,
  )


def pieces_of(steps: Sequence[str], wrong: Mapping[int, tuple[str, str]], markers: Markers) -> Transcript:
  """Return the steps as pieces; a wrong step with its reason precedes each step in `wrong`."""
  pieces, start = [], 0
  for k in sorted(wrong):
    if start < k:
      pieces.append(Piece(TEXT, "".join(steps[start:k])))
    pieces += mistake_pieces(markers, wrong=wrong[k][0], reason=wrong[k][1], right=steps[k])
    start = k + 1
  if start < len(steps):
    pieces.append(Piece(TEXT, "".join(steps[start:])))
  return tuple(pieces)


def with_mistakes(
  problem: Problem, task: Task, mistakes: MistakesConfig, markers: Markers, rng: np.random.Generator
) -> Transcript:
  """Return the solution as a transcript; with probability `share` it has 1 to `max_per_solution` corrected mistakes.

      text   c=a+b;...?d:\\n  c=a4+b3,c8\\n  <flag> calcc  <fix>  c=a4+b3,c7\\n  d=c7+a4,d1\\n
      role   prompt          mistake       flag   reason  flag   correction    text

  Number and places are uniform among those possible. A solution where no mistake is possible is returned without.
  """
  problem = in_units(problem, mistakes.unit)
  wrong = {
    k: (step, reason_of(problem, problem.steps[:k], step, error, task=task, reason=mistakes.reason, unit=mistakes.unit))
    for k, (step, error) in drawn(problem, task, mistakes, rng).items()
  }
  return (Piece(PROMPT, problem.prompt), *pieces_of(problem.steps, wrong, markers))


def probe(problem: Problem, task: Task, mistakes: MistakesConfig, rng: np.random.Generator) -> Probe | None:
  """Return the problem solved up to one injected wrong step at a uniform place; None when none is possible."""
  problem = in_units(problem, mistakes.unit)
  for place, (wrong, error) in _draw_checked(problem, task, mistakes, 1, rng).items():
    return Probe(problem, problem.steps[:place], wrong, error)
  return None


def prose_classes_of(mistakes: MistakesConfig) -> tuple[str, ...]:
  """Return the error classes to draw from in prose; all when the config names none.

  Raises InputError for an unknown class.
  """
  for error in mistakes.classes:
    if error not in prose.CLASSES:
      raise InputError(
        f"mistakes.classes has {error!r}; where nothing checks the steps (task.name='records') there "
        f"can be: {', '.join(prose.CLASSES)}"
      )
  return mistakes.classes or prose.CLASSES


def in_prose(
  corpus: Corpus, index: int, mistakes: MistakesConfig, rng: np.random.Generator
) -> dict[int, tuple[str, str]] | None:
  """Return wrong steps for a record and their reasons, by place; None if, by `share`, it gets none.

  Empty where no mistake can be verified as one. A step with no text before it is never replaced.
  """
  text, classes = corpus[index], prose_classes_of(mistakes)
  places = [k for k in range(len(text.steps)) if k or text.follows_text]
  num = _num_mistakes(mistakes, max(len(places), 1), rng)
  if not num:
    return None

  def find(place: int) -> prose.Corruption | None:
    drawn = (corpus.corrupt(index, place, classes[k], rng) for k in rng.permutation(len(classes)).tolist())
    return next((corruption for corruption in drawn if corruption), None)

  return {
    place: (corruption.step, _prose_reason(corruption, mistakes))
    for place, corruption in _draw(find, places, num, rng).items()
  }


def _prose_reason(corruption: prose.Corruption, mistakes: MistakesConfig) -> str:
  if mistakes.reason == "none":
    return ""
  if mistakes.reason == "paper":
    return paper_reason(corruption.error, mistakes.unit)
  return prose.explain(corruption, mistakes.reason)

"""Mistakes: wrong steps put into right solutions, each proved wrong before it is used."""

import dataclasses

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import MistakesConfig
from insec_jax.method.roles import PROMPT, TEXT
from insec_jax.method.tasks import Problem, Task, in_units
from insec_jax.method.transcript import Markers, Piece, Transcript, mistake_pieces

_REDRAWS = 4  # of a wrong step that turned out right, lucky or of another class


@dataclasses.dataclass(frozen=True)
class Probe:
  """A problem solved rightly up to a wrong step; what a model does after `text` is measured."""

  problem: Problem
  before: tuple[str, ...]
  wrong: str
  error: str

  @property
  def text(self) -> str:
    """What the model reads: prompt, right steps, wrong step."""
    return self.problem.prompt + "".join(self.before) + self.wrong


def classes_of(task: Task, mistakes: MistakesConfig) -> tuple[str, ...]:
  """The error classes to draw from, all of the task's when the config names none.

  InputError for a class, or a unit of steps, that the task does not have.
  """
  if mistakes.unit not in task.units:
    raise InputError(f"mistakes.unit={mistakes.unit!r}; steps of task {task.name} can be: {', '.join(task.units)}")
  for error in mistakes.classes:
    if error not in task.error_classes:
      raise InputError(f"mistakes.classes has {error!r}; task {task.name} can inject: {', '.join(task.error_classes)}")
  return mistakes.classes or task.error_classes


def wrong_step(
    problem: Problem, before: tuple[str, ...], task: Task, classes: tuple[str, ...], rng: np.random.Generator
) -> tuple[str, str] | None:
  """A wrong step in place of the next one and its class, drawn evenly from `classes`; None where none is possible.

  Nothing is trusted: a step counts as wrong only when `task.check` finds it wrong, and of the class that was asked for.
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


def _places(num_steps: int, place: str) -> range:
  """The steps that may be replaced; the middle one of an odd number belongs to both halves."""
  if place == "first_half":
    return range((num_steps + 1) // 2)
  return range(num_steps // 2 if place == "last_half" else 0, num_steps)


def _draw(problem, task, mistakes, num, rng) -> dict[int, tuple[str, str]]:
  """Up to `num` wrong steps and their classes, by place; the places are even among those where one is possible."""
  classes = classes_of(task, mistakes)
  places = _places(len(problem.steps), mistakes.place)
  wrong = {}
  for k in rng.permutation(len(places)).tolist() if num else ():
    if len(wrong) == num:
      break
    if found := wrong_step(problem, problem.steps[:places[k]], task, classes, rng):
      wrong[places[k]] = found
  return wrong


def with_mistakes(
    problem: Problem, task: Task, mistakes: MistakesConfig, markers: Markers, rng: np.random.Generator
) -> Transcript:
  """The solution as a transcript; with probability `share` it carries 1 to `max_per_solution` corrected mistakes.

      text   c=a+b;...?d:\\n  c=a4+b3,c8\\n  <err>  calcc  <fix>  c=a4+b3,c7\\n  d=c7+a4,d1\\n
      role   prompt          mistake       flag   reason  flag   correction    text

  Number and places are even among those possible. A solution where no mistake is possible is given without.
  """
  problem = in_units(problem, mistakes.unit)
  num = 0
  if rng.random() < mistakes.share:
    num = rng.integers(min(mistakes.max_per_solution, len(_places(len(problem.steps), mistakes.place)))) + 1
  wrong = _draw(problem, task, mistakes, num, rng)
  pieces, text = [Piece(PROMPT, problem.prompt)], ""
  for k, right in enumerate(problem.steps):
    if k not in wrong:
      text += right
      continue
    if text:
      pieces.append(Piece(TEXT, text))
      text = ""
    step, before = wrong[k][0], problem.steps[:k]
    reason = "" if mistakes.reason == "none" else task.explain(problem, before, step, mistakes.reason)
    pieces += mistake_pieces(markers, wrong=step, reason=reason, right=right)
  if text:
    pieces.append(Piece(TEXT, text))
  return tuple(pieces)


def probe(problem: Problem, task: Task, mistakes: MistakesConfig, rng: np.random.Generator) -> Probe | None:
  """The problem solved up to one injected wrong step at an even place; None when none is possible."""
  problem = in_units(problem, mistakes.unit)
  for place, (wrong, error) in _draw(problem, task, mistakes, 1, rng).items():
    return Probe(problem, problem.steps[:place], wrong, error)
  return None

"""A model's text as a checked sample: its right steps and its mistakes, written with or without flags.

      kind          without flags (judge)                       with flags (judge_flagged)
      right         every step and the answer are right         and nothing is flagged
      wrong         up to its first wrong step                  up to its first wrong step that it does not correct
      false alarm                                               up to its first right step that it flags
      forgotten                                                 every step is right, but it ends before the answer
      unverified    no step is wrong, one is unverified         the same
      incomplete    the answer is missing or cut short          cut short

A step is wrong if the task's checker proves it. If the answer is known to be wrong, it is wrong also where the task
locates the mistake there (`Task.locate`).
"""

import dataclasses
import re
from collections.abc import Iterator

from insec_jax.evaluation.steps import judged
from insec_jax.generation.generator import Completion
from insec_jax.method.roles import FLAG, MISTAKE, REASON
from insec_jax.method.tasks import Problem, Task, Verdict
from insec_jax.method.transcript import Markers, clean_text, parse, split_steps

KINDS = ("right", "wrong", "unverified", "incomplete")
FLAGGED_KINDS = ("false alarm", "forgotten")  # only with flags
RECORDED = ("right", "wrong", *FLAGGED_KINDS)
# Of the letters of pieces: text, and mistakes that are flagged up to a correction.
_WHOLE = re.compile("(?:t|(?:mFr?X)+c)*")


@dataclasses.dataclass(frozen=True)
class Mistake:
  """A wrong step that the model wrote after `place` accepted steps.

  Of several in a row at one place each is a failed correction of the one before it.
  """

  place: int
  step: str
  error: str


@dataclasses.dataclass(frozen=True)
class Sample:
  """A solution as checked: the accepted steps, without a correction of the last mistake, and the mistakes."""

  kind: str
  steps: tuple[str, ...]
  mistakes: tuple[Mistake, ...] = ()

  @property
  def is_open(self) -> bool:
    """Return whether the last mistake still needs its correction."""
    return bool(self.mistakes) and self.mistakes[-1].place == len(self.steps)


def judge(
  problem: Problem, written: Completion, task: Task, markers: Markers, unit: str, *, stands: tuple[str, ...] = ()
) -> Sample:
  """Return the sample of a text without flags after the steps `stands`, these included."""
  steps, start, kind = stands, 0, "right"
  locates = _has_wrong_answer(problem, written, task, markers, unit, stands)
  for end, verdict in judged(problem, written, task, markers, unit, stands=stands):
    step = written.text[start:end]
    if error := _error(problem, step, verdict, task, locates=locates):
      return Sample("wrong", steps, (Mistake(len(steps), step, error),))
    if verdict.kind == "unverified":
      kind = "unverified"
    steps += (step,)
    start = end
  whole = written.finished and start == len(written.text)  # without marker, not cut short
  if not whole or task.answer_of(problem, steps) != problem.answer:
    kind = "incomplete"
  return Sample(kind, steps)


def judge_flagged(
  problem: Problem,
  written: Completion,
  task: Task,
  markers: Markers,
  unit: str,
  *,
  stands: tuple[str, ...] = (),
  most: int,
) -> Sample:
  """Return the sample of a text with flags after the steps `stands`; it ends before mistake number `most` + 1.

  b9  <flag> calcb <fix> b8  c1      b9 and b8 are mistakes at one place, the second a failed correction
  b7  <flag> calcb <fix> b8  c1      b7 is right, so it stays, and nothing after the false alarm does
  """
  steps, kind = stands, "right"
  mistakes: tuple[Mistake, ...] = ()
  locates = _has_wrong_answer(problem, written, task, markers, unit, stands)
  for step, is_flagged, is_corrected in _written_steps(written, markers, unit):
    if not step:  # a marker out of place
      return Sample("wrong" if mistakes else "false alarm", steps, mistakes)
    verdict = task.check(problem, steps, step)
    if error := _error(problem, step, verdict, task, locates=locates):
      if len(mistakes) == most:
        return Sample("wrong", steps, mistakes)
      mistakes += (Mistake(len(steps), step, error),)
      if not is_corrected:
        return Sample("wrong", steps, mistakes)
      continue
    if verdict.kind == "unverified":
      kind = "unverified"
    steps += (step,)
    if is_flagged:
      return Sample("wrong" if mistakes else "false alarm", steps, mistakes)
  if mistakes:
    return Sample("wrong", steps, mistakes)
  if not written.finished:
    return Sample("incomplete", steps)
  return Sample(kind if task.answer_of(problem, steps) == problem.answer else "forgotten", steps)


def _written_steps(written: Completion, markers: Markers, unit: str) -> Iterator[tuple[str, bool, bool]]:
  """Yield (step, whether it is flagged, whether a correction follows); an empty step is a marker out of place.

  A step that was cut short is left out, and so is what follows a marker out of place or a flag without correction.
  """
  pieces = parse(written.text, markers, unit)
  letter = {markers.flag: "F", markers.fix: "X"}
  letters = "".join(letter[piece.text] if piece.role == FLAG else "ptm?rc"[piece.role] for piece in pieces)
  match = _WHOLE.match(letters)
  whole = match.end() if match else 0
  for number, piece in enumerate(pieces):
    if piece.role in (FLAG, REASON):
      if number < whole:
        continue
      yield "", False, False
      return
    steps = split_steps(piece.text, unit)
    if number == len(pieces) - 1 and not written.finished and not steps[-1][-1].isspace():
      steps = steps[:-1]
    is_flagged = piece.role == MISTAKE
    yield from ((step, is_flagged, is_flagged and number < whole) for step in steps)
    if is_flagged and number >= whole:
      return


def _error(problem: Problem, step: str, verdict: Verdict, task: Task, *, locates: bool) -> str:
  """Return the class of a wrong step, which may be located where the answer is wrong; "" for another one."""
  return task.locate(problem, step) if locates and verdict.kind == "unverified" else verdict.error


def _has_wrong_answer(
  problem: Problem, written: Completion, task: Task, markers: Markers, unit: str, stands: tuple[str, ...]
) -> bool:
  if not written.finished or not written.text:
    return False
  answer = task.answer_of(problem, (*stands, *split_steps(clean_text(written.text, markers, unit), unit)))
  return answer is not None and answer != problem.answer

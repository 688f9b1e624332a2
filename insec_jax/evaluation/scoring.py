"""Scoring of the text after a wrong step and of whole solutions.

Inputs are text: a generation, the problem, and the task whose `check` grades each step. Three kinds of step are
counted separately: right, wrong, and unverified (not wrong, but not confirmed), which counts as neither.
"""

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from insec_jax.config_measures import WITHIN
from insec_jax.evaluation.statistics import Rate, grouped_rates, rate
from insec_jax.method.mistakes import reason_of
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, REASON, TEXT
from insec_jax.method.tasks import UNVERIFIED, Problem, Task, Verdict
from insec_jax.method.transcript import Markers, Piece, Transcript, parse, split_steps


@dataclass
class _Attempt:
  """A step as written: whether a flag follows at once, its reason, whether a complete correction follows."""

  step: str
  end: int  # of the step, in the text
  flagged: bool = False
  reason: str = ""
  closed: bool = False


def _read(text: str, markers: Markers, unit: str, *, finished: bool) -> Transcript:
  """Return the pieces of a generation; an unfinished one loses a last step that is cut short."""
  pieces = parse(text, markers, unit)
  if finished or not pieces or pieces[-1].role not in (TEXT, CORRECTION) or pieces[-1].text[-1].isspace():
    return pieces
  kept = "".join(split_steps(pieces[-1].text, unit)[:-1])
  return (*pieces[:-1], Piece(TEXT, kept)) if kept else pieces[:-1]


def _attempts(pieces: Transcript, markers: Markers, unit: str) -> tuple[list[_Attempt], int]:
  """Return every step written and the number of malformed markers: misplaced, or a flag without fix and step."""
  attempts, malformed, end = [], 0, 0
  pending = None  # the flagged attempt whose correction is being written
  fixed = False  # its fix marker was just written
  for piece in pieces:
    if piece.role == FLAG and piece.text == markers.flag:
      malformed += pending is not None
      pending = attempts[-1] if attempts and not fixed else None
      malformed += pending is None
      if pending is not None:
        pending.flagged = True
      fixed = False
    elif piece.role == FLAG:
      malformed += pending is None or fixed
      fixed = True
    elif piece.role == REASON:
      if pending is not None:
        pending.reason += piece.text
    else:
      steps = (piece.text,) if piece.role in (MISTAKE, CORRECTION) else split_steps(piece.text, unit)
      for step in steps:
        end += len(step)
        if fixed and pending is not None:
          pending.closed = True
          pending = None
        fixed = False
        attempts.append(_Attempt(step, end))
      continue
    end += len(piece.text)
  return attempts, malformed + (pending is not None)


def _final_steps(attempts: list[_Attempt]) -> tuple[str, ...]:
  """Return the steps that remain in the end: all but those with a complete correction."""
  return tuple(attempt.step for attempt in attempts if not attempt.closed)


@dataclass(frozen=True)
class Outcome:
  """The model's behaviour after a probe, that is, after a prefix that ends in a wrong step.

  wrong step   <flag> reason <fix> right step   ...   the end        flagged, fix "right", recovered
  wrong step   <flag> reason <fix> wrong step                        flagged, fix "wrong": parroted
  wrong step   <flag> reason                                         flagged, fix "none", one malformed marker
  wrong step   a step   <flag> reason <fix> ...                      not flagged, delay 1
  wrong step   a step   a step                                       not flagged, delay None
  """

  error: str  # class of the wrong step; "" where the task cannot prove it wrong (a record may mark it)
  delay: int | None  # steps between the wrong step and the first flag; 0 right after it; None: no flag
  reason: str
  reason_right: bool  # the reason is the task's explanation of this step (in any of its wordings)
  fix: str  # the step after the fix; "" when there is none
  fix_kind: str  # "right", "unverified" or "wrong"; "none" without a complete correction
  parroted: bool  # the fix is the wrong step again
  recovered: bool  # the final answer is right
  answered: bool
  malformed: int  # markers out of place

  @property
  def flagged(self) -> bool:
    """Return whether the flag comes right after the wrong step."""
    return self.delay == 0


def read_probe(
  problem: Problem,
  before: tuple[str, ...],
  wrong: str,
  continuation: str,
  *,
  finished: bool,
  task: Task,
  markers: Markers,
  unit: str,
  forced: bool = False,
) -> Outcome:
  """Return the outcome of one probe: the model wrote `continuation` after `wrong` and, if `finished`, ended it itself.

  With `forced` the prefix ended in the flag: the continuation begins inside the reason.
  """
  text = markers.flag + continuation if forced else continuation
  pieces = _read(text, markers, unit, finished=finished)
  attempts, malformed = _attempts((Piece(MISTAKE, wrong), *pieces), markers, unit)
  first = attempts[0]
  delay = next((k for k, attempt in enumerate(attempts) if attempt.flagged), None)
  fix = attempts[1].step if first.closed else ""
  error = task.check(problem, before, wrong).error
  explanations = (
    [
      reason_of(problem, before, wrong, error, task=task, reason=reason, unit=unit)
      for reason in ("label", "recompute", "paper")
    ]
    if error
    else []
  )
  answer = task.answer_of(problem, before + _final_steps(attempts))
  return Outcome(
    error=error,
    delay=delay,
    reason=first.reason,
    reason_right=bool(first.reason) and first.reason.strip() in [reason.strip() for reason in explanations],
    fix=fix,
    fix_kind=task.check(problem, before, fix).kind if fix else "none",
    parroted=bool(fix) and fix.strip() == wrong.strip(),
    recovered=answer == problem.answer,
    answered=answer is not None,
    malformed=malformed,
  )


def probe_rates(outcomes: Iterable[Outcome]) -> dict[str, Rate]:
  """Return the rates of a set of probes.

  detection          flag right after the wrong step                    of all probes
  detection_within   flag after at most WITHIN further steps            of all probes
  reason             the reason is right                                of those flagged right after
  correction         the next step is right                             of those flagged right after, without unverified
  corrected          flagged right after and the next step is right     of all probes, without unverified
  parroting          the fix repeats the mistake                        of those flagged right after
  parroting_failed   the fix repeats the mistake                        of failed fixes: wrong, or none at all
  recovery           the final answer is right                          of all probes
  malformed          at least one marker out of place                   of all probes
  unverified_fix     the fix is unverified                              of those flagged right after
  """
  outcomes = list(outcomes)
  flagged = [outcome for outcome in outcomes if outcome.flagged]
  return {
    "detection": rate(outcome.flagged for outcome in outcomes),
    "detection_within": rate(outcome.delay is not None and outcome.delay <= WITHIN for outcome in outcomes),
    "reason": rate(outcome.reason_right for outcome in flagged),
    "correction": rate(outcome.fix_kind == "right" for outcome in flagged if outcome.fix_kind != "unverified"),
    "corrected": rate(
      outcome.flagged and outcome.fix_kind == "right"
      for outcome in outcomes
      if not (outcome.flagged and outcome.fix_kind == "unverified")
    ),
    "parroting": rate(outcome.parroted for outcome in flagged),
    "parroting_failed": rate(outcome.parroted for outcome in flagged if outcome.fix_kind in ("wrong", "none")),
    "recovery": rate(outcome.recovered for outcome in outcomes),
    "malformed": rate(outcome.malformed for outcome in outcomes),
    "unverified_fix": rate(outcome.fix_kind == "unverified" for outcome in flagged),
  }


def by_class(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
  """Return the outcomes by the class of their wrong step, classes in alphabetical order."""
  classes = {}
  for outcome in sorted(outcomes, key=lambda outcome: outcome.error):
    classes.setdefault(outcome.error, []).append(outcome)
  return classes


@dataclass(frozen=True)
class OwnMistake:
  """The first wrong step of a solution: a probe made by the model itself. `prefix` is the text up to its end."""

  prefix: str
  before: tuple[str, ...]  # the steps kept until then
  wrong: str
  outcome: Outcome


@dataclass(frozen=True)
class SolutionScore:
  """The score of a whole solution. Steps count as written, mistakes and corrections alike."""

  num_right: int
  num_wrong: int
  num_unverified: int
  false_alarms: int  # right steps flagged
  catches: int  # wrong steps flagged
  unverified_flagged: int
  harmful_edits: int  # right steps flagged and replaced by a wrong one
  own: OwnMistake | None
  right_first: bool  # t1
  right: bool  # t2
  strict: bool  # right, and no step that remains is wrong
  answer: str | None  # the final one
  malformed: int
  errors: dict[str, int]  # wrong steps by class

  @property
  def answered(self) -> bool:
    return self.answer is not None


def score_solution(
  problem: Problem, text: str, *, finished: bool, task: Task, markers: Markers, unit: str
) -> SolutionScore:
  """Return the score of a solution generated from `problem.prompt`; `finished` if the model ended it itself.

      step      a=4    b=9  <flag> .. <fix>  b=7    c=2            the answer is c, and 2 is right
      verdict   right  wrong                 right  right
      t1        a=4    b=9                          c would not be 2: wrong at first
      t2        a=4                          b=7    c=2            right after corrections

  A step is checked against the steps before it without the withdrawn ones. A wrong step that no flag withdraws remains,
  and the steps that build on it are checked against the true values: they are wrong too.

  t1 is the answer with each first attempt kept. Later steps were written after the correction, so t1 is inferred: with
  a withdrawn wrong step kept the answer would be wrong, unless that step was a repeat, which changes nothing. With a
  withdrawn right step kept, it would be right if nothing was wrong before that step was replaced. Else it is as t2.
  """
  attempts, malformed = _attempts(_read(text, markers, unit, finished=finished), markers, unit)
  standing, verdicts, own = [], [], None
  for attempt in attempts:
    verdict = task.check(problem, tuple(standing), attempt.step)
    verdicts.append(verdict)
    if verdict.kind == "wrong" and own is None:
      before = tuple(standing)
      outcome = read_probe(
        problem, before, attempt.step, text[attempt.end :], finished=finished, task=task, markers=markers, unit=unit
      )
      own = OwnMistake(text[: attempt.end], before, attempt.step, outcome)
    if not attempt.closed:
      standing.append(attempt.step)
  answer = task.answer_of(problem, tuple(standing))
  right = answer == problem.answer
  harmful = [
    k
    for k, attempt in enumerate(attempts)
    if attempt.closed and verdicts[k].kind == "right" and verdicts[k + 1].kind == "wrong"
  ]
  kinds = [verdict.kind for verdict in verdicts]
  flagged = [kind for kind, attempt in zip(kinds, attempts, strict=True) if attempt.flagged]
  return SolutionScore(
    num_right=kinds.count("right"),
    num_wrong=kinds.count("wrong"),
    num_unverified=kinds.count("unverified"),
    false_alarms=flagged.count("right"),
    catches=flagged.count("wrong"),
    unverified_flagged=flagged.count("unverified"),
    harmful_edits=len(harmful),
    own=own,
    right_first=_right_at_first(attempts, verdicts, harmful, right),
    right=right,
    strict=right
    and all(verdict.kind != "wrong" for attempt, verdict in zip(attempts, verdicts, strict=True) if not attempt.closed),
    answer=answer,
    malformed=malformed,
    errors=dict(collections.Counter(verdict.error for verdict in verdicts if verdict.error)),
  )


def _right_at_first(attempts: list[_Attempt], verdicts: list[Verdict], harmful: list[int], right: bool) -> bool:
  """Return whether the answer would be right with each first attempt kept, as `score_solution` infers it."""
  counted = [verdict if verdict.error != "repeat" else UNVERIFIED for verdict in verdicts]
  if harmful:
    return all(verdict.kind != "wrong" for verdict in counted[: harmful[0]])
  withdrawn = [verdict for attempt, verdict in zip(attempts, counted, strict=True) if attempt.closed]
  return right and all(verdict.kind != "wrong" for verdict in withdrawn)


def solution_rates(scores: Iterable[SolutionScore]) -> dict[str, Rate]:
  """Return the rates of a set of whole solutions, one per problem.

      accuracy_t1              right with each first attempt kept           of solutions
      accuracy_t2              right in the end                             of solutions
      accuracy_strict          right, and no step that remains is wrong     of solutions
      wrong_to_right           wrong at t1, right at t2                     of solutions
      right_to_wrong           right at t1, wrong at t2                     of solutions
      false_alarms             flagged                                      of right steps
      false_alarm_solutions    with at least one false alarm                of solutions
      precision                wrong                                        of flagged steps without unverified ones
      harmful_edits            flagged and changed to wrong                 of right steps
      wrong_steps              wrong                                        of right and wrong steps
      unverified_steps         unverified                                   of all steps
      own_mistakes             with at least one wrong step                 of solutions
      answered, malformed      with an answer; with a marker out of place   of solutions

  The steps of one solution are not independent, so rates of steps have their intervals from `grouped_rates`.
  """
  scores = list(scores)

  def totals(*names: str) -> list[int]:
    return [sum(getattr(score, name) for name in names) for score in scores]

  false_alarms, precision, harmful_edits, wrong_steps, unverified_steps = grouped_rates(
    [
      (totals("false_alarms"), totals("num_right")),
      (totals("catches"), totals("catches", "false_alarms")),
      (totals("harmful_edits"), totals("num_right")),
      (totals("num_wrong"), totals("num_right", "num_wrong")),
      (totals("num_unverified"), totals("num_right", "num_wrong", "num_unverified")),
    ]
  )
  return {
    "accuracy_t1": rate(score.right_first for score in scores),
    "accuracy_t2": rate(score.right for score in scores),
    "accuracy_strict": rate(score.strict for score in scores),
    "wrong_to_right": rate(score.right and not score.right_first for score in scores),
    "right_to_wrong": rate(score.right_first and not score.right for score in scores),
    "false_alarms": false_alarms,
    "false_alarm_solutions": rate(score.false_alarms for score in scores),
    "precision": precision,
    "harmful_edits": harmful_edits,
    "wrong_steps": wrong_steps,
    "unverified_steps": unverified_steps,
    "own_mistakes": rate(score.own is not None for score in scores),
    "answered": rate(score.answered for score in scores),
    "malformed": rate(score.malformed for score in scores),
  }


def majority(scores: Sequence[SolutionScore]) -> SolutionScore:
  """Return the first solution with the most frequent answer; of equally frequent answers, the one given first.

  Solutions without an answer do not count; if no solution has one, the first is returned.
  """
  counted = collections.Counter(score.answer for score in scores if score.answered)
  if not counted:
    return scores[0]
  answer = max(counted, key=counted.get)  # max returns the first maximum, and a Counter keeps insertion order
  return next(score for score in scores if score.answer == answer)

"""Mined records: a checked sample as a transcript, and the file of all transcripts."""

import collections
import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from insec_jax.evaluation.tables import aligned
from insec_jax.files.writing import written_whole
from insec_jax.method import mistakes, roles
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT
from insec_jax.method.tasks import Problem, Task
from insec_jax.method.transcript import Markers, Piece, Transcript, mistake_pieces, render
from insec_jax.mining.judging import FLAGGED_KINDS, KINDS, Mistake, Sample


def corrected(problem: Problem, sample: Sample, task: Task) -> tuple[str, ...] | None:
  """Return the steps with the last mistake corrected too; None where the task has no right step for it."""
  if not sample.is_open:
    return sample.steps
  right = task.correction(problem, sample.steps, sample.mistakes[-1].step)
  if right is None or task.check(problem, sample.steps, right).kind != "right":
    return None
  return (*sample.steps, right)


def is_confirmed(problem: Problem, sample: Sample, task: Task) -> bool:
  """Return whether each wrong answer of the sample has only right steps before it: else an earlier one may be wrong."""
  return not any(
    _unverified(problem, sample.steps[: mistake.place], task)
    for mistake in sample.mistakes
    if mistake.error in task.answer_classes
  )


def _unverified(problem: Problem, steps: tuple[str, ...], task: Task) -> set[int]:
  """Return the places of unverified steps."""
  return {place for place, step in enumerate(steps) if task.check(problem, steps[:place], step).kind == "unverified"}


def corrected_transcript(
  problem: Problem, sample: Sample, task: Task, markers: Markers, *, reason: str, unit: str
) -> Transcript | None:
  """Return the solution with its mistakes corrected; None where the task cannot reach the right answer by right steps.

  text   prompt  own steps before  own wrong step  <flag>  reason  <fix>  right step   own steps, mistakes, the rest
  role   prompt  text              mistake         flag    reason  flag   correction   text ...

  A failed correction is a mistake that is flagged in its turn. Unverified steps have weight 0: nothing says that they
  are right.
  """
  kept_steps = corrected(problem, sample, task)
  if kept_steps is None:
    return None
  while (step := task.next_step(problem, kept_steps)) is not None:
    if task.check(problem, kept_steps, step).kind != "right":
      return None
    kept_steps += (step,)
  if task.answer_of(problem, kept_steps) != problem.answer:
    return None
  unverified = _unverified(problem, sample.steps, task)
  pieces = [Piece(PROMPT, problem.prompt)]
  for place, step in enumerate(kept_steps):
    wrong_steps = [mistake for mistake in sample.mistakes if mistake.place == place]
    for wrong in wrong_steps:
      said = reason_of(problem, kept_steps[:place], wrong, task, reason=reason, unit=unit)
      pieces += mistake_pieces(markers, wrong=wrong.step, reason=said, right=step)[:-1]
    role, weight = CORRECTION if wrong_steps else TEXT, 0.0 if place in unverified else None
    if role == TEXT and (pieces[-1].role, pieces[-1].weight) == (TEXT, weight):
      pieces[-1] = Piece(TEXT, pieces[-1].text + step, weight)
    else:
      pieces.append(Piece(role, step, weight))
  return tuple(pieces)


def reason_of(problem: Problem, before: tuple[str, ...], wrong: Mistake, task: Task, *, reason: str, unit: str) -> str:
  """Return the text between flag and fix; that of a wrong answer is a label, which does not state the right one."""
  detail = "label" if reason == "recompute" and wrong.error in task.answer_classes else reason
  return mistakes.reason_of(problem, before, wrong.step, wrong.error, task=task, reason=detail, unit=unit)


def with_trained_ends(pieces: Transcript) -> Transcript:
  """Return the pieces with weight 1 on the end of each wrong line, which must end before it can be flagged.

      text   a=4\n  b==9    \n           <flag>  reason  <fix>  b=7\n
      role   text   mistake mistake, 1   flag    reason  flag   correction

  Otherwise the end of a malformed line would never be trained, and the model would stop in the middle of it.
  """
  ended = []
  for piece in pieces:
    line = piece.text.removesuffix("\n")
    if piece.role == MISTAKE and line and line != piece.text:
      ended += [dataclasses.replace(piece, text=line), Piece(MISTAKE, "\n", 1.0)]
    else:
      ended.append(piece)
  return tuple(ended)


def as_json(piece: Piece) -> dict[str, Any]:
  """Return a piece as the object in the file; a weight of its own is kept where it is a step."""
  has_weight = piece.weight is not None and piece.role not in (FLAG, REASON)
  weight = {"weight": piece.weight} if has_weight else {}
  return {"role": roles.NAMES[piece.role], "text": piece.text, **weight}


@dataclasses.dataclass(frozen=True)
class MiningSummary:
  """The outcome of mining: counts of samples and problems, and the content of the records written."""

  counts: dict[str, int]
  samples: dict[str, int]  # wrong samples, by the class of their first mistake
  mistakes: dict[str, int]  # in the records, by class
  mistake_records: int
  right_records: int
  distinct_right: int
  left_out: dict[str, int]
  refusal: str  # the error train would raise for the first record it rejects
  injected_records: int = 0
  injected: int = 0  # mistakes in them
  flagged_records: int = 0  # without a mistake, but with a false alarm or a forgotten step

  def __str__(self) -> str:
    counts = self.counts
    num, wrong = counts["samples"], counts["wrong"]

    def part(count: int, whole: int) -> str:
      return f"{count / whole:.1%}" if whole else "-"

    whole = [
      (f"{kind} samples", f"{counts[kind]:,}", part(counts[kind], num))
      for kind in (*KINDS, *FLAGGED_KINDS)
      if kind in counts
    ]
    whole.append(
      (
        "problems with a mistake",
        f"{counts['problems with a mistake']:,}",
        part(counts["problems with a mistake"], counts["problems"]),
      )
    )
    whole.append(("tokens read and written", f"{counts['tokens']:,}", ""))
    classes = [
      (error, f"{first:,}", part(first, wrong), f"{self.mistakes.get(error, 0):,}")
      for error in sorted({*self.samples, *self.mistakes})
      for first in [self.samples.get(error, 0)]
    ]
    classes.append(("all", f"{wrong:,}", part(wrong, wrong), f"{sum(self.mistakes.values()):,}"))
    lines = [
      aligned([(f"{num:,} samples of {counts['problems']:,} problems", "", ""), *whole]),
      aligned([("mistakes", "first of sample", "of wrong", "in records"), *classes]),
      f"{self.mistake_records:,} records of wrong solutions",
      *(
        [f"{self.flagged_records:,} records with a false alarm or a forgotten step put right"]
        if self.flagged_records
        else []
      ),
      *(
        [f"{self.injected_records:,} records of right solutions with {self.injected:,} injected mistakes"]
        if self.injected_records
        else []
      ),
      f"{self.right_records:,} records of right solutions, of {self.distinct_right:,} different ones",
    ]
    lines += [f"left out, {reason}: {count:,}" for reason, count in self.left_out.items()]
    lines += [f"  {self.refusal}"] if self.refusal else []
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def join(chunks: Sequence[dict[str, Any]], output: str, *, right: float, seed: int) -> MiningSummary:
  """Write the distinct records of all chunks to `output`, `right` right solutions per mistake; return their summary.

  The right solutions to keep are drawn by the seed.
  """
  different = {}
  for chunk in chunks:
    for record in chunk["records"]:
      text = render(tuple(Piece(TEXT, piece["text"]) for piece in record["pieces"]))
      if text not in different or "kind" in record["meta"]:  # one with a kind is always written
        different[text] = record
  distinct = list(different.values())
  # One that meta gives a kind is put right without a mistake.
  are_right = [not record["meta"]["classes"] and "kind" not in record["meta"] for record in distinct]
  right_K = np.flatnonzero(are_right)
  num = min(len(right_K), round(right * (len(distinct) - len(right_K))))
  chosen = set(np.random.default_rng((seed, *b"right")).permutation(right_K)[:num].tolist())
  written = [record for k, record in enumerate(distinct) if not are_right[k] or k in chosen]
  with written_whole(output) as file:
    for record in written:
      file.write(json.dumps(record, ensure_ascii=False) + "\n")

  def total(name: str) -> dict[str, int]:
    summed = collections.Counter()
    for chunk in chunks:
      summed.update(chunk[name])
    return dict(summed)

  own = [record["meta"]["classes"] for record in written if not record["meta"]["injected"]]
  flagged = sum("kind" in record["meta"] for record in written)
  injected = [record["meta"]["classes"] for record in written if record["meta"]["injected"]]
  return MiningSummary(
    total("counts"),
    total("classes"),
    dict(collections.Counter(itertools.chain(*own))),
    len(own) - num - flagged,
    num,
    len(right_K),
    total("left out"),
    next((chunk["refusal"] for chunk in chunks if chunk["refusal"]), ""),
    len(injected),
    sum(map(len, injected)),
    flagged,
  )

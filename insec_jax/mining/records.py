"""Mined records: a model's text as a checked sample, the sample as a transcript, and the file of all transcripts."""

import collections
import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from insec_jax.evaluation.steps import judged
from insec_jax.evaluation.tables import aligned
from insec_jax.files.writing import written_whole
from insec_jax.generation.generator import Completion
from insec_jax.method import mistakes, roles
from insec_jax.method.roles import MISTAKE, PROMPT, TEXT
from insec_jax.method.tasks import Problem, Task
from insec_jax.method.transcript import Markers, Piece, Transcript, render


@dataclasses.dataclass(frozen=True)
class Mistake:
  """A wrong step that the model wrote after `place` accepted steps."""

  place: int
  step: str
  error: str


@dataclasses.dataclass(frozen=True)
class Sample:
  """A solution as checked: the accepted steps, without a correction of the last mistake, and the mistakes."""

  kind: str
  steps: tuple[str, ...]
  mistakes: tuple[Mistake, ...] = ()


def judge(
  problem: Problem, written: Completion, task: Task, markers: Markers, unit: str, *, stands: tuple[str, ...] = ()
) -> Sample:
  """Return the sample of the model's text after the steps `stands`, these included."""
  steps, start, kind = stands, 0, "right"
  for end, verdict in judged(problem, written, task, markers, unit, stands=stands):
    step = written.text[start:end]
    if verdict.kind == "wrong":
      return Sample("wrong", steps, (Mistake(len(steps), step, verdict.error),))
    if verdict.kind == "unverified":
      kind = "unverified"
    steps += (step,)
    start = end
  whole = written.finished and start == len(written.text)  # without marker, not cut short
  if not whole or task.answer_of(problem, steps) != problem.answer:
    kind = "incomplete"
  return Sample(kind, steps)


def corrected(problem: Problem, sample: Sample, task: Task) -> tuple[str, ...] | None:
  """Return the steps with the last mistake corrected too; None where the task has no right step for it."""
  if not sample.mistakes or sample.mistakes[-1].place < len(sample.steps):
    return sample.steps
  right = task.correction(problem, sample.steps, sample.mistakes[-1].step)
  if right is None or task.check(problem, sample.steps, right).kind != "right":
    return None
  return (*sample.steps, right)


def corrected_transcript(
  problem: Problem, sample: Sample, task: Task, markers: Markers, reason: str
) -> Transcript | None:
  """Return the solution with its mistakes corrected; None where the task cannot reach the right answer by right steps.

  text   prompt  own steps before  own wrong step  <flag>  reason  <fix>  right step   own steps, mistakes, the rest
  role   prompt  text              mistake         flag    reason  flag   correction   text ...
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

  def explanation(mistake: Mistake) -> str:
    return "" if reason == "none" else task.explain(problem, kept_steps[: mistake.place], mistake.step, reason)

  return (
    Piece(PROMPT, problem.prompt),
    *mistakes.pieces_of(
      kept_steps, {mistake.place: (mistake.step, explanation(mistake)) for mistake in sample.mistakes}, markers
    ),
  )


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
  """Return a piece as the object in the file; a weight of its own is kept where it is a mistake."""
  weight = {"weight": piece.weight} if piece.role == MISTAKE and piece.weight is not None else {}
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

  def __str__(self) -> str:
    counts = self.counts
    num, wrong = counts["samples"], counts["wrong"]

    def part(count: int, whole: int) -> str:
      return f"{count / whole:.1%}" if whole else "-"

    whole = [
      (f"{kind} samples", f"{counts[kind]:,}", part(counts[kind], num))
      for kind in ("right", "wrong", "unverified", "incomplete")
    ]
    whole.append(
      (
        "problems with a mistake",
        f"{counts['problems with a mistake']:,}",
        part(counts["problems with a mistake"], counts["problems"]),
      )
    )
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
      different.setdefault(render(tuple(Piece(TEXT, piece["text"]) for piece in record["pieces"])), record)
  distinct = list(different.values())
  are_right = [not record["meta"]["classes"] for record in distinct]
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
  injected = [record["meta"]["classes"] for record in written if record["meta"]["injected"]]
  return MiningSummary(
    total("counts"),
    total("classes"),
    dict(collections.Counter(itertools.chain(*own))),
    len(own) - num,
    num,
    len(right_K),
    total("left out"),
    next((chunk["refusal"] for chunk in chunks if chunk["refusal"]), ""),
    len(injected),
    sum(map(len, injected)),
  )

"""Mining: the model's own first wrong steps, found by the task's checker, as records to train on.

A sample is drawn with the flag banned and judged step by step up to its first wrong one:

    right        every step is right, and so is the answer                    a record without flag, `right_records`
    wrong        a step is wrong; its class is counted                        a record, `mistake_record`
    lucky        no step is wrong, but one is lucky                           none: nobody vouches for it
    incomplete   no step is wrong, but the answer is missing or cut short     none

Which problems are mined, and what is drawn for each, hangs on the seed and not on the processes that share the work.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import records, tokens
from insec_jax.data.encoding import special_pattern
from insec_jax.decoding.output import written_whole
from insec_jax.decoding.parts import Parts
from insec_jax.decoding.probing import FROM_FILE, pieces_of
from insec_jax.decoding.sampler import bin_of
from insec_jax.decoding.steps import judged
from insec_jax.decoding.tables import aligned
from insec_jax.decoding.writer import Writer, Written
from insec_jax.method import roles, tasks
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, TEXT
from insec_jax.method.tasks import Problem, Task
from insec_jax.method.transcript import Markers, Piece, Transcript, mistake_pieces, render, split_steps
from insec_jax.training.checkpoint import fingerprints, flat

CHUNK = 1024  # samples drawn at least before their records are on disk
# Why the record of a wrong or right sample is left out.
NO_CORRECTION = "the task has no right way on from there"
SPECIAL = "a special token stands in its text"
NO_LINE = "a step is no line, so it has no confidence"
REFUSED = "train would refuse it"


@dataclasses.dataclass(frozen=True)
class Sample:
  """A solution as judged: `steps` are those before the wrong one, all of them where none is; `error` is its class."""

  kind: str
  steps: tuple[str, ...]
  wrong: str = ""
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Mined:
  """What mining found: samples and problems as counted, and the records written, by class of mistake."""

  counts: dict[str, int]
  samples: dict[str, int]  # wrong ones, by class
  records: dict[str, int]
  right_records: int
  distinct_right: int
  left_out: dict[str, int]
  refusal: str  # what train would say of the first record that it would refuse

  def __str__(self) -> str:
    counts = self.counts
    num, wrong = counts["samples"], counts["wrong"]

    def part(count: int, whole: int) -> str:
      return f"{count / whole:.1%}" if whole else "-"

    whole = [(f"{kind} samples", f"{counts[kind]:,}", part(counts[kind], num))
             for kind in ("right", "wrong", "lucky", "incomplete")]
    whole.append(("problems with a mistake", f"{counts['problems with a mistake']:,}",
                  part(counts["problems with a mistake"], counts["problems"])))
    classes = [(error, f"{self.samples[error]:,}", part(self.samples[error], wrong), f"{self.records[error]:,}")
               for error in sorted(self.samples)]
    classes.append(("all", f"{wrong:,}", part(wrong, wrong), f"{sum(self.records.values()):,}"))
    lines = [aligned([(f"{num:,} samples of {counts['problems']:,} problems", "", ""), *whole]),
             aligned([("first mistake", "samples", "of wrong", "records"), *classes]),
             f"{self.right_records:,} records of right solutions, of {self.distinct_right:,} different ones"]
    lines += [f"left out, {reason}: {count:,}" for reason, count in self.left_out.items()]
    lines += [f"  {self.refusal}"] if self.refusal else []
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def problems_to_mine(task: Task, config: Config, *, seed: int) -> list[Problem]:
  """mine.num_problems problems of the split "mine"; or as many of the training records of data.path as there are."""
  num = config.mine.num_problems
  if task.name in FROM_FILE:
    given = [problem for problem, _ in records.problems(config, "train")]
    if not given:
      raise InputError(f"{config.data.path} has no question and answer to mine; give a file of problems as data.path")
    order = np.random.default_rng((seed, *b"mine")).permutation(len(given))
    found = [given[k] for k in order[:num]]
  else:
    found = tasks.problems(task, "mine", num=num, seed=seed)
  return [tasks.in_units(problem, config.mistakes.unit) for problem in found]


def fingerprint(params) -> str:
  """A short text that any other weights would change."""
  return hashlib.sha256(json.dumps(fingerprints(params), sort_keys=True).encode()).hexdigest()[:16]


def judge(problem: Problem, written: Written, task: Task, markers: Markers, unit: str) -> Sample:
  """What a sample is worth."""
  steps, start, kind = [], 0, "right"
  for end, verdict in judged(problem, written, task, markers, unit):
    step = written.text[start:end]
    if verdict.kind == "wrong":
      return Sample("wrong", tuple(steps), step, verdict.error)
    if verdict.kind == "lucky":
      kind = "lucky"
    steps.append(step)
    start = end
  whole = written.finished and start == len(written.text)  # no marker, nothing cut short
  if not whole or task.answer_of(problem, tuple(steps)) != problem.answer:
    kind = "incomplete"
  return Sample(kind, tuple(steps))


def mistake_record(problem: Problem, sample: Sample, task: Task, markers: Markers, reason: str) -> Transcript | None:
  """The mistake, corrected; None where the task cannot go on to the right answer by steps that it finds right itself.

      text   prompt  own steps before  own wrong step  <flag>  reason  <fix>  right step   the rest of the solution
      role   prompt  text              mistake         flag    reason  flag   correction   text
  """
  right = task.correction(problem, sample.steps, sample.wrong)
  stands, step = sample.steps, right
  while step is not None:
    if task.check(problem, stands, step).kind != "right":
      return None
    stands += (step,)
    step = task.next_step(problem, stands)
  if right is None or task.answer_of(problem, stands) != problem.answer:
    return None
  told = "" if reason == "none" else task.explain(problem, sample.steps, sample.wrong, reason)
  rest = stands[len(sample.steps) + 1:]
  return (Piece(PROMPT, problem.prompt), *pieces_of(TEXT, "".join(sample.steps)),
          *mistake_pieces(markers, wrong=sample.wrong, reason=told, right=right), *pieces_of(TEXT, "".join(rest)))


def with_confidence(pieces: Transcript, name_of_step: Sequence[str]) -> Transcript:
  """The pieces with the model's confidence after each step, in order, mistakes among them.

      text   a=4\n  <|sure_0|>  b=9\n    <|sure_2|>  <flag>  reason  <fix>  b=7\n       <|sure_0|>
      role   text   flag        mistake  flag        flag    reason  flag   correction  flag
  """
  names = iter(name_of_step)
  sure = []
  for piece in pieces:
    if piece.role in (TEXT, MISTAKE, CORRECTION):
      for step in split_steps(piece.text, "line"):
        sure += [Piece(piece.role, step), Piece(FLAG, next(names), 0.0)]
    else:
      sure.append(piece)
  return tuple(sure)


class Miner:
  """A model, a task and problems: does the mining, chunk by chunk. `weights` is their `fingerprint`."""

  def __init__(self, writer: Writer, task: Task, config: Config, *, seed: int, weights: str):
    self._writer, self._task, self._config, self._seed = writer, task, config, seed
    self._markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
    # The model may have no tokens of confidence yet: those of the records are the ones it will be trained with.
    self._tokenizer = tokens.add_markers(copy.deepcopy(writer.tokenizer), config.tokenizer).tokenizer
    self._names = tokens.confidence_names(config.tokenizer)
    self._special = special_pattern(self._tokenizer)
    self._problems = problems_to_mine(task, config, seed=seed)
    batch = config.evaluate.batch_size
    self._per_chunk = max(1, math.ceil(CHUNK / batch) * batch // config.mine.samples)  # batches are full
    self.num_chunks = math.ceil(len(self._problems) / self._per_chunk)
    prompts = "\0".join(problem.prompt for problem in self._problems)
    self.header = {"the weights": weights, "the problems": hashlib.sha256(prompts.encode()).hexdigest()[:16],
                   "the seed of this mining": seed, "problems a chunk": self._per_chunk, **flat(config)}

  def chunk(self, number: int) -> dict[str, Any]:
    """What one chunk gave, as JSON: its counts, its records of mistakes, and those of right solutions."""
    config, unit = self._config, self._config.mistakes.unit
    first = number * self._per_chunk
    problems = self._problems[first:first + self._per_chunk]
    asked = [problem for problem in problems for _ in range(config.mine.samples)]
    written = self._writer.write(
        [self._writer.encode(problem.prompt) for problem in asked], label=f"mining, {number + 1} of {self.num_chunks}",
        max_tokens=config.evaluate.max_tokens, batch_size=config.evaluate.batch_size,
        temperature=config.mine.temperature, seed=seed_of(self._seed, number),
        flag_bias=0.0 if self._writer.flag_id is None else -math.inf)
    samples = [judge(problem, one, self._task, self._markers, unit)
               for problem, one in zip(asked, written, strict=True)]
    counts = collections.Counter(sample.kind for sample in samples)
    left_out = collections.Counter()
    found = []  # (pieces, meta)
    for index, (problem, sample) in enumerate(zip(asked, samples, strict=True)):
      if sample.kind not in ("wrong", "right"):
        continue
      pieces = (Piece(PROMPT, problem.prompt), Piece(TEXT, "".join(sample.steps)))
      if sample.kind == "wrong":
        pieces = mistake_record(problem, sample, self._task, self._markers, config.mistakes.reason)
      if self._special.search("".join(sample.steps) + sample.wrong):
        left_out[SPECIAL] += 1
      elif pieces is None:
        left_out[NO_CORRECTION] += 1
      else:
        found.append((pieces, {
          "class": sample.error or "right", "step": len(sample.steps) if sample.error else None, "seed": self._seed,
          "problem": first + index // config.mine.samples, "sample": index % config.mine.samples}))
    if self._names:
      sure = self._sure(found)
      if len(sure) < len(found):
        left_out[NO_LINE] = len(found) - len(sure)
      found = sure
    kept, refusal = self._accepted(found)
    if refusal:
      left_out[REFUSED] = len(found) - len(kept)
    per_problem = [samples[k:k + config.mine.samples] for k in range(0, len(samples), config.mine.samples)]
    return {
      "counts": {**{kind: counts[kind] for kind in ("right", "wrong", "lucky", "incomplete")},
                 "samples": len(samples), "problems": len(problems),
                 "problems with a mistake": sum(any(sample.error for sample in some) for some in per_problem)},
      "classes": dict(collections.Counter(sample.error for sample in samples if sample.error)),
      "left out": dict(left_out),
      "refusal": refusal,
      "records": [{"pieces": [{"role": roles.NAMES[piece.role], "text": piece.text} for piece in pieces], "meta": meta}
                  for pieces, meta in kept]}

  def _sure(self, found: list[tuple[Transcript, dict]]) -> list[tuple[Transcript, dict]]:
    """The records whose steps are lines, with the model's confidence after each step.

    That of a right step is what it is when no wrong one came before.
    """
    prompts = [pieces[0].text for pieces, _ in found]
    clean = [split_steps("".join(piece.text for piece in pieces if piece.role in (TEXT, CORRECTION)), "line")
             for pieces, _ in found]
    scores_of = functools.partial(self._scores, prompts)
    of_clean = scores_of(clean)
    at = [meta["step"] for _, meta in found]  # of the wrong step; None where there is none
    wrong = ["".join(piece.text for piece in pieces if piece.role == MISTAKE) for pieces, _ in found]
    of_wrong = scores_of([steps if place is None else (*steps[:place], last)
                          for steps, place, last in zip(clean, at, wrong, strict=True)])
    sure = []
    for (pieces, meta), steps, right, last, place in zip(found, clean, of_clean, of_wrong, at, strict=True):
      if len(right) != len(steps) or len(last) != (len(steps) if place is None else place + 1):
        continue  # a line without an end, or with two
      scores = right if place is None else [*right[:place], last[-1], *right[place:]]
      names = [self._names[bin_of(score, self._config.tokenizer.confidence)] for score in scores]
      sure.append((with_confidence(pieces, names), meta))
    return sure

  def _scores(self, prompts: Sequence[str], steps: Sequence[Sequence[str]]) -> list[list[float]]:
    return [scores for _, scores in self._writer.read(prompts, steps, batch_size=self._config.evaluate.batch_size)]

  def _accepted(self, found: list[tuple[Transcript, dict]]) -> tuple[list[tuple[Transcript, dict]], str]:
    """Those that training takes, and what it says of the first other one."""
    def refusal(some: Sequence[tuple[Transcript, dict]]) -> str:
      try:
        tokens.tokenize_all([(pieces, _place(meta)) for pieces, meta in some], self._tokenizer, self._config)
      except InputError as error:
        return str(error)
      return ""

    if not found or not refusal(found):
      return found, ""
    said = [refusal([one]) for one in found]
    return [one for one, of_one in zip(found, said, strict=True) if not of_one], next(filter(None, said))


def seed_of(seed: int, number: int) -> int:
  """Another seed for each number, the same every time."""
  return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _place(meta: dict[str, Any]) -> str:
  return f"problem {meta['problem']}, sample {meta['sample']}"


def mine_chunks(miner: Miner, parts: Parts, *, process: int, num_processes: int,
                stopped: Callable[[], bool] = lambda: False) -> bool:
  """Whether all chunks of this process are done, those that were done before included; False when `stopped` said so."""
  done = parts.read()
  mine = range(process, miner.num_chunks, num_processes)
  if there := [chunk for chunk in mine if chunk in done]:
    print(f"{len(there)} of {len(mine)} chunks were mined before", file=sys.stderr, flush=True)
  for chunk in mine:
    if chunk not in done:
      if stopped():
        return False
      parts.append(chunk, miner.chunk(chunk), process=process)
  return True


def join(chunks: Sequence[dict[str, Any]], output: str, *, right: float, seed: int) -> Mined:
  """What all chunks give; the file `output` holds the different records, `right` of right solutions per mistake.

  Which right solutions are kept is drawn by the seed.
  """
  different = {}
  for chunk in chunks:
    for record in chunk["records"]:
      different.setdefault(render(tuple(Piece(TEXT, piece["text"]) for piece in record["pieces"])), record)
  found = list(different.values())
  are_right = [record["meta"]["class"] == "right" for record in found]
  right_K = np.flatnonzero(are_right)
  num = min(len(right_K), round(right * (len(found) - len(right_K))))
  chosen = set(np.random.default_rng((seed, *b"right")).permutation(right_K)[:num].tolist())
  written = [record for k, record in enumerate(found) if not are_right[k] or k in chosen]
  with written_whole(output) as file:
    for record in written:
      file.write(json.dumps(record, ensure_ascii=False) + "\n")

  def total(name: str) -> dict[str, int]:
    summed = collections.Counter()
    for chunk in chunks:
      summed.update(chunk[name])
    return dict(summed)

  samples = total("classes")
  num_of = collections.Counter(record["meta"]["class"] for record in written)
  return Mined(total("counts"), samples, {error: num_of[error] for error in sorted(samples)}, num, len(right_K),
               total("left out"), next((chunk["refusal"] for chunk in chunks if chunk["refusal"]), ""))

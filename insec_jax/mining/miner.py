"""Mining: the model's own wrong steps, found by the task's checker, as records to train on.

A solution is sampled with the flag banned and checked step by step up to its first wrong one:

    right        every step is right, and so is the answer                    a record without flag
    wrong        a step is wrong; its class is counted                        a record of this mistake and later ones
    unverified   no step is wrong, but one is unverified                      none: not confirmed by the task
    incomplete   no step is wrong, but the answer is missing or cut short     none

With mine.flags the model may flag, as it was trained to. Its corrections are kept, and a failed one is a mistake that
is flagged in its turn. Two more kinds give a record:

    false alarm  a right step is flagged: the record goes on right after it   a record without this flag
    forgotten    every step is right, but some are missing                    a record with the missing steps

After a wrong step the model continues from the right step in its place, without the mistake in its context, up to its
next wrong step, until mistakes.max_per_solution are found. The task completes an unfinished solution. The end of a
wrong line has weight 1, whatever loss.mistake is (`records.with_trained_ends`).

With mistakes.mined=1 only these records are trained on, so no other transcript has injected mistakes: then
mistakes.share of the right solutions get injected ones here.

The problems mined and the samples of each depend on the seed, not on the processes that share the work.
"""

import collections
import copy
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.config_build import REMOVED
from insec_jax.data import tokens, vocabulary
from insec_jax.data.encoding import special_pattern
from insec_jax.data.problems import problems_to_mine
from insec_jax.files.chunks import ChunkStore
from insec_jax.generation.confidence import Surprisal
from insec_jax.generation.generator import Completion, TextGenerator
from insec_jax.method import mistakes
from insec_jax.method.roles import CORRECTION, MISTAKE, TEXT
from insec_jax.method.tasks import Problem, Task
from insec_jax.method.transcript import Markers, Transcript, split_steps, with_confidence
from insec_jax.mining.judging import FLAGGED_KINDS, KINDS, RECORDED, Mistake, Sample, judge, judge_flagged
from insec_jax.mining.records import as_json, corrected, corrected_transcript, is_confirmed, with_trained_ends
from insec_jax.training.layout import MINING, flat, is_free

TEMPERATURE = 1.0  # of the samples
SAMPLES_PER_CHUNK = 1024  # least number of samples between writes to disk
# Reasons to leave out the record of a wrong or right sample.
NO_CORRECTION = "the task has no right way on from there"
UNCONFIRMED = "a step before its wrong answer is unverified"
SPECIAL = "a special token stands in its text"
NO_LINE = "a step is no line, so it has no confidence"
REFUSED = "train would refuse it"
USES = (
  "mistakes.view",
  "mistakes.mined_from",
  "mistakes.hint",
  "policy.",
)  # of the file, which does not depend on them
# Config keys that mining does not read (mistakes.share only where mistakes.mined=1).
NOT_READ = (
  "loss.",
  "optimizer.",
  "train.",
  "mistakes.mined",
  "mistakes.share",
  *USES,
  "data.num_records",
  "data.row_length",
  "data.too_long",
  "data.cache",
  "data.rows_per_device",
  "data.accumulation",
  "model.remat",
  "mesh.",
  "lora.",
  "evaluate.num",
)


def mined_by(config: Config) -> str:
  """Return all that the mined file depends on, as text: arms with the same text can share one file."""
  values = {key: value for key, value in flat(config).items() if not key.startswith(NOT_READ)}
  return json.dumps({**values, "injected": _injects(config) and config.mistakes.share}, sort_keys=True)


def _injects(config: Config) -> bool:
  """Return whether right solutions get injected mistakes here, because no other training data has them."""
  return config.mistakes.mined == 1 and config.mistakes.source == "injected"


class Miner:
  """A model, a task and problems; mines chunk by chunk. `weights` is the model's `fingerprint`."""

  def __init__(self, writer: TextGenerator, task: Task, config: Config, *, seed: int, weights: str):
    self._writer, self._task, self._config, self._seed = writer, task, config, seed
    self._markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
    # The model may have no confidence tokens yet: the records use those that it will be trained with.
    self._tokenizer = vocabulary.add_markers(copy.deepcopy(writer.tokenizer), config.tokenizer).tokenizer
    self._names = config.tokenizer.confidence_names
    self._special = special_pattern(self._tokenizer)
    self._problems = problems_to_mine(task, config, seed=seed)
    self._max_tokens = config.evaluate.max_tokens
    self._num_tokens = 0  # read and written so far
    batch = config.evaluate.batch_size
    self._per_chunk = max(1, math.ceil(SAMPLES_PER_CHUNK / batch) * batch // config.mine.samples)  # batches are full
    self.num_chunks = math.ceil(len(self._problems) / self._per_chunk)
    prompts = "\0".join(problem.prompt for problem in self._problems)
    self.header = {
      "the weights": weights,
      "the problems": hashlib.sha256(prompts.encode()).hexdigest()[:16],
      "the seed of this mining": seed,
      "problems a chunk": self._per_chunk,
      **{key: value for key, value in flat(config).items() if not is_free(key, MINING) and not key.startswith(USES)},
    }

  def chunk(self, number: int) -> dict[str, Any]:
    """Return the result of one chunk, as JSON: its counts, its records of mistakes, and those of right solutions."""
    config = self._config
    first = number * self._per_chunk
    problems = self._problems[first : first + self._per_chunk]
    problem_of_sample = [problem for problem in problems for _ in range(config.mine.samples)]
    tokens_before = self._num_tokens
    samples = self._samples(problem_of_sample, number)
    counts = collections.Counter(sample.kind for sample in samples)
    left_out = collections.Counter()
    candidates = []  # (pieces, meta)
    rng = np.random.default_rng((derive_seed(self._seed, number), *b"inject"))
    for index, (problem, sample) in enumerate(zip(problem_of_sample, samples, strict=True)):
      if sample.kind not in RECORDED:
        continue
      if sample.kind == "right" and _injects(config):
        sample = self._with_injected(problem, sample, rng)
      pieces = self._transcript(problem, sample)
      if isinstance(pieces, str):
        left_out[pieces] += 1
      else:
        candidates.append(
          (
            pieces,
            {
              "classes": [mistake.error for mistake in sample.mistakes],
              "places": [mistake.place for mistake in sample.mistakes],
              "injected": sample.kind == "right" and bool(sample.mistakes),
              "seed": self._seed,
              "problem": first + index // config.mine.samples,
              "sample": index % config.mine.samples,
              **({"kind": sample.kind} if sample.kind in FLAGGED_KINDS else {}),
            },
          )
        )
    if self._names:
      with_names = self._add_confidence(candidates)
      if len(with_names) < len(candidates):
        left_out[NO_LINE] = len(candidates) - len(with_names)
      candidates = with_names
    kept, refusal = self._accepted([(with_trained_ends(pieces), meta) for pieces, meta in candidates])
    if refusal:
      left_out[REFUSED] = len(candidates) - len(kept)
    per_problem = [samples[k : k + config.mine.samples] for k in range(0, len(samples), config.mine.samples)]
    return {
      "counts": {
        **{kind: counts[kind] for kind in (*KINDS, *(FLAGGED_KINDS if config.mine.flags else ()))},
        "samples": len(samples),
        "tokens": self._num_tokens - tokens_before,
        "problems": len(problems),
        "problems with a mistake": sum(
          any(sample.mistakes for sample in samples_of_problem) for samples_of_problem in per_problem
        ),
      },
      "classes": dict(collections.Counter(sample.mistakes[0].error for sample in samples if sample.mistakes)),
      "left out": dict(left_out),
      "refusal": refusal,
      "records": [{"pieces": [as_json(piece) for piece in pieces], "meta": meta} for pieces, meta in kept],
    }

  def _transcript(self, problem: Problem, sample: Sample) -> Transcript | str:
    """Return the sample as a transcript, or why it is left out."""
    if self._special.search("".join((*sample.steps, *(mistake.step for mistake in sample.mistakes)))):
      return SPECIAL
    reason, unit = self._config.mistakes.reason, self._config.mistakes.unit
    pieces = corrected_transcript(problem, sample, self._task, self._markers, reason=reason, unit=unit)
    if pieces is None:
      return NO_CORRECTION
    return pieces if is_confirmed(problem, sample, self._task) else UNCONFIRMED

  def _samples(self, problems: Sequence[Problem], number: int) -> list[Sample]:
    """Return a solution of each problem with the mistakes that the model made in it."""
    written = self._write([self._writer.encode(problem.prompt) for problem in problems], number, 0)
    most = self._config.mistakes.max_per_solution
    samples = [self._judged(problem, text, (), most) for problem, text in zip(problems, written, strict=True)]
    going_on = list(range(len(samples)))
    for turn in range(1, most):
      going_on = [index for index in going_on if samples[index].is_open and len(samples[index].mistakes) < most]
      kept_steps = {index: corrected(problems[index], samples[index], self._task) for index in going_on}
      kept_steps = {index: steps for index, steps in kept_steps.items() if steps is not None and self._readable(steps)}
      begins = dict(
        zip(
          kept_steps,
          self._writer.begin(
            [problems[index].prompt for index in kept_steps],
            list(kept_steps.values()),
            batch_size=self._config.evaluate.batch_size,
          ),
          strict=True,
        )
      )
      begins = {index: begin for index, begin in begins.items() if self._writer.has_room(begin, self._max_tokens)}
      going_on = list(begins)
      for index, completion in zip(begins, self._write(list(begins.values()), number, turn), strict=True):
        before = samples[index].mistakes
        more = self._judged(problems[index], completion, kept_steps[index], most - len(before))
        if more.kind in RECORDED:
          samples[index] = Sample("wrong", more.steps, before + more.mistakes)
        else:
          going_on.remove(index)
    return samples

  def _judged(self, problem: Problem, written: Completion, stands: tuple[str, ...], most: int) -> Sample:
    """Return the sample of a text after the steps `stands`; with mine.flags of at most `most` mistakes."""
    unit = self._config.mistakes.unit
    if self._config.mine.flags:
      return judge_flagged(problem, written, self._task, self._markers, unit, stands=stands, most=most)
    return judge(problem, written, self._task, self._markers, unit, stands=stands)

  def _with_injected(self, problem: Problem, sample: Sample, rng: np.random.Generator) -> Sample:
    """Return the right solution, with probability mistakes.share with injected mistakes before some steps."""
    solved = dataclasses.replace(problem, steps=sample.steps)
    wrong = mistakes.drawn(solved, self._task, self._config.mistakes, rng)
    return dataclasses.replace(
      sample, mistakes=tuple(Mistake(place, step, error) for place, (step, error) in sorted(wrong.items()))
    )

  def _write(self, begins: Sequence[np.ndarray], number: int, turn: int) -> list[Completion]:
    """Return the model's completions of these beginnings, without a flag unless mine.flags."""
    label = f"mining, {number + 1} of {self.num_chunks}" + (f", mistake {turn + 1}" if turn else "")
    written = self._writer.write(
      begins,
      label=label,
      max_tokens=self._max_tokens,
      batch_size=self._config.evaluate.batch_size,
      temperature=TEMPERATURE,
      seed=derive_seed(self._seed, number, turn),
      flag_bias=0.0 if self._config.mine.flags or self._writer.flag_id is None else -math.inf,
    )
    self._num_tokens += sum(map(len, begins)) + sum(len(one.generation.tokens) for one in written)
    return written

  def _readable(self, steps: Sequence[str]) -> bool:
    """Return whether the steps contain no special token and, for models with confidence tokens, are single lines."""
    return not self._special.search("".join(steps)) and (
      not self._writer.confidence_ids
      or all(split_steps(step, "line") == (step,) and step.endswith("\n") for step in steps)
    )

  def _add_confidence(self, unnamed: list[tuple[Transcript, dict]]) -> list[tuple[Transcript, dict]]:
    """Return the records whose steps are lines, with the model's confidence after each step.

    The confidence of a right step is that without a wrong step before it.
    """
    readings = []  # (prompt, steps) of each record: the right steps, then those up to each of its mistakes
    for pieces, meta in unnamed:
      right_steps = split_steps("".join(piece.text for piece in pieces if piece.role in (TEXT, CORRECTION)), "line")
      wrong = (piece.text for piece in pieces if piece.role == MISTAKE)
      readings += [
        (pieces[0].text, steps)
        for steps in (
          right_steps,
          *((*right_steps[:place], step) for place, step in zip(meta["places"], wrong, strict=True)),
        )
      ]
    read = zip(readings, self._surprisals(*zip(*readings, strict=True)), strict=True) if readings else iter(())
    # In the bins of the model that will be trained, not of this one.
    watch = dataclasses.replace(
      self._writer.watch(), edges=self._config.tokenizer.confidence, first_edges=self._config.tokenizer.confidence_first
    )
    named = []
    for pieces, meta in unnamed:
      (_, right_steps), surprisals = next(read)
      wrong_readings = list(itertools.islice(read, len(meta["places"])))
      if len(surprisals) != len(right_steps) or any(
        len(wrong_surprisals) != len(steps) for (_, steps), wrong_surprisals in wrong_readings
      ):
        continue  # a line without an end, or with two
      for place, (_, wrong_surprisals) in reversed(list(zip(meta["places"], wrong_readings, strict=True))):
        surprisals.insert(place, wrong_surprisals[-1])
      names = [self._names[watch.bin_of(surprisal)] for surprisal in surprisals]
      named.append((with_confidence(pieces, names), meta))
    return named

  def _surprisals(self, prompts: Sequence[str], steps: Sequence[Sequence[str]]) -> list[list[Surprisal]]:
    read = self._writer.read(prompts, steps, batch_size=self._config.evaluate.batch_size)
    self._num_tokens += sum(len(token_T) for token_T, _ in read)
    return [surprisals for _, surprisals in read]

  def _accepted(self, candidates: list[tuple[Transcript, dict]]) -> tuple[list[tuple[Transcript, dict]], str]:
    """Return the records that training accepts, and its error for the first other one."""

    def refusal(batch: Sequence[tuple[Transcript, dict]]) -> str:
      try:
        tokens.tokenize_all([(pieces, _place(meta)) for pieces, meta in batch], self._tokenizer, self._config)
      except InputError as error:
        return str(error)
      return ""

    if not candidates or not refusal(candidates):
      return candidates, ""
    errors = [refusal([record]) for record in candidates]
    return [record for record, error in zip(candidates, errors, strict=True) if not error], next(filter(None, errors))


def derive_seed(*numbers: int) -> int:
  """Return a seed derived from the numbers, deterministically."""
  return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _place(meta: dict[str, Any]) -> str:
  return f"problem {meta['problem']}, sample {meta['sample']}"


class Chunked(Protocol):
  """Work in chunks: `header`, a JSON object, is all that they depend on."""

  header: dict[str, Any]
  num_chunks: int

  def chunk(self, number: int) -> dict[str, Any]:
    """Return the result of one chunk, as JSON."""


def chunk_store(output: str, miner: Chunked) -> ChunkStore:
  """Return the chunks of the miner's file, those of earlier versions included."""
  same = {name: value for name, (value, _) in REMOVED.items()}
  return ChunkStore(output, miner.header, same_without=same, is_free=lambda key: is_free(key, MINING))


def mine_chunks(
  miner: Chunked, store: ChunkStore, *, process: int, num_processes: int, stopped: Callable[[], bool] = lambda: False
) -> bool:
  """Return whether all chunks of this process are done, earlier ones included; False when `stopped` returned True."""
  return store.fill(miner.num_chunks, miner.chunk, process=process, num_processes=num_processes, stopped=stopped)

"""Distillation of corrections, sampling: own wrong steps, what the model writes after a forced flag, and hints.

A round samples mine.samples texts of each of mine.num_problems problems, the flag banned. The checker finds the first
wrong step of each. There the flag is forced, and the model writes reason, fix and correction up to the end of the line.
The hint, which only a teacher reads, has the step, the task's reason and the right step.

    a text    a4\\n  b9\\n  c1\\n ...              b9 is wrong: what follows it is dropped
    kept      a4\\n  b9\\n  <flag> calcb <fix> b8\\n

Texts without a mistake show right steps alone, after which a flag is avoided; mine.right of them are kept for each
mistake.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from insec_jax.config import Config
from insec_jax.data.corrections import NO_MISTAKE
from insec_jax.data.encoding import special_pattern
from insec_jax.evaluation.steps import Reader
from insec_jax.evaluation.tables import aligned
from insec_jax.files.writing import written_whole
from insec_jax.generation.generator import Completion, TextGenerator
from insec_jax.method.hints import hint_of
from insec_jax.method.tasks import Problem, Task
from insec_jax.method.transcript import Markers
from insec_jax.mining import miner
from insec_jax.mining.judging import KINDS, Sample, judge
from insec_jax.mining.policy import Sampling
from insec_jax.mining.records import corrected, is_confirmed, reason_of

NO_LINE = "the wrong step is no line of whole tokens"
NO_ROOM = "longer than a row, or than the model's positions, with its hint"


class _Wrong(NamedTuple):
  """A text up to its first wrong step: problem, sample, tokens of the answer, and places of steps in these."""

  index: int
  sample: Sample
  token_T: np.ndarray
  wrong: int
  right: tuple[int, ...]
  fixed: str


class CorrectionSampler:
  """A model, a task and problems; finds mistakes chunk by chunk. `weights` is the model's `fingerprint`."""

  def __init__(self, writer: TextGenerator, task: Task, config: Config, *, seed: int, weights: str):
    self._writer, self._task, self._config, self._seed = writer, task, config, seed
    self._markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
    self._reader = Reader(writer, task, self._markers, config.mistakes.unit)
    self._special = special_pattern(writer.tokenizer)
    self._sampling = Sampling(writer, task, config, seed=seed, weights=weights)
    self.num_chunks, self.header = self._sampling.num_chunks, self._sampling.header

  def chunk(self, number: int) -> dict[str, Any]:
    """Return the result of one chunk, as JSON: its counts, the corrections, and the right texts."""
    chosen, written = self._sampling.write(number, flag_bias=-math.inf)
    counts = collections.Counter(dict.fromkeys((field.name for field in dataclasses.fields(CorrectionSummary)), 0))
    del counts["left_out"]
    left_out: collections.Counter[str] = collections.Counter()
    wrong: list[_Wrong] = []
    right: list[dict[str, Any]] = []
    of_text = [index for index in chosen for _ in range(self._config.mine.samples)]
    for index, text in zip(of_text, written, strict=True):
      problem = self._sampling.problems[index]
      sample = judge(problem, text, self._task, self._markers, self._config.mistakes.unit)
      counts[sample.kind] += 1
      if sample.kind == "wrong":
        found = self._up_to_mistake(index, problem, sample, text)
        if isinstance(found, str):
          left_out[found] += 1
        else:
          wrong.append(found)
      elif sample.kind == "right" and self._config.policy.no_flag:
        token_T, places = text.generation.tokens, self._places(problem, sample, text)
        right.append(self._as_json(index, token_T, NO_MISTAKE, NO_MISTAKE, places, ""))
    corrections = self._corrections(wrong, number, counts, left_out)
    counts.update(
      problems=len(chosen), samples=len(written), tokens=sum(len(text.generation.tokens) for text in written)
    )
    return {"counts": dict(counts), "left_out": dict(left_out), "corrections": corrections, "right": right}

  def _up_to_mistake(self, index: int, problem: Problem, sample: Sample, written: Completion) -> _Wrong | str:
    """Return the text up to its mistake, or why it is left out."""
    step = sample.mistakes[0].step
    if self._special.search("".join((*sample.steps, step))):
      return miner.SPECIAL
    steps = corrected(problem, sample, self._task)
    if steps is None:
      return miner.NO_CORRECTION
    if not is_confirmed(problem, sample, self._task):
      return miner.UNCONFIRMED
    ends = self._reader.token_ends(written)
    before = len("".join(sample.steps))
    begin, end = ends.get(before), ends.get(before + len(step))
    if begin is None or end is None or not step.endswith("\n"):
      return NO_LINE
    tokens = written.generation.tokens
    begin, stop = (self._writer.past_confidence(tokens, place) for place in (begin, end))
    return _Wrong(index, sample, tokens[:stop], begin, self._places(problem, sample, written), steps[-1])

  def _places(self, problem: Problem, sample: Sample, written: Completion) -> tuple[int, ...]:
    """Return the place of the token after each right step, with a token of its own, in the tokens of the answer."""
    ends, tokens, places, length = self._reader.token_ends(written), written.generation.tokens, [], 0
    for number, step in enumerate(sample.steps):
      length += len(step)
      place = ends.get(length)
      if place is not None and self._task.check(problem, sample.steps[:number], step).kind == "right":
        places.append(self._writer.past_confidence(tokens, place))
    return tuple(place for place in places if place < len(tokens))

  def _corrections(
    self,
    found: Sequence[_Wrong],
    number: int,
    counts: collections.Counter[str],
    left_out: collections.Counter[str],
  ) -> list[dict[str, Any]]:
    """Return what the model writes after these mistakes, and count it."""
    config = self._config
    prompts = self._sampling.prompts
    flagged = [np.r_[prompts[one.index], one.token_T, self._writer.flag_id].astype(np.int32) for one in found]
    fits = [self._writer.has_room(begin, config.evaluate.max_tokens) for begin in flagged]
    left_out[NO_ROOM] += fits.count(False)
    found, flagged = ([x for x, fit in zip(xs, fits, strict=True) if fit] for xs in (found, flagged))
    drawn = self._writer.draw_steps(
      flagged,
      label=f"corrections, {number + 1} of {self.num_chunks}",
      max_tokens=config.evaluate.max_tokens,
      seed=miner.derive_seed(self._seed, number, 1),
      batch_size=config.evaluate.batch_size,
      temperature=config.policy.temperature,
    )
    kept = []
    for one, drawn_text in zip(found, drawn, strict=True):
      problem, mistake = self._sampling.problems[one.index], one.sample.mistakes[0]
      reason = reason_of(
        problem, one.sample.steps, mistake, self._task, reason=config.mistakes.reason, unit=config.mistakes.unit
      )
      hint = hint_of(config.mistakes.hint, wrong=mistake.step, reason=reason, right=one.fixed)
      token_T = np.r_[one.token_T, self._writer.flag_id, drawn_text.tokens]
      if len(self._writer.encode(problem.prompt + hint)) + len(token_T) > config.data.row_length:
        left_out[NO_ROOM] += 1
        continue
      step = self._writer.decode(drawn_text.tokens).rpartition(self._markers.fix)[2]
      counts["mistakes"] += 1
      counts["corrected"] += self._task.check(problem, one.sample.steps, step).kind == "right"
      counts["repeated"] += step == mistake.step
      counts["tokens_of_corrections"] += len(drawn_text.tokens)
      kept.append(self._as_json(one.index, token_T, one.wrong, len(one.token_T), one.right, hint))
    return kept

  def _as_json(
    self, index: int, token_T: np.ndarray, wrong: int, flag: int, right: tuple[int, ...], hint: str
  ) -> dict[str, Any]:
    """Return a line of the file; places in the answer become places in prompt and answer."""
    prompt_T = self._sampling.prompts[index]
    start = len(prompt_T)
    return {
      "problem": index,
      "prompt": self._sampling.problems[index].prompt,
      "hint": hint,
      "text": self._writer.decode(token_T),
      "start": start,
      "wrong": wrong if wrong == NO_MISTAKE else start + wrong,
      "flag": flag if flag == NO_MISTAKE else start + flag,
      "right": [start + place for place in right],
      "tokens": [*map(int, prompt_T), *map(int, token_T)],
    }


@dataclasses.dataclass(frozen=True)
class CorrectionSummary:
  """The outcome of a round: texts by kind, and the mistakes that are trained on, with what the model wrote there."""

  problems: int
  samples: int
  right: int
  wrong: int
  unverified: int
  incomplete: int
  tokens: int  # sampled before mistakes are cut off
  mistakes: int
  corrected: int  # of these, a right step follows the fix
  repeated: int
  tokens_of_corrections: int
  left_out: dict[str, int]

  def values(self) -> dict[str, float]:
    """Return the values that metrics.jsonl has in every line of the round."""
    return {
      "policy/right": self.right / self.samples,
      "policy/wrong": self.wrong / self.samples,
      "policy/corrected": self.corrected / max(self.mistakes, 1),
      "policy/repeated": self.repeated / max(self.mistakes, 1),
      "policy/tokens": (self.tokens + self.tokens_of_corrections) / self.samples,
    }

  def __str__(self) -> str:
    num, mistakes = self.samples, max(self.mistakes, 1)
    kinds = [(f"{kind} samples", f"{getattr(self, kind):,}", f"{getattr(self, kind) / num:.1%}") for kind in KINDS]
    table = aligned(
      [
        (f"{num:,} samples of {self.problems:,} problems", "", ""),
        *kinds,
        ("tokens sampled", f"{self.tokens + self.tokens_of_corrections:,}", ""),
        ("mistakes to learn from", f"{self.mistakes:,}", ""),
        ("flag forced: corrected", f"{self.corrected:,}", f"{self.corrected / mistakes:.1%}"),
        ("flag forced: mistake repeated", f"{self.repeated:,}", f"{self.repeated / mistakes:.1%}"),
      ]
    )
    return "\n".join((table, *(f"left out, {reason}: {count:,}" for reason, count in self.left_out.items() if count)))


def join(chunks: Sequence[dict[str, Any]], output: str, *, right: float, seed: int) -> CorrectionSummary:
  """Write the corrections of all chunks to `output`, a JSON object a line, and return the summary.

  `right` right texts for each are drawn by the seed and written among them, in the order of the problems.
  """
  texts = [text for chunk in chunks for text in chunk["right"]]
  num = min(len(texts), round(right * sum(len(chunk["corrections"]) for chunk in chunks)))
  chosen = set(np.random.default_rng((seed, *b"right")).permutation(len(texts))[:num].tolist())
  numbers = iter(range(len(texts)))
  with written_whole(output) as file:
    for chunk in chunks:
      kept = [text for text in chunk["right"] if next(numbers) in chosen]
      for line in sorted((*chunk["corrections"], *kept), key=lambda line: line["problem"]):
        file.write(json.dumps(line, ensure_ascii=False) + "\n")

  def total(name: str) -> dict[str, int]:
    summed: collections.Counter[str] = collections.Counter()
    for chunk in chunks:
      summed.update(chunk[name])
    return dict(summed)

  return CorrectionSummary(**total("counts"), left_out=total("left_out"))

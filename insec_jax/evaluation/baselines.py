"""The redraw baseline: steps with low confidence are deleted and sampled again.

It has no flag, reason or fix: its gain comes from the confidence, not from the text of a correction. Corrections must
beat it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from insec_jax.generation.confidence import ConfidenceTrigger, Surprisal, step_scores
from insec_jax.generation.generator import Completion, TextGenerator
from insec_jax.generation.sampler import SampledTokens

SHORT = 48  # tokens sampled per solution in a later round: few solutions are left, and one may never end


def redraw(
  writer: TextGenerator,
  prompts: Sequence[np.ndarray],
  *,
  label: str,
  threshold: float,
  most: int,
  max_tokens: int,
  temperature: float,
  seed: int,
  batch_size: int,
) -> tuple[list[Completion], list[int]]:
  """Return one solution a prompt, with steps that score above `threshold` sampled again, and its generated tokens.

      drawn   a4  b9?         b9? deleted after it is scored: its tokens count
              a4  b7  c2?     and so on, each step at most `most` times, until no step is above or max_tokens are kept

  Flags are banned. The first round samples whole solutions, later ones SHORT tokens at a time: complete steps are kept,
  an incomplete one is sampled again, and without a complete step the next round samples the rest at once. Tokens after
  a deleted step, or of a step that a round cuts short, are not counted: an online redraw would not have sampled them.
  Every round has its own seed. Raises InputError as `TextGenerator.watch` does.
  """
  watch = writer.watch()
  kept = [np.zeros(0, np.int32) for _ in prompts]  # tokens kept so far
  kept_logprobs = [np.zeros(0, np.float32) for _ in prompts]
  tries, counted = [0] * len(prompts), [0] * len(prompts)
  whole = set(range(len(prompts)))  # sampled to the end in the next round
  done: dict[int, Completion] = {}
  number = 0
  while len(done) < len(prompts):
    groups: dict[int, dict[int, np.ndarray]] = {}  # by tokens to draw
    for index, prompt in enumerate(prompts):
      if index not in done:
        begin = np.concatenate([prompt, kept[index]])
        num = max_tokens if index in whole else min(SHORT, max_tokens)
        # A solution with less room left than `num` is sampled to its maximum length.
        groups.setdefault(num if writer.has_room(begin, num) else max_tokens - len(kept[index]), {})[index] = begin
    drawn = {}
    for num, begins in groups.items():
      drawn |= zip(
        begins,
        writer.write(
          list(begins.values()),
          label=f"{label}, round {number + 1}",
          max_tokens=num,
          temperature=temperature,
          seed=seed + number,
          flag_bias=0.0 if writer.flag_id is None else -math.inf,
          batch_size=batch_size,
        ),
        strict=True,
      )
    number += 1
    for index, completion in drawn.items():
      generation = completion.generation
      room = max_tokens - len(kept[index])
      scored = step_scores(generation.tokens, generation.logprobs, watch, writer.flag_id)
      above = next(
        (
          (first, stop)
          for first, stop, surprisal in scored
          if surprisal.score > threshold and stop <= room and not (first == 0 and tries[index] >= most)
        ),
        None,
      )
      forced = bool(watch.confidence_ids)  # a confidence token follows each step
      if above is None and generation.finish == "length" and len(generation.tokens) + forced < room:
        if scored and forced and scored[-1][1] == len(generation.tokens):
          generation = _with_confidence(generation, watch, scored[-1][2])
        num_kept = scored[-1][1] + forced if scored else 0
        counted[index] += num_kept
        tries[index] = 0 if num_kept else tries[index]
        (whole.discard if num_kept else whole.add)(index)
      elif above is None:
        tokens = np.concatenate([kept[index], generation.tokens[:room]])
        finish = generation.finish if len(generation.tokens) <= room else "length"
        logprobs = np.concatenate([kept_logprobs[index], generation.logprobs[:room]])
        counted[index] += min(room, len(generation.tokens))
        done[index] = writer.written(SampledTokens(tokens, logprobs, finish, None, None))
        continue
      else:
        num_kept, stop = above
        counted[index] += stop
        tries[index] = 1 if num_kept else tries[index] + 1
        whole.discard(index)
      kept[index] = np.concatenate([kept[index], generation.tokens[:num_kept]])
      kept_logprobs[index] = np.concatenate([kept_logprobs[index], generation.logprobs[:num_kept]])
  return [done[index] for index in range(len(prompts))], counted


def _with_confidence(generation: SampledTokens, watch: ConfidenceTrigger, surprisal: Surprisal) -> SampledTokens:
  """Return a generation cut right before its last confidence token with that token; its log p is unknown, set to 0."""
  return dataclasses.replace(
    generation,
    tokens=np.append(generation.tokens, watch.confidence_ids[watch.bin_of(surprisal)]),
    logprobs=np.append(generation.logprobs, 0.0),
  )

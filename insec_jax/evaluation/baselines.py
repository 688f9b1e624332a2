"""The control that a correction has to beat: a step that the model was unsure of is deleted and drawn again.

No flag, no reason and no fix: whatever this gains, the confidence gains, and not the text of a correction.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from insec_jax.generation.generator import Completion, TextGenerator
from insec_jax.generation.sampler import ConfidenceTrigger, SampledTokens, Surprisal, step_scores

SHORT = 48  # tokens that a later round draws of a solution: few are left by then, and one of them may never end


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
  """One solution a prompt in which steps with a score above `threshold` were drawn again, and the tokens each took.

      drawn   a4  b9?         b9? deleted after its score is seen: its tokens count
              a4  b7  c2?     and so on, each step at most `most` times, until no step is above or max_tokens stand

  Flags are banned. The first round draws whole solutions, later ones SHORT tokens at a time: the steps that ended
  stand, the one that is cut short is drawn anew, and where none ended the next round draws the rest at once. What comes
  after a step that is deleted, or is cut short by a round, is not counted: one who watches need not have drawn it.
  Every round has a seed of its own. InputError as `TextGenerator.watch`.
  """
  watch = writer.watch()
  kept = [np.zeros(0, np.int32) for _ in prompts]  # tokens that stand
  kept_logprobs = [np.zeros(0, np.float32) for _ in prompts]
  tries, counted = [0] * len(prompts), [0] * len(prompts)
  whole = set(range(len(prompts)))  # drawn to the end in the next round
  done: dict[int, Completion] = {}
  number = 0
  while len(done) < len(prompts):
    groups: dict[int, dict[int, np.ndarray]] = {}  # by tokens to draw
    for index, prompt in enumerate(prompts):
      if index not in done:
        begin = np.concatenate([prompt, kept[index]])
        num = max_tokens if index in whole else min(SHORT, max_tokens)
        # What has grown so long that so many more would not fit is drawn as far as it may still grow.
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
    for index, one in drawn.items():
      generation = one.generation
      room = max_tokens - len(kept[index])
      found = step_scores(generation.tokens, generation.logprobs, watch, writer.flag_id)
      above = next(
        (
          (first, stop)
          for first, stop, said in found
          if said.score > threshold and stop <= room and not (first == 0 and tries[index] >= most)
        ),
        None,
      )
      forced = bool(watch.confidence_ids)  # whether a token of confidence stands behind a step
      if above is None and generation.finish == "length" and len(generation.tokens) + forced < room:
        if found and forced and found[-1][1] == len(generation.tokens):
          generation = _with_confidence(generation, watch, found[-1][2])
        stands = found[-1][1] + forced if found else 0
        counted[index] += stands
        tries[index] = 0 if stands else tries[index]
        (whole.discard if stands else whole.add)(index)
      elif above is None:
        tokens = np.concatenate([kept[index], generation.tokens[:room]])
        finish = generation.finish if len(generation.tokens) <= room else "length"
        logprobs = np.concatenate([kept_logprobs[index], generation.logprobs[:room]])
        counted[index] += min(room, len(generation.tokens))
        done[index] = writer.written(SampledTokens(tokens, logprobs, finish, None, None))
        continue
      else:
        stands, stop = above
        counted[index] += stop
        tries[index] = 1 if stands else tries[index] + 1
        whole.discard(index)
      kept[index] = np.concatenate([kept[index], generation.tokens[:stands]])
      kept_logprobs[index] = np.concatenate([kept_logprobs[index], generation.logprobs[:stands]])
  return [done[index] for index in range(len(prompts))], counted


def _with_confidence(generation: SampledTokens, watch: ConfidenceTrigger, said: Surprisal) -> SampledTokens:
  """What was cut right before the token of confidence of its last step, with it; its log p is unknown, and put as 0."""
  return dataclasses.replace(
    generation,
    tokens=np.append(generation.tokens, watch.confidence_ids[watch.bin(said)]),
    logprobs=np.append(generation.logprobs, 0.0),
  )

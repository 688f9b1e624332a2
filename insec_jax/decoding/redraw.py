"""The control that a correction has to beat: a step that the model was unsure of is deleted and drawn again.

No flag, no reason and no fix: whatever this gains, the confidence gains, and not the text of a correction.
"""

import math
from collections.abc import Sequence

import numpy as np

from insec_jax.decoding.sampler import Generation, step_scores
from insec_jax.decoding.writer import Writer, Written


def redraw(writer: Writer, prompts: Sequence[np.ndarray], *, label: str, threshold: float, most: int, max_tokens: int,
           temperature: float, seed: int, batch_size: int) -> tuple[list[Written], list[int]]:
  """One solution a prompt in which steps with a score above `threshold` were drawn again, and the tokens each took.

      drawn   a4  b9?         b9? deleted after its score is seen: its tokens count
              a4  b7  c2?     and so on, each step at most `most` times, until no step is above or max_tokens stand

  Flags are banned. Each round draws all that is left of a solution; what comes after a step that is deleted is not
  counted, since one who watches stops there. Every round has a seed of its own. InputError as `Writer.watch`.
  """
  watch = writer.watch()
  kept = [np.zeros(0, np.int32) for _ in prompts]  # tokens that stand
  kept_logprobs = [np.zeros(0, np.float32) for _ in prompts]
  tries, counted = [0] * len(prompts), [0] * len(prompts)
  done: dict[int, Written] = {}
  number = 0
  while len(done) < len(prompts):
    begins = {index: np.concatenate([prompt, kept[index]]) for index, prompt in enumerate(prompts) if index not in done}
    together = [index for index, begin in begins.items() if writer.has_room(begin, max_tokens)]
    # What has grown so long that max_tokens more would not fit is drawn alone, as far as it may still grow.
    alone = [([index], max_tokens - len(kept[index])) for index, begin in begins.items()
             if not writer.has_room(begin, max_tokens)]
    drawn = {}
    for group, room in ((together, max_tokens), *alone):
      drawn |= zip(group, writer.write(
          [begins[index] for index in group], label=f"{label}, round {number + 1}", max_tokens=room,
          temperature=temperature, seed=seed + number, flag_bias=0.0 if writer.flag_id is None else -math.inf,
          batch_size=batch_size), strict=True)
    number += 1
    for index, one in drawn.items():
      generation = one.generation
      room = max_tokens - len(kept[index])
      found = step_scores(generation.tokens, generation.logprobs, watch, writer.flag_id)
      above = next(((first, stop) for first, stop, said in found
                    if watch.score(said) > threshold and stop <= room
                    and not (first == 0 and tries[index] >= most)), None)
      if above is None:
        tokens = np.concatenate([kept[index], generation.tokens[:room]])
        finish = generation.finish if len(generation.tokens) <= room else "length"
        logprobs = np.concatenate([kept_logprobs[index], generation.logprobs[:room]])
        counted[index] += min(room, len(generation.tokens))
        done[index] = writer.written(Generation(tokens, logprobs, finish, None, None))
        continue
      first, stop = above
      counted[index] += stop
      tries[index] = tries[index] + 1 if first == 0 else 1
      kept[index] = np.concatenate([kept[index], generation.tokens[:first]])
      kept_logprobs[index] = np.concatenate([kept_logprobs[index], generation.logprobs[:first]])
  return [done[index] for index in range(len(prompts))], counted

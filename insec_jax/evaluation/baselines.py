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
  drafts = [_Draft() for _ in prompts]
  done: dict[int, Completion] = {}
  number = 0
  while len(done) < len(prompts):
    groups: dict[int, dict[int, np.ndarray]] = {}  # by tokens to draw
    for index, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
      if index not in done:
        begin = np.concatenate([prompt, draft.tokens])
        num = max_tokens if draft.whole else min(SHORT, max_tokens)
        # A solution with less room left than `num` is sampled to its maximum length.
        num = num if writer.has_room(begin, num) else max_tokens - len(draft.tokens)
        groups.setdefault(num, {})[index] = begin
    for num, begins in groups.items():
      completions = writer.write(
        list(begins.values()),
        label=f"{label}, round {number + 1}",
        max_tokens=num,
        temperature=temperature,
        seed=seed + number,
        flag_bias=0.0 if writer.flag_id is None else -math.inf,
        batch_size=batch_size,
      )
      for index, completion in zip(begins, completions, strict=True):
        scored = step_scores(completion.generation.tokens, completion.generation.logprobs, watch, writer.flag_id)
        finish = drafts[index].add(
          completion.generation,
          scored,
          watch,
          threshold=threshold,
          most=most,
          room=max_tokens - len(drafts[index].tokens),
        )
        if finish is not None:
          done[index] = writer.written(SampledTokens(drafts[index].tokens, drafts[index].logprobs, finish, None, None))
    number += 1
  return [done[index] for index in range(len(prompts))], [draft.counted for draft in drafts]


@dataclasses.dataclass
class _Draft:
  """A solution of which more steps are sampled or deleted in each round."""

  tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # those kept so far
  logprobs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
  tries: int = 0  # deletions of the step that comes next
  counted: int = 0  # tokens generated
  whole: bool = True  # it is sampled to the end in the next round

  def add(
    self,
    generation: SampledTokens,
    scored: Sequence[tuple[int, int, Surprisal]],
    watch: ConfidenceTrigger,
    *,
    threshold: float,
    most: int,
    room: int,
  ) -> str | None:
    """Keep the part of a round's tokens that needs no redraw; return the finish of the solution, None if it goes on."""
    above = next(
      (
        (first, stop)
        for first, stop, surprisal in scored
        if surprisal.score > threshold and stop <= room and not (first == 0 and self.tries >= most)
      ),
      None,
    )
    forced = bool(watch.confidence_ids)  # a confidence token follows each step
    finish = None
    if above is not None:
      num_kept, num_counted = above
      self.tries = 1 if num_kept else self.tries + 1
      self.whole = False
    elif generation.finish == "length" and len(generation.tokens) + forced < room:
      if scored and forced and scored[-1][1] == len(generation.tokens):
        generation = _with_confidence(generation, watch, scored[-1][2])
      num_kept = num_counted = scored[-1][1] + forced if scored else 0
      self.tries = 0 if num_kept else self.tries
      self.whole = not num_kept
    else:
      num_kept = num_counted = min(room, len(generation.tokens))
      finish = generation.finish if len(generation.tokens) <= room else "length"
    self.counted += num_counted
    self.tokens = np.concatenate([self.tokens, generation.tokens[:num_kept]])
    self.logprobs = np.concatenate([self.logprobs, generation.logprobs[:num_kept]])
    return finish


def _with_confidence(generation: SampledTokens, watch: ConfidenceTrigger, surprisal: Surprisal) -> SampledTokens:
  """Return a generation cut right before its last confidence token with that token; its log p is unknown, set to 0."""
  return dataclasses.replace(
    generation,
    tokens=np.append(generation.tokens, watch.confidence_ids[watch.bin_of(surprisal)]),
    logprobs=np.append(generation.logprobs, 0.0),
  )

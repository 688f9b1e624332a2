"""A model and its tokenizer together: text in, text out, from the devices of this host or from a server.

A text is written by `encode`, then `write`. The other methods score steps that are given, or continue after them.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from insec_jax.command import InputError
from insec_jax.data.tokens import encode_prompt, encode_text, stop_ids
from insec_jax.generation.confidence import ConfidenceTrigger, Surprisal, step_scores
from insec_jax.generation.engine import Engine
from insec_jax.generation.loading import LoadedModel, kinds_of
from insec_jax.generation.sampler import SampledTokens, Sampler
from insec_jax.generation.server_engine import ServerEngine
from insec_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Completion:
  """A model's continuation of one prompt, also as text: without the stop token, with the other special tokens."""

  text: str
  generation: SampledTokens

  @property
  def finished(self) -> bool:
    """Return whether the model ended the text itself."""
    return self.generation.finish == "stop"


def decode_progress(label: str, total: int) -> Callable[[int, int], None]:
  """Return a function of (prompts done, tokens written) that shows them with tokens/s; the last call closes it."""
  progress = Progress(label, total, unit="prompt", last=True)
  start = time.monotonic()

  def update(done: int, tokens: int) -> None:
    progress.update(done, f"{tokens / (time.monotonic() - start):,.0f} tokens/s")
    if done == total:
      progress.close()

  return update


class TextGenerator:
  """A model with its tokenizer, ready to continue texts."""

  def __init__(self, loaded: LoadedModel):
    self.sampler: Engine = (
      Sampler(loaded.config, loaded.params, compute=loaded.compute, mesh=loaded.mesh, kind_V=kinds_of(loaded))
      if loaded.server is None
      else ServerEngine(loaded.server, loaded.config)
    )
    self.forces_tokens = loaded.server is None  # by the confidence in a step, while decoding
    self.scores_flags = loaded.flag_id is not None and (loaded.server is None or loaded.server.scores_flags)
    self.tokenizer = loaded.tokenizer
    self.flag_id, self.fix_id, self._unit = loaded.flag_id, loaded.fix_id, loaded.unit
    self.confidence_ids = loaded.confidence_ids
    self._confidence = ConfidenceTrigger(
      (),
      loaded.fix_id,
      edges=loaded.confidence,
      first_edges=loaded.confidence_first,
      confidence_ids=loaded.confidence_ids,
    )
    # A folder that this package did not write names no template: its prompts are used unchanged.
    self.template = "plain" if loaded.template is None else loaded.template
    self.stop_ids = sorted(stop_ids(loaded.config.eos_ids, loaded.tokenizer, vocab_size=loaded.config.vocab_size))

  def encode(self, prompt: str, *, answer: str = "") -> np.ndarray:
    """Return the tokens of a prompt and the start of its answer, as in training; neither becomes special tokens."""
    return encode_prompt(prompt, self.tokenizer, self.template, answer=answer)

  def decode(self, tokens: Sequence[int]) -> str:
    """Return the text of tokens, special ones included; confidence tokens are left out."""
    if self.confidence_ids:
      tokens = [token for token in tokens if token not in self.confidence_ids]
    return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

  def write(
    self,
    prompts: Sequence[np.ndarray],
    *,
    label: str,
    max_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    flag_bias: float = 0.0,
    watch: ConfidenceTrigger | None = None,
    first: int = 0,
  ) -> list[Completion]:
    """Return the completion of each prompt, as in Sampler.generate; `label` names the work on the progress bar."""
    if not prompts:
      return []
    if watch is None and self.confidence_ids:
      watch = self.watch()
    generations = self.sampler.generate(
      prompts,
      max_tokens=max_tokens,
      temperature=temperature,
      top_p=top_p,
      seed=seed,
      stop_ids=self.stop_ids,
      flag_id=self.flag_id,
      flag_bias=flag_bias,
      watch=watch,
      batch_size=batch_size,
      first=first,
      progress=decode_progress(label, len(prompts)),
    )
    return [self.written(generation) for generation in generations]

  def draw_steps(
    self,
    begins: Sequence[np.ndarray],
    *,
    label: str,
    max_tokens: int,
    seed: int,
    batch_size: int,
    temperature: float = 1.0,
  ) -> list[SampledTokens]:
    """Return one step after each beginning, drawn at a temperature, the flag banned.

    It ends with the token that ends its line, without a confidence token, or with a stop token. Raises InputError as
    `watch` does.
    """
    if not begins:
      return []
    return self.sampler.generate(
      begins,
      max_tokens=max_tokens,
      temperature=temperature,
      seed=seed,
      stop_ids=self._ends(),
      flag_id=self.flag_id,
      flag_bias=0.0 if self.flag_id is None else -math.inf,
      watch=self.watch() if self.confidence_ids else None,
      batch_size=batch_size,
      progress=decode_progress(label, len(begins)),
    )

  def beam(
    self,
    begins: Sequence[np.ndarray],
    *,
    label: str,
    width: int,
    max_tokens: int,
    batch_size: int,
    step: bool = False,
    excluded: Sequence[np.ndarray] | None = None,
  ) -> list[tuple[SampledTokens, int]]:
    """Return the likeliest text of so many beams after each beginning, as Sampler.beam does; with `step`, one step."""
    if not begins:
      return []
    return self.sampler.beam(
      begins,
      width=width,
      max_tokens=max_tokens,
      stop_ids=self._ends() if step else self.stop_ids,
      flag_id=self.flag_id,
      watch=self.watch() if self.confidence_ids else None,
      excluded=excluded,
      batch_size=batch_size,
      progress=decode_progress(label, len(begins)),
    )

  def _ends(self) -> list[int]:
    return sorted({*self.stop_ids, *self.watch().end_ids})

  def written(self, generation: SampledTokens) -> Completion:
    """Return a generation with its text."""
    stopped = generation.finish == "stop"
    return Completion(self.decode(generation.tokens[:-1] if stopped else generation.tokens), generation)

  def read(
    self, prompts: Sequence[str], steps: Sequence[Sequence[str]], *, batch_size: int
  ) -> list[tuple[np.ndarray, list[Surprisal]]]:
    """Return each prompt with the start of its answer as if the model had written these steps itself.

    A result is (tokens, surprisal of each step, one for each end of line). Where the model has confidence tokens, the
    tokens include its confidence after each step. Raises InputError as `watch` does.
    """
    watch = self.watch()
    tokens = [self.encode(prompt) for prompt in prompts]
    starts = [len(prompt_tokens) for prompt_tokens in tokens]
    if not self.confidence_ids:
      tokens = [self.encode(prompt, answer="".join(answer)) for prompt, answer in zip(prompts, steps, strict=True)]
      logprobs = self.sampler.logprobs(tokens, batch_size=batch_size)
      return [
        (token_T, [surprisal for *_, surprisal in step_scores(token_T[start:], logprob_T[start:], watch, self.flag_id)])
        for token_T, logprob_T, start in zip(tokens, logprobs, starts, strict=True)
      ]
    # As in training: prompt and first step are encoded together, each text after a confidence token on its own.
    encoded = [
      [
        encode_text(step, self.tokenizer) if number else self.encode(prompt, answer=step)
        for number, step in enumerate(answer)
      ]
      for prompt, answer in zip(prompts, steps, strict=True)
    ]
    surprisals: list[list[Surprisal]] = [[] for _ in prompts]
    bins = [[0 if step.endswith("\n") else None for step in answer] for answer in steps]  # None: no confidence token
    # The bin of a step depends on those before it. All are guessed, then read again until guess and result agree:
    # each pass fixes at least one more step, usually nearly all.
    open_ = [index for index, answer in enumerate(steps) if answer]
    while open_:
      for index in open_:
        tokens[index] = np.concatenate(
          [
            part
            for step, bin_ in zip(encoded[index], bins[index], strict=True)
            for part in (step, [] if bin_ is None else [self.confidence_ids[bin_]])
          ]
        ).astype(np.int32)
      read = self.sampler.logprobs([tokens[index] for index in open_], batch_size=batch_size)
      again = []
      for index, logprob_T in zip(open_, read, strict=True):
        scored = step_scores(tokens[index][starts[index] :], logprob_T[starts[index] :], watch, self.flag_id)
        surprisals[index] = [surprisal for *_, surprisal in scored]
        # A step of two lines has a surprisal for each, which callers detect by their number; its bin is the last's.
        surprisal_at = {stop: surprisal for _, stop, surprisal in scored}
        after = (
          np.cumsum([len(step) + (bin_ is not None) for step, bin_ in zip(encoded[index], bins[index], strict=True)])
          - starts[index]
        )
        as_read = [
          None if bin_ is None else watch.bin_of(surprisal_at[stop - 1])
          for bin_, stop in zip(bins[index], after.tolist(), strict=True)
        ]
        if as_read != bins[index]:
          bins[index] = as_read
          again.append(index)
      open_ = again
    return list(zip(tokens, surprisals, strict=True))

  def begin(self, prompts: Sequence[str], steps: Sequence[Sequence[str]], *, batch_size: int) -> list[np.ndarray]:
    """Return the model's input to continue after these steps, as `read` does; no pass without confidence tokens."""
    if self.confidence_ids:
      return [token_T for token_T, _ in self.read(prompts, steps, batch_size=batch_size)]
    return [self.encode(prompt, answer="".join(answer)) for prompt, answer in zip(prompts, steps, strict=True)]

  def has_room(self, begin: np.ndarray, max_tokens: int) -> bool:
    """Return whether the model can write `max_tokens` tokens after this beginning."""
    return len(begin) + max_tokens <= self.sampler.config.max_positions

  def past_confidence(self, tokens: np.ndarray, place: int) -> int:
    """Return the place after the confidence token at `place`, or `place` where there is none."""
    return place + (place < len(tokens) and int(tokens[place]) in self.confidence_ids)

  def watch(self, threshold: float = math.inf) -> ConfidenceTrigger:
    """Return a trigger for steps that are lines: a token whose text ends in a newline ends one.

    A step with a score above `threshold` gets a flag. Raises InputError when the model was trained on steps that are no
    lines.
    """
    if self._unit not in (None, "line"):
      raise InputError(
        f"the model's steps are {self._unit}s (mistakes.unit), and only lines can be watched: where a "
        "sentence ends is known too late; use a model trained with mistakes.unit='line'"
      )
    return dataclasses.replace(self._confidence, end_ids=self._end_ids, threshold=threshold)

  @functools.cached_property
  def _end_ids(self) -> tuple[int, ...]:
    return tuple(token for token in range(len(self.tokenizer)) if self.decode([token]).endswith("\n"))

"""A model and its tokenizer together: text in, text out."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data.tokens import add_markers, encode_prompt, encode_text, load, stop_ids
from insec_jax.generation.sampler import ConfidenceTrigger, SampledTokens, Sampler, Surprisal, step_scores
from insec_jax.method.transcript import Markers
from insec_jax.model import hf
from insec_jax.progress import Progress
from insec_jax.training.checkpoint import LoadedModel


@dataclasses.dataclass(frozen=True)
class Completion:
  """What a model wrote after one prompt, as text too: without the stop token, markers and other special tokens kept."""

  text: str
  generation: SampledTokens

  @property
  def finished(self) -> bool:
    """Whether the model ended it itself."""
    return self.generation.finish == "stop"


def decode_progress(label: str, total: int) -> Callable[[int, int], None]:
  """Return a function of (prompts done, tokens written) that shows them with tokens/s; the last call ends it."""
  progress = Progress(label, total, unit="prompt", last=True)
  start = time.monotonic()

  def update(done: int, tokens: int) -> None:
    progress.update(done, f"{tokens / (time.monotonic() - start):,.0f} tokens/s")
    if done == total:
      progress.close()

  return update


class TextGenerator:
  """A model ready to continue texts."""

  def __init__(self, opened: LoadedModel, *, compute: str):
    self.sampler = Sampler(opened.config, opened.params, compute=compute)
    self.tokenizer = opened.tokenizer
    self.flag_id, self.fix_id, self._unit = opened.flag_id, opened.fix_id, opened.unit
    self.confidence_ids = opened.confidence_ids
    self._confidence = ConfidenceTrigger(
      (),
      opened.fix_id,
      edges=opened.confidence,
      first_edges=opened.confidence_first,
      confidence_ids=opened.confidence_ids,
    )
    # A folder that no run of ours wrote says nothing of a template: its prompts are taken as they are.
    self.template = "plain" if opened.template is None else opened.template
    self.stop_ids = sorted(stop_ids(opened.config.eos_ids, opened.tokenizer, vocab_size=opened.config.vocab_size))

  def encode(self, prompt: str, *, answer: str = "") -> np.ndarray:
    """Tokens of a prompt and the beginning of its answer, as in training; no special token comes out of either."""
    return encode_prompt(prompt, self.tokenizer, self.template, answer=answer)

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of tokens, special ones included; those of confidence are nothing that was said."""
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
  ) -> list[Completion]:
    """What the model writes after each prompt, as Sampler.generate says; `label` names the work on the progress bar."""
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
      progress=decode_progress(label, len(prompts)),
    )
    return [self.written(one) for one in generations]

  def written(self, generation: SampledTokens) -> Completion:
    """A generation with its text."""
    stopped = generation.finish == "stop"
    return Completion(self.decode(generation.tokens[:-1] if stopped else generation.tokens), generation)

  def read(
    self, prompts: Sequence[str], steps: Sequence[Sequence[str]], *, batch_size: int
  ) -> list[tuple[np.ndarray, list[Surprisal]]]:
    """Each prompt with the beginning of its answer as the model would have it, had it written these steps itself.

    That is the tokens, those of the model's confidence after each step among them where it has any, and its surprise
    at each step: one for each end of line. InputError as `watch`.
    """
    watch = self.watch()
    tokens = [self.encode(prompt) for prompt in prompts]
    starts = [len(some) for some in tokens]
    if not self.confidence_ids:
      tokens = [self.encode(prompt, answer="".join(some)) for prompt, some in zip(prompts, steps, strict=True)]
      logprobs = self.sampler.logprobs(tokens, batch_size=batch_size)
      return [
        (some, [said for *_, said in step_scores(some[start:], of[start:], watch, self.flag_id)])
        for some, of, start in zip(tokens, logprobs, starts, strict=True)
      ]
    # As in training: the prompt and the first step are encoded together, what follows a token of confidence alone.
    encoded = [
      [
        encode_text(step, self.tokenizer) if number else self.encode(prompt, answer=step)
        for number, step in enumerate(some)
      ]
      for prompt, some in zip(prompts, steps, strict=True)
    ]
    surprises: list[list[Surprisal]] = [[] for _ in prompts]
    bins = [[0 if step.endswith("\n") else None for step in some] for some in steps]  # None: nothing is written there
    # The bin of a step hangs on those before it. All are guessed, and read until those read are those guessed: each
    # pass settles one more step at least, and as a rule nearly all.
    open_ = [index for index, some in enumerate(steps) if some]
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
      for index, of in zip(open_, read, strict=True):
        found = step_scores(tokens[index][starts[index] :], of[starts[index] :], watch, self.flag_id)
        surprises[index] = [said for *_, said in found]
        # A step of two lines has one for each, and is as sure as its last: whoever asked sees it by their number.
        said_at = {stop: said for _, stop, said in found}
        after = (
          np.cumsum([len(step) + (bin_ is not None) for step, bin_ in zip(encoded[index], bins[index], strict=True)])
          - starts[index]
        )
        as_read = [
          None if bin_ is None else watch.bin(said_at[stop - 1])
          for bin_, stop in zip(bins[index], after.tolist(), strict=True)
        ]
        if as_read != bins[index]:
          bins[index] = as_read
          again.append(index)
      open_ = again
    return list(zip(tokens, surprises, strict=True))

  def begin(self, prompts: Sequence[str], steps: Sequence[Sequence[str]], *, batch_size: int) -> list[np.ndarray]:
    """What the model reads to go on after these steps: as `read`, at no cost where it has no tokens of confidence."""
    if self.confidence_ids:
      return [token_T for token_T, _ in self.read(prompts, steps, batch_size=batch_size)]
    return [self.encode(prompt, answer="".join(some)) for prompt, some in zip(prompts, steps, strict=True)]

  def has_room(self, begin: np.ndarray, max_tokens: int) -> bool:
    """Whether the model can write so many tokens after this beginning."""
    return len(begin) + max_tokens <= self.sampler.config.max_positions

  def past_confidence(self, tokens: np.ndarray, place: int) -> int:
    """The place after the token of confidence that stands at `place`, or the place itself where none does."""
    return place + (place < len(tokens) and int(tokens[place]) in self.confidence_ids)

  def watch(self, threshold: float = math.inf) -> ConfidenceTrigger:
    """A watch over steps that are lines: a token whose text ends in a newline ends one; a score above gets a flag.

    InputError when the model was trained on steps that are no lines.
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


def with_markers(opened: LoadedModel, config: Config, where: str) -> LoadedModel:
  """The model with the config's markers; one that never had any gets them as at step 0 of training.

  A model that was trained without tokens of confidence goes without, whatever the config says. InputError when it was
  trained with other markers, steps or template than the config's.
  """
  markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
  if opened.markers is not None:
    settings = {
      "tokenizer.flag": (opened.markers.flag, markers.flag),
      "tokenizer.fix": (opened.markers.fix, markers.fix),
      "tokenizer.special": (opened.flag_id is not None, config.tokenizer.special),
      "mistakes.unit": (opened.unit, config.mistakes.unit),
      "data.template": (opened.template, config.data.template),
    }
    for name, (has, wanted) in settings.items():
      if has != wanted:
        raise InputError(
          f"{where} was trained with {name}={has!r}, and the config says {wanted!r}; use the config of that run"
        )
    for name in ("confidence", "confidence_first") if opened.confidence else ():
      has, wanted = getattr(opened, name), getattr(config.tokenizer, name)
      if has != wanted:
        raise InputError(
          f"{where} was trained with tokenizer.{name}={has}, and the config says {wanted}; use the config of that run"
        )
    return opened
  tokenizer = load(config.tokenizer.path) if config.tokenizer.path else opened.tokenizer
  marked = add_markers(
    tokenizer,
    dataclasses.replace(  # it has learned to read none
      config.tokenizer, confidence=(), confidence_first=()
    ),
  )
  params, model_config = opened.params, opened.config
  if len(tokenizer) > model_config.vocab_size:
    params, model_config = hf.grow_vocabulary(
      params, model_config, hf.vocabulary_for(len(tokenizer), model_config.vocab_size)
    )
  return LoadedModel(
    model_config,
    params,
    tokenizer,
    markers,
    marked.flag_id,
    marked.fix_id,
    config.mistakes.unit,
    config.data.template,
    step=opened.step,
  )


def compute_dtype(opened: LoadedModel) -> str:
  """The dtype to compute in: float32 on CPU and for weights stored so; bfloat16 for 16-bit weights on accelerators."""
  return "float32" if jax.default_backend() == "cpu" or opened.params["embed"].dtype.itemsize == 4 else "bfloat16"

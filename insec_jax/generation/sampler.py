"""Sampling from a model: prompts of different lengths decoded in one batch, with the same results as alone.

Prompts are padded on the left to a bucket that depends on their own length only, and no row reads another: the batch
affects a prompt's result only through the order of float32 sums. Finished rows are removed from a batch once the rest
fits a smaller batch size; until then they cost as much as the others.

    weights               Sampler.params, cast once
    compiled programs     decoding.py, shared by all samplers: one per config and shape
    queue of prompts      batching.batches
    cache                 DecodeState.cache, that of one batch, donated from call to call
    random keys           decoding.draw, from the seed, the number of the prompt and that of the token
    flags, confidence     confidence.py: which tokens are banned and forced
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from insec_jax.command import DivergedError, InputError
from insec_jax.generation import batching, decoding
from insec_jax.generation.batching import Batch
from insec_jax.generation.confidence import ConfidenceTrigger, token_rules
from insec_jax.generation.decoding import NO_PROMPT, DecodeOptions, DecodeState
from insec_jax.model import llama


@dataclasses.dataclass(frozen=True)
class SampledTokens:
  """The tokens that a model wrote after one prompt.

  `tokens` ends with the stop token when `finish` is "stop"; "length" means that max_tokens were written without one.
  `logprobs` are those of the tokens chosen, under the model's own distribution: temperature 1, no top_p, no flag_bias.
  `flag_logprobs`, of the same distributions, are those of the flag in each token's place, and `margins` the flag's
  logit minus the best other one there; None without a flag_id.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  finish: str
  flag_logprobs: np.ndarray | None
  margins: np.ndarray | None


class Sampler:
  """A model ready to decode: holds the weights once."""

  def __init__(self, config: llama.LlamaConfig, params, *, compute: str):
    self.config = config
    self.compute = jnp.dtype(compute)
    self.params = decoding.ready(params, config=config, compute=self.compute)
    self._room = 0  # the largest max_tokens so far: smaller requests reuse it without compiling

  def generate(
    self,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int],
    flag_id: int | None = None,
    flag_bias: float = 0.0,
    watch: ConfidenceTrigger | None = None,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
  ) -> list[SampledTokens]:
    """Return one SampledTokens per prompt, in order; a prompt's result does not depend on the other prompts.

    Temperature 0 is greedy. Otherwise the draw of step s of prompt i depends on (seed, i, s) only; it is from the
    distribution at `temperature`, cut to the most likely tokens that hold `top_p` of it. `flag_bias` is added to the
    flag's logit before both; -inf bans the flag. Tokens that `watch` forces are among the tokens, with the log p that
    the model gave them; they replace only their own draws. `progress` is called with (prompts done, tokens written)
    after every batch. Raises InputError when a prompt or an option is out of range.
    """
    _check_options(temperature, top_p, max_tokens, flag_id, flag_bias)
    if watch is not None:
      watch.check(flag_id)
    self._check_prompts(prompts, max_tokens)
    self._room = max(self._room, max_tokens)
    rules = token_rules(watch, stop_ids=stop_ids, flag_id=flag_id, flag_bias=flag_bias)
    # Plain Python numbers, as in `token_rules`.
    options = DecodeOptions(jax.random.key(seed), float(temperature), float(top_p), rules)
    results: dict[int, SampledTokens] = {}
    for batch in batching.batches(prompts, batch_size):
      for index, sampled in self._decode(batch, options, max_tokens=max_tokens, cut=top_p < 1):
        results[index] = sampled if flag_id is not None else _without_flag(sampled)
      if progress is not None:
        progress(len(results), sum(len(result.tokens) for result in results.values()))
    return [results[index] for index in range(len(prompts))]

  def _decode(
    self, batch: Batch, options: DecodeOptions, *, max_tokens: int, cut: bool
  ) -> Iterator[tuple[int, SampledTokens]]:
    """Yield (index, SampledTokens) for each needed row when it has ended; a row may come twice, unchanged."""
    first = batch.token_BP.shape[1]
    end = first + max_tokens
    state = decoding.begin(
      self.params,
      *batch,
      flag=options.rules.flag,
      fix=options.rules.fix,
      config=self.config,
      compute=self.compute,
      room=self._room,
    )
    while True:
      sizes = batching.sizes(len(state.live_B))
      state = decoding.decode(self.params, state, options, end=end, few=[0, *sizes][-2], config=self.config, cut=cut)
      host = jax.device_get(state._replace(cache=None, trigger=None))
      ended_B = ~host.live_B | (host.slot == end)
      for row in np.flatnonzero(ended_B & (host.index_B != NO_PROMPT)):
        yield int(host.index_B[row]), _sampled(host, row, first)
      if ended_B.all():
        return
      num = batching.size_for(host.live_B.sum(), sizes[-1])
      state = decoding.keep_rows(state, np.argsort(~host.live_B, stable=True)[:num].astype(np.int32))

  def logprobs(self, texts: Sequence[np.ndarray], *, batch_size: int) -> list[np.ndarray]:
    """Return for each text the log p of each token given those before it; 0 for the first."""
    self._check_prompts(texts, 0)
    results = [np.zeros(len(text), np.float32) for text in texts]
    for token_BP, start_B, index_B in batching.batches(texts, batch_size):
      logprob_BP = np.asarray(
        decoding.text_logprobs(self.params, token_BP, start_B, config=self.config, compute=self.compute)
      )
      for row in np.flatnonzero(index_B != NO_PROMPT):
        _check_finite(logprob_BP[row, start_B[row] + 1 :], int(index_B[row]))
        results[index_B[row]][1:] = logprob_BP[row, start_B[row] + 1 :]
    return results

  def _check_prompts(self, prompts: Sequence[np.ndarray], max_tokens: int) -> None:
    for index, prompt in enumerate(prompts):
      try:
        check_prompt(prompt, self.config, max_tokens)
      except InputError as error:
        raise InputError(f"prompt {index + 1}: {error}") from error


def _sampled(host: DecodeState, row: int, first: int) -> SampledTokens:
  """Return the tokens that an ended row of a state on the host has written from slot `first` on."""
  written = slice(first, first + host.num_B[row])
  _check_finite(host.logprob_BS[row, written], int(host.index_B[row]))
  return SampledTokens(
    host.token_BS[row, written],
    host.logprob_BS[row, written],
    "length" if host.live_B[row] else "stop",
    host.flag_BS[row, written],
    host.margin_BS[row, written],
  )


def _without_flag(sampled: SampledTokens) -> SampledTokens:
  return dataclasses.replace(sampled, flag_logprobs=None, margins=None)


def check_prompt(token_T: np.ndarray, config: llama.LlamaConfig, max_tokens: int) -> None:
  """Raise InputError when a prompt is empty, holds an id outside the vocabulary, or leaves no room to write."""
  if not len(token_T):
    raise InputError("the prompt is empty and the tokenizer puts nothing in front; give at least one token")
  for token in (min(token_T), max(token_T)):
    if not 0 <= token < config.vocab_size:
      raise InputError(f"token id {token} is not in the vocabulary; ids go from 0 to {config.vocab_size - 1}")
  if len(token_T) + max_tokens > config.max_positions:
    raise InputError(
      f"{len(token_T)} tokens and max_tokens={max_tokens} more do not fit in the model's "
      f"{config.max_positions} positions; shorten the prompt or lower max_tokens"
    )


def _check_finite(logprob_T: np.ndarray, index: int) -> None:
  """Raise DivergedError unless the log p of all tokens of this prompt are finite."""
  if not np.isfinite(logprob_T).all():
    token = int(np.flatnonzero(~np.isfinite(logprob_T))[0])
    raise DivergedError(
      f"the model's logits are not finite at token {token + 1} of prompt {index + 1}: its "
      "activations overflow; use another checkpoint, or precision.compute='float32'"
    )


def _check_options(temperature, top_p, max_tokens, flag_id, flag_bias) -> None:
  if not 0 <= temperature < math.inf:
    raise InputError(f"temperature={temperature}; must be a number of at least 0")
  if not 0 < top_p <= 1:
    raise InputError(f"top_p={top_p}; must be above 0 and at most 1")
  if max_tokens < 1:
    raise InputError(f"max_tokens={max_tokens}; must be at least 1")
  if math.isnan(flag_bias) or flag_bias == math.inf:
    raise InputError(f"flag_bias={flag_bias}; must be a number, or -inf to ban the flag")
  if flag_bias and flag_id is None:
    raise InputError(f"flag_bias={flag_bias} needs a model that has a flag token, and this one has none; leave it at 0")

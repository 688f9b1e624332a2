"""Sampling from a model: prompts of different lengths decoded in one batch, with the same results as alone.

Prompts are padded on the left to a bucket, and no row reads another: the batch and the mesh affect a prompt's result
only through the order of float32 sums. A row that has ended takes the next prompt from the queue. Once none waits, rows
that have ended are removed when the rest fits a smaller batch; until then they cost as much as the others.

    weights               Sampler.params, laid out once: heads, MLP width and vocabulary over `tensor`
    compiled programs     decoding.py, shared by all samplers: one per config, mesh and shape
    queue of prompts      batching.Queue
    cache                 DecodeState.cache, that of one batch, donated from call to call
    random keys           decoding.draw, from the seed, the number of the prompt and that of the token
    flags, confidence     confidence.py: which tokens are banned and forced
    mistakes.rewind       rewinding.py: what is no longer read after a correction
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from insec_jax.command import DivergedError, InputError
from insec_jax.generation import batching, beam, decoding, rewinding
from insec_jax.generation.batching import Queue
from insec_jax.generation.confidence import ConfidenceTrigger, TokenRules, token_rules
from insec_jax.generation.decoding import NO_PROMPT, DecodeOptions, DecodeState
from insec_jax.model import attention, llama
from insec_jax.model.attention import Attention


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
  """A model ready to decode on a mesh: holds the weights once.

  `row_steps` counts the tokens that all rows have written or could have written, `num_tokens` those that were needed.
  """

  def __init__(self, config: llama.LlamaConfig, params, *, compute: str, mesh: Mesh, kind_V: np.ndarray | None = None):
    """`params` are laid out for decoding on the mesh, in the dtype `compute` (placement.place, placement.moved).

    With the kinds of tokens (vocabulary.token_kinds), what follows a correction does not read its mistake.
    """
    self.config, self.params, self.mesh = config, params, mesh
    self.kind_V = rewinding.kinds_for(kind_V, config.vocab_size)
    self.compute = jnp.dtype(compute)
    self.row_steps = self.num_tokens = 0
    self._room = 0  # the largest max_tokens so far: smaller requests reuse it without compiling

  def reserve(self, max_tokens: int) -> None:
    """Make room for texts of this length in all later calls: the last bits of a log p depend on the size of the cache.

    `generate` does so itself.
    """
    self._room = max(self._room, max_tokens)

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
    first: int = 0,
    progress: Callable[[int, int], None] | None = None,
  ) -> list[SampledTokens]:
    """Return one SampledTokens per prompt, in order; a prompt's result does not depend on the other prompts.

    Temperature 0 is greedy. Otherwise the draw of step s of prompt i depends on (seed, first + i, s) only; it is from
    the distribution at `temperature`, cut to the most likely tokens that hold `top_p` of it. `flag_bias` is added to
    the flag's logit before both; -inf bans the flag. Tokens that `watch` forces are among the tokens, with the log p
    that the model gave them; they replace only their own draws. `progress` is called with (prompts done, tokens
    written) whenever a prompt is done. Raises InputError when a prompt or an option is out of range.
    """
    check_options(temperature, top_p, max_tokens, flag_id, flag_bias)
    if watch is not None:
      watch.check(flag_id)
    check_prompts(prompts, self.config, max_tokens)
    self.reserve(max_tokens)
    rules = token_rules(watch, stop_ids=stop_ids, flag_id=flag_id, flag_bias=flag_bias, kind_V=self.kind_V)
    # Plain Python numbers, as in `token_rules`.
    options = DecodeOptions(jax.random.key(seed), max_tokens, float(temperature), float(top_p), rules)
    results: dict[int, SampledTokens] = {}
    num_tokens = 0
    for index, sampled in (
      self._decode(prompts, options, first=first, batch_size=batch_size, cut=top_p < 1) if prompts else ()
    ):
      results[index] = sampled if flag_id is not None else _without_flag(sampled)
      num_tokens += len(sampled.tokens)
      if progress is not None:
        progress(len(results), num_tokens)
    self.num_tokens += num_tokens
    return [results[index] for index in range(len(prompts))]

  def _decode(
    self, prompts: Sequence[np.ndarray], options: DecodeOptions, *, first: int, batch_size: int, cut: bool
  ) -> Iterator[tuple[int, SampledTokens]]:
    """Yield (index, SampledTokens) of each prompt when it has ended."""
    queue = Queue(prompts, batch_size=batch_size, mesh=self.mesh)
    state = decoding.begin(
      config=self.config,
      compute=self.compute,
      mesh=self.mesh,
      rows=queue.rows,
      slots=queue.longest + self._room,
      rewinds=self.kind_V is not None,
    )
    while True:
      state = self._fill(state, queue, options, first)
      smaller = [size for size in batching.sizes(queue.rows, self.mesh) if size < queue.rows]
      num_live = int((~queue.free_B).sum())
      few = queue.rows - queue.num_of_pass if queue else min(max(smaller, default=0), num_live - 1)
      before = int(state.slot)
      state = decoding.decode(self.params, state, options, few=few, config=self.config, cut=cut, mesh=self.mesh)
      host = jax.device_get(state._replace(cache=None, trigger=None, rewound=None))
      self.row_steps += queue.rows * (int(host.slot) - before)
      for row in np.flatnonzero(~host.live_B & ~queue.free_B):
        queue.free_B[row] = True
        index = int(host.index_B[row]) - first
        yield index, _sampled(host, row, len(prompts[index]), options)
      if queue:
        continue
      if queue.free_B.all():
        return
      for size in smaller:
        if (row_C := queue.keep(size)) is not None:
          state = decoding.keep_rows(state, row_C, mesh=self.mesh)
          break

  def _fill(self, state: DecodeState, queue: Queue, options: DecodeOptions, first: int) -> DecodeState:
    """Return the state with prompts in all free rows, as long as there are prompts."""
    while queue and queue.free_B.any():
      slots = queue.longest + self._room
      if slots > state.token_BS.shape[1]:
        state = decoding.resize(state, mesh=self.mesh, slots=slots)
      batch, row_R = queue.take()
      state = decoding.fill(
        self.params,
        state,
        batch.token_RP,
        batch.start_R,
        np.where(batch.index_R == NO_PROMPT, NO_PROMPT, batch.index_R + first),
        row_R,
        options.rules,
        rewinding.of_prompts(batch.token_RP, batch.start_R, self.kind_V),
        config=self.config,
        attention=self._attention(batch.token_RP.shape[1]),
        mesh=self.mesh,
      )
    return state

  def beam(
    self,
    prompts: Sequence[np.ndarray],
    *,
    width: int,
    max_tokens: int,
    stop_ids: Sequence[int],
    flag_id: int | None = None,
    watch: ConfidenceTrigger | None = None,
    excluded: Sequence[np.ndarray] | None = None,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
  ) -> list[tuple[SampledTokens, int]]:
    """Return the likeliest text of `width` beams after each prompt (beam.py), and the tokens of all its beams.

    The flag is banned. `excluded` has the tokens of one text a prompt that is not returned, its stop token included.
    Raises InputError when a prompt or an option is out of range.
    """
    check_options(0.0, 1.0, max_tokens, flag_id, -math.inf if flag_id is not None else 0.0)
    check_prompts(prompts, self.config, max_tokens)
    rules = token_rules(
      watch,
      stop_ids=stop_ids,
      flag_id=flag_id,
      flag_bias=0.0 if flag_id is None else -math.inf,
      kind_V=self.kind_V,
    )
    results: dict[int, tuple[SampledTokens, int]] = {}
    num_tokens = 0
    for indices in beam.batches(prompts, width=width, batch_size=batch_size, mesh=self.mesh):
      state = self._repeated(prompts, indices, rules, width=width, room=max_tokens)
      found = jax.device_get(
        beam.search(
          self.params,
          state,
          beam.padded_excluded(excluded, indices),
          max_tokens,
          rules,
          width=width,
          room=max_tokens,
          config=self.config,
          mesh=self.mesh,
        )
      )
      for row, index in enumerate(indices):
        if index != NO_PROMPT:
          results[index] = _of_beams(found, row, index), width * int(found.steps_G[row])
          num_tokens += results[index][1]
      if progress is not None:
        progress(len(results), num_tokens)
    return [results[index] for index in range(len(prompts))]

  def _repeated(
    self, prompts: Sequence[np.ndarray], indices: Sequence[int], rules: TokenRules, *, width: int, room: int
  ) -> DecodeState:
    """Return the state of a batch with each of these prompts read into `width` rows."""
    batch, mesh = batching.padded(prompts, indices, rows=len(indices)), self.mesh
    num_here = len(indices) // batching.rows_over(mesh)
    length = batch.token_RP.shape[1]
    state = decoding.begin(
      config=self.config,
      compute=self.compute,
      mesh=mesh,
      rows=len(indices),
      slots=length + room,
      rewinds=self.kind_V is not None,
    )
    row_R = np.tile(np.arange(num_here, dtype=np.int32), batching.rows_over(mesh))
    state = decoding.fill(
      self.params,
      state,
      batch.token_RP,
      batch.start_R,
      batch.index_R,
      row_R,
      rules,
      rewinding.of_prompts(batch.token_RP, batch.start_R, self.kind_V),
      config=self.config,
      attention=self._attention(length),
      mesh=mesh,
    )
    return decoding.keep_rows(state, np.repeat(row_R, width), mesh=mesh)

  def _attention(self, length: int) -> Attention:
    """Return the attention over prompts of so many slots."""
    device = self.mesh.devices.flat[0]
    return attention.choose(
      device.platform,
      device_kind=device.device_kind,
      head_width=self.config.head_width,
      row_length=length,
      compute=self.compute.name,
      rewind=self.kind_V is not None,
    )[0]

  def logprobs(self, texts: Sequence[np.ndarray], *, batch_size: int) -> list[np.ndarray]:
    """Return for each text the log p of each token given those before it; 0 for the first."""
    check_prompts(texts, self.config, 0)
    results = [np.zeros(len(text), np.float32) for text in texts]
    for batch in batching.texts_in_batches(texts, batch_size, self.mesh):
      logprob_RP = np.asarray(
        decoding.text_logprobs(
          self.params,
          batch.token_RP,
          batch.start_R,
          rewinding.of_prompts(batch.token_RP, batch.start_R, self.kind_V),
          config=self.config,
          compute=self.compute,
          attention=self._attention(batch.token_RP.shape[1]),
          mesh=self.mesh,
        )
      )
      for row in np.flatnonzero(batch.index_R != NO_PROMPT):
        logprob_T = logprob_RP[row, batch.start_R[row] + 1 :]
        check_finite(logprob_T, int(batch.index_R[row]))
        results[batch.index_R[row]][1:] = logprob_T
    return results

  def streams(
    self, texts: Sequence[np.ndarray], places: Sequence[Sequence[int]], *, batch_size: int
  ) -> list[np.ndarray]:
    """Return for each text the stream before the output matrix, float32 [places, width], at the tokens of `places`."""
    check_prompts(texts, self.config, 0)
    results = [np.zeros((len(wanted), self.config.width), np.float32) for wanted in places]
    num = 1 << max(0, max(map(len, places), default=1) - 1).bit_length()
    for batch in batching.texts_in_batches(texts, batch_size, self.mesh):
      slot_RJ = np.zeros((len(batch.index_R), num), np.int32)
      rows = np.flatnonzero(batch.index_R != NO_PROMPT)
      for row in rows:
        wanted = places[batch.index_R[row]]
        slot_RJ[row, : len(wanted)] = batch.start_R[row] + np.asarray(wanted, np.int32)
      stream_RJD = np.asarray(
        decoding.text_streams(
          self.params,
          batch.token_RP,
          batch.start_R,
          slot_RJ,
          rewinding.of_prompts(batch.token_RP, batch.start_R, self.kind_V),
          config=self.config,
          compute=self.compute,
          attention=self._attention(batch.token_RP.shape[1]),
          mesh=self.mesh,
        )
      )
      for row in rows:
        index = int(batch.index_R[row])
        results[index] = stream_RJD[row, : len(places[index])]
        check_finite(results[index].sum(-1), index)
    return results


def _of_beams(found: beam.Found, row: int, index: int) -> SampledTokens:
  """Return the text that a search on the host has found for a group."""
  num = int(found.num_G[row])
  logprobs = found.logprob_GN[row, :num]
  check_finite(logprobs, index)
  return SampledTokens(found.token_GN[row, :num], logprobs, "stop" if found.ended_G[row] else "length", None, None)


def _sampled(host: DecodeState, row: int, length: int, options: DecodeOptions) -> SampledTokens:
  """Return the tokens that an ended row of a state on the host has written after a prompt of this length."""
  first = int(host.start_B[row]) + length
  place_T = np.arange(first, first + int(host.num_B[row])) % host.token_BS.shape[1]
  tokens, logprobs = host.token_BS[row, place_T], host.logprob_BS[row, place_T]
  check_finite(logprobs, int(host.index_B[row]))
  finish = "stop" if tokens[-1] in options.rules.stop_U else "length"
  return SampledTokens(tokens, logprobs, finish, host.flag_BS[row, place_T], host.margin_BS[row, place_T])


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


def check_prompts(prompts: Sequence[np.ndarray], config: llama.LlamaConfig, max_tokens: int) -> None:
  """Raise InputError, with the number of the prompt, as `check_prompt` does."""
  for index, prompt in enumerate(prompts):
    try:
      check_prompt(prompt, config, max_tokens)
    except InputError as error:
      raise InputError(f"prompt {index + 1}: {error}") from error


def check_finite(logprob_T: np.ndarray, index: int) -> None:
  """Raise DivergedError unless the log p of all tokens of this prompt are finite."""
  if not np.isfinite(logprob_T).all():
    token = int(np.flatnonzero(~np.isfinite(logprob_T))[0])
    raise DivergedError(
      f"the model's logits are not finite at token {token + 1} of prompt {index + 1}: its "
      "activations overflow; use another checkpoint, or precision.compute='float32'"
    )


def check_options(temperature, top_p, max_tokens, flag_id, flag_bias) -> None:
  """Raise InputError when an option of `Sampler.generate` is out of range."""
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

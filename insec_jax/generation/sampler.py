"""Sampling from a model: prompts of different lengths decoded in one batch, with the same results as alone.

Prompts are padded on the left to a bucket that depends on their own length only, and no row reads another: the batch
affects a prompt's result only through the order of float32 sums. Finished rows are removed from a batch once the rest
fits a smaller batch size; until then they cost as much as the others. Batches have few sizes, and one program serves
greedy decoding, sampling and forced tokens: on a small model compiling would take longer than decoding.

      slot      0   1   2   3 | 4   5   6        start 2: the slots before it are padding, masked everywhere
      token     .   .   A   B | c   d   <end>    A B the prompt, c d <end> chosen
      position  .   .   0   1 | 2   3   4

Letters as in model/llama.py, and P slot of the padded prompt, U stop token, E token that ends a step, K edge or
bin of confidence, J edge of first tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from insec_jax.command import DivergedError, InputError
from insec_jax.model import llama

SHORTEST = 32  # slots; shorter prompts are padded to this
PREFILL_TOKENS = 512  # tokens of a prompt per forward pass: bounds the attention scores of a long prompt
READ = 32  # tokens of a text whose logits are computed at once: bounds the logits
FEWEST = 64  # rows of the smallest batch, unless batch_size is less: smaller ones compile anew and save little
STOPS = 8  # the number of stop tokens is padded to a multiple of this, so that one more needs no new compilation
MEMORY, MOST_ROWS = 1 << 30, 256  # bytes of a batch, and rows: `rows_that_fit`
NO_TOKEN = -1
# Fields of a batch's state that are copied to the host.
HOST_FIELDS = ("index_B", "live_B", "num_B", "token_BS", "logprob_BS", "flag_BS", "margin_BS")


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


@dataclasses.dataclass(frozen=True)
class ConfidenceTrigger:
  """Tokens forced while decoding, chosen from the model's confidence in each step.

      tokens    d  c  7  \n  <sure 2>  <flag>  ...  <fix>  d  c  8  \n  <sure 0>
      forced                  *         *                                 *
      score        *  *  *                                     *  *  *

  The score of a step is the largest -log p of its tokens without the first, which only chooses the topic. The bin of
  confidence is the bin of the score, subdivided by that of the first token where there are `first_edges`. A step begins
  after the end of another, after the tokens forced there, and after the fix; tokens between a flag and its fix are no
  step. Where no flag is open, in the prompt or after it, the fix is banned: it would close nothing, and the end of the
  step that it cuts short would not be detected.
  """

  end_ids: tuple[int, ...]  # tokens that end a step
  fix_id: int | None
  threshold: float = math.inf  # a step with a score above it gets a flag
  edges: tuple[float, ...] = ()  # scores, ascending, between the bins of confidence
  first_edges: tuple[float, ...] = ()  # the same for the first token, within each bin; empty: no subdivision
  confidence_ids: tuple[int, ...] = ()  # token written after a step of each bin, and nowhere else; empty: none

  def bin_of(self, surprisal: "Surprisal") -> int:
    """Return the bin of confidence of a step, 0 for the highest confidence."""
    return sum(surprisal.score > edge for edge in self.edges) * (len(self.first_edges) + 1) + sum(
      surprisal.first > edge for edge in self.first_edges
    )


class Surprisal(NamedTuple):
  """-log p of the first token of a step, and the largest -log p of the others, its score; 0 without such a token."""

  first: float
  score: float

  @classmethod
  def of(cls, logprob_T: np.ndarray) -> "Surprisal":
    """Return the surprisal of a step whose tokens have these log p."""
    return cls(*(float(np.max(-part_T, initial=0.0)) for part_T in (logprob_T[:1], logprob_T[1:])))


class Sampler:
  """A model ready to decode: holds the weights once, compiles once per shape."""

  def __init__(self, config: llama.LlamaConfig, params, *, compute: str):
    self.config = config
    self.compute = jnp.dtype(compute)
    self.params = _ready(params, config=config, compute=self.compute)
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
    if watch is None:
      watch = ConfidenceTrigger(end_ids=(), fix_id=None)  # detects no step, forces nothing
    else:
      _check_watch(watch, flag_id)
    self._check_prompts(prompts, max_tokens)
    self._room = max(self._room, max_tokens)
    # Plain Python numbers: a NumPy scalar has another type and would compile again.
    options = {
      "stop_U": _padded(stop_ids, STOPS),
      "key": jax.random.key(seed),
      "temperature": float(temperature),
      "top_p": float(top_p),
      "flag": NO_TOKEN if flag_id is None else int(flag_id),
      "flag_bias": float(flag_bias),
      "end_E": _padded(watch.end_ids, STOPS),
      "fix": NO_TOKEN if watch.fix_id is None else int(watch.fix_id),
      "threshold": float(watch.threshold),
      "edge_K": np.array(watch.edges, np.float32),
      "first_edge_J": np.array(watch.first_edges, np.float32),
      "confidence_K": np.array(watch.confidence_ids, np.int32),
    }
    results: dict[int, SampledTokens] = {}
    for batch in _batches(prompts, batch_size):
      for index, generation in self._decode(*batch, options, max_tokens=max_tokens, cut=top_p < 1):
        results[index] = (
          generation if flag_id is not None else dataclasses.replace(generation, flag_logprobs=None, margins=None)
        )
      if progress is not None:
        progress(len(results), sum(len(result.tokens) for result in results.values()))
    return [results[index] for index in range(len(prompts))]

  def _decode(self, token_BP, start_B, index_B, options, *, max_tokens, cut) -> Iterator[tuple[int, SampledTokens]]:
    """Yield (index, SampledTokens) for each needed row when it has ended; a row may come twice, unchanged."""
    slot = first = token_BP.shape[1]
    end = first + max_tokens
    is_step_B = _is_step(token_BP, start_B, options["flag"], options["fix"])
    state = _begin(
      self.params, token_BP, start_B, index_B, is_step_B, config=self.config, compute=self.compute, room=self._room
    )
    while True:
      sizes = _sizes(len(state["live_B"]))
      slot, state = _write(
        self.params, state, options, first=first, slot=slot, end=end, few=[0, *sizes][-2], config=self.config, cut=cut
      )
      slot, host = jax.device_get((slot, {name: state[name] for name in HOST_FIELDS}))
      slot, live_B = int(slot), host["live_B"]
      ended_B = ~live_B | (slot == end)
      for row in np.flatnonzero(ended_B & (host["index_B"] != NO_TOKEN)):
        written = slice(first, first + host["num_B"][row])
        _check_finite(host["logprob_BS"][row, written], int(host["index_B"][row]))
        yield (
          int(host["index_B"][row]),
          SampledTokens(
            host["token_BS"][row, written],
            host["logprob_BS"][row, written],
            "length" if live_B[row] else "stop",
            host["flag_BS"][row, written],
            host["margin_BS"][row, written],
          ),
        )
      if ended_B.all():
        return
      C = next(size for size in sizes if size >= live_B.sum())
      state = _rows(state, np.argsort(~live_B, stable=True)[:C].astype(np.int32))

  def logprobs(self, texts: Sequence[np.ndarray], *, batch_size: int) -> list[np.ndarray]:
    """Return for each text the log p of each token given those before it; 0 for the first."""
    self._check_prompts(texts, 0)
    results = [np.zeros(len(text), np.float32) for text in texts]
    for token_BP, start_B, index_B in _batches(texts, batch_size):
      logprob_BP = np.asarray(_text_logprobs(self.params, token_BP, start_B, config=self.config, compute=self.compute))
      for row in np.flatnonzero(index_B != NO_TOKEN):
        _check_finite(logprob_BP[row, start_B[row] + 1 :], int(index_B[row]))
        results[index_B[row]][1:] = logprob_BP[row, start_B[row] + 1 :]
    return results

  def _check_prompts(self, prompts: Sequence[np.ndarray], max_tokens: int) -> None:
    for index, prompt in enumerate(prompts):
      try:
        check_prompt(prompt, self.config, max_tokens)
      except InputError as error:
        raise InputError(f"prompt {index + 1}: {error}") from error


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


def _check_watch(watch: ConfidenceTrigger, flag_id: int | None) -> None:
  if not watch.end_ids:
    raise ValueError("a watch without tokens that end a step never sees one")
  for edges in (watch.edges, watch.first_edges):
    if list(edges) != sorted(set(edges)):
      raise InputError(f"edges of confidence {edges}; must ascend")
  num = (len(watch.edges) + 1) * (len(watch.first_edges) + 1)
  if watch.confidence_ids and len(watch.confidence_ids) != num:
    raise InputError(
      f"edges of confidence {watch.edges}, of first tokens {watch.first_edges}, need {num} tokens, not "
      f"{len(watch.confidence_ids)}"
    )
  if math.isnan(watch.threshold):
    raise InputError("the score above which a step is flagged is nan; must be a number, or inf for never")
  if watch.threshold < math.inf and flag_id is None:
    raise InputError(
      f"flagging steps with a score above {watch.threshold} needs a model that has a flag token, and this one has none"
    )


def _padded(ids: Sequence[int], multiple: int) -> np.ndarray:
  """Return the ids, padded with NO_TOKEN to a multiple; at least one NO_TOKEN is added."""
  return np.array([*ids, *[NO_TOKEN] * (multiple - len(ids) % multiple)], np.int32)


def rows_that_fit(config: llama.LlamaConfig, *, slots: int, compute: str) -> int:
  """Return how many rows of `slots` tokens to decode at once: a power of two, from 1 to MOST_ROWS.

  Cache, attention scores and logits stay below a quarter of the device's memory, or below MEMORY if it is unknown.
  """
  cache = 2 * config.num_layers * config.num_kv_heads * config.head_width * slots * jnp.dtype(compute).itemsize
  scores = 4 * config.num_heads * slots * min(slots, PREFILL_TOKENS)
  logits = 4 * 4 * config.vocab_size
  stats = jax.devices()[0].memory_stats()
  memory = MEMORY if stats is None else stats["bytes_limit"] // 4
  rows = memory // (cache + scores + logits)
  return min(MOST_ROWS, 1 << max(0, rows.bit_length() - 1))


def bucket(length: int) -> int:
  """Return the slots that a prompt of `length` tokens is padded to: the next power of two, at least SHORTEST."""
  return max(SHORTEST, 1 << (length - 1).bit_length())


def _sizes(most: int) -> list[int]:
  """Return the allowed numbers of rows for batches of at most `most`, ascending; few, since each compiles anew."""
  sizes = [FEWEST]
  while sizes[-1] < most:
    sizes.append(4 * sizes[-1])
  return [*(size for size in sizes if size < most), most]


def _batches(prompts: Sequence[np.ndarray], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yield (token_BP, start_B, index_B) until every prompt came once; prompt `index` begins at slot `start` of its row.

  The shortest bucket comes first; unused rows have index NO_TOKEN.
  """
  by_bucket: dict[int, list[int]] = {}
  for index, prompt in enumerate(prompts):
    by_bucket.setdefault(bucket(len(prompt)), []).append(index)
  for P, indices in sorted(by_bucket.items()):
    for first in range(0, len(indices), batch_size):
      batch = indices[first : first + batch_size]
      B = next(size for size in _sizes(batch_size) if size >= len(batch))
      token_BP = np.zeros((B, P), np.int32)
      start_B = np.full(B, P - 1, np.int32)  # an unused row reads one token: reading none gives nan
      index_B = np.full(B, NO_TOKEN, np.int32)
      for row, index in enumerate(batch):
        start_B[row] = P - len(prompts[index])
        token_BP[row, start_B[row] :] = prompts[index]
        index_B[row] = index
      yield token_BP, start_B, index_B


def _is_step(token_BP: np.ndarray, start_B: np.ndarray, flag_id: int, fix_id: int) -> np.ndarray:
  """Return whether no flag is open at the end of each prompt, bool [B]."""
  slot_P = np.arange(token_BP.shape[1])
  flag_B, fix_B = (
    np.where((token_BP == token) & (slot_P >= start_B[:, None]), slot_P, -1).max(1) for token in (flag_id, fix_id)
  )
  return flag_B <= fix_B


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _ready(params, *, config, compute):
  """Return the params cast and unstacked once instead of at every token; the model would cast them in the same way."""
  return llama.unstack(jax.tree.map(lambda weight: weight.astype(compute), params), config)


def _read_prompt(params, token_BP, start_B, *, config, compute, room):
  """Return (stream after the last token of each prompt, the cache with `room` free slots after the prompt)."""
  B, P = token_BP.shape
  width = min(P, PREFILL_TOKENS)  # both are powers of two: the chunks fill the prompt exactly
  cache = llama.make_cache(config, B, P + room, compute)

  def read(chunk, carried):
    cache, _ = carried
    token_BT = jax.lax.dynamic_slice_in_dim(token_BP, chunk * width, width, 1)
    stream_BTD, cache = llama.forward_cached(config, params, token_BT, start_B, chunk * width, cache)
    return cache, stream_BTD[:, -1]

  cache, last_BD = jax.lax.fori_loop(0, P // width, read, (cache, jnp.zeros((B, config.width), compute)))
  return last_BD, cache


def _logprobs(params, stream_BD, *, config):
  """Return the log p of the next token of each row, float32."""
  return jax.nn.log_softmax(llama.logits(params, config, stream_BD[:, None])[:, 0])


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _text_logprobs(params, token_BP, start_B, *, config, compute):
  """Return the log p of each token of a text given those before it; undefined up to the first token."""
  B, P = token_BP.shape
  width = min(P, READ)
  target_BP = jnp.roll(token_BP, -1, axis=1)

  def read(chunk, carried):
    cache, logprob_BP = carried
    first = chunk * width
    token_BT, target_BT = (
      jax.lax.dynamic_slice_in_dim(array_BP, first, width, 1) for array_BP in (token_BP, target_BP)
    )
    stream_BTD, cache = llama.forward_cached(config, params, token_BT, start_B, first, cache)
    logprob_BTV = jax.nn.log_softmax(llama.logits(params, config, stream_BTD))
    target_logprob_BT = jnp.take_along_axis(logprob_BTV, target_BT[..., None], 2)[..., 0]
    return cache, jax.lax.dynamic_update_slice_in_dim(logprob_BP, target_logprob_BT, first, 1)

  cache = llama.make_cache(config, B, P, compute)
  _, logprob_BP = jax.lax.fori_loop(0, P // width, read, (cache, jnp.zeros((B, P))))
  return jnp.roll(logprob_BP, 1, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "compute", "room"))
def _begin(params, token_BP, start_B, index_B, is_step_B, *, config, compute, room):
  """Return the state of a batch whose prompts have been read, with `room` free slots; see `_write` for its content."""
  B, P = token_BP.shape
  _, cache = _read_prompt(params, token_BP, start_B, config=config, compute=compute, room=room)
  none_BS = jnp.zeros((B, P + room))
  return {
    "start_B": start_B,
    "index_B": index_B,
    "live_B": index_B != NO_TOKEN,
    "num_B": jnp.zeros(B, jnp.int32),
    "token_BS": jnp.pad(token_BP, ((0, 0), (0, room))),
    "logprob_BS": none_BS,
    "flag_BS": none_BS,
    "margin_BS": none_BS,
    "cache": cache,
    "watch": {
      "num_B": jnp.zeros(B, jnp.int32),
      "first_B": jnp.zeros(B),
      "score_B": jnp.zeros(B),
      "is_step_B": is_step_B,
      "bin_B": jnp.full(B, NO_TOKEN, jnp.int32),
      "flags_B": jnp.full(B, False),
    },
  }


@jax.jit
def _rows(state, row_C):
  """Return the state of these rows alone."""
  return jax.tree.map(lambda array: array[row_C], state)


@functools.partial(jax.jit, static_argnames=("config", "cut"), donate_argnames="state")
def _write(params, state, options, *, first, slot, end, few, config, cut):
  """Return (slot, the state with all slots before it written): slot `end`, or the first with at most `few` live rows.

  `first` is the slot of the first token after the prompts. The state holds the fields of `SampledTokens`, each number
  in the slot of its token, and the tokens of the prompts; `num_B` is the number of tokens written, and `live_B`
  whether no stop token has ended the row.
  """
  flag_id = options["flag"]
  bias_1V = jnp.where(jnp.arange(config.vocab_size) == flag_id, options["flag_bias"], 0.0)[None]
  bias_1V = bias_1V.at[:, options["confidence_K"]].set(-jnp.inf)  # only forced, never sampled
  is_fix_1V = (jnp.arange(config.vocab_size) == options["fix"])[None]

  def write(carried):
    """Return the state with one more token for each row; tokens of a row that has stopped are not counted."""
    slot, state = carried
    # The first step reads the last token of the prompt again, so that only one copy of the step is compiled.
    last_B1 = jax.lax.dynamic_slice_in_dim(state["token_BS"], slot - 1, 1, 1)
    stream_B1D, cache = llama.forward_cached(config, params, last_B1, state["start_B"], slot - 1, state["cache"])
    logprob_BV = _logprobs(params, stream_B1D[:, 0], config=config)
    bias_BV = jnp.where(state["watch"]["is_step_B"][:, None] & is_fix_1V, -jnp.inf, bias_1V)
    token_B = _draw(
      logprob_BV + bias_BV,
      state["index_B"],
      slot - first,
      options["key"],
      options["temperature"],
      options["top_p"],
      cut=cut,
    )
    token_B = _forced(state["watch"], token_B, options)
    chosen_B = jnp.take_along_axis(logprob_BV, token_B[:, None], 1)[:, 0]
    others_BV = jnp.where(jnp.arange(config.vocab_size) == flag_id, -jnp.inf, logprob_BV)
    return slot + 1, {
      **state,
      "cache": cache,
      "token_BS": state["token_BS"].at[:, slot].set(token_B),
      "logprob_BS": state["logprob_BS"].at[:, slot].set(chosen_B),
      "flag_BS": state["flag_BS"].at[:, slot].set(logprob_BV[:, flag_id]),
      "margin_BS": state["margin_BS"].at[:, slot].set(logprob_BV[:, flag_id] - others_BV.max(-1)),
      "num_B": state["num_B"] + state["live_B"],
      "live_B": state["live_B"] & ~(token_B[:, None] == options["stop_U"][None]).any(-1),
      "watch": _watch(state["watch"], token_B, chosen_B, options),
    }

  return jax.lax.while_loop(
    lambda carried: (carried[0] < end) & (carried[1]["live_B"].sum() > few), write, (slot, state)
  )


def _forced(watch, token_B, options):
  """Return the sampled tokens, replaced where one is forced: the confidence in a step that has ended, then the flag."""
  token_B = jnp.where(watch["flags_B"], options["flag"], token_B)
  if not len(options["confidence_K"]):
    return token_B
  return jnp.where(watch["bin_B"] == NO_TOKEN, token_B, options["confidence_K"][watch["bin_B"]])


def _watch(watch, token_B, logprob_B, options):
  """Return the trigger's state after one more token: the current step's length and `Surprisal`, and what is forced.

  `is_step_B` is false between a flag and its fix; `bin_B` is NO_TOKEN when no confidence is to be written.
  """
  was_confidence_B = watch["bin_B"] != NO_TOKEN
  is_flag_B, is_fix_B = token_B == options["flag"], token_B == options["fix"]
  is_own_B = watch["is_step_B"] & ~was_confidence_B & ~is_flag_B & ~is_fix_B
  begins_B = watch["num_B"] == 0
  first_B = jnp.where(begins_B, -logprob_B, watch["first_B"])
  score_B = jnp.where(begins_B, 0.0, jnp.maximum(watch["score_B"], -logprob_B))
  ends_B = is_own_B & (token_B[:, None] == options["end_E"][None]).any(-1)
  goes_on_B = is_own_B & ~ends_B
  if len(options["confidence_K"]):

    def bin_of(score_B, edge_K):
      return (score_B[:, None] > edge_K[None]).sum(-1)

    bin_B = bin_of(score_B, options["edge_K"]) * (len(options["first_edge_J"]) + 1)
    bin_B += bin_of(first_B, options["first_edge_J"])
    bin_B = jnp.where(ends_B, bin_B, NO_TOKEN)
  else:
    bin_B = watch["bin_B"]
  return {
    "num_B": jnp.where(goes_on_B, watch["num_B"] + 1, 0),
    "first_B": jnp.where(goes_on_B, first_B, 0.0),
    "score_B": jnp.where(goes_on_B, score_B, 0.0),
    "is_step_B": jnp.where(is_flag_B, False, watch["is_step_B"] | is_fix_B),
    "bin_B": bin_B,
    "flags_B": (ends_B & (score_B > options["threshold"])) | (was_confidence_B & watch["flags_B"]),
  }


def step_scores(
  token_T: np.ndarray, logprob_T: np.ndarray, watch: ConfidenceTrigger, flag_id: int | None
) -> list[tuple[int, int, Surprisal]]:
  """Return (first token, one past the last, surprisal) of each complete step, as `ConfidenceTrigger` defines steps."""
  scored, first, is_step = [], 0, True
  for place, token in enumerate(token_T.tolist()):
    if token in watch.confidence_ids or token == flag_id or token == watch.fix_id:
      is_step = token == watch.fix_id or (is_step and token != flag_id)
      first = place + 1
    elif is_step and token in watch.end_ids:
      scored.append((first, place + 1, Surprisal.of(logprob_T[first : place + 1])))
      first = place + 1
  return scored


def _draw(logits_BV, index_B, step, key, temperature, top_p, *, cut):
  """Return the next token of each row, the most likely one at temperature 0."""

  def drawn_B():
    tempered_BV = logits_BV / temperature
    if cut:
      sorted_BV = -jnp.sort(-tempered_BV, axis=-1)
      p_BV = jax.nn.softmax(sorted_BV)
      # A token is kept while the more likely ones hold less than top_p: the most likely is always kept.
      least_B1 = jnp.where(jnp.cumsum(p_BV, -1) - p_BV < top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
      tempered_BV = jnp.where(tempered_BV >= least_B1, tempered_BV, -jnp.inf)
    key_B = jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(key, index), step))(index_B)
    return jax.vmap(jax.random.categorical)(key_B, tempered_BV).astype(jnp.int32)

  # Both in one program: greedy decoding and sampling have the same shapes.
  return jax.lax.cond(temperature > 0, drawn_B, lambda: jnp.argmax(logits_BV, -1).astype(jnp.int32))

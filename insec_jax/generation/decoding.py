"""The compiled programs of the sampler: pure functions from the state of a batch to its next state.

Each is compiled once per shape. `begin`, `decode` and `text_logprobs` run the model; `keep_rows` makes a batch smaller.
One program `decode` serves greedy decoding, sampling and forced tokens: on a small model compiling would take longer
than decoding.

      slot      0   1   2   3 | 4   5   6        start 2: the slots before it are padding, masked everywhere
      token     .   .   A   B | c   d   <end>    A B the prompt, c d <end> chosen
      position  .   .   0   1 | 2   3   4

Letters as in model/llama.py and confidence.py, S slot of prompt and text, and C row that is kept.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from insec_jax.generation import confidence
from insec_jax.generation.confidence import TokenRules, TriggerState
from insec_jax.model import llama

PREFILL_TOKENS = 512  # tokens of a prompt per forward pass: bounds the attention scores of a long prompt
READ_TOKENS = 32  # tokens of a text whose logits are computed at once: bounds the logits
NO_PROMPT = -1  # number of the prompt of an unused row


class DecodeOptions(NamedTuple):
  """What a request for text asks for beyond its prompts; none of the numbers is compiled into a program."""

  key: jax.Array  # of the seed; `draw` derives the key of each token from it
  temperature: float
  top_p: float
  rules: TokenRules


class DecodeState(NamedTuple):
  """State of a batch between two tokens, all that its next token depends on besides weights and options.

  The numbers of a token stand in its slot, and mean what they do in `SampledTokens`.
  """

  slot: jax.Array  # the next slot to write, the same in all rows
  start_B: jax.Array  # slot of the first token of the prompt
  index_B: jax.Array  # number of the prompt, which its random keys depend on; NO_PROMPT where the row is unused
  live_B: jax.Array  # no stop token has ended the row
  num_B: jax.Array  # tokens written; those after a stop token are not counted
  token_BS: jax.Array
  logprob_BS: jax.Array
  flag_BS: jax.Array
  margin_BS: jax.Array
  cache: list  # (k_BKSH, v_BKSH) of each layer
  trigger: TriggerState


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def ready(params, *, config, compute):
  """Return the params cast and unstacked once instead of at every token; the model would cast them in the same way."""
  return llama.unstack(jax.tree.map(lambda weight: weight.astype(compute), params), config)


@functools.partial(jax.jit, static_argnames=("config", "compute", "room"))
def begin(params, token_BP, start_B, index_B, *, flag, fix, config, compute, room) -> DecodeState:
  """Return the state after the prompts, with `room` free slots."""
  B, P = token_BP.shape
  none_BS = jnp.zeros((B, P + room))
  return DecodeState(
    slot=jnp.int32(P),
    start_B=start_B,
    index_B=index_B,
    live_B=index_B != NO_PROMPT,
    num_B=jnp.zeros(B, jnp.int32),
    token_BS=jnp.pad(token_BP, ((0, 0), (0, room))),
    logprob_BS=none_BS,
    flag_BS=none_BS,
    margin_BS=none_BS,
    cache=prefill(params, token_BP, start_B, config=config, compute=compute, room=room),
    trigger=confidence.begin_trigger(token_BP, start_B, flag=flag, fix=fix),
  )


def prefill(params, token_BP, start_B, *, config, compute, room) -> list:
  """Return the cache after the prompts, with `room` free slots."""
  B, P = token_BP.shape
  width = min(P, PREFILL_TOKENS)  # both are powers of two: the chunks fill the prompt exactly

  def read(chunk, cache):
    token_BT = jax.lax.dynamic_slice_in_dim(token_BP, chunk * width, width, 1)
    return llama.forward_cached(config, params, token_BT, start_B, chunk * width, cache)[1]

  return jax.lax.fori_loop(0, P // width, read, llama.make_cache(config, B, P + room, compute))


@functools.partial(jax.jit, static_argnames=("config", "cut"), donate_argnames="state")
def decode(params, state: DecodeState, options: DecodeOptions, *, end, few, config, cut) -> DecodeState:
  """Return the state once slot `end` is the next, or at most `few` rows are live."""
  return jax.lax.while_loop(
    lambda state: (state.slot < end) & (state.live_B.sum() > few),
    lambda state: step(params, state, options, config=config, cut=cut),
    state,
  )


def step(params, state: DecodeState, options: DecodeOptions, *, config, cut) -> DecodeState:
  """Return the state with one more token in each row."""
  slot, rules = state.slot, options.rules
  # The first step reads the last token of the prompt again, so that only one copy of the step is compiled.
  last_B1 = jax.lax.dynamic_slice_in_dim(state.token_BS, slot - 1, 1, 1)
  stream_B1D, cache = llama.forward_cached(config, params, last_B1, state.start_B, slot - 1, state.cache)
  logprob_BV = jax.nn.log_softmax(llama.logits(params, config, stream_B1D)[:, 0])
  token_B = draw(confidence.biased(logprob_BV, state.trigger, rules), state.index_B, state.num_B, options, cut=cut)
  token_B = confidence.forced(token_B, state.trigger, rules)
  chosen_B = jnp.take_along_axis(logprob_BV, token_B[:, None], 1)[:, 0]
  others_BV = jnp.where(jnp.arange(config.vocab_size) == rules.flag, -jnp.inf, logprob_BV)
  return state._replace(
    slot=slot + 1,
    live_B=state.live_B & ~(token_B[:, None] == rules.stop_U[None]).any(-1),
    num_B=state.num_B + state.live_B,
    token_BS=state.token_BS.at[:, slot].set(token_B),
    logprob_BS=state.logprob_BS.at[:, slot].set(chosen_B),
    flag_BS=state.flag_BS.at[:, slot].set(logprob_BV[:, rules.flag]),
    margin_BS=state.margin_BS.at[:, slot].set(logprob_BV[:, rules.flag] - others_BV.max(-1)),
    cache=cache,
    trigger=confidence.advance(state.trigger, token_B, chosen_B, rules),
  )


def draw(logits_BV, index_B, num_B, options: DecodeOptions, *, cut):
  """Return the next token of each row, the most likely one at temperature 0.

  The key of a draw is that of the seed, folded with the number of the prompt and then with that of the token.
  """

  def drawn_B():
    tempered_BV = logits_BV / options.temperature
    if cut:
      sorted_BV = -jnp.sort(-tempered_BV, axis=-1)
      p_BV = jax.nn.softmax(sorted_BV)
      # A token is kept while the more likely ones hold less than top_p: the most likely is always kept.
      least_B1 = jnp.where(jnp.cumsum(p_BV, -1) - p_BV < options.top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
      tempered_BV = jnp.where(tempered_BV >= least_B1, tempered_BV, -jnp.inf)
    key_B = jax.vmap(lambda index, num: jax.random.fold_in(jax.random.fold_in(options.key, index), num))(index_B, num_B)
    return jax.vmap(jax.random.categorical)(key_B, tempered_BV).astype(jnp.int32)

  # Both in one program: greedy decoding and sampling have the same shapes.
  return jax.lax.cond(options.temperature > 0, drawn_B, lambda: jnp.argmax(logits_BV, -1).astype(jnp.int32))


@jax.jit
def keep_rows(state: DecodeState, row_C) -> DecodeState:
  """Return the state of these rows alone."""
  rows = state._replace(slot=None)
  return jax.tree.map(lambda array: array[row_C], rows)._replace(slot=state.slot)


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def text_logprobs(params, token_BP, start_B, *, config, compute):
  """Return the log p of each token of a text given those before it; undefined up to the first token."""
  B, P = token_BP.shape
  width = min(P, READ_TOKENS)
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

"""The compiled programs of the sampler: pure functions from the state of a batch to its next state.

Each is compiled once per shape. `fill` reads prompts into free rows, `decode` writes until rows have ended, `keep_rows`
and `resize` change the number of rows and slots. One program `decode` serves greedy decoding, sampling and forced
tokens: on a small model compiling would take longer than decoding. The loop that calls them is Sampler._decode
(sampler.py); batching.py chooses which prompts go to which free rows, and when.

All rows write the same slot; slot s is at place s % S of the row, in the cache too. A prompt is read into the slots
right before the next one to be written, whatever the other rows hold, so that a row which has ended is filled again:

      slot     ...  40  41  42  43 | 44  45  46
      row 0     c   d   e   f   g  | h   i   <end>    began earlier
      row 1     .   .   .   A   B  | c   <end>        start 42: filled just before slot 44
      position ... -2  -1   0   1  | 2   3        of row 1; the cache's slots before its start are not read

On a mesh every function runs on each device in jax.shard_map: rows over `data`, heads, MLP width and vocabulary over
`tensor`. No row reads another, so the mesh changes a text only through the order of float32 sums.

Functions of confidence.py apply the rules for tokens: `biased` adds the flag's bias and bans tokens (the fix where no
flag is open), `forced` replaces drawn tokens, and `advance` updates the state that both read. With mistakes.rewind the
cache of a mistake is not read after its correction, and positions go back (rewinding.py).

Letters as in model/llama.py, and S slot, P slot of a padded prompt, R row that is filled, C row that is kept (in
`text_logprobs`: chunk), U stop token, J place that is read.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from insec_jax.generation import confidence, rewinding
from insec_jax.generation.confidence import TokenRules, TriggerState
from insec_jax.generation.placement import params_specs
from insec_jax.generation.rewinding import Rewound
from insec_jax.method.rewind import Visibility
from insec_jax.model import llama, sharding
from insec_jax.model.attention import Attention, as_cached, slot_axes

READ_TOKENS = 32  # tokens of a text whose logits are computed at once: bounds the logits
NO_PROMPT = -1  # number of the prompt of an unused row


class DecodeOptions(NamedTuple):
  """Options of a request for text; its numbers are arguments of the compiled programs, so new ones compile nothing."""

  key: jax.Array  # of the seed; `draw` derives the key of each token from it
  max_tokens: int
  temperature: float
  top_p: float
  rules: TokenRules


class DecodeState(NamedTuple):
  """State of a batch between two tokens: with weights and options, it decides the next token.

  Arrays [B, S] hold the numbers of a token at the place of its slot; `SampledTokens` (sampler.py) returns them.
  """

  slot: jax.Array  # the next slot to write, the same in all rows
  start_B: jax.Array  # slot of the first token of the prompt
  index_B: jax.Array  # number of the prompt, which its random keys depend on; NO_PROMPT where the row is unused
  live_B: jax.Array  # neither a stop token nor max_tokens has ended the row
  num_B: jax.Array  # tokens written
  token_BS: jax.Array
  logprob_BS: jax.Array  # log p of the token, at temperature 1
  flag_BS: jax.Array  # log p of the flag in its place
  margin_BS: jax.Array  # log p of the flag minus that of the likeliest other token
  cache: list  # (keys, values) of each layer (make_cache)
  trigger: TriggerState
  rewound: Rewound | None  # None without mistakes.rewind


ROWS = PartitionSpec(sharding.BATCH)
STATE = DecodeState(  # the mesh axes of each array
  slot=PartitionSpec(),
  cache=PartitionSpec(sharding.BATCH, sharding.TENSOR),
  trigger=ROWS,
  rewound=ROWS,
  **dict.fromkeys(("start_B", "index_B", "live_B", "num_B", "token_BS", "logprob_BS", "flag_BS", "margin_BS"), ROWS),
)


def on_mesh(function, mesh: Mesh, in_specs: tuple, out_specs):
  """Return the function, run on each device."""
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def make_cache(config: llama.LlamaConfig, batch: int, length: int, dtype, mesh=None) -> list:
  """Return zero keys and values, (k_BKSH, v_BKSH) for each layer, S = `length` slots; `dtype` is the compute dtype.

  Keys are k_BKHS where `attention.keys_transposed`. With a mesh it is the cache of each device: its heads of `batch`
  rows.
  """
  num_heads = sharding.local_size("kv_heads", config.num_kv_heads, mesh)
  zeros = jnp.zeros((batch, length, num_heads, config.head_width), dtype)
  return [as_cached(zeros, zeros, mesh) for _ in range(config.num_layers)]


@functools.partial(jax.jit, static_argnames=("config", "compute", "mesh", "rows", "slots", "rewinds"))
def begin(*, config, compute, mesh, rows: int, slots: int, rewinds: bool = False) -> DecodeState:
  """Return the state of a batch in which every row is unused; it `rewinds` where `rules` have kinds of tokens."""
  B = rows // sharding.size_over(mesh, sharding.BATCH)

  def make() -> DecodeState:
    none_BS = jnp.zeros((B, slots))
    return DecodeState(
      slot=jnp.int32(slots),  # so that no slot of a prompt is below 0
      start_B=jnp.zeros(B, jnp.int32),
      index_B=jnp.full(B, NO_PROMPT, jnp.int32),
      live_B=jnp.full(B, False),
      num_B=jnp.zeros(B, jnp.int32),
      token_BS=jnp.zeros((B, slots), jnp.int32),
      logprob_BS=none_BS,
      flag_BS=none_BS,
      margin_BS=none_BS,
      cache=make_cache(config, B, slots, compute, mesh),
      trigger=confidence.begin_trigger(jnp.zeros((B, 1), jnp.int32), jnp.zeros(B, jnp.int32), flag=-1, fix=-1),
      rewound=rewinding.begin(B, slots) if rewinds else None,
    )

  return on_mesh(make, mesh, (), STATE)()


@functools.partial(jax.jit, static_argnames=("config", "attention", "mesh"), donate_argnames="state")
def fill(
  params,
  state: DecodeState,
  token_RP,
  start_R,
  index_R,
  row_R,
  rules: TokenRules,
  seen: Visibility | None = None,
  *,
  config,
  attention,
  mesh,
) -> DecodeState:
  """Return the state with prompts read into rows.

  The rows of each device are filled with its part of the prompts: `row_R` is the number of a row on its device, and one
  past the last where there is no prompt. A prompt begins at slot `start_R` of the P that it is padded to. `seen` is
  rewinding.of_prompts, None without mistakes.rewind.
  """

  def read(params, state: DecodeState, token_RP, start_R, index_R, row_R, rules, seen) -> DecodeState:
    P, S = token_RP.shape[1], state.token_BS.shape[1]
    dtype, seen_in_prompt = state.cache[0][0].dtype, None if seen is None else seen[:2]
    _, cache = llama.forward_prompt(config, params, token_RP, start_R, attention, dtype, mesh, seen_in_prompt)

    def put(old, new, axis: int | None = None):
      """Return the rows with new content; along `axis`, the last P slots before the next one."""
      if axis is not None:
        widths = [(0, S - P if number == axis else 0) for number in range(new.ndim)]
        new = jnp.roll(jnp.pad(new, widths), (state.slot - P) % S, axis)
      return old.at[row_R].set(new.astype(old.dtype), mode="drop")

    trigger = confidence.begin_trigger(token_RP, start_R, flag=rules.flag, fix=rules.fix)
    rewound = None
    if seen is not None:
      after = rewinding.after_prompts(seen, state.slot)
      rewound = Rewound(
        jax.tree.map(put, state.rewound.state, after.state), put(state.rewound.hidden_BS, after.hidden_BS, 1)
      )
    return state._replace(
      start_B=put(state.start_B, state.slot - P + start_R),
      index_B=put(state.index_B, index_R),
      live_B=put(state.live_B, index_R != NO_PROMPT),
      num_B=put(state.num_B, jnp.zeros_like(index_R)),
      token_BS=put(state.token_BS, token_RP, 1),
      cache=[
        tuple(put(old, new, axis) for old, new, axis in zip(*layer, slot_axes(mesh), strict=True))
        for layer in zip(state.cache, cache, strict=True)
      ],
      trigger=jax.tree.map(put, state.trigger, trigger),
      rewound=rewound,
    )

  specs = (params_specs(config, mesh), STATE, ROWS, ROWS, ROWS, ROWS, PartitionSpec(), ROWS)
  return on_mesh(read, mesh, specs, STATE)(params, state, token_RP, start_R, index_R, row_R, rules, seen)


@functools.partial(jax.jit, static_argnames=("config", "cut", "mesh"), donate_argnames="state")
def decode(params, state: DecodeState, options: DecodeOptions, *, few: int, config, cut: bool, mesh) -> DecodeState:
  """Return the state after the first step that leaves at most `few` rows live; unchanged if no more are live."""

  def num_live(state: DecodeState):
    return jax.lax.psum(state.live_B.sum(), sharding.BATCH)

  def run(params, state: DecodeState, options: DecodeOptions, few) -> DecodeState:
    def write(carried):
      state = step(params, carried[0], options, config=config, cut=cut, mesh=mesh)
      return state, num_live(state)

    return jax.lax.while_loop(lambda carried: carried[1] > few, write, (state, num_live(state)))[0]

  specs = (params_specs(config, mesh), STATE, PartitionSpec(), PartitionSpec())
  return on_mesh(run, mesh, specs, STATE)(params, state, options, few)


def step(params, state: DecodeState, options: DecodeOptions, *, config, cut: bool, mesh) -> DecodeState:
  """Return the state with one more token in each live row.

  `cut` is whether top_p is below 1; it is static, because sorting the vocabulary is slow.
  """
  S = state.token_BS.shape[1]
  rules, place = options.rules, state.slot % S
  # The first step reads the last token of the prompt again, so that only one copy of the step is compiled.
  last_B1 = jax.lax.dynamic_slice_in_dim(state.token_BS, (state.slot - 1) % S, 1, 1)
  rewound = state.rewound
  seen = None if rewound is None else (rewound.state.position[:, None], rewound.hidden_BS)
  stream_B1D, cache = llama.forward_cached(
    config, params, last_B1, state.start_B, state.slot - 1, state.cache, mesh, seen
  )
  logprob_BV = jax.nn.log_softmax(llama.logits(params, config, stream_B1D, mesh)[:, 0])
  token_B = draw(confidence.biased(logprob_BV, state.trigger, rules), state.index_B, state.num_B, options, cut=cut)
  token_B = confidence.forced(token_B, state.trigger, rules)
  chosen_B = jnp.take_along_axis(logprob_BV, token_B[:, None], 1)[:, 0]
  others_BV = jnp.where(jnp.arange(config.vocab_size) == rules.flag, -jnp.inf, logprob_BV)
  num_B = state.num_B + state.live_B
  ends_B = (token_B[:, None] == rules.stop_U[None]).any(-1) | (num_B >= options.max_tokens)
  # Rows that have ended write too, over slots that nothing reads: `num_B` ends before them.
  return state._replace(
    slot=state.slot + 1,
    live_B=state.live_B & ~ends_B,
    num_B=num_B,
    token_BS=state.token_BS.at[:, place].set(token_B),
    logprob_BS=state.logprob_BS.at[:, place].set(chosen_B),
    flag_BS=state.flag_BS.at[:, place].set(logprob_BV[:, rules.flag]),
    margin_BS=state.margin_BS.at[:, place].set(logprob_BV[:, rules.flag] - others_BV.max(-1)),
    cache=cache,
    trigger=confidence.advance(state.trigger, token_B, chosen_B, rules),
    rewound=None if rewound is None else rewinding.advance(rewound, rules.kind_V[token_B], state.slot),
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


@functools.partial(jax.jit, static_argnames="mesh")
def keep_rows(state: DecodeState, row_C, *, mesh) -> DecodeState:
  """Return the state of these rows alone; `row_C` holds the numbers of rows on their own device."""

  def keep(state: DecodeState, row_C) -> DecodeState:
    rows = state._replace(slot=None)
    return jax.tree.map(lambda array: array[row_C], rows)._replace(slot=state.slot)

  return on_mesh(keep, mesh, (STATE, ROWS), STATE)(state, row_C)


@functools.partial(jax.jit, static_argnames=("mesh", "slots"))
def resize(state: DecodeState, *, mesh, slots: int) -> DecodeState:
  """Return the state with more slots in each row."""

  def move(state: DecodeState) -> DecodeState:
    S, last = state.token_BS.shape[1], state.slot - 1
    place_S = (last - (last - jnp.arange(slots)) % slots) % S  # of the newest slot at each place, before
    rewound = state.rewound
    return state._replace(
      **{name: getattr(state, name)[:, place_S] for name in ("token_BS", "logprob_BS", "flag_BS", "margin_BS")},
      cache=[
        tuple(jnp.take(array, place_S, axis) for array, axis in zip(layer, slot_axes(mesh), strict=True))
        for layer in state.cache
      ],
      rewound=None if rewound is None else rewound._replace(hidden_BS=rewound.hidden_BS[:, place_S]),
    )

  return on_mesh(move, mesh, (STATE,), STATE)(state)


@functools.partial(jax.jit, static_argnames=("config", "compute", "attention", "mesh"))
def text_streams(params, token_BP, start_B, slot_BJ, seen=None, *, config, compute, attention: Attention, mesh):
  """Return the stream after the last norm, float32, at each of these slots of a text; `seen` is that of `fill`."""

  def read(params, token_BP, start_B, slot_BJ, seen):
    seen_in_text = None if seen is None else seen[:2]
    stream_BPD, _ = llama.forward_prompt(config, params, token_BP, start_B, attention, compute, mesh, seen_in_text)
    return jnp.take_along_axis(stream_BPD, slot_BJ[..., None], 1).astype(jnp.float32)

  specs = (params_specs(config, mesh), ROWS, ROWS, ROWS, ROWS)
  return on_mesh(read, mesh, specs, ROWS)(params, token_BP, start_B, slot_BJ, seen)


@functools.partial(jax.jit, static_argnames=("config", "compute", "attention", "mesh"))
def text_logprobs(params, token_BP, start_B, seen=None, *, config, compute, attention: Attention, mesh):
  """Return the log p of each token of a text given those before it; undefined up to the first token.

  `seen` is that of `fill`.
  """

  def read(params, token_BP, start_B, seen):
    B, P = token_BP.shape
    width = min(P, READ_TOKENS)  # both are powers of two: the chunks fill the text exactly
    seen_in_text = None if seen is None else seen[:2]
    stream_BPD, _ = llama.forward_prompt(config, params, token_BP, start_B, attention, compute, mesh, seen_in_text)

    def logprobs_of(chunk):
      stream_BTD, target_BT = chunk
      logprob_BTV = jax.nn.log_softmax(llama.logits(params, config, stream_BTD, mesh))
      return jnp.take_along_axis(logprob_BTV, target_BT[..., None], 2)[..., 0]

    def in_chunks(array_BP):
      return array_BP.reshape(B, P // width, width, *array_BP.shape[2:]).swapaxes(0, 1)

    target_BP = jnp.roll(token_BP, -1, axis=1)
    logprob_CBT = jax.lax.map(logprobs_of, (in_chunks(stream_BPD), in_chunks(target_BP)))
    return jnp.roll(logprob_CBT.swapaxes(0, 1).reshape(B, P), 1, axis=1)

  return on_mesh(read, mesh, (params_specs(config, mesh), ROWS, ROWS, ROWS), ROWS)(params, token_BP, start_B, seen)

"""Beam search: the likeliest text that a few beams find, for all prompts of a batch at once, on the sampler's cache.

A group is the W rows of one prompt. After each step the W likeliest of its W * V continuations are its beams; the row
of a beam takes over the cache of the row that it continues:

    sum   row 0   a 4   -0.1         row 0   a 4 b   -0.4    continues row 0
          row 1   a 9   -2.3         row 1   a 4 c   -1.2    continues row 0

A text ends at a stop token, if that is at least as likely as the last of the beams that go on. Its score is the sum of
log p of its tokens, without a penalty for length; tokens that are forced (confidence.py) add nothing. Since sums only
fall, a group is done when an ended text is at least as likely as its likeliest beam. Where none ends within the limit,
the likeliest beam is the result.

One text can be excluded for each prompt: it is never the one that is found. Longer and shorter ones can be.

Letters as in decoding.py, and G group, W beam of a group, N token of a written text, X token of an excluded one.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from insec_jax.generation import batching, confidence, rewinding
from insec_jax.generation.confidence import NO_TOKEN, TokenRules, TriggerState
from insec_jax.generation.decoding import NO_PROMPT, ROWS, STATE, DecodeState, on_mesh
from insec_jax.generation.placement import params_specs
from insec_jax.generation.rewinding import Rewound
from insec_jax.model import llama, sharding

SHORTEST = 8  # tokens of an excluded text; shorter ones are padded to this


class Found(NamedTuple):
  """The best text of each group: its tokens, their log p, how many they are, whether it ended, and the steps taken."""

  token_GN: jax.Array
  logprob_GN: jax.Array
  num_G: jax.Array
  ended_G: jax.Array
  steps_G: jax.Array


class Beams(NamedTuple):
  """State of a search between two steps; B = G * W rows, those of a group one after another."""

  slot: jax.Array  # the next one to write, in all rows
  num: jax.Array  # tokens written, in all rows
  start_B: jax.Array
  last_B: jax.Array  # the last token
  sum_B: jax.Array  # log p of the tokens written; -inf where the row has no beam
  same_B: jax.Array  # the tokens written are the first of the excluded text
  token_BN: jax.Array
  logprob_BN: jax.Array
  cache: list
  trigger: TriggerState
  rewound: Rewound | None  # None without mistakes.rewind
  live_G: jax.Array
  best_G: jax.Array  # sum of the likeliest ended text; -inf: none
  found: Found


def batches(prompts: Sequence[np.ndarray], *, width: int, batch_size: int, mesh) -> Iterator[list[int]]:
  """Yield the indices of the prompts of each batch, the shortest bucket first, padded with NO_PROMPT."""
  parts = batching.rows_over(mesh)
  num = -(-max(1, batch_size // width) // parts) * parts
  order = sorted(range(len(prompts)), key=lambda index: batching.bucket(len(prompts[index])))
  for first in range(0, len(order), num):
    indices = order[first : first + num]
    yield indices + [NO_PROMPT] * (num - len(indices))


@functools.partial(jax.jit, static_argnames=("width", "room", "config", "mesh"))
def search(
  params, state: DecodeState, excluded_GX, max_tokens, rules: TokenRules, *, width: int, room: int, config, mesh
) -> Found:
  """Return the best text of each prompt, of at most `max_tokens` tokens.

  `state` holds each prompt in `width` rows; `excluded_GX` is padded with NO_TOKEN, and all of it where nothing is
  excluded. `room` bounds max_tokens, and is static.
  """

  def run(params, state, excluded_GX, max_tokens, rules):
    def write(carried):
      beams = step(params, carried[0], excluded_GX, max_tokens, rules, width=width, config=config, mesh=mesh)
      return beams, num_live(beams)

    beams = begin(state, width=width, room=room)
    beams, _ = jax.lax.while_loop(lambda carried: carried[1] > 0, write, (beams, num_live(beams)))
    return with_unended(beams, width)

  specs = (params_specs(config, mesh), STATE, ROWS, PartitionSpec(), PartitionSpec())
  return on_mesh(run, mesh, specs, ROWS)(params, state, excluded_GX, max_tokens, rules)


def num_live(beams: Beams):
  """Return the number of groups that are not done, on all devices."""
  return jax.lax.psum(beams.live_G.sum(), sharding.BATCH)


def begin(state: DecodeState, *, width: int, room: int) -> Beams:
  """Return the state before the first step: one beam a group, since all of its rows are the same."""
  B, S = state.token_BS.shape
  G = B // width
  last_B1 = jax.lax.dynamic_slice_in_dim(state.token_BS, (state.slot - 1) % S, 1, 1)
  none_G = jnp.zeros(G, jnp.int32)
  return Beams(
    slot=state.slot,
    num=jnp.int32(0),
    start_B=state.start_B,
    last_B=last_B1[:, 0],
    sum_B=jnp.where(jnp.arange(B) % width == 0, 0.0, -jnp.inf),
    same_B=jnp.full(B, True),
    token_BN=jnp.zeros((B, room), jnp.int32),
    logprob_BN=jnp.zeros((B, room)),
    cache=state.cache,
    trigger=state.trigger,
    rewound=state.rewound,
    live_G=state.live_B[::width],
    best_G=jnp.full(G, -jnp.inf),
    found=Found(jnp.zeros((G, room), jnp.int32), jnp.zeros((G, room)), none_G, jnp.full(G, False), none_G),
  )


def step(params, beams: Beams, excluded_GX, max_tokens, rules: TokenRules, *, width: int, config, mesh) -> Beams:
  """Return the state with one more token in each beam."""
  rewound = beams.rewound
  seen = None if rewound is None else (rewound.state.position[:, None], rewound.hidden_BS)
  stream_B1D, cache = llama.forward_cached(
    config, params, beams.last_B[:, None], beams.start_B, beams.slot - 1, beams.cache, mesh, seen
  )
  logprob_BV = jax.nn.log_softmax(llama.logits(params, config, stream_B1D, mesh)[:, 0])
  B, V = logprob_BV.shape
  G = B // width
  sum_BV = beams.sum_B[:, None] + allowed(logprob_BV, beams.trigger, rules)
  is_stop_1V = (jnp.arange(V)[:, None] == rules.stop_U[None]).any(-1)[None]
  next_B, is_last_B = (jnp.repeat(values_G, width) for values_G in excluded_at(excluded_GX, beams.num))
  is_next_BV = beams.same_B[:, None] & (jnp.arange(V)[None] == next_B[:, None])
  ending_BV = jnp.where(is_stop_1V & ~(is_next_BV & is_last_B[:, None]), sum_BV, -jnp.inf)
  going_BV = jnp.where(is_stop_1V, -jnp.inf, sum_BV)
  sum_GW, place_GW = jax.lax.top_k(going_BV.reshape(G, width * V), width)
  beams = with_ended(beams, ending_BV, sum_GW[:, -1], logprob_BV)
  parent_B = (place_GW // V + width * jnp.arange(G)[:, None]).reshape(B)
  token_B = (place_GW % V).reshape(B)
  chosen_B = logprob_BV[parent_B, token_B]
  trigger, same_B, token_BN, logprob_BN, cache, rewound = jax.tree.map(
    lambda array: array[parent_B], (beams.trigger, beams.same_B, beams.token_BN, beams.logprob_BN, cache, rewound)
  )
  num = beams.num + 1
  return beams._replace(
    slot=beams.slot + 1,
    num=num,
    last_B=token_B,
    sum_B=sum_GW.reshape(B),
    same_B=same_B & (token_B == next_B),
    token_BN=token_BN.at[:, beams.num].set(token_B),
    logprob_BN=logprob_BN.at[:, beams.num].set(chosen_B),
    cache=cache,
    trigger=confidence.advance(trigger, token_B, chosen_B, rules),
    rewound=None if rewound is None else rewinding.advance(rewound, rules.kind_V[token_B], beams.slot),
    live_G=beams.live_G & (num < max_tokens) & (beams.best_G < sum_GW[:, 0]),
    found=beams.found._replace(steps_G=beams.found.steps_G + beams.live_G),
  )


def allowed(logprob_BV, trigger: TriggerState, rules: TokenRules):
  """Return what each next token adds to a sum: its log p, -inf where it is banned, 0 where it is forced."""
  B, V = logprob_BV.shape
  forced_B = confidence.forced(jnp.full(B, NO_TOKEN), trigger, rules)
  only_BV = jnp.where(jnp.arange(V)[None] == forced_B[:, None], 0.0, -jnp.inf)
  return jnp.where(forced_B[:, None] == NO_TOKEN, confidence.biased(logprob_BV, trigger, rules), only_BV)


def excluded_at(excluded_GX, num):
  """Return the excluded token at this place, NO_TOKEN past its text, and whether it is the last of its text."""
  G, X = excluded_GX.shape
  padded_GX = jnp.concatenate([excluded_GX, jnp.full((G, 2), NO_TOKEN, excluded_GX.dtype)], 1)
  now_G, after_G = (padded_GX[:, jnp.minimum(place, X)] for place in (num, num + 1))
  return now_G, (now_G != NO_TOKEN) & (after_G == NO_TOKEN)


def with_ended(beams: Beams, ending_BV, least_G, logprob_BV) -> Beams:
  """Return the state with the likeliest text that ends now where it is likelier than the one that ended before.

  A text that ends must be at least as likely as the least likely beam that goes on.
  """
  B, V = logprob_BV.shape
  G = len(least_G)
  width = B // G
  ending_GM = ending_BV.reshape(G, width * V)
  place_G, best_G = ending_GM.argmax(-1), ending_GM.max(-1)
  row_G, token_G = place_G // V + width * jnp.arange(G), place_G % V
  better_G = beams.live_G & (best_G >= least_G) & (best_G > beams.best_G)
  token_GN = beams.token_BN[row_G].at[:, beams.num].set(token_G)
  logprob_GN = beams.logprob_BN[row_G].at[:, beams.num].set(logprob_BV[row_G, token_G])
  found = beams.found
  return beams._replace(
    best_G=jnp.where(better_G, best_G, beams.best_G),
    found=found._replace(
      token_GN=jnp.where(better_G[:, None], token_GN, found.token_GN),
      logprob_GN=jnp.where(better_G[:, None], logprob_GN, found.logprob_GN),
      num_G=jnp.where(better_G, beams.num + 1, found.num_G),
      ended_G=found.ended_G | better_G,
    ),
  )


def with_unended(beams: Beams, width: int) -> Found:
  """Return what was found, the likeliest beam where no text has ended; nothing where it has none either."""
  found, has_none_G = beams.found, ~beams.found.ended_G
  num_G = jnp.where(beams.sum_B[::width] > -jnp.inf, found.steps_G, 0)
  return found._replace(
    token_GN=jnp.where(has_none_G[:, None], beams.token_BN[::width], found.token_GN),
    logprob_GN=jnp.where(has_none_G[:, None], beams.logprob_BN[::width], found.logprob_GN),
    num_G=jnp.where(has_none_G, num_G, found.num_G),
  )


def padded_excluded(excluded: Sequence[np.ndarray] | None, indices: Sequence[int]) -> np.ndarray:
  """Return the excluded texts of these prompts, padded with NO_TOKEN to a power of two tokens, at least SHORTEST."""
  texts = [[] if excluded is None or index == NO_PROMPT else excluded[index] for index in indices]
  longest = max(SHORTEST, *map(len, texts))
  excluded_GX = np.full((len(texts), 1 << max(0, longest - 1).bit_length()), NO_TOKEN, np.int32)
  for row, text in enumerate(texts):
    excluded_GX[row, : len(text)] = text
  return excluded_GX

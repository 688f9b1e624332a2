"""Attention on GPU: Pallas kernels (Triton), causal within the segments of packed rows. Letters: model/llama.py.

FlashAttention-2 (Dao 2023, algorithms 1 and 2): no T x T array, blocks that the causal mask or the segments empty are
not visited, keys and values of a group of heads are not repeated. Q and S are the positions of one block that read and
are read; I and J number such blocks. jax 0.12 says that a later one will drop Pallas on Triton.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

NAME = "Pallas"
MULTIPLE = 64  # positions of a block, of queries as of keys; a row is a multiple of it
HEAD_WIDTHS = (64, 128)
# Those (jax.Device.device_kind) on which the tests marked `device` have passed; none yet: they want a GPU. The kernels
# compile for H100 and A100.
DEVICE_KINDS = ()
SAVED = "context"  # checkpoint name of what the backward kernels need from the forward one: context and logsumexp
MASKED = -1e30  # a score; finite, so that a block of nothing else gives finite numbers


class Mask(NamedTuple):
  """Who reads whom: each position's segment; the first block that block I reads, and the last that reads block J."""

  segment_BT: jax.Array
  first_BI: jax.Array
  last_BJ: jax.Array


def block_of(row_length: int) -> int:  # noqa: ARG001, one size for all
  """Positions of a block."""
  return MULTIPLE


def prepare(segment_BT, *, block: int) -> Mask:
  """The blocks are those of the nearest and farthest positions of the same segment, wherever in the row."""
  B, T = segment_BT.shape
  same_BTS = segment_BT[:, :, None] == segment_BT[:, None]
  first_BT = same_BTS.argmax(-1).astype(jnp.int32)
  last_BT = T - 1 - same_BTS[:, :, ::-1].argmax(-1).astype(jnp.int32)
  return Mask(
    segment_BT,
    first_BI=first_BT.reshape(B, -1, block).min(-1) // block,
    last_BJ=last_BT.reshape(B, -1, block).max(-1) // block,
  )


def masked_scores(q_QH, k_SH, segment_ref, i, j):
  """Float32 scores of queries of block i and keys of block j, MASKED where a query may not read."""
  block = q_QH.shape[0]
  at_Q, at_S = i * block + jnp.arange(block), j * block + jnp.arange(block)
  segment_Q, segment_S = segment_ref[pl.ds(i * block, block)], segment_ref[pl.ds(j * block, block)]
  allowed_QS = (segment_Q[:, None] == segment_S[None]) & (at_Q[:, None] >= at_S[None])
  return jnp.where(allowed_QS, triton.dot(q_QH, k_SH.T) * q_QH.shape[1] ** -0.5, MASKED)


def forward_kernel(segment_ref, first_ref, q_ref, k_ref, v_ref, context_ref, logsumexp_ref):
  """Context and logsumexp of one block of queries."""
  i = pl.program_id(0)
  q_QH = q_ref[...]
  block = q_QH.shape[0]

  def step(j, carry):
    context_QH, top_Q, total_Q = carry
    at = pl.ds(j * block, block)
    score_QS = masked_scores(q_QH, k_ref[at, :], segment_ref, i, j)
    higher_Q = jnp.maximum(top_Q, score_QS.max(-1))
    weight_QS = jnp.exp(score_QS - higher_Q[:, None])
    shrink_Q = jnp.exp(top_Q - higher_Q)
    context_QH = context_QH * shrink_Q[:, None] + triton.dot(weight_QS.astype(v_ref.dtype), v_ref[at, :])
    return context_QH, higher_Q, total_Q * shrink_Q + weight_QS.sum(-1)

  start = jnp.zeros(q_QH.shape, jnp.float32), jnp.full(block, MASKED, jnp.float32), jnp.zeros(block, jnp.float32)
  context_QH, top_Q, total_Q = jax.lax.fori_loop(first_ref[...], i + 1, step, start)
  context_ref[...] = (context_QH / total_Q[:, None]).astype(context_ref.dtype)
  logsumexp_ref[...] = top_Q + jnp.log(total_Q)


def query_kernel(segment_ref, first_ref, q_ref, k_ref, v_ref, d_context_ref, logsumexp_ref, delta_ref, d_q_ref):
  """Gradient of one block of queries."""
  i = pl.program_id(0)
  q_QH, d_context_QH = q_ref[...], d_context_ref[...]
  logsumexp_Q, delta_Q = logsumexp_ref[...], delta_ref[...]

  def step(j, d_q_QH):
    at = pl.ds(j * q_QH.shape[0], q_QH.shape[0])
    k_SH, v_SH = k_ref[at, :], v_ref[at, :]
    weight_QS = jnp.exp(masked_scores(q_QH, k_SH, segment_ref, i, j) - logsumexp_Q[:, None])
    d_score_QS = weight_QS * (triton.dot(d_context_QH, v_SH.T) - delta_Q[:, None])
    return d_q_QH + triton.dot(d_score_QS.astype(k_SH.dtype), k_SH)

  d_q_QH = jax.lax.fori_loop(first_ref[...], i + 1, step, jnp.zeros(q_QH.shape, jnp.float32))
  d_q_ref[...] = (d_q_QH * q_QH.shape[1] ** -0.5).astype(d_q_ref.dtype)


def key_kernel(segment_ref, last_ref, q_ref, k_ref, v_ref, d_context_ref, logsumexp_ref, delta_ref, d_k_ref, d_v_ref):
  """Gradients of one block of keys and values, summed over the query heads that read them."""
  j = pl.program_id(0)
  k_SH, v_SH = k_ref[...], v_ref[...]
  G = q_ref.shape[1]

  def step(number, carry):
    d_k_SH, d_v_SH = carry
    i, g = j + jax.lax.div(number, G), jax.lax.rem(number, G)
    at = pl.ds(i * k_SH.shape[0], k_SH.shape[0])
    q_QH, d_context_QH = q_ref[at, g, :], d_context_ref[at, g, :]
    weight_QS = jnp.exp(masked_scores(q_QH, k_SH, segment_ref, i, j) - logsumexp_ref[g, at][:, None])
    d_score_QS = weight_QS * (triton.dot(d_context_QH, v_SH.T) - delta_ref[g, at][:, None])
    return (
      d_k_SH + triton.dot(d_score_QS.astype(q_QH.dtype).T, q_QH),
      d_v_SH + triton.dot(weight_QS.astype(d_context_QH.dtype).T, d_context_QH),
    )

  zero_SH = jnp.zeros(k_SH.shape, jnp.float32)
  d_k_SH, d_v_SH = jax.lax.fori_loop(0, (last_ref[...] + 1 - j) * G, step, (zero_SH, zero_SH))
  d_k_ref[...] = (d_k_SH * k_SH.shape[1] ** -0.5).astype(d_k_ref.dtype)
  d_v_ref[...] = d_v_SH.astype(d_v_ref.dtype)


class Seen:
  """What one step of a kernel sees of each array; the grid is (block, row, head)."""

  def __init__(self, block: int, T: int, H: int, G: int):
    self.segment = pl.BlockSpec((None, T), lambda i, b, n: (b, 0))  # noqa: ARG005, the grid has three axes
    self.bound = pl.BlockSpec((None, None), lambda i, b, n: (b, i))  # noqa: ARG005
    self.block = pl.BlockSpec((None, block, None, H), lambda i, b, n: (b, i, n, 0))
    self.block_sum = pl.BlockSpec((None, None, block), lambda i, b, n: (b, n, i))
    # All keys that a query head reads, and all queries of the heads that read a key head.
    self.keys = pl.BlockSpec((None, T, None, H), lambda _, b, n: (b, 0, jax.lax.div(n, G), 0))
    self.queries = pl.BlockSpec((None, T, G, H), lambda _, b, k: (b, 0, k, 0))
    self.queries_sum = pl.BlockSpec((None, G, T), lambda _, b, k: (b, k, 0))


def call(kernel, grid, sees, gives, like, interpret: bool):
  """`kernel` on the GPU: a step has `sees` of the inputs and `gives` of the outputs, which are shaped `like`."""
  H = like[0].shape[-1]
  params = triton.CompilerParams(num_warps=4 if H <= 64 else 8, num_stages=2)
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=sees,
    out_specs=gives,
    interpret=interpret,
    compiler_params=params,
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
    name=f"packed_attention_{kernel.__name__}",
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(q_BTNH, k_BTKH, v_BTKH, mask: Mask, block: int, interpret: bool = False):
  """Grouped-query attention of local arrays; scores and softmax in float32, result in the dtype of `q`."""
  return forward(q_BTNH, k_BTKH, v_BTKH, mask, block, interpret)[0]


def forward(q_BTNH, k_BTKH, v_BTKH, mask, block, interpret):
  """(context, what the backward pass needs)."""
  B, T, N, H = q_BTNH.shape
  seen = Seen(block, T, H, N // k_BTKH.shape[2])
  sees = [seen.segment, seen.bound, seen.block, seen.keys, seen.keys]
  context_BTNH, logsumexp_BNT = call(
    forward_kernel,
    (T // block, B, N),
    sees,
    [seen.block, seen.block_sum],
    [q_BTNH, jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
    interpret,
  )(mask.segment_BT, mask.first_BI, q_BTNH, k_BTKH, v_BTKH)
  context_BTNH, logsumexp_BNT = checkpoint_name((context_BTNH, logsumexp_BNT), SAVED)
  return context_BTNH, (q_BTNH, k_BTKH, v_BTKH, mask, context_BTNH, logsumexp_BNT)


def backward(block, interpret, kept, d_context_BTNH):
  """Gradients of q, k, v; none of mask."""
  q_BTNH, k_BTKH, v_BTKH, mask, context_BTNH, logsumexp_BNT = kept
  B, T, N, H = q_BTNH.shape
  K = k_BTKH.shape[2]
  seen = Seen(block, T, H, N // K)
  delta_BTN = (context_BTNH.astype(jnp.float32) * d_context_BTNH.astype(jnp.float32)).sum(-1)
  arrays = q_BTNH, k_BTKH, v_BTKH, d_context_BTNH, logsumexp_BNT, delta_BTN.swapaxes(1, 2)
  sees = [seen.segment, seen.bound, seen.block, seen.keys, seen.keys, seen.block, seen.block_sum, seen.block_sum]
  [d_q_BTNH] = call(query_kernel, (T // block, B, N), sees, [seen.block], [q_BTNH], interpret)(
    mask.segment_BT, mask.first_BI, *arrays
  )
  sees = [
    seen.segment,
    seen.bound,
    seen.queries,
    seen.block,
    seen.block,
    seen.queries,
    seen.queries_sum,
    seen.queries_sum,
  ]
  d_k_BTKH, d_v_BTKH = call(
    key_kernel, (T // block, B, K), sees, [seen.block, seen.block], [k_BTKH, v_BTKH], interpret
  )(mask.segment_BT, mask.last_BJ, *arrays)
  return d_q_BTNH, d_k_BTKH, d_v_BTKH, None


attend.defvjp(forward, backward)

"""Masked loss with a weight per token: sums over tokens, the vocabulary projection in chunks of trained tokens only.

Letters are those of model/llama.py, and
  M position in a device's rows, one row after another   C position in a chunk of trained tokens
  W position in the chunks of all devices that share a vocabulary
This module does not divide: sums are added over chunks, micro-batches, devices and hosts, and divided afterwards.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from insec_jax.method.roles import NO_NEGATIVE, NO_ROLE, NUM_ROLES
from insec_jax.model import sharding
from insec_jax.model.sharding import BATCH, FSDP, TENSOR

FLOOR = 1e-5  # of 1 - p in unlikelihood, arXiv 1908.04319 and its code


class Negatives(NamedTuple):
  """Unweighted float32 sums over negatives: -log(1 - p) clamped as in unlikelihood, p, and their number."""

  cost: jax.Array
  p: jax.Array
  count: jax.Array


class Sums(NamedTuple):
  """Float32 sums over tokens of non-zero weight, zeros for an empty batch; to be added, and divided last.

  loss: weighted loss, and weight: |weight|, both with negatives. nll_R, correct_R (the likeliest token is the target)
  and count_R: unweighted, without negatives. negatives: None where the batch has no negative_BT.
  """

  loss: jax.Array
  weight: jax.Array
  nll_R: jax.Array
  correct_R: jax.Array
  count_R: jax.Array
  negatives: Negatives | None = None


def no_sums(*, negatives: bool) -> Sums:
  """Return the sums over no token."""
  zeros_R = jnp.zeros(NUM_ROLES)
  return Sums(
    jnp.zeros(()),
    jnp.zeros(()),
    zeros_R,
    zeros_R,
    zeros_R,
    Negatives(*(jnp.zeros(()) for _ in Negatives._fields)) if negatives else None,
  )


def shift(token_BT, segment_BT, role_BT, weight_BT, negative_BT=None):
  """Return (target_BT, role_BT, weight_BT, negative_BT): those of the next token within the segment of each position.

      token     a  b  c  d  e  .        role      0  1  2  0  3 -1        weight    0  1  2  0  4  0
      segment   1  1  1  2  2  0
      target    b  c  .  e  .  .        role      1  2 -1  3 -1 -1        weight    1  2  0  4  0  0

  Negatives, where given, are shifted like roles. No other function shifts.
  """
  T = token_BT.shape[1]
  target_BT, next_segment_BT, next_role_BT, next_weight_BT = (
    jnp.roll(array_BT, -1, axis=1) for array_BT in (token_BT, segment_BT, role_BT, weight_BT)
  )
  same_BT = (next_segment_BT == segment_BT) & (segment_BT > 0) & (jnp.arange(T) < T - 1)[None]
  if negative_BT is not None:
    negative_BT = jnp.where(same_BT, jnp.roll(negative_BT, -1, axis=1), NO_NEGATIVE)
  return target_BT, jnp.where(same_BT, next_role_BT, NO_ROLE), jnp.where(same_BT, next_weight_BT, 0.0), negative_BT


def chunk_size(num_tokens: int) -> int:
  """Return the number of trained tokens that are multiplied with the vocabulary at once.

  It is an eighth of a device's tokens, so that little of the last chunk is empty, and at most 1,024, so that the
  float32 logits over 128,256 tokens take at most half a GiB.
  """
  return min(1024, 128 * math.ceil(num_tokens / 8 / 128))


def loss_sums(
  head_VD, stream_BTD, token_BT, segment_BT, role_BT, weight_BT, negative_BT=None, *, repeat=0.0, mesh=None, chunk=None
) -> Sums:
  """Return the sums of the weighted loss over tokens of non-zero weight; only `loss` has a gradient (head and stream).

  Weight w > 0 costs w * -log p(token). Weight w < 0 is unlikelihood, |w| * -log(max(1 - p(token), 1e-5)), without a
  gradient where it is clamped. A negative adds unlikelihood of weight -repeat, whatever the weight of its token.
  Without negatives the program is smaller. With a mesh the function runs inside jax.shard_map, on the device's shard of
  the head and its own rows, and sums over these rows.
  """
  target_BT, role_BT, weight_BT, negative_BT = shift(token_BT, segment_BT, role_BT, weight_BT, negative_BT)
  return _weighted_sums(
    head_VD,
    stream_BTD,
    target_BT,
    role_BT,
    weight_BT.astype(jnp.float32),
    negative_BT,
    mesh,
    chunk or chunk_size(token_BT.size),
    repeat,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _weighted_sums(head_VD, stream_BTD, target_BT, role_BT, weight_BT, negative_BT, mesh, chunk, repeat):
  sums, _ = _sums(
    head_VD, stream_BTD, target_BT, role_BT, weight_BT, negative_BT, mesh, chunk, repeat, with_gradient=False
  )
  return sums


def _forward(head_VD, stream_BTD, target_BT, role_BT, weight_BT, negative_BT, mesh, chunk, repeat):
  # Gradients are computed in the forward pass: each chunk's logits exist once, and the number of chunks may depend on
  # the data.
  return _sums(head_VD, stream_BTD, target_BT, role_BT, weight_BT, negative_BT, mesh, chunk, repeat, with_gradient=True)


def _backward(mesh, chunk, repeat, gradients, cotangent):
  del mesh, chunk, repeat
  head_VD, stream_BTD = ((gradient * cotangent.loss).astype(gradient.dtype) for gradient in gradients)
  return head_VD, stream_BTD, None, None, None, None


_weighted_sums.defvjp(_forward, _backward)


def _sums(head_VD, stream_BTD, target_BT, role_BT, weight_BT, negative_BT, mesh, chunk, repeat, *, with_gradient):
  """Return (sums, gradients of head and stream or None); the head is split along its width over fsdp.

  Along some axes of fsdp each device takes a part of the vocabulary, and trained tokens are communicated; along the
  others the head is gathered.
  """
  part_VD = head_VD.astype(stream_BTD.dtype)  # before communication: half the bytes in bfloat16
  token_axes, head_axes = (
    ((), ())
    if mesh is None
    else split_fsdp(mesh, num_tokens=target_BT.size, num_rows=head_VD.shape[0], itemsize=part_VD.dtype.itemsize)
  )
  if token_axes:
    part_VD = jax.lax.all_to_all(part_VD, token_axes, split_axis=0, concat_axis=1, tiled=True)
  sums, gradients = _chunked(
    sharding.gather(part_VD, 1, mesh, head_axes),
    stream_BTD,
    target_BT,
    role_BT,
    weight_BT,
    negative_BT,
    mesh,
    token_axes,
    chunk,
    repeat,
    with_gradient=with_gradient,
  )
  if not with_gradient:
    return sums, None
  head_grad_VD = sharding.scatter(gradients[0], 1, mesh, head_axes).astype(head_VD.dtype)
  if token_axes:
    head_grad_VD = jax.lax.all_to_all(head_grad_VD, token_axes, split_axis=1, concat_axis=0, tiled=True)
  # A barrier: else the compiler delays the scatter and keeps the whole gradient through the layers' backward pass.
  return sums, jax.lax.optimization_barrier((head_grad_VD, gradients[1]))


def split_fsdp(mesh, *, num_tokens: int, num_rows: int, itemsize: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Return (axes of fsdp along which tokens are exchanged, axes along which the head is gathered) with fewest bytes.

  Per device, at most `num_tokens` are sent and returned, and `num_rows` rows of the head, whose gradient is float32.
  """
  axes = [name for name in FSDP if mesh.shape[name] > 1]

  def cost(first):
    devices, others = (math.prod(mesh.shape[name] for name in part) for part in (axes[first:], axes[:first]))
    if num_rows % devices:
      return math.inf
    return 2 * itemsize * num_tokens * (devices - 1) + (itemsize + 4) * num_rows / devices * (1 - 1 / others)

  # Tokens along the inner axes: a device's part of the width is then contiguous.
  first = min(range(len(axes), -1, -1), key=cost)
  return tuple(axes[first:]), tuple(axes[:first])


def _chunked(
  head_VD, stream_BTD, target_BT, role_BT, weight_BT, negative_BT, mesh, token_axes, chunk, repeat, *, with_gradient
):
  """Return (sums, (float32 gradient of this part of the head, gradient of the stream) or None) of the device's rows.

  The vocabulary is split over tensor and, within that, over `token_axes`, along which devices concatenate their chunks.
  """
  split_over = token_axes if mesh is None or mesh.shape[TENSOR] == 1 else (TENSOR, *token_axes)
  V, D = head_VD.shape
  M = target_BT.size
  first = jax.lax.axis_index(split_over) * V if split_over else 0
  vocabulary_V = first + jnp.arange(V)
  # A float32 matrix product on TPU multiplies in bfloat16 by default.
  dot = functools.partial(
    jnp.einsum, preferred_element_type=jnp.float32, precision="highest" if head_VD.dtype == jnp.float32 else None
  )

  def over_parts(reduce, x):
    return reduce(x, split_over) if split_over else x

  def gather_chunks(x_C):
    return jax.lax.all_gather(x_C, token_axes, tiled=True) if token_axes else x_C

  total = functools.partial(over_parts, jax.lax.psum)
  stream_MD, target_M, role_M, weight_M = (
    stream_BTD.reshape(M, D),
    target_BT.reshape(M),
    role_BT.reshape(M),
    weight_BT.reshape(M),
  )
  is_trained_M, negatives = weight_M != 0, negative_BT is not None
  if negatives:
    negative_M = negative_BT.reshape(M)
    role_M = jnp.where(is_trained_M, role_M, NO_ROLE)  # a token with only a negative does not count for its role
    is_trained_M |= negative_M >= 0
  num_trained = is_trained_M.sum()
  num_chunks = -(-num_trained // chunk)
  if split_over:
    # Devices that share the vocabulary communicate in every chunk, so all must loop over the same number.
    num_chunks = jax.lax.pmax(num_chunks, BATCH)
  # Trained tokens first. The rest of the last chunk points past the end: it is read as zero and never written.
  past_M = M + jnp.arange(chunk * math.ceil(M / chunk))
  index_M = jnp.where(past_M - M < num_trained, jnp.nonzero(is_trained_M, size=past_M.size, fill_value=M)[0], past_M)

  def add_chunk(number, carry):
    sums, gradients = carry
    index_C = jax.lax.dynamic_slice(index_M, (number * chunk,), (chunk,))
    x_CD = stream_MD.at[index_C].get(mode="fill", fill_value=0)
    target_C = target_M.at[index_C].get(mode="fill", fill_value=0)
    role_C = role_M.at[index_C].get(mode="fill", fill_value=NO_ROLE)
    weight_C = weight_M.at[index_C].get(mode="fill", fill_value=0)
    x_WD, target_W, weight_W = gather_chunks(x_CD), gather_chunks(target_C), gather_chunks(weight_C)
    if negatives:
      negative_C = negative_M.at[index_C].get(mode="fill", fill_value=NO_NEGATIVE)
      negative_W = gather_chunks(negative_C)

    logit_WV = dot("WD,VD->WV", x_WD, head_VD)
    top_W = over_parts(jax.lax.pmax, logit_WV.max(-1))
    exp_WV = jnp.exp(logit_WV - top_W[:, None])

    def parts(token_W):
      """Return whether each entry is the token's, its logit and the sum of the others' exponentials, of this part."""
      is_token_WV = vocabulary_V[None] == token_W[:, None]
      return is_token_WV, jnp.where(is_token_WV, logit_WV, 0.0).sum(-1), jnp.where(is_token_WV, 0.0, exp_WV).sum(-1)

    # 1 - p is added up from the other tokens: near p = 1 float32 cannot subtract.
    is_target_WV, *target_parts = parts(target_W)
    is_negative_WV, *negative_parts = parts(negative_W) if negatives else (None,)
    sum_W, (target_logit_W, others_W), negative_parts = total((exp_WV.sum(-1), target_parts, negative_parts))
    logp_W = target_logit_W - top_W - jnp.log(sum_W)
    rest_W = others_W / sum_W
    # The first of the largest, as argmax, which XLA runs slowly on CPU.
    beaten_WV = (logit_WV > target_logit_W[:, None]) | (
      (logit_WV == target_logit_W[:, None]) & (vocabulary_V[None] < target_W[:, None])
    )
    correct_W = total(beaten_WV.sum(-1)) == 0

    unlikely_W = weight_W < 0
    loss_W = jnp.abs(weight_W) * -jnp.where(unlikely_W, jnp.log(jnp.maximum(rest_W, FLOOR)), logp_W)

    negative_sums = None
    if negatives:
      negative_logit_W, negative_others_W = negative_parts
      is_negative_W, negative_rest_W = negative_W >= 0, negative_others_W / sum_W
      negative_p_W = jnp.where(is_negative_W, jnp.exp(negative_logit_W - top_W) / sum_W, 0.0)
      negative_cost_W = jnp.where(is_negative_W, -jnp.log(jnp.maximum(negative_rest_W, FLOOR)), 0.0)
      loss_W += repeat * negative_cost_W

    def own(x_W):
      return jax.lax.dynamic_slice(x_W, (jax.lax.axis_index(token_axes) * chunk,), (chunk,)) if token_axes else x_W

    is_role_CR = jax.nn.one_hot(role_C, NUM_ROLES)  # NO_ROLE gives a row of zeros
    size = jnp.abs(weight_C).sum()
    if negatives:
      num_negatives = (negative_C >= 0).sum().astype(jnp.float32)
      size += repeat * num_negatives
      negative_sums = Negatives(own(negative_cost_W).sum(), own(negative_p_W).sum(), num_negatives)
    sums = jax.tree.map(
      jnp.add,
      sums,
      Sums(
        own(loss_W).sum(),
        size,
        (-own(logp_W)[:, None] * is_role_CR).sum(0),
        (own(correct_W)[:, None] * is_role_CR).sum(0),
        is_role_CR.sum(0),
        negative_sums,
      ),
    )
    if with_gradient:
      head_grad_VD, stream_grad_MD = gradients
      # Slope of the loss in log p; a clamped token has none.
      unlikely_slope_W = jnp.where(rest_W > FLOOR, jnp.exp(logp_W) / jnp.maximum(rest_W, FLOOR), 0.0)
      slope_W = jnp.abs(weight_W) * jnp.where(unlikely_W, unlikely_slope_W, -1.0)
      slope_WV = slope_W[:, None] * jnp.where(is_target_WV, rest_W[:, None], -exp_WV / sum_W[:, None])
      if negatives:
        negative_slope_W = repeat * jnp.where(
          negative_rest_W > FLOOR, negative_p_W / jnp.maximum(negative_rest_W, FLOOR), 0.0
        )
        slope_WV += negative_slope_W[:, None] * jnp.where(
          is_negative_WV, negative_rest_W[:, None], -exp_WV / sum_W[:, None]
        )
      slope_WV = slope_WV.astype(x_CD.dtype)
      x_grad_WD = dot("WV,VD->WD", slope_WV, head_VD)
      if token_axes:
        x_grad_WD = sharding.scatter(x_grad_WD.astype(x_CD.dtype), 0, mesh, token_axes)
      if TENSOR in split_over:
        x_grad_WD = jax.lax.psum(x_grad_WD, TENSOR)
      gradients = (
        head_grad_VD + dot("WV,WD->VD", slope_WV, x_WD),
        stream_grad_MD.at[index_C].set(x_grad_WD.astype(x_CD.dtype), mode="drop", unique_indices=True),
      )
    return sums, gradients

  empty = (jnp.zeros((V, D)), jnp.zeros((M, D), stream_BTD.dtype)) if with_gradient else None
  with jax.named_scope("trained_chunks"):
    sums, gradients = jax.lax.fori_loop(0, num_chunks, add_chunk, (no_sums(negatives=negatives), empty))
  if with_gradient:
    gradients = (gradients[0], gradients[1].reshape(stream_BTD.shape))
  return sums, gradients

"""The masked loss: weights per token, sums that travel, the vocabulary projection in chunks of trained tokens only.

Letters are those of model/llama.py, and
  M position of a device's rows, one after another   C position of a chunk of trained ones
  W position of the chunks of all devices that share a vocabulary
Nothing here divides: sums are added over chunks, micro-batches, devices and hosts, and who holds the last one divides.
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
  """Float32 sums over negatives, unweighted: -log(1 - p) clamped as in unlikelihood, p, and how many there are."""

  cost: jax.Array
  p: jax.Array
  count: jax.Array


class Sums(NamedTuple):
  """Float32 sums over tokens of non-zero weight; an empty batch gives zeros. Add them, divide last.

  loss: weighted; weight: of |weight|; both with negatives. nll_R, correct_R (the likeliest token is the right one) and
  count_R: unweighted, without negatives. negatives: None where the batch has none of them.
  """

  loss: jax.Array
  weight: jax.Array
  nll_R: jax.Array
  correct_R: jax.Array
  count_R: jax.Array
  negatives: Negatives | None = None


def no_sums(*, negatives: bool) -> Sums:
  """The sums of no token."""
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
  """What each position must predict: (target_BT, role_BT, weight_BT, negative_BT) of the next token of its own segment.

      token     a  b  c  d  e  .        role      0  1  2  0  3 -1        weight    0  1  2  0  4  0
      segment   1  1  1  2  2  0
      target    b  c  .  e  .  .        role      1  2 -1  3 -1 -1        weight    1  2  0  4  0  0

  Negatives, where there are any, go as roles do. The only place where anything is shifted.
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
  """Trained tokens that are multiplied with the vocabulary at once.

  An eighth of a device's tokens, so that little of the last chunk is empty, and at most 1,024, so that the float32
  logits of 128,256 stay at half a GiB.
  """
  return min(1024, 128 * math.ceil(num_tokens / 8 / 128))


def loss_sums(
  head_VD, stream_BTD, token_BT, segment_BT, role_BT, weight_BT, negative_BT=None, *, repeat=0.0, mesh=None, chunk=None
) -> Sums:
  """Sums of the weighted loss of every token of non-zero weight; `loss` alone has a gradient (to head and stream).

  Weight w > 0 costs w * -log p(token); w < 0 is unlikelihood, |w| * -log(max(1 - p(token), 1e-5)), flat where clamped.
  A negative adds unlikelihood of weight -repeat, whatever the weight of its token. Without negatives the program is
  smaller.
  With a mesh it runs inside jax.shard_map, on the device's part of the head and its own rows, and sums over these.
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
  # Gradients are made here: each chunk's logits live once, and the number of chunks may depend on the data.
  return _sums(head_VD, stream_BTD, target_BT, role_BT, weight_BT, negative_BT, mesh, chunk, repeat, with_gradient=True)


def _backward(mesh, chunk, repeat, gradients, cotangent):
  del mesh, chunk, repeat
  head_VD, stream_BTD = ((gradient * cotangent.loss).astype(gradient.dtype) for gradient in gradients)
  return head_VD, stream_BTD, None, None, None, None


_weighted_sums.defvjp(_forward, _backward)


def _sums(head_VD, stream_BTD, target_BT, role_BT, weight_BT, negative_BT, mesh, chunk, repeat, *, with_gradient):
  """(sums, gradients of head and stream or None), the head split along its width over fsdp.

  Along some axes of fsdp each device takes a part of the vocabulary, and trained tokens travel; along the others the
  head does.
  """
  part_VD = head_VD.astype(stream_BTD.dtype)  # before it travels: half the bytes in bfloat16
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
  # Together, or the compiler puts the scatter off and keeps the whole gradient through the layers' backward pass.
  return sums, jax.lax.optimization_barrier((head_grad_VD, gradients[1]))


def split_fsdp(mesh, *, num_tokens: int, num_rows: int, itemsize: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The axes of fsdp along which tokens travel, and those along which the head does: together the fewest bytes.

  Of a device: `num_tokens` at most travel, there and back, and `num_rows` of the head, whose gradient is float32.
  """
  axes = [name for name in FSDP if mesh.shape[name] > 1]

  def cost(first):
    devices, others = (math.prod(mesh.shape[name] for name in part) for part in (axes[first:], axes[:first]))
    if num_rows % devices:
      return math.inf
    return 2 * itemsize * num_tokens * (devices - 1) + (itemsize + 4) * num_rows / devices * (1 - 1 / others)

  # Tokens along the inner axes: what a device then holds of the width is one piece.
  first = min(range(len(axes), -1, -1), key=cost)
  return tuple(axes[first:]), tuple(axes[:first])


def _chunked(
  head_VD, stream_BTD, target_BT, role_BT, weight_BT, negative_BT, mesh, token_axes, chunk, repeat, *, with_gradient
):
  """(sums, (float32 gradient of this part of the head, gradient of the stream) or None) of the device's own rows.

  The vocabulary is split over tensor and, within that, over the axes `token_axes`, along which devices put their chunks
  together.
  """
  split_over = token_axes if mesh is None or mesh.shape[TENSOR] == 1 else (TENSOR, *token_axes)
  V, D = head_VD.shape
  M = target_BT.size
  first = jax.lax.axis_index(split_over) * V if split_over else 0
  vocabulary_V = first + jnp.arange(V)
  # A float32 matrix product on TPU multiplies in bfloat16 unless told otherwise.
  dot = functools.partial(
    jnp.einsum, preferred_element_type=jnp.float32, precision="highest" if head_VD.dtype == jnp.float32 else None
  )

  def over_parts(reduce, x):
    return reduce(x, split_over) if split_over else x

  def of_all(x_C):
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
    role_M = jnp.where(is_trained_M, role_M, NO_ROLE)  # a token that only has a negative is not among those of its role
    is_trained_M |= negative_M >= 0
  num_trained = is_trained_M.sum()
  num_chunks = -(-num_trained // chunk)
  if split_over:
    # Devices that share the vocabulary meet in every chunk; the same count everywhere keeps the whole mesh in step.
    num_chunks = jax.lax.pmax(num_chunks, BATCH)
  # Trained tokens first; the head_axes of the last chunk points past the end, is read as zero and never written.
  past_M = M + jnp.arange(chunk * math.ceil(M / chunk))
  index_M = jnp.where(past_M - M < num_trained, jnp.nonzero(is_trained_M, size=past_M.size, fill_value=M)[0], past_M)

  def one_chunk(number, carry):
    sums, gradients = carry
    index_C = jax.lax.dynamic_slice(index_M, (number * chunk,), (chunk,))
    x_CD = stream_MD.at[index_C].get(mode="fill", fill_value=0)
    target_C = target_M.at[index_C].get(mode="fill", fill_value=0)
    role_C = role_M.at[index_C].get(mode="fill", fill_value=NO_ROLE)
    weight_C = weight_M.at[index_C].get(mode="fill", fill_value=0)
    x_WD, target_W, weight_W = of_all(x_CD), of_all(target_C), of_all(weight_C)
    if negatives:
      negative_C = negative_M.at[index_C].get(mode="fill", fill_value=NO_NEGATIVE)
      negative_W = of_all(negative_C)

    logit_WV = dot("WD,VD->WV", x_WD, head_VD)
    top_W = over_parts(jax.lax.pmax, logit_WV.max(-1))
    exp_WV = jnp.exp(logit_WV - top_W[:, None])

    def parts(token_W):
      """Whether each entry is the token's, and this part of the token's logit and of the exponentials of all others."""
      is_token_WV = vocabulary_V[None] == token_W[:, None]
      return is_token_WV, jnp.where(is_token_WV, logit_WV, 0.0).sum(-1), jnp.where(is_token_WV, 0.0, exp_WV).sum(-1)

    # 1 - p is added up from the other tokens: near p = 1 float32 cannot subtract.
    is_target_WV, *of_target = parts(target_W)
    is_negative_WV, *of_negative = parts(negative_W) if negatives else (None,)
    sum_W, (target_logit_W, others_W), of_negative = total((exp_WV.sum(-1), of_target, of_negative))
    logp_W = target_logit_W - top_W - jnp.log(sum_W)
    rest_W = others_W / sum_W
    # The first of the largest, as argmax, which XLA runs slowly on CPU.
    beaten_WV = (logit_WV > target_logit_W[:, None]) | (
      (logit_WV == target_logit_W[:, None]) & (vocabulary_V[None] < target_W[:, None])
    )
    correct_W = total(beaten_WV.sum(-1)) == 0

    unlikely_W = weight_W < 0
    loss_W = jnp.abs(weight_W) * -jnp.where(unlikely_W, jnp.log(jnp.maximum(rest_W, FLOOR)), logp_W)

    of_negatives = None
    if negatives:
      negative_logit_W, negative_others_W = of_negative
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
      of_negatives = Negatives(own(negative_cost_W).sum(), own(negative_p_W).sum(), num_negatives)
    sums = jax.tree.map(
      jnp.add,
      sums,
      Sums(
        own(loss_W).sum(),
        size,
        (-own(logp_W)[:, None] * is_role_CR).sum(0),
        (own(correct_W)[:, None] * is_role_CR).sum(0),
        is_role_CR.sum(0),
        of_negatives,
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
    sums, gradients = jax.lax.fori_loop(0, num_chunks, one_chunk, (no_sums(negatives=negatives), empty))
  if with_gradient:
    gradients = (gradients[0], gradients[1].reshape(stream_BTD.shape))
  return sums, gradients

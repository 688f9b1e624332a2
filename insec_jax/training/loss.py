"""The masked loss: weights per token, sums that travel, the vocabulary projection in chunks of trained tokens only.

Letters are those of model/llama.py, and
  M position of a device's rows, one after another   C position of a chunk of trained ones
Nothing here divides: sums are added over chunks, micro-batches, devices and hosts, and who holds the last one divides.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from insec_jax.method.roles import NO_ROLE, NUM_ROLES
from insec_jax.model.sharding import RULES

BATCH_AXES = RULES["batch"]
FLOOR = 1e-5  # of 1 - p in unlikelihood, arXiv 1908.04319 and its code


class Sums(NamedTuple):
  """Float32 sums over tokens of non-zero weight; an empty batch gives zeros. Add them, divide last.

  loss: weighted; weight: of |weight|; nll_R, correct_R (the likeliest token is the right one) and count_R: unweighted.
  """

  loss: jax.Array
  weight: jax.Array
  nll_R: jax.Array
  correct_R: jax.Array
  count_R: jax.Array


def no_sums() -> Sums:
  """The sums of no token."""
  zeros_R = jnp.zeros(NUM_ROLES)
  return Sums(jnp.zeros(()), jnp.zeros(()), zeros_R, zeros_R, zeros_R)


def shift(token_BT, segment_BT, role_BT, weight_BT):
  """What each position must predict: (target_BT, role_BT, weight_BT) of the next token of its own segment.

      token     a  b  c  d  e  .        role      0  1  2  0  3 -1        weight    0  1  2  0  4  0
      segment   1  1  1  2  2  0
      target    b  c  .  e  .  .        role      1  2 -1  3 -1 -1        weight    1  2  0  4  0  0

  The only place where anything is shifted.
  """
  T = token_BT.shape[1]
  target_BT, next_segment_BT, next_role_BT, next_weight_BT = (
    jnp.roll(array_BT, -1, axis=1) for array_BT in (token_BT, segment_BT, role_BT, weight_BT))
  same_BT = (next_segment_BT == segment_BT) & (segment_BT > 0) & (jnp.arange(T) < T - 1)[None]
  return target_BT, jnp.where(same_BT, next_role_BT, NO_ROLE), jnp.where(same_BT, next_weight_BT, 0.0)


def chunk_size(num_tokens: int) -> int:
  """Trained tokens that meet the vocabulary at once.

  An eighth of a device's tokens, so that little of the last chunk is empty, and at most 1,024, so that the float32
  logits of 128,256 stay at half a GiB.
  """
  return min(1024, 128 * math.ceil(num_tokens / 8 / 128))


def loss_sums(head_VD, stream_BTD, token_BT, segment_BT, role_BT, weight_BT, *, mesh=None, chunk=None) -> Sums:
  """Sums of the weighted loss of every token of non-zero weight; `loss` alone has a gradient (to head and stream).

  Weight w > 0 costs w * -log p(token); w < 0 is unlikelihood, |w| * -log(max(1 - p(token), 1e-5)), flat where clamped.
  With a mesh of several devices each works on its own rows, and on its own part of the vocabulary where that is split.
  """
  target_BT, role_BT, weight_BT = shift(token_BT, segment_BT, role_BT, weight_BT)
  if mesh is not None and mesh.size == 1:
    mesh = None
  shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  chunk = chunk or chunk_size(token_BT.size // shards)
  return _weighted_sums(head_VD, stream_BTD, target_BT, role_BT, weight_BT.astype(jnp.float32), mesh, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _weighted_sums(head_VD, stream_BTD, target_BT, role_BT, weight_BT, mesh, chunk):
  sums, _ = _on_mesh(head_VD, stream_BTD, target_BT, role_BT, weight_BT, mesh, chunk, with_gradient=False)
  return sums


def _forward(head_VD, stream_BTD, target_BT, role_BT, weight_BT, mesh, chunk):
  # Gradients are made here: each chunk's logits live once, and the number of chunks may depend on the data.
  return _on_mesh(head_VD, stream_BTD, target_BT, role_BT, weight_BT, mesh, chunk, with_gradient=True)


def _backward(mesh, chunk, gradients, cotangent):
  del mesh, chunk
  head_VD, stream_BTD = ((gradient * cotangent.loss).astype(gradient.dtype) for gradient in gradients)
  return head_VD, stream_BTD, None, None, None


_weighted_sums.defvjp(_forward, _backward)


def _on_mesh(head_VD, stream_BTD, target_BT, role_BT, weight_BT, mesh, chunk, *, with_gradient):
  """(sums, gradients of head and stream or None), on one device or on every device of the mesh."""
  matrix_VD = head_VD.astype(stream_BTD.dtype)  # before any gather: half the bytes in bfloat16
  if mesh is None:
    sums, gradients = _local_sums(matrix_VD, stream_BTD, target_BT, role_BT, weight_BT, chunk=chunk,
                                  with_gradient=with_gradient)
  else:
    # The width is gathered here, and only here.
    head_spec = jax.P(RULES["vocab"], None)
    rows_spec, stream_spec = jax.P(BATCH_AXES, None), jax.P(BATCH_AXES, None, None)

    def local(*arrays):
      sums, gradients = _local_sums(*arrays, chunk=chunk, with_gradient=with_gradient, vocab_axis=RULES["vocab"])
      sums = jax.lax.psum(sums, BATCH_AXES)
      if with_gradient:
        gradients = (jax.lax.psum(gradients[0], BATCH_AXES), gradients[1])
      return sums, gradients

    # Not checked: nothing is differentiated through it, and sums really are equal everywhere.
    sums, gradients = jax.shard_map(
      local, mesh=mesh, check_vma=False, in_specs=(head_spec, stream_spec, rows_spec, rows_spec, rows_spec),
      out_specs=(jax.P(), (head_spec, stream_spec) if with_gradient else None),
    )(matrix_VD, stream_BTD, target_BT, role_BT, weight_BT)
  if with_gradient:
    gradients = (gradients[0].astype(head_VD.dtype), gradients[1])
  return sums, gradients


def _local_sums(head_VD, stream_BTD, target_BT, role_BT, weight_BT, *, chunk, with_gradient, vocab_axis=None):
  """(sums, (float32 gradient of the head, gradient of the stream) or None) of a device's rows and part of the head."""
  V, D = head_VD.shape
  M = target_BT.size
  first = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * V
  vocabulary_V = first + jnp.arange(V)
  # A float32 matrix product on TPU multiplies in bfloat16 unless told otherwise.
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32,
                          precision="highest" if head_VD.dtype == jnp.float32 else None)

  def total(x):
    return x if vocab_axis is None else jax.lax.psum(x, vocab_axis)

  stream_MD, target_M, role_M, weight_M = (
    stream_BTD.reshape(M, D), target_BT.reshape(M), role_BT.reshape(M), weight_BT.reshape(M))
  num_trained = (weight_M != 0).sum()
  num_chunks = -(-num_trained // chunk)
  if vocab_axis is not None:
    # Devices that share the vocabulary meet in every chunk; the same count everywhere keeps the whole mesh in step.
    num_chunks = jax.lax.pmax(num_chunks, BATCH_AXES)
  # Trained tokens first; the rest of the last chunk points past the end, is read as zero and never written.
  past_M = M + jnp.arange(chunk * math.ceil(M / chunk))
  index_M = jnp.where(past_M - M < num_trained, jnp.nonzero(weight_M != 0, size=past_M.size, fill_value=M)[0], past_M)

  def one_chunk(number, carry):
    sums, gradients = carry
    index_C = jax.lax.dynamic_slice(index_M, (number * chunk,), (chunk,))
    x_CD = stream_MD.at[index_C].get(mode="fill", fill_value=0)
    target_C = target_M.at[index_C].get(mode="fill", fill_value=0)
    role_C = role_M.at[index_C].get(mode="fill", fill_value=NO_ROLE)
    weight_C = weight_M.at[index_C].get(mode="fill", fill_value=0)

    logit_CV = dot("CD,VD->CV", x_CD, head_VD)
    top_C = logit_CV.max(-1)
    if vocab_axis is not None:
      top_C = jax.lax.pmax(top_C, vocab_axis)
    exp_CV = jnp.exp(logit_CV - top_C[:, None])
    sum_C = total(exp_CV.sum(-1))
    is_target_CV = vocabulary_V[None] == target_C[:, None]
    target_logit_C = total(jnp.where(is_target_CV, logit_CV, 0.0).sum(-1))
    logp_C = target_logit_C - top_C - jnp.log(sum_C)
    # The first of the largest, as argmax, which XLA runs slowly on CPU.
    beaten_CV = (logit_CV > target_logit_C[:, None]) | (
      (logit_CV == target_logit_C[:, None]) & (vocabulary_V[None] < target_C[:, None]))
    correct_C = total(beaten_CV.sum(-1)) == 0

    # 1 - p, added up from the other tokens: near p = 1 float32 cannot subtract.
    rest_C = total(jnp.where(is_target_CV, 0.0, exp_CV).sum(-1)) / sum_C
    size_C = jnp.abs(weight_C)
    unlikely_C = weight_C < 0
    loss_C = size_C * -jnp.where(unlikely_C, jnp.log(jnp.maximum(rest_C, FLOOR)), logp_C)
    is_role_CR = jax.nn.one_hot(role_C, NUM_ROLES)  # NO_ROLE gives a row of zeros
    sums = jax.tree.map(jnp.add, sums, Sums(
      loss_C.sum(), size_C.sum(), (-logp_C[:, None] * is_role_CR).sum(0), (correct_C[:, None] * is_role_CR).sum(0),
      is_role_CR.sum(0)))
    if with_gradient:
      head_grad_VD, stream_grad_MD = gradients
      # Slope of the loss in log p; a clamped token has none.
      unlikely_slope_C = jnp.where(rest_C > FLOOR, jnp.exp(logp_C) / jnp.maximum(rest_C, FLOOR), 0.0)
      slope_C = size_C * jnp.where(unlikely_C, unlikely_slope_C, -1.0)
      slope_CV = slope_C[:, None] * jnp.where(is_target_CV, rest_C[:, None], -exp_CV / sum_C[:, None])
      slope_CV = slope_CV.astype(x_CD.dtype)
      x_grad_CD = total(dot("CV,VD->CD", slope_CV, head_VD)).astype(x_CD.dtype)
      gradients = (head_grad_VD + dot("CV,CD->VD", slope_CV, x_CD),
                   stream_grad_MD.at[index_C].set(x_grad_CD, mode="drop", unique_indices=True))
    return sums, gradients

  empty = (jnp.zeros((V, D)), jnp.zeros((M, D), stream_BTD.dtype)) if with_gradient else None
  sums, gradients = jax.lax.fori_loop(0, num_chunks, one_chunk, (no_sums(), empty))
  if with_gradient:
    gradients = (gradients[0], gradients[1].reshape(stream_BTD.shape))
  return sums, gradients

"""Masked loss with a weight per token: sums over tokens, the vocabulary projection in chunks of trained tokens only.

Letters are those of model/llama.py, and
  M position in a device's rows, one row after another (in rows_MD, place_M and logit_grad_WM: marker, as in lora.py)
  C position in a chunk of trained tokens
  W position in the chunks of all devices that share a vocabulary
This module does not divide: sums are added over chunks, micro-batches, devices and hosts, and training/step.py divides
the gradient by the sum of |weight|. The gradient here is that of the head and of the stream; jax.grad in step.py
continues it through the model.

Order: `shift` makes targets, `loss_sums` is the entry, `_weighted_sums` its custom gradient, `_sums` communicates the
head, `_chunked` adds up chunks, whose arithmetic is in scores.py, and `_over_chunks` loops over them.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from insec_jax.config import PolicyConfig
from insec_jax.method.roles import NO_NEGATIVE, NO_ROLE
from insec_jax.model import sharding
from insec_jax.model.sharding import BATCH, TENSOR
from insec_jax.training.policy_loss import Old
from insec_jax.training.scores import (
  Head,
  Scores,
  Sums,
  Targets,
  Teacher,
  chunk_sums,
  logit_grads,
  no_sums,
  product,
  score,
)
from insec_jax.training.vocabulary_plan import Plan, split_fsdp


def shift(token_BT, segment_BT, role_BT, weight_BT, negative_BT=None, mesh=None, old_BT: Old | None = None) -> Targets:
  """Return the target of each position: the next token within its segment.

      token     a  b  c  d  e  .        role      0  1  2  0  3 -1        weight    0  1  2  0  4  0
      segment   1  1  1  2  2  0
      target    b  c  .  e  .  .        role      1  2 -1  3 -1 -1        weight    1  2  0  4  0  0

  Negatives and old log p, where given, are shifted like roles. No other function shifts. Where devices share a row, the
  last position of one predicts the first of the next.
  """
  target_BT, next_segment_BT, next_role_BT, next_weight_BT = (
    sharding.following(array_BT, mesh) for array_BT in (token_BT, segment_BT, role_BT, weight_BT)
  )
  same_BT = (next_segment_BT == segment_BT) & (segment_BT > 0) & sharding.has_next(token_BT.shape[1], mesh)[None]
  if negative_BT is not None:
    negative_BT = jnp.where(same_BT, sharding.following(negative_BT, mesh), NO_NEGATIVE)
  return Targets(
    target_BT,
    jnp.where(same_BT, next_role_BT, NO_ROLE),
    jnp.where(same_BT, next_weight_BT, 0.0),
    negative_BT,
    jax.tree.map(lambda x_BT: sharding.following(x_BT, mesh), old_BT),
  )


def chunk_size(num_tokens: int) -> int:
  """Return the number of trained tokens that are multiplied with the vocabulary at once.

  It is an eighth of a device's tokens, so that little of the last chunk is empty, and at most 1,024, so that the
  float32 logits over 128,256 tokens take at most half a GiB.
  """
  return min(1024, 128 * math.ceil(num_tokens / 8 / 128))


def loss_sums(
  head_VD,
  stream_BTD,
  token_BT,
  segment_BT,
  role_BT,
  weight_BT,
  negative_BT=None,
  *,
  repeat=0.0,
  mesh=None,
  chunk=None,
  rows_MD=None,
  markers=None,
  old_BT: Old | None = None,
  policy: PolicyConfig | None = None,
  teacher: Teacher | None = None,
) -> Sums:
  """Return the sums of the weighted loss over tokens of non-zero weight; only `loss` has a gradient (head and stream).

  Weight w > 0 costs w * -log p(token). Weight w < 0 is unlikelihood, |w| * -log(max(1 - p(token), 1e-5)), without a
  gradient where it is clamped. A negative n adds repeat * -log(max(1 - p(n), 1e-5)), whatever the weight of its
  token; without negatives none of this is compiled. With a mesh the function runs inside jax.shard_map, on the device's
  shard of the head and its own tokens, and sums over these.

  With `markers`, token ids, the head has no gradient (LoRA): rows_MD, None without markers, take the place of their
  rows and have one. With `policy` a token costs what policy_loss.token_losses says, its weight is the advantage; with a
  `teacher` it costs its weight, none below 0, times its divergence from the teacher (distill_loss.py).
  """
  targets = shift(token_BT, segment_BT, role_BT, weight_BT, negative_BT, mesh, old_BT)
  targets = targets._replace(weight=targets.weight.astype(jnp.float32))
  plan = _plan(head_VD, stream_BTD, mesh, chunk)._replace(repeat=repeat, markers=markers, policy=policy)
  return _weighted_sums(Head(head_VD, rows_MD), stream_BTD, targets, teacher, plan)


def target_logps(
  head_VD, stream_BTD, token_BT, segment_BT, role_BT, weight_BT, *, mesh=None, rows_MD=None, markers=None
):
  """Return the log p of the next token at each position, [B, T] float32; 0 where that token has weight 0.

  The arithmetic is that of `loss_sums`; arguments and mesh as there.
  """
  targets = shift(token_BT, segment_BT, role_BT, weight_BT, mesh=mesh)
  plan = _plan(head_VD, stream_BTD, mesh, None)._replace(markers=markers)
  head = _gathered(Head(head_VD, rows_MD), stream_BTD.dtype, plan)

  def add_chunk(chunk: Chunk, logp_M):
    logp_C = plan.own(chunk.scores.logp_W)
    return logp_M.at[chunk.index_C].set(logp_C, mode="drop", unique_indices=True)

  return _over_chunks(head, stream_BTD, targets, plan, add_chunk, jnp.zeros(token_BT.size)).reshape(token_BT.shape)


def _plan(head_VD, stream_BTD, mesh, chunk: int | None) -> Plan:
  """Return how devices share the vocabulary for the rows of this stream."""
  B, T, _ = stream_BTD.shape
  token_axes, head_axes = (
    ((), ())
    if mesh is None
    else split_fsdp(mesh, num_tokens=B * T, num_rows=head_VD.shape[0], itemsize=stream_BTD.dtype.itemsize)
  )
  return Plan(mesh, token_axes, head_axes, chunk or chunk_size(B * T), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_sums(head: Head, stream_BTD, targets: Targets, teacher: Teacher | None, plan: Plan) -> Sums:
  return _sums(head, stream_BTD, targets, teacher, plan, with_gradient=False)[0]


def _forward(head: Head, stream_BTD, targets: Targets, teacher: Teacher | None, plan: Plan):
  # Gradients are computed in the forward pass: each chunk's logits exist once, and the number of chunks may depend on
  # the data.
  return _sums(head, stream_BTD, targets, teacher, plan, with_gradient=True)


def _backward(plan: Plan, gradients, cotangent):
  del plan
  head, stream_BTD = jax.tree.map(lambda gradient: (gradient * cotangent.loss).astype(gradient.dtype), gradients)
  return head, stream_BTD, None, None


_weighted_sums.defvjp(_forward, _backward)


def _sums(head: Head, stream_BTD, targets: Targets, teacher: Teacher | None, plan: Plan, *, with_gradient: bool):
  """Return (sums, gradients of head and stream or None); the head is split along its width over fsdp.

  Along `token_axes` each device takes a part of the vocabulary, and trained tokens are communicated; along `head_axes`
  the head is gathered.
  """
  part = _gathered(head, stream_BTD.dtype, plan)
  if teacher is not None and teacher.head is not None:
    teacher = teacher._replace(head=_gathered(teacher.head, stream_BTD.dtype, plan))
  sums, gradients = _chunked(part, stream_BTD, targets, teacher, plan, with_gradient=with_gradient)
  if not with_gradient:
    return sums, None
  trained, stream_grad_BTD = gradients
  if plan.markers is not None:
    if trained is not None:
      trained = sharding.scatter(sharding.leave(trained, plan.mesh), 1, plan.mesh).astype(head.rows_MD.dtype)
    return sums, (Head(None, trained), stream_grad_BTD)
  head_grad_VD = sharding.scatter(trained, 1, plan.mesh, plan.head_axes).astype(head.weight_VD.dtype)
  if plan.token_axes:
    head_grad_VD = jax.lax.all_to_all(head_grad_VD, plan.token_axes, split_axis=1, concat_axis=0, tiled=True)
  # A barrier: else the compiler delays the scatter and keeps the whole gradient through the layers' backward pass.
  return sums, jax.lax.optimization_barrier((Head(head_grad_VD, None), stream_grad_BTD))


def _gathered(head: Head, dtype, plan: Plan) -> Head:
  """Return the device's part of the vocabulary, whole along its width."""
  part_VD = head.weight_VD.astype(dtype)  # before communication: half the bytes in bfloat16
  if plan.token_axes:
    part_VD = jax.lax.all_to_all(part_VD, plan.token_axes, split_axis=0, concat_axis=1, tiled=True)
  part_VD = sharding.gather(part_VD, 1, plan.mesh, plan.head_axes)
  rows_MD = head.rows_MD
  if rows_MD is not None:
    rows_MD = sharding.gather(rows_MD.astype(dtype), 1, plan.mesh)
  return Head(part_VD, rows_MD)


class Chunk(NamedTuple):
  """Trained tokens of a chunk: their places on axis M, streams, targets and scores."""

  index_C: jax.Array
  x_CD: jax.Array
  x_WD: jax.Array
  targets_C: Targets
  targets_W: Targets
  scores: Scores


def _over_chunks(
  head: Head, stream_BTD, targets: Targets, plan: Plan, add_chunk: Callable, start, teacher: Teacher | None = None
):
  """Return `add_chunk(chunk, value)` of each chunk of trained tokens after the other, the first value `start`."""
  V, D = head.weight_VD.shape
  vocabulary_V = (jax.lax.axis_index(plan.axes) * V if plan.axes else 0) + jnp.arange(V)
  stream_MD = stream_BTD.reshape(-1, D)
  targets_M, index_M, num_chunks = _trained_first(targets, plan)

  def add(number, value):
    index_C = jax.lax.dynamic_slice(index_M, (number * plan.chunk,), (plan.chunk,))
    x_CD = stream_MD.at[index_C].get(mode="fill", fill_value=0)
    targets_C = _take(targets_M, index_C)
    x_WD = plan.gather(x_CD)
    targets_W = jax.tree.map(plan.gather, targets_C._replace(role=None))
    taught = None
    if teacher is not None:
      taught_CD = teacher.stream.reshape(-1, D).at[index_C].get(mode="fill", fill_value=0)
      taught = Teacher(plan.gather(taught_CD), teacher.head)
    scores = score(x_WD, head, vocabulary_V, targets_W, plan, taught)
    return add_chunk(Chunk(index_C, x_CD, x_WD, targets_C, targets_W, scores), value)

  with jax.named_scope("trained_chunks"):
    return jax.lax.fori_loop(0, num_chunks, add, start)


def _chunked(head: Head, stream_BTD, targets: Targets, teacher: Teacher | None, plan: Plan, *, with_gradient: bool):
  """Return (sums, (float32 gradient, gradient of the stream) or None) of the device's rows.

  The first gradient is that of this part of the head, or of the markers' rows; None where neither is trained.
  """
  V, D = head.weight_VD.shape

  def add_chunk(chunk: Chunk, carry):
    sums, gradients = carry
    index_C, x_CD = chunk.index_C, chunk.x_CD
    sums = jax.tree.map(jnp.add, sums, chunk_sums(chunk.scores, chunk.targets_W, chunk.targets_C, plan))
    if with_gradient:
      trained, stream_grad_MD = gradients
      logit_grad_WV = logit_grads(chunk.scores, chunk.targets_W, plan).astype(x_CD.dtype)
      x_grad_WD = _stream_grads(logit_grad_WV, head, plan)
      if plan.token_axes:
        x_grad_WD = sharding.scatter(x_grad_WD.astype(x_CD.dtype), 0, plan.mesh, plan.token_axes)
      if TENSOR in plan.axes:
        x_grad_WD = jax.lax.psum(x_grad_WD, TENSOR)
      gradients = (
        _with_head_grads(trained, logit_grad_WV, chunk.x_WD, plan),
        stream_grad_MD.at[index_C].set(x_grad_WD.astype(x_CD.dtype), mode="drop", unique_indices=True),
      )
    return sums, gradients

  untrained = (
    jnp.zeros((V, D)) if plan.markers is None else None if head.rows_MD is None else jnp.zeros(head.rows_MD.shape)
  )
  empty = (untrained, jnp.zeros_like(stream_BTD.reshape(-1, D))) if with_gradient else None
  start = (no_sums(negatives=targets.negative is not None, policy=plan.policy), empty)
  sums, gradients = _over_chunks(head, stream_BTD, targets, plan, add_chunk, start, teacher)
  if with_gradient:
    gradients = (gradients[0], gradients[1].reshape(stream_BTD.shape))
  return sums, gradients


def _stream_grads(logit_grad_WV, head: Head, plan: Plan):
  """Return the gradient of a chunk in the stream, [W, D]."""
  if head.rows_MD is None:
    return product("WV,VD->WD", logit_grad_WV, head.weight_VD)
  place_M = plan.marker_places(logit_grad_WV.shape[1])
  logit_grad_WM = logit_grad_WV.at[:, place_M].get(mode="fill", fill_value=0)
  others_WV = logit_grad_WV.at[:, place_M].set(0, mode="drop")
  return product("WV,VD->WD", others_WV, head.weight_VD) + product("WM,MD->WD", logit_grad_WM, head.rows_MD)


def _with_head_grads(trained, logit_grad_WV, x_WD, plan: Plan):
  """Return `trained` with the gradient of a chunk added: of the head, of the markers' rows, or None for neither."""
  if plan.markers is None:
    return trained + product("WV,WD->VD", logit_grad_WV, x_WD)
  if trained is None:
    return None
  place_M = plan.marker_places(logit_grad_WV.shape[1])
  return trained + product("WM,WD->MD", logit_grad_WV.at[:, place_M].get(mode="fill", fill_value=0), x_WD)


def _trained_first(targets: Targets, plan: Plan):
  """Return (targets_M, positions with the trained ones first, number of chunks that hold these)."""
  targets_M = jax.tree.map(lambda x_BT: x_BT.reshape(-1), targets)
  M, is_trained_M = targets_M.token.size, targets_M.weight != 0
  if targets_M.negative is not None:
    # A token with only a negative does not count for its role.
    targets_M = targets_M._replace(role=jnp.where(is_trained_M, targets_M.role, NO_ROLE))
    is_trained_M |= targets_M.negative >= 0
  num_trained = is_trained_M.sum()
  num_chunks = -(-num_trained // plan.chunk)
  if plan.axes:
    # Devices that share the vocabulary communicate in every chunk, so all must loop over the same number.
    num_chunks = jax.lax.pmax(num_chunks, BATCH)
  # The rest of the last chunk points past the end: it is read as zero and never written.
  past_M = M + jnp.arange(plan.chunk * math.ceil(M / plan.chunk))
  index_M = jnp.where(past_M - M < num_trained, jnp.nonzero(is_trained_M, size=past_M.size, fill_value=M)[0], past_M)
  return targets_M, index_M, num_chunks


def _take(targets_M: Targets, index_C) -> Targets:
  """Return the targets at these positions; none where a position is past the end."""
  negative, old = (
    None if one is None else fill for one, fill in ((targets_M.negative, NO_NEGATIVE), (targets_M.old, Old(0, 0)))
  )
  none = Targets(0, NO_ROLE, 0, negative, old)
  return jax.tree.map(lambda x_M, fill: x_M.at[index_C].get(mode="fill", fill_value=fill), targets_M, none)

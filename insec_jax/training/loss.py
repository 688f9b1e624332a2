"""Masked loss with a weight per token: sums over tokens, the vocabulary projection in chunks of trained tokens only.

Letters are those of model/llama.py, and
  M position in a device's rows, one row after another (in rows_MD, place_M and logit_grad_WM: marker, as in lora.py)
  C position in a chunk of trained tokens
  W position in the chunks of all devices that share a vocabulary
This module does not divide: sums are added over chunks, micro-batches, devices and hosts, and training/step.py divides
the gradient by the sum of |weight|. The gradient here is that of the head and of the stream; jax.grad in step.py
continues it through the model.

Order: `shift` makes targets, `loss_sums` is the entry, `_weighted_sums` its custom gradient, `_sums` communicates the
head, `_chunked` loops over chunks, and `_score`, `_chunk_sums`, `_logit_grads` are the arithmetic of one chunk.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from insec_jax.method.roles import NO_NEGATIVE, NO_ROLE, NUM_ROLES
from insec_jax.model import sharding
from insec_jax.model.sharding import BATCH, TENSOR
from insec_jax.training.vocabulary_plan import Plan, split_fsdp

FLOOR = 1e-5  # of 1 - p in unlikelihood, arXiv 1908.04319 and its code


class Targets(NamedTuple):
  """What each position predicts: a token, with its role and weight, and a token to avoid (a negative).

  Role NO_ROLE, weight 0 and NO_NEGATIVE mean none; `negative` is None where the batch has none at all.
  """

  token: jax.Array
  role: jax.Array
  weight: jax.Array
  negative: jax.Array | None


class Negatives(NamedTuple):
  """Unweighted float32 sums over negatives: -log(1 - p) clamped as in unlikelihood, p, and their number."""

  cost: jax.Array
  p: jax.Array
  count: jax.Array


class Sums(NamedTuple):
  """Float32 sums over tokens of non-zero weight, zeros for an empty batch; to be added, and divided last.

  loss: the weighted loss; weight: the sum of |weight|; both with negatives at weight `repeat`. nll_R, correct_R
  (the likeliest token is the target) and count_R: unweighted, without negatives. negatives: None where the batch has no
  negative_BT.
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


def shift(token_BT, segment_BT, role_BT, weight_BT, negative_BT=None, mesh=None) -> Targets:
  """Return the target of each position: the next token within its segment.

      token     a  b  c  d  e  .        role      0  1  2  0  3 -1        weight    0  1  2  0  4  0
      segment   1  1  1  2  2  0
      target    b  c  .  e  .  .        role      1  2 -1  3 -1 -1        weight    1  2  0  4  0  0

  Negatives, where given, are shifted like roles. No other function shifts. Where devices share a row, the last position
  of one predicts the first of the next.
  """
  target_BT, next_segment_BT, next_role_BT, next_weight_BT = (
    sharding.following(array_BT, mesh) for array_BT in (token_BT, segment_BT, role_BT, weight_BT)
  )
  same_BT = (next_segment_BT == segment_BT) & (segment_BT > 0) & sharding.has_next(token_BT.shape[1], mesh)[None]
  if negative_BT is not None:
    negative_BT = jnp.where(same_BT, sharding.following(negative_BT, mesh), NO_NEGATIVE)
  return Targets(
    target_BT, jnp.where(same_BT, next_role_BT, NO_ROLE), jnp.where(same_BT, next_weight_BT, 0.0), negative_BT
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
) -> Sums:
  """Return the sums of the weighted loss over tokens of non-zero weight; only `loss` has a gradient (head and stream).

  Weight w > 0 costs w * -log p(token). Weight w < 0 is unlikelihood, |w| * -log(max(1 - p(token), 1e-5)), without a
  gradient where it is clamped. A negative n adds repeat * -log(max(1 - p(n), 1e-5)), whatever the weight of its
  token; without negatives none of this is compiled. With a mesh the function runs inside jax.shard_map, on the device's
  shard of the head and its own tokens, and sums over these.

  With `markers`, token ids, the head has no gradient (LoRA): rows_MD, None without markers, take the place of their
  rows and have one.
  """
  targets = shift(token_BT, segment_BT, role_BT, weight_BT, negative_BT, mesh)
  targets = targets._replace(weight=targets.weight.astype(jnp.float32))
  token_axes, head_axes = (
    ((), ())
    if mesh is None
    else split_fsdp(mesh, num_tokens=token_BT.size, num_rows=head_VD.shape[0], itemsize=stream_BTD.dtype.itemsize)
  )
  plan = Plan(mesh, token_axes, head_axes, chunk or chunk_size(token_BT.size), repeat, markers)
  return _weighted_sums(Head(head_VD, rows_MD), stream_BTD, targets, plan)


class Head(NamedTuple):
  """Output matrix, and the trained rows that replace its rows of the markers, None where there are none."""

  weight_VD: jax.Array
  rows_MD: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _weighted_sums(head: Head, stream_BTD, targets: Targets, plan: Plan) -> Sums:
  return _sums(head, stream_BTD, targets, plan, with_gradient=False)[0]


def _forward(head: Head, stream_BTD, targets: Targets, plan: Plan):
  # Gradients are computed in the forward pass: each chunk's logits exist once, and the number of chunks may depend on
  # the data.
  return _sums(head, stream_BTD, targets, plan, with_gradient=True)


def _backward(plan: Plan, gradients, cotangent):
  del plan
  head, stream_BTD = jax.tree.map(lambda gradient: (gradient * cotangent.loss).astype(gradient.dtype), gradients)
  return head, stream_BTD, None


_weighted_sums.defvjp(_forward, _backward)


def _sums(head: Head, stream_BTD, targets: Targets, plan: Plan, *, with_gradient: bool):
  """Return (sums, gradients of head and stream or None); the head is split along its width over fsdp.

  Along `token_axes` each device takes a part of the vocabulary, and trained tokens are communicated; along `head_axes`
  the head is gathered.
  """
  part_VD = head.weight_VD.astype(stream_BTD.dtype)  # before communication: half the bytes in bfloat16
  if plan.token_axes:
    part_VD = jax.lax.all_to_all(part_VD, plan.token_axes, split_axis=0, concat_axis=1, tiled=True)
  part_VD = sharding.gather(part_VD, 1, plan.mesh, plan.head_axes)
  rows_MD = head.rows_MD
  if rows_MD is not None:
    rows_MD = sharding.gather(rows_MD.astype(stream_BTD.dtype), 1, plan.mesh)
  sums, gradients = _chunked(Head(part_VD, rows_MD), stream_BTD, targets, plan, with_gradient=with_gradient)
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


def _chunked(head: Head, stream_BTD, targets: Targets, plan: Plan, *, with_gradient: bool):
  """Return (sums, (float32 gradient, gradient of the stream) or None) of the device's rows.

  The first gradient is that of this part of the head, or of the markers' rows; None where neither is trained.
  """
  V, D = head.weight_VD.shape
  vocabulary_V = (jax.lax.axis_index(plan.axes) * V if plan.axes else 0) + jnp.arange(V)
  stream_MD = stream_BTD.reshape(-1, D)
  targets_M, index_M, num_chunks = _trained_first(targets, plan)

  def add_chunk(number, carry):
    sums, gradients = carry
    index_C = jax.lax.dynamic_slice(index_M, (number * plan.chunk,), (plan.chunk,))
    x_CD = stream_MD.at[index_C].get(mode="fill", fill_value=0)
    targets_C = _take(targets_M, index_C)
    x_WD = plan.gather(x_CD)
    targets_W = jax.tree.map(plan.gather, targets_C._replace(role=None))
    scores = _score(x_WD, head, vocabulary_V, targets_W, plan)
    sums = jax.tree.map(jnp.add, sums, _chunk_sums(scores, targets_W, targets_C, plan))
    if with_gradient:
      trained, stream_grad_MD = gradients
      logit_grad_WV = _logit_grads(scores, targets_W, plan.repeat).astype(x_CD.dtype)
      x_grad_WD = _stream_grads(logit_grad_WV, head, plan)
      if plan.token_axes:
        x_grad_WD = sharding.scatter(x_grad_WD.astype(x_CD.dtype), 0, plan.mesh, plan.token_axes)
      if TENSOR in plan.axes:
        x_grad_WD = jax.lax.psum(x_grad_WD, TENSOR)
      gradients = (
        _with_head_grads(trained, logit_grad_WV, x_WD, plan),
        stream_grad_MD.at[index_C].set(x_grad_WD.astype(x_CD.dtype), mode="drop", unique_indices=True),
      )
    return sums, gradients

  untrained = (
    jnp.zeros((V, D)) if plan.markers is None else None if head.rows_MD is None else jnp.zeros(head.rows_MD.shape)
  )
  empty = (untrained, jnp.zeros_like(stream_MD)) if with_gradient else None
  with jax.named_scope("trained_chunks"):
    start = (no_sums(negatives=targets.negative is not None), empty)
    sums, gradients = jax.lax.fori_loop(0, num_chunks, add_chunk, start)
  if with_gradient:
    gradients = (gradients[0], gradients[1].reshape(stream_BTD.shape))
  return sums, gradients


def _stream_grads(logit_grad_WV, head: Head, plan: Plan):
  """Return the gradient of a chunk in the stream, [W, D]."""
  if head.rows_MD is None:
    return _dot("WV,VD->WD", logit_grad_WV, head.weight_VD)
  place_M = plan.marker_places(logit_grad_WV.shape[1])
  logit_grad_WM = logit_grad_WV.at[:, place_M].get(mode="fill", fill_value=0)
  others_WV = logit_grad_WV.at[:, place_M].set(0, mode="drop")
  return _dot("WV,VD->WD", others_WV, head.weight_VD) + _dot("WM,MD->WD", logit_grad_WM, head.rows_MD)


def _with_head_grads(trained, logit_grad_WV, x_WD, plan: Plan):
  """Return `trained` with the gradient of a chunk added: of the head, of the markers' rows, or None for neither."""
  if plan.markers is None:
    return trained + _dot("WV,WD->VD", logit_grad_WV, x_WD)
  if trained is None:
    return None
  place_M = plan.marker_places(logit_grad_WV.shape[1])
  return trained + _dot("WM,WD->MD", logit_grad_WV.at[:, place_M].get(mode="fill", fill_value=0), x_WD)


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
  none = Targets(0, NO_ROLE, 0, None if targets_M.negative is None else NO_NEGATIVE)
  return jax.tree.map(lambda x_M, fill: x_M.at[index_C].get(mode="fill", fill_value=fill), targets_M, none)


def _dot(axes: str, x, y):
  """Return the matrix product in float32, which on TPU multiplies in bfloat16 by default."""
  precision = "highest" if y.dtype == jnp.float32 else None
  return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32, precision=precision)


class Scores(NamedTuple):
  """The device's part of the exponentials of a chunk's logits, and probabilities of targets and negatives.

  complement_W, negative_complement_W: 1 - p of the token, summed over the others: float32 cannot subtract near p = 1.
  """

  exp_WV: jax.Array
  sum_W: jax.Array
  is_target_WV: jax.Array
  logp_W: jax.Array
  complement_W: jax.Array
  correct_W: jax.Array
  is_negative_WV: jax.Array | None
  negative_p_W: jax.Array | None
  negative_complement_W: jax.Array | None


def _score(x_WD, head: Head, vocabulary_V, targets_W: Targets, plan: Plan) -> Scores:
  """Return the scores of a chunk; `vocabulary_V` are the tokens of the device's part."""
  logit_WV = _dot("WD,VD->WV", x_WD, head.weight_VD)
  if head.rows_MD is not None:
    place_M = plan.marker_places(vocabulary_V.size)
    logit_WV = logit_WV.at[:, place_M].set(_dot("WD,MD->WM", x_WD, head.rows_MD), mode="drop")
  top_W = plan.reduce(jax.lax.pmax, logit_WV.max(-1))
  exp_WV = jnp.exp(logit_WV - top_W[:, None])

  def parts(token_W):
    """Return whether each entry is the token's, its logit and the sum of the others' exponentials, of this part."""
    is_token_WV = vocabulary_V[None] == token_W[:, None]
    return is_token_WV, jnp.where(is_token_WV, logit_WV, 0.0).sum(-1), jnp.where(is_token_WV, 0.0, exp_WV).sum(-1)

  negatives = targets_W.negative is not None
  is_target_WV, *target_parts = parts(targets_W.token)
  is_negative_WV, *negative_parts = parts(targets_W.negative) if negatives else (None,)
  sum_W, (target_logit_W, others_W), negative_parts = plan.reduce(
    jax.lax.psum, (exp_WV.sum(-1), target_parts, negative_parts)
  )
  # The first of the largest, as argmax, which XLA runs slowly on CPU.
  beaten_WV = (logit_WV > target_logit_W[:, None]) | (
    (logit_WV == target_logit_W[:, None]) & (vocabulary_V[None] < targets_W.token[:, None])
  )
  correct_W = plan.reduce(jax.lax.psum, beaten_WV.sum(-1)) == 0
  negative_p_W = negative_complement_W = None
  if negatives:
    negative_logit_W, negative_others_W = negative_parts
    negative_p_W = jnp.where(targets_W.negative >= 0, jnp.exp(negative_logit_W - top_W) / sum_W, 0.0)
    negative_complement_W = negative_others_W / sum_W
  return Scores(
    exp_WV,
    sum_W,
    is_target_WV,
    target_logit_W - top_W - jnp.log(sum_W),
    others_W / sum_W,
    correct_W,
    is_negative_WV,
    negative_p_W,
    negative_complement_W,
  )


def _chunk_sums(scores: Scores, targets_W: Targets, targets_C: Targets, plan: Plan) -> Sums:
  """Return the sums over the device's own tokens of a chunk."""
  complement_W, own = jnp.maximum(scores.complement_W, FLOOR), plan.own
  loss_W = jnp.abs(targets_W.weight) * -jnp.where(targets_W.weight < 0, jnp.log(complement_W), scores.logp_W)
  weight, negative_sums = jnp.abs(targets_C.weight).sum(), None
  if targets_C.negative is not None:
    cost_W = jnp.where(targets_W.negative >= 0, -jnp.log(jnp.maximum(scores.negative_complement_W, FLOOR)), 0.0)
    loss_W += plan.repeat * cost_W
    count = (targets_C.negative >= 0).sum().astype(jnp.float32)
    weight += plan.repeat * count
    negative_sums = Negatives(own(cost_W).sum(), own(scores.negative_p_W).sum(), count)
  is_role_CR = jax.nn.one_hot(targets_C.role, NUM_ROLES)  # NO_ROLE gives a row of zeros
  return Sums(
    own(loss_W).sum(),
    weight,
    (-own(scores.logp_W)[:, None] * is_role_CR).sum(0),
    (own(scores.correct_W)[:, None] * is_role_CR).sum(0),
    is_role_CR.sum(0),
    negative_sums,
  )


def _logit_grads(scores: Scores, targets_W: Targets, repeat: float):
  """Return the gradient of the loss in the logits, [W, V]; a clamped token has none."""

  def of_unlikelihood(p_W, complement_W):
    """Return the gradient of -log(1 - p) in log p."""
    return jnp.where(complement_W > FLOOR, p_W / jnp.maximum(complement_W, FLOOR), 0.0)

  def in_logits(logp_grad_W, is_token_WV, complement_W):
    """Return the gradient in log p times that of log p in the logits: 1 - p at the token itself, -p at each other."""
    return logp_grad_W[:, None] * jnp.where(is_token_WV, complement_W[:, None], -scores.exp_WV / scores.sum_W[:, None])

  unlikelihood_grad_W = of_unlikelihood(jnp.exp(scores.logp_W), scores.complement_W)
  logp_grad_W = jnp.abs(targets_W.weight) * jnp.where(targets_W.weight < 0, unlikelihood_grad_W, -1.0)
  logit_grad_WV = in_logits(logp_grad_W, scores.is_target_WV, scores.complement_W)
  if targets_W.negative is not None:
    negative_W = repeat * of_unlikelihood(scores.negative_p_W, scores.negative_complement_W)
    logit_grad_WV += in_logits(negative_W, scores.is_negative_WV, scores.negative_complement_W)
  return logit_grad_WV

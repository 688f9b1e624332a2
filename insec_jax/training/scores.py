"""Arithmetic of one chunk of trained tokens: sums of the loss, and its gradient in the logits.

Letters are those of training/loss.py, which loops over chunks; W are the positions in the chunks of all devices that
share a vocabulary, each of which has a part of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from insec_jax.config import PolicyConfig
from insec_jax.method.roles import NUM_ROLES
from insec_jax.training.distill_loss import Divergence, divergence
from insec_jax.training.policy_loss import Old, PolicySums, token_losses
from insec_jax.training.vocabulary_plan import Plan

FLOOR = 1e-5  # of 1 - p in unlikelihood, arXiv 1908.04319 and its code


class Targets(NamedTuple):
  """What each position predicts: a token, with its role and weight, and a token to avoid (a negative).

  Role NO_ROLE, weight 0 and NO_NEGATIVE mean none; `negative` is None where the batch has none at all. `old` is there
  for a policy gradient only, in which the weight is the advantage.
  """

  token: jax.Array
  role: jax.Array
  weight: jax.Array
  negative: jax.Array | None
  old: Old | None = None


class Negatives(NamedTuple):
  """Unweighted float32 sums over negatives: -log(1 - p) clamped as in unlikelihood, p, and their number."""

  cost: jax.Array
  p: jax.Array
  count: jax.Array


class Sums(NamedTuple):
  """Float32 sums over tokens of non-zero weight, zeros for an empty batch; to be added, and divided last.

  loss: the weighted loss; weight: the sum of |weight|; both with negatives at weight `repeat`. nll_R, correct_R
  (the likeliest token is the target) and count_R: unweighted, without negatives. negatives: None where the batch has no
  negative_BT. policy: None without a policy gradient, in which `weight` is the number of tokens. divergence_R:
  unweighted, from the teacher of a distillation; None without one.
  """

  loss: jax.Array
  weight: jax.Array
  nll_R: jax.Array
  correct_R: jax.Array
  count_R: jax.Array
  negatives: Negatives | None = None
  policy: PolicySums | None = None
  divergence_R: jax.Array | None = None


class Head(NamedTuple):
  """Output matrix, and the trained rows that replace its rows of the markers, None where there are none."""

  weight_VD: jax.Array
  rows_MD: jax.Array | None


def no_sums(*, negatives: bool, policy: PolicyConfig | None = None) -> Sums:
  """Return the sums over no token."""
  distills = policy is not None and policy.distills
  zero, zeros_R = jnp.zeros(()), jnp.zeros(NUM_ROLES)
  return Sums(
    zero,
    zero,
    zeros_R,
    zeros_R,
    zeros_R,
    Negatives(zero, zero, zero) if negatives else None,
    None if policy is None or distills else PolicySums(zero, zero, zero),
    zeros_R if distills else None,
  )


def product(axes: str, x, y):
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
  divergence: Divergence | None = None  # from the teacher of a distillation


class Teacher(NamedTuple):
  """Stream with which a teacher predicts at each position of the student, and its output matrix.

  Its position is the one that reads the same token, after the hint. `head` None: the matrix is the student's.
  """

  stream: jax.Array
  head: Head | None


def _logits(x_WD, head: Head, plan: Plan):
  """Return the logits of the device's part of the vocabulary, float32."""
  logit_WV = product("WD,VD->WV", x_WD, head.weight_VD)
  if head.rows_MD is None:
    return logit_WV
  place_M = plan.marker_places(head.weight_VD.shape[0])
  return logit_WV.at[:, place_M].set(product("WD,MD->WM", x_WD, head.rows_MD), mode="drop")


def score(x_WD, head: Head, vocabulary_V, targets_W: Targets, plan: Plan, teacher: Teacher | None = None) -> Scores:
  """Return the scores of a chunk; `vocabulary_V` are the tokens of the device's part."""
  logit_WV = _logits(x_WD, head, plan)
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
    None if teacher is None else _divergence(logit_WV - (top_W + jnp.log(sum_W))[:, None], head, plan, teacher),
  )


def _divergence(logp_WV, head: Head, plan: Plan, teacher: Teacher) -> Divergence:
  """Return the divergence of the student from the teacher of a chunk."""
  logit_WV = _logits(teacher.stream, teacher.head or head, plan)
  top_W = plan.reduce(jax.lax.pmax, logit_WV.max(-1))
  sum_W = plan.reduce(jax.lax.psum, jnp.exp(logit_WV - top_W[:, None]).sum(-1))
  logq_WV = logit_WV - (top_W + jnp.log(sum_W))[:, None]
  return divergence(logp_WV, logq_WV, plan.forward, lambda sums: plan.reduce(jax.lax.psum, sums))


def chunk_sums(scores: Scores, targets_W: Targets, targets_C: Targets, plan: Plan) -> Sums:
  """Return the sums over the device's own tokens of a chunk."""
  own, negative_sums, policy_sums, divergence_C = plan.own, None, None, None
  if scores.divergence is not None:
    loss_W, weight = targets_W.weight * scores.divergence.loss_W, targets_C.weight.sum()
    divergence_C = own(scores.divergence.loss_W)
  elif plan.policy is None:
    complement_W = jnp.maximum(scores.complement_W, FLOOR)
    loss_W = jnp.abs(targets_W.weight) * -jnp.where(targets_W.weight < 0, jnp.log(complement_W), scores.logp_W)
    weight = jnp.abs(targets_C.weight).sum()
  else:
    losses = token_losses(scores.logp_W, targets_W.old, targets_W.weight, plan.policy)
    loss_W, weight = losses.loss_W, (targets_C.weight != 0).sum().astype(jnp.float32)
    policy_sums = PolicySums(own(losses.kl_W).sum(), own(losses.clipped_W).sum(), weight)
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
    policy_sums,
    None if divergence_C is None else (divergence_C[:, None] * is_role_CR).sum(0),
  )


def logit_grads(scores: Scores, targets_W: Targets, plan: Plan):
  """Return the gradient of the loss in the logits, [W, V]; a clamped token has none."""

  def of_unlikelihood(p_W, complement_W):
    """Return the gradient of -log(1 - p) in log p."""
    return jnp.where(complement_W > FLOOR, p_W / jnp.maximum(complement_W, FLOOR), 0.0)

  def in_logits(logp_grad_W, is_token_WV, complement_W):
    """Return the gradient in log p times that of log p in the logits: 1 - p at the token itself, -p at each other."""
    return logp_grad_W[:, None] * jnp.where(is_token_WV, complement_W[:, None], -scores.exp_WV / scores.sum_W[:, None])

  if scores.divergence is not None:
    logit_grad_WV = targets_W.weight[:, None] * scores.divergence.logit_grad_WV
  else:
    if plan.policy is None:
      unlikelihood_grad_W = of_unlikelihood(jnp.exp(scores.logp_W), scores.complement_W)
      logp_grad_W = jnp.abs(targets_W.weight) * jnp.where(targets_W.weight < 0, unlikelihood_grad_W, -1.0)
    else:
      logp_grad_W = token_losses(scores.logp_W, targets_W.old, targets_W.weight, plan.policy).slope_W
    logit_grad_WV = in_logits(logp_grad_W, scores.is_target_WV, scores.complement_W)
  if targets_W.negative is not None:
    negative_W = plan.repeat * of_unlikelihood(scores.negative_p_W, scores.negative_complement_W)
    logit_grad_WV += in_logits(negative_W, scores.is_negative_WV, scores.negative_complement_W)
  return logit_grad_WV

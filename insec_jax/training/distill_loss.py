"""Distillation of single tokens: divergence of a student from a teacher, which has a hint, over the whole vocabulary.

Letters are those of training/loss.py. Each device has a part of the vocabulary; `reduce` sums over the parts.

    D = (1 - f) sum_v p (log p - log q) + f sum_v q (log q - log p)      p student, q teacher, f policy.forward
    dD/dz_v = (1 - f) p_v (log p_v - log q_v - KL(p || q)) + f (p_v - q_v)

The first term is the reverse KL of on-policy distillation (arXiv 2306.13649). Its gradient at a token vanishes with the
student's p, so it hardly teaches a flag where the student is sure that it needs none. That of the second does not.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from insec_jax.config import PolicyConfig

RIGHT, WRONG = "right", "wrong"  # hints: names of a batch's arrays begin with them


def hints_of(policy: PolicyConfig | None) -> tuple[str, ...]:
  """Return the hints that the teacher reads, each in rows of its own; none without a teacher."""
  if policy is None or not policy.distills:
    return ()
  return (RIGHT, WRONG) if policy.contrast else (RIGHT,)


class Divergence(NamedTuple):
  """Divergence of each token, and its gradient in the logits of the device's part of the vocabulary."""

  loss_W: jax.Array
  logit_grad_WV: jax.Array


def divergence(logp_WV, logq_WV, forward: float, reduce: Callable) -> Divergence:
  """Return the divergence of the student's log p from the teacher's log q; `forward` is f of the picture above."""
  p_WV, q_WV, gap_WV = jnp.exp(logp_WV), jnp.exp(logq_WV), logp_WV - logq_WV
  reverse_W, forward_W = reduce(((p_WV * gap_WV).sum(-1), -(q_WV * gap_WV).sum(-1)))
  return Divergence(
    (1 - forward) * reverse_W + forward * forward_W,
    (1 - forward) * p_WV * (gap_WV - reverse_W[:, None]) + forward * (p_WV - q_WV),
  )

"""Policy gradient of single tokens: the clipped ratio of PPO and a KL penalty, with their gradient in log p.

Letters are those of training/loss.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from insec_jax.config import PolicyConfig


class PolicySums(NamedTuple):
  """Float32 sums over sampled tokens: the estimated KL, how many have a ratio outside the clip, and their number."""

  kl: jax.Array
  clipped: jax.Array
  count: jax.Array


class Old(NamedTuple):
  """Log p of targets under the weights that sampled them, and under the reference, the weights the run began with."""

  logp: jax.Array
  reference: jax.Array


class TokenLosses(NamedTuple):
  """Loss of each token, its derivative in log p, the estimated KL, and whether the ratio is outside the clip."""

  loss_W: jax.Array
  slope_W: jax.Array
  kl_W: jax.Array
  clipped_W: jax.Array


def token_losses(logp_W, old_W: Old, advantage_W, policy: PolicyConfig) -> TokenLosses:
  """Return the losses of tokens with these log p; all are 0 where the advantage is 0, which means no sampled token.

  ratio = exp(logp - old)                               arXiv 1707.06347, equation 7:
  loss = -min(ratio * advantage, clip(ratio, 1 - c, 1 + c) * advantage) + policy.kl * kl
  kl = exp(reference - logp) - (reference - logp) - 1   arXiv 2402.03300, equation 4 (Schulman's k3)
  """
  ratio_W, log_ratio_W = jnp.exp(logp_W - old_W.logp), old_W.reference - logp_W
  gain_W = ratio_W * advantage_W
  clipped_gain_W = jnp.clip(ratio_W, 1 - policy.clip, 1 + policy.clip) * advantage_W
  kl_W = jnp.exp(log_ratio_W) - log_ratio_W - 1
  losses = TokenLosses(
    -jnp.minimum(gain_W, clipped_gain_W) + policy.kl * kl_W,
    -jnp.where(gain_W <= clipped_gain_W, gain_W, 0.0) + policy.kl * (1 - jnp.exp(log_ratio_W)),
    kl_W,
    (jnp.abs(ratio_W - 1) > policy.clip).astype(jnp.float32),
  )
  return jax.tree.map(lambda value_W: jnp.where(advantage_W != 0, value_W, 0.0), losses)

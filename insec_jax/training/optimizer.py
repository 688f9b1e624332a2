"""AdamW with linear warm-up and a cosine, on gradients that arrive in float32."""

import jax
import jax.numpy as jnp
import optax

from insec_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate of the update that follows `count` earlier ones.

      count                  0 .. warmup_steps - 1          .. steps - 1
      learning rate / peak   1 / warmup_steps .. 1          .. final_share, along half a cosine

  The first update already moves, and the last one has the final rate.
  """

  def rate(count):
    update = count + 1
    rising = update / max(config.warmup_steps, 1)
    progress = jnp.clip((update - config.warmup_steps) / max(steps - config.warmup_steps, 1), 0.0, 1.0)
    falling = config.final_share + (1 - config.final_share) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.learning_rate * jnp.where(update < config.warmup_steps, rising, falling)

  return rate


def decays(params):
  """A tree of bools: whether weight decay pulls at that parameter; norms are left alone."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "norm", params)


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Clip by the norm of the whole gradient, AdamW (arXiv 1711.05101), the schedule above.

  Both moments are as wide as what `init` is given: give it float32.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
    optax.add_decayed_weights(config.weight_decay, mask=decays),
    optax.scale_by_learning_rate(schedule(config, steps)),
  )

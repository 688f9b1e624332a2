"""AdamW with linear warm-up and cosine decay, for float32 gradients."""

import jax
import jax.numpy as jnp
import optax

from insec_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Return a function from `count`, the number of earlier updates, to the learning rate of the next update.

      count                  0 .. warmup_steps - 1          .. steps - 1
      learning rate / peak   1 / warmup_steps .. 1          .. final_share, along half a cosine

  The rate of the first update is above 0, and the last update has the final rate.
  """

  def rate(count):
    update = count + 1
    rising = update / max(config.warmup_steps, 1)
    progress = jnp.clip((update - config.warmup_steps) / max(steps - config.warmup_steps, 1), 0.0, 1.0)
    falling = config.final_share + (1 - config.final_share) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.learning_rate * jnp.where(update < config.warmup_steps, rising, falling)

  return rate


def decays(params):
  """Return a tree of bools: whether weight decay applies to the parameter; it does to all but norms and marker rows.

  Rows that are trained beside frozen ones (LoRA) would shrink towards 0; the decay of an adapter pulls to the base.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "norm" and path[0].key != "rows", params)


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Return the chain of clipping by the global gradient norm, AdamW (arXiv 1711.05101) and `schedule`.

  Both moments have the dtype of the tree given to `init`: pass float32.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
    optax.add_decayed_weights(config.weight_decay, mask=decays),
    optax.scale_by_learning_rate(schedule(config, steps)),
  )

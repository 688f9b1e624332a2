"""Optimizers by name, for float32 gradients: the learning rate, the update, and averages of the weights.

`TrainState.params` are always the weights to use: those that are measured, saved and exported. Where an optimizer takes
its gradient at other weights (schedule-free, a moving average), its state holds what `training_weights` needs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from insec_jax.config import OptimizerConfig
from insec_jax.model import memory
from insec_jax.training import rounding

MOMENTS = ("mu", "nu")  # fields of optax's states that config.moments stores in another dtype
FACTORED = {"v_row": -1, "v_col": -2}  # field of optax.FactoredState: the axis it lacks, in the order of sizes
SMALLEST_FACTORED = 128  # Adafactor keeps whole moments of a parameter with fewer than two axes of this size
BLOCK_RMS = 1.0  # root mean square to which Adafactor clips the update of a matrix
MUON_RMS = 0.2  # root mean square of Muon's updates, that of AdamW (arXiv 2502.16982)
# Axes of the matrices that Muon orthogonalises, each layer by itself: those of the input, those of the output.
MATRICES = {
  "wq": ((1,), (2, 3)),
  "wk": ((1,), (2, 3)),
  "wv": ((1,), (2, 3)),
  "wo": ((1, 2), (3,)),
  "gate": ((1,), (2,)),
  "up": ((1,), (2,)),
  "down": ((1,), (2,)),
}
DESCRIPTIONS = {
  "adamw": "AdamW",
  "adafactor": "Adafactor: second moments by row and column, no first moment",
  "lion": "Lion: the sign of a moment, no second moment",
  "muon": f"Muon on {', '.join(MATRICES)} of each layer; AdamW on embedding, head and norms",
  "schedule_free": "schedule-free AdamW: the weights that are measured and saved are the average",
}


class AveragedState(NamedTuple):
  """State of an optimizer whose `params` are the moving average; `weights` are those that it trains."""

  weights: Any
  inner: Any


def describe(config: OptimizerConfig) -> str:
  """Return what the optimizer is, in a line."""
  average = f"; measured and saved: the moving average by {config.ema:g} of the weights" if config.ema else ""
  rounded = ", rounded stochastically" if config.moments == "bfloat16" else ""
  params = "; bfloat16 parameters rounded stochastically" if config.rounding == "stochastic" else ""
  return f"{DESCRIPTIONS[config.name]}; moments {config.moments}{rounded}{params}{average}"


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


def make(config: OptimizerConfig, steps: int, *, clips: bool = True) -> optax.GradientTransformationExtraArgs:
  """Return the optimizer: clipping by the global gradient norm, the scaling of `name`, weight decay, `schedule`.

  Give `update` a random `key` where `moments` is bfloat16. The state has the dtype of the tree given to `init`: pass
  the parameters in float32. Weight decay is decoupled (arXiv 1711.05101). Without `clips` the gradient is one that
  `clip` has returned.
  """
  rate = schedule(config, steps)
  tx = optax.chain(
    optax.clip_by_global_norm(config.clip_norm) if clips else optax.identity(),
    _scaling(config),
    optax.add_decayed_weights(config.weight_decay, mask=decays),
    optax.scale_by_learning_rate(rate),
  )
  if config.name != "adamw":
    tx = _in_float32(tx)
  if config.moments == "bfloat16":
    tx = _bfloat16_moments(tx)
  if config.name == "schedule_free":
    tx = _schedule_free(tx, rate, config.b1)
  if config.ema:
    tx = _averaged(tx, config.ema)
  return optax.with_extra_args_support(tx)


def draws(config: OptimizerConfig) -> bool:
  """Return whether an update draws random numbers: one draw for all layers of a parameter."""
  return config.moments == "bfloat16" or config.rounding == "stochastic"


def clip(config: OptimizerConfig, gradient, norm):
  """Return a part of the gradient, whose global norm is `norm`, clipped as by optax.clip_by_global_norm."""
  return jax.tree.map(lambda part: jnp.where(norm < config.clip_norm, part, part / norm * config.clip_norm), gradient)


def _scaling(config: OptimizerConfig) -> optax.GradientTransformation:
  """Return the transformation of the clipped gradient into a direction whose root mean square is about 1."""
  adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
  if config.name == "adafactor":
    # Without the scaling by the parameter's size, so that the learning rate means the same as with AdamW.
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=SMALLEST_FACTORED)
    return optax.chain(factored, optax.stateless(lambda updates, _: _clip_blocks(updates)))
  if config.name == "lion":
    return optax.scale_by_lion(b1=config.b1, b2=config.b2)
  if config.name == "muon":
    muon = optax.contrib.scale_by_muon(beta=config.b1, weight_dimension_numbers=_muon_axes)
    scaled = optax.chain(muon, optax.stateless(lambda updates, _: _scale_matrices(updates)))
    return optax.partition({"muon": scaled, "adam": adam}, _muon_labels)
  if config.name == "schedule_free":
    return optax.scale_by_rms(decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)
  return adam


def _name(path) -> str:
  return str(path[-1].key)


def _field(key) -> str:
  """Return the field of a state that a key of a path names; empty for the key of a dict or a tuple."""
  return getattr(key, "name", "")


def _clip_blocks(updates):
  """Return the updates, each matrix of each layer clipped to a root mean square of BLOCK_RMS (arXiv 1804.04235)."""

  def clip(path, update):
    axes = tuple(range(1 if path[0].key == "layers" else 0, update.ndim))
    return update / jnp.maximum(1.0, jnp.sqrt(jnp.mean(update**2, axis=axes, keepdims=True)) / BLOCK_RMS)

  return jax.tree_util.tree_map_with_path(clip, updates)


def _muon_labels(params):
  return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _name(path) in MATRICES else "adam", params)


def _muon_axes(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: optax.contrib.MuonDimensionNumbers(*MATRICES[_name(path)]), params
  )


def _scale_matrices(updates):
  """Return orthogonal matrices scaled to the root mean square MUON_RMS."""

  def scale(path, update):
    sizes = (np.prod([update.shape[axis] for axis in axes]) for axes in MATRICES[_name(path)])
    return update * (MUON_RMS * max(sizes) ** 0.5)

  return jax.tree_util.tree_map_with_path(scale, updates)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Return the optimizer with parameters cast to float32: optax gives Adafactor's moments the parameters' dtype."""
  tx = optax.with_extra_args_support(tx)
  return optax.GradientTransformationExtraArgs(
    tx.init, lambda gradient, state, params, **extra: tx.update(gradient, state, _float32(params), **extra)
  )


def _float32(tree):
  return jax.tree.map(lambda array: array.astype(jnp.float32), tree)


def _bfloat16_moments(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Return the optimizer with both moments stored in bfloat16, rounded stochastically with the key of the update."""
  tx = optax.with_extra_args_support(tx)

  def is_moment(path) -> bool:
    return any(_field(key) in MOMENTS for key in path)

  def of_moments(function, state):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(leaf) if is_moment(path) else leaf, state)

  def init(params):
    return of_moments(lambda moment: moment.astype(jnp.bfloat16), tx.init(params))

  def update(gradient, state, params, *, key, **extra):
    update, changed = tx.update(gradient, of_moments(lambda moment: moment.astype(jnp.float32), state), params, **extra)
    return update, jax.tree_util.tree_map_with_path(
      lambda path, leaf: rounding.round_named(path, leaf, key) if is_moment(path) else leaf, changed
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _schedule_free(tx: optax.GradientTransformation, rate: optax.Schedule, b1: float):
  """Return schedule-free learning around `tx` (arXiv 2405.15682) whose parameters are its average x, not y."""
  free = optax.contrib.schedule_free(tx, learning_rate=lambda count: rate(count - 1), b1=b1)  # optax counts from 1

  def update(gradient, state, params, **extra):
    at = training_weights(params, state)
    update, changed = free.update(gradient, state, at, **extra)
    average = optax.contrib.schedule_free_eval_params(changed, optax.apply_updates(at, update))
    return jax.tree.map(jnp.subtract, average, params), changed

  return optax.GradientTransformationExtraArgs(free.init, update)


def _averaged(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
  """Return the optimizer whose parameters are the exponential moving average of the weights that `tx` trains."""
  tx = optax.with_extra_args_support(tx)

  def init(params):
    return AveragedState(jax.tree.map(jnp.copy, params), tx.init(params))

  def update(gradient, state, params, **extra):
    update, inner = tx.update(gradient, state.inner, state.weights, **extra)
    weights = optax.apply_updates(state.weights, update)
    return jax.tree.map(lambda now, mean: (1 - decay) * (now - mean), weights, params), AveragedState(weights, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def training_weights(params, state):
  """Return the weights at which the gradient is taken, on the devices: `params`, or what these are an average of."""
  if isinstance(state, AveragedState):
    return memory.to_device(state.weights)
  if isinstance(state, optax.contrib.ScheduleFreeState):
    return jax.tree.map(lambda mean, fast: state.b1 * mean + (1 - state.b1) * fast, params, memory.to_device(state.z))
  return params


def apply(config: OptimizerConfig, params, update, key):
  """Return the parameters with the float32 update added, in their own dtype, rounded as the config says."""
  if config.rounding == "nearest":
    return optax.apply_updates(params, update)

  def add(path, param, change):
    changed = param.astype(jnp.float32) + change
    return rounding.round_named(path, changed, key) if param.dtype == jnp.bfloat16 else changed

  return jax.tree_util.tree_map_with_path(add, params, update)


def state_shardings(state, params, shardings, replicated: NamedSharding):
  """Return the sharding of each array of the optimizer's state, which may be abstract.

  What has a parameter's shape is sharded like it, Adafactor's sums over one axis like the others of its axes; counters
  are replicated.
  """
  pairs = jax.tree.map(lambda param, like: (param, like), params, shardings)
  of_params = jax.tree.leaves_with_path(pairs, is_leaf=lambda node: isinstance(node, tuple))
  known = {_keys(path): pair for path, pair in of_params}

  def sharding(path, leaf):
    named = known.get(_keys(path))
    if named is None:
      return replicated
    param, like = named
    if leaf.shape == param.shape:
      return like
    lacking = next((FACTORED[_field(key)] for key in path if _field(key) in FACTORED), None)
    if lacking is None or len(param.shape) < 2:
      return replicated
    axis = np.argsort(param.shape)[lacking]  # as optax chooses it
    shape, spec = ((*whole[:axis], *whole[axis + 1 :]) for whole in (param.shape, like.spec))
    return NamedSharding(like.mesh, jax.P(*spec)) if leaf.shape == shape else replicated

  return jax.tree_util.tree_map_with_path(sharding, state)


def _keys(path) -> tuple[str, ...]:
  """Return the keys of dicts at the end of a path: in a state, those of the parameter that the array belongs to."""
  first = next((len(path) - place for place, key in enumerate(reversed(path)) if not hasattr(key, "key")), 0)
  return tuple(str(key.key) for key in path[first:])

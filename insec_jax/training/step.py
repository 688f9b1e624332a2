"""Training step and held-out sums, each compiled once and sharded over the mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding

from insec_jax.config import OptimizerConfig, PolicyConfig
from insec_jax.model import llama, memory, parts
from insec_jax.model.sharding import BATCH, FSDP, ROWS, params_shardings, size_over, spec
from insec_jax.training import leafwise, optimizer, passes, variables
from insec_jax.training.distill_loss import RIGHT, WRONG, hints_of
from insec_jax.training.kept import Kept
from insec_jax.training.metrics import StepMetrics
from insec_jax.training.scores import Sums, no_sums
from insec_jax.training.variables import Weights

NEGATIVE = "negative_ABT"  # of a batch: present only where negatives have a weight
LANES = 128  # of a TPU: the minor axis of an array is padded to a multiple of them
STREAM = "stream_ABTD"  # of a batch: the output of the frozen layers, present only with train.stream_cache
OLD = ("old", "reference")  # of a batch: log p of each token, present only with policy.method="gradient"
HINTED = ("token", "segment", "position", "place")  # of a batch, for each hint: present only with "distill"


class TrainState(NamedTuple):
  """State of training: the number of updates made, the parameters to use, and the state of the optimizer.

  Beside frozen weights `params` is the trained tree of model/parts.py; the frozen weights are no part of the state.

  After a step whose loss or gradient is not finite the state stays constant, and `step` is -1 - the updates made.
  """

  step: jax.Array
  params: Any
  optimizer: Any


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Return the sharding of a batch, [accumulation, rows, tokens]: rows over data and fsdp, tokens over sequence."""
  return NamedSharding(mesh, jax.P(None, *spec("batch", "position")))


def abstract_batch(
  mesh: Mesh,
  *,
  accumulation: int,
  rows_per_device: int,
  row_length: int,
  negatives: bool,
  rewind: bool = False,
  policy: PolicyConfig | None = None,
  stream: jax.ShapeDtypeStruct | None = None,
) -> dict:
  """Return a batch, with or without negative_ABT, until_ABT, OLD and HINTED, as ShapeDtypeStructs with shardings.

  It has STREAM where `stream` has the width and the dtype of a position's.
  """
  shape = (accumulation, rows_per_device * size_over(mesh, ROWS), row_length)
  dtypes = {"token": jnp.int32, "segment": jnp.int32, "position": jnp.int32, "role": jnp.int8, "weight": jnp.float32}
  if negatives:
    dtypes["negative"] = jnp.int32
  if rewind:
    dtypes["until"] = jnp.int32
  dtypes |= dict.fromkeys(_of_policy(policy), jnp.float32 if policy and not policy.distills else jnp.int32)
  if rewind:
    dtypes |= {f"{hint}_until": jnp.int32 for hint in hints_of(policy)}
  batch = {
    f"{name}_ABT": jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for name, dtype in dtypes.items()
  }
  if stream is not None:
    batch[STREAM] = jax.ShapeDtypeStruct((*shape, *stream.shape), stream.dtype, sharding=batch_sharding(mesh))
  return batch


def _of_policy(policy: PolicyConfig | None) -> tuple[str, ...]:
  """Return the names, without axes, of the arrays that a batch has for this policy."""
  if policy is None:
    return ()
  return tuple(f"{hint}_{name}" for hint in hints_of(policy) for name in HINTED) if policy.distills else OLD


def new_state(params, tx: optax.GradientTransformation) -> TrainState:
  """Return the state before the first update."""
  # Moments of bfloat16 parameters in float32: in bfloat16, 0.999 * v + 0.001 * g^2 rounds to v.
  return TrainState(
    jnp.zeros((), jnp.int32), params, tx.init(jax.tree.map(lambda param: param.astype(jnp.float32), params))
  )


def abstract_params(boxed, dtype: str, mesh: Mesh):
  """Return the parameters of `llama.shapes` as ShapeDtypeStructs of this dtype, with shardings."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
    nn.meta.unbox(boxed),
    params_shardings(boxed, mesh),
  )


def abstract_state(
  config: llama.LlamaConfig,
  dtype: str,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  part: parts.Part | None = None,
  *,
  on_host: bool = False,
) -> TrainState:
  """Return the state as ShapeDtypeStructs with shardings, parameters in this dtype; nothing is computed.

  The optimizer's state is sharded as in optimizer.state_shardings, with its arrays on the host if `on_host`. With
  `part` the parameters are its trained tree, in float32.
  """
  params = (
    abstract_params(llama.shapes(config), dtype, mesh)
    if part is None
    else abstract_params(parts.shapes(config, part), "float32", mesh)
  )
  shardings = shardings_of(params)
  replicated = NamedSharding(mesh, jax.P())
  state = jax.eval_shape(lambda params: new_state(params, tx), params)
  of_optimizer = optimizer.state_shardings(state.optimizer, params, shardings, replicated)
  if on_host:
    of_optimizer = jax.tree.map(
      lambda like, leaf: memory.on_host(like) if leaf.ndim else like, of_optimizer, state.optimizer
    )
  state_shardings = TrainState(replicated, shardings, of_optimizer)
  return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), state, state_shardings)


def shardings_of(abstract):
  """Return the sharding of each array of an abstract tree."""
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def mean_gradient(
  params,
  batch,
  frozen=None,
  *,
  model: llama.Llama,
  mesh: Mesh,
  shardings,
  repeat: float,
  policy: PolicyConfig | None = None,
  frozen_shardings=None,
  kept: Kept | None = None,
  first=None,
):
  """Return (gradient of the mean loss over the batch's trained tokens, scores.Sums); it is sharded like `params`.

  A batch holds token_ABT, segment_ABT, position_ABT, role_ABT, weight_ABT; negative_ABT when `repeat`, the weight of
  unlikelihood on negatives, is not 0; until_ABT where mistakes are hidden from later text (method/rewind.py); and OLD
  or HINTED with `policy`. Sums of loss, weight and gradient are added over micro-batches and devices, and divided once
  at the end; without a trained token the gradient is 0. Beside `frozen` weights, which have no gradient, `params` is
  the trained tree. The softmax is over `kept`, where given. `first` is for policy.teacher="start". The gradient is
  float32; all of it but the embedding's was summed over fsdp in the compute dtype, which costs precision in bfloat16.
  """
  _check_batch(batch, repeat, policy)

  def local(params, batch, frozen, first):
    """Return the undivided gradient and sums; all communication is here and in model/sharding.py."""
    # In the layers, fsdp reduces gradients in the compute dtype; they are stacked in it, or added to a float32 sum.
    once = batch["token_ABT"].shape[0] == 1
    weights = variables.cast(model, params, frozen, gradient=model.compute if once else "float32")
    # A teacher is called outside of the loss: it has no gradient.
    others = None if first is None else variables.cast(model, first, frozen, gradient=model.compute)
    taught = functools.partial(passes.teacher_of, model, weights, mesh=mesh, policy=policy, first=others)

    def weighted_loss(trained, micro, teacher):
      own, weight_BT = weights._replace(trained=trained), micro["weight_BT"]
      sums = passes.local_sums(model, own, micro, weight_BT, mesh, repeat, kept, policy, teacher)
      return sums.loss, sums

    def add_micro(carry, micro):
      total, sums = carry
      loss = functools.partial(weighted_loss, micro=micro, teacher=taught(micro))
      _, pullback, more = jax.vjp(loss, weights.trained, has_aux=True)
      return (_with_gradient(total, pullback, in_place=frozen is None), jax.tree.map(jnp.add, sums, more)), None

    if once:
      micro = jax.tree.map(lambda x: x[0], passes.micro_batches(batch))
      gradient, sums = jax.grad(weighted_loss, has_aux=True)(weights.trained, micro, taught(micro))
    else:
      zeros = jax.tree.map(lambda param: jnp.zeros(param.shape, jnp.float32), params)
      start = (zeros, no_sums(negatives=repeat != 0, policy=policy))
      (gradient, sums), _ = jax.lax.scan(add_micro, start, passes.micro_batches(batch))
    gradient = jax.tree.map(functools.partial(_summed, mesh=mesh), gradient, specs)
    return _laid_out(gradient, mesh), jax.lax.psum(sums, BATCH)

  specs, frozen_specs = passes.specs(shardings), passes.specs(frozen_shardings)
  in_specs = (specs, batch_sharding(mesh).spec, frozen_specs, None if first is None else specs)
  gradient, sums = passes.on_each_device(local, mesh, in_specs, (specs, jax.P()))(params, batch, frozen, first)
  weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
  return jax.tree.map(lambda total: total.astype(jnp.float32) / weight, gradient), sums


def _check_batch(batch: dict, repeat: float, policy: PolicyConfig | None) -> None:
  """Raise ValueError unless the batch has exactly the arrays that the loss reads."""
  if (repeat != 0) != (NEGATIVE in batch):
    raise ValueError(
      f"repeat={repeat} with a batch of {', '.join(batch)}; {NEGATIVE} must be in it exactly when repeat "
      "is not 0: give pipeline.batches the same switch"
    )
  arrays = (*OLD, *(f"{hint}_{name}" for hint in (RIGHT, WRONG) for name in HINTED))
  seen = tuple(name for name in arrays if f"{name}_ABT" in batch)
  if seen != (needed := _of_policy(policy)):
    raise ValueError(f"policy={policy} needs {needed} beside what every batch has, and this one has {seen}")


def _with_gradient(total: dict, pullback: Callable, *, in_place: bool) -> dict:
  """Return the float32 sums of gradients with that of one more loss, whose vjp is `pullback`, added.

  In place, the backward pass adds the gradient of a layer as soon as it is computed, so that none of all layers exists
  beside the sum.
  """
  wanted: dict = jax.tree.map(lambda _: jax.ad.GradValue(), total)
  if in_place:
    wanted["layers"] = jax.tree.map(jax.new_ref, total["layers"])
  (parts,) = pullback.with_refs(wanted)(jnp.ones(()))
  others = {name: part for name, part in parts.items() if name != "layers" or not in_place}
  added = {
    name: jax.tree.map(lambda sum, part: sum + part.astype(jnp.float32), total[name], part)
    for name, part in others.items()
  }
  return added | ({"layers": jax.tree.map(jax.freeze, wanted["layers"])} if in_place else {})


def _summed(part, spec: jax.P, *, mesh: Mesh):
  """Return the gradient summed over the devices that hold the same part of a parameter and have other tokens."""
  axes = BATCH if FSDP not in spec else ("data",)
  names = tuple(name for name in axes if mesh.shape[name] > 1)
  return jax.lax.psum(part.astype(jnp.float32), names) if names else part


def _laid_out(gradient: dict, mesh: Mesh) -> dict:
  """Return the gradient with embedding and head, [V, D], in the layout in which a TPU holds such narrow parameters.

  A TPU pads the minor axis to LANES, so that a narrower D is not the minor axis of a parameter. A gradient with D minor
  would have the parameter and both moments copied to its layout, padded, before the backward pass.
  """
  if mesh.devices.flat[0].platform != "tpu":
    return gradient
  vocabulary_minor = Layout(major_to_minor=(1, 0))
  narrow = [name for name in ("embed", "head") if name in gradient and gradient[name].shape[1] < LANES]
  return gradient | {
    name: with_layout_constraint(gradient[name].astype(jnp.float32), vocabulary_minor) for name in narrow
  }


def make_train_step(
  model: llama.Llama,
  config: OptimizerConfig,
  steps: int,
  mesh: Mesh,
  shardings: TrainState,
  *,
  repeat: float,
  policy: PolicyConfig | None = None,
  frozen_shardings=None,
  kept: Kept | None = None,
  seed: int,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
  """Return the jitted `step(state, batch)`; the state is donated and keeps its shardings. `repeat` weighs negatives.

  Beside frozen weights, where `frozen_shardings` are given, it is `step(state, batch, frozen)`, and only reads these.
  With policy.teacher="start" it is `step(state, batch, frozen or None, first)`, with the first trained parameters.
  Stochastic rounding draws by `seed` and the number of updates made: on any mesh, and after a resumption, the same.
  A step whose loss or gradient norm is not finite leaves parameters and moments unchanged, and so do all later steps.
  """
  tx = optimizer.make(config, steps)
  rate = optimizer.schedule(config, steps)

  def step(state: TrainState, batch, frozen=None, first=None):
    gradient, sums = mean_gradient(
      optimizer.training_weights(state.params, state.optimizer),
      batch,
      frozen,
      model=model,
      mesh=mesh,
      shardings=shardings.params,
      repeat=repeat,
      policy=policy,
      frozen_shardings=frozen_shardings,
      kept=kept,
      first=first,
    )
    key_of_moments, key_of_params = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    norm = optax.tree.norm(gradient)
    metrics = StepMetrics(sums, (batch["segment_ABT"] > 0).sum(), norm, rate(state.step))
    is_sound = jnp.isfinite(sums.loss) & jnp.isfinite(norm) & (state.step >= 0)
    number = jnp.where(is_sound, state.step + 1, jnp.minimum(state.step, -1 - state.step))

    def update(tx, gradient, held, params):
      update, changed = tx.update(gradient, held, params, key=key_of_moments)
      after = optimizer.apply(config, params, update, key_of_params), changed
      return jax.tree.map(lambda new, old: jnp.where(is_sound, new, old), after, (params, held))

    if memory.is_on_host(shardings.optimizer):
      update = functools.partial(_update_one_by_one, update, config, steps, norm, shardings)
    after = update(tx, gradient, state.optimizer, state.params)
    return TrainState(number, *after), metrics

  of_first = shardings.params if policy is not None and policy.reads_first else None
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=passes.with_frozen((shardings, batch_sharding(mesh)), frozen_shardings, of_first),
    out_shardings=(shardings, None),
  )


def _update_one_by_one(
  update: Callable, config: OptimizerConfig, steps: int, norm, shardings: TrainState, _, gradient, held, params
):
  """Return `update` of all parameters, for a state on the host; the clipping by the global norm is done apart."""
  unclipped = optimizer.make(config, steps, clips=False)
  return leafwise.one_by_one(
    lambda part, held, param: update(unclipped, optimizer.clip(config, part, norm), held, param),
    gradient,
    held,
    params,
    (shardings.params, shardings.optimizer),
    by_layer=not optimizer.draws(config),
  )


def make_heldout_sums(
  model: llama.Llama, mesh: Mesh, shardings: TrainState, frozen_shardings=None
) -> Callable[..., Sums]:
  """Return the jitted `heldout_sums(params, batch)`: sums over all tokens that have a role, each of weight 1.

  Negatives are summed too where the batch has them; their weight in the loss is 0. With `frozen_shardings` it takes the
  frozen weights as its third argument.
  """

  def local(params, batch, frozen=None):
    def add_micro(carry, micro):
      every_BT = (micro["role_BT"] >= 0).astype(jnp.float32)
      sums = passes.local_sums(model, Weights(params, frozen), micro, every_BT, mesh, 0.0)
      return jax.tree.map(jnp.add, carry, sums), None

    none = no_sums(negatives=NEGATIVE in batch)
    return jax.lax.psum(jax.lax.scan(add_micro, none, passes.micro_batches(batch))[0], BATCH)

  in_shardings = passes.with_frozen((shardings.params, batch_sharding(mesh)), frozen_shardings)
  return jax.jit(passes.on_each_device(local, mesh, passes.specs(in_shardings), jax.P()), in_shardings=in_shardings)


def make_streams(model: llama.Llama, mesh: Mesh, frozen_shardings) -> Callable[..., jax.Array]:
  """Return the jitted `streams(frozen, batch)`: the output of the frozen layers in STREAM's axes, in `compute`."""

  def local(frozen, batch):
    micro = jax.tree.map(lambda x: x[0], passes.micro_batches(batch))
    given = (micro["token_BT"], micro["position_BT"], micro["segment_BT"], micro.get("until_BT"))
    return model.clone(mesh=mesh).apply({"params": frozen}, *given, below_top=True)[None]

  in_shardings = (frozen_shardings, batch_sharding(mesh))
  return jax.jit(
    passes.on_each_device(local, mesh, passes.specs(in_shardings), batch_sharding(mesh).spec),
    in_shardings=in_shardings,
    out_shardings=batch_sharding(mesh),
  )

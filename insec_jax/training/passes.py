"""Passes over the rows of one device, inside jax.shard_map: the stream, and the sums of the loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from insec_jax.config import PolicyConfig
from insec_jax.model import sharding
from insec_jax.training import variables
from insec_jax.training.distill_loss import WRONG, hints_of
from insec_jax.training.kept import Kept
from insec_jax.training.loss import loss_sums
from insec_jax.training.policy_loss import Old
from insec_jax.training.scores import Head, Sums, Teacher
from insec_jax.training.variables import Weights


def on_each_device(local: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
  """Return `local` as a function of global arrays, run on the shards of each device."""
  # check_vma=False: psum is then differentiated as model/sharding.py needs, and Pallas kernels cannot be checked.
  return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def specs(shardings):
  """Return the partition spec of each sharding of a tree."""
  return jax.tree.map(lambda sharding: sharding.spec, shardings)


def with_frozen(values: tuple, frozen, first=None) -> tuple:
  """Return the values, and after them `frozen` and the first weights of the run, without a None at the end."""
  if first is not None:
    return (*values, frozen, first)
  return values if frozen is None else (*values, frozen)


def micro_batches(batch: dict) -> dict:
  """Return a batch for a scan over its first axis, without which its arrays are named."""
  return {name.replace("_ABT", "_BT"): array for name, array in batch.items()}


def stream(model, weights: Weights, micro, mesh, policy: PolicyConfig | None):
  """Return the stream before the output matrix; divided by the temperature of a policy, so that its logits are."""
  stream_BTD = model.clone(mesh=mesh).apply(
    variables.variables_of(model, weights),
    micro["token_BT"],
    micro["position_BT"],
    micro["segment_BT"],
    micro.get("until_BT"),
    stream_BTD=micro.get("stream_BTD"),
  )
  return stream_BTD if policy is None or policy.temperature == 1 else stream_BTD / policy.temperature


def teacher_of(
  model, weights: Weights, micro, mesh, policy: PolicyConfig | None, first: Weights | None = None
) -> Teacher | None:
  """Return what the teacher of a distillation predicts; None without one. It has the weights, or those of `first`.

  With policy.contrast its logits, which are linear in the stream, are (1 + g) right - g wrong hint.
  """
  hints = hints_of(policy)
  if not hints or policy is None:
    return None
  taught = weights if first is None else first

  def read(hint: str):
    names = (f"{hint}_{name}_BT" for name in ("token", "position", "segment", "until"))
    stream_BTD = model.clone(mesh=mesh).apply(variables.variables_of(model, taught), *map(micro.get, names))
    (stream_BTD,) = sharding.whole_rows((stream_BTD,), mesh)
    return jnp.take_along_axis(stream_BTD, micro[f"{hint}_place_BT"][..., None], axis=1)

  stream_BTD = read(hints[0])
  if WRONG in hints:
    dtype, g = stream_BTD.dtype, policy.contrast
    right_BTD, wrong_BTD = (x_BTD.astype(jnp.float32) for x_BTD in (stream_BTD, read(WRONG)))
    stream_BTD = ((1 + g) * right_BTD - g * wrong_BTD).astype(dtype)
  head = None if first is None else variables.head_of(model, first)
  return Teacher(stream_BTD / policy.temperature, head and Head(head.weight_VD, head.rows_MD))


def local_sums(
  model,
  weights: Weights,
  micro,
  weight_BT,
  mesh,
  repeat,
  kept: Kept | None = None,
  policy: PolicyConfig | None = None,
  teacher: Teacher | None = None,
) -> Sums:
  """Return the sums over the device's rows."""
  stream_BTD = stream(model, weights, micro, mesh, policy)
  head, token_BT, negative_BT = variables.head_of(model, weights), micro["token_BT"], micro.get("negative_BT")
  if kept is not None:
    head, token_BT = kept.head(head), kept.places(token_BT)
    negative_BT = None if negative_BT is None else kept.places(negative_BT)
  return loss_sums(
    head.weight_VD,
    stream_BTD,
    token_BT,
    micro["segment_BT"],
    micro["role_BT"],
    weight_BT,
    negative_BT,
    repeat=repeat,
    mesh=mesh,
    rows_MD=head.rows_MD,
    markers=head.markers,
    old_BT=None if policy is None or policy.distills else Old(micro["old_BT"], micro["reference_BT"]),
    policy=policy,
    teacher=teacher,
  )

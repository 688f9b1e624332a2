"""Passes over the rows of one device, inside jax.shard_map: the stream, and the sums of the loss."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from insec_jax.config import PolicyConfig
from insec_jax.training import variables
from insec_jax.training.kept import Kept
from insec_jax.training.loss import loss_sums
from insec_jax.training.policy_loss import Old
from insec_jax.training.scores import Sums
from insec_jax.training.variables import Weights


def on_each_device(local: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
  """Return `local` as a function of global arrays, run on the shards of each device."""
  # check_vma=False: psum is then differentiated as model/sharding.py needs, and Pallas kernels cannot be checked.
  return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def specs(shardings):
  """Return the partition spec of each sharding of a tree."""
  return jax.tree.map(lambda sharding: sharding.spec, shardings)


def with_frozen(values: tuple, frozen) -> tuple:
  """Return the values, and `frozen` after them if it is not None."""
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


def local_sums(
  model, weights: Weights, micro, weight_BT, mesh, repeat, kept: Kept | None = None, policy: PolicyConfig | None = None
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
    old_BT=None if policy is None else Old(micro["old_BT"], micro["reference_BT"]),
    policy=policy,
  )

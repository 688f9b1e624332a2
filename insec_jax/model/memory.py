"""Where arrays are kept: activations that the backward pass keeps, and arrays in the memory of the host.

A device copies from and to `pinned_host` memory by itself, while it computes. Inside jax.jit an array of the host has
to be copied to the device before it is used.
"""

import jax
from jax.sharding import NamedSharding

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.model import sharding

HOST = "pinned_host"
STREAM = "stream"  # checkpoint name of the stream between layers

ATTENTION = ("query", "key", "value", "context", "residual")  # checkpoint names; the residual is the stream after it

# Activations of a layer that the backward pass keeps, in addition to the stream between layers; never gathered weights.
REMAT = {
  "none": jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED),
  "matmuls": jax.checkpoint_policies.save_only_these_names(*ATTENTION, "gate", "up"),
  "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION),
  "full": jax.checkpoint_policies.nothing_saveable,
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[STREAM], offload_src="device", offload_dst=HOST
  ),
}


def check_devices(config: Config, devices) -> None:
  """Raise InputError where the config keeps arrays on the host, and the devices have no such memory."""
  keys = {"optimizer.memory='host'": config.optimizer.on_host, "model.remat='offload'": config.model.remat == "offload"}
  wanted = [key for key, is_set in keys.items() if is_set]
  kinds = sorted(memory.kind for memory in devices[0].addressable_memories())
  if wanted and HOST not in kinds:
    raise InputError(
      f"{', '.join(wanted)} keeps arrays in {HOST} memory, and {devices[0].device_kind!r} has only "
      f"{', '.join(kinds)}; leave it out"
    )


def on_host(like: NamedSharding) -> NamedSharding:
  """Return the sharding with the array in the memory of the host."""
  return like.with_memory_kind(HOST)


def is_on_host(shardings) -> bool:
  """Return whether an array of these shardings is in the memory of the host."""
  return any(like.memory_kind == HOST for like in jax.tree.leaves(shardings))


def to_device(tree):
  """Return the tree with each array that is on the host copied to its devices; for use in jax.jit."""

  def moved(array):
    is_there = jax.typeof(array).memory_space == jax.memory.Space.Device
    return array if is_there else jax.device_put(array, jax.memory.Space.Device)

  return jax.tree.map(moved, tree)


def like(array, other):
  """Return the array in the memory in which the other is; for use in jax.jit."""
  space = jax.typeof(other).memory_space
  return array if jax.typeof(array).memory_space == space else jax.device_put(array, space)


def to_place(array, like: NamedSharding):
  """Return the array on the host, if its sharding is there; for use in jax.jit."""
  return jax.device_put(array, like) if like.memory_kind == HOST else array

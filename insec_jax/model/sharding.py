"""Which logical axis of an array lies along which axis of the mesh: one table for parameters and activations."""

import math

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from insec_jax.command import InputError
from insec_jax.config import MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")

RULES = {
    "batch": ("data", "fsdp"),
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "hidden": "tensor",
    "vocab": "tensor",
    "head_width": None,
    "layers": None,
    "stream": None,  # the width of an activation: fsdp splits weights by width, activations by batch
    "position": None,
}


def make_mesh(config: MeshConfig, devices) -> Mesh:
  """The mesh (data, fsdp, tensor) over `devices`; InputError if the sizes do not multiply to their number."""
  # Auto, said aloud: the default of jax.make_mesh is Explicit since 0.9.
  return jax.make_mesh(config.shape(len(devices)), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES),
                       devices=devices)


def spec(*axes: str) -> PartitionSpec:
  """The mesh axes of an array with these logical axes; KeyError for an axis that the table does not have."""
  return PartitionSpec(*(RULES[axis] for axis in axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over data and fsdp, for arrays [B, T]; what tensor splits is not the batch."""
  return NamedSharding(mesh, spec("batch", "position"))


def params_shardings(boxed, mesh: Mesh):
  """Tree of NamedSharding for the tree that `llama.shapes` returns.

  ValueError for a parameter that names no axes; one InputError for all that the mesh does not divide.
  """
  misfits = []

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not isinstance(leaf, nn.LogicallyPartitioned) or len(leaf.names) != leaf.value.ndim:
      raise ValueError(f"parameter {name} does not name each of its axes; declare it with nn.with_logical_partitioning")
    mesh_axes = spec(*leaf.names)
    for axis, size, mesh_axis in zip(leaf.names, leaf.value.shape, mesh_axes, strict=True):
      if mesh_axis is not None and size % mesh.shape[mesh_axis]:
        misfits.append(f"{axis}={size} over {mesh_axis}={mesh.shape[mesh_axis]}")
    return NamedSharding(mesh, mesh_axes)

  shardings = jax.tree_util.tree_map_with_path(sharding, boxed,
                                               is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
  if misfits:
    raise InputError(f"the mesh does not divide the model: {', '.join(dict.fromkeys(misfits))}; "
                     "choose mesh sizes that divide these")
  return shardings


def constrain(array, *axes: str):
  """`array`, with the compiler told where it lies; unchanged where no mesh is set.

  A dimension that the mesh does not divide (one prompt, eight devices) is left to the compiler: no number depends on
  it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or AxisType.Auto not in mesh.axis_types:
    return array

  def fits(size, mesh_axis):
    names = (mesh_axis,) if isinstance(mesh_axis, str) else mesh_axis or ()
    return size % math.prod(mesh.shape[name] for name in names) == 0

  mesh_axes = (mesh_axis if fits(size, mesh_axis) else None
               for size, mesh_axis in zip(array.shape, spec(*axes), strict=True))
  return jax.lax.with_sharding_constraint(array, PartitionSpec(*mesh_axes))

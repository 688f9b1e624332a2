"""Sharding of all arrays over the mesh, in one table, and the communication between devices.

The user's `fsdp` is up to three axes of the mesh: gathers and reduce-scatters run over one after the other. The TPU
compiler turns a reduce-scatter over one axis of 16 chips (on v5p of 8) into an all-reduce of the whole, which sends
twice the bytes. So is the user's `sequence`. Parameters are split over both.
"""

import collections
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from insec_jax.command import InputError
from insec_jax.config import MeshConfig

SEQUENCE = ("sequence_x", "sequence_y", "sequence_z")  # of the positions of a row
ROWS = ("data", "fsdp_x", "fsdp_y", "fsdp_z")  # of the rows of a batch
FSDP = (*ROWS[1:], *SEQUENCE)  # of the width of parameters: devices with other positions hold no copies of them
BATCH = ("data", *FSDP)  # of the tokens of a batch
TENSOR = "tensor"
MESH_AXES = (*BATCH, TENSOR)

# Logical axes of parameters and of a batch.
RULES = {
  "batch": ROWS,
  "position": SEQUENCE,
  "width": FSDP,
  "heads": TENSOR,
  "kv_heads": TENSOR,
  "mlp_width": TENSOR,
  "vocab": TENSOR,
  "head_width": None,
  "layers": None,
  "rank": None,
  "markers": None,
}
GATHERED = "gathered"  # checkpoint name of a gathered weight


def make_mesh(config: MeshConfig, devices) -> Mesh:
  """Return the mesh over `devices`, slices of a pod outermost along `data`; InputError if the sizes do not fit."""
  data, fsdp, sequence, tensor = config.shape(len(devices))
  shape = (data, *three_axes(fsdp), *three_axes(sequence), tensor)
  slices = len(collections.Counter(getattr(device, "slice_index", 0) for device in devices))
  if data % slices:
    raise InputError(
      f"mesh.data={data} over {slices} slices; between slices only `data` may lie: give a multiple of {slices}"
    )
  if slices > 1:
    placed = mesh_utils.create_hybrid_device_mesh(
      (data // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1)), devices, allow_split_physical_axes=True
    )
  else:
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  # Auto must be given: the default is Explicit since jax 0.9.
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def three_axes(size: int) -> tuple[int, int, int]:
  """Return the lengths of three axes of the mesh: none above 4 where possible, then as few and as even as possible."""
  triples = [
    (x, y, size // (x * y))
    for x in range(1, size + 1)
    if size % x == 0
    for y in range(x, size // x + 1)
    if size // x % y == 0 and y <= size // (x * y)
  ]
  return min(triples, key=lambda xyz: (max(*xyz, 4), sum(n > 1 for n in xyz), max(xyz), -min(xyz)))


def size_over(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
  """Return the number of devices over which an array along these axes of the mesh is split."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)


def num_parts(mesh: Mesh | None) -> int:
  """Return the number of devices that share a row, each with some of its positions."""
  return 1 if mesh is None else size_over(mesh, SEQUENCE)


def check_sequence(mesh: Mesh, *, num_heads: int, num_kv_heads: int, row_length: int) -> None:
  """Raise InputError unless the positions of a row, and the heads in `attend_whole_rows`, divide over `sequence`."""
  parts, tensor = num_parts(mesh), mesh.shape[TENSOR]
  if parts == 1 or num_kv_heads % tensor:  # params_shardings refuses such a tensor
    return
  N, K = num_heads // tensor, num_kv_heads // tensor
  sizes = [size for size in range(1, N + 1) if N % size == 0 and (K % size == 0 or size % K == 0)]
  if parts not in sizes:
    raise InputError(
      f"mesh.sequence={parts} does not divide the heads of attention: with mesh.tensor={tensor} a device has {N} query "
      f"heads and {K} key heads; use {', '.join(map(str, sizes))}"
    )
  if row_length % parts:
    raise InputError(f"mesh.sequence={parts} does not divide data.row_length={row_length}; use a multiple of {parts}")


def spec(*axes: str) -> PartitionSpec:
  """Return the mesh axes of an array with these logical axes; KeyError for an axis that is not in RULES."""
  return PartitionSpec(*(RULES[axis] for axis in axes))


def params_shardings(boxed, mesh: Mesh):
  """Return the tree of NamedSharding for the tree that `llama.shapes` returns.

  Raises ValueError for a parameter that names no axes, and one InputError for all axes that the mesh does not divide.
  """
  misfits = []

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not isinstance(leaf, nn.LogicallyPartitioned) or len(leaf.names) != leaf.value.ndim:
      raise ValueError(f"parameter {name} does not name each of its axes; declare it with nn.with_logical_partitioning")
    mesh_axes = spec(*leaf.names)
    for axis, size, names in zip(leaf.names, leaf.value.shape, mesh_axes, strict=True):
      if size % size_over(mesh, names):
        where = names if names != FSDP else "fsdp" if num_parts(mesh) == 1 else "fsdp x sequence"
        misfits.append(f"{axis}={size} over {where}={size_over(mesh, names)}")
    return NamedSharding(mesh, mesh_axes)

  shardings = jax.tree_util.tree_map_with_path(
    sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  )
  if misfits:
    raise InputError(
      f"the mesh does not divide the model: {', '.join(dict.fromkeys(misfits))}; choose mesh sizes that divide these"
    )
  return shardings


def place(weights: dict, shardings=None) -> dict:
  """Return the same tree of arrays on devices; without shardings on the first device.

  A weight has a shape, and indexing it with a slice for each axis returns an array: each process reads or draws only
  the shards of its devices, one weight at a time.
  """
  if shardings is None:
    first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: first_device, weights)
  return jax.tree.map(_place, weights, shardings)


def _place(weight, sharding: jax.sharding.Sharding) -> jax.Array:
  @functools.cache  # a shard that several devices hold is read once
  def read(bounds):
    return weight[tuple(slice(*bound) for bound in bounds)]

  placed = jax.make_array_from_callback(
    weight.shape, sharding, lambda index: read(tuple((piece.start, piece.stop) for piece in index))
  )
  return placed.block_until_ready()  # the host holds a copy until then: wait, so that it holds one weight at a time


# The functions below run on each device, inside jax.shard_map over all axes of the mesh with check_vma=False: there
# the gradient of a psum is a psum, so `enter` and `leave` define their own. `mesh` None: one device holds everything.


def local_size(axis: str, size: int, mesh: Mesh | None) -> int:
  """Return the length of a parameter's logical axis on each device."""
  return size if mesh is None else size // size_over(mesh, RULES[axis])


def whole(shard, axes: tuple[str, ...], mesh: Mesh | None):
  """Return the parameter with these logical axes gathered along fsdp; its gradient is reduce-scattered over fsdp."""
  for dimension, axis in enumerate(axes):
    if RULES[axis] == FSDP:
      shard = gather(shard, dimension, mesh)
  return shard


def gather(shard, dimension: int, mesh: Mesh | None, names: tuple[str, ...] = FSDP):
  """Return the shards of the devices along these axes, concatenated along the dimension."""
  for name in reversed(names):
    if mesh is not None and mesh.shape[name] > 1:
      shard = _all_gather(shard, name, dimension, mesh)
      # Every stage has the name: a policy that does not keep the gathered weight must not keep a partial one either.
      shard = checkpoint_name(shard, GATHERED)
  return shard


def whole_rows(arrays_BT: tuple, mesh: Mesh | None) -> tuple:
  """Return the arrays that are not None, each gathered along sequence."""
  return tuple(gather(array_BT, 1, mesh, SEQUENCE) for array_BT in arrays_BT if array_BT is not None)


def scatter(array, dimension: int, mesh: Mesh | None, names: tuple[str, ...] = FSDP):
  """Return the device's part, along the dimension, of the sum of `array` over these axes: the transpose of `gather`."""
  for name in names:
    if mesh is not None and mesh.shape[name] > 1:
      array = _reduce_scatter(array, name, dimension, mesh)
  return array


def uses_gloo(mesh: Mesh) -> bool:
  """Return whether the devices are CPUs of several processes, which exchange data through Gloo."""
  devices = mesh.devices.flat
  return devices[0].platform == "cpu" and len({device.process_index for device in devices}) > 1


def _all_gather(shard, name: str, dimension: int, mesh: Mesh):
  if uses_gloo(mesh):
    return _gather_with_gloo(shard, name, dimension)
  return jax.lax.all_gather(shard, name, axis=dimension, tiled=True)


def _reduce_scatter(array, name: str, dimension: int, mesh: Mesh):
  if uses_gloo(mesh):
    return _scatter_with_gloo(array, name, dimension)
  return jax.lax.psum_scatter(array, name, scatter_dimension=dimension, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_with_gloo(shard, name, dimension):
  return jax.lax.all_gather(shard, name, axis=dimension, tiled=True)


def _scatter_with_gloo(array, name, dimension):
  """Return what a reduce-scatter returns.

  Gloo's overwrites numbers that it may still be sending, so that its sums can be wrong (issue 40830 of JAX). Here the
  parts are exchanged, which sends as many bytes, and added.
  """
  num = jax.lax.axis_size(name)
  parts = array.reshape(*array.shape[:dimension], num, -1, *array.shape[dimension + 1 :])
  return jax.lax.all_to_all(parts, name, split_axis=dimension, concat_axis=0).sum(0)


_gather_with_gloo.defvjp(
  lambda shard, name, dimension: (_gather_with_gloo(shard, name, dimension), None),
  lambda name, dimension, _, cotangent: (_scatter_with_gloo(cotangent, name, dimension),),
)


def enter(x, mesh: Mesh | None):
  """Return `x`, replicated over `tensor`, as input of the device's part of the heads or of the MLP width.

  The gradient is summed over the parts (`f` of arXiv 1909.08053).
  """
  return x if mesh is None or mesh.shape[TENSOR] == 1 else _enter(x)


def leave(x, mesh: Mesh | None):
  """Return the sum of `x` over `tensor`; each device receives the whole gradient (`g` of arXiv 1909.08053)."""
  return x if mesh is None or mesh.shape[TENSOR] == 1 else _leave(x)


@jax.custom_vjp
def _enter(x):
  return x


_enter.defvjp(lambda x: (x, None), lambda _, cotangent: (jax.lax.psum(cotangent, TENSOR),))


@jax.custom_vjp
def _leave(x):
  return jax.lax.psum(x, TENSOR)


_leave.defvjp(lambda x: (jax.lax.psum(x, TENSOR), None), lambda _, cotangent: (cotangent,))


def following(array_BT, mesh: Mesh | None):
  """Return the array in which a position has what the next position of its row has; the last one has the first's."""
  next_BT = jnp.roll(array_BT, -1, axis=1)
  parts = num_parts(mesh)
  if parts == 1:
    return next_BT
  first_BP = gather(array_BT[:, :1], 1, mesh, SEQUENCE)
  after = (jax.lax.axis_index(SEQUENCE) + 1) % parts
  return next_BT.at[:, -1].set(jax.lax.dynamic_index_in_dim(first_BP, after, 1, keepdims=False))


def has_next(T: int, mesh: Mesh | None):
  """Return whether each of the device's T positions is not the last one of its row, boolean [T]."""
  place_T, parts = jnp.arange(T), num_parts(mesh)
  if parts > 1:
    place_T += jax.lax.axis_index(SEQUENCE) * T
  return place_T < parts * T - 1


def attend_whole_rows(attend: Callable, q_BTNH, k_BTKH, v_BTKH, mesh: Mesh | None):
  """Return the context of the device's positions and all heads; `attend` computes it for whole rows.

      before   device 0: positions 0 1, heads a b   device 1: positions 2 3, heads a b
      attend   device 0: positions 0 1 2 3, head a  device 1: positions 0 1 2 3, head b

  The devices of `sequence` exchange positions for heads, and back (DeepSpeed-Ulysses, arXiv 2309.14509). Where they are
  more than the key heads, each key head is sent to all devices that have query heads of it.
  """
  names = () if mesh is None else tuple(name for name in SEQUENCE if mesh.shape[name] > 1)
  if not names:
    return attend(q_BTNH, k_BTKH, v_BTKH)
  if (copies := num_parts(mesh) // k_BTKH.shape[2]) > 1:
    k_BTKH, v_BTKH = (jnp.repeat(heads, copies, axis=2) for heads in (k_BTKH, v_BTKH))
  exchange = functools.partial(jax.lax.all_to_all, axis_name=names, tiled=True)
  context = attend(*(exchange(heads, split_axis=2, concat_axis=1) for heads in (q_BTNH, k_BTKH, v_BTKH)))
  return exchange(context, split_axis=1, concat_axis=2)


def look_up(table_VD, token_BT, dtype, mesh: Mesh | None, replaced: Callable | None = None):
  """Return the rows of the table for the tokens, in `dtype`, [B, T, D]; nan for a token outside it.

  With a mesh the table is not gathered: each device looks up its part of the width for the tokens of all devices, and
  returns the rows to them. `replaced(row_BTD, token_BT)`, where given, replaces some of the rows.
  """
  take = functools.partial(jnp.take, axis=0, mode="fill")
  if mesh is None:
    row_BTD = take(table_VD, token_BT).astype(dtype)
    return row_BTD if replaced is None else replaced(row_BTD, token_BT)
  names = tuple(name for name in FSDP if mesh.shape[name] > 1)
  if names:
    token_BT = jax.lax.all_gather(token_BT, names, tiled=True)
  num_here = table_VD.shape[0]
  index_BT = token_BT - jax.lax.axis_index(TENSOR) * num_here
  is_here_BT = (index_BT >= 0) & (index_BT < num_here)
  row_BTD = take(table_VD, jnp.where(is_here_BT, index_BT, 0)).astype(dtype)
  row_BTD = leave(jnp.where(is_here_BT[..., None], row_BTD, 0), mesh)
  is_token_BT = (token_BT >= 0) & (token_BT < num_here * mesh.shape[TENSOR])
  row_BTD = jnp.where(is_token_BT[..., None], row_BTD, jnp.nan)
  if replaced is not None:
    row_BTD = replaced(row_BTD, token_BT)
  return jax.lax.all_to_all(row_BTD, names, split_axis=0, concat_axis=2, tiled=True) if names else row_BTD

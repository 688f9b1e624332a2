"""The mesh that decodes on the devices of this host, and the weights on it."""

import itertools
import re
from collections.abc import Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from insec_jax.command import InputError
from insec_jax.config import MeshConfig
from insec_jax.model import llama, sharding

AXES = ("data", sharding.TENSOR)
WEIGHTS_PART = 0.7  # of a device's memory that weights may take; the rest is cache, logits and activations
# Where weights [D, N, H] are multiplied as N matrices [D, H]: in the usual order of axes the TPU compiler copies those
# of all layers, at each call of `decode` and `fill`, and holds the copies: 1.5 GiB of 8B.
HEADS_FIRST_ON = ("tpu",)


def parse_mesh(text: str, num_devices: int) -> tuple[int, int]:
  """Return (data, tensor) of a --mesh; an axis that is not given is 1. Raises InputError."""
  sizes = {}
  for part in text.split(","):
    match = re.fullmatch(r"(\w+):([1-9][0-9]{0,5})", part.strip())
    if match is None or match[1] not in AXES or match[1] in sizes:
      raise InputError(
        f"--mesh={text!r:.100}; must be data:N, tensor:N or data:N,tensor:N (fsdp and sequence are axes of training)"
      )
    sizes[match[1]] = int(match[2])
  data, tensor = (sizes.get(axis, 1) for axis in AXES)
  if data * tensor > num_devices:
    raise InputError(f"--mesh={text} needs {data * tensor} devices, and this host has {num_devices}")
  return data, tensor


def choose_mesh(
  config: llama.LlamaConfig,
  *,
  compute: str,
  requested: str = "",
  devices: Sequence | None = None,
  memory: float | None = None,
) -> Mesh:
  """Return the mesh that decodes: `requested`, or the least tensor at which the weights fit, the rest for data.

  `memory` is the bytes of a device; None: those that it reports, no limit where it reports none (a CPU). Raises
  InputError when the mesh does not divide the model, or the devices of this host cannot hold it.
  """
  devices = list(jax.local_devices() if devices is None else devices)
  if requested:
    data, tensor = parse_mesh(requested, len(devices))
  else:
    if memory is None:
      memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    tensor = 1 if memory is None else _least_tensor(config, compute, len(devices), memory)
    data = len(devices) // tensor
  return sharding.make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), devices[: data * tensor])


def num_bytes(config: llama.LlamaConfig, compute: str) -> int:
  """Return the size of the weights."""
  return sum(leaf.size for leaf in jax.tree.leaves(llama.unboxed_shapes(config))) * np.dtype(compute).itemsize


def _least_tensor(config: llama.LlamaConfig, compute: str, num_devices: int, memory: float) -> int:
  sizes = [
    size
    for size in range(1, num_devices + 1)
    if not any(axis % size for axis in (num_devices, config.num_kv_heads, config.mlp_width, config.vocab_size))
  ]
  needed = num_bytes(config, compute)
  for size in sizes:
    if needed / size <= WEIGHTS_PART * memory:
      return size
  gib = 1 << 30
  part, most = needed / sizes[-1] / gib, sizes[-1]
  raise InputError(
    f"the weights take {needed / gib:.1f} GiB in {compute}, over tensor={most} (the most that divides the model on "
    f"this host's {num_devices} devices) {part:.1f} GiB a device, and a device has "
    f"{memory / gib:.1f} GiB; use a host with more devices, or with {part / WEIGHTS_PART:.0f} GiB each"
  )


def params_shardings(config: llama.LlamaConfig, mesh: Mesh) -> dict:
  """Return the NamedSharding of each of the params that decoding uses, in which `layers` is a list.

  Raises InputError when the mesh does not divide the model.
  """
  stacked = sharding.params_shardings(llama.shapes(config), mesh)
  layer = jax.tree.map(lambda stack: NamedSharding(mesh, PartitionSpec(*stack.spec[1:])), stacked["layers"])
  return {**stacked, "layers": [layer] * config.num_layers}


def params_formats(config: llama.LlamaConfig, mesh: Mesh) -> dict:
  """Return the shardings of `params_shardings`, with the order of axes in memory where it is not the usual one."""
  shardings = params_shardings(config, mesh)
  if mesh.devices.flat[0].platform not in HEADS_FIRST_ON:
    return shardings

  def heads_first(attn: dict) -> dict:
    order = Layout(major_to_minor=(1, 0, 2))
    return attn | {name: Format(order, attn[name]) for name in ("wq", "wk", "wv")}

  return {**shardings, "layers": [{**layer, "attn": heads_first(layer["attn"])} for layer in shardings["layers"]]}


def params_specs(config: llama.LlamaConfig, mesh: Mesh) -> dict:
  """Return the mesh axes of each of the params that decoding uses."""
  return jax.tree.map(lambda placed: placed.spec, params_shardings(config, mesh))


def from_training(params, config: llama.LlamaConfig, *, compute: str, mesh: Mesh) -> tuple[dict, Mesh]:
  """Return (params laid out for decoding on the devices of this process, their mesh), from those of a train step.

  `mesh` is that of the training; all its processes call this. The weights are cast, then moved between the devices one
  at a time: no host holds them, and a device holds little besides what it had and what it gets.
  """
  local = choose_mesh(config, compute=compute)
  tensor = local.shape[sharding.TENSOR]
  devices = sorted(mesh.devices.flat, key=lambda device: device.process_index)
  shape = (-1, *[1] * (len(sharding.MESH_AXES) - 2), tensor)
  every = Mesh(np.reshape(devices, shape), sharding.MESH_AXES, axis_types=mesh.axis_types)
  here = [device for device in devices if device.process_index == jax.process_index()]
  local = Mesh(np.reshape(here, shape), sharding.MESH_AXES, axis_types=mesh.axis_types)

  placed = jax.tree.map(
    lambda weight, place: jax.make_array_from_single_device_arrays(
      weight.shape, place, [shard.data for shard in weight.addressable_shards]
    ),
    moved(params, config, compute, every),
    params_shardings(config, local),
  )
  return jax.device_put(placed, params_formats(config, local)), local


def moved(params, config: llama.LlamaConfig, compute: str, mesh: Mesh) -> dict:
  """Return the params cast and laid out for decoding on the mesh, which has all their devices, in any order.

  A compiled program needs its devices in one order, and those of a slice are not in the order of the processes:
  device_put takes them as they are.
  """
  return jax.device_put(casting(params, config, compute)(params), params_shardings(config, mesh))


def casting(params, config: llama.LlamaConfig, compute: str):
  """Return the compiled function that casts the params, which moves nothing, and makes a list of the layers."""
  before = jax.tree.map(lambda weight: weight.sharding, params)
  layer = jax.tree.map(lambda stack: NamedSharding(stack.mesh, PartitionSpec(*stack.spec[1:])), before["layers"])

  def cast(params):
    return llama.unstack(jax.tree.map(lambda weight: weight.astype(compute), params), config)

  # Cast before the weights are gathered, which moves half of the bytes.
  return jax.jit(cast, out_shardings={**before, "layers": [layer] * config.num_layers})


def one_device() -> Mesh:
  """Return the mesh of the first device."""
  return sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()[:1])


def place(weights: dict, config: llama.LlamaConfig, shardings: dict) -> dict:
  """Return the weights on their devices with the layers in a list; each part is read once, one weight at a time.

  `shardings` are those of `params_formats`; `weights` those of hf.stored or stored.read_params, in the dtype in which
  they are read.
  """
  flat = flatten_dict(weights, sep="/")
  stacked = {name: weight for name, weight in flat.items() if name.startswith("layers/")}
  placed = sharding.place(
    {name: weight for name, weight in weights.items() if name != "layers"},
    {name: sharding_ for name, sharding_ in shardings.items() if name != "layers"},
  )
  layers = [{part: {} for part in weights["layers"]} for _ in range(config.num_layers)]
  for (name, weight), layer in itertools.product(stacked.items(), range(config.num_layers)):
    _, part, leaf = name.split("/")
    layers[layer][part][leaf] = sharding.place(_Layer(weight, layer), shardings["layers"][layer][part][leaf])
  return {**placed, "layers": layers}


class _Layer:
  """One layer of a stacked weight, read when it is indexed with a slice for each axis."""

  def __init__(self, weight, layer: int):
    self._weight, self._layer = weight, layer
    self.shape = tuple(weight.shape[1:])

  def __getitem__(self, index) -> np.ndarray:
    return self._weight[(slice(self._layer, self._layer + 1), *index)][0]

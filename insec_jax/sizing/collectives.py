"""Collectives: what each of n devices in a ring receives, from the operation and its groups of devices.

Bytes of a collective are those that a device in a ring of n receives, given the bytes b of its own operand:

    all-gather           (n - 1) b         all-to-all           (n - 1) / n b
    reduce-scatter   (n - 1) / n b         collective-permute             b
    all-reduce     2 (n - 1) / n b
"""

import math
import re

import numpy as np

from insec_jax.sizing.hlo import Computation, HloError, Instruction

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
# Collectives between the slices of a pod, which pass through the hosts of a TPU.
BETWEEN_SLICES = {
  "ALL_REDUCE": "all-reduce",
  "ALL_GATHER": "all-gather",
  "REDUCE_SCATTER": "reduce-scatter",
  "ALL_TO_ALL": "all-to-all",
  "ONE_TO_ONE": "collective-permute",
}
IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH = re.compile(r"@?mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? \{(.*)\}$")
MESH_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?$")


def ring_bytes(kind: str, operand: float, n: int) -> float:
  """Return the bytes that each of n devices receives, given operands of `operand` bytes: the table at the top."""
  if n == 1:
    return 0.0
  return (
    operand
    * {
      "all-gather": n - 1,
      "reduce-scatter": (n - 1) / n,
      "all-reduce": 2 * (n - 1) / n,
      "all-to-all": (n - 1) / n,
      "collective-permute": 1,
    }[kind]
  )


def kind_of(instruction: Instruction) -> str | None:
  """Return the kind of a collective; None for other operations and for the second half of an asynchronous one.

  Raises HloError for an operation that moves bytes between devices and cannot be counted.
  """
  name = instruction.opcode.removesuffix("-start")
  if name in COLLECTIVES:
    return name
  between = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
  if instruction.opcode == "recv" and between:
    return None  # the other end of a send
  if instruction.opcode == "send" and between and between[1] in BETWEEN_SLICES:
    return BETWEEN_SLICES[between[1]]
  if name in ("ragged-all-to-all", "collective-broadcast", "send", "recv"):
    raise HloError(
      f"{instruction.opcode} {instruction.name} ({instruction.op_name}) moves bytes between devices, and is not counted"
    )
  return None


def slices_reached(instruction: Instruction) -> int:
  """Return the number of slices that a send reaches, such as 2 for `{1,2}x{0:3}`: slices 1 and 2, devices 0 to 3."""
  match = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', instruction.attributes)
  if not match:
    raise HloError(f"send {instruction.name} does not say to which slices")
  ends = [[int(end) for end in part.split(":")] for part in match[1].split(",")]
  return sum(part[-1] - part[0] + 1 for part in ends)


def ends_in_slice(computation: Computation, instruction: Instruction) -> bool:
  """Return whether the result is only used by one dynamic slice, through operations that move nothing."""
  users = computation.readers[instruction.name]
  if len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "copy"):
    return ends_in_slice(computation, users[0])
  return len(users) == 1 and users[0].opcode == "dynamic-slice"


def braces(text: str) -> tuple[tuple[int, ...], ...]:
  """Return the groups of a text such as `{{0,1},{2,3}}`."""
  return tuple(tuple(int(number) for number in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text))


def replica_groups(text: str | None, num_devices: int) -> tuple[tuple[int, ...], ...]:
  """Return the groups of devices, from any of HLO's notations; one group of all devices when none is given.

  {{0,1},{2,3}}   [2,2]<=[4]   [2,2]<=[2,2]T(1,0)   mesh['a'=2,'b'=2] {'b'}   mesh['a'=4] {'a':(2)2}
  """
  if text is None or text == "{}":
    return (tuple(range(num_devices)),)
  if text.startswith("{{"):
    return braces(text)
  if match := IOTA.fullmatch(text):
    return tuple(map(tuple, _transposed(*match.groups()).tolist()))
  if match := MESH.fullmatch(text):
    axes, ids, chosen = match.groups()
    sizes = {name.strip("' "): int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    return _mesh_groups(sizes, _device_ids(ids, math.prod(sizes.values())), chosen, text)
  raise HloError(f"replica groups {text!r} are written in a way that is not understood")


def _device_ids(text: str | None, number: int) -> np.ndarray:
  if text is None:
    return np.arange(number)
  if match := re.search(r"(?:\[([\d,]+)\])?<?=?\[([\d,]+)\]T\(([\d,]+)\)", text):
    return _transposed(match[1] or str(number), match[2], match[3]).reshape(-1)
  return np.array([int(device_id) for device_id in re.findall(r"\d+", text)])


def _mesh_groups(sizes: dict[str, int], ids: np.ndarray, chosen: str, text: str) -> tuple[tuple[int, ...], ...]:
  # Each axis is split into three: the part before the chosen sub-axis, the sub-axis, and the part after it.
  parts = {name: (1, 1, size) for name, size in sizes.items()}
  for axis in chosen.split(","):
    match = MESH_AXIS.match(axis.strip())
    if not match or match[1] not in sizes or parts[match[1]][1] != 1:
      raise HloError(f"replica groups {text!r} are written in a way that is not understood")
    name, before, size = match[1], int(match[2] or 1), int(match[3] or sizes[match[1]])
    parts[name] = (before, size, sizes[name] // before // size)
  split = ids.reshape([part for three in parts.values() for part in three])
  inside = [3 * number + 1 for number in range(len(parts))]
  outside = [axis for axis in range(split.ndim) if axis not in inside]
  size = math.prod(split.shape[axis] for axis in inside)
  return tuple(map(tuple, split.transpose(outside + inside).reshape(-1, size).tolist()))


def _transposed(dims: str, shape: str, order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(map(int, shape.split(",")))).reshape([int(size) for size in shape.split(",")])
  if order:
    ids = ids.transpose([int(axis) for axis in order.split(",")])
  return ids.reshape([int(size) for size in dims.split(",")])

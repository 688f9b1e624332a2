"""HBM traffic: an estimate of the bytes of main memory that fusions and other top-level operations read and write.

Each operand is read once, of a sliced operand only the slice, without the padding of tiles.
"""

import itertools

from insec_jax.sizing.hlo import Computation, Instruction, Module

FUSIONS = ("fusion", "fusion-start")
# Annotations of the compiler: neither kernels nor moved bytes.
NOTES = (
  "AllocateBuffer",
  "ConcatBitcast",
  "AsyncCollectiveStart",
  "AsyncCollectiveDone",
  "Sharding",
  "SPMDFullToShardShape",
  "SPMDShardToFullShape",
  "AssumeGatherIndicesInBound",
  "annotate_device_placement",
  "LayoutConstraint",
  "SliceId",
  "ZeroCrop",
  "GatherSortedIndicesOrders",
)
FREE = frozenset(
  (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "optimization-barrier",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "add-dependency",
    "call-start",
    "custom-call-start",
    "async-start",
  )
)
HOST = 5  # space of the memory of the host
UPDATES = ("dynamic-update-slice", "dynamic-update-slice-start")
STARTED_SLICES = ("slice-start", "dynamic-slice-start")
SLICES = ("dynamic-slice", "slice", "gather", "slice-start")


def _hbm(arrays) -> float:
  return sum(array.num_bytes for array in arrays if array.space == 0)


def moved_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
  """Return the bytes that the operation reads from and writes to HBM."""
  if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-update")):
    return 0.0
  if instruction.opcode == "custom-call" and instruction.target in NOTES:
    return 0.0
  if instruction.opcode == "copy-start":
    return _hbm(instruction.arrays)
  operands = [computation.instructions[name].arrays for name in instruction.operands]
  if instruction.opcode == "dynamic-update-slice-start":
    return _hbm(operands[1]) + (sum(array.num_bytes for array in operands[1]) if _hbm(operands[0]) else 0.0)
  if instruction.opcode in STARTED_SLICES:
    (cut,) = instruction.arrays[-2:-1]  # between the operand and what synchronises
    return cut.num_bytes * (bool(_hbm(operands[0])) + (cut.space == 0))
  if instruction.opcode in SLICES:
    return _hbm(instruction.arrays) * (1 + bool(_hbm(operands[0])))
  if instruction.opcode in ("dynamic-update-slice", "scatter"):
    update = operands[1 if instruction.opcode == "dynamic-update-slice" else -1]
    return _hbm(update) + (sum(array.num_bytes for array in update) if _hbm(instruction.arrays) else 0.0)
  if instruction.opcode in FUSIONS:
    return _fusion_bytes(module, module.computations[instruction.called("calls")[0]], operands)
  return _hbm(itertools.chain(instruction.arrays, *operands))


def host_bytes(computation: Computation, instruction: Instruction) -> float:
  """Return the bytes that the operation copies between the device and the memory of its host."""
  read = [array for name in instruction.operands for array in computation.instructions[name].arrays]
  if instruction.opcode in ("copy", "copy-start"):
    copied = instruction.arrays[0]
    return copied.num_bytes if (copied.space == HOST) != (read[0].space == HOST) else 0.0
  if instruction.opcode in STARTED_SLICES and read[0].space == HOST:
    return instruction.arrays[-2].num_bytes
  if instruction.opcode in UPDATES and read[0].space == HOST != read[1].space:
    return read[1].num_bytes
  if instruction.opcode in SLICES and read[0].space == HOST != instruction.arrays[0].space:
    return instruction.arrays[0].num_bytes
  return 0.0


def _fusion_bytes(module: Module, fused: Computation, operands) -> float:
  total = 0.0
  for number, arrays in enumerate(operands):
    if _hbm(arrays):
      total += min(_hbm(arrays), _read_bytes(module, fused, fused.parameter(number)))
  root = fused.instructions[fused.root]
  results = [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
  return total + sum(_written_bytes(fused, result) for result in results if _hbm(result.arrays))


def _read_bytes(module: Module, fused: Computation, instruction: Instruction) -> float:
  """Return the bytes of a fusion's operand that are read: all, or only the slices when it has no other use."""
  total = 0.0
  for user in fused.readers[instruction.name]:
    if user.opcode == "bitcast":
      total += _read_bytes(module, fused, user)
    elif user.opcode == "fusion":
      inner = module.computations[user.called("calls")[0]]
      for number, name in enumerate(user.operands):
        if name == instruction.name:
          parameter = inner.parameter(number)
          total += _read_bytes(module, inner, parameter)
          if _only_renamed(inner, inner.instructions[inner.root]) is parameter:
            total += _read_bytes(module, fused, user)
    elif user.opcode in SLICES and user.operands[0] == instruction.name:
      total += sum(array.num_bytes for array in user.arrays)
    elif user.opcode != "dynamic-update-slice" or user.operands[0] != instruction.name:
      return sum(array.num_bytes for array in instruction.arrays)
  return total


def _only_renamed(fused: Computation, instruction: Instruction) -> Instruction:
  """Return the instruction of which this one is the same bytes, itself included."""
  while instruction.opcode == "bitcast":
    instruction = fused.instructions[instruction.operands[0]]
  return instruction


def _written_bytes(fused: Computation, instruction: Instruction) -> float:
  """Return the bytes of a fusion's result that are written: all, or only the update of a buffer updated in place."""
  instruction = _only_renamed(fused, instruction)
  if instruction.opcode == "dynamic-update-slice":
    instruction = fused.instructions[instruction.operands[1]]
  return sum(array.num_bytes for array in instruction.arrays)

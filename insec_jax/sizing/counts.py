"""FLOPs and bytes of one device in one run of an optimised HLO module, multiplied by the trips of its loops.

Matmul FLOPs are those of dots, convolutions (a TPU's dots) and the GPU's matmul calls: 2 for each multiplication and
addition. Kernels (Pallas, cuDNN) are opaque: their calls are counted by name, their FLOPs are not.

Bytes of collectives: see `collectives`. HBM bytes are an estimate: see `hbm`.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from insec_jax.sizing.collectives import (
  COLLECTIVES,
  braces,
  ends_in_slice,
  kind_of,
  replica_groups,
  ring_bytes,
  slices_reached,
)
from insec_jax.sizing.hbm import FUSIONS, NOTES, host_bytes, moved_bytes
from insec_jax.sizing.hlo import Computation, Evaluator, HloError, Instruction, Module, Value, given_trips, known_trips

ICI, DCN = "ici", "dcn"


@dataclasses.dataclass
class Counts:
  """FLOPs, bytes and kernel calls; `rematerialised` FLOPs are part of `flops`.

  `kernels` counts the calls of opaque kernels by name, `kernel_elements` sums the sizes of the largest operand of each.
  """

  flops: float = 0.0
  rematerialised: float = 0.0
  hbm_bytes: float = 0.0
  host_bytes: float = 0.0  # between the device and the memory of its host
  received: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # (network, kind) -> bytes
  kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  kernel_elements: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, other: "Counts", times: int) -> None:
    """Add `other` `times` times."""
    self.flops += times * other.flops
    self.rematerialised += times * other.rematerialised
    self.hbm_bytes += times * other.hbm_bytes
    self.host_bytes += times * other.host_bytes
    for mine, others in (
      (self.received, other.received),
      (self.kernels, other.kernels),
      (self.kernel_elements, other.kernel_elements),
    ):
      for key, number in others.items():
        mine[key] += times * number

  def bytes_over(self, network: str) -> dict[str, float]:
    """Return the bytes received by kind over ICI (links between chips) or DCN (between slices), zeros included."""
    return {kind: self.received[network, kind] for kind in COLLECTIVES}


def count(module: Module, scopes: Mapping[str, int]) -> Counts:
  """Return the counts of a device in one run; `scopes` maps names of scopes to the trips of loops that depend on data.

  Raises HloError for such a loop in none of these scopes, and for a collective that is not understood.
  """
  walk = _Walk(module, scopes)
  entry = module.computations[module.entry]
  arguments = (None,) * sum(instruction.opcode == "parameter" for instruction in entry.instructions.values())
  counts = walk.computation(module.entry, arguments, fused=False)
  for name in module.computations.keys() - walk.visited:
    for instruction in module.computations[name].instructions.values():
      if _is_matmul(instruction) or kind_of(instruction):
        raise HloError(f"{instruction.name} stands in {name}, which nothing that is understood calls")
  return counts


class _DataDependentError(HloError):
  pass


class _Walk:
  """Counter of computations; equal calls of a computation are counted once and cached."""

  def __init__(self, module: Module, scopes: Mapping[str, int]):
    self._module = module
    self._scopes = scopes
    self._evaluator = Evaluator(module)
    self._cache: dict[tuple, Counts] = {}
    self.visited: set[str] = set()
    self._in_flight = {
      _identity(instruction)
      for computation in module.computations.values()
      if _calls(computation, "AsyncCollectiveStart")
      for instruction in computation.instructions.values()
      if kind_of(instruction)
    }

  def computation(self, name: str, arguments: tuple[Value, ...], *, fused: bool, again: bool = False) -> Counts:
    self.visited.add(name)
    key = (name, arguments, fused, again)
    if key not in self._cache:
      self._cache[key] = self._computation(name, arguments, fused, again)
    return self._cache[key]

  def _computation(self, name: str, arguments: tuple[Value, ...], fused: bool, again: bool) -> Counts:
    computation = self._module.computations[name]
    counts, known = Counts(), {}

    def values(names):
      return tuple(self._evaluator.value(name, instruction, arguments, known) for instruction in names)

    for instruction in computation.instructions.values():
      if instruction.opcode == "while":
        counts.add(*self._loop(instruction, values(instruction.operands)[0]))
      elif instruction.opcode == "conditional":
        counts.add(self._dearest_branch(instruction, values(instruction.operands[1:])), 1)
      elif called := _called(instruction):
        fuses = instruction.opcode in FUSIONS
        inner = self.computation(
          called,
          values(instruction.operands),
          fused=fused or fuses,
          again=fuses and _is_again(computation, instruction, again),
        )
        counts.add(inner, 1)
      else:
        counts.add(self._operation(computation, instruction, fused=fused, again=again), 1)
      if not fused:
        counts.hbm_bytes += moved_bytes(self._module, computation, instruction)
        counts.host_bytes += host_bytes(computation, instruction)
    return counts

  def _loop(self, loop: Instruction, state: Value) -> tuple[Counts, int]:
    """Return (counts of the loop's body, number of times to add them)."""
    body = loop.called("body")[0]
    trips = known_trips(loop)
    if trips is None:
      states = self._evaluator.states(loop, state)
      trips = given_trips(loop, self._scopes) if states is None else len(states) - 1
    if trips is None:
      raise _DataDependentError(
        f"loop {loop.name} ({loop.op_name or 'without a name'}) runs as often as the data says; give its trips under "
        f"the name of its scope (given: {', '.join(self._scopes) or 'none'})"
      )
    try:
      return self.computation(body, (self._evaluator.unchanged(loop, state),), fused=False), trips
    except _DataDependentError:
      states = self._evaluator.states(loop, state)
      if states is None:
        raise
      # The trips of an inner loop depend on the counter of this one: count each trip separately.
      total = Counts()
      for before in states[:-1]:
        total.add(self.computation(body, (before,), fused=False), 1)
      return total, 1

  def _dearest_branch(self, instruction: Instruction, values: tuple[Value, ...]) -> Counts:
    branches = instruction.called("branch_computations") or instruction.called("true_computation", "false_computation")
    return max(
      (self.computation(branch, (value,), fused=False) for branch, value in zip(branches, values, strict=True)),
      key=lambda counts: (counts.flops, counts.received.total(), counts.hbm_bytes),
    )

  def _operation(self, computation: Computation, instruction: Instruction, *, fused: bool, again: bool) -> Counts:
    counts = Counts()
    if _is_matmul(instruction):
      counts.flops = matmul_flops(computation, instruction)
      if _is_again(computation, instruction, again):
        counts.rematerialised = counts.flops
    elif instruction.opcode == "custom-call":
      if name := _kernel(instruction):
        counts.kernels[name] += 1
        counts.kernel_elements[name] += max(
          (
            math.prod(array.dims)
            for operand in instruction.operands
            for array in computation.instructions[operand].arrays
          ),
          default=0,
        )
    elif (kind := kind_of(instruction)) and not (fused and self._is_in_flight(computation, instruction)):
      counts.received.update(self._received(computation, instruction, kind, fused=fused))
    return counts

  def _is_in_flight(self, computation: Computation, instruction: Instruction) -> bool:
    # An overlapped collective appears in every fusion from AsyncCollectiveStart to AsyncCollectiveDone.
    return not _calls(computation, "AsyncCollectiveStart") and (
      _calls(computation, "AsyncCollectiveDone") or _identity(instruction) in self._in_flight
    )

  def _received(
    self, computation: Computation, instruction: Instruction, kind: str, *, fused: bool
  ) -> dict[tuple[str, str], float]:
    operand = sum(array.num_bytes for name in instruction.operands for array in computation.instructions[name].arrays)
    if instruction.opcode == "send":
      return {(DCN, kind): ring_bytes(kind, operand, slices_reached(instruction))}
    if kind == "collective-permute":
      moves = any(source != target for source, target in braces(instruction.attribute("source_target_pairs")))
      return {(ICI, kind): operand} if moves else {}
    # A TPU implements a reduce-scatter as a fusion of an all-reduce and a slice of it.
    if kind == "all-reduce" and fused and ends_in_slice(computation, instruction):
      kind = "reduce-scatter"
    groups = replica_groups(instruction.attribute("replica_groups"), self._module.num_devices)
    return {(ICI, kind): ring_bytes(kind, operand, len(groups[0]))}


STARTS = ("call-start", "custom-call-start", "async-start", "fusion-start")


def _called(instruction: Instruction) -> str | None:
  """Return the computation that the instruction runs once, at once or asynchronously; None for other instructions."""
  if instruction.opcode in ("fusion", "call", *STARTS):
    return next(iter(instruction.called("calls", "to_apply", "called_computations")), None)
  return None


def _is_again(computation: Computation, instruction: Instruction, inherited: bool) -> bool:
  """Return whether the operation is recomputed: jax marks its op_name, XLA's own rematerialisation its name.

  An operation without op_name is recomputed if one of its readers is (no recomputed operation reads a gradient), or,
  without readers inside its fusion, if its fusion is.
  """
  if instruction.op_name or ".remat" in instruction.name:
    return "rematted_computation" in instruction.op_name or ".remat" in instruction.name
  users = computation.readers[instruction.name]
  return any(_is_again(computation, user, inherited) for user in users) if users else inherited


def _calls(computation: Computation, target: str) -> bool:
  return any(
    f'custom_call_target="{target}"' in instruction.attributes
    for instruction in computation.instructions.values()
    if instruction.opcode == "custom-call"
  )


def _identity(instruction: Instruction) -> tuple:
  return (
    instruction.opcode,
    instruction.shape.split("{")[0],
    instruction.attribute("channel_id"),
    instruction.attribute("replica_groups"),
    instruction.attribute("frontend_attributes"),
  )


GEMM = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8", "__onednn$matmul")


def _is_matmul(instruction: Instruction) -> bool:
  return instruction.opcode in ("dot", "convolution") or (
    instruction.opcode == "custom-call" and instruction.target in GEMM
  )


def _kernel(instruction: Instruction) -> str | None:
  """Return the name of a kernel, from op_name for Pallas, else the target of the call; None if it is no kernel."""
  target = instruction.target
  if target in NOTES:
    return None
  pallas = re.search(r"([^/]+)/pallas_call$", instruction.op_name)
  return pallas[1] if pallas else target


def matmul_flops(computation: Computation, instruction: Instruction) -> float:
  """Return the FLOPs of a dot, a convolution or a matmul call, without products with padding."""
  sides = [computation.instructions[name].arrays[0].dims for name in instruction.operands[:2]]
  if instruction.opcode == "convolution":
    return _convolution_flops(instruction, *sides)
  if instruction.opcode == "dot":
    contracted = [int(axis) for axis in re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")]
  else:
    numbers = re.search(r'"dot_dimension_numbers":\{"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    if not numbers:
      raise HloError(f"{instruction.name} does not say which dimensions it multiplies")
    contracted = [int(axis) for axis in re.findall(r"\d+", numbers[1])]
  return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(sides[0][axis] for axis in contracted)


def _convolution_flops(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
  left, right, out = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels")).groups()
  result = instruction.arrays[0].dims
  window = dict(part.split("=") for part in (instruction.attribute("window") or "{}").strip("{}").split())
  products = 1
  for number, label in enumerate(sorted(label for label in left if label.isdigit())):

    def attribute_item(name, default, number=number):
      return window[name].split("x")[number] if name in window else default

    low = attribute_item("pad", "0_0").split("_")[0]
    products *= _products(
      lhs[left.index(label)],
      rhs[right.index(label)],
      result[out.index(label)],
      int(attribute_item("stride", 1)),
      int(low),
      int(attribute_item("lhs_dilate", 1)),
      int(attribute_item("rhs_dilate", 1)),
    )
  features = lhs[left.index("f")] // int(instruction.attribute("feature_group_count") or 1)
  batch = lhs[left.index("b")] // int(instruction.attribute("batch_group_count") or 1)
  return 2.0 * products * features * batch * result[out.index("f")]


@functools.lru_cache(maxsize=4096)
def _products(size: int, kernel: int, result: int, stride: int, low: int, dilated: int, kernel_dilated: int) -> int:
  """Return the number of (result, kernel) position pairs that fall on an input element, not on padding or a hole."""
  position = np.arange(result)[:, None] * stride + np.arange(kernel)[None] * kernel_dilated - low
  return int(((position >= 0) & (position % dilated == 0) & (position // dilated < size)).sum())

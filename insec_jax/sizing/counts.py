"""FLOPs and bytes of one device in one run of an optimised HLO module, multiplied by the trips of its loops.

Matmul FLOPs are those of dots, convolutions (a TPU's dots) and the GPU's matmul calls: 2 for each multiplication and
addition. Kernels (Pallas, cuDNN) are opaque: their calls are counted by name, their FLOPs are not.

Bytes of a collective are those that a device in a ring of n receives, given the bytes b of its own operand:

    all-gather           (n - 1) b         all-to-all           (n - 1) / n b
    reduce-scatter   (n - 1) / n b         collective-permute             b
    all-reduce     2 (n - 1) / n b

HBM bytes are an estimate: bytes of main memory that fusions and other top-level operations read and write, each operand
once, only the slice of a sliced operand, without the padding of tiles.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Mapping

import numpy as np

from insec_jax.sizing.hlo import Computation, Evaluator, HloError, Instruction, Module, Value, given_trips, known_trips

ICI, DCN = "ici", "dcn"
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")


@dataclasses.dataclass
class Counts:
  """FLOPs, bytes and kernel calls; `rematerialised` FLOPs are part of `flops`.

  `kernels` counts the calls of opaque kernels by name, `kernel_elements` sums the sizes of the largest operand of each.
  """

  flops: float = 0.0
  rematerialised: float = 0.0
  hbm_bytes: float = 0.0
  received: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # (network, kind) -> bytes
  kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  kernel_elements: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, other: "Counts", times: int) -> None:
    """Add `other` `times` times."""
    self.flops += times * other.flops
    self.rematerialised += times * other.rematerialised
    self.hbm_bytes += times * other.hbm_bytes
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
      if _is_matmul(instruction) or _kind(instruction):
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
      if _kind(instruction)
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
        counts.hbm_bytes += _moved_bytes(self._module, computation, instruction)
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
    elif (kind := _kind(instruction)) and not (fused and self._is_in_flight(computation, instruction)):
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
      return {(DCN, kind): ring_bytes(kind, operand, _slices(instruction))}
    if kind == "collective-permute":
      moves = any(source != target for source, target in _braces(instruction.attribute("source_target_pairs")))
      return {(ICI, kind): operand} if moves else {}
    # A TPU implements a reduce-scatter as a fusion of an all-reduce and a slice of it.
    if kind == "all-reduce" and fused and _ends_in_slice(computation, instruction):
      kind = "reduce-scatter"
    groups = replica_groups(instruction.attribute("replica_groups"), self._module.num_devices)
    return {(ICI, kind): ring_bytes(kind, operand, len(groups[0]))}


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


FUSIONS = ("fusion", "fusion-start")
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


# Collectives between the slices of a pod, which pass through the hosts of a TPU.
BETWEEN_SLICES = {
  "ALL_REDUCE": "all-reduce",
  "ALL_GATHER": "all-gather",
  "REDUCE_SCATTER": "reduce-scatter",
  "ALL_TO_ALL": "all-to-all",
  "ONE_TO_ONE": "collective-permute",
}


def _kind(instruction: Instruction) -> str | None:
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


def _slices(instruction: Instruction) -> int:
  """Return the number of slices that a send reaches, such as 2 for `{1,2}x{0:3}`: slices 1 and 2, devices 0 to 3."""
  match = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', instruction.attributes)
  if not match:
    raise HloError(f"send {instruction.name} does not say to which slices")
  ends = [[int(end) for end in part.split(":")] for part in match[1].split(",")]
  return sum(part[-1] - part[0] + 1 for part in ends)


def _ends_in_slice(computation: Computation, instruction: Instruction) -> bool:
  users = computation.readers[instruction.name]
  if len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "copy"):
    return _ends_in_slice(computation, users[0])
  return len(users) == 1 and users[0].opcode == "dynamic-slice"


def _braces(text: str) -> tuple[tuple[int, ...], ...]:
  """Return the groups of a text such as `{{0,1},{2,3}}`."""
  return tuple(tuple(int(number) for number in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text))


def _transposed(dims: str, shape: str, order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(map(int, shape.split(",")))).reshape([int(size) for size in shape.split(",")])
  if order:
    ids = ids.transpose([int(axis) for axis in order.split(",")])
  return ids.reshape([int(size) for size in dims.split(",")])


IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH = re.compile(r"@?mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? \{(.*)\}$")
MESH_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?$")


def replica_groups(text: str | None, num_devices: int) -> tuple[tuple[int, ...], ...]:
  """Return the groups of devices, from any of HLO's notations; one group of all devices when none is given.

  {{0,1},{2,3}}   [2,2]<=[4]   [2,2]<=[2,2]T(1,0)   mesh['a'=2,'b'=2] {'b'}   mesh['a'=4] {'a':(2)2}
  """
  if text is None or text == "{}":
    return (tuple(range(num_devices)),)
  if text.startswith("{{"):
    return _braces(text)
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


GEMM = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8", "__onednn$matmul")
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


def _target(instruction: Instruction) -> str:
  return json.loads(instruction.attribute("custom_call_target"))


def _is_matmul(instruction: Instruction) -> bool:
  return instruction.opcode in ("dot", "convolution") or (
    instruction.opcode == "custom-call" and _target(instruction) in GEMM
  )


def _kernel(instruction: Instruction) -> str | None:
  """Return the name of a kernel, from op_name for Pallas, else the target of the call; None if it is no kernel."""
  target = _target(instruction)
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
SLICES = ("dynamic-slice", "slice", "gather", "slice-start")


def _hbm(arrays) -> float:
  return sum(array.num_bytes for array in arrays if array.space == 0)


def _moved_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
  """Return the bytes that the operation reads from and writes to HBM."""
  if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-update")):
    return 0.0
  if instruction.opcode == "custom-call" and _target(instruction) in NOTES:
    return 0.0
  if instruction.opcode == "copy-start":
    return _hbm(instruction.arrays)
  if instruction.opcode == "slice-start":
    return 2 * _hbm(instruction.arrays[-2:-1])
  operands = [computation.instructions[name].arrays for name in instruction.operands]
  if instruction.opcode in SLICES:
    return _hbm(instruction.arrays) * (1 + bool(_hbm(operands[0])))
  if instruction.opcode in ("dynamic-update-slice", "scatter"):
    update = operands[1 if instruction.opcode == "dynamic-update-slice" else -1]
    return _hbm(update) + (sum(array.num_bytes for array in update) if _hbm(instruction.arrays) else 0.0)
  if instruction.opcode in FUSIONS:
    return _fusion_bytes(module, module.computations[instruction.called("calls")[0]], operands)
  return _hbm(itertools.chain(instruction.arrays, *operands))


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
      total += sum(
        _read_bytes(module, inner, inner.parameter(number))
        for number, name in enumerate(user.operands)
        if name == instruction.name
      )
    elif user.opcode in SLICES and user.operands[0] == instruction.name:
      total += sum(array.num_bytes for array in user.arrays)
    elif user.opcode != "dynamic-update-slice" or user.operands[0] != instruction.name:
      return sum(array.num_bytes for array in instruction.arrays)
  return total


def _written_bytes(fused: Computation, instruction: Instruction) -> float:
  """Return the bytes of a fusion's result that are written: all, or only the update of a buffer updated in place."""
  while instruction.opcode == "bitcast":
    instruction = fused.instructions[instruction.operands[0]]
  if instruction.opcode == "dynamic-update-slice":
    instruction = fused.instructions[instruction.operands[1]]
  return sum(array.num_bytes for array in instruction.arrays)

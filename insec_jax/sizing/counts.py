"""What one device does in one run of an optimised HLO module, loops multiplied out.

Matmul FLOPs are those of dots, convolutions (a TPU's dots) and the GPU's matmul calls: 2 for each multiplication and
addition. Kernels (Pallas, cuDNN) are opaque: they are named and counted, their FLOPs are not.

Bytes of a collective are those that a device of a group of n receives when the group works as a ring, from the bytes b
of its own operand:

    all-gather           (n - 1) b         all-to-all           (n - 1) / n b
    reduce-scatter   (n - 1) / n b         collective-permute             b
    all-reduce     2 (n - 1) / n b

HBM bytes are an estimate: what the operations between fusions read and write in the main memory, each operand once, of
a slice only the slice, without the padding of tiles.
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
  """What was counted. `rematerialised` FLOPs are part of `flops`.

  `kernels` are calls of what is not looked into, `kernel_elements` the elements of the largest operand of each, summed.
  """

  flops: float = 0.0
  rematerialised: float = 0.0
  hbm_bytes: float = 0.0
  received: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # (network, kind) -> bytes
  kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  kernel_elements: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, other: "Counts", times: int) -> None:
    """Nothing; `other` has been added `times` times."""
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
    """Bytes received of each kind over ICI (links between chips) or DCN (between slices), zeros included."""
    return {kind: self.received[network, kind] for kind in COLLECTIVES}


def count(module: Module, scopes: Mapping[str, int]) -> Counts:
  """What a device does in one run; a loop whose trips depend on data is looked up in `scopes` (name: trips).

  HloError for such a loop that stands in none of the named scopes, and for a collective that is not understood.
  """
  walk = _Walk(module, scopes)
  entry = module.computations[module.entry]
  arguments = (None,) * sum(one.opcode == "parameter" for one in entry.instructions.values())
  counts = walk.computation(module.entry, arguments, fused=False)
  for name in module.computations.keys() - walk.visited:
    for one in module.computations[name].instructions.values():
      if _is_matmul(one) or _kind(one):
        raise HloError(f"{one.name} stands in {name}, which nothing that is understood calls")
  return counts


class _DataDependentError(HloError):
  pass


class _Walk:
  """Adds up computations; the same call of the same computation is added up once."""

  def __init__(self, module: Module, scopes: Mapping[str, int]):
    self._module = module
    self._scopes = scopes
    self._evaluator = Evaluator(module)
    self._found: dict[tuple, Counts] = {}
    self.visited: set[str] = set()
    self._in_flight = {
      _identity(one)
      for computation in module.computations.values()
      if _calls(computation, "AsyncCollectiveStart")
      for one in computation.instructions.values()
      if _kind(one)
    }

  def computation(self, name: str, arguments: tuple[Value, ...], *, fused: bool, again: bool = False) -> Counts:
    self.visited.add(name)
    key = (name, arguments, fused, again)
    if key not in self._found:
      self._found[key] = self._computation(name, arguments, fused, again)
    return self._found[key]

  def _computation(self, name: str, arguments: tuple[Value, ...], fused: bool, again: bool) -> Counts:
    computation = self._module.computations[name]
    counts, known = Counts(), {}

    def values(names):
      return tuple(self._evaluator.value(name, one, arguments, known) for one in names)

    for one in computation.instructions.values():
      if one.opcode == "while":
        counts.add(*self._loop(one, values(one.operands)[0]))
      elif one.opcode == "conditional":
        counts.add(self._dearest_branch(one, values(one.operands[1:])), 1)
      elif called := _called(one):
        fuses = one.opcode in FUSIONS
        inner = self.computation(
          called, values(one.operands), fused=fused or fuses, again=fuses and _is_again(computation, one, again)
        )
        counts.add(inner, 1)
      else:
        counts.add(self._operation(computation, one, fused=fused, again=again), 1)
      if not fused:
        counts.hbm_bytes += _moved_bytes(self._module, computation, one)
    return counts

  def _loop(self, loop: Instruction, state: Value) -> tuple[Counts, int]:
    """(what the loop does, how often to add it)."""
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
      # A loop inside runs as often as this one's counter says: trip by trip, then.
      total = Counts()
      for before in states[:-1]:
        total.add(self.computation(body, (before,), fused=False), 1)
      return total, 1

  def _dearest_branch(self, one: Instruction, values: tuple[Value, ...]) -> Counts:
    branches = one.called("branch_computations") or one.called("true_computation", "false_computation")
    return max(
      (self.computation(branch, (value,), fused=False) for branch, value in zip(branches, values, strict=True)),
      key=lambda counts: (counts.flops, counts.received.total(), counts.hbm_bytes),
    )

  def _operation(self, computation: Computation, one: Instruction, *, fused: bool, again: bool) -> Counts:
    counts = Counts()
    if _is_matmul(one):
      counts.flops = matmul_flops(computation, one)
      if _is_again(computation, one, again):
        counts.rematerialised = counts.flops
    elif one.opcode == "custom-call":
      if name := _kernel(one):
        counts.kernels[name] += 1
        counts.kernel_elements[name] += max(
          (math.prod(array.dims) for operand in one.operands for array in computation.instructions[operand].arrays),
          default=0,
        )
    elif (kind := _kind(one)) and not (fused and self._is_in_flight(computation, one)):
      counts.received.update(self._received(computation, one, kind, fused=fused))
    return counts

  def _is_in_flight(self, computation: Computation, one: Instruction) -> bool:
    # An overlapped collective is written in every fusion from AsyncCollectiveStart to AsyncCollectiveDone.
    return not _calls(computation, "AsyncCollectiveStart") and (
      _calls(computation, "AsyncCollectiveDone") or _identity(one) in self._in_flight
    )

  def _received(
    self, computation: Computation, one: Instruction, kind: str, *, fused: bool
  ) -> dict[tuple[str, str], float]:
    operand = sum(array.num_bytes for name in one.operands for array in computation.instructions[name].arrays)
    if one.opcode == "send":
      return {(DCN, kind): ring_bytes(kind, operand, _slices(one))}
    if kind == "collective-permute":
      moves = any(source != target for source, target in _braces(one.attribute("source_target_pairs")))
      return {(ICI, kind): operand} if moves else {}
    # A fusion of an all-reduce and the slice of it that the device keeps is how a TPU scatters sums.
    if kind == "all-reduce" and fused and _ends_in_slice(computation, one):
      kind = "reduce-scatter"
    groups = replica_groups(one.attribute("replica_groups"), self._module.num_devices)
    return {(ICI, kind): ring_bytes(kind, operand, len(groups[0]))}


def ring_bytes(kind: str, operand: float, n: int) -> float:
  """Bytes that each of n devices receives when each brings `operand` bytes: the table at the top."""
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


def _called(one: Instruction) -> str | None:
  """The computation that the instruction runs once, on its operands or, started early, on what an update brings."""
  if one.opcode in ("fusion", "call", *STARTS):
    return next(iter(one.called("calls", "to_apply", "called_computations")), None)
  return None


def _is_again(computation: Computation, one: Instruction, inherited: bool) -> bool:
  """Whether the operation is recomputed: jax says so in its origin, XLA, where memory was short, in its name.

  An operation that lost its origin is recomputed if what reads it is (nothing recomputed reads a gradient), or, where
  nothing inside its fusion reads it, if its fusion is.
  """
  if one.op_name or ".remat" in one.name:
    return "rematted_computation" in one.op_name or ".remat" in one.name
  users = computation.readers[one.name]
  return any(_is_again(computation, user, inherited) for user in users) if users else inherited


def _calls(computation: Computation, target: str) -> bool:
  return any(
    f'custom_call_target="{target}"' in one.attributes
    for one in computation.instructions.values()
    if one.opcode == "custom-call"
  )


def _identity(one: Instruction) -> tuple:
  return (
    one.opcode,
    one.shape.split("{")[0],
    one.attribute("channel_id"),
    one.attribute("replica_groups"),
    one.attribute("frontend_attributes"),
  )


# Collectives between the slices of a pod, which a TPU hands to its host.
BETWEEN_SLICES = {
  "ALL_REDUCE": "all-reduce",
  "ALL_GATHER": "all-gather",
  "REDUCE_SCATTER": "reduce-scatter",
  "ALL_TO_ALL": "all-to-all",
  "ONE_TO_ONE": "collective-permute",
}


def _kind(one: Instruction) -> str | None:
  """Kind of a collective, None for other operations and for the second half of an asynchronous one.

  HloError for what moves bytes between devices and is not counted.
  """
  name = one.opcode.removesuffix("-start")
  if name in COLLECTIVES:
    return name
  between = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
  if one.opcode == "recv" and between:
    return None  # the other end of a send
  if one.opcode == "send" and between and between[1] in BETWEEN_SLICES:
    return BETWEEN_SLICES[between[1]]
  if name in ("ragged-all-to-all", "collective-broadcast", "send", "recv"):
    raise HloError(f"{one.opcode} {one.name} ({one.op_name}) moves bytes between devices, and is not counted")
  return None


def _slices(one: Instruction) -> int:
  """How many slices a send reaches: those of `{1,2}x{0:3}`, slices 1 and 2, devices 0 to 3."""
  found = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', one.attributes)
  if not found:
    raise HloError(f"send {one.name} does not say to which slices")
  ends = [[int(end) for end in part.split(":")] for part in found[1].split(",")]
  return sum(part[-1] - part[0] + 1 for part in ends)


def _ends_in_slice(computation: Computation, one: Instruction) -> bool:
  users = computation.readers[one.name]
  if len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "copy"):
    return _ends_in_slice(computation, users[0])
  return len(users) == 1 and users[0].opcode == "dynamic-slice"


def _braces(text: str) -> tuple[tuple[int, ...], ...]:
  """The groups of `{{0,1},{2,3}}`."""
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
  """The groups of devices, from any of the ways to write them; one group of all when none is given.

  {{0,1},{2,3}}   [2,2]<=[4]   [2,2]<=[2,2]T(1,0)   mesh['a'=2,'b'=2] {'b'}   mesh['a'=4] {'a':(2)2}
  """
  if text is None or text == "{}":
    return (tuple(range(num_devices)),)
  if text.startswith("{{"):
    return _braces(text)
  if found := IOTA.fullmatch(text):
    return tuple(map(tuple, _transposed(*found.groups()).tolist()))
  if found := MESH.fullmatch(text):
    axes, ids, chosen = found.groups()
    sizes = {name.strip("' "): int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    return _mesh_groups(sizes, _device_ids(ids, math.prod(sizes.values())), chosen, text)
  raise HloError(f"replica groups {text!r} are written in a way that is not understood")


def _device_ids(text: str | None, number: int) -> np.ndarray:
  if text is None:
    return np.arange(number)
  if found := re.search(r"(?:\[([\d,]+)\])?<?=?\[([\d,]+)\]T\(([\d,]+)\)", text):
    return _transposed(found[1] or str(number), found[2], found[3]).reshape(-1)
  return np.array([int(one) for one in re.findall(r"\d+", text)])


def _mesh_groups(sizes: dict[str, int], ids: np.ndarray, chosen: str, text: str) -> tuple[tuple[int, ...], ...]:
  # Each axis in three parts: what lies before a chosen part of it, that part, and what lies after.
  parts = {name: (1, 1, size) for name, size in sizes.items()}
  for axis in chosen.split(","):
    found = MESH_AXIS.match(axis.strip())
    if not found or found[1] not in sizes or parts[found[1]][1] != 1:
      raise HloError(f"replica groups {text!r} are written in a way that is not understood")
    name, before, size = found[1], int(found[2] or 1), int(found[3] or sizes[found[1]])
    parts[name] = (before, size, sizes[name] // before // size)
  split = ids.reshape([part for three in parts.values() for part in three])
  inside = [3 * number + 1 for number in range(len(parts))]
  outside = [axis for axis in range(split.ndim) if axis not in inside]
  size = math.prod(split.shape[axis] for axis in inside)
  return tuple(map(tuple, split.transpose(outside + inside).reshape(-1, size).tolist()))


GEMM = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8", "__onednn$matmul")
# Neither kernels nor moved bytes: notes of the compiler to itself.
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


def _target(one: Instruction) -> str:
  return json.loads(one.attribute("custom_call_target"))


def _is_matmul(one: Instruction) -> bool:
  return one.opcode in ("dot", "convolution") or (one.opcode == "custom-call" and _target(one) in GEMM)


def _kernel(one: Instruction) -> str | None:
  """The name of a kernel: Pallas's in its origin, else that of the library's call; None for what is none."""
  target = _target(one)
  if target in NOTES:
    return None
  pallas = re.search(r"([^/]+)/pallas_call$", one.op_name)
  return pallas[1] if pallas else target


def matmul_flops(computation: Computation, one: Instruction) -> float:
  """FLOPs of a dot, a convolution or a matmul call: of products that are really made, not those with padding."""
  sides = [computation.instructions[name].arrays[0].dims for name in one.operands[:2]]
  if one.opcode == "convolution":
    return _convolution_flops(one, *sides)
  if one.opcode == "dot":
    contracted = [int(axis) for axis in re.findall(r"\d+", one.attribute("lhs_contracting_dims") or "")]
  else:
    numbers = re.search(r'"dot_dimension_numbers":\{"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
    if not numbers:
      raise HloError(f"{one.name} does not say which dimensions it multiplies")
    contracted = [int(axis) for axis in re.findall(r"\d+", numbers[1])]
  return 2.0 * math.prod(one.arrays[0].dims) * math.prod(sides[0][axis] for axis in contracted)


def _convolution_flops(one: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
  left, right, out = re.fullmatch(r"(\w+)_(\w+)->(\w+)", one.attribute("dim_labels")).groups()
  result = one.arrays[0].dims
  window = dict(part.split("=") for part in (one.attribute("window") or "{}").strip("{}").split())
  products = 1
  for number, label in enumerate(sorted(label for label in left if label.isdigit())):

    def of(name, default, number=number):
      return window[name].split("x")[number] if name in window else default

    low = of("pad", "0_0").split("_")[0]
    products *= _products(
      lhs[left.index(label)],
      rhs[right.index(label)],
      result[out.index(label)],
      int(of("stride", 1)),
      int(low),
      int(of("lhs_dilate", 1)),
      int(of("rhs_dilate", 1)),
    )
  features = lhs[left.index("f")] // int(one.attribute("feature_group_count") or 1)
  batch = lhs[left.index("b")] // int(one.attribute("batch_group_count") or 1)
  return 2.0 * products * features * batch * result[out.index("f")]


@functools.lru_cache(maxsize=4096)
def _products(size: int, kernel: int, result: int, stride: int, low: int, dilated: int, kernel_dilated: int) -> int:
  """Pairs of a place in the result and one in the kernel that meet an element, not padding or a hole."""
  at = np.arange(result)[:, None] * stride + np.arange(kernel)[None] * kernel_dilated - low
  return int(((at >= 0) & (at % dilated == 0) & (at // dilated < size)).sum())


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


def _moved_bytes(module: Module, computation: Computation, one: Instruction) -> float:
  """Bytes that the operation reads from and writes to HBM."""
  if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
    return 0.0
  if one.opcode == "custom-call" and _target(one) in NOTES:
    return 0.0
  if one.opcode == "copy-start":
    return _hbm(one.arrays)
  if one.opcode == "slice-start":
    return 2 * _hbm(one.arrays[-2:-1])
  operands = [computation.instructions[name].arrays for name in one.operands]
  if one.opcode in SLICES:
    return _hbm(one.arrays) * (1 + bool(_hbm(operands[0])))
  if one.opcode in ("dynamic-update-slice", "scatter"):
    update = operands[1 if one.opcode == "dynamic-update-slice" else -1]
    return _hbm(update) + (sum(array.num_bytes for array in update) if _hbm(one.arrays) else 0.0)
  if one.opcode in FUSIONS:
    return _fusion_bytes(module, module.computations[one.called("calls")[0]], operands)
  return _hbm(itertools.chain(one.arrays, *operands))


def _fusion_bytes(module: Module, fused: Computation, operands) -> float:
  total = 0.0
  for number, arrays in enumerate(operands):
    if _hbm(arrays):
      total += min(_hbm(arrays), _read_bytes(module, fused, fused.parameter(number)))
  root = fused.instructions[fused.root]
  results = [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
  return total + sum(_written_bytes(fused, result) for result in results if _hbm(result.arrays))


def _read_bytes(module: Module, fused: Computation, one: Instruction) -> float:
  """Bytes of a fusion's operand that are read: all, or the slices when nothing else is done with it."""
  total = 0.0
  for user in fused.readers[one.name]:
    if user.opcode == "bitcast":
      total += _read_bytes(module, fused, user)
    elif user.opcode == "fusion":
      inner = module.computations[user.called("calls")[0]]
      total += sum(
        _read_bytes(module, inner, inner.parameter(number))
        for number, name in enumerate(user.operands)
        if name == one.name
      )
    elif user.opcode in SLICES and user.operands[0] == one.name:
      total += sum(array.num_bytes for array in user.arrays)
    elif user.opcode != "dynamic-update-slice" or user.operands[0] != one.name:
      return sum(array.num_bytes for array in one.arrays)
  return total


def _written_bytes(fused: Computation, one: Instruction) -> float:
  """Bytes of a fusion's result that are written: all, or the update of a buffer that stays where it is."""
  while one.opcode == "bitcast":
    one = fused.instructions[one.operands[0]]
  if one.opcode == "dynamic-update-slice":
    one = fused.instructions[one.operands[1]]
  return sum(array.num_bytes for array in one.arrays)

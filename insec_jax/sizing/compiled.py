"""Program compiled for devices that need not be present: the memory of a chip, its FLOPs and bytes, the roofline."""

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from insec_jax.command import InputError
from insec_jax.files import buckets
from insec_jax.files.writing import write_text
from insec_jax.model.memory import HOST
from insec_jax.sizing import counts, hlo
from insec_jax.sizing.hardware import GIB, Topology

# Matrix products (of T x T / 2 x H for each head) of an attention kernel, by a part of its name.
KERNEL_PRODUCTS = (("fwd", 2), ("forward", 2), ("dkv", 5), ("dq", 3), ("key", 4), ("query", 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Memory of one chip, in GiB; `held` is what stays between calls, by name: weights, optimizer, cache.

  When the compiler has refused the program, `peak` is the size that its error gives, which may be too low, and `limit`
  the memory that it gives. Else `limit` is the usable memory, None where the chip is not known. What is in the memory
  of the host is in `host` alone.
  """

  held: Mapping[str, float]
  peak: float
  limit: float | None
  refused: bool
  host: float = 0.0  # of what the host holds for the chip, between calls and during one

  @property
  def temporary(self) -> float:
    """The peak without what is held: gradients, activations, copies."""
    return self.peak - sum(self.held.values())

  @property
  def fits(self) -> bool | None:
    """Whether the program runs; None where the memory of the chip is not known."""
    return None if self.limit is None else not self.refused and self.peak <= self.limit

  @property
  def missing(self) -> float:
    """GiB by which the peak exceeds the limit, 0 when it fits."""
    return 0.0 if self.fits in (True, None) else self.peak - self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """FLOPs and bytes of one chip in one run, and the seconds that each takes alone at the chip's full speed."""

  flops: float  # of matrix products, without those of kernels
  rematerialised: float  # the recomputed part of `flops`
  kernel_flops: float  # of attention kernels, for rows of one segment
  kernels: dict[str, int]
  unknown_kernels: list[str]  # names of kernels whose FLOPs are not known
  ici_bytes: dict[str, float]
  dcn_bytes: dict[str, float]
  host_bytes: float  # copied between the chip and the memory of its host, both ways
  hbm_bytes: float
  seconds: dict[str, float]  # of "compute", "hbm", "ici", "dcn"; empty where the chip is not known
  tokens: int  # of the batch, of all chips
  model_flops: float  # of a chip: causal attention, no recomputation

  @property
  def bound(self) -> str | None:
    """The resource that takes longest; None where the chip is not known."""
    return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else None

  @property
  def step_seconds(self) -> float | None:
    """The roofline, a lower bound."""
    return self.seconds[self.bound] if self.seconds else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """Program compiled for a topology; `work` is None when the compiler has refused it."""

  topology: Topology
  memory: Memory
  work: Work | None
  lower_seconds: float
  compile_seconds: float

  @property
  def tokens_per_s_per_chip(self) -> float | None:
    """Tokens per second and chip at the roofline, an upper bound."""
    if self.work is None or not self.work.seconds:
      return None
    return self.work.tokens / self.work.step_seconds / self.topology.chips

  @property
  def mfu(self) -> float | None:
    """Model FLOPs utilisation at the roofline, an upper bound."""
    if self.work is None or not self.work.seconds:
      return None
    return self.work.model_flops / self.work.step_seconds / (self.topology.chip.tflops * 1e12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """What is needed to read a program's counts: trips of loops that depend on data, and the tokens of its batch."""

  trips: Mapping[str, int]  # by the name of the loop's scope
  loops_only: bool = False  # leave out what is done once, before and after these loops
  tokens: int  # of all devices
  row_length: int  # keys of a row in an attention kernel
  flops_per_token: float  # of the model


def compile_program(
  lower: Callable[[], Any],
  topology: Topology,
  *,
  held: Mapping[str, Any],
  reading: Reading,
  hlo_file: pathlib.Path | None,
) -> Program:
  """Compile what `lower` returns for the topology.

  `held` are the arrays, as ShapeDtypeStructs with shardings, that stay between calls. The optimised HLO is written to
  `hlo_file` unless None.
  """
  start = time.perf_counter()
  lowered = lower()
  lower_seconds = time.perf_counter() - start
  start = time.perf_counter()
  compiled, refusal = None, None
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refusal = read_refusal(str(error))
    if refusal is None:
      raise
  compile_seconds = time.perf_counter() - start
  work = None
  if compiled is not None:
    text = optimised_hlo(compiled)
    if hlo_file is not None:
      write_text(hlo_file, text)
      buckets.publish(hlo_file)
    work = _work(text, topology, reading)
  return Program(
    topology=topology,
    memory=_memory(held, compiled, refusal, topology),
    work=work,
    lower_seconds=lower_seconds,
    compile_seconds=compile_seconds,
  )


def optimised_hlo(compiled) -> str:
  """Return the text of the compiled module; InputError where compiler and jax have incompatible versions."""
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    raise InputError(
      f"jax {jax.__version__} cannot read what this compiler has written "
      f"({str(error).splitlines()[0]}); install the one that belongs to it, for a TPU with "
      f"pip install 'jax[tpu]=={jax.__version__}'"
    ) from error


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
REFUSALS = (
  re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
  re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)


def read_refusal(message: str) -> tuple[float, float] | None:
  """Return (GiB needed, GiB available) of a device from a compiler's error; None for another error."""
  for pattern in REFUSALS:
    if match := pattern.search(message):
      used, used_unit, limit, limit_unit = match.groups()
      return float(used) * UNITS[used_unit] / GIB, float(limit) * UNITS[limit_unit] / GIB
  return None


def _memory(held: Mapping[str, Any], compiled, refusal, topology: Topology) -> Memory:
  on_chip = 1 if topology.chip is None else topology.chip.devices
  host = 0.0
  if refusal:
    peak, limit = (on_chip * size for size in refusal)
  else:
    sizes = compiled.memory_analysis()
    # What the program does not read is no argument of it, and stays in memory all the same: the head, of prompts.
    unread = max(0, device_bytes(held) - sizes.argument_size_in_bytes)
    on_host = sizes.host_argument_size_in_bytes + sizes.host_temp_size_in_bytes
    peak = on_chip * (sizes.peak_memory_in_bytes - on_host + unread) / GIB  # the compiler's peak includes the host's
    limit = topology.chip and topology.chip.usable_gib
    host = on_chip * on_host / GIB
  return Memory(
    held={name: on_chip * device_bytes(tree) / GIB for name, tree in held.items()},
    peak=peak,
    limit=limit,
    refused=bool(refusal),
    host=host,
  )


def device_bytes(tree: Any) -> int:
  """Return the bytes that a device itself holds of these arrays, ShapeDtypeStructs with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if leaf.sharding.memory_kind != HOST
  )


def _work(text: str, topology: Topology, reading: Reading) -> Work:
  module = hlo.parse(text)
  counted = counts.count(module, reading.trips)
  if reading.loops_only:
    counted.add(counts.count(module, dict.fromkeys(reading.trips, 0)), -1)
  on_chip = 1 if topology.chip is None else topology.chip.devices
  known = {name: _kernel_products(name, counted.kernels) for name in counted.kernels}
  # The largest operand of attention is the queries (rows, heads, positions, head width); causal, each reads half a row.
  kernel_flops = on_chip * sum(
    products * counted.kernel_elements[name] * reading.row_length for name, products in known.items() if products
  )
  ici, dcn = (
    {kind: on_chip * number for kind, number in counted.bytes_over(network).items()}
    for network in (counts.ICI, counts.DCN)
  )
  flops, hbm = on_chip * counted.flops, on_chip * counted.hbm_bytes
  return Work(
    flops=flops,
    rematerialised=on_chip * counted.rematerialised,
    kernel_flops=kernel_flops,
    kernels=dict(counted.kernels),
    unknown_kernels=sorted(name for name, products in known.items() if products is None),
    ici_bytes=ici,
    dcn_bytes=dcn,
    host_bytes=on_chip * counted.host_bytes,
    hbm_bytes=hbm,
    tokens=reading.tokens,
    model_flops=reading.flops_per_token * reading.tokens / topology.chips,
    seconds=_seconds(topology, flops + kernel_flops, hbm, sum(ici.values()), sum(dcn.values())),
  )


def _kernel_products(name: str, kernels) -> int | None:
  """Return the number of matrix products of a kernel; None where it is not known."""
  for part, products in KERNEL_PRODUCTS:
    if part in name:
      # dq has a kernel of its own unless the one for dk and dv computes it too.
      return 4 if part == "dkv" and any("dq" in kernel for kernel in kernels) else products
  return None


def _seconds(topology: Topology, flops: float, hbm: float, ici: float, dcn: float) -> dict[str, float]:
  chip = topology.chip
  if chip is None:
    return {}
  seconds = {
    "compute": flops / (chip.tflops * 1e12),
    "hbm": hbm / (chip.hbm_gb_s * 1e9),
    "ici": ici / (chip.link_gb_s * 1e9 * max(topology.links, 1)),
  }
  if topology.slices > 1 and chip.dcn_gb_s:
    seconds["dcn"] = dcn / (chip.dcn_gb_s * 1e9)
  return seconds

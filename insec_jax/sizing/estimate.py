"""Memory, FLOPs and bytes of one train step on a chip, from the step compiled for devices that need not be present."""

import dataclasses
import math
import pathlib
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.files.writing import write_text
from insec_jax.model import attention, llama, sharding
from insec_jax.sizing import counts, hlo
from insec_jax.sizing.hardware import GIB, Topology
from insec_jax.training import loss, optimizer
from insec_jax.training import step as step_lib

CHUNK_LOOP = "trained_chunks"  # scope in training/loss.py of the only loop whose trips depend on the data
# Matrix products (of T x T / 2 x H for each head) of an attention kernel, by a part of its name.
KERNEL_PRODUCTS = (("fwd", 2), ("forward", 2), ("dkv", 5), ("dq", 3), ("key", 4), ("query", 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Memory of one chip, in GiB; `temporary` is the peak without parameters and optimizer: gradients and activations.

  When the compiler has refused the program, `peak` is the size that its error gives, which may be too low, and `limit`
  the memory that it gives. Else `limit` is the usable memory, None where the chip is not known.
  """

  weights: float
  optimizer: float
  temporary: float
  peak: float
  limit: float | None
  refused: bool

  @property
  def fits(self) -> bool | None:
    """Whether the step runs; None where the memory of the chip is not known."""
    return None if self.limit is None else not self.refused and self.peak <= self.limit

  @property
  def missing(self) -> float:
    """GiB by which the peak exceeds the limit, 0 when it fits."""
    return 0.0 if self.fits in (True, None) else self.peak - self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """FLOPs and bytes of one chip in a step, and the seconds that each takes alone at the chip's full speed."""

  flops: float  # of matrix products, without those of kernels
  rematerialised: float  # the recomputed part of `flops`
  kernel_flops: float  # of attention kernels, for rows of one segment
  kernels: dict[str, int]
  unknown_kernels: list[str]  # names of kernels whose FLOPs are not known
  ici_bytes: dict[str, float]
  dcn_bytes: dict[str, float]
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
class Estimate:
  """Estimate of a step on a topology; `work` is None when the compiler has refused the program."""

  topology: Topology
  mesh: dict[str, int]  # data, fsdp, tensor
  remat: str
  rows_per_device: int
  row_length: int
  accumulation: int
  attention: str
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


def estimate(
  config: Config,
  model_config: llama.LlamaConfig,
  topology: Topology,
  *,
  trained_share: float,
  hlo_file: pathlib.Path | None,
) -> Estimate:
  """Compile the config's train step for the topology and return its estimate.

  `trained_share` is the fraction of tokens that are trained. The optimised HLO is written to `hlo_file` unless None.
  """
  mesh = sharding.make_mesh(config.mesh, topology.devices)
  tx = optimizer.make(config.optimizer, config.train.steps)
  state = step_lib.abstract_state(model_config, config.precision.params, tx, mesh)
  step, batch, reason = _step_and_batch(config, model_config, topology, mesh, state)
  start = time.perf_counter()
  with jax.set_mesh(mesh):
    lowered = step.lower(state, batch)
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
    work = _work(config, model_config, topology, mesh, text, trained_share)
  data, fsdp, tensor = config.mesh.shape(len(topology.devices))
  return Estimate(
    topology=topology,
    mesh={"data": data, "fsdp": fsdp, "tensor": tensor},
    remat=config.model.remat,
    rows_per_device=config.data.rows_per_device,
    row_length=config.data.row_length,
    accumulation=config.data.accumulation,
    attention=reason,
    memory=_memory(state, compiled, refusal, topology),
    work=work,
    lower_seconds=lower_seconds,
    compile_seconds=compile_seconds,
  )


def _step_and_batch(
  config: Config, model_config: llama.LlamaConfig, topology: Topology, mesh: Mesh, state: step_lib.TrainState
) -> tuple[Any, Any, str]:
  """Return the train step, the shapes of its batch, and the chosen attention with the reason."""
  attend, reason = attention.choose(
    topology.platform,
    device_kind=topology.devices[0].device_kind,
    head_width=model_config.head_width,
    row_length=config.data.row_length,
    compute=config.precision.compute,
  )
  model = llama.Llama(model_config, config.precision.compute, config.model.remat, attend)
  step = step_lib.make_train_step(
    model, config.optimizer, config.train.steps, mesh, step_lib.shardings_of(state), repeat=config.loss.repeat
  )
  batch = step_lib.abstract_batch(
    mesh,
    accumulation=config.data.accumulation,
    rows_per_device=config.data.rows_per_device,
    row_length=config.data.row_length,
    negatives=config.loss.negatives,
  )
  return step, batch, reason


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


def _memory(state: step_lib.TrainState, compiled, refusal, topology: Topology) -> Memory:
  on_chip = 1 if topology.chip is None else topology.chip.devices
  weights, moments = (on_chip * _device_bytes(tree) / GIB for tree in (state.params, state.optimizer))
  if refusal:
    peak, limit = (on_chip * size for size in refusal)
  else:
    peak = on_chip * compiled.memory_analysis().peak_memory_in_bytes / GIB
    limit = topology.chip and topology.chip.usable_gib
  return Memory(
    weights=weights,
    optimizer=moments,
    temporary=peak - weights - moments,
    peak=peak,
    limit=limit,
    refused=bool(refusal),
  )


def _device_bytes(tree: Any) -> int:
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _work(
  config: Config, model: llama.LlamaConfig, topology: Topology, mesh: Mesh, text: str, trained_share: float
) -> Work:
  local_tokens = config.data.rows_per_device * config.data.row_length
  trips = math.ceil(trained_share * local_tokens / loss.chunk_size(local_tokens))
  counted = counts.count(hlo.parse(text), {CHUNK_LOOP: trips})
  on_chip = 1 if topology.chip is None else topology.chip.devices
  known = {name: _kernel_products(name, counted.kernels) for name in counted.kernels}
  # The largest operand of attention is the queries (rows, heads, positions, head width); causal, each reads half a row.
  kernel_flops = on_chip * sum(
    products * counted.kernel_elements[name] * config.data.row_length for name, products in known.items() if products
  )
  tokens = local_tokens * config.data.accumulation * sharding.size_over(mesh, sharding.BATCH)
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
    hbm_bytes=hbm,
    tokens=tokens,
    model_flops=flops_per_token(model, config.data.row_length, trained_share) * tokens / topology.chips,
    seconds=_seconds(topology, flops + kernel_flops, hbm, sum(ici.values()), sum(dcn.values())),
  )


def _kernel_products(name: str, kernels) -> int | None:
  """Return the number of matrix products of a kernel; None where it is not known."""
  for part, products in KERNEL_PRODUCTS:
    if part in name:
      # dq has a kernel of its own unless the one for dk and dv computes it too.
      return 4 if part == "dkv" and any("dq" in kernel for kernel in kernels) else products
  return None


def flops_per_token(model: llama.LlamaConfig, row_length: int, trained_share: float) -> float:
  """Return the FLOPs of forward and backward pass per token in a row of one segment.

  6 for each weight that multiplies the token (the head: times `trained_share`), and 6 T / 2 for each query's width
  twice (scores and context; causal).
  """
  layer = (
    model.width * model.head_width * 2 * (model.num_heads + model.num_kv_heads) + 3 * model.width * model.mlp_width
  )
  causal = row_length * model.num_heads * model.head_width
  return 6 * (model.num_layers * (layer + causal) + trained_share * model.vocab_size * model.width)


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

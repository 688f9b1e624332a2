"""Chips and slices: data of their makers, and device descriptions that compile for them without such hardware.

local          the devices of this machine
v5p:2x2x4      a slice, chips along each side of its torus (v4 v5e v5p v6e tpu7x)
2xv5e:8x8      two such slices, joined by the data centre's network
h100:8         GPUs of one host (h100 h200)
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from insec_jax.command import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Chip, or card; `usable_gib` is the memory that a compiled step may use."""

  platform: str
  kinds: tuple[str, ...]  # jax.Device.device_kind
  sides: int  # dimensions of the torus; 0: all cards are connected by a switch
  devices: int  # jax devices on a chip
  hbm_gib: float
  usable_gib: float
  tflops: float  # 1e12 bfloat16 FLOP/s, dense
  hbm_gb_s: float
  link_gb_s: float  # one way, each link; of a card to the switch
  dcn_gb_s: float | None  # one way, each chip
  options: dict[str, Any]


# TPU: cloud.google.com/tpu/docs (a page for each version: memory, bfloat16 peak, HBM); links and network as measured in
# jax-ml.github.io/scaling-book; tpu7x's links as v5p's, for which the documents give the same figure.
# usable_gib is the limit in the error with which libtpu 0.0.52 refuses a program.
# GPU: NVIDIA's data sheets of the SXM cards; usable_gib leaves 5 % of the reported memory to CUDA and NCCL.
CHIPS = {
  "v4": Chip(
    platform="tpu",
    kinds=("TPU v4",),
    sides=3,
    devices=1,
    hbm_gib=32,
    usable_gib=30.75,
    tflops=275,
    hbm_gb_s=1_228,
    link_gb_s=45,
    dcn_gb_s=6.25,
    options={"chip_config_name": "megacore"},
  ),
  "v5e": Chip(
    platform="tpu",
    kinds=("TPU v5 lite", "TPU v5e"),
    sides=2,
    devices=1,
    hbm_gib=16,
    usable_gib=15.75,
    tflops=197,
    hbm_gb_s=819,
    link_gb_s=45,
    dcn_gb_s=3.125,
    options={},
  ),
  "v5p": Chip(
    platform="tpu",
    kinds=("TPU v5", "TPU v5p"),
    sides=3,
    devices=1,
    hbm_gib=96,
    usable_gib=95.73,
    tflops=459,
    hbm_gb_s=2_765,
    link_gb_s=90,
    dcn_gb_s=6.25,
    options={},
  ),
  "v6e": Chip(
    platform="tpu",
    kinds=("TPU v6 lite", "TPU v6e"),
    sides=2,
    devices=1,
    hbm_gib=32,
    usable_gib=31.24,
    tflops=918,
    hbm_gb_s=1_638,
    link_gb_s=90,
    dcn_gb_s=12.5,
    options={},
  ),
  "tpu7x": Chip(
    platform="tpu",
    kinds=("TPU7x",),
    sides=3,
    devices=2,
    hbm_gib=192,
    usable_gib=2 * 94.74,
    tflops=2_307,
    hbm_gb_s=7_380,
    link_gb_s=90,
    dcn_gb_s=12.5,
    options={},
  ),
  "h100": Chip(
    platform="gpu",
    kinds=("NVIDIA H100 80GB HBM3",),
    sides=0,
    devices=1,
    hbm_gib=79.1,
    usable_gib=75.1,
    tflops=989,
    hbm_gb_s=3_350,
    link_gb_s=450,
    dcn_gb_s=None,
    options={},
  ),
  "h200": Chip(
    platform="gpu",
    kinds=("NVIDIA H200", "NVIDIA H200 141GB HBM3e"),
    sides=0,
    devices=1,
    hbm_gib=141,
    usable_gib=134,
    tflops=989,
    hbm_gb_s=4_800,
    link_gb_s=450,
    dcn_gb_s=None,
    options={},
  ),
}
MOST_CHIPS = 65_536  # of a request
GPUS_OF_A_HOST = 8
# Description of a Hopper card from which XLA compiles; the fields in braces are filled in.
HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  device_memory_size: {memory}  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 10  patch: 0 }}
device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True)
class Request:
  """Topology as requested; `chip` None: the devices of this machine."""

  name: str
  chip: str | None
  shape: tuple[int, ...]
  slices: int


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to compile for; `chip` None: a chip that is not in CHIPS."""

  name: str
  platform: str
  chip: Chip | None
  devices: tuple
  chips: int
  slices: int
  links: int  # number over which a chip of a slice can receive at once


def parse(text: str) -> list[Request]:
  """Return the topologies of a comma-separated list; InputError for an unknown one, or for `local` among others."""
  requests = [_request(name.strip()) for name in text.split(",")]
  if len(requests) > 1 and any(request.chip is None for request in requests):
    raise InputError(f"--topology={text}: local opens the devices here, describing others opens none; give it alone")
  return requests


def _request(name: str) -> Request:
  if name == "local":
    return Request(name, None, (), 1)
  match = re.fullmatch(r"(?:(\d{1,6})x)?([a-z]\w*):(\d{1,6}(?:x\d{1,6}){0,9})", name, re.ASCII)
  if not match or match[2] not in CHIPS:
    raise InputError(
      f"--topology: {name!r:.100} is not known; give local, or {', '.join(CHIPS)} with its chips, such "
      "as v5p:2x2x4, 2xv5e:8x8 (two slices) or h100:8"
    )
  chip, slices = CHIPS[match[2]], int(match[1] or 1)
  shape = tuple(int(side) for side in match[3].split("x"))
  if chip.sides == 0:
    if len(shape) > 1 or slices > 1 or not 1 <= shape[0] <= GPUS_OF_A_HOST:
      raise InputError(f"--topology: {name!r}; give 1 to {GPUS_OF_A_HOST} cards of one host, such as {match[2]}:8")
  elif len(shape) != chip.sides or 0 in shape or slices == 0:
    example = "x".join("224"[: chip.sides])
    raise InputError(
      f"--topology: {name!r}; a slice of {match[2]} has {chip.sides} sides, such as {match[2]}:{example}"
    )
  elif math.prod(shape) * slices > MOST_CHIPS:
    raise InputError(f"--topology: {name!r} has {math.prod(shape) * slices:,} chips; give at most {MOST_CHIPS:,}")
  return Request(name, match[2], shape, slices)


def host_of(request: Request) -> tuple[Request, int]:
  """Return (the part of the slice that is on one host, the number of hosts); `local` is the devices of this host.

  A host has 4 chips, 2 x 2 of a slice; one of v5e or v6e has all of a slice of up to 8. Source: the pages of
  cloud.google.com/tpu/docs named above.
  """
  if request.chip is None or CHIPS[request.chip].sides == 0:
    return request, 1
  shape = request.shape
  if CHIPS[request.chip].sides == 3:
    shape = (*(min(2, side) for side in shape[:2]), 1)
  elif math.prod(shape) > 8:
    shape = tuple(min(2, side) for side in shape)
  hosts = math.prod(request.shape) // math.prod(shape) * request.slices
  return Request(f"{request.chip}:{'x'.join(map(str, shape))}", request.chip, shape, 1), hosts


def prepare(requests: list[Request]) -> None:
  """Set up jax for described devices; call it before jax looks for devices.

  Unless the devices of this machine are requested, jax uses the CPU only, so that no TPU or GPU is opened.
  """
  if any(request.chip is None for request in requests):
    return
  # Outside a TPU machine libtpu would wait for the metadata server, and warn that it does not answer.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
  # A description opens no chip, so several processes may load libtpu.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  jax.config.update("jax_platforms", "cpu")


def describe(request: Request) -> Topology:
  """Return the devices to compile for; InputError when their compiler is missing or refuses the shape."""
  if request.chip is None:
    return _local()
  chip = CHIPS[request.chip]
  devices = _tpu_devices(request, chip) if chip.platform == "tpu" else _gpu_devices(request, chip)
  chips = math.prod(request.shape) * request.slices
  if len(devices) != chips * chip.devices:
    raise InputError(
      f"--topology: {request.name!r} gives {len(devices)} devices, expected {chips * chip.devices}; "
      "this libtpu describes that chip differently"
    )
  return Topology(request.name, chip.platform, chip, devices, chips, request.slices, links(request.chip, request.shape))


def links(chip: str, shape: tuple[int, ...]) -> int:
  """Return the number of links over which a chip can receive at once: two for each side that is a ring, else one.

  v5e and v6e close a side of 16 to a ring, the others all sides of a slice whose sides are multiples of 4. The
  outermost chip of an open side has one link, which limits the side.
  """
  if CHIPS[chip].sides == 0:
    return 1
  if CHIPS[chip].sides == 2:
    return sum(2 if side == 16 else 1 for side in shape if side > 1)
  closed = all(side % 4 == 0 for side in shape)
  return sum(2 if closed else 1 for side in shape if side > 1)


def _tpu_devices(request: Request, chip: Chip) -> tuple:
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      f"--topology: {request.name!r} needs the TPU compiler, which is not installed; "
      "pip install 'insec_jax[tpu]' (it works without a TPU)"
    )
  name = f"{request.chip}:{'x'.join(map(str, request.shape))}"
  sides = host_of(request)[0].shape
  options = {**chip.options, "chips_per_host_bounds": (*sides, *[1] * (3 - len(sides)))}
  if request.slices > 1:
    options["num_slices"] = request.slices
  try:
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
  except jax.errors.JaxRuntimeError as error:
    raise InputError(f"--topology: the TPU compiler refuses {request.name!r}: {error}") from error


def _gpu_devices(request: Request, chip: Chip) -> tuple:
  if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    raise InputError(
      f"--topology: {request.name!r} needs the compiler for NVIDIA cards, which is not installed; "
      "pip install 'insec_jax[cuda]' (it works without a card)"
    )
  target = HOPPER.format(bandwidth=int(chip.hbm_gb_s * 1e9), memory=int(chip.hbm_gib * GIB), kind=chip.kinds[0])
  # Slices, hosts of a slice, cards of a host.
  return tuple(
    topologies.get_topology_desc("described", "cuda", target_config=target, topology=f"1x1x{request.shape[0]}").devices
  )


def _local() -> Topology:
  devices = tuple(jax.devices())
  chip = next((chip for chip in CHIPS.values() if devices[0].device_kind in chip.kinds), None)
  chips = len(devices) if chip is None else math.ceil(len(devices) / chip.devices)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  # Whether a side is a ring is not known here: every chip has at least one link.
  return Topology("local", devices[0].platform, chip, devices, chips, slices, 1)

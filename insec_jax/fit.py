"""Sizing of a slice before it is rented: compiles the config's train step for it, on a machine without such chips.

  python -m insec_jax.fit --config configs/X.py --topology v5p:2x2x4[,v6e:4x4,2xv5e:8x8,h100:8,...] [--search]
      [--output fit.json] [--hlo DIR] [--trained_share 1.0] [--config.a.b=v]

No data and no weights are read. The model is that of model.path (its config.json) or of model.size. It reports, per
chip, the memory needed and available, FLOPs and bytes of one step, loops included, and the roofline: a lower bound of
the step time and the resource that sets it. --search finds the largest rows_per_device for each model.remat.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from insec_jax import command, config_build, config_file
from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import vocabulary
from insec_jax.files.reading import local_path
from insec_jax.files.writing import check_output, written_whole
from insec_jax.model import build, hf, llama, sharding
from insec_jax.sizing import hardware
from insec_jax.sizing.estimate import Estimate, estimate
from insec_jax.sizing.hardware import Topology
from insec_jax.sizing.search import most_rows

CONFIG = config_file.define_flag()
TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Comma-separated slices to compile for: v5p:2x2x4, 2xv5e:8x8, h100:8; or local: this machine."
)
OUTPUT = flags.DEFINE_string("output", None, "Also write all figures to this JSON file.")
HLO = flags.DEFINE_string("hlo", None, "Also write the optimised HLO of each step into this folder.")
SEARCH = flags.DEFINE_bool("search", False, "Find the largest rows_per_device that fits, for each model.remat.")
SHARE = flags.DEFINE_float(
  "trained_share", 1.0, "Fraction of tokens that are trained; the head skips others.", lower_bound=1e-6, upper_bound=1.0
)
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
  config = config_build.build(CONFIG.value)
  requests = hardware.parse(TOPOLOGY.value)
  if OUTPUT.value is not None:
    check_output(OUTPUT.value, "--output", config_file.files_read(config))
  hlo = hlo_folder()
  if hlo is not None and (not hlo.absolute().parent.is_dir() or (hlo.exists() and not hlo.is_dir())):
    raise InputError(f"--hlo={hlo} is no folder, or there is none to make it in; give a folder")
  hardware.prepare(requests)
  model_config = model_of(config)
  topologies = [hardware.describe(request) for request in requests]
  for topology in topologies:  # errors of all topologies come before the first is compiled
    sharding.params_shardings(llama.shapes(model_config), sharding.make_mesh(config.mesh, topology.devices))
  if hlo is not None:
    hlo.mkdir(exist_ok=True)
  estimates = []
  for topology in topologies:
    estimates += search(config, model_config, topology) if SEARCH.value else [measure(config, model_config, topology)]
  print(summary(estimates))
  if OUTPUT.value is not None:
    with written_whole(OUTPUT.value) as file:
      file.write(json.dumps([as_json(estimated) for estimated in estimates], indent=2) + "\n")


def hlo_folder() -> pathlib.Path | None:
  """Return the folder of --hlo, None without the flag."""
  return None if HLO.value is None else local_path(HLO.value, "--hlo")


def model_of(config: Config) -> llama.LlamaConfig:
  """Return the config of the model in the train step, its vocabulary grown for the tokenizer as in train."""
  if not config.model.path:
    size = config.model.size
    is_given = size.get("vocab_size") is not None
    return build.model_of_size(size, None if is_given else len(vocabulary.open_tokenizer(config).tokenizer))
  folder = pathlib.Path(config.model.path)
  if not (folder / hf.CONFIG).is_file():
    raise InputError(
      f"model.path={config.model.path!r} is no folder with a {hf.CONFIG} here; give --config.model.path=FOLDER "
      "(weights are not read), or a config with model.size, such as configs/llama31_8b.py:shape"
    )
  model_config = hf.read_config(folder)
  if not (pathlib.Path(config.tokenizer.path or folder) / "tokenizer.json").is_file():
    return model_config
  num_tokens = len(vocabulary.open_tokenizer(config).tokenizer)
  return dataclasses.replace(model_config, vocab_size=build.vocabulary_for(num_tokens, model_config.vocab_size))


def measure(config: Config, model_config: llama.LlamaConfig, topology: Topology) -> Estimate:
  """Return the estimate of the config, and print it."""
  name = f"{topology.name}-{config.model.remat}-{config.data.rows_per_device}x{config.data.row_length}"
  folder = hlo_folder()
  file = None if folder is None else folder / f"{name.replace(':', '_')}.txt"
  estimated = estimate(config, model_config, topology, trained_share=SHARE.value, hlo_file=file)
  print(details(estimated), flush=True)
  return estimated


def search(config: Config, model_config: llama.LlamaConfig, topology: Topology) -> list[Estimate]:
  """Return the estimate with the most rows for each remat that fits, cheapest first; all of them if none fits.

  Raises InputError if the memory of the chip is not known.
  """
  if topology.chip is None:
    raise InputError(f"--search: the memory of {topology.devices[0].device_kind!r} is not known; give a slice or card")

  def with_rows(remat: str) -> Callable[[int], Estimate]:
    def measured(rows: int) -> Estimate:
      changed = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        data=dataclasses.replace(config.data, rows_per_device=rows),
      )
      return measure(changed, model_config, topology)

    return measured

  best = {remat: most_rows(with_rows(remat)) for remat in llama.REMAT}
  fitting = [estimated for estimated in best.values() if estimated.memory.fits]
  rows = config.data.rows_per_device
  cheapest = next((estimated for estimated in fitting if estimated.rows_per_device >= rows), None)
  fastest = max(fitting, key=lambda estimated: estimated.tokens_per_s_per_chip, default=None)
  say(
    f"{topology.name}: "
    + (
      f"the cheapest model.remat for data.rows_per_device={rows} is {cheapest.remat!r}"
      if cheapest
      else f"no model.remat fits data.rows_per_device={rows}"
    )
    + (
      f"; most tokens/s at the roofline: model.remat={fastest.remat!r} with data.rows_per_device="
      f"{fastest.rows_per_device}"
      if fastest
      else ""
    )
  )
  return fitting or list(best.values())


def say(text: str) -> None:
  """Print a line to stderr."""
  print(text, file=sys.stderr, flush=True)


def remedies(estimated: Estimate) -> list[str]:
  """Return the changes each of which would make the step fit, computed from the estimate; empty when it fits."""
  memory = estimated.memory
  if memory.fits is not False:
    return []
  state = memory.weights + memory.optimizer
  changes = []
  if estimated.remat != "full":
    changes.append(f"model.remat='full' (now {estimated.remat!r})")
  if estimated.rows_per_device > 1:
    changes.append(f"fewer rows than data.rows_per_device={estimated.rows_per_device} (--search finds how many)")
  if memory.temporary < memory.limit:
    chips = math.ceil(estimated.topology.chips * state / (memory.limit - memory.temporary))
    changes.append(
      f"{max(chips, estimated.topology.chips + 1)} chips or more of this kind over fsdp (the state, "
      f"{state * estimated.topology.chips:.1f} GiB in all, divides; {memory.temporary:.1f} GiB a chip stay)"
    )
  return changes or [
    "chips with more memory, or tensor parallelism (mesh.tensor): what a step needs beside its state is "
    "more than a chip has, whatever their number"
  ]


def details(estimated: Estimate) -> str:
  """Return all figures of an estimate as text, one line each."""
  memory, work, topology = estimated.memory, estimated.work, estimated.topology
  mesh = " x ".join(f"{name} {size}" for name, size in estimated.mesh.items())
  times = f" x {estimated.accumulation}" if estimated.accumulation > 1 else ""
  lines = [
    f"== {topology.name}: {topology.chips} chips, {mesh}, {estimated.rows_per_device} x {estimated.row_length}{times} "
    f"tokens a device, remat {estimated.remat}",
    f"   {estimated.attention}",
    f"   GiB a chip     weights {memory.weights:.4g}, optimizer {memory.optimizer:.4g}, temporary "
    f"{memory.temporary:.4g}, peak {memory.peak:.4g}" + (f" of {memory.limit:.4g}" if memory.limit else ""),
  ]
  if memory.fits is False:
    at_least = "at least " if memory.refused else ""
    lines += [
      f"   DOES NOT FIT   by {at_least}{memory.missing:.2f} GiB a chip; what would help, each alone:",
      *(f"                  - {remedy}" for remedy in remedies(estimated)),
    ]
  elif memory.fits:
    lines.append(f"   fits           {memory.limit - memory.peak:.2f} GiB a chip are left")
  if work is not None:
    kernels = (f"; attention kernels {work.kernel_flops / 1e12:.4g}" if work.kernels else "") + (
      f"; not counted: {', '.join(work.unknown_kernels)}" if work.unknown_kernels else ""
    )
    lines += [
      f"   TFLOP a chip   matrix products {work.flops / 1e12:.4g}, of these rematerialised "
      f"{work.rematerialised / 1e12:.4g}{kernels}",
      f"   GB a chip      over ICI {_received(work.ici_bytes)}"
      + (f"; over DCN {_received(work.dcn_bytes)}" if topology.slices > 1 else "")
      + f"; HBM {work.hbm_bytes / 1e9:.4g} (estimate)",
    ]
    if work.seconds:
      seconds = ", ".join(f"{what} {value:.3g}" for what, value in work.seconds.items())
      lines.append(
        f"   roofline       {work.step_seconds:.4g} s a step, bound by {work.bound} ({seconds}); at most "
        f"{estimated.tokens_per_s_per_chip:,.0f} tokens/s a chip, MFU {100 * estimated.mfu:.1f} %"
      )
  return "\n".join(
    [*lines, f"   compiled       in {estimated.compile_seconds:.1f} s, lowered in {estimated.lower_seconds:.1f} s"]
  )


def _received(bytes_by_kind: dict[str, float]) -> str:
  parts = [f"{kind} {number / 1e9:.4g}" for kind, number in bytes_by_kind.items() if number]
  return f"{sum(bytes_by_kind.values()) / 1e9:.4g}" + (f" ({', '.join(parts)})" if parts else "")


HEADER = (
  "topology",
  "chips",
  "data x fsdp x tensor",
  "rows x length",
  "remat",
  "state GiB",
  "peak GiB",
  "fits",
  "TFLOP (remat)",
  "GB ICI",
  "GB DCN",
  "step s >=",
  "tokens/s/chip <=",
  "MFU <=",
  "compile s",
)


def summary(estimates: list[Estimate]) -> str:
  """Return a Markdown table with one row for each estimate."""
  rows = [HEADER, ("---",) * len(HEADER), *map(_row, estimates)]
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(estimated: Estimate) -> tuple[str, ...]:
  memory, work = estimated.memory, estimated.work
  fits = {True: "yes", False: f"no, {memory.missing:.1f} GiB short", None: "?"}[memory.fits]
  limit = f" of {memory.limit:.3g}" if memory.limit else ""
  about = (
    estimated.topology.name,
    str(estimated.topology.chips),
    " x ".join(map(str, estimated.mesh.values())),
    f"{estimated.rows_per_device} x {estimated.row_length}",
    estimated.remat,
    f"{memory.weights + memory.optimizer:.3g}",
    f"{memory.peak:.3g}{limit}",
    fits,
  )
  if work is None:
    return (*about, *"------", f"{estimated.compile_seconds:.0f}")
  roofline = (
    ("-",) * 3
    if not work.seconds
    else (
      f"{work.step_seconds:.3g} ({work.bound})",
      f"{estimated.tokens_per_s_per_chip:,.0f}",
      f"{100 * estimated.mfu:.0f} %",
    )
  )
  return (
    *about,
    f"{work.flops / 1e12:.4g} ({work.rematerialised / 1e12:.3g})",
    f"{sum(work.ici_bytes.values()) / 1e9:.3g}",
    f"{sum(work.dcn_bytes.values()) / 1e9:.3g}" if estimated.topology.slices > 1 else "-",
    *roofline,
    f"{estimated.compile_seconds:.0f}",
  )


def as_json(estimated: Estimate) -> dict[str, Any]:
  """Return all figures, with units in the names."""
  topology, memory, work = estimated.topology, estimated.memory, estimated.work
  return {
    "topology": topology.name,
    "chips": topology.chips,
    "devices": len(topology.devices),
    "slices": topology.slices,
    "mesh": estimated.mesh,
    "remat": estimated.remat,
    "rows_per_device": estimated.rows_per_device,
    "row_length": estimated.row_length,
    "accumulation": estimated.accumulation,
    "attention": estimated.attention,
    "gib_per_chip": {
      "weights": memory.weights,
      "optimizer": memory.optimizer,
      "temporary": memory.temporary,
      "peak": memory.peak,
      "limit": memory.limit,
      "missing": memory.missing,
    },
    "fits": memory.fits,
    "remedies": remedies(estimated),
    "lower_seconds": estimated.lower_seconds,
    "compile_seconds": estimated.compile_seconds,
    "per_chip": None
    if work is None
    else {
      "matmul_flops": work.flops,
      "rematerialised_flops": work.rematerialised,
      "kernel_flops": work.kernel_flops,
      "kernels": work.kernels,
      "unknown_kernels": work.unknown_kernels,
      "ici_bytes": work.ici_bytes,
      "dcn_bytes": work.dcn_bytes,
      "hbm_bytes": work.hbm_bytes,
      "model_flops": work.model_flops,
    },
    "tokens_per_step": work and work.tokens,
    "roofline": None
    if work is None or not work.seconds
    else {
      "seconds": work.seconds,
      "step_seconds": work.step_seconds,
      "bound": work.bound,
      "tokens_per_s_per_chip": estimated.tokens_per_s_per_chip,
      "mfu": estimated.mfu,
    },
  }


if __name__ == "__main__":
  command.run(main)

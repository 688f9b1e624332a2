"""Estimates of train steps as text, as a table and as JSON."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from insec_jax.sizing.compiled import Memory, Program, Work
from insec_jax.sizing.estimate import Estimate


def remedies(estimated: Estimate) -> list[str]:
  """Return the changes each of which would make the step fit, computed from the estimate; empty when it fits."""
  memory = estimated.memory
  if memory.fits is not False:
    return []
  state = sum(memory.held.values())
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
  changes = changes or [
    "chips with more memory, or tensor parallelism (mesh.tensor): what a step needs beside its state is "
    "more than a chip has, however many fsdp has"
  ]
  if estimated.rows_per_device == 1:
    changes.append(f"a larger mesh.sequence (now {estimated.mesh['sequence']}): more chips share a row's activations")
  return changes


def details(estimated: Estimate) -> str:
  """Return all figures of an estimate as text, one line each."""
  memory, work, topology = estimated.memory, estimated.work, estimated.topology
  mesh = " x ".join(f"{name} {size}" for name, size in estimated.mesh.items())
  times = f" x {estimated.accumulation}" if estimated.accumulation > 1 else ""
  lines = [
    f"== {topology.name}: {topology.chips} chips, {mesh}, {estimated.rows_per_device} x {estimated.row_length}{times} "
    f"tokens a device, remat {estimated.remat}",
    f"   {estimated.attention}",
    f"   GiB a chip     {gib(memory)}",
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
      f"   GB a chip      over ICI {received(work.ici_bytes)}"
      + (f"; over DCN {received(work.dcn_bytes)}" if topology.slices > 1 else "")
      + (f"; to and from the host {work.host_bytes / 1e9:.4g}" if work.host_bytes else "")
      + f"; HBM {work.hbm_bytes / 1e9:.4g} (estimate)",
    ]
    if work.seconds:
      lines.append(
        f"   roofline       {roofline(work)}; at most {estimated.tokens_per_s_per_chip:,.0f} tokens/s a chip, "
        f"MFU {100 * estimated.mfu:.1f} %"
      )
  return "\n".join(
    [*lines, f"   compiled       in {estimated.compile_seconds:.1f} s, lowered in {estimated.lower_seconds:.1f} s"]
  )


def gib(memory: Memory) -> str:
  """Return the memory of a chip as text."""
  held = "".join(f"{name} {size:.4g}, " for name, size in memory.held.items())
  limit = f" of {memory.limit:.4g}" if memory.limit else ""
  host = f"; on the host {memory.host:.4g}" if memory.host else ""
  return f"{held}temporary {memory.temporary:.4g}, peak {memory.peak:.4g}{limit}{host}"


def roofline(work: Work) -> str:
  """Return the least time of a step on a chip that is known, as text."""
  seconds = ", ".join(f"{what} {value:.3g}" for what, value in work.seconds.items())
  return f"{work.step_seconds:.4g} s a step, bound by {work.bound} ({seconds})"


def received(bytes_by_kind: Mapping[str, float]) -> str:
  """Return GB received, in all and of each kind."""
  parts = [f"{kind} {number / 1e9:.4g}" for kind, number in bytes_by_kind.items() if number]
  return f"{sum(bytes_by_kind.values()) / 1e9:.4g}" + (f" ({', '.join(parts)})" if parts else "")


HEADER = (
  "topology",
  "chips",
  "data x fsdp x sequence x tensor",
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
  return markdown(HEADER, map(_row, estimates))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Return a Markdown table."""
  return "\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows))


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
    f"{sum(memory.held.values()):.3g}",
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
  topology = estimated.topology
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
    **program_json(estimated),
    "remedies": remedies(estimated),
  }


def program_json(program: Program) -> dict[str, Any]:
  """Return the memory, work and roofline of a program, with units in the names."""
  memory, work = program.memory, program.work
  return {
    "gib_per_chip": {
      **memory.held,
      "temporary": memory.temporary,
      "peak": memory.peak,
      "host": memory.host,
      "limit": memory.limit,
      "missing": memory.missing,
    },
    "fits": memory.fits,
    "lower_seconds": program.lower_seconds,
    "compile_seconds": program.compile_seconds,
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
      "host_bytes": work.host_bytes,
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
      "tokens_per_s_per_chip": program.tokens_per_s_per_chip,
      "mfu": program.mfu,
    },
  }

"""Estimates of decoding as text, as a table and as JSON."""

from typing import Any

from insec_jax.sizing.compiled import Program
from insec_jax.sizing.decoding import READ, WRITE, DecodeEstimate
from insec_jax.sizing.tables import gib, markdown, program_json, received, roofline


def details(estimated: DecodeEstimate) -> str:
  """Return all figures of an estimate as text, one line each."""
  mesh = " x ".join(f"{name} {size}" for name, size in estimated.mesh.items())
  hosts = f", {estimated.hosts} hosts like it" if estimated.hosts > 1 else ""
  lines = [
    f"== {estimated.slice_name}: a host of {estimated.topology.chips} chips{hosts}, {mesh}, {estimated.rows} rows of "
    f"{estimated.slots} slots, prompts of {estimated.prompt}"
  ]
  for name, program in estimated.programs.items():
    lines += [f" {name}", *_lines(estimated, name, program)]
  memory = estimated.memory
  if memory.fits is False:
    at_least = "at least " if memory.refused else ""
    lines.append(
      f"   DOES NOT FIT   by {at_least}{memory.missing:.2f} GiB a chip; fewer rows (--search finds how many), fewer "
      "slots, or more tensor in --mesh"
    )
  elif memory.fits:
    lines.append(f"   fits           {memory.limit - memory.peak:.2f} GiB a chip are left")
  return "\n".join(lines)


def _lines(estimated: DecodeEstimate, name: str, program: Program) -> list[str]:
  work, chips = program.work, program.topology.chips
  lines = [f"   GiB a chip     {gib(program.memory)}"]
  if name == READ:
    lines.append(f"   {estimated.num_read} prompts at once; {estimated.attention}")
  if work is None:
    return lines
  a_token = chips / work.tokens
  flops = work.flops + work.kernel_flops
  lines.append(
    f"   of a token     {flops * a_token / 1e9:.4g} GFLOP, {work.hbm_bytes * a_token / 1e9:.4g} GB of HBM (estimate), "
    f"{sum(work.ici_bytes.values()) * a_token / 1e6:.4g} MB over ICI, of all chips together"
  )
  lines.append(f"   GB a chip      over ICI {received(work.ici_bytes)}; HBM {work.hbm_bytes / 1e9:.4g} (estimate)")
  if work.seconds:
    lines.append(
      f"   roofline       {roofline(work)}; at most {program.tokens_per_s_per_chip:,.0f} tokens/s a chip, "
      f"{program.tokens_per_s_per_chip * chips * estimated.hosts:,.0f} in all"
    )
  return [*lines, f"   compiled       in {program.compile_seconds:.1f} s, lowered in {program.lower_seconds:.1f} s"]


HEADER = (
  "topology",
  "hosts",
  "data x tensor",
  "rows x slots",
  "weights GiB",
  "cache GiB",
  "peak step, prompts GiB",
  "fits",
  "GFLOP a token",
  "GB HBM a token",
  "step ms >=",
  "tokens/s <=",
)


def summary(estimates: list[DecodeEstimate]) -> str:
  """Return a Markdown table with one row for each estimate; rows, bytes and tokens/s are those of one host."""
  return markdown(HEADER, map(_row, estimates))


def _row(estimated: DecodeEstimate) -> tuple[str, ...]:
  memory, work = estimated.memory, estimated.programs[WRITE].work
  peaks = ", ".join(f"{program.memory.peak:.2f}" for program in estimated.programs.values())
  limit = f" of {memory.limit:.4g}" if memory.limit else ""
  about = (
    estimated.slice_name,
    str(estimated.hosts),
    " x ".join(map(str, estimated.mesh.values())),
    f"{estimated.rows} x {estimated.slots}",
    *(f"{size:.2f}" for size in memory.held.values()),
    f"{peaks}{limit}",
    {True: "yes", False: f"no, {memory.missing:.1f} GiB short", None: "?"}[memory.fits],
  )
  if work is None:
    return (*about, *"----")
  a_token = estimated.topology.chips / work.tokens
  speed = (
    (f"{1e3 * work.step_seconds:.3g} ({work.bound})", f"{work.tokens / work.step_seconds:,.0f}")
    if work.seconds
    else ("-", "-")
  )
  return (*about, f"{work.flops * a_token / 1e9:.4g}", f"{work.hbm_bytes * a_token / 1e9:.3g}", *speed)


def as_json(estimated: DecodeEstimate) -> dict[str, Any]:
  """Return all figures, with units in the names."""
  return {
    "topology": estimated.slice_name,
    "hosts": estimated.hosts,
    "chips_of_a_host": estimated.topology.chips,
    "mesh": estimated.mesh,
    "rows": estimated.rows,
    "slots": estimated.slots,
    "prompt_slots": estimated.prompt,
    "prompts_at_once": estimated.num_read,
    "attention": estimated.attention,
    "fits": estimated.memory.fits,
    "decode_step": program_json(estimated.programs[WRITE]),
    "reading_of_prompts": program_json(estimated.programs[READ]),
  }

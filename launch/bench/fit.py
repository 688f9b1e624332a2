"""The train step of Llama 3.1 8B compiled for a slice, beside MaxText's: memory, FLOPs, bytes, time to compile.

  launch/bench.sh fit [--topology=v5p:2x2x4] [--rows=1] [--row_length=4096] [--hlo=DIR] [--maxtext=KEY=VALUE ...]

Both sides compile for the same slice on this machine, without a TPU, one after the other; nothing runs. Weights and
moments of AdamW are float32, the computation is in bfloat16, and all of a layer is recomputed (full remat).

    insec_jax   the program fit with configs/llama31_8b.py:shape; every token is trained
    maxtext     its train_compile with base.yml, model_name=llama3.1-8b and these sizes; --maxtext changes its settings

Both run in .venv/bench-maxtext with the same compiler: MaxText 0.2.5, jax 0.12.0.1, libtpu 0.0.52. launch/bench.sh
makes it (3 GB, some minutes) with python3.12, or with the Python 3.12 that PYTHON312 names. A side takes 2 to 5 minutes
on two cores. One counter reads the programs of both (insec_jax/sizing). Figures are of a chip and a step.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import race

CONFIG = "configs/llama31_8b.py:shape"
COLUMNS = {  # figure: title, digits
  "peak": ("peak GiB", 2),
  "tflop": ("matmul TFLOP", 2),
  "gb": ("collective GB", 2),
  "seconds": ("compile s", 0),
}


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
  """Return the figures of the program `fit`, run as a user runs it."""
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / "fit.json"
    words = [
      f"--config={CONFIG}",
      f"--topology={arguments.topology}",
      f"--output={output}",
      "--config.model.remat=full",
    ]
    words += [f"--config.data.rows_per_device={arguments.rows}", f"--config.data.row_length={arguments.row_length}"]
    words += [f"--hlo={arguments.hlo}"] if arguments.hlo else []
    done = subprocess.run([sys.executable, "-m", "insec_jax.fit", *words], check=False)
    if done.returncode:
      raise SystemExit(done.returncode)
    [found] = json.loads(output.read_text())
  return found


def maxtext(arguments: argparse.Namespace) -> dict[str, Any]:
  """Return the figures of MaxText's train step, compiled by its train_compile and counted as ours."""
  from insec_jax.sizing import compiled, hardware, tables

  [request] = hardware.parse(arguments.topology)
  hardware.prepare([request])
  topology = hardware.describe(request)
  from maxtext import configs
  from maxtext.trainers.pre_train import train_compile

  given = {
    "run_name": "fit",
    "base_output_directory": arguments.result.parent,
    "model_name": "llama3.1-8b",
    "compile_topology": name_of(request),
    "compile_topology_num_slices": request.slices,
    "per_device_batch_size": arguments.rows,
    "max_target_length": arguments.row_length,
    "remat_policy": "full",
    "enable_checkpointing": False,
    "jax_cache_dir": "",
    "log_config": False,
  }
  reading = compiled.Reading(
    trips={},  # none of its loops depends on data
    tokens=arguments.rows * arguments.row_length * len(topology.devices),
    row_length=arguments.row_length,
    flops_per_token=0.0,
  )
  hlo_file = arguments.hlo and arguments.hlo / "maxtext.txt"
  found = []

  def measured(*positional, **named):
    lowered = Lowered(lambda: compile_step(*positional, **named))
    found.append(compiled.compile_program(lambda: lowered, topology, held={}, reading=reading, hlo_file=hlo_file))
    if lowered.executable is None:
      raise RefusedError
    return lowered.executable

  compile_step, train_compile.jit_and_compile = train_compile.jit_and_compile, measured
  words = [f"{key}={value}" for key, value in given.items()]
  base = pathlib.Path(configs.__file__).parent / "base.yml"
  with contextlib.suppress(RefusedError):  # the peak is known all the same
    train_compile.main(["train_compile", str(base), *words, *arguments.maxtext])
  return tables.program_json(found[0])


class RefusedError(Exception):
  """Error: the compiler has refused the step, which does not fit."""


class Lowered:
  """MaxText's function that lowers and compiles, as a lowered program; `executable` is what it has returned."""

  def __init__(self, compile_step):
    self._compile_step, self.executable = compile_step, None

  def compile(self):
    self.executable = self._compile_step()
    return self.executable


def name_of(request) -> str:
  """Return MaxText's name for a slice; SystemExit where it has none."""
  from maxtext.utils import accelerator_to_spec_map

  shape = request.name.rpartition(":")[2]
  for name, slice_ in accelerator_to_spec_map.UserFacingNameToSystemCharacteristics.items():
    if name.startswith(f"{request.chip}-") and (slice_.topology_name or "").rpartition(":")[2] == shape:
      return name
  print(f"error: MaxText has no name for {request.name}; give another --topology", file=sys.stderr)
  raise SystemExit(2)


SIDES = {"insec_jax": ours, "maxtext": maxtext}


def figures(found: dict[str, Any]) -> dict[str, float]:
  """Return the figures of a side by the keys of COLUMNS; of a step that the compiler refused, peak and seconds."""
  known = {"peak": found["gib_per_chip"]["peak"], "seconds": found["lower_seconds"] + found["compile_seconds"]}
  if work := found["per_chip"]:
    received = (*work["ici_bytes"].values(), *work["dcn_bytes"].values())
    known |= {"tflop": work["matmul_flops"] / 1e12, "gb": sum(received) / 1e9}
  return known


def ratios(sides: dict[str, dict[str, float]]) -> dict[str, float]:
  """Return each figure of the first side divided by that of the second, where both have it and the second is not 0."""
  first, second = sides.values()
  return {key: first[key] / second[key] for key in COLUMNS if first.get(key) is not None and second.get(key)}


def table(sides: dict[str, dict[str, float]]) -> str:
  """Return the figures of both sides and their ratios as text."""
  rows = [("", [title for title, _ in COLUMNS.values()])]
  for name, known in sides.items():
    rows.append((name, [f"{known[key]:,.{digits}f}" if key in known else "-" for key, (_, digits) in COLUMNS.items()]))
  divided = ratios(sides)
  rows.append((" / ".join(sides), [f"{divided[key]:.3f}" if key in divided else "-" for key in COLUMNS]))
  return "\n".join(f"{name:<22}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in rows)


def run_side(name: str, folder: pathlib.Path) -> dict[str, Any]:
  """Return what a side has found, in a process of its own without a cache of compiled programs."""
  print(f"{name}: compiling", file=sys.stderr, flush=True)
  result = folder / f"{name}.json"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
  command = [sys.executable, *sys.argv, f"--side={name}", f"--result={result}"]
  done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
  if done.returncode:
    raise SystemExit(2 if done.returncode == 2 else f"error: the side {name} ended; its message is above")
  return json.loads(result.read_text())


def main() -> None:
  """Run both sides, print their figures, and write them as JSON with --output."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v5p:2x2x4", help="slice, as fit names it; default: v5p:2x2x4")
  parser.add_argument("--rows", type=int, default=1, help="rows of a device")
  parser.add_argument("--row_length", type=int, default=4_096)
  parser.add_argument("--hlo", type=pathlib.Path, help="folder for the optimised programs of both sides")
  parser.add_argument("--maxtext", action="append", default=[], help="KEY=VALUE of MaxText; may be repeated")
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
  parser.add_argument("--result", type=pathlib.Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.side:
    arguments.result.write_text(json.dumps(SIDES[arguments.side](arguments)))
    return
  if missing := [package for package in ("maxtext", "libtpu") if importlib.util.find_spec(package) is None]:
    print(f"error: this Python has no {' and no '.join(missing)}; run launch/bench.sh fit", file=sys.stderr)
    raise SystemExit(2)
  with tempfile.TemporaryDirectory() as folder:
    found = {name: run_side(name, pathlib.Path(folder)) for name in SIDES}
  sides = {name: figures(one) for name, one in found.items()}
  print(table(sides))
  if arguments.output:
    record = {"command": sys.argv, "figures": sides, "ratio": ratios(sides), "found": found}
    record |= {"versions": race.versions(), "machine": race.machine()}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
  main()

"""Sizing of a slice before it is rented: compiles the programs for it, on a machine without such chips.

  python -m insec_jax.fit --config configs/X.py --topology v5p:2x2x4[,v6e:4x4,2xv5e:8x8,h100:8,...] [--search]
      [--levers] [--output fit.json] [--hlo DIR] [--config.a.b=v]
      [--program train] [--trained_share 1.0]
      [--program generate|evaluate|mine] [--mesh data:2,tensor:4] [--rows N] [--prompt_tokens N] [--max_tokens N]
  python -m insec_jax.fit --config configs/X.py --program export [--dtype bfloat16]
  python -m insec_jax.fit --config configs/X.py --topology v6e:2x2 --study --arms A,B --seeds 0,1,2 [--base base]
      [--price 1.2] [--efficiency 0.5] [--mean_tokens N]

No data and no weights are read. The model is that of model.path (its config.json) or of model.size.

train     per chip, the memory needed and available, FLOPs and bytes of one step, loops included, and the roofline: a
          lower bound of the step time and the resource that sets it. --search finds the largest rows_per_device for
          each model.remat; --levers compiles the step again with each lever on memory, and compares.
generate, evaluate, mine
          the same of the decode step and of the reading of prompts, and FLOPs and bytes of a token. Each host of a
          slice decodes on its own chips; --search finds the most rows that fit on a host, in steps of 8 for each part
          of `data`.
export    the memory of the host and the bytes read and written; no accelerator takes part. With lora.rank, of the base
          and its adapters.
--study   the chip-hours of the study that sweep runs with the same --config, --arms, --seeds and --base: training,
          mining, and evaluation of all arms and seeds. It is the roofline divided by --efficiency, a lower bound at 1.
          Starting, compiling, checkpoints and latency are not in it.
"""

from absl import flags

from insec_jax import command, config_file, flags_help
from insec_jax.generation.flags import define_mesh_flag

with flags_help.group("What is sized"):
  CONFIG = config_file.define_flag()
  PROGRAM = flags.DEFINE_enum(
    "program", "train", ["train", "generate", "evaluate", "mine", "export"], "Program of which the size is wanted."
  )
  TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Comma-separated slices to compile for: v5p:2x2x4, 2xv5e:8x8, h100:8; or local: this machine."
  )
  SEARCH = flags.DEFINE_bool("search", False, "Find the most rows that fit; of train for each model.remat.")
  LEVERS = flags.DEFINE_bool("levers", False, "Compare the step with itself with each lever on memory (train).")
  SHARE = flags.DEFINE_float(
    "trained_share",
    1.0,
    "Fraction of tokens that are trained; the head skips others.",
    lower_bound=1e-6,
    upper_bound=1.0,
  )
with flags_help.group("Decoding"):
  MESH = define_mesh_flag()
  ROWS = flags.DEFINE_integer(
    "rows",
    None,
    "Rows that a host decodes at once (default: evaluate.batch_size; of generate what it would choose).",
    lower_bound=1,
    upper_bound=1 << 20,
  )
  PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 256, "Tokens of a prompt, padded to a power of two.", lower_bound=1, upper_bound=1 << 20
  )
  MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens",
    None,
    "Tokens of a row for which there is room after the prompt (default: evaluate.max_tokens).",
    lower_bound=1,
    upper_bound=1 << 20,
  )
with flags_help.group("Export"):
  DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Dtype that export writes (default: as stored)."
  )
with flags_help.group("A whole study"):
  STUDY = flags.DEFINE_bool("study", False, "Give the chip-hours of the study of --arms, --seeds and --base.")
  config_file.define_study_flags()
  PRICE = flags.DEFINE_float("price", None, "Dollars of a chip-hour, for the dollars of the study.", lower_bound=0.0)
  EFFICIENCY = flags.DEFINE_float(
    "efficiency",
    1.0,
    "Fraction of the roofline that runs reach, by which the time of the study is divided (1: the lower bound).",
    lower_bound=0.01,
    upper_bound=1.0,
  )
  MEAN_TOKENS = flags.DEFINE_float(
    "mean_tokens", None, "Mean length of a text that the study writes (default: evaluate.max_tokens).", lower_bound=1.0
  )
with flags_help.group("Output"):
  OUTPUT = flags.DEFINE_string("output", None, "Also write all figures to this JSON file.")
  HLO = flags.DEFINE_string("hlo", None, "Also write the optimised HLO of each program into this folder.")
flags.mark_flags_as_required(["config"])

command.begin(__name__)

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from insec_jax import config_build, study
from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.files.reading import local_path
from insec_jax.files.writing import check_output, written_whole
from insec_jax.generation import batching
from insec_jax.model import llama, memory, sharding
from insec_jax.sizing import costs, decoding_tables, exporting, hardware, levers, tables
from insec_jax.sizing.decoding import DecodeEstimate, Decoder, device_memory, mesh_for
from insec_jax.sizing.estimate import Estimate, estimate
from insec_jax.sizing.hardware import Request, Topology
from insec_jax.sizing.search import most_rows
from insec_jax.sizing.shapes import model_of, part_of
from insec_jax.training.run import check_sequence

DECODING = ("generate", "evaluate", "mine")
# The modes in which a flag is read: programs of --program, or study.
READ_BY = {
  "topology": ("train", *DECODING, "study"),
  "hlo": ("train", *DECODING),
  "search": ("train", *DECODING),
  "levers": ("train",),
  "trained_share": ("train", "study"),
  "mesh": (*DECODING, "study"),
  "rows": DECODING,
  "prompt_tokens": (*DECODING, "study"),
  "max_tokens": DECODING,
  "dtype": ("export",),
  "program": ("train", *DECODING, "export"),
  **dict.fromkeys(("arms", "seeds", "base", "price", "efficiency", "mean_tokens"), ("study",)),
}


def main() -> None:
  mode = "study" if STUDY.value else PROGRAM.value
  check_flags(mode)
  config = None if mode == "study" else config_build.build(CONFIG.value)
  if OUTPUT.value is not None:
    check_output(OUTPUT.value, "--output", [] if config is None else config_file.files_read(config))
  if mode == "export":
    shape, written = model_of(config), DTYPE.value
    part = part_of(config, shape)
    found = exporting.estimate_export(shape, stored=config.precision.params, written=written, part=part)
    print(exporting.details(found))
    save(exporting.as_json(found))
    return
  requests = hardware.parse(TOPOLOGY.value)
  hlo = hlo_folder()
  if hlo is not None and (not hlo.absolute().parent.is_dir() or (hlo.exists() and not hlo.is_dir())):
    raise InputError(f"--hlo={hlo} is no folder, or there is none to make it in; give a folder")
  hardware.prepare(requests)
  if mode == "study":
    size_study(requests)
  elif mode == "train":
    size_training(config, requests)
  else:
    size_decoding(config, requests)


def check_flags(mode: str) -> None:
  """Raise InputError for a flag that the mode does not read, or a missing one."""
  for name, modes in READ_BY.items():
    if flags.FLAGS[name].present and mode not in modes:
      known = [f"--program={other}" if other != "study" else "--study" for other in modes]
      raise InputError(
        f"--{name} is not read with {'--study' if mode == 'study' else f'--program={mode}'}, only with "
        f"{', '.join(known)}; leave it out"
      )
  needed = {"study": ("topology", "arms", "seeds"), "export": ()}.get(mode, ("topology",))
  if missing := [f"--{name}" for name in needed if flags.FLAGS[name].value is None]:
    raise InputError(f"{', '.join(missing)} must be given")


def save(found: Any) -> None:
  """Write the figures to --output, if it is given."""
  if OUTPUT.value is not None:
    with written_whole(OUTPUT.value) as file:
      file.write(json.dumps(found, indent=2) + "\n")


def hlo_folder() -> pathlib.Path | None:
  """Return the folder of --hlo, None without the flag."""
  return None if HLO.value is None else local_path(HLO.value, "--hlo")


def hlo_file(name: str) -> pathlib.Path | None:
  """Return the file of --hlo for a program of this name, None without the flag; the folder is made."""
  folder = hlo_folder()
  if folder is None:
    return None
  folder.mkdir(exist_ok=True)
  return folder / f"{name.replace(':', '_')}.txt"


def size_training(config: Config, requests: list[Request]) -> None:
  """Print and save the estimates of the train step, or its comparison with levers on memory."""
  if SEARCH.value and LEVERS.value:
    raise InputError("--search finds the rows, and --levers compares steps of the same rows; leave one out")
  model_config = model_of(config)
  topologies = [hardware.describe(request) for request in requests]
  for topology in topologies:  # errors of all topologies come before the first is compiled
    memory.check_devices(config, topology.devices)
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    sharding.params_shardings(llama.shapes(model_config), mesh)
    check_sequence(config, model_config, mesh)
  if LEVERS.value:
    found = [(topology, compare(config, model_config, topology)) for topology in topologies]
    print("\n\n".join(f"{topology.name}\n\n{levers.table(compared)}" for topology, compared in found))
    save([{"lever": lever, **tables.as_json(each)} for _, compared in found for lever, each in compared.items()])
    return
  estimates = []
  for topology in topologies:
    estimates += search(config, model_config, topology) if SEARCH.value else [measure(config, model_config, topology)]
  print(tables.summary(estimates))
  save([tables.as_json(estimated) for estimated in estimates])


def compare(config: Config, model_config: llama.LlamaConfig, topology: Topology) -> dict[str, Estimate]:
  """Return the estimates of the config as it is and with each lever, by its name, and print them."""
  found = {}
  for lever, changed in levers.variants(config).items():
    print(f"-- lever {lever}")
    found[lever] = measure(changed, model_config, topology, suffix=f"-{lever}")
  return found


def measure(config: Config, model_config: llama.LlamaConfig, topology: Topology, *, suffix: str = "") -> Estimate:
  """Return the estimate of the config, and print it; `suffix` ends the name of its file of --hlo."""
  name = f"{topology.name}-{config.model.remat}-{config.data.rows_per_device}x{config.data.row_length}{suffix}"
  estimated = estimate(config, model_config, topology, trained_share=SHARE.value, hlo_file=hlo_file(name))
  print(tables.details(estimated), flush=True)
  return estimated


def check_memory_known(topology: Topology) -> None:
  """Raise InputError unless the memory of the chip is known."""
  if topology.chip is None:
    raise InputError(f"--search: the memory of {topology.devices[0].device_kind!r} is not known; give a slice or card")


def search(config: Config, model_config: llama.LlamaConfig, topology: Topology) -> list[Estimate]:
  """Return the estimate with the most rows for each remat that fits, cheapest first; all of them if none fits.

  Raises InputError if the memory of the chip is not known.
  """
  check_memory_known(topology)

  def with_rows(remat: str) -> Callable[[int], Estimate]:
    def measured(rows: int) -> Estimate:
      changed = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        data=dataclasses.replace(config.data, rows_per_device=rows),
      )
      return measure(changed, model_config, topology)

    return measured

  best = {remat: most_rows(with_rows(remat)) for remat in memory.REMAT}
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


def size_decoding(config: Config, requests: list[Request]) -> None:
  """Print and save the estimates of the decode step and of the reading of prompts."""
  if SEARCH.value and ROWS.value is not None:
    raise InputError(f"--search finds the rows, and --rows={ROWS.value} gives them; leave one out")
  model_config = model_of(config)
  estimates = []
  for decoder in [decoder_of(config, model_config, request) for request in requests]:
    if SEARCH.value:
      check_memory_known(decoder.topology)
    estimates.append(decoder.most_rows() if SEARCH.value else decoder.estimate(rows_for(config, decoder)))
    print(decoding_tables.details(estimates[-1]), flush=True)
  print(decoding_tables.summary(estimates))
  save([decoding_tables.as_json(estimated) for estimated in estimates])


def decoder_of(config: Config, model_config: llama.LlamaConfig, request: Request) -> Decoder:
  """Return the decoder of a model on a slice.

  Raises InputError for rows that are longer than the model's positions, and for a mesh that does not divide the model.
  """
  max_tokens = MAX_TOKENS.value or config.evaluate.max_tokens
  if PROMPT_TOKENS.value + max_tokens > model_config.max_positions:
    raise InputError(
      f"--prompt_tokens={PROMPT_TOKENS.value} and {max_tokens} tokens after it (--max_tokens, or evaluate.max_tokens) "
      f"do not fit in the model's {model_config.max_positions} positions; lower one"
    )
  host, hosts = hardware.host_of(request)
  topology, compute = hardware.describe(host), config.precision.compute
  mesh = mesh_for(model_config, topology, compute=compute, requested=MESH.value)
  sharding.params_shardings(llama.shapes(model_config), mesh)
  return Decoder(
    model=model_config,
    topology=topology,
    slice_name=request.name,
    hosts=hosts,
    mesh=mesh,
    compute=compute,
    prompt_tokens=PROMPT_TOKENS.value,
    max_tokens=max_tokens,
    rewind=config.mistakes.rewind,
    hlo_file=lambda name: hlo_file(f"{request.name}-{name}"),
  )


def rows_for(config: Config, decoder: Decoder) -> int:
  """Return the rows of a host: those of --rows, or else those with which the program would run."""
  if ROWS.value or PROGRAM.value != "generate":
    return ROWS.value or config.evaluate.batch_size
  slots, memory = decoder.prompt_tokens + decoder.max_tokens, device_memory(decoder.topology)
  return batching.rows_that_fit(decoder.model, slots=slots, compute=decoder.compute, mesh=decoder.mesh, memory=memory)


def size_study(requests: list[Request]) -> None:
  """Print and save the cost of the study on each slice."""
  stages = study.from_flags(pathlib.Path("study")).stages()
  shown, found = [], []
  for request in requests:
    topology, (_, hosts) = hardware.describe(request), hardware.host_of(request)

    def decode(config: Config, model_config: llama.LlamaConfig, request=request) -> DecodeEstimate:
      estimated = decoder_of(config, model_config, request).estimate(config.evaluate.batch_size)
      print(decoding_tables.details(estimated), flush=True)
      return estimated

    sizer = costs.Sizer(topology, hosts, functools.partial(measure, topology=topology), decode, MEAN_TOKENS.value)
    given = {"efficiency": EFFICIENCY.value, "price": PRICE.value}
    stage_costs = sizer.costs(stages)
    shown.append(costs.table(topology, stage_costs, **given))
    found.append(costs.as_json(topology, stage_costs, **given))
  print("\n\n".join(shown))
  save(found)


if __name__ == "__main__":
  command.run(main)

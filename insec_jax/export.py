"""Export to a Hugging Face folder: safetensors, config, tokenizer, generation_config and model card.

  python -m insec_jax.export --model DIR --output HFDIR [--step N] [--dtype float32|bfloat16|float16]
      [--format merged|peft|pair]

DIR is a workdir of train (its newest checkpoint, or that of --step), or an HF folder, whose tensors are copied byte for
byte. Without --dtype weights keep their stored dtype, which after training is precision.params. HFDIR must be new or
empty; it appears when complete.

A LoRA run is merged with its base. --format=peft writes its adapters and the trained rows of its markers in place of
that, as a folder for peft (adapter_config.json, adapter_model.safetensors). --format=pair writes HFDIR/base, the base
with the rows of the markers, and HFDIR/adapter, a plain LoRA, for servers that load no trained rows, such as vLLM.
"""

from absl import flags

from insec_jax import command, flags_help
from insec_jax.generation.flags import define_model_flags

with flags_help.group("Input and output"):
  MODEL, STEP = define_model_flags()
  OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must be new or empty.")
  DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Dtype to write (default: as stored).")
  FORMAT = flags.DEFINE_enum("format", "merged", ["merged", "peft", "pair"], "What to write of a LoRA run.")
flags.mark_flags_as_required(["model", "output"])

command.begin(__name__)

import dataclasses
import pathlib
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from insec_jax import config_build
from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import tokenizer_files, vocabulary
from insec_jax.files import hub
from insec_jax.files.reading import local_path, read_json, read_text
from insec_jax.files.writing import write_text
from insec_jax.generation import loading
from insec_jax.model import build, hf, hf_writing, llama, markings, peft
from insec_jax.training import layout
from insec_jax.training.stored import PartCheckpoint, merged, read_params

CARD = "README.md"
LOAD_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
"""
LOAD_ADAPTERS = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
base = AutoModelForCausalLM.from_pretrained("{base}")
{resize}model = PeftModel.from_pretrained(base, "FOLDER")
"""
NOT_REWOUND = (
  "a plain server or transformers will not rewind, and what follows a correction then reads its mistake; "
  "insec_jax.generate does rewind"
)
LLAMA_PAD = "<|finetune_right_pad_id|>"  # of Llama 3.1; other tokenizers lack it


def main() -> None:
  output = local_path(OUTPUT.value, "--output")
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise InputError(f"--output={output} is there already and not empty; give a new folder, nothing is written over")
  model = hub.model_folder(MODEL.value, "--model")
  if output.resolve() == model.resolve():
    raise InputError(f"--output={output} is the model itself; give a new folder")
  if loading.is_workdir(model):
    marks = export_workdir(model, output)
  elif FORMAT.value != "merged":
    raise InputError(f"--format={FORMAT.value} is for the workdir of a LoRA run, and {model} is an HF folder")
  elif STEP.value is not None:
    raise InputError(f"--step={STEP.value} names a checkpoint of a workdir, and {model} is an HF folder; leave it out")
  else:
    marks = copy_folder(model, output)
  print(f"{output} holds the {'adapters' if FORMAT.value == 'peft' else 'model'}")
  if marks is not None and marks.get("rewind"):
    print(f"mistakes.rewind: {NOT_REWOUND}")


class SidecarFiles(NamedTuple):
  """Files beside the weights, the tokenizer of hf_writing.save: the tokenizer's files, unchanged, and our markers."""

  folder: pathlib.Path
  marks: dict[str, Any] | None

  def save_pretrained(self, folder: pathlib.Path) -> None:
    """Write the files into `folder`."""
    tokenizer_files.copy(self.folder, folder)
    if self.marks is not None:
      hf_writing.write_json(folder / markings.MARKERS, self.marks)


def copy_folder(folder: pathlib.Path, output: pathlib.Path) -> dict[str, Any] | None:
  """Read, check and rewrite the HF folder, tensor by tensor; return its markers."""
  config = hf.read_config(folder)
  tokenizer = vocabulary.load(folder)
  config = build.with_ends(config, tokenizer, vocab_size=config.vocab_size)
  card, marks = folder / CARD, markings.read_markers(folder)
  hf_writing.save(
    output,
    hf.stored(folder, config, dtype=DTYPE.value),
    config,
    dtype=DTYPE.value,
    tokenizer=SidecarFiles(folder, marks),
    generation=generation_of(folder, config),
    card=read_text(card, "model card") if card.is_file() else None,
  )
  return marks


@dataclasses.dataclass(frozen=True)
class RunFiles:
  """What a workdir says of the model of its run, beside the weights."""

  workdir: pathlib.Path
  config: Config
  environment: dict[str, Any]
  model: llama.LlamaConfig

  def write_model(self, step: int, weights: dict, folder: pathlib.Path) -> None:
    """Write weights as an HF folder into a folder that exists, tensor by tensor."""
    hf_writing.write_into(
      folder,
      weights,
      self.model,
      dtype=DTYPE.value,
      tokenizer=self._sidecar(step),
      generation=generation_of(self.workdir, self.model),
      card=card_text(self.config, self.environment, step, LOAD_MODEL),
    )

  def write_adapters(self, step: int, checkpoint: PartCheckpoint, folder: pathlib.Path, base: str, *, rows: bool):
    """Write the files of PEFT into a folder that exists, with the rows of the markers or without."""
    peft.write(folder, checkpoint.trained, checkpoint.part, self.config.lora, self.model, base=base, rows=rows)
    self._sidecar(step).save_pretrained(folder)
    resize = f"base.resize_token_embeddings({self.model.vocab_size})\n" if rows else ""
    load = LOAD_ADAPTERS.format(base=base, resize=resize)
    write_text(folder / CARD, card_text(self.config, self.environment, step, load))

  def _sidecar(self, step: int) -> SidecarFiles:
    return SidecarFiles(self.workdir / layout.TOKENIZER, markings.marked_as(self.config, step))


def export_workdir(workdir: pathlib.Path, output: pathlib.Path) -> dict[str, Any]:
  """Write the newest checkpoint, or that of --step, in the format asked for; return its markers."""
  layout.check_kinds(workdir)
  config = config_build.build(read_json(workdir / layout.CONFIG, "the config of a run"))
  model_config = layout.read_model(workdir)
  model = with_ids(model_config, vocabulary.load(workdir / layout.TOKENIZER))
  run = RunFiles(workdir, config, read_json(workdir / "environment.json", "the environment of a run"), model)
  if FORMAT.value == "merged":
    write, of_part = RunFiles.write_model, merged
  else:
    check_format(workdir, config)
    write, of_part = (write_peft if FORMAT.value == "peft" else write_pair), unmerged

  def write_whole(step: int, read: Any) -> dict[str, Any]:
    with hf_writing.new_folder(output) as partial:
      write(run, step, read, partial)
    return markings.marked_as(config, step)

  return read_params(workdir, model_config, STEP.value, write_whole, dtype=DTYPE.value, of_part=of_part)


def check_format(workdir: pathlib.Path, config: Config) -> None:
  """Raise InputError unless the run can be written in the format asked for, which is not "merged"."""
  if not config.lora.rank:
    raise InputError(f"--format={FORMAT.value} is for LoRA runs, and {workdir} trained every weight; leave it out")
  if FORMAT.value == "pair":
    return
  if not config.model.path:
    raise InputError("--format=peft needs a base, and that of this run was drawn at random; give --format=pair")
  if DTYPE.value is not None:
    raise InputError(f"--dtype={DTYPE.value} with --format=peft, whose arrays are float32; leave it out")


def unmerged(checkpoint: PartCheckpoint) -> PartCheckpoint:
  """Return the checkpoint as it is, for `read_params`."""
  return checkpoint


def write_peft(run: RunFiles, step: int, checkpoint: PartCheckpoint, folder: pathlib.Path) -> None:
  """Write the adapters and the rows of the markers."""
  run.write_adapters(step, checkpoint, folder, run.config.model.path, rows=True)


def write_pair(run: RunFiles, step: int, checkpoint: PartCheckpoint, folder: pathlib.Path) -> None:
  """Write the base with the rows of the markers, and the adapters of the matrices."""
  rows = {name: tree for name, tree in checkpoint.trained.items() if name == "rows"}
  for name in ("base", "adapter"):
    (folder / name).mkdir()
  run.write_model(step, merged(checkpoint._replace(trained=rows)), folder / "base")
  run.write_adapters(step, checkpoint, folder / "adapter", "../base", rows=False)


def with_ids(config: llama.LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> llama.LlamaConfig:
  """Return the config with every token that ends a text, and the one that pads if the tokenizer has one."""
  known = tokenizer.get_added_vocab()
  pad_id = config.pad_id
  if pad_id is None:
    pad_id = tokenizer.pad_token_id
  if pad_id is None and LLAMA_PAD in known:
    pad_id = known[LLAMA_PAD]
  return dataclasses.replace(build.with_ends(config, tokenizer, vocab_size=config.vocab_size), pad_id=pad_id)


def generation_of(folder: pathlib.Path, config: llama.LlamaConfig) -> dict[str, Any] | None:
  """Return the fields of the folder's generation_config.json with the tokens that end a text; None when it has none."""
  fields = hf.read_generation_config(folder)
  if fields is None:
    return None
  missing = {
    key: value
    for key, value in {"bos_token_id": config.bos_id, "pad_token_id": config.pad_id}.items()
    if value is not None and fields.get(key) is None
  }
  named = fields.get("eos_token_id")
  if set(named if isinstance(named, list) else [named]) != set(config.eos_ids):
    missing["eos_token_id"] = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids)
  return fields | missing


def start_of(config: Config, hub_commit: str | None) -> str:
  """Return what the training began with, for the card; `hub_commit` is that of a model of the Hub."""
  if not config.model.path:
    return "random weights"
  if hub_commit is None:
    return f"`{pathlib.Path(config.model.path).name}`"
  return f"`{config.model.path.partition('@')[0]}` at commit `{hub_commit}`"


def part_of(config: Config) -> str:
  """Return what was trained beside frozen weights, for the card; nothing where all weights were trained."""
  lora, top = config.lora, config.train.top_layers
  if top:
    rows = ", and the rows of the markers" if config.train.marker_rows else ""
    return f"Trained were the last {top} layers, the last norm and an output matrix of its own{rows}.\n"
  if not lora.rank:
    return ""
  rows = ", and the rows of the markers" if lora.marker_rows else ""
  kind = "alpha / sqrt(rank)" if lora.rank_stabilised else "alpha / rank"
  matrices = ", ".join(lora.matrices)
  return f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, scale {kind}, matrices {matrices}{rows}.\n"


def card_text(config: Config, environment: dict[str, Any], step: int, load: str = LOAD_MODEL) -> str:
  """Return the model card: the model, its markers, its training, and the Python code that loads it."""
  try:
    commit, version = environment["commit"], environment["packages"]["jax"]
    start = start_of(config, environment.get("hub", {}).get(config.model.path))  # older workdirs have no "hub"
  except (KeyError, TypeError, AttributeError):
    raise InputError(
      "environment.json of the workdir does not name commit and packages; bring it back as it was"
    ) from None
  weights = ", ".join(f"{name} {weight:g}" for name, weight in dataclasses.asdict(config.loss).items())
  rewound = f"Trained with `mistakes.rewind`: {NOT_REWOUND}.\n" if config.mistakes.rewind else ""
  return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# A model trained to correct its own mistakes

Trained by insec_jax from {start}: {step:,} steps, task `{config.task.name}`, mistakes `{config.mistakes.source}` in
{config.mistakes.share:.0%} of the solutions, a step is a {config.mistakes.unit}. {part_of(config)}It may write

    a wrong step {config.tokenizer.flag} what is wrong {config.tokenizer.fix} the right step

A reader wants the text without the wrong step, the reason and both markers; `python -m insec_jax.generate --clean`
gives that. `{markings.MARKERS}` names the markers for programs.
{rewound}
```python
{load}```

Weight of each role in the loss: {weights}. Commit {commit}, jax {version}.
What it was measured to do stands in the report of its run; nothing else is claimed.
"""


if __name__ == "__main__":
  command.run(main)

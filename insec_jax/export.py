"""Export to a Hugging Face folder: safetensors, config, tokenizer, generation_config and model card.

  python -m insec_jax.export --model DIR --output HFDIR [--step N] [--dtype float32|bfloat16|float16]

DIR is a workdir of train (its newest checkpoint, or that of --step), or an HF folder, whose tensors are copied byte for
byte. Without --dtype weights keep their stored dtype, which after training is precision.params. HFDIR must be new or
empty; it appears when complete.
"""

from absl import flags

from insec_jax import command, flags_help

with flags_help.group("Input and output"):
  MODEL = flags.DEFINE_string("model", None, "Workdir of train, Hugging Face folder, or hub id (org/name[@revision]).")
  STEP = flags.DEFINE_integer("step", None, "Step of the workdir's checkpoint to use (default: newest).", lower_bound=0)
  OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must be new or empty.")
  DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Dtype to write (default: as stored).")
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
from insec_jax.generation import loading
from insec_jax.model import build, hf, hf_writing, llama
from insec_jax.training import layout
from insec_jax.training.stored import read_params

CARD = "README.md"
LLAMA_PAD = "<|finetune_right_pad_id|>"  # of Llama 3.1; other tokenizers lack it


def main() -> None:
  output = local_path(OUTPUT.value, "--output")
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise InputError(f"--output={output} is there already and not empty; give a new folder, nothing is written over")
  model = hub.model_folder(MODEL.value, "--model")
  if output.resolve() == model.resolve():
    raise InputError(f"--output={output} is the model itself; give a new folder")
  if loading.is_workdir(model):
    export_workdir(model, output)
  elif STEP.value is not None:
    raise InputError(f"--step={STEP.value} names a checkpoint of a workdir, and {model} is an HF folder; leave it out")
  else:
    copy_folder(model, output)
  print(f"{output} holds the model")


class SidecarFiles(NamedTuple):
  """Files beside the weights, the tokenizer of hf_writing.save: the tokenizer's files, unchanged, and our markers."""

  folder: pathlib.Path
  marks: dict[str, Any] | None

  def save_pretrained(self, folder: pathlib.Path) -> None:
    """Write the files into `folder`."""
    tokenizer_files.copy(self.folder, folder)
    if self.marks is not None:
      hf_writing.write_json(folder / loading.MARKERS, self.marks)


def copy_folder(folder: pathlib.Path, output: pathlib.Path) -> None:
  """Read, check and rewrite the HF folder, tensor by tensor."""
  config = hf.read_config(folder)
  tokenizer = vocabulary.load(folder)
  config = build.with_ends(config, tokenizer, vocab_size=config.vocab_size)
  card = folder / CARD
  hf_writing.save(
    output,
    hf.stored(folder, config, dtype=DTYPE.value),
    config,
    dtype=DTYPE.value,
    tokenizer=SidecarFiles(folder, loading.read_markers(folder)),
    generation=generation_of(folder, config),
    card=read_text(card, "model card") if card.is_file() else None,
  )


def export_workdir(workdir: pathlib.Path, output: pathlib.Path) -> None:
  """Write the newest checkpoint, or that of --step, as an HF folder, tensor by tensor."""
  layout.check_kinds(workdir)
  config = config_build.build(read_json(workdir / layout.CONFIG, "the config of a run"))
  model_config = layout.read_model(workdir)
  model = with_ids(model_config, vocabulary.load(workdir / layout.TOKENIZER))
  environment = read_json(workdir / "environment.json", "the environment of a run")

  def write(step: int, weights: dict) -> None:
    hf_writing.save(
      output,
      weights,
      model,
      dtype=DTYPE.value,
      tokenizer=SidecarFiles(workdir / layout.TOKENIZER, loading.marked_as(config, step)),
      generation=generation_of(workdir, model),
      card=card_text(config, environment, step),
    )

  read_params(workdir, model_config, STEP.value, write, dtype=DTYPE.value)


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


def lora_of(config: Config) -> str:
  """Return what was trained beside frozen weights, for the card; nothing where all weights were trained."""
  lora = config.lora
  if not lora.rank:
    return ""
  rows = ", and the rows of the markers" if lora.marker_rows else ""
  kind = "alpha / sqrt(rank)" if lora.rank_stabilised else "alpha / rank"
  matrices = ", ".join(lora.matrices)
  return f"LoRA, merged: rank {lora.rank}, alpha {lora.alpha:g}, scale {kind}, matrices {matrices}{rows}.\n"


def card_text(config: Config, environment: dict[str, Any], step: int) -> str:
  """Return the model card: the model, its markers, and its training."""
  try:
    commit, version = environment["commit"], environment["packages"]["jax"]
    start = start_of(config, environment.get("hub", {}).get(config.model.path))  # older workdirs have no "hub"
  except (KeyError, TypeError, AttributeError):
    raise InputError(
      "environment.json of the workdir does not name commit and packages; bring it back as it was"
    ) from None
  weights = ", ".join(f"{name} {weight:g}" for name, weight in dataclasses.asdict(config.loss).items())
  return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# A model trained to correct its own mistakes

Trained by insec_jax from {start}: {step:,} steps, task `{config.task.name}`, mistakes `{config.mistakes.source}` in
{config.mistakes.share:.0%} of the solutions, a step is a {config.mistakes.unit}. {lora_of(config)}It may write

    a wrong step {config.tokenizer.flag} what is wrong {config.tokenizer.fix} the right step

A reader wants the text without the wrong step, the reason and both markers; `python -m insec_jax.generate --clean`
gives that. `{loading.MARKERS}` names the markers for programs.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```

Weight of each role in the loss: {weights}. Commit {commit}, jax {version}.
What it was measured to do stands in the report of its run; nothing else is claimed.
"""


if __name__ == "__main__":
  command.run(main)

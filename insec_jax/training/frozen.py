"""Frozen weights of a LoRA run: on the mesh, and what a checkpoint holds to recognise them.

A checkpoint has the trained tree and, in its JSON under "base", the path and the commit of the frozen weights and a
fingerprint of each. They are read again from model.path, or drawn again by the seed.
"""

import pathlib
from typing import Any, NamedTuple

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from insec_jax.config import Config
from insec_jax.data import vocabulary
from insec_jax.files import hub
from insec_jax.files.reading import read_json
from insec_jax.model import adapters, base, llama, sharding
from insec_jax.model.lora import Lora
from insec_jax.training import layout
from insec_jax.training.fingerprints import digest, fingerprints

ENVIRONMENT = "environment.json"  # of a workdir


class Frozen(NamedTuple):
  """Frozen weights of a run: on their devices, as they were read, and as a checkpoint describes them."""

  params: Any
  shardings: Any
  weights: dict
  origin: dict[str, Any]

  @property
  def digest(self) -> str:
    """A short text that changes with any of the weights."""
    return digest(self.origin["fingerprints"])


def lora_of(config: Config, tokenizer: PreTrainedTokenizerFast) -> Lora | None:
  """Return what a run trains beside frozen weights, None where it trains all; the tokenizer has the markers."""
  if not config.lora.rank:
    return None
  marked = vocabulary.find_markers(tokenizer, config.tokenizer)
  ids = (marked.flag_id, marked.fix_id, *marked.confidence_ids)
  return adapters.lora_of(config.lora, tuple(number for number in ids if number is not None))


def lora_of_workdir(config: Config, workdir: pathlib.Path) -> Lora | None:
  """Return `lora_of` of the run in a workdir."""
  return lora_of(config, vocabulary.load(workdir / layout.TOKENIZER)) if config.lora.rank else None


def base_folder(config: Config, workdir: pathlib.Path | None) -> pathlib.Path | None:
  """Return the local folder of model.path, of the commit with which the workdir's run began; None without a path."""
  text = config.model.path
  if not text:
    return None
  if workdir is not None and hub.is_id(text):
    commits = read_json(workdir / ENVIRONMENT, "the environment of a run").get("hub", {})
    text = f"{text.partition('@')[0]}@{commits[text]}" if text in commits else text
  return hub.model_folder(text, "model.path")


def load(config: Config, model_config: llama.LlamaConfig, mesh: Mesh, workdir: pathlib.Path | None) -> Frozen:
  """Return the frozen weights on their devices; `workdir` is that of a run that resumes."""
  folder = base_folder(config, workdir)
  weights = base.weights(config, folder, model_config)
  shardings = sharding.params_shardings(llama.shapes(model_config), mesh)
  params = sharding.place(weights, shardings)
  commit = folder.name if folder is not None and hub.is_id(config.model.path) else None
  origin = {"path": config.model.path, "commit": commit, "fingerprints": fingerprints(params)}
  return Frozen(params, shardings, weights, origin)

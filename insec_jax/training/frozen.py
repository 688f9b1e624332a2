"""Frozen weights of a run: on the mesh, and what a checkpoint holds to recognise them.

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
from insec_jax.model import base, llama, parts, sharding
from insec_jax.training import layout
from insec_jax.training.fingerprints import digest, fingerprints

ENVIRONMENT = "environment.json"  # of a workdir


class Frozen(NamedTuple):
  """Frozen weights of a run: on their devices, and as a checkpoint describes them.

  `weights` are all weights as they were read, trained ones too.
  """

  params: Any
  shardings: Any
  weights: dict
  origin: dict[str, Any]

  @property
  def digest(self) -> str:
    """A short text that changes with any of the weights."""
    return digest(self.origin["fingerprints"])


def markers_of(config: Config, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
  """Return the ids of the markers, which the tokenizer has; none where they are plain words."""
  marked = vocabulary.find_markers(tokenizer, config.tokenizer)
  ids = (marked.flag_id, marked.fix_id, *marked.confidence_ids)
  return tuple(number for number in ids if number is not None)


def part_of(config: Config, tokenizer: PreTrainedTokenizerFast) -> parts.Part | None:
  """Return what a run trains beside frozen weights, None where it trains all; the tokenizer has the markers."""
  return parts.part_of(config, markers_of(config, tokenizer)) if config.freezes else None


def part_of_workdir(config: Config, workdir: pathlib.Path) -> parts.Part | None:
  """Return `part_of` of the run in a workdir."""
  return part_of(config, vocabulary.load(workdir / layout.TOKENIZER)) if config.freezes else None


def base_folder(config: Config, workdir: pathlib.Path | None) -> pathlib.Path | None:
  """Return the local folder of model.path, of the commit with which the workdir's run began; None without a path."""
  text = config.model.path
  if not text:
    return None
  if workdir is not None and hub.is_id(text):
    commits = read_json(workdir / ENVIRONMENT, "the environment of a run").get("hub", {})
    text = f"{text.partition('@')[0]}@{commits[text]}" if text in commits else text
  return hub.model_folder(text, "model.path")


def load(
  config: Config, model_config: llama.LlamaConfig, part: parts.Part, mesh: Mesh, workdir: pathlib.Path | None
) -> Frozen:
  """Return the frozen weights on their devices; `workdir` is that of a run that resumes."""
  folder = base_folder(config, workdir)
  weights = base.weights(config, folder, model_config)
  shardings = sharding.params_shardings(parts.frozen_shapes(model_config, part), mesh)
  params = sharding.place(parts.frozen_weights(weights, model_config, part, config.precision.params), shardings)
  commit = folder.name if folder is not None and hub.is_id(config.model.path) else None
  origin = {"path": config.model.path, "commit": commit, "fingerprints": fingerprints(params)}
  return Frozen(params, shardings, weights, origin)

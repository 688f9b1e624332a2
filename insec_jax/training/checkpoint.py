"""Checkpoints of a workdir, and opening a trained or untouched model for the programs that use one.

A checkpoint holds the parameters, the optimizer state, and as JSON: the step (which is the state of the data), the
running totals of the log, the config and the versions it was written with.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp
from transformers import PreTrainedTokenizerFast

from insec_jax import config as config_lib
from insec_jax.command import InputError
from insec_jax.config import Config, TokenizerConfig
from insec_jax.data import tokens
from insec_jax.method.transcript import Markers
from insec_jax.model import hf, hf_config, llama
from insec_jax.training.step import TrainState

CONFIG, MODEL, TOKENIZER, CHECKPOINTS = "config.json", "model.json", "tokenizer", "checkpoints"  # of a workdir
MARKERS = "insec.json"  # of an exported folder: how its text is marked
VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint")
# What may change when a run goes on: what is learned does not hang on it. Rows per step are compared by themselves.
FREE = ("model.remat", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep",
        "data.rows_per_device", "data.accumulation", "mesh.", "evaluate.")


def versions(packages: Iterable[str] = VERSIONS) -> dict[str, str]:
  """Installed version of each package."""
  return {package: importlib.metadata.version(package) for package in packages}


def write_atomically(path: pathlib.Path, text: str):
  """Nothing; the file is there whole, or, after a kill, as it was."""
  new = path.with_name(path.name + ".new")
  new.write_text(text, encoding="utf-8")
  os.replace(new, path)


def check_workdir(workdir: pathlib.Path, config: Config):
  """Nothing; InputError if the folder holds another experiment, or files of a run without its config."""
  if workdir.exists() and not workdir.is_dir():
    raise InputError(f"--workdir={workdir} is a file; give a folder")
  path = workdir / CONFIG
  if not path.is_file():
    if taken := [name for name in (MODEL, "metrics.jsonl", TOKENIZER, CHECKPOINTS) if (workdir / name).exists()]:
      raise InputError(f"{workdir} holds {taken[0]} but no {CONFIG}, so it is no workdir of a run; "
                       "give another --workdir")
    return
  try:
    made = config_lib.from_json(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise InputError(f"{path} is not the config of a run ({error}); give another --workdir") from error
  made, given = _flat(made), _flat(config)
  differ = [key for key in made if made[key] != given[key] and not key.startswith(FREE)]
  if differ:
    shown = ", ".join(f"{key}={given[key]!r} (was {made[key]!r})" for key in differ)
    raise InputError(f"{workdir} was made from another config: {shown}; give another --workdir, or the values it was "
                     "made with")


def _flat(config: Config) -> dict[str, Any]:
  flat = {}
  for name, value in dataclasses.asdict(config).items():
    flat |= {f"{name}.{key}": of_key for key, of_key in value.items()} if isinstance(value, dict) else {name: value}
  return flat


def latest_step(workdir: pathlib.Path) -> int | None:
  """The newest step that a checkpoint of the workdir holds, or None; nothing is written."""
  if not (workdir / CHECKPOINTS).is_dir():
    return None
  with contextlib.closing(Checkpoints(workdir, keep=None)) as checkpoints:
    return checkpoints.latest()


class Checkpoints:
  """The checkpoints of a workdir, the newest `keep` of them (None: only to be read); visible only when whole."""

  def __init__(self, workdir: pathlib.Path, *, keep: int | None):
    # A writer removes what a killed run left half written; it never counted as a checkpoint.
    self._orbax = ocp.training.Checkpointer(
      (workdir / CHECKPOINTS).absolute(), cleanup_tmp_directories=keep is not None,
      preservation_policy=ocp.training.preservation_policies.LatestN(keep))

  def latest(self) -> int | None:
    """The newest step saved, or None."""
    return None if self._orbax.latest is None else self._orbax.latest.step

  def save(self, step: int, state: TrainState, *, config: Config, facts: dict[str, Any], totals: list):
    """Nothing; the state is copied to the host and being written.

    `facts` must be the same when the run goes on; `totals` is metrics.Meter.to_json().
    """
    self._orbax.save_checkpointables_async(
      step, {"params": state.params, "optimizer": state.optimizer}, force=True,
      custom_metadata={"step": step, "facts": facts, "totals": totals, "config": dataclasses.asdict(config),
                       "versions": versions()})

  def restore(self, step: int, abstract: TrainState, *, facts: dict[str, Any]) -> tuple[TrainState, list]:
    """(state laid out as `abstract` says, totals); InputError unless facts and tree are exactly those saved."""
    metadata = self._orbax.checkpointables_metadata(step)
    run = metadata.custom_metadata
    before = run["facts"]
    if differ := [f"{name} is {facts[name]}, was {before[name]}" for name in facts if facts[name] != before[name]]:
      raise InputError(f"{self._where(step)} cannot be continued: {', '.join(differ)}; bring these back, or begin in "
                       "another --workdir")
    expected = {"params": abstract.params, "optimizer": abstract.optimizer}
    compare_trees(self._where(step), saved=metadata.metadata, expected=expected)
    # The whole tree is asked for at once; Orbax then loads all of it or nothing.
    loaded = self._orbax.load_checkpointables(step, expected)
    number = jax.device_put(jnp.asarray(step, abstract.step.dtype), abstract.step.sharding)
    return TrainState(number, loaded["params"], loaded["optimizer"]), run["totals"]

  def load_params(self, step: int, abstract):
    """The parameters alone, as `abstract` says but in the dtype saved; InputError unless the saved tree is that."""
    saved = self._orbax.checkpointables_metadata(step).metadata["params"]
    abstract = jax.tree.map(lambda leaf: leaf.update(dtype=jax.tree.leaves(saved)[0].dtype), abstract)
    compare_trees(self._where(step), saved=saved, expected=abstract)
    return self._orbax.load_checkpointables(step, {"params": abstract})["params"]

  def _where(self, step: int) -> str:
    return f"checkpoint {step} of {self._orbax.directory.parent}"

  def wait(self):
    """Nothing; every save is whole on disk."""
    self._orbax.wait()

  def close(self):
    """Nothing; every save is whole on disk and nothing runs any more."""
    self._orbax.close()


def compare_trees(where: str, *, saved, expected):
  """Nothing; InputError that names the first leaf that is missing, unexpected or of another shape or dtype."""
  saved, expected = _leaves(saved), _leaves(expected)
  differences = [f"{name} {saved.get(name, 'absent')}, needed {expected.get(name, 'absent')}"
                 for name in sorted(saved.keys() | expected.keys()) if saved.get(name) != expected.get(name)]
  if differences:
    raise InputError(f"{where} does not hold this model: {len(differences)} arrays differ, first {differences[0]}; "
                     "use the config it was trained with, or another workdir")


def _leaves(tree) -> dict[str, str]:
  def word(key):
    # The same node is a named field in an optax state and a plain key in what Orbax read back.
    return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))
  return {"/".join(map(word, path)): f"{leaf.dtype}{list(leaf.shape)}"
          for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


class Opened(NamedTuple):
  """A model ready for use. Of a folder that no run of ours wrote, all that concerns markers is None."""

  config: llama.LlamaConfig
  params: Any
  tokenizer: PreTrainedTokenizerFast
  markers: Markers | None
  flag_id: int | None  # None as well where the markers are plain words
  fix_id: int | None
  unit: str | None  # mistakes.unit and data.template it was trained with
  template: str | None


def is_workdir(folder: pathlib.Path) -> bool:
  """Whether the folder is a run's workdir with a checkpoint; InputError if it is no model at all."""
  if not folder.is_dir():
    raise InputError(f"no folder {str(folder)!r}; give a workdir of train or an HF folder")
  if (folder / MODEL).is_file():
    if latest_step(folder) is None:
      raise InputError(f"{folder} is a workdir without a checkpoint; let train run until it has saved one")
    return True
  if not (folder / hf.CONFIG).is_file():
    raise InputError(f"{folder} holds neither {MODEL} (a workdir) nor {hf.CONFIG} (an HF folder); give one of these")
  return False


def open_model(folder: str) -> Opened:
  """The model of a workdir (its newest checkpoint) or of an HF folder, weights in the dtype stored there."""
  path = pathlib.Path(folder)
  if not is_workdir(path):
    config = hf.read_config(folder)
    tokenizer = tokens.load(folder)
    params = hf.load(folder, config, dtype=None)
    marked = read_markers(path)
  else:
    config = read_model(path)
    tokenizer = tokens.load(str(path / TOKENIZER))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype, sharding=here),
                            llama.shapes(config), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    with contextlib.closing(Checkpoints(path, keep=None)) as checkpoints:
      params = checkpoints.load_params(checkpoints.latest(), abstract)
    marked = marked_as(config_lib.from_json((path / CONFIG).read_text(encoding="utf-8")))
  if marked is None:
    return Opened(config, params, tokenizer, None, None, None, None, None)
  _, flag_id, fix_id, _ = tokens.find_markers(tokenizer, TokenizerConfig(
    path="", flag=marked["flag"], fix=marked["fix"], special=marked["special"]))
  return Opened(config, params, tokenizer, Markers(marked["flag"], marked["fix"]), flag_id, fix_id, marked["unit"],
                marked["template"])


def read_model(workdir: pathlib.Path) -> llama.LlamaConfig:
  """The config of the model that a workdir trains."""
  path = workdir / MODEL
  return hf_config.config_from_json(json.loads(path.read_text(encoding="utf-8")), str(path))


def marked_as(config: Config) -> dict[str, Any]:
  """What an exported folder must say of its text beside what HF says."""
  return {"flag": config.tokenizer.flag, "fix": config.tokenizer.fix, "special": config.tokenizer.special,
          "unit": config.mistakes.unit, "template": config.data.template}


def read_markers(folder: pathlib.Path) -> dict[str, Any] | None:
  """What `marked_as` said, or None for a folder that no run of ours wrote."""
  path = folder / MARKERS
  return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

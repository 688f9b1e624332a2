"""Loading of a model for the programs that decode: a workdir or a Hugging Face folder, with its markers."""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from insec_jax import config_build
from insec_jax.command import InputError
from insec_jax.config import Config, TokenizerConfig
from insec_jax.data import vocabulary
from insec_jax.files import hub
from insec_jax.files.reading import read_json
from insec_jax.generation import placement
from insec_jax.generation.server import Server
from insec_jax.method.transcript import Markers
from insec_jax.model import build, hf, llama, markings
from insec_jax.training.layout import CONFIG, MODEL, TOKENIZER, check_kinds, read_model, steps
from insec_jax.training.stored import find_step, read_params


class LoadedModel(NamedTuple):
  """Model ready for use; markers, unit and template are None for a folder that no run of ours wrote."""

  config: llama.LlamaConfig
  params: Any  # laid out for decoding: the layers in a list; None where a server has them
  tokenizer: PreTrainedTokenizerFast
  mesh: Mesh | None  # None where a server has the weights
  compute: str  # dtype of the params and of the matrix products
  markers: Markers | None = None
  flag_id: int | None = None  # None also where the markers are plain words
  fix_id: int | None = None
  unit: str | None = None  # mistakes.unit and data.template of its training
  template: str | None = None
  confidence: tuple[float, ...] = ()  # tokenizer.confidence and tokenizer.confidence_first of its training
  confidence_first: tuple[float, ...] = ()
  confidence_ids: tuple[int, ...] = ()
  rewind: bool = False  # mistakes.rewind of its training
  step: int | None = None  # of the checkpoint; None where it is not known
  server: Server | None = None


def is_workdir(folder: pathlib.Path) -> bool:
  """Return whether the folder is a run's workdir with a checkpoint; InputError if it holds no model at all."""
  if not folder.is_dir():
    raise InputError(f"no folder '{folder}'; give a workdir of train or an HF folder")
  if (folder / MODEL).is_file():
    if not steps(folder):
      raise InputError(f"{folder} is a workdir without a checkpoint; let train run until it has saved one")
    return True
  if not (folder / hf.CONFIG).is_file():
    if unusable := [name for name in (MODEL, hf.CONFIG) if os.path.lexists(folder / name)]:
      raise InputError(f"{folder / unusable[0]} is no file that can be read; bring the file back")
    raise InputError(f"{folder} holds neither {MODEL} (a workdir) nor {hf.CONFIG} (an HF folder); give one of these")
  return False


def load_model(
  folder: str, *, step: int | None = None, mesh: str = "", compute: str | None = None, weights: bool = True
) -> LoadedModel:
  """Load a workdir (its newest checkpoint, or that of `step`) or an HF folder onto the devices of this host.

  Each weight goes from its file to its parts on the mesh (placement.choose_mesh), in the dtype to compute in:
  `compute`, or else that of `compute_dtype`. Without `weights` none is read, and no device is used.
  """
  path = hub.model_folder(folder, "--model", weights=weights)
  is_run = is_workdir(path)
  if is_run:
    check_kinds(path)
    config, tokenizer = read_model(path), vocabulary.load(path / TOKENIZER)
    run = config_build.build(read_json(path / CONFIG, "the config of a run"))
    stored = run.precision.compute
  elif step is not None:
    raise InputError(f"--step={step} names a checkpoint of a workdir, and {path} is an HF folder; leave it out")
  else:
    config, tokenizer = hf.read_config(path), vocabulary.load(path)
    stored = hf.stored(path, config)["embed"].dtype if weights else "float32"
  model = LoadedModel(config, None, tokenizer, None, compute or (compute_dtype(stored) if weights else "float32"))
  if is_run:
    model = _load_run(model, path, step, mesh) if weights else model._replace(step=find_step(path, step))
    marked = markings.marked_as(run, model.step)
  else:
    marked = markings.read_markers(path)
    model = model._replace(step=None if marked is None else marked.get("step"))
    if weights:
      devices, shardings = _layout(model, mesh)
      params = placement.place(hf.stored(path, config, dtype=model.compute), config, shardings)
      model = model._replace(params=params, mesh=devices)
  if marked is None:
    return model
  settings = TokenizerConfig(
    path="",
    flag=marked["flag"],
    fix=marked["fix"],
    special=marked["special"],
    confidence=tuple(marked.get("confidence") or ()),
    confidence_first=tuple(marked.get("confidence_first") or ()),
  )
  model = model._replace(unit=marked["unit"], template=marked["template"], rewind=bool(marked.get("rewind")))
  return with_ids(model, settings)


def _load_run(model: LoadedModel, workdir: pathlib.Path, step: int | None, mesh: str) -> LoadedModel:
  """Return the model with the weights of a checkpoint, and with its step."""
  devices, shardings = _layout(model, mesh)
  step, params = read_params(
    workdir,
    model.config,
    step,
    lambda step, weights: (step, placement.place(weights, model.config, shardings)),
    dtype=model.compute,
  )
  return model._replace(params=params, mesh=devices, step=step)


def _layout(model: LoadedModel, mesh: str) -> tuple[Mesh, dict]:
  """Return the mesh that decodes and the sharding of each weight."""
  devices = placement.choose_mesh(model.config, compute=model.compute, requested=mesh)
  return devices, placement.params_formats(model.config, devices)


def from_training(
  params, model_config: llama.LlamaConfig, tokenizer: PreTrainedTokenizerFast, config: Config, *, is_marked: bool
) -> LoadedModel:
  """Return the model of a run in progress, on the devices of this process; all processes of the run call this.

  `params` are those of a train step. A model that `is_marked` was trained on transcripts; another one writes no
  confidence tokens, though its tokenizer has them, and does not rewind.
  """
  compute = config.precision.compute
  params, mesh = placement.from_training(params, model_config, compute=compute, mesh=params["embed"].sharding.mesh)
  model = LoadedModel(model_config, params, tokenizer, mesh, compute)
  model = with_ids(model._replace(unit=config.mistakes.unit, template=config.data.template), config.tokenizer)
  if not is_marked:
    return model._replace(confidence=(), confidence_first=(), confidence_ids=())
  return model._replace(rewind=config.mistakes.rewind)


def with_ids(model: LoadedModel, settings: TokenizerConfig) -> LoadedModel:
  """Return the model with these markers, which its tokenizer has."""
  ids = vocabulary.find_markers(model.tokenizer, settings)
  return model._replace(
    markers=Markers(settings.flag, settings.fix),
    flag_id=ids.flag_id,
    fix_id=ids.fix_id,
    confidence=settings.confidence,
    confidence_first=settings.confidence_first,
    confidence_ids=ids.confidence_ids,
  )


def kinds_of(model: LoadedModel) -> np.ndarray | None:
  """Return the kind of each token of a model that was trained with mistakes.rewind; None of any other."""
  if not model.rewind:
    return None
  marked = vocabulary.MarkedTokenizer(model.tokenizer, model.flag_id, model.fix_id, model.confidence_ids)
  return vocabulary.token_kinds(marked)


def with_markers(loaded: LoadedModel, config: Config, where: str) -> LoadedModel:
  """Return the model with the config's markers; a model without markers gets them as at step 0 of training.

  A model trained without confidence tokens or mistakes.rewind stays without, whatever the config says. Raises
  InputError when it was trained with other markers, steps or template than the config's.
  """
  if loaded.markers is not None:
    pairs = {
      "tokenizer.flag": (loaded.markers.flag, config.tokenizer.flag),
      "tokenizer.fix": (loaded.markers.fix, config.tokenizer.fix),
      "tokenizer.special": (loaded.flag_id is not None, config.tokenizer.special),
      "mistakes.unit": (loaded.unit, config.mistakes.unit),
      "data.template": (loaded.template, config.data.template),
    }
    for name, (has, wanted) in pairs.items():
      if has != wanted:
        raise InputError(
          f"{where} was trained with {name}={has!r}, and the config says {wanted!r}; use the config of that run"
        )
    for name in ("confidence", "confidence_first") if loaded.confidence else ():
      has, wanted = getattr(loaded, name), getattr(config.tokenizer, name)
      if has != wanted:
        raise InputError(
          f"{where} was trained with tokenizer.{name}={has}, and the config says {wanted}; use the config of that run"
        )
    return loaded
  # Without confidence tokens: the model was never trained to read any.
  settings = dataclasses.replace(config.tokenizer, confidence=(), confidence_first=())
  own = vocabulary.tokenizer_folder(config) if config.tokenizer.path else None
  tokenizer = vocabulary.load(own) if own else loaded.tokenizer
  vocabulary.add_markers(tokenizer, settings)
  params, model_config = loaded.params, loaded.config
  if loaded.server is not None and len(tokenizer) > model_config.vocab_size:
    raise InputError(
      f"the server's model has {model_config.vocab_size} rows of its vocabulary, and the markers of the config need "
      f"{len(tokenizer)}; serve a model that has them, or set tokenizer.flag and tokenizer.fix to special tokens it has"
    )
  if len(tokenizer) > model_config.vocab_size:
    grown = dataclasses.replace(model_config, vocab_size=build.vocabulary_for(len(tokenizer), model_config.vocab_size))
    shardings = placement.params_formats(grown, loaded.mesh)
    rows = {name: params[name] for name in ("embed", "head") if name in params}
    params = params | jax.jit(
      lambda rows: build.grow_vocabulary(rows, model_config, grown.vocab_size)[0],
      out_shardings={name: shardings[name] for name in rows},
    )(rows)
    model_config = grown
  model = loaded._replace(
    config=model_config, params=params, tokenizer=tokenizer, unit=config.mistakes.unit, template=config.data.template
  )
  return with_ids(model, settings)


def compute_dtype(stored) -> str:
  """Return the dtype to compute in with weights of this dtype: bfloat16 for 16 bits on accelerators, else float32."""
  return "float32" if jax.default_backend() == "cpu" or np.dtype(stored).itemsize == 4 else "bfloat16"

"""Hugging Face folders, read: config.json, and weights by one table of names, which hf_writing.py uses too.

Values do not change: weights are only reshaped and transposed, and cast where the caller gives another dtype.
"""

import concurrent.futures
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from insec_jax.command import InputError
from insec_jax.files import buckets
from insec_jax.files.reading import folder_to_read, read_json
from insec_jax.model import llama, sharding
from insec_jax.model.hf_config import config_from_json, token_ids
from insec_jax.model.llama import LlamaConfig
from insec_jax.model.safetensors_io import RemoteTensor, Tensor, open_tensors, some_of

CONFIG, GENERATION, SINGLE, INDEX = (
  "config.json",
  "generation_config.json",
  "model.safetensors",
  "model.safetensors.index.json",
)
SHARD = re.compile(r"[\w.+=-]{1,200}\.safetensors", re.ASCII)  # a file of the folder itself, not of another
MOST_NAMED = 5  # problems listed in one error
FINITE_CHUNK = 1 << 14  # elements checked together
LAYERS_AT_ONCE = 8  # read from a bucket

# Our name -> HF's name and axes, outermost first: nn.Linear stores [out, in].
NAMES = {
  "embed": ("model.embed_tokens.weight", "V D"),
  "layers/attn/norm": ("model.layers.{}.input_layernorm.weight", "D"),
  "layers/attn/wq": ("model.layers.{}.self_attn.q_proj.weight", "NH D"),
  "layers/attn/wk": ("model.layers.{}.self_attn.k_proj.weight", "KH D"),
  "layers/attn/wv": ("model.layers.{}.self_attn.v_proj.weight", "KH D"),
  "layers/attn/wo": ("model.layers.{}.self_attn.o_proj.weight", "D NH"),
  "layers/mlp/norm": ("model.layers.{}.post_attention_layernorm.weight", "D"),
  "layers/mlp/gate": ("model.layers.{}.mlp.gate_proj.weight", "F D"),
  "layers/mlp/up": ("model.layers.{}.mlp.up_proj.weight", "F D"),
  "layers/mlp/down": ("model.layers.{}.mlp.down_proj.weight", "D F"),
  "norm": ("model.norm.weight", "D"),
  "head": ("lm_head.weight", "V D"),
}
LETTERS = flatten_dict(llama.WEIGHTS, sep="/")
IGNORED = ".rotary_emb.inv_freq"  # stored in old files, and determined by config.json


@dataclasses.dataclass(frozen=True)
class Slot:
  """Location of one HF tensor: `layer` of our weight `path`, or all of it when the weight is not stacked."""

  path: str
  layer: int | None
  name: str
  shape: tuple[int, ...]  # in HF's file


def slots(config: LlamaConfig) -> Iterator[Slot]:
  """Yield the slot of every tensor of an HF checkpoint, in the order of the forward pass."""

  def slot(path, layer):
    name, axes = NAMES[path]
    shape = tuple(math.prod(config.size(letter) for letter in axis) for axis in axes.split())
    return Slot(path, layer, name if layer is None else name.format(layer), shape)

  yield slot("embed", None)
  for layer in range(config.num_layers):
    for path in NAMES:
      if path.startswith("layers/"):
        yield slot(path, layer)
  yield slot("norm", None)
  if not config.tied:
    yield slot("head", None)


def to_ours(path: str, tensor, config: LlamaConfig):
  """Return a view of HF's tensor, or of some of its rows, with our axes."""
  order = NAMES[path][1].replace(" ", "")
  split = tensor.reshape([-1, *(config.size(letter) for letter in order[1:])])
  return split.transpose([order.index(letter) for letter in LETTERS[path]])


def to_hf(path: str, array, config: LlamaConfig):
  """Return our weight (of one layer) with HF's axes: the inverse of `to_ours`."""
  axes = NAMES[path][1]
  moved = array.transpose([LETTERS[path].index(letter) for letter in axes.replace(" ", "")])
  return moved.reshape([int(np.prod([config.size(letter) for letter in axis])) for axis in axes.split()])


def read_part(path: str, tensor: Tensor, config: LlamaConfig, index) -> np.ndarray:
  """Return `to_ours(...)[index]`, a slice for each axis or `...`; of a remote tensor only the rows needed are read."""
  if not isinstance(tensor, RemoteTensor):
    return to_ours(path, tensor, config)[index]
  axes, (first, *others) = LETTERS[path], NAMES[path][1].split()[0]
  if index is ...:
    index = (slice(None),) * len(axes)
  place, num_rows = axes.index(first), math.prod(config.size(letter) for letter in others)
  start, stop, _ = index[place].indices(config.size(first))
  part = to_ours(path, tensor[start * num_rows : stop * num_rows], config)
  return part[(*index[:place], slice(None), *index[place + 1 :])]


def check_finite(array: np.ndarray, name: str) -> None:
  """Raise InputError with the index of the first NaN or infinity; the array is checked in chunks."""
  flat = array.reshape(-1)
  for start in range(0, flat.size, FINITE_CHUNK):
    with np.errstate(invalid="ignore"):  # numpy warns about a NaN
      finite = np.isfinite(flat[start : start + FINITE_CHUNK])
    if not finite.all():
      index = np.unravel_index(start + int(finite.argmin()), array.shape)
      raise InputError(
        f"{name} holds NaN or infinity at {[int(axis) for axis in index]}; take a checkpoint whose weights are finite"
      )


@dataclasses.dataclass(frozen=True)
class LazyWeight:
  """Weight that stays in its files: indexing reads only the bytes of the result.

  `tensors` are mapped from the files, one for each layer; a weight that is not stacked has one and no layer axis.
  """

  path: str
  config: LlamaConfig
  tensors: tuple[Tensor, ...]
  names: tuple[str, ...]  # in the files
  dtype: np.dtype  # of the arrays that indexing returns

  @property
  def stacked(self) -> bool:
    return self.path.startswith("layers/")

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.tensors),) * self.stacked + tuple(self.config.size(letter) for letter in LETTERS[self.path])

  def __getitem__(self, index) -> np.ndarray:
    """Return a copy of `self[index]`; `index` is a whole number for a layer, or one slice for each axis.

    Raises InputError when it holds NaN or infinity.
    """
    if not self.stacked:
      return self._read(0, index)
    if isinstance(index, int):
      return self._read(index, ...)
    layers, *others = (range(size)[piece] for size, piece in zip(self.shape, index, strict=True))
    out = np.empty((len(layers), *map(len, others)), self.dtype)
    if not isinstance(self.tensors[0], RemoteTensor):
      for place, layer in enumerate(layers):
        self._read(layer, index[1:], out[place])
      return out
    with concurrent.futures.ThreadPoolExecutor(LAYERS_AT_ONCE) as pool:
      list(pool.map(lambda layer, part: self._read(layer, index[1:], part), layers, out))
    return out

  def _read(self, layer: int, index, out: np.ndarray | None = None) -> np.ndarray:
    """Return `index` of the layer, in `out` where given; errors give the position in the file."""
    with np.errstate(over="ignore"):  # overflow is an error below
      if out is None:
        out = np.array(self._part(layer, index), self.dtype, order="C")
      else:
        out[...] = self._part(layer, index)
    try:
      check_finite(out, self.names[layer])
    except InputError:
      check_finite(self.tensors[layer][:], self.names[layer])
      raise InputError(f"{self.names[layer]} holds values that {self.dtype} cannot hold; read it as float32") from None
    return out

  def _part(self, layer: int, index) -> np.ndarray:
    return read_part(self.path, self.tensors[layer], self.config, index)


def read_config(folder: pathlib.Path | str) -> LlamaConfig:
  """Return the model of the folder's config.json; generation_config.json may add tokens that end a text."""
  path = folder_to_read(folder, "model.path") / CONFIG
  config = config_from_json(read_json(path, "config of the model"), f"{path}")
  generation = read_generation_config(folder)
  ends = (
    ()
    if generation is None
    else token_ids(generation, "eos_token_id", f"{path.with_name(GENERATION)}", config.vocab_size)
  )
  return dataclasses.replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *ends))))


def read_generation_config(folder: pathlib.Path | str) -> dict[str, Any] | None:
  """Return the fields of the folder's generation_config.json; None when it has none."""
  path = folder_to_read(folder, "model.path") / GENERATION
  return read_json(path, "generation config") if os.path.lexists(path) else None


def stored(folder: pathlib.Path | str, config: LlamaConfig, *, dtype=None) -> dict:
  """Return the params, each a `LazyWeight`, cast to `dtype` when it is read (None: the dtype of the file).

  Raises one InputError for all tensors that are missing, unexpected, misshapen or there twice.
  """
  folder = folder_to_read(folder, "model.path")
  tensors, problems = _open_all(folder)
  if config.num_layers > len(tensors):
    raise InputError(
      f"{folder / CONFIG}: num_hidden_layers={config.num_layers}, but the weights hold only "
      f"{len(tensors)} tensors; take a complete checkpoint, or correct {CONFIG}"
    )
  wanted = {slot.name: slot for slot in slots(config)}
  if config.tied and NAMES["head"][0] in tensors:
    problems += _check_tied_head(tensors)
  problems += [f"missing {name}" for name in wanted if name not in tensors]
  problems += [f"unexpected {name}" for name in tensors if name not in wanted and not name.endswith(IGNORED)]
  slots_of_path: dict[str, list[Slot]] = {}
  for name, slot in wanted.items():
    if name in tensors and tensors[name].shape != slot.shape:
      problems.append(f"misshapen {name} {list(tensors[name].shape)} instead of {list(slot.shape)}")
    elif name in tensors:
      slots_of_path.setdefault(slot.path, []).append(slot)
  if dtype is None:
    problems += [
      f"{NAMES[path][0]} in several dtypes ({', '.join(sorted(kinds))})"
      for path, path_slots in slots_of_path.items()
      if len(kinds := {tensors[slot.name].dtype.name for slot in path_slots}) > 1
    ]
  if problems:
    shown = some_of([f"{problem:.200}" for problem in problems], MOST_NAMED, "; ")
    raise InputError(
      f"the weights in {folder} do not fit its {CONFIG}: {shown}; take a complete "
      f"checkpoint of this architecture, or correct {CONFIG}"
    )
  weights = {}
  for path, path_slots in slots_of_path.items():
    views = tuple(tensors[slot.name] for slot in path_slots)
    weights[path] = LazyWeight(
      path, config, views, tuple(slot.name for slot in path_slots), np.dtype(dtype or views[0].dtype)
    )
  return unflatten_dict(weights, sep="/")


def load(folder: pathlib.Path | str, config: LlamaConfig, *, dtype=None, shardings=None) -> dict:
  """Load the params onto their devices; each process reads the bytes of its own shards, one weight at a time.

  `shardings` is a tree like the params (model/sharding.py), None for the first device; `dtype` and errors as `stored`.
  """
  return sharding.place(stored(folder, config, dtype=dtype), shardings)


def _open_all(folder: pathlib.Path) -> tuple[dict[str, Tensor], list[str]]:
  """Return every tensor of the folder's files, and a list of the problems of the index."""
  single, index = (buckets.exists(folder / name) for name in (SINGLE, INDEX))
  if single == index:
    raise InputError(
      f"{folder} has {'both' if index else 'neither'} of {SINGLE} and {INDEX}; "
      "give a Hugging Face folder with safetensors weights, in one file or several"
    )
  if single:
    return open_tensors(folder / SINGLE), []
  file_of_tensor = read_json(folder / INDEX, "index of the weights").get("weight_map")
  if (
    not isinstance(file_of_tensor, dict)
    or not file_of_tensor
    or not all(isinstance(file, str) for file in file_of_tensor.values())
  ):
    raise InputError(f"{folder / INDEX} has no weight_map from tensors to files; fetch it again")
  files = sorted(set(file_of_tensor.values()))
  for file in files:
    if not SHARD.fullmatch(file):
      raise InputError(
        f"{folder / INDEX} names {file!r:.100}, which is no .safetensors file of this folder; fetch it again"
      )
    if not buckets.exists(folder / file):
      raise InputError(f"{folder / INDEX} names {file}, which is not there; fetch it")
  tensors: dict[str, Tensor] = {}
  problems = []
  for file in files:
    for name, tensor in open_tensors(folder / file).items():
      if name in tensors:
        problems.append(f"{name} twice, the second time in {file}")
      elif file_of_tensor.get(name) != file:
        problems.append(f"{name} in {file} but not so in {INDEX}")
      tensors[name] = tensor
  return tensors, problems + [f"{name} in {INDEX} but in no file" for name in file_of_tensor if name not in tensors]


def _check_tied_head(tensors: dict[str, Tensor]) -> list[str]:
  """Remove the output matrix, which a tied model should not have, from `tensors`; return the problem if it differs.

  One that equals the embedding is accepted with a warning.
  """
  name, embed = NAMES["head"][0], NAMES["embed"][0]
  if embed not in tensors:
    return []
  head = tensors.pop(name)
  same = (
    head.shape == tensors[embed].shape
    and head.dtype == tensors[embed].dtype
    and all(
      np.array_equal(head[row : row + 1024].view(np.uint8), tensors[embed][row : row + 1024].view(np.uint8))
      for row in range(0, len(head), 1024)
    )
  )
  if not same:
    return [f"unexpected {name}, which differs from {embed} although tie_word_embeddings is true"]
  logging.warning("%s repeats %s, to which tie_word_embeddings ties it: read once, and not written again", name, embed)
  return []

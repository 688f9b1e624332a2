"""Hugging Face folders, in and out: config.json, and weights by one table of names for both directions.

No value changes on the way: weights are only reshaped and transposed, and cast where the caller asks for another dtype.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from insec_jax.command import InputError
from insec_jax.files import folder_written_whole
from insec_jax.model import llama
from insec_jax.model.hf_config import config_from_json, config_to_json
from insec_jax.model.llama import LlamaConfig
from insec_jax.model.tensor_file import CODES, Source, open_tensors, write_tensors

CONFIG, GENERATION, SINGLE, INDEX = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
VOCAB_MULTIPLE = 128
SHARD_BYTES = 5 * 10**9  # of one file, as transformers has it

# Ours -> the tensor of HF and its axes, outermost first: nn.Linear stores [out, in].
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
IGNORED = ".rotary_emb.inv_freq"  # old files store what config.json says already


@dataclasses.dataclass(frozen=True)
class Slot:
  """The place of one HF tensor: `layer` of our weight `path`, or all of it when it is not stacked."""

  path: str
  layer: int | None
  name: str
  shape: tuple[int, ...]  # in HF's file


def slots(config: LlamaConfig) -> Iterator[Slot]:
  """Every tensor of an HF checkpoint, in the order of the forward pass."""
  def slot(path, layer):
    name, axes = NAMES[path]
    shape = tuple(int(np.prod([config.size(letter) for letter in axis])) for axis in axes.split())
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
  """HF's tensor with our axes; a view."""
  order = NAMES[path][1].replace(" ", "")
  split = tensor.reshape([config.size(letter) for letter in order])
  return split.transpose([order.index(letter) for letter in LETTERS[path]])


def to_hf(path: str, array, config: LlamaConfig):
  """Our weight (of one layer) with HF's axes: the inverse of `to_ours`."""
  axes = NAMES[path][1]
  moved = array.transpose([LETTERS[path].index(letter) for letter in axes.replace(" ", "")])
  return moved.reshape([int(np.prod([config.size(letter) for letter in axis])) for axis in axes.split()])


@dataclasses.dataclass(frozen=True)
class Stored:
  """A weight of ours that still lies in its files: indexing reads the bytes asked for and no others.

  `parts` are views with our axes, one for each layer; a weight that is not stacked has one part and no layer axis.
  """

  parts: tuple[np.ndarray, ...]
  stacked: bool
  dtype: np.dtype  # of what indexing returns

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.parts),) * self.stacked + self.parts[0].shape

  def __getitem__(self, index) -> np.ndarray:
    """A copy of `self[index]`: a whole number for a layer, or one slice for each axis."""
    if not self.stacked:
      return np.array(self.parts[0][index], self.dtype, order="C")
    if isinstance(index, int):
      return np.array(self.parts[index], self.dtype, order="C")
    layers = self.parts[index[0]]
    out = np.empty((len(layers), *layers[0][index[1:]].shape), self.dtype)
    for layer, part in enumerate(layers):
      out[layer] = part[index[1:]]
    return out


def read_config(folder: pathlib.Path | str) -> LlamaConfig:
  """The model that the folder's config.json describes."""
  return config_from_json(_read_json(pathlib.Path(folder) / CONFIG), str(pathlib.Path(folder) / CONFIG))


def read_generation_config(folder: pathlib.Path | str) -> dict[str, Any] | None:
  """The fields of the folder's generation_config.json; None when it has none."""
  path = pathlib.Path(folder) / GENERATION
  return _read_json(path) if path.exists() else None


def stored(folder: pathlib.Path | str, config: LlamaConfig, *, dtype=None) -> dict:
  """The params, each a `Stored`, cast to `dtype` as it is read (None: as it lies in the file).

  InputError, one for all of them, that names every tensor that is missing, unexpected, misshapen or there twice.
  """
  folder = pathlib.Path(folder)
  tensors, problems = _open_all(folder)
  wanted = {slot.name: slot for slot in slots(config)}
  if config.tied and NAMES["head"][0] in tensors:
    problems += _check_tied_head(tensors)
  problems += [f"missing {name}" for name in wanted if name not in tensors]
  problems += [f"unexpected {name}" for name in tensors if name not in wanted and not name.endswith(IGNORED)]
  parts: dict[str, list[np.ndarray]] = {}
  for name, slot in wanted.items():
    if name in tensors and tensors[name].shape != slot.shape:
      problems.append(f"misshapen {name} {list(tensors[name].shape)} instead of {list(slot.shape)}")
    elif name in tensors:
      parts.setdefault(slot.path, []).append(to_ours(slot.path, tensors[name], config))
  if dtype is None:
    problems += [f"{NAMES[path][0]} in several dtypes ({', '.join(sorted(kinds))})" for path, views in parts.items()
                 if len(kinds := {view.dtype.name for view in views}) > 1]
  if problems:
    raise InputError(f"the weights in {folder} do not fit its {CONFIG}: {'; '.join(problems)}; take a complete "
                     f"checkpoint of this architecture, or correct {CONFIG}")
  return unflatten_dict({path: Stored(tuple(views), path.startswith("layers/"), np.dtype(dtype or views[0].dtype))
                         for path, views in parts.items()}, sep="/")


def load(folder: pathlib.Path | str, config: LlamaConfig, *, dtype=None, shardings=None) -> dict:
  """The params on their devices; each process reads the bytes of its own shards, one weight at a time.

  `shardings` is a tree like the params (model/sharding.py), None for the first device; `dtype` and errors as `stored`.
  """
  return _place_all(stored(folder, config, dtype=dtype), shardings)


def _place_all(weights: dict, shardings) -> dict:
  """The same tree on devices; without shardings on the first device."""
  if shardings is None:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one, weights)
  return jax.tree.map(_place, weights, shardings)


def _place(weight: "Stored | Drawn", sharding: jax.sharding.Sharding) -> jax.Array:
  @functools.cache  # devices that hold the same shard share one reading of it
  def read(bounds):
    return weight[tuple(slice(*bound) for bound in bounds)]

  placed = jax.make_array_from_callback(
      weight.shape, sharding, lambda index: read(tuple((one.start, one.stop) for one in index)))
  return placed.block_until_ready()  # until it is there the host holds it too, and the next one would come on top


def _open_all(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
  """Every tensor of the folder's files, and what is wrong with how the index tells of them."""
  if (folder / SINGLE).exists() == (folder / INDEX).exists():
    raise InputError(f"{folder} has {'both' if (folder / INDEX).exists() else 'neither'} of {SINGLE} and {INDEX}; "
                     "give a Hugging Face folder with safetensors weights, in one file or several")
  if (folder / SINGLE).exists():
    return open_tensors(folder / SINGLE), []
  places = _read_json(folder / INDEX).get("weight_map")
  if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
    raise InputError(f"{folder / INDEX} has no weight_map from tensors to files; fetch it again")
  tensors: dict[str, np.ndarray] = {}
  problems = []
  for file in sorted(set(places.values())):
    if not (folder / file).is_file():
      raise InputError(f"{folder / INDEX} names {file}, which is not there; fetch it")
    for name, tensor in open_tensors(folder / file).items():
      if name in tensors:
        problems.append(f"{name} twice, the second time in {file}")
      elif name not in places or places[name] != file:
        problems.append(f"{name} in {file} but not so in {INDEX}")
      tensors[name] = tensor
  return tensors, problems + [f"{name} in {INDEX} but in no file" for name in places if name not in tensors]


def _check_tied_head(tensors: dict[str, np.ndarray]) -> list[str]:
  """Takes the output matrix that a tied model should not have out of `tensors`, if it is the embedding, and says so."""
  name, embed = NAMES["head"][0], NAMES["embed"][0]
  if embed not in tensors:
    return []
  head = tensors.pop(name)
  same = head.shape == tensors[embed].shape and head.dtype == tensors[embed].dtype and all(
      np.array_equal(head[row:row + 1024].view(np.uint8), tensors[embed][row:row + 1024].view(np.uint8))
      for row in range(0, len(head), 1024))
  if not same:
    return [f"unexpected {name}, which differs from {embed} although tie_word_embeddings is true"]
  logging.warning("%s repeats %s, to which tie_word_embeddings ties it: read once, and not written again", name, embed)
  return []


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise InputError(f"{path} is not there; give the folder of a Hugging Face checkpoint")
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise InputError(f"{path} is not JSON ({error}); fetch it again") from None
  if not isinstance(fields, dict):
    raise InputError(f"{path} must hold one JSON object; fetch it again")
  return fields


def save(folder: pathlib.Path | str, params, config: LlamaConfig, *, dtype=None, max_shard_bytes: int = SHARD_BYTES,
         tokenizer=None, generation: dict[str, Any] | None = None, card: str | None = None) -> None:
  """Writes an HF folder: weights, index if they need several files, config.json, generation_config.json, and where
  given the tokenizer and the model card (README.md).

  `params` may come from `stored`: then one HF tensor (and its transpose) at a time is in memory. `generation` None: the
  config's token ids.
  InputError when the folder holds anything; it appears only when it is complete.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"{folder} is there already and not empty; give a new folder, nothing is written over")
  folder.parent.mkdir(parents=True, exist_ok=True)
  with folder_written_whole(folder) as partial:
    weights = flatten_dict(params, sep="/")
    target = np.dtype(dtype or weights["embed"].dtype)
    _write_weights(partial, [_source(slot, weights[slot.path], config, np.dtype(dtype or weights[slot.path].dtype))
                             for slot in slots(config)], max_shard_bytes)
    fields = config_to_json(dataclasses.replace(config, stored_dtype=target.name))
    ids = {key: value for key, value in fields.items() if key in TOKEN_IDS and value is not None}
    _write_json(partial / CONFIG, fields)
    _write_json(partial / GENERATION, ids if generation is None else generation)
    if tokenizer is not None:
      tokenizer.save_pretrained(partial)
    if card is not None:
      (partial / "README.md").write_text(card, encoding="utf-8")


def _source(slot: Slot, weight, config: LlamaConfig, dtype: np.dtype) -> Source:
  if dtype not in CODES:
    raise InputError(f"weights cannot be written as {dtype}; choose one of {', '.join(kind.name for kind in CODES)}")

  def read():
    array = np.asarray(weight[...] if slot.layer is None else weight[slot.layer])
    return np.ascontiguousarray(to_hf(slot.path, array, config)).astype(dtype, copy=False)

  return Source(slot.name, dtype, slot.shape, read)


def _write_weights(folder: pathlib.Path, sources: list[Source], max_shard_bytes: int) -> None:
  shards: list[list[Source]] = []
  room = 0
  for source in sources:
    if source.num_bytes > room:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(source)
    room -= source.num_bytes
  if len(shards) == 1:
    write_tensors(folder / SINGLE, shards[0])
    return
  places = {}
  for number, shard in enumerate(shards, 1):
    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    write_tensors(folder / file, shard)
    places |= dict.fromkeys((source.name for source in shard), file)
  _write_json(folder / INDEX, {"metadata": {"total_size": sum(source.num_bytes for source in sources)},
                               "weight_map": dict(sorted(places.items()))})


def _write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Drawn:
  """A random weight, drawn where it is indexed: each layer from its own seed, so a part is the same in any company."""

  seed: tuple[int, ...]
  deviation: float | None  # None: all ones
  shape: tuple[int, ...]
  stacked: bool
  dtype: np.dtype

  def __getitem__(self, index) -> np.ndarray:
    """`self[index]`, one slice for each axis."""
    if not self.stacked:
      return self._draw(0, self.shape)[index].astype(self.dtype)
    return np.stack([self._draw(layer, self.shape[1:])[index[1:]].astype(self.dtype)
                     for layer in range(self.shape[0])[index[0]]])

  def _draw(self, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    if self.deviation is None:
      return np.ones(shape, np.float32)
    return np.random.default_rng((*self.seed, layer)).standard_normal(shape, np.float32) * np.float32(self.deviation)


def init(config: LlamaConfig, key, dtype, *, shardings=None) -> dict:
  """Random params: norms 1, the others normal with the config's deviation; the same on any mesh, born where they lie.

  Drawn by NumPy: compiling threefry for every weight takes longer than the toy's first hundred steps.
  """
  if config.init_std is None:
    raise InputError("the model has no initializer_range, the deviation of random weights; give one, such as 0.02")
  seed = tuple(np.asarray(jax.random.key_data(key)).tolist())
  paths = [path for path in NAMES if path != "head" or not config.tied]
  weights = {}
  for number, path in enumerate(paths):
    stacked = path.startswith("layers/")
    shape = (config.num_layers,) * stacked + tuple(config.size(letter) for letter in LETTERS[path])
    deviation = None if LETTERS[path] == "D" else config.init_std
    weights[path] = Drawn((*seed, number), deviation, shape, stacked, np.dtype(dtype))
  return _place_all(unflatten_dict(weights, sep="/"), shardings)


def vocabulary_for(num_tokens: int, vocab_size: int) -> int:
  """The vocabulary that a model needs for a tokenizer: its own if it holds all tokens, else a VOCAB_MULTIPLE."""
  return vocab_size if num_tokens <= vocab_size else -(-num_tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def grow_vocabulary(params, config: LlamaConfig, new_size: int) -> tuple[dict, LlamaConfig]:
  """(params, config) with rows added to the embedding and the output matrix, each the mean of the old rows.

  The mean, so that a new token starts no likelier and no rarer than the average one; InputError unless `new_size` is a
  multiple of 128, which divides over devices, and no less than now.
  """
  if new_size % VOCAB_MULTIPLE or new_size < config.vocab_size:
    raise InputError(f"the vocabulary cannot go from {config.vocab_size} to {new_size} tokens; the new size must be a "
                     f"multiple of {VOCAB_MULTIPLE} and no smaller")

  def grown(matrix_VD):
    mean_D = matrix_VD.astype(jnp.float32).mean(0).astype(matrix_VD.dtype)
    added = jnp.broadcast_to(mean_D[None], (new_size - config.vocab_size, config.width))
    return jnp.concatenate((matrix_VD, added))

  names = ("embed",) if config.tied else ("embed", "head")
  return {**params, **{name: grown(params[name]) for name in names}}, dataclasses.replace(config, vocab_size=new_size)

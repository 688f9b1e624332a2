"""Adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

Names and shapes are those of peft 0.21: of a matrix [out, in] of nn.Linear, lora_A is [P, in] and lora_B is [out, P].
Trained rows of tokens are its `trainable_token_indices`, whose tensor holds the rows themselves, [M, D]. Letters are
those of lora.py.
"""

import functools
import pathlib
from collections.abc import Iterator

import numpy as np
from flax.traverse_util import flatten_dict

from insec_jax.config import LoraConfig
from insec_jax.model.hf import NAMES, check_finite
from insec_jax.model.hf_writing import write_json
from insec_jax.model.llama import LlamaConfig
from insec_jax.model.lora import Lora
from insec_jax.model.safetensors_io import Source, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, ROWS = "base_model.model.", "token_adapter.trainable_tokens_delta"
FLOAT32 = np.dtype(np.float32)


def write(
  folder: pathlib.Path, trained: dict, lora: Lora, settings: LoraConfig, model: LlamaConfig, *, base: str, rows: bool
) -> None:
  """Write both files into the folder, which exists; without `rows` those of the markers are left out.

  `trained` is the tree of adapters.py as NumPy arrays, `base` the name or folder of the model that it stands on.
  """
  tables = [path.removeprefix("rows/") for path in flatten_dict(trained, sep="/") if path.startswith("rows/")]
  fields = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "inference_mode": True,
    "r": lora.rank,
    "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
    "use_rslora": settings.rank_stabilised,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": [_module(path) for path in NAMES if path.rpartition("/")[2] in lora.matrices],
  }
  if rows and tables:
    fields["trainable_token_indices"] = {_module(table): list(lora.markers) for table in tables}
  write_json(folder / CONFIG, fields)
  write_tensors(folder / WEIGHTS, _sources(trained, model, rows=rows))


def _module(path: str) -> str:
  """Return the name of the module in transformers that has our weight."""
  return NAMES[path][0].split(".")[-2]


def _sources(trained: dict, model: LlamaConfig, *, rows: bool) -> Iterator[Source]:
  arrays = flatten_dict(trained, sep="/")
  for path, array in arrays.items():
    place, _, kind = path.rpartition("/")
    if place == "rows":
      if rows:
        name = f"{PREFIX}{NAMES[kind][0].removesuffix('weight')}{ROWS}"
        yield _source(name, array.shape, functools.partial(np.asarray, array))
      continue
    rank = array.shape[-1] if kind == "a" else array.shape[1]
    size = int(np.prod(array.shape[1:])) // rank
    shape = (rank, size) if kind == "a" else (size, rank)
    for layer in range(model.num_layers):
      name = NAMES[place][0].format(layer).removesuffix("weight")
      read = functools.partial(_factor, array[layer], shape)
      yield _source(f"{PREFIX}{name}lora_{kind.upper()}.weight", shape, read)


def _factor(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Return a [ins..., P] as [P, in], or b [P, outs...] as [out, P]."""
  return np.ascontiguousarray(array.reshape(shape[::-1]).T)


def _source(name: str, shape: tuple[int, ...], read) -> Source:
  def checked() -> np.ndarray:
    array = read()
    check_finite(array, name)
    return array

  return Source(name, FLOAT32, shape, checked)

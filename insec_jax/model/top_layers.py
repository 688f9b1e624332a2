"""Training of the top layers alone: the frozen and the trained tree, first values, and their merge.

  frozen    {"embed": VD, "layers": {...}}      the lower layers, stacked
  trained   {"layers": {...},                   the top layers, stacked
             "norm": D, "head": VD,             "head" only where the output matrix is not the embedding
             "rows": {"embed": MD}}             "rows" only where markers are trained

Letters are those of llama.py and lora.py. Trained arrays are float32. Row m of "rows" replaces the embedding's row of
token `markers[m]`, also in the output matrix where that is the embedding. A marker's row is read by the frozen layers,
so its gradient passes through them; without trained rows nothing below the top layers has a gradient.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from insec_jax.command import InputError
from insec_jax.model import adapters, llama
from insec_jax.model.llama import AXES, LlamaConfig

LAYERS = "layers/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopLayers:
  """What is trained: the last `num` layers, all above them, and the embedding's rows of `markers`, ids of tokens."""

  num: int
  markers: tuple[int, ...]


def num_lower(config: LlamaConfig, top: TopLayers) -> int:
  """Return the number of frozen layers; InputError where none is left."""
  if top.num >= config.num_layers:
    raise InputError(
      f"train.top_layers={top.num} of a model of {config.num_layers} layers leaves none frozen; give fewer, or 0 to "
      "train every weight"
    )
  return config.num_layers - top.num


def _boxed(config: LlamaConfig, num: int) -> dict[str, Any]:
  """Return the shapes of all parameters by path, each boxed with its axes, with `num` layers in the stacks."""
  shapes = flatten_dict(llama.shapes(config), sep="/")
  return {
    path: leaf.replace(value=leaf.value.update(shape=(num, *leaf.value.shape[1:]))) if path.startswith(LAYERS) else leaf
    for path, leaf in shapes.items()
  }


def frozen_shapes(config: LlamaConfig, top: TopLayers) -> dict:
  """Return the frozen tree as ShapeDtypeStructs, each boxed with the names of its axes, as `llama.shapes`."""
  shapes = _boxed(config, num_lower(config, top))
  return unflatten_dict({path: leaf for path, leaf in shapes.items() if _is_below(path)}, sep="/")


def shapes(config: LlamaConfig, top: TopLayers) -> dict:
  """Return the trained tree as `frozen_shapes` returns the frozen one."""
  num_lower(config, top)
  trained = {path: leaf for path, leaf in _boxed(config, top.num).items() if path != "embed"}
  if top.markers:
    row = jax.ShapeDtypeStruct((len(top.markers), config.width), jnp.float32)
    trained["rows/embed"] = nn.LogicallyPartitioned(row, names=(AXES["M"], AXES["D"]))
  return unflatten_dict(trained, sep="/")


def _is_below(path: str) -> bool:
  return path == "embed" or path.startswith(LAYERS)


@dataclasses.dataclass(frozen=True)
class Part:
  """Entries `first` to `stop` of a weight along its first axis, in `dtype`, read when it is indexed."""

  weight: Any
  first: int
  stop: int
  dtype: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.stop - self.first, *self.weight.shape[1:]

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """Return `self[index]`; `index` is one slice for each axis."""
    start, stop, _ = index[0].indices(self.shape[0])
    return self.weight[(slice(self.first + start, self.first + stop), *index[1:])].astype(self.dtype)


def frozen_weights(base: Mapping, config: LlamaConfig, top: TopLayers, dtype: str) -> dict:
  """Return the frozen tree; `base` has all weights as `base.weights` returns them, in `dtype`."""
  num = num_lower(config, top)
  flat = flatten_dict(base, sep="/")
  lower = {path: Part(flat[path], 0, num, np.dtype(dtype)) for path in flat if path.startswith(LAYERS)}
  return unflatten_dict({"embed": flat["embed"], **lower}, sep="/")


def first_values(config: LlamaConfig, top: TopLayers, base: Mapping) -> dict:
  """Return the trained tree before the first step, weights for `sharding.place`, from all weights."""
  first, values = num_lower(config, top), {}
  for path, weight in flatten_dict(base, sep="/").items():
    if path != "embed":
      start = first if path.startswith(LAYERS) else 0
      values[path] = Part(weight, start, weight.shape[0], np.dtype(np.float32))
  if top.markers:
    values["rows/embed"] = adapters.rows_of(base["embed"], top.markers, config.width)
  return unflatten_dict(values, sep="/")


def merge(frozen: dict, trained: dict, top: TopLayers) -> dict:
  """Return all parameters in the dtype of the frozen ones; for arrays on devices."""
  below, above = flatten_dict(frozen, sep="/"), flatten_dict(trained, sep="/")
  dtype = below["embed"].dtype
  merged = {"embed": below["embed"]}
  for path, weight in above.items():
    if path == "rows/embed":
      merged["embed"] = below["embed"].at[jnp.asarray(top.markers)].set(weight.astype(dtype), unique_indices=True)
    else:
      cast = weight.astype(dtype)
      merged[path] = jnp.concatenate((below[path], cast)) if path.startswith(LAYERS) else cast
  return unflatten_dict(merged, sep="/")


@dataclasses.dataclass(frozen=True)
class JoinedWeight:
  """Stacked weight whose lower layers are frozen and read when indexed, and whose top layers are an array."""

  below: Any
  above: np.ndarray
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return self.below.shape[0] + len(self.above), *self.above.shape[1:]

  def __getitem__(self, index) -> np.ndarray:
    """Return `self[index]`; `index` is a whole number for a layer, `...`, or one slice for each axis."""
    if isinstance(index, int):
      return self[(slice(index, index + 1), *(slice(None),) * (len(self.shape) - 1))][0]
    index = (slice(None),) * len(self.shape) if index is ... else tuple(index)
    start, stop, _ = index[0].indices(self.shape[0])
    first, rest = self.below.shape[0], index[1:]
    parts = []
    if start < first:
      parts.append(self.below[(slice(start, min(stop, first)), *rest)])
    if stop > first:
      parts.append(self.above[(slice(max(start - first, 0), stop - first), *rest)])
    with np.errstate(over="ignore"):  # the readers of weights refuse infinity
      return np.concatenate([part.astype(self.dtype) for part in parts])


def merged(below: Mapping, trained: Mapping, top: TopLayers, dtype) -> dict:
  """Return all weights in `dtype`: the frozen ones, read when indexed, with the trained tree of NumPy arrays."""
  frozen, weights = flatten_dict(below, sep="/"), {}
  for path, array in flatten_dict(trained, sep="/").items():
    if path.startswith(LAYERS):
      weights[path] = JoinedWeight(frozen[path], array, np.dtype(dtype))
    elif path != "rows/embed":
      with np.errstate(over="ignore"):
        weights[path] = array.astype(dtype)
  rows = dict(zip(top.markers, trained["rows"]["embed"], strict=True)) if top.markers else {}
  weights["embed"] = adapters.MergedWeight(frozen["embed"], np.dtype(dtype), 1.0, None, rows)
  return unflatten_dict(weights, sep="/")

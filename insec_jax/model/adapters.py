"""The trained tree of LoRA: its shapes, its first values, and its merge with the frozen weights.

  {"layers": {"attn": {"wq": {"a": a_LDP, "b": b_LPNH}, "wk": ..., "wv": ..., "wo": {"a": a_LNHP, "b": b_LPD}},
              "mlp": {"gate": {"a": a_LDP, "b": b_LPF}, "up": ..., "down": {"a": a_LFP, "b": b_LPD}}},
   "rows": {"embed": row_MD, "head": row_MD}}

Letters are those of llama.py and lora.py. Only the chosen matrices are there; "rows" only where markers are trained,
and "head" only where the output matrix is not the embedding. All arrays are float32. Merged, a matrix is
w + scale * a b, summed over P, and row m of "rows" replaces the row of token `lora.markers[m]`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from insec_jax.config import LoraConfig
from insec_jax.model.build import RandomWeight
from insec_jax.model.hf import LETTERS
from insec_jax.model.llama import AXES, LlamaConfig
from insec_jax.model.lora import Lora, factors

FIRST_NUMBER = 100  # of the seeds of adapters; those of the weights are below


def lora_of(config: LoraConfig, markers: tuple[int, ...]) -> Lora | None:
  """Return what is trained beside the frozen weights; None where all weights are. `markers` are ids of tokens."""
  if not config.rank:
    return None
  rows = tuple(sorted(markers)) if config.marker_rows else ()
  return Lora(rank=config.rank, scale=config.scale, matrices=config.matrices, markers=rows)


def letters_of(config: LlamaConfig, lora: Lora) -> dict[str, str]:
  """Return the letters of each array of the trained tree by its path."""
  letters = {}
  for path, axes in LETTERS.items():
    if path.rpartition("/")[2] in lora.matrices:
      a, b = factors(axes)
      letters |= {f"{path}/a": f"L{a}", f"{path}/b": f"L{b}"}
  tables = ("embed",) if config.tied else ("embed", "head")
  return letters | ({f"rows/{table}": "MD" for table in tables} if lora.markers else {})


def shapes(config: LlamaConfig, lora: Lora) -> dict:
  """Return the trained tree as ShapeDtypeStructs, each boxed with the names of its axes, as `llama.shapes`."""
  sizes = {"P": lora.rank, "M": len(lora.markers)}

  def boxed(letters: str):
    shape = tuple(sizes[letter] if letter in sizes else config.size(letter) for letter in letters)
    return nn.LogicallyPartitioned(
      jax.ShapeDtypeStruct(shape, jnp.float32), names=tuple(AXES[letter] for letter in letters)
    )

  return unflatten_dict({path: boxed(letters) for path, letters in letters_of(config, lora).items()}, sep="/")


def unboxed_shapes(config: LlamaConfig, lora: Lora) -> dict:
  """Return the trained tree as ShapeDtypeStructs."""
  return nn.meta.unbox(shapes(config, lora))


def first_values(config: LlamaConfig, lora: Lora, base: Mapping, seed: int) -> dict:
  """Return the trained tree before the first step, weights for `sharding.place`; merged it is the base, in float32.

  `a` is normal with the variance 1 / (3 n) of PEFT's default, n the number of inputs of the matrix, drawn by the seed;
  `b` is 0. `base` has the frozen weights as `base.weights` returns them: rows begin as theirs.
  """
  key = tuple(np.asarray(jax.random.key_data(jax.random.key(seed))).tolist())
  values: dict[str, Any] = {}
  for number, (path, leaf) in enumerate(flatten_dict(unboxed_shapes(config, lora), sep="/").items(), FIRST_NUMBER):
    if path.endswith("/a"):
      deviation = (3 * math.prod(leaf.shape[1:-1])) ** -0.5
      values[path] = RandomWeight((*key, number), deviation, leaf.shape, True, np.dtype(np.float32))
    elif path.endswith("/b"):
      values[path] = np.zeros(leaf.shape, np.float32)
    else:
      values[path] = rows_of(base[path.removeprefix("rows/")], lora.markers, config.width)
  return unflatten_dict(values, sep="/")


def rows_of(table, tokens: tuple[int, ...], width: int) -> np.ndarray:
  """Return the rows of these tokens, float32, of a table that is read when it is indexed."""
  return np.concatenate([table[slice(row, row + 1), slice(0, width)] for row in tokens]).astype(np.float32)


def merge(frozen: dict, trained: dict, lora: Lora) -> dict:
  """Return the frozen weights with the trained tree merged into them, in their dtype; for arrays on devices."""
  flat, adapters = flatten_dict(frozen, sep="/"), flatten_dict(trained, sep="/")
  for path, weight in flat.items():
    if f"{path}/a" in adapters:
      a, b = adapters[f"{path}/a"], adapters[f"{path}/b"]
      product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision="highest"))(a, b)
      flat[path] = (weight.astype(jnp.float32) + lora.scale * product).astype(weight.dtype)
    elif f"rows/{path}" in adapters:
      rows_MD = adapters[f"rows/{path}"].astype(weight.dtype)
      flat[path] = weight.at[jnp.asarray(lora.markers)].set(rows_MD, unique_indices=True)
  return unflatten_dict(flat, sep="/")


@dataclasses.dataclass(frozen=True)
class MergedWeight:
  """Weight of the base with its adapter or its trained rows, merged in float32 when it is indexed, then cast once."""

  base: Any  # a weight of `base.weights`
  dtype: np.dtype
  scale: float
  factors: tuple[np.ndarray, np.ndarray] | None  # a and b of all layers
  row_of_token: Mapping[int, np.ndarray]

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.base.shape)

  def __getitem__(self, index) -> np.ndarray:
    """Return `self[index]`; `index` is a whole number for a layer, `...`, or one slice for each axis."""
    if isinstance(index, int):
      return self[(slice(index, index + 1), *(slice(None),) * (len(self.shape) - 1))][0]
    index = (slice(None),) * len(self.shape) if index is ... else tuple(index)
    part, first = self.base[index], index[0].indices(self.shape[0])[0]
    out = np.empty(part.shape, self.dtype)
    with np.errstate(over="ignore"):  # the readers of weights refuse infinity
      if self.factors is None:
        out[...] = part
        for token, row_D in self.row_of_token.items():
          if first <= token < first + len(out):
            out[token - first] = row_D[index[1]]
      else:
        for place in range(len(out)):
          out[place] = part[place].astype(np.float32) + self._product(first + place, index[1:])
    return out

  def _product(self, layer: int, index: tuple[slice, ...]) -> np.ndarray:
    a, b = self.factors or ()
    ins, outs = index[: a.ndim - 2], index[a.ndim - 2 :]
    return np.float32(self.scale) * np.tensordot(a[(layer, *ins)], b[(layer, slice(None), *outs)], 1)


def merged(base: Mapping, trained: Mapping, lora: Lora, dtype) -> dict:
  """Return the base with the trained tree of NumPy arrays, each weight a `MergedWeight` in `dtype`."""
  adapters = flatten_dict(trained, sep="/")
  weights = {}
  for path, weight in flatten_dict(base, sep="/").items():
    pair = (adapters[f"{path}/a"], adapters[f"{path}/b"]) if f"{path}/a" in adapters else None
    rows = dict(zip(lora.markers, adapters[f"rows/{path}"], strict=True)) if f"rows/{path}" in adapters else {}
    weights[path] = MergedWeight(weight, np.dtype(dtype), lora.scale, pair, rows)
  return unflatten_dict(weights, sep="/")

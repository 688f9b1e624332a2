"""LoRA (arXiv 2106.09685): products with low-rank adapters, and trained rows of marker tokens.

Letters are those of llama.py, and
  P rank of an adapter   M marker, a token whose rows of the embedding and of the output matrix are trained

A frozen matrix w [ins..., outs...] with an adapter a [ins..., P], b [P, outs...] acts as w + scale * a b. Training
computes x w + scale * (x a) b, and never the sum of the matrices. adapters.py has the tree of all adapters. There is no
dropout.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from insec_jax.model import products, sharding

COLLECTION = "adapters"  # of Llama's variables: the trained tree; the frozen weights are "params"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
  """What is trained beside the frozen weights; `markers` are token ids, empty where no rows are trained."""

  rank: int
  scale: float
  matrices: tuple[str, ...]
  markers: tuple[int, ...]


class Adapted(NamedTuple):
  """Frozen matrix with its adapter; with a mesh, the device's part."""

  weight: Any
  a: Any
  b: Any
  scale: float


def factors(letters: str) -> tuple[str, str]:
  """Return the letters of `a` and `b` for those of a matrix of a layer, which has the width D first or last."""
  ins, outs = (letters[0], letters[1:]) if letters[0] == "D" else (letters[:-1], letters[-1])
  return ins + "P", "P" + outs


def adapted(weight, adapter: dict, letters: str, axis_names: dict[str, str], scale: float, mesh) -> Adapted:
  """Return the device's part of a matrix of these letters with its adapter {"a", "b"}, gathered along fsdp.

  The factor that all devices of `tensor` hold alike multiplies with another part of the heads or of the MLP width on
  each: its gradient is summed over them.
  """

  def whole(shard, letters):
    axes = tuple(axis_names[letter] for letter in letters)
    factor = sharding.whole(shard, axes, mesh)
    return factor if any(sharding.RULES[axis] == sharding.TENSOR for axis in axes) else sharding.enter(factor, mesh)

  a, b = factors(letters)
  return Adapted(weight, whole(adapter["a"], a), whole(adapter["b"], b), scale)


def product(dot, letters: str, x, adapted: Adapted):
  """Return `dot(letters, x, w + scale * a b)`, computed from `x a`.

  Where `x` is a part of the MLP width or of the heads, so is the sum in each entry of the result: both terms are summed
  over `tensor` afterwards.
  """
  inputs, out = letters.split("->")
  read, matrix = inputs.split(",")
  a, b = factors(matrix)
  low = "".join(letter for letter in read if letter in out) + "P"
  x_low = dot(f"{read},{a}->{low}", x, adapted.a) * adapted.scale
  return dot(letters, x, adapted.weight) + products.widening(f"{low},{b}->{out}", x_low, adapted.b.astype(x_low.dtype))


def places(markers: tuple[int, ...], first, num: int):
  """Return the place of each marker among `num` tokens from `first` on, [M]; `num` for one that is not among them."""
  index_M = jnp.asarray(markers, jnp.int32) - first
  return jnp.where((index_M >= 0) & (index_M < num), index_M, num)


def replacing(rows_MD, markers: tuple[int, ...]):
  """Return the function for `sharding.look_up` that puts the rows of the markers in place of the embedding's."""

  def replaced(row_BTD, token_BT):
    is_marker_BTM = token_BT[..., None] == jnp.asarray(markers, jnp.int32)[None, None]
    trained_BTD = jnp.take(rows_MD, is_marker_BTM.argmax(-1), axis=0).astype(row_BTD.dtype)
    return jnp.where(is_marker_BTM.any(-1, keepdims=True), trained_BTD, row_BTD)

  return replaced

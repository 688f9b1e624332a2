"""Weights of a step: the trained tree and the frozen one, cast, as the variables of the model and as the head.

Without frozen weights the trained tree is all parameters. With LoRA it is that of model/adapters.py, with the top
layers that of model/top_layers.py. See model/casting.py for the slots of layers.
"""

from typing import Any, NamedTuple

from insec_jax.model import casting, llama
from insec_jax.model.lora import COLLECTION


class Weights(NamedTuple):
  """Weights as the loss differentiates them: in `trained`, with slots where `layers` are those to compute with.

  `layers` and `frozen_layers` are None where the weights of the trees have the compute dtype.
  """

  trained: Any
  frozen: Any
  layers: Any = None
  frozen_layers: Any = None


def cast(model: llama.Llama, trained, frozen, *, gradient: str) -> Weights:
  """Return the weights in the compute dtype, in which `gradient` is the dtype of stacked gradients of layers."""
  if frozen is None:
    trained, layers = casting.with_slots(trained, model.compute, gradient)
    return Weights(trained, None, layers)
  frozen, frozen_layers = casting.with_slots(frozen, model.compute, model.compute)
  if not model.num_top:
    return Weights(casting.cast(trained, model.compute), frozen, None, frozen_layers)
  trained, layers = casting.with_slots(trained, model.compute, gradient)
  return Weights(trained, frozen, layers, frozen_layers)


class Head(NamedTuple):
  """Output matrix, the rows that replace those of `markers`, and these; `markers` None: the matrix is trained."""

  weight_VD: Any
  rows_MD: Any
  markers: tuple[int, ...] | None


def variables_of(model: llama.Llama, weights: Weights) -> dict:
  """Return the variables of `model.apply`."""
  if not model.num_top:
    stacks, layers = ("layers",), {"layers": weights.layers if weights.frozen is None else weights.frozen_layers}
    params = weights.trained if weights.frozen is None else weights.frozen
    variables = {} if model.lora is None else {COLLECTION: weights.trained}
  else:
    stacks, layers = ("layers", "top"), {"layers": weights.frozen_layers, "top": weights.layers}
    above = {name: tree for name, tree in weights.trained.items() if name not in ("layers", "rows")}
    params = {**weights.frozen, **above, "top": weights.trained["layers"]}
    variables = {COLLECTION: {"rows": weights.trained["rows"]}} if model.markers else {}
  slots = {name: params[name] for name in stacks if layers[name] is not None}
  params = params | {name: layers[name] for name in slots}
  return {"params": params, **variables, **({casting.COLLECTION: slots} if slots else {})}


def head_of(model: llama.Llama, weights: Weights) -> Head:
  """Return the output matrix and what is trained of it."""
  trained, frozen, config = weights.trained, weights.frozen, model.config
  if frozen is None:
    return Head(llama.head(trained, config), None, None)
  if model.num_top:
    if not config.tied:
      return Head(trained["head"], None, None)
    return Head(frozen["embed"], trained["rows"]["embed"] if model.markers else None, model.markers)
  markers = model.lora.markers if model.lora else ()
  return Head(llama.head(frozen, config), llama.head(trained["rows"], config) if markers else None, markers)

"""What a run trains beside frozen weights: adapters (LoRA) or the top layers; one interface for both.

The trained tree and the frozen one are apart, so no copy, gradient or moment of a frozen weight can arise.
"""

from collections.abc import Mapping

import flax.linen as nn

from insec_jax.config import Config
from insec_jax.model import adapters, llama, top_layers
from insec_jax.model.attention import XLA, Attention
from insec_jax.model.llama import LlamaConfig
from insec_jax.model.lora import Lora
from insec_jax.model.top_layers import TopLayers

Part = Lora | TopLayers


def part_of(config: Config, markers: tuple[int, ...]) -> Part | None:
  """Return what a run trains, None where it trains all weights; `markers` are the ids of the markers."""
  if config.train.top_layers:
    rows = tuple(sorted(markers)) if config.train.marker_rows else ()
    return TopLayers(num=config.train.top_layers, markers=rows)
  return adapters.lora_of(config.lora, markers)


def model_of(
  config: LlamaConfig, compute: str, remat: str, attention: Attention = XLA, part: Part | None = None
) -> llama.Llama:
  """Return the module that a run trains, for the variables of training/variables.py."""
  if isinstance(part, TopLayers):
    return llama.Llama(config, compute, remat, attention, num_top=part.num, markers=part.markers)
  return llama.Llama(config, compute, remat, attention, lora=part)


def shapes(config: LlamaConfig, part: Part) -> dict:
  """Return the trained tree as float32 ShapeDtypeStructs, each boxed with the names of its axes."""
  return top_layers.shapes(config, part) if isinstance(part, TopLayers) else adapters.shapes(config, part)


def unboxed_shapes(config: LlamaConfig, part: Part) -> dict:
  """Return the trained tree as ShapeDtypeStructs."""
  return nn.meta.unbox(shapes(config, part))


def frozen_shapes(config: LlamaConfig, part: Part) -> dict:
  """Return the frozen tree as `shapes` returns the trained one."""
  return top_layers.frozen_shapes(config, part) if isinstance(part, TopLayers) else llama.shapes(config)


def frozen_weights(base: Mapping, config: LlamaConfig, part: Part, dtype: str) -> Mapping:
  """Return the frozen tree of all weights, which `base.weights` has returned in `dtype`."""
  return top_layers.frozen_weights(base, config, part, dtype) if isinstance(part, TopLayers) else base


def first_values(config: LlamaConfig, part: Part, base: Mapping, seed: int) -> dict:
  """Return the trained tree before the first step, weights for `sharding.place`; `base` has all weights."""
  if isinstance(part, TopLayers):
    return top_layers.first_values(config, part, base)
  return adapters.first_values(config, part, base, seed)


def merge(frozen: dict, trained: dict, part: Part) -> dict:
  """Return all parameters in the dtype of the frozen ones; for arrays on devices."""
  return (top_layers.merge if isinstance(part, TopLayers) else adapters.merge)(frozen, trained, part)


def merged(frozen: Mapping, trained: Mapping, part: Part, dtype) -> dict:
  """Return all weights, read and merged when they are indexed; `trained` has NumPy arrays."""
  return (top_layers.merged if isinstance(part, TopLayers) else adapters.merged)(frozen, trained, part, dtype)

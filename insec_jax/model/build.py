"""The model of a run before its first step: new from a size or loaded from a Hugging Face folder, and grown by rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import tokens
from insec_jax.files import hub
from insec_jax.model import hf, hf_config, llama, markings, sharding
from insec_jax.model.llama import LlamaConfig

VOCAB_MULTIPLE = 128


def model_of_size(size: dict[str, Any], num_tokens: int | None, **ids: int | None) -> LlamaConfig:
  """Return the model of model.size, with a vocabulary of `num_tokens` where the size names none.

  `ids` are fields of config.json. Raises InputError when the vocabulary of the size is smaller than `num_tokens`.
  """
  fields = {"architectures": ["LlamaForCausalLM"], **ids, "vocab_size": None, **size}
  if fields["vocab_size"] is None:
    fields["vocab_size"] = num_tokens
  elif num_tokens is not None and fields["vocab_size"] < num_tokens:
    raise InputError(
      f"model.size.vocab_size={fields['vocab_size']} is below the {num_tokens} tokens of the "
      "tokenizer; give at least that many, or None for as many"
    )
  return hf_config.config_from_json(fields, "model.size")


def starting_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
  """Return the config of the model before its vocabulary grows, with every token that ends a text.

  Raises InputError as `markings.check_rewind` does.
  """
  if config.model.path:
    folder = hub.model_folder(config.model.path, "model.path", weights=False)
    model_config = hf.read_config(folder)
    markings.check_rewind(folder, config)
  else:
    model_config = model_of_size(
      config.model.size,
      len(tokenizer),
      bos_token_id=tokenizer.bos_token_id,
      eos_token_id=tokenizer.eos_token_id,
      pad_token_id=tokenizer.pad_token_id,
    )
  return with_ends(model_config, tokenizer, vocab_size=vocabulary_for(len(tokenizer), model_config.vocab_size))


def with_ends(model_config: LlamaConfig, tokenizer: PreTrainedTokenizerFast, *, vocab_size: int) -> LlamaConfig:
  """Return the config with every token that ends a text; InputError if one is not among the first `vocab_size`."""
  eos_ids = tokens.stop_ids(model_config.eos_ids, tokenizer, vocab_size=vocab_size)
  return dataclasses.replace(model_config, eos_ids=eos_ids)


def starting_params(config: Config, before: LlamaConfig, vocab_size: int, mesh: Mesh, shardings) -> dict:
  """Return the weights of model.path, or random ones drawn by the seed, with this many rows for tokens.

  `before` is `starting_model`; `shardings` are those of the params that are returned.
  """
  dtype = config.precision.params
  if not config.model.path:
    grown = dataclasses.replace(before, vocab_size=vocab_size)
    return init(grown, jax.random.key(config.seed), dtype, shardings=shardings)
  folder = hub.model_folder(config.model.path, "model.path")
  params = hf.load(folder, before, dtype=dtype, shardings=sharding.params_shardings(llama.shapes(before), mesh))
  if vocab_size > before.vocab_size:
    # Only the matrices that grow: the others need no copy.
    rows = {name: params[name] for name in ("embed", "head") if name in params}
    params |= jax.jit(
      lambda rows: grow_vocabulary(rows, before, vocab_size)[0],
      out_shardings={name: shardings[name] for name in rows},
    )(rows)
  return params


@dataclasses.dataclass(frozen=True)
class RandomWeight:
  """Random weight, drawn when it is indexed; each layer has its own seed, so values do not depend on the sharding."""

  seed: tuple[int, ...]
  deviation: float | None  # None: all ones
  shape: tuple[int, ...]
  stacked: bool
  dtype: np.dtype

  def __getitem__(self, index) -> np.ndarray:
    """Return `self[index]`; `index` is one slice for each axis."""
    if not self.stacked:
      return self._draw(0, self.shape)[index].astype(self.dtype)
    return np.stack(
      [self._draw(layer, self.shape[1:])[index[1:]].astype(self.dtype) for layer in range(self.shape[0])[index[0]]]
    )

  def _draw(self, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    if self.deviation is None:
      return np.ones(shape, np.float32)
    return np.random.default_rng((*self.seed, layer)).standard_normal(shape, np.float32) * np.float32(self.deviation)


def random_weights(config: LlamaConfig, key, dtype) -> dict:
  """Return the params, each a `RandomWeight`: norms 1, the others normal with the config's standard deviation.

  NumPy draws them: compiling threefry for every weight takes longer than the toy's first hundred steps.
  """
  if config.init_std is None:
    raise InputError("the model has no initializer_range, the deviation of random weights; give one, such as 0.02")
  seed = tuple(np.asarray(jax.random.key_data(key)).tolist())
  paths = [path for path in hf.NAMES if path != "head" or not config.tied]
  weights = {}
  for number, path in enumerate(paths):
    stacked = path.startswith("layers/")
    shape = (config.num_layers,) * stacked + tuple(config.size(letter) for letter in hf.LETTERS[path])
    deviation = None if hf.LETTERS[path] == "D" else config.init_std
    weights[path] = RandomWeight((*seed, number), deviation, shape, stacked, np.dtype(dtype))
  return unflatten_dict(weights, sep="/")


def init(config: LlamaConfig, key, dtype, *, shardings=None) -> dict:
  """Return `random_weights` on the devices; the same on any mesh, each device's shard made on its host."""
  return sharding.place(random_weights(config, key, dtype), shardings)


def vocabulary_for(num_tokens: int, vocab_size: int) -> int:
  """Return the vocabulary size for a tokenizer: the model's own if it holds all tokens, else a VOCAB_MULTIPLE."""
  return vocab_size if num_tokens <= vocab_size else -(-num_tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def grow_vocabulary(params, config: LlamaConfig, new_size: int) -> tuple[dict, LlamaConfig]:
  """Return (params, config) with rows added to the embedding and the output matrix, each the mean of the old rows.

  With the mean, a new token starts as likely as an average one. Raises InputError unless `new_size` is a multiple of
  128, which divides over devices, and at least the present size.
  """
  if new_size % VOCAB_MULTIPLE or new_size < config.vocab_size:
    raise InputError(
      f"the vocabulary cannot go from {config.vocab_size} to {new_size} tokens; the new size must be a "
      f"multiple of {VOCAB_MULTIPLE} and no smaller"
    )

  def grown(matrix_VD):
    mean_D = matrix_VD.astype(jnp.float32).mean(0).astype(matrix_VD.dtype)
    added = jnp.broadcast_to(mean_D[None], (new_size - config.vocab_size, config.width))
    return jnp.concatenate((matrix_VD, added))

  names = ("embed",) if config.tied else ("embed", "head")
  return {**params, **{name: grown(params[name]) for name in names}}, dataclasses.replace(config, vocab_size=new_size)

"""Models with and without markers, as the programs load them; their layers are left out."""

import datakit
import jax
import reference

from insec_jax.generation import placement
from insec_jax.generation.loading import LoadedModel, with_markers
from insec_jax.model.hf_config import config_from_json

SPARE = datakit.config(tokenizer__flag="<|spare_0|>", tokenizer__fix="<|spare_1|>")
NEW = datakit.config(tokenizer__flag="<err>", tokenizer__fix="<fix>")
SURE = datakit.config(tokenizer__flag="<err>", tokenizer__fix="<fix>", tokenizer__confidence=(0.5, 5.0))


def untuned() -> LoadedModel:
  tokenizer = datakit.bpe_tokenizer()
  config = config_from_json(reference.FIELDS | {"vocab_size": len(tokenizer), "eos_token_id": [3]}, "config.json")
  shape = (len(tokenizer), config.width)
  params = {"embed": jax.random.normal(jax.random.key(0), shape), "head": jax.random.normal(jax.random.key(1), shape)}
  return LoadedModel(config, params, tokenizer, placement.one_device(), "float32")


def trained(config) -> LoadedModel:
  return with_markers(untuned(), config, "here")

"""Shape of the model that a config names, without its weights."""

import dataclasses

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import vocabulary
from insec_jax.files import hub
from insec_jax.model import build, hf, llama, parts


def model_of(config: Config) -> llama.LlamaConfig:
  """Return the config of the model in the train step, its vocabulary grown for the tokenizer as in train."""
  if not config.model.path:
    size = config.model.size
    is_given = size.get("vocab_size") is not None
    return build.model_of_size(size, None if is_given else len(vocabulary.open_tokenizer(config).tokenizer))
  folder = hub.model_folder(config.model.path, "model.path", weights=False)
  if not (folder / hf.CONFIG).is_file():
    raise InputError(
      f"model.path={config.model.path!r} is no folder with a {hf.CONFIG} here; give --config.model.path=FOLDER "
      "(weights are not read), or a config with model.size, such as configs/llama31_8b.py:shape"
    )
  model_config = hf.read_config(folder)
  if not ((vocabulary.tokenizer_folder(config) or folder) / "tokenizer.json").is_file():
    return model_config
  num_tokens = len(vocabulary.open_tokenizer(config).tokenizer)
  return dataclasses.replace(model_config, vocab_size=build.vocabulary_for(num_tokens, model_config.vocab_size))


def part_of(config: Config, model_config: llama.LlamaConfig) -> parts.Part | None:
  """Return what a run trains beside frozen weights, None where it trains all.

  The markers are as many as in train, the last tokens. Raises InputError where the size depends on the data.
  """
  if config.train.stream_cache or config.train.vocabulary != "all":
    raise InputError(
      "no data is read here, and the sizes of train.stream_cache and train.vocabulary='used' depend on it; give "
      "--config.train.stream_cache= --config.train.vocabulary=all"
    )
  num = 2 + len(config.tokenizer.confidence_names)
  return parts.part_of(config, tuple(range(model_config.vocab_size - num, model_config.vocab_size)))

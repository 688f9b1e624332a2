"""Shapes of models for config files: values of `model.size`, the fields of a config.json."""

from typing import Any


def llama31(*, width: int, mlp_width: int, num_layers: int, num_heads: int) -> dict[str, Any]:
  """Return `model.size` of a Llama 3.1 of this shape: the fields of its config.json, the others as in the 8B."""
  scaling = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
  )
  sizes = dict(
    hidden_size=width,
    intermediate_size=mlp_width,
    num_hidden_layers=num_layers,
    num_attention_heads=num_heads,
    num_key_value_heads=8,
    vocab_size=128_256,
    max_position_embeddings=131_072,
  )
  others = dict(rms_norm_eps=1e-5, rope_theta=500_000.0, initializer_range=0.02, tie_word_embeddings=False)
  return dict(model_type="llama", hidden_act="silu", **sizes, **others, rope_scaling=scaling)


def small_llama(*, num_layers: int) -> dict[str, Any]:
  """Return `model.size` of a Llama of width 128 for experiments on a CPU, with the vocabulary of the tokenizer."""
  size = llama31(width=128, mlp_width=352, num_layers=num_layers, num_heads=4)
  del size["rope_scaling"]
  small = dict(vocab_size=None, max_position_embeddings=512, rope_theta=10_000.0, initializer_range=0.05)
  return size | dict(num_key_value_heads=2) | small

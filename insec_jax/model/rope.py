"""Rotary position embedding of Llama 3 (arXiv 2104.09864), paired as in Hugging Face's port. Letters: llama.py."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Scaling of the frequencies of rotary positions, as in Llama 3.1.

  Wavelengths, in positions, above original_max_positions / low_freq_factor are multiplied by `factor`; those below
  original_max_positions / high_freq_factor are unchanged; frequencies between are interpolated.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


def frequencies(config) -> np.ndarray:
  """Return the radians per position of each pair of a head, float32 [H / 2], computed in float32 as HF does.

  `config` is a LlamaConfig.
  """
  exponent = np.arange(0, config.head_width, 2, dtype=np.float32) / np.float32(config.head_width)
  frequency = np.float32(1) / np.float32(config.rope_theta) ** exponent
  if config.rope_scaling is None:
    return frequency
  scaling = config.rope_scaling
  wavelength = np.float32(2 * math.pi) / frequency
  # 1 where a wave fits original_max_positions more than high_freq_factor times, 0 below low_freq_factor times.
  keep = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  keep = np.clip(keep, 0, 1).astype(np.float32)
  return ((1 - keep) * frequency / np.float32(scaling.factor) + keep * frequency).astype(np.float32)


def angles(config, position_BT):
  """Return (cos, sin) of the rotary angles, each float32 [B, T, 1, H / 2]."""
  # Angles in float32: bfloat16 rounds position 257 to 256.
  angle_BTH = position_BT[..., None].astype(jnp.float32) * frequencies(config)[None, None]
  return jnp.cos(angle_BTH)[:, :, None], jnp.sin(angle_BTH)[:, :, None]


def rotate(x_BTNH, rope):
  """Rotate pair (i, i + H / 2) of each head by its angle, paired as in HF; computed in float32."""
  cos_BT1H, sin_BT1H = rope
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
  rotated = jnp.concatenate((first * cos_BT1H - second * sin_BT1H, second * cos_BT1H + first * sin_BT1H), -1)
  return rotated.astype(x_BTNH.dtype)

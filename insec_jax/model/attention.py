"""Attention within packed rows, and the one place that chooses how it is computed. Letters: model/llama.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # a score; finite, so a row that may read nothing gives finite numbers


class Attention(NamedTuple):
  """One way to compute attention.

  prepare(segment_BT) -> where     once per batch: what every layer needs to know about who reads whom
  attend(q_BTNH, k_BSKH, v_BSKH, where) -> context_BTNH
  """

  prepare: Callable[[jax.Array], Any]
  attend: Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


def causal_within_segments(segment_BT):
  """Boolean [B, T, S]: position t reads position s of its own segment, up to itself.

      segment      1  1  2  2  0
      t = 0 reads  x
      t = 1        x  x
      t = 2              x
      t = 3              x  x
      t = 4                    x     padding reads padding; nobody reads the result
  """
  T = segment_BT.shape[1]
  causal_TS = jnp.tri(T, dtype=bool)
  return (segment_BT[:, :, None] == segment_BT[:, None, :]) & causal_TS[None]


def attend(q_BTNH, k_BSKH, v_BSKH, allowed_BTS):
  """Grouped-query attention; scores and softmax in float32, result in the dtype of `v`."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  precision = "highest" if v_BSKH.dtype == jnp.float32 else None  # TPU would multiply float32 in bfloat16
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  score_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, precision=precision,
                           preferred_element_type=jnp.float32)
  score_BKGTS = jnp.where(allowed_BTS[:, None, None], score_BKGTS * H**-0.5, MASKED)
  weight_BKGTS = jax.nn.softmax(score_BKGTS).astype(v_BSKH.dtype)
  context_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weight_BKGTS, v_BSKH, precision=precision)
  return context_BTKGH.reshape(B, T, N, H)


XLA = Attention(prepare=causal_within_segments, attend=attend)


def choose(platform: str) -> tuple[Attention, str]:
  """The attention for "cpu", "gpu" or "tpu", and the reason, to be printed."""
  return XLA, f"plain XLA attention on {platform}: exact with segments on every platform; keeps T x T scores per head"

"""Attention within packed rows, and the one place that chooses how it is computed. Letters: model/llama.py."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MASKED = -1e30  # a score; finite, so a row that may read nothing gives finite numbers


class Attention(NamedTuple):
  """One way to compute attention.

  prepare(segment_BT) -> mask     once per batch: what every layer needs to know about who reads whom
  attend(q_BTNH, k_BSKH, v_BSKH, mask) -> context_BTNH

  What its backward pass needs from the forward one, it names "context" (jax.ad_checkpoint): a kernel also logsumexp.
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
  score_BKGTS = jnp.einsum(
    "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, precision=precision, preferred_element_type=jnp.float32
  )
  score_BKGTS = jnp.where(allowed_BTS[:, None, None], score_BKGTS * H**-0.5, MASKED)
  weight_BKGTS = jax.nn.softmax(score_BKGTS).astype(v_BSKH.dtype)
  context_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weight_BKGTS, v_BSKH, precision=precision)
  return checkpoint_name(context_BTKGH.reshape(B, T, N, H), "context")


def attend_one(q_B1NH, k_BKSH, v_BKSH, allowed_B1S):
  """`attend` for a single query: the same products, added up without a dot."""
  B, _, N, H = q_B1NH.shape
  K = k_BKSH.shape[1]
  q_BKG1H = q_B1NH.reshape(B, K, N // K, 1, H).astype(jnp.float32)
  score_BKGS = (q_BKG1H * k_BKSH[:, :, None]).sum(-1)
  score_BKGS = jnp.where(allowed_B1S[:, None], score_BKGS * H**-0.5, MASKED)
  weight_BKGS = jax.nn.softmax(score_BKGS)
  context_BKGH = (weight_BKGS[..., None] * v_BKSH[:, :, None]).sum(3)
  return context_BKGH.reshape(B, 1, N, H).astype(v_BKSH.dtype)


def attend_cached(q_BTNH, k_BKSH, v_BKSH, allowed_BTS):
  """`attend`, with keys and values as a cache holds them."""

  def with_dots(q_BTNH, k_BKSH, v_BKSH, allowed_BTS):
    return attend(q_BTNH, k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2), allowed_BTS)

  # On CPU a dot of one query goes through the heads of the rows one by one.
  one_by_one = {"cpu": attend_one} if q_BTNH.shape[1] == 1 else {}
  return jax.lax.platform_dependent(q_BTNH, k_BKSH, v_BKSH, allowed_BTS, **one_by_one, default=with_dots)


XLA = Attention(prepare=causal_within_segments, attend=attend)


# The kernels of a platform, imported where they are chosen: they stand on corners of jax that come and go.
KERNELS = {"tpu": "attention_tpu", "gpu": "attention_gpu"}


@functools.cache  # one object for one way: what is jitted over it is compiled once
def kernel(platform: str, block: int, *, interpret: bool = False) -> Attention:
  """The kernel of "tpu" or "gpu"; rows are a multiple of `block`, arrays local to the device."""
  module = importlib.import_module(f"insec_jax.model.{KERNELS[platform]}")
  return Attention(
    prepare=functools.partial(module.prepare, block=block),
    attend=functools.partial(module.attend, block=block, interpret=interpret),
  )


def choose(platform: str, *, device_kind: str, head_width: int, row_length: int, compute: str) -> tuple[Attention, str]:
  """The attention for devices that may be elsewhere, and the reason, to be printed.

  platform and device_kind are jax.Device's. What a kernel cannot do, or has not been seen to do, plain XLA does.
  """
  if platform not in KERNELS:
    return XLA, plain(platform, "no kernel for it")
  module = importlib.import_module(f"insec_jax.model.{KERNELS[platform]}")
  if compute != "bfloat16":
    return XLA, plain(platform, f"the kernel would multiply {compute} in fewer bits")
  if head_width not in module.HEAD_WIDTHS:
    return XLA, plain(
      platform, f"the kernel is tested for heads of {' and '.join(map(str, module.HEAD_WIDTHS))}, not {head_width}"
    )
  if row_length % module.MULTIPLE:
    return XLA, plain(platform, f"data.row_length={row_length} is no multiple of the kernel's {module.MULTIPLE}")
  if device_kind not in module.DEVICE_KINDS:
    return XLA, plain(platform, f"the kernel (model/{KERNELS[platform]}.py) is not known to work on {device_kind!r}")
  block = module.block_of(row_length)
  return kernel(platform, block), (
    f"{module.NAME} attention on {platform} ({device_kind}): blocks of {block} "
    "positions, those without a common segment skipped; keeps no scores"
  )


def plain(platform: str, why: str) -> str:
  return f"plain XLA attention on {platform}: {why}; exact with segments on every platform, keeps T x T scores per head"

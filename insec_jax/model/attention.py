"""Attention within packed rows, and the choice of its implementation. Letters: model/llama.py."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 128  # queries of a block, or a multiple of it in a long row
MOST_BLOCKS = 32  # of a row: each is compiled by itself
MASKED = -1e30  # a score; finite, so that a position without any allowed key gives finite numbers


class Attention(NamedTuple):
  """Implementation of attention.

  prepare(segment_BT[, until_BT]) -> mask     once per batch: the mask that all layers share
  attend(q_BTNH, k_BSKH, v_BSKH, mask) -> context_BTNH

  With until_BT, which kernels do not take, position s is read by those before until_s only (method/rewind.py).
  The residuals of its backward pass have the checkpoint name "context" (jax.ad_checkpoint); a kernel's include
  logsumexp.
  """

  prepare: Callable[..., Any]
  attend: Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


def causal_within_segments(segment_BT, until_BT=None):
  """Return a boolean [B, T, S]: position t reads position s of its own segment, up to itself.

  segment      1  1  2  2  0
  t = 0 reads  x
  t = 1        x  x
  t = 2              x
  t = 3              x  x
  t = 4                    x     padding reads padding; the result is not used

  With until_BT, position t reads s only if t < until_s.
  """
  T = segment_BT.shape[1]
  causal_TS = jnp.tri(T, dtype=bool)
  allowed_BTS = (segment_BT[:, :, None] == segment_BT[:, None, :]) & causal_TS[None]
  return allowed_BTS if until_BT is None else allowed_BTS & (jnp.arange(T)[None, :, None] < until_BT[:, None])


def attend(q_BTNH, k_BSKH, v_BSKH, allowed_BTS):
  """Apply grouped-query attention; scores and softmax in float32, result in the dtype of `v`."""
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


def attend_cached(q_BTNH, k_BKSH, v_BKSH, allowed_BTS):
  """Apply `attend` to keys and values in the layout of the cache."""
  return attend(q_BTNH, k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2), allowed_BTS)


def attend_transposed(q_BTNH, k_BKHS, v_BKSH, allowed_BTS):
  """Apply `attend` to a cache with transposed keys; a single query has the same products, summed without a dot.

  On CPU a dot of one query loops over the heads of each row. Both sums are over the last axis but one, so that the
  products of each of its elements fill vectors.
  """
  B, T, N, H = q_BTNH.shape
  if T > 1:
    return attend(q_BTNH, k_BKHS.transpose(0, 3, 1, 2), v_BKSH.swapaxes(1, 2), allowed_BTS)
  K = k_BKHS.shape[1]
  q_BKGH1 = q_BTNH.reshape(B, K, N // K, H, 1).astype(jnp.float32)
  score_BKGS = (q_BKGH1 * k_BKHS[:, :, None]).sum(3)
  score_BKGS = jnp.where(allowed_BTS[:, None], score_BKGS * H**-0.5, MASKED)
  weight_BKGS = jax.nn.softmax(score_BKGS)
  context_BKGH = (weight_BKGS[..., None] * v_BKSH[:, :, None]).sum(3)
  return context_BKGH.reshape(B, 1, N, H).astype(v_BKSH.dtype)


class RowMask(NamedTuple):
  """Mask of `attend_in_blocks`: the arguments of `causal_within_segments`."""

  segment_BT: jax.Array
  until_BT: jax.Array | None = None


def attend_in_blocks(q_BTNH, k_BTKH, v_BTKH, mask: RowMask):
  """Return grouped-query attention, a block of queries at a time, as `attend` with `causal_within_segments`.

  A block of queries reads the keys up to its own end, which halves the products. The backward pass computes the scores
  of a block again, so that no array of T x T scores is ever whole.
  """
  T = q_BTNH.shape[1]
  block = BLOCK * -(-T // (BLOCK * MOST_BLOCKS))

  @jax.checkpoint
  def attend_block(q_BQNH, k_BSKH, v_BSKH, segment_BQ, segment_BS, until_BS):
    B, Q, N, H = q_BQNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    precision = "highest" if v_BSKH.dtype == jnp.float32 else None
    at_Q, at_S = S - Q + jnp.arange(Q), jnp.arange(S)
    allowed_BQS = (segment_BQ[:, :, None] == segment_BS[:, None]) & (at_Q[:, None] >= at_S[None])[None]
    if until_BS is not None:
      allowed_BQS &= at_Q[None, :, None] < until_BS[:, None]
    # The query heads of a key head in one product; M = G * Q.
    q_BKMH = q_BQNH.reshape(B, Q, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * Q, H)
    score_BKMS = jnp.einsum("BKMH,BSKH->BKMS", q_BKMH, k_BSKH, precision=precision, preferred_element_type=jnp.float32)
    score_BKGQS = jnp.where(allowed_BQS[:, None, None], score_BKMS.reshape(B, K, G, Q, S) * H**-0.5, MASKED)
    weight_BKMS = jax.nn.softmax(score_BKGQS).astype(v_BSKH.dtype).reshape(B, K, G * Q, S)
    context_BKMH = jnp.einsum("BKMS,BSKH->BKMH", weight_BKMS, v_BSKH, precision=precision)
    return context_BKMH.reshape(B, K, G, Q, H).transpose(0, 3, 1, 2, 4).reshape(B, Q, N, H)

  contexts = []
  for start in range(0, T, block):
    rows, keys = slice(start, min(start + block, T)), slice(0, min(start + block, T))
    q_BQNH = q_BTNH[:, rows]
    if contexts:  # one block after the other, in the backward pass too: scores of two need not be held at once
      q_BQNH, contexts[-1] = jax.lax.optimization_barrier((q_BQNH, contexts[-1]))
    segment_BS, until_BS = jax.tree.map(lambda x_BT: x_BT[:, keys], mask)  # noqa: B023, mapped at once
    contexts.append(
      attend_block(q_BQNH, k_BTKH[:, keys], v_BTKH[:, keys], mask.segment_BT[:, rows], segment_BS, until_BS)
    )
  return checkpoint_name(jnp.concatenate(contexts, 1), "context")


XLA = Attention(prepare=causal_within_segments, attend=attend)
BLOCKS = Attention(prepare=RowMask, attend=attend_in_blocks)

# Modules with the kernels of a platform, imported only where chosen: they use parts of jax that change often.
KERNELS = {"tpu": "attention_tpu"}


@functools.cache  # the same object for the same arguments: functions jitted over it are compiled once
def kernel(platform: str, block: int, *, interpret: bool = False) -> Attention:
  """Return the kernel of "tpu"; rows are a multiple of `block`, arrays local to the device."""
  module = importlib.import_module(f"insec_jax.model.{KERNELS[platform]}")
  return Attention(
    prepare=functools.partial(module.prepare, block=block),
    attend=functools.partial(module.attend, block=block, interpret=interpret),
  )


def choose(
  platform: str, *, device_kind: str, head_width: int, row_length: int, compute: str, rewind: bool = False
) -> tuple[Attention, str]:
  """Return the attention for devices, which need not be present, and the reason for it, to be printed.

  platform and device_kind are jax.Device's. Where a kernel cannot be used, or has not been tested, it is plain XLA.
  With `rewind` positions are hidden from later ones (mistakes.rewind).
  """
  if platform not in KERNELS:
    return without_kernel(platform, row_length, "no kernel for it")
  module = importlib.import_module(f"insec_jax.model.{KERNELS[platform]}")
  if rewind:
    return without_kernel(platform, row_length, "the kernel cannot hide mistakes from later text (mistakes.rewind)")
  if compute != "bfloat16":
    return without_kernel(platform, row_length, f"the kernel would multiply {compute} in fewer bits")
  if head_width not in module.HEAD_WIDTHS:
    widths = " and ".join(map(str, module.HEAD_WIDTHS))
    return without_kernel(platform, row_length, f"the kernel is tested for heads of {widths}, not {head_width}")
  if row_length % module.MULTIPLE:
    return without_kernel(
      platform, row_length, f"data.row_length={row_length} is no multiple of the kernel's {module.MULTIPLE}"
    )
  if device_kind not in module.DEVICE_KINDS:
    return without_kernel(
      platform, row_length, f"the kernel (model/{KERNELS[platform]}.py) is not known to work on {device_kind!r}"
    )
  block = module.block_of(row_length)
  return kernel(platform, block), (
    f"{module.NAME} attention on {platform} ({device_kind}): blocks of {block} "
    "positions, those without a common segment skipped; keeps no scores"
  )


def without_kernel(platform: str, row_length: int, why: str) -> tuple[Attention, str]:
  """Return attention in plain JAX, in blocks where a row has more than two of them, and the reason."""
  if row_length > 2 * BLOCK:
    return BLOCKS, f"attention in blocks of queries on {platform}: {why}; keeps no scores"
  return XLA, f"plain XLA attention on {platform}: {why}; keeps T x T scores per head"


def keys_transposed(mesh=None) -> bool:
  """Return whether a cache holds keys as k_BKHS, not k_BKSH: on CPU, where attention to one query then is faster."""
  return (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) == "cpu"


def slot_axes(mesh=None) -> tuple[int, int]:
  """Return the axes of the slots in the keys and in the values of a cache."""
  return (3 if keys_transposed(mesh) else 2), 2


def as_cached(k_BTKH, v_BTKH, mesh=None):
  """Return keys and values in the layout of a cache, with T for its slots."""
  return k_BTKH.transpose((0, 2, 3, 1) if keys_transposed(mesh) else (0, 2, 1, 3)), v_BTKH.swapaxes(1, 2)


def attend_slots(q_BTNH, k, v, allowed_BTS, mesh=None):
  """Return the context of queries that read a cache in the layout of `as_cached`."""
  return (attend_transposed if keys_transposed(mesh) else attend_cached)(q_BTNH, k, v, allowed_BTS)

"""Attention on TPU: jax's splash kernel, causal within the segments of packed rows. Letters: model/llama.py.

The kernel masks position by position and skips the blocks of positions that the causal mask leaves empty; here it
also skips, batch by batch, those whose two sides share no segment, most of a row packed from short records.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

NAME = "splash"
# Side of the square block of positions, queries by keys, that one step of the kernel takes. 2048 overflows the scoped
# VMEM of v4, v5e, v5p and tpu7x; 512 multiplies a tenth less in a row of one segment and 4096 positions, but the fused
# backward then writes twice as many partial gradients of q, and four times as many steps have their fixed cost.
BLOCK = 1024
MULTIPLE = 128  # a row, and so a block, is a multiple of it
# jax.Device.device_kind, each in both spellings, of the chips for which it compiles.
DEVICE_KINDS = ("TPU v4", "TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x")
HEAD_WIDTHS = (64, 128)
SAVED = "context"  # checkpoint name of what the backward kernel needs from the forward one: context and logsumexp


class Mask(NamedTuple):
  """Who reads whom: the segment of each position, and which blocks of queries need which blocks of keys."""

  segment_BT: jax.Array
  needed_BIJ: jax.Array


def block_of(row_length: int) -> int:
  """Side of a block for rows that are a multiple of MULTIPLE: BLOCK, halved until it divides them."""
  return math.gcd(row_length, BLOCK)


def make_kernel(num_heads: int, row_length: int, block: int, *, interpret: bool):
  """Splash attention of one row, q [N, T, H], k and v [K, T, H]."""
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    use_fused_bwd_kernel=True,
  )
  mask = masks.MultiHeadMask([masks.CausalMask((row_length, row_length))] * num_heads)
  return splash.make_splash_mha_single_device(
    mask, block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=interpret
  )


def needed_blocks(segment_BT, block: int):
  """Boolean [B, I, J]: block i of queries may read something in block j of keys.

      segment       1 1 | 1 2 | 2 2 | 3 0        block = 2
      i = 0 needs    x
      i = 1          x     x
      i = 2                x     x
      i = 3                            x

  By the lowest and the highest segment of a block, so never too few whatever the order; exact where segments rise
  along the row and padding is last.
  """
  B, T = segment_BT.shape
  last = jnp.iinfo(segment_BT.dtype).max
  segment_BIT = jnp.where(segment_BT == 0, last, segment_BT).reshape(B, T // block, block)
  low_BI, high_BI = segment_BIT.min(-1), segment_BIT.max(-1)
  meet_BIJ = (low_BI[:, :, None] <= high_BI[:, None]) & (low_BI[:, None] <= high_BI[:, :, None])
  return meet_BIJ & np.tri(T // block, dtype=bool)[None]


def prepare(segment_BT, *, block: int) -> Mask:
  return Mask(segment_BT, needed_blocks(segment_BT, block))


def only(needed_IJ, info):
  """The kernel's table of blocks without those that are not needed; it has none where a row is one block."""
  if info.block_mask is None:
    return info
  return info._replace(block_mask=info.block_mask * needed_IJ[None].astype(info.block_mask.dtype))


def attend(q_BTNH, k_BTKH, v_BTKH, mask: Mask, *, block: int, interpret: bool = False):
  """Grouped-query attention of local arrays; scores and softmax in float32, result in the dtype of `q`.

  The kernel does not scale: q is scaled in its own dtype, which rounds it once more where heads are 128 wide.
  """
  T, N, H = q_BTNH.shape[1:]
  kernel = make_kernel(N, T, block, interpret=interpret)

  def row(arrays):
    q_TNH, k_TKH, v_TKH, mask = arrays
    needed = splash.SplashAttentionKernel(
      only(mask.needed_BIJ, kernel.fwd_mask_info), None, only(mask.needed_BIJ, kernel.dkv_mask_info), **kernel.kwargs
    )
    q_NTH, k_KTH, v_KTH = (x.swapaxes(0, 1) for x in (q_TNH * H**-0.5, k_TKH, v_TKH))
    return needed(q_NTH, k_KTH, v_KTH, splash.SegmentIds(mask.segment_BT, mask.segment_BT)).swapaxes(0, 1)

  # Row by row, not vmap: the fused backward holds a gradient of q for each block of keys, for one row then.
  return jax.lax.map(row, (q_BTNH, k_BTKH, v_BTKH, mask))

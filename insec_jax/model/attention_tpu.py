"""Attention on TPU: jax's splash kernel, causal within the segments of packed rows. Letters: model/llama.py.

The kernel masks position by position and skips the blocks of positions that the causal mask leaves empty. This module
also makes it skip, for each batch, the blocks whose two sides share no segment: most blocks of a row of short records.

What mistakes.rewind hides has no place in the kernel, which compares the segments of query and key, and a number of the
query with the place of the key: there is no number of the key. Its masks from the device are T x T for each head.
"""

import functools
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
# Bytes that the fused backward may hold for a row: a gradient of q for each block of keys, which grows with the square
# of the row. Above it dq has a kernel of its own, which computes scores and weight gradients again: 7 products, not 5.
MOST_PARTIAL = 1 << 30
MULTIPLE = 128  # of which a row, and so a block, is a multiple
# jax.Device.device_kind, each in both spellings, of the chips for which the kernel compiles.
DEVICE_KINDS = ("TPU v4", "TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x")
HEAD_WIDTHS = (64, 128)
SAVED = "context"  # checkpoint name of the residuals of the backward kernel: context and logsumexp


class Mask(NamedTuple):
  """Segment of each position, and whether each block of queries needs each block of keys."""

  segment_BT: jax.Array
  needed_BIJ: jax.Array


def block_of(row_length: int) -> int:
  """Return the side of a block for rows that are a multiple of MULTIPLE: BLOCK, halved until it divides them."""
  return math.gcd(row_length, BLOCK)


def is_fused(q_BTNH, block: int) -> bool:
  """Return whether one backward kernel computes all gradients, those of q as MOST_PARTIAL allows."""
  T, N, H = q_BTNH.shape[1:]
  return T // block * T * N * H * q_BTNH.dtype.itemsize <= MOST_PARTIAL


class Causal(masks.CausalMask):
  """Causal mask that compares positions on the diagonal only: splash reads all blocks, 16,384 of 131,072 positions."""

  def __getitem__(self, index):
    rows, columns = (range(*axis.indices(size)) for axis, size in zip(index, self.shape, strict=True))
    if rows[0] < columns[-1] and rows[-1] >= columns[0]:
      return super().__getitem__(index)
    return _filled(rows[0] >= columns[-1], (len(rows), len(columns)))


@functools.cache
def _filled(value: bool, shape: tuple[int, int]) -> np.ndarray:
  return np.full(shape, value)


def make_kernel(num_heads: int, row_length: int, block: int, *, fused: bool, interpret: bool):
  """Return the splash attention of one row, q [N, T, H], k and v [K, T, H]."""
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    use_fused_bwd_kernel=fused,
    **({} if fused else {"block_q_dq": block, "block_kv_dq": block}),
  )
  mask = masks.MultiHeadMask([Causal((row_length, row_length))] * num_heads)
  return splash.make_splash_mha_single_device(
    mask, block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=interpret
  )


def needed_blocks(segment_BT, block: int):
  """Return a boolean [B, I, J]: whether block i of queries may read a position of block j of keys.

      segment       1 1 | 1 2 | 2 2 | 3 0        block = 2
      i = 0 needs    x
      i = 1          x     x
      i = 2                x     x
      i = 3                            x

  It compares the lowest and the highest segment of the blocks: never too few blocks in any order of segments, and
  exact where segments ascend along the row and padding is last.
  """
  B, T = segment_BT.shape
  last = jnp.iinfo(segment_BT.dtype).max
  segment_BIT = jnp.where(segment_BT == 0, last, segment_BT).reshape(B, T // block, block)
  low_BI, high_BI = segment_BIT.min(-1), segment_BIT.max(-1)
  overlap_BIJ = (low_BI[:, :, None] <= high_BI[:, None]) & (low_BI[:, None] <= high_BI[:, :, None])
  return overlap_BIJ & np.tri(T // block, dtype=bool)[None]


def prepare(segment_BT, *, block: int) -> Mask:
  """Return the mask that all layers share."""
  return Mask(segment_BT, needed_blocks(segment_BT, block))


def only(needed_IJ, info):
  """Return the kernel's mask info with unneeded blocks removed; unchanged where a row is one block and has no table.

  The table is that of all blocks: a causal mask leaves splash no column and no row to cut off. None, of a kernel that
  is not used, stays None.
  """
  if info is None or info.block_mask is None:
    return info
  return info._replace(block_mask=info.block_mask * needed_IJ[None].astype(info.block_mask.dtype))


def attend(q_BTNH, k_BTKH, v_BTKH, mask: Mask, *, block: int, interpret: bool = False):
  """Apply grouped-query attention to local arrays; scores and softmax in float32, result in the dtype of `q`.

  The kernel does not scale. q is scaled in its own dtype, which adds a rounding where heads are 128 wide.
  """
  T, N, H = q_BTNH.shape[1:]
  kernel = make_kernel(N, T, block, fused=is_fused(q_BTNH, block), interpret=interpret)

  def row(arrays):
    q_TNH, k_TKH, v_TKH, mask = arrays
    needed = splash.SplashAttentionKernel(
      *(only(mask.needed_BIJ, info) for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)),
      **kernel.kwargs,
    )
    q_NTH, k_KTH, v_KTH = (x.swapaxes(0, 1) for x in (q_TNH * H**-0.5, k_TKH, v_TKH))
    return needed(q_NTH, k_KTH, v_KTH, splash.SegmentIds(mask.segment_BT, mask.segment_BT)).swapaxes(0, 1)

  # Row by row, not vmap: the fused backward holds a gradient of q for each block of keys, so for one row at a time.
  return jax.lax.map(row, (q_BTNH, k_BTKH, v_BTKH, mask))

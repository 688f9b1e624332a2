"""Attention in rows where later positions do not read some of the earlier ones, against float64 in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import context, context_gradients

from insec_jax.method.rewind import NEVER
from insec_jax.model import attention

T = 300
WAYS = {"xla": attention.XLA, "blocks": attention.BLOCKS}
SEGMENTS = np.stack([np.repeat([1, 2, 0], [170, 100, 30]), np.ones(T, int)])


def hidden_ranges():
  """until [B, T]: two ranges within a block of queries, one over the border of two, one that ends in padding."""
  until_BT = np.full((2, T), NEVER, np.int32)
  for row, first, stop, until in (
    (0, 3, 9, 14),
    (0, 100, 140, 150),
    (0, 200, 260, 268),
    (1, 40, 60, 299),
    (1, 70, 71, 71),
  ):
    until_BT[row, first:stop] = until
  return until_BT


UNTIL = hidden_ranges()


def draw(seed=0):
  """q, k, v and a gradient of the context, float32."""
  rng = np.random.default_rng(seed)
  return tuple(rng.normal(size=(2, T, heads, 8)).astype(np.float32) for heads in (4, 2, 2, 4))


@functools.partial(jax.jit, static_argnums=0)
def run(way, arrays, *mask):
  """(context, gradients of q, k, v)."""
  *qkv, d_context_BTNH = arrays
  prepared = WAYS[way].prepare(*mask)
  context_BTNH, pullback = jax.vjp(lambda q, k, v: WAYS[way].attend(q, k, v, prepared), *qkv)
  return context_BTNH, *pullback(d_context_BTNH)


def test_a_position_is_read_by_those_before_its_until():
  rows = ["x.....", "xx....", "xxx...", "x..x..", "x..xx.", "x..xxx"]
  expected_TS = np.array([[cell == "x" for cell in row] for row in rows])
  until_1T = jnp.array([[NEVER, 3, 3, NEVER, NEVER, NEVER]])
  np.testing.assert_array_equal(attention.causal_within_segments(jnp.ones((1, 6), int), until_1T)[0], expected_TS)


@pytest.mark.parametrize("way", WAYS)
def test_context_and_gradients_equal_the_float64_reference(way):
  arrays = draw()
  got = run(way, arrays, jnp.array(SEGMENTS), jnp.array(UNTIL))
  for row in range(2):
    *qkv, d_context_TNH = (np.asarray(x[row], np.float64) for x in arrays)
    of_row = SEGMENTS[row], UNTIL[row]
    expected = context(*qkv, *of_row), *context_gradients(*qkv, of_row[0], d_context_TNH, of_row[1])
    for ours, theirs in zip(got, expected, strict=True):
      scale = np.abs(theirs).max()
      np.testing.assert_allclose(np.asarray(ours[row]) / scale, theirs / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_hidden_changes_not_a_bit_of_what_later_positions_get(way):
  before, after = draw(), tuple(x.copy() for x in draw())
  for x in after:
    x[0, 100:140] = 7 - x[0, 100:140]
  old, new = (np.asarray(run(way, arrays, jnp.array(SEGMENTS), jnp.array(UNTIL))[0]) for arrays in (before, after))
  np.testing.assert_array_equal(old[0, 150:], new[0, 150:])
  assert (old[0, 140:150] != new[0, 140:150]).any(-1).all()


@pytest.mark.parametrize("way", WAYS)
def test_hiding_nothing_gives_the_same_bits_as_without(way):
  arrays, segment_BT = draw(), jnp.array(SEGMENTS)
  for one, other in zip(
    run(way, arrays, segment_BT), run(way, arrays, segment_BT, jnp.full_like(segment_BT, NEVER)), strict=True
  ):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("row_length", [128, 4096])
def test_a_kernel_is_not_chosen_where_mistakes_are_hidden(row_length):
  known = {"device_kind": "TPU v5p", "head_width": 128, "row_length": row_length, "compute": "bfloat16"}
  assert attention.choose("tpu", **known)[0] not in (attention.XLA, attention.BLOCKS)
  chosen, reason = attention.choose("tpu", **known, rewind=True)
  assert chosen is (attention.BLOCKS if row_length > 256 else attention.XLA)
  assert "the kernel cannot hide mistakes from later text (mistakes.rewind)" in reason

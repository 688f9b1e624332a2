"""Fingerprints of arrays: any change of a bit shows, and where the shards are does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modelkit import abstract, make_state

from insec_jax.training.fingerprints import _fingerprint_sums, fingerprints, not_finite


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_any_flipped_bit_and_any_two_exchanged_elements_change_the_fingerprint(dtype):
  array = np.arange(1, 16).reshape(3, 5).astype(dtype)
  want = fingerprints({"a": jnp.asarray(array)})
  whole = array.view(f"uint{8 * array.itemsize}")
  for position in np.ndindex(array.shape):
    for bit in range(8 * array.itemsize):
      other = whole.copy()
      other[position] ^= 1 << bit
      assert fingerprints({"a": jnp.asarray(other.view(dtype))}) != want
  exchanged = array.copy()
  exchanged[0, 0], exchanged[2, 3] = array[2, 3], array[0, 0]
  assert fingerprints({"a": jnp.asarray(exchanged)}) != want


def test_the_fingerprint_does_not_hang_on_where_the_shards_lie():
  one, eight = (fingerprints(make_state(abstract(shape)).params) for shape in ((1, 1, 1), (2, 2, 2)))
  assert one == eight


def test_the_fingerprint_read_in_place_is_the_one_computed_on_the_devices():
  params = make_state(abstract((2, 2, 2))).params
  tree = {"params": params, "half": jnp.arange(7, dtype="bfloat16"), "count": jnp.int32(5)}
  numbers = _fingerprint_sums(jax.tree.leaves(tree))
  assert list(fingerprints(tree).values()) == numbers.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_element_that_is_not_finite_is_named_among_large_ones(value, dtype):
  array = np.full((3, 50), 1e30, dtype)
  assert not not_finite({"a": jnp.asarray(array), "count": jnp.int32(3)})
  array[1, 17] = value
  assert not_finite({"count": jnp.int32(3), "a": jnp.asarray(array)}) == ["a"]

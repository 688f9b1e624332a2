"""Fingerprints of arrays: any change of a bit shows, and where the shards are does not."""

import jax.numpy as jnp
import numpy as np
import pytest
from modelkit import abstract, make_state

from insec_jax.training.fingerprints import fingerprints


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

"""Stochastic rounding to bfloat16: up or down at random, so that the expected value is the number rounded."""

import zlib

import jax
import jax.numpy as jnp


def to_bfloat16(array, key):
  """Return the float32 array in bfloat16, rounded to the one of two neighbours with a chance by its distance.

      bits of float32      sign, exponent, 7 bits of mantissa | 16 bits
      add at random                                           | 0 .. 2**16 - 1, which may carry to the left
      bits of bfloat16     sign, exponent, 7 bits of mantissa

  NaN and infinity stay as they are. The draw depends on the key and an element's position, not on the sharding.
  """
  bits = jax.lax.bitcast_convert_type(array, jnp.uint32) + jax.random.bits(key, array.shape, jnp.uint16)
  rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isfinite(array), rounded, array.astype(jnp.bfloat16))


def round_named(path, array, key):
  """Return the array of a tree in bfloat16, rounded with a key of its own, made from `key` and its path in the tree."""
  name = jax.tree_util.keystr(path)
  return to_bfloat16(array.astype(jnp.float32), jax.random.fold_in(key, zlib.crc32(name.encode())))

"""Fingerprints of arrays: their names and shapes, checksums of their bits, and whether they are finite."""

import concurrent.futures
import hashlib
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from insec_jax.command import InputError
from insec_jax.model import memory

BITS_AT_ONCE = 1 << 20  # elements


def fingerprints(tree) -> dict[str, int]:
  """Return a checksum of each array that any flipped bit changes, the same for any sharding.

  It is the sum of the bits of all elements, each times its own odd number, modulo 2**32.
  """
  leaves = jax.tree.leaves(tree)
  if all(map(_is_in_reach, leaves)):
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      numbers = list(pool.map(_sum_in_reach, leaves))
  else:
    numbers = jax.device_get(_fingerprint_sums(leaves)).tolist()
  return dict(zip(array_types(tree), numbers, strict=True))


def _is_in_reach(leaf: jax.Array) -> bool:
  """Return whether numpy can read the array in place: XLA on CPU sums integers in one thread, without vectors."""
  return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def _sum_in_reach(leaf: jax.Array) -> int:
  """Return the fingerprint of an array of CPU devices, from one copy of each of its parts."""
  parts = [(shard.index, np.asarray(shard.data)) for shard in leaf.addressable_shards if shard.replica_id == 0]
  if not leaf.ndim:
    return bit_sum(parts[0][1].reshape(1), [0], (1,))
  starts = ([along.start or 0 for along in index] for index, _ in parts)
  return sum(bit_sum(part, start, leaf.shape) for (_, part), start in zip(parts, starts, strict=True)) % (1 << 32)


@jax.jit
def _fingerprint_sums(leaves):
  def fingerprint(leaf):
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
      position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return (bits * (2 * position + 1)).sum(dtype=jnp.uint32)

  return jnp.stack([fingerprint(memory.to_device(leaf)) for leaf in leaves])


def fingerprint(params) -> str:
  """Return a short text that changes with any of the weights."""
  return digest(fingerprints(params))


def digest(checksums: dict[str, int]) -> str:
  """Return a short text that changes with any of the checksums that `fingerprints` returned."""
  return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()[:16]


def bit_sum(part: np.ndarray, start: list[int], shape: tuple[int, ...]) -> int:
  """Return the share of a part of an array in its fingerprint; the part begins at `start` of an array of this shape."""
  bits = np.ascontiguousarray(part).view(f"uint{8 * part.dtype.itemsize}")
  rows = bits.reshape(-1, part.shape[-1])
  strides = np.array([math.prod(shape[axis + 1 :]) for axis in range(len(shape))], np.uint64)
  first = np.zeros(part.shape[:-1], np.uint64)  # position of the first element of each row
  for axis, size in enumerate(part.shape[:-1]):
    along = (np.arange(size, dtype=np.uint64) + np.uint64(start[axis])) * strides[axis]
    first += along.reshape([-1 if other == axis else 1 for other in range(len(shape) - 1)])
  first = (first.reshape(-1) + np.uint64(start[-1])).astype(np.uint32)
  odd = (2 * np.arange(part.shape[-1], dtype=np.uint32) + 1).astype(np.uint32)
  total = 0
  for row in range(0, len(rows), max(1, BITS_AT_ONCE // rows.shape[1])):
    chunk = rows[row : row + max(1, BITS_AT_ONCE // rows.shape[1])].astype(np.uint32)
    base = first[row : row + len(chunk)]
    total += int((2 * base * chunk.sum(1, dtype=np.uint32)).sum(dtype=np.uint32)) + int(
      (chunk @ odd).sum(dtype=np.uint32)
    )
  return total % (1 << 32)


def not_finite(tree) -> list[str]:
  """Return the names of the arrays that hold NaN or infinity; all processes call it together."""
  are_finite = jax.device_get(_are_finite(jax.tree.leaves(tree)))
  return [name for name, is_finite in zip(array_types(tree), are_finite, strict=True) if not is_finite]


@jax.jit
def _are_finite(leaves):
  # A maximum of NaN and anything is NaN. XLA on CPU finds it with vectors, and does not so reduce booleans.
  return jnp.stack([jnp.isfinite(jnp.abs(memory.to_device(leaf)).max()) for leaf in leaves])


def compare_trees(where: str, *, saved: dict[str, str], expected: dict[str, str]):
  """Raise InputError that names the first array that is missing, unexpected or of another shape or dtype."""
  differences = [
    f"{name} {saved.get(name, 'absent')}, needed {expected.get(name, 'absent')}"
    for name in sorted(saved.keys() | expected.keys())
    if saved.get(name) != expected.get(name)
  ]
  if differences:
    raise InputError(
      f"{where} does not hold this model: {len(differences)} arrays differ, first {differences[0]}; "
      "use the config it was trained with, or another workdir"
    )


def array_types(tree) -> dict[str, str]:
  """Return the dtype and shape of each array of a tree by its name."""

  def word(key):
    # A node is a named field in an optax state and a plain key in the tree that Orbax returns.
    return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))

  return {
    "/".join(map(word, path)): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }

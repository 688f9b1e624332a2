"""Fingerprints of arrays: their names and shapes, checksums of their bits, and whether they are finite."""

import jax
import jax.numpy as jnp
import numpy as np

from insec_jax.command import InputError


def fingerprints(tree) -> dict[str, int]:
  """Return a checksum of each array that any flipped bit changes, the same for any sharding.

  It is the sum of the bits of all elements, each times its own odd number, modulo 2**32.
  """
  leaves = jax.tree.leaves(tree)
  numbers = jax.device_get(_fingerprint_sums(leaves))
  return dict(zip(array_types(tree), numbers.tolist(), strict=True))


@jax.jit
def _fingerprint_sums(leaves):
  def fingerprint(leaf):
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
      position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return (bits * (2 * position + 1)).sum(dtype=jnp.uint32)

  return jnp.stack([fingerprint(leaf) for leaf in leaves])


def not_finite(tree) -> list[str]:
  """Return the names of the arrays that hold NaN or infinity; all processes call it together."""
  are_finite = jax.device_get(_are_finite(jax.tree.leaves(tree)))
  return [name for name, is_finite in zip(array_types(tree), are_finite, strict=True) if not is_finite]


@jax.jit
def _are_finite(leaves):
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


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

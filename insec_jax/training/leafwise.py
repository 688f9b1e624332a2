"""Update of one parameter after the other, for a state of the optimizer in the memory of the host.

All moments at once would be on the device beside the new ones. Here the moments of a parameter are copied to the device
when those of the parameter before are back on the host: an optimization barrier orders the two.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from insec_jax.model import memory


def one_by_one(update: Callable, gradient, state, params, shardings) -> tuple[Any, Any]:
  """Return (parameters, state) of `update(gradient, state, params)`, which is called with one parameter at a time.

  Each call has trees of dicts with one leaf, at its path, and returns the same trees after the update. Arrays of the
  state are on the device in a call; the results are where `shardings`, a pair like the result, has them.
  """
  paths = [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  done: list[tuple[Any, Any]] = []
  turn = jax.numpy.zeros(())
  for path in paths:
    of_leaf = tuple(only(tree, path) for tree in (gradient, state, params))
    (part, held, param), turn = jax.lax.optimization_barrier((of_leaf, turn))
    after = update(part, memory.to_device(held), param)
    placed = jax.tree.map(memory.to_place, after, only(shardings, path))
    placed, turn = jax.lax.optimization_barrier((placed, turn))
    done.append(placed)
  return together(done)


def only(tree, path: Sequence[str]):
  """Return the tree with the leaf at `path` alone in each dict that has this path; the rest is as before."""
  if isinstance(tree, dict):
    if path and path[0] in tree:
      return {path[0]: only(tree[path[0]], path[1:])}
    return {key: only(value, path) for key, value in tree.items()}
  if isinstance(tree, tuple):
    parts = [only(part, path) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
  return tree


def together(trees: Sequence):
  """Return the trees that `only` has taken apart as one; what is in all of them is taken from the last."""
  last = trees[-1]
  if isinstance(last, dict):
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return {key: together([tree[key] for tree in trees if key in tree]) for key in keys}
  if isinstance(last, tuple):
    parts = [together(parts) for parts in zip(*trees, strict=True)]
    return type(last)(*parts) if hasattr(last, "_fields") else tuple(parts)
  return last

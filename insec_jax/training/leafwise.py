"""Update of one parameter after the other, for a state of the optimizer in the memory of the host.

All moments at once would be on the device beside the new ones. Here the moments of one layer of a parameter are on the
device at a time: a loop over layers copies them in and out. What has no layers, or a state of other shapes, is copied
whole, and so is everything where an update draws random numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from insec_jax.model import memory


def one_by_one(update: Callable, gradient, state, params, shardings, *, by_layer: bool) -> tuple[Any, Any]:
  """Return (parameters, state) of `update(gradient, state, params)`, which is called with one parameter at a time.

  Each call has trees of dicts with one leaf, at its path, and returns (parameters, state) after the update. Arrays of
  the state are on the device in a call; the results are where `shardings`, a pair like the result, has them. With
  `by_layer` a call has one layer of a parameter, [1, ...], where all arrays of its state have its shape.
  """
  done: list[tuple[Any, Any]] = []
  for path, param in jax.tree_util.tree_leaves_with_path(params):
    keys = [key.key for key in path]
    part, held, at = (only(tree, keys) for tree in (gradient, state, params))
    is_alike = all(leaf.shape in ((), param.shape) for leaf in jax.tree.leaves(held))
    change = _each_layer if by_layer and keys[0] == "layers" and is_alike else _whole
    done.append(change(update, part, held, at, only(shardings, keys)))
  return together(done)


def _whole(update: Callable, gradient, state, params, shardings):
  return jax.tree.map(memory.to_place, update(gradient, memory.to_device(state), params), shardings)


def _each_layer(update: Callable, gradient, state, params, shardings):
  """Return what `_whole` does, in a loop over the layers."""
  leaves, treedef = jax.tree.flatten(state)
  counters = [leaf for leaf in leaves if not leaf.ndim]

  def join(stacked, counters):
    """Return the leaves of the state: the stacked ones, and the counters at their places."""
    of_both = {False: iter(stacked), True: iter(counters)}
    return treedef.unflatten([next(of_both[not leaf.ndim]) for leaf in leaves])

  def change(carry, layer):
    # The stacked arrays are carried: those of a layer are replaced in place, on the host.
    stacked, _ = carry
    number, part, at = layer
    held = [memory.to_device(jax.lax.dynamic_slice_in_dim(array, number, 1)) for array in stacked]
    part, at = jax.tree.map(lambda array: array[None], (part, at))
    after, state_after = update(part, join(held, counters), at)
    found = jax.tree.leaves(state_after)
    news = [memory.like(new, array) for new, array in zip((x for x in found if x.ndim), stacked, strict=True)]
    stacked = [
      jax.lax.dynamic_update_slice_in_dim(array, new, number, 0) for array, new in zip(stacked, news, strict=True)
    ]
    return (stacked, [leaf for leaf in found if not leaf.ndim]), jax.tree.map(lambda array: array[0], after)

  num_layers = jax.tree.leaves(params)[0].shape[0]
  carry = [leaf for leaf in leaves if leaf.ndim], counters
  (stacked, counters_after), after = jax.lax.scan(change, carry, (jax.numpy.arange(num_layers), gradient, params))
  return jax.tree.map(memory.to_place, (after, join(stacked, counters_after)), shardings)


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

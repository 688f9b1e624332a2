"""Cast of the weights to the compute dtype; that of the layers is inside the scan over layers.

A scan stacks the gradients of its inputs in the dtype of these. Weights that are cast before it have gradients in the
compute dtype, but the cast copy of all layers exists beside the weights until the backward pass ends. Weights that are
cast inside it need no copy, but have gradients in their own dtype. Here each weight of a layer has a slot: zeros which
no arithmetic reads and which the compiler removes. The slot has the gradient in place of the weight, in its own dtype.
"""

import functools

import jax
import jax.numpy as jnp

COLLECTION = "slots"  # of Llama's variables: slots of the layers
# What is cast where it is used: the gradient of a frequent token is a sum of thousands.
UNCAST = ("embed", "rows")


def cast(tree: dict, dtype: str) -> dict:
  """Return the params, or the trained tree of LoRA, in this dtype, without what is cast where it is used."""
  return {
    name: part if name in UNCAST else jax.tree.map(lambda array: array.astype(dtype), part)
    for name, part in tree.items()
  }


def with_slots(params: dict, dtype: str, gradient: str) -> tuple[dict, dict | None]:
  """Return (params in this dtype, with slots for layers, the layers); gradients of slots have the dtype `gradient`.

  It is (params in this dtype, None) where weights and gradients have it already.
  """
  layers = params["layers"]
  if all(weight.dtype == dtype == gradient for weight in jax.tree.leaves(layers)):
    return cast(params, dtype), None
  slots = jax.tree.map(lambda weight: jnp.zeros(weight.shape, gradient), layers)
  return {**cast({**params, "layers": {}}, dtype), "layers": slots}, layers


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def into_slot(weight, slot, dtype):
  """Return the weight in this dtype; the slot has the gradient, the weight none."""
  return _forward(weight, slot, dtype)[0]


def _forward(weight, slot, dtype):
  # Rounded first: a cast alone is moved by the TPU compiler out of the loop over layers, so that it casts all of them.
  kept = jnp.finfo(dtype)
  rounded = jax.lax.reduce_precision(weight, kept.nexp, kept.nmant)
  return rounded.astype(dtype), jnp.zeros((), slot.dtype)


def _backward(dtype, like, cotangent):
  del dtype
  return None, cotangent.astype(like.dtype)


into_slot.defvjp(_forward, _backward)

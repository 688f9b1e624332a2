"""Products of activations and weights. Letters: llama.py."""

import functools

import jax
import jax.numpy as jnp


def einsum(letters: str, x, weight):
  """Return the einsum in the dtype of `x`; float32 is multiplied in float32, also on TPU (its default is bfloat16)."""
  return jnp.einsum(letters, x, weight.astype(x.dtype), precision="highest" if x.dtype == jnp.float32 else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def widening(letters: str, x, weight):
  """Return `einsum`; the gradient of the weight is computed with the axes in the order of the weight's.

  JAX computes it with the axes of the cotangent first and transposes it. XLA on CPU then computes the cotangent, the
  wider factor, transposed, which took a quarter of a training step.
  """
  return einsum(letters, x, weight)


def _forward(letters: str, x, weight):
  return einsum(letters, x, weight), (x, weight)


def _backward(letters: str, kept, cotangent):
  x, weight = kept
  inputs, out = letters.split("->")
  read, matrix = inputs.split(",")
  return einsum(f"{out},{matrix}->{read}", cotangent, weight), einsum(f"{read},{out}->{matrix}", x, cotangent)


widening.defvjp(_forward, _backward)

"""Gradients of a small random model on a mesh of pretended devices."""

import dataclasses
import functools

import jax
import numpy as np
from modelkit import mesh_of, small_llama

from insec_jax.model import llama, sharding
from insec_jax.training import step

MODEL = small_llama(width=16, num_kv_heads=4, mlp_width=24)


def model_config(tied):
  return dataclasses.replace(MODEL, tied=tied)


@functools.cache
def make_params(tied=False):
  rng = np.random.default_rng(0)
  boxed = llama.shapes(model_config(tied))
  return jax.tree.map(
    lambda leaf: (rng.normal(size=leaf.shape) * 0.3 + (len(leaf.shape) == 1)).astype(np.float32),
    jax.tree.map(lambda leaf: leaf.value, boxed, is_leaf=lambda leaf: hasattr(leaf, "names")),
  )


def axes_mesh(**sizes):
  """The mesh with these lengths of its axes, the others 1."""
  shape = tuple(sizes.pop(axis, 1) for axis in sharding.MESH_AXES)
  assert not sizes
  return jax.make_mesh(shape, sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def make_mesh(shape):
  return axes_mesh(fsdp_x=2, fsdp_y=2, fsdp_z=2) if shape == "fsdp 2x2x2" else mesh_of(shape)


@functools.cache
def compiled_gradient(shape, remat, tied, repeat):
  mesh, config = make_mesh(shape), model_config(tied)
  shardings = sharding.params_shardings(llama.shapes(config), mesh)
  mean_gradient = functools.partial(
    step.mean_gradient, model=llama.Llama(config, "float32", remat), mesh=mesh, shardings=shardings, repeat=repeat
  )
  return jax.jit(mean_gradient, in_shardings=(shardings, step.batch_sharding(mesh)), out_shardings=(shardings, None))


def gradient(batch, shape=(1, 1, 1), *, remat="none", tied=False, repeat=0.0):
  """(gradient, sums) of step.mean_gradient on a mesh of that shape."""
  return compiled_gradient(shape, remat, tied, repeat)(make_params(tied), batch)

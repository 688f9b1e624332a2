"""A small model with random adapters and marker rows, and the gradients of its trained tree."""

import functools

import jax
import numpy as np
from gradients import make_mesh, make_params, model_config

from insec_jax.config_types import MATRICES
from insec_jax.model import adapters, llama, sharding
from insec_jax.model.lora import Lora
from insec_jax.training import step

LORA = Lora(rank=3, scale=0.7, matrices=MATRICES, markers=(3, 41))


@functools.cache
def make_trained(tied=False, lora=LORA):
  """A trained tree in which no adapter is 0."""
  rng = np.random.default_rng(3)
  shapes = adapters.unboxed_shapes(model_config(tied), lora)
  return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * 0.3).astype(np.float32), shapes)


@functools.cache
def compiled(shape, remat, tied, lora):
  mesh, config = make_mesh(shape), model_config(tied)
  shardings = sharding.params_shardings(adapters.shapes(config, lora), mesh)
  frozen = sharding.params_shardings(llama.shapes(config), mesh)
  mean_gradient = functools.partial(
    step.mean_gradient,
    model=llama.Llama(config, "float32", remat, lora=lora),
    mesh=mesh,
    shardings=shardings,
    repeat=0.0,
    frozen_shardings=frozen,
  )
  given = (shardings, step.batch_sharding(mesh), frozen)
  return jax.jit(mean_gradient, in_shardings=given, out_shardings=(shardings, None))


def lora_gradient(batch, shape=(1, 1, 1), *, remat="none", tied=False, lora=LORA):
  """(gradient of the trained tree, sums) on a mesh of that shape."""
  return compiled(shape, remat, tied, lora)(make_trained(tied, lora), batch, make_params(tied))

"""A small model whose top layers are trained beside frozen ones, and the gradients of its trained tree."""

import functools

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from gradients import make_mesh, make_params, model_config

from insec_jax.model import parts, sharding
from insec_jax.model.top_layers import TopLayers
from insec_jax.training import step

TOP = TopLayers(num=1, markers=(3, 41))


def split(params, top):
  """(frozen, trained) trees of these params, cut by hand."""
  flat = flatten_dict(params, sep="/")
  frozen = {path: flat[path][: -top.num] for path in flat if path.startswith("layers/")} | {"embed": flat["embed"]}
  trained = {path: flat[path][-top.num :] if path.startswith("layers/") else flat[path] for path in flat}
  del trained["embed"]
  if top.markers:
    trained["rows/embed"] = flat["embed"][list(top.markers)]
  return unflatten_dict(frozen, sep="/"), unflatten_dict(trained, sep="/")


def restricted(gradient, top):
  """The gradient of all params, restricted to the trained tree."""
  return split(jax.tree.map(np.asarray, gradient), top)[1]


@functools.cache
def compiled(shape, remat, tied, part, kept):
  mesh, config = make_mesh(shape), model_config(tied)
  shardings = sharding.params_shardings(parts.shapes(config, part), mesh)
  frozen = sharding.params_shardings(parts.frozen_shapes(config, part), mesh)
  mean_gradient = functools.partial(
    step.mean_gradient,
    model=parts.model_of(config, "float32", remat, part=part),
    mesh=mesh,
    shardings=shardings,
    repeat=0.0,
    frozen_shardings=frozen,
    kept=kept and kept(),
  )
  given = (shardings, step.batch_sharding(mesh), frozen)
  return jax.jit(mean_gradient, in_shardings=given, out_shardings=(shardings, None))


def top_gradient(batch, shape=(1, 1, 1), *, remat="none", tied=False, top=TOP, kept=None):
  """(gradient of the trained tree, sums) on a mesh of that shape; `kept` is a function that returns the kept tokens."""
  frozen, trained = split(make_params(tied), top)
  return compiled(shape, remat, tied, top, kept)(trained, batch, frozen)

"""The gradient of a distillation on a mesh is the one written out in float64."""

import dataclasses
import functools

import distillkit
import jax
import numpy as np
import pytest
from distillkit import POLICY, T
from gradients import MODEL, make_mesh, make_params

from insec_jax.data import pipeline
from insec_jax.model import llama, sharding
from insec_jax.training import step

REVERSE = dataclasses.replace(POLICY, forward=0.0, contrast=0.0, temperature=1.0)
FIRST = dataclasses.replace(POLICY, teacher="start")


@functools.cache
def compiled(shape, policy):
  """The program of `gradient`."""
  mesh = make_mesh(shape)
  shardings = sharding.params_shardings(llama.shapes(MODEL), mesh)
  mean = functools.partial(
    step.mean_gradient,
    model=llama.Llama(MODEL, "float32", "none"),
    mesh=mesh,
    shardings=shardings,
    repeat=policy.no_flag,
    policy=policy,
  )
  first = shardings if policy.reads_first else None
  given = (shardings, step.batch_sharding(mesh), None, first)
  return jax.jit(
    lambda params, batch, frozen, first: mean(params, batch, frozen, first=first),
    in_shardings=given,
    out_shardings=(shardings, None),
  )


def gradient(batch, shape, policy):
  """(gradient, sums) of step.mean_gradient on a mesh of that shape."""
  first = distillkit.other_params() if policy.reads_first else None
  return compiled(shape, policy)(make_params(), batch, None, first)


def batch_of(policy=POLICY, accumulation=1):
  rows = distillkit.rows()
  if not policy.contrast:
    kept = {name: array for name, array in rows.hinted.items() if not name.startswith("wrong")}
    rows = dataclasses.replace(rows, hinted=kept)
  batch = next(pipeline.in_order(rows, rows_per_step=4, share=slice(None), negatives=True))
  return {name: array.reshape(accumulation, -1, T) for name, array in batch.items()}


@pytest.mark.parametrize(
  ("shape", "accumulation", "policy"),
  [
    ((1, 1, 1), 1, POLICY),
    ((1, 2, 1), 2, POLICY),
    pytest.param((1, 1, 1), 1, REVERSE, marks=pytest.mark.slow),
    pytest.param((1, 1, 1), 1, FIRST, marks=pytest.mark.slow),
    pytest.param((2, 1, 2), 1, FIRST, marks=pytest.mark.slow),
    pytest.param((1, 1, 2), 1, POLICY, marks=pytest.mark.slow),
    pytest.param((1, 1, 1, 2), 1, POLICY, marks=pytest.mark.slow),
    pytest.param((2, 2, 1), 1, POLICY, marks=pytest.mark.slow),
    pytest.param((1, 2, 2), 1, FIRST, marks=pytest.mark.slow),
  ],
)
def test_the_gradient_of_a_distillation_is_that_of_a_float64_reference(shape, accumulation, policy):
  got, sums = gradient(batch_of(policy, accumulation), shape, policy)
  want, loss, weight, of_role = distillkit.naive_gradient(policy, start=policy.reads_first)
  np.testing.assert_allclose(float(sums.weight), weight, rtol=1e-6)
  np.testing.assert_allclose(float(sums.loss) / weight, loss, rtol=1e-5)
  np.testing.assert_allclose(sums.divergence_R, of_role, rtol=1e-5, atol=1e-6)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(np.asarray(a) - b) <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)


def test_a_batch_without_the_rows_of_a_hint_is_refused_and_the_reverse():
  batch = batch_of()
  with pytest.raises(ValueError, match="beside what every batch has"):
    gradient({name: array for name, array in batch.items() if name != "right_place_ABT"}, (1, 1, 1), POLICY)
  with pytest.raises(ValueError, match="beside what every batch has"):
    gradient(batch, (1, 1, 1), REVERSE)

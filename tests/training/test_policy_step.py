"""The policy gradient of packed rows on a mesh is the one written out in float64."""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import policykit
import pytest
import samplerkit
from gradients import MODEL, make_mesh, make_params
from policykit import GROUPS, POLICY, START, T

from insec_jax.data import pipeline
from insec_jax.method.roles import NUM_ROLES
from insec_jax.mining.policy import advantages
from insec_jax.model import llama, sharding
from insec_jax.training import logps, metrics, step
from insec_jax.training.policy_loss import PolicySums
from insec_jax.training.scores import Sums


def all_advantages():
  """Those of the package, of every sample."""
  rewards = [[right - POLICY.flag_price * flags for right, flags in group] for group in GROUPS]
  return np.concatenate([advantages(group, scaled=True) for group in rewards])


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
    repeat=0.0,
    policy=policy,
  )
  return jax.jit(mean, in_shardings=(shardings, step.batch_sharding(mesh)), out_shardings=(shardings, None))


def gradient(batch, shape, policy=POLICY):
  """(gradient, sums) of step.mean_gradient on a mesh of that shape."""
  return compiled(shape, policy)(make_params(), batch)


def batch_of(rows):
  num = -(-len(rows) // 4) * 4
  return next(pipeline.in_order(rows, rows_per_step=num, share=slice(None), negatives=False))


@pytest.mark.parametrize(
  ("shape", "accumulation"),
  [
    ((1, 1, 1), 1),
    ((1, 2, 1), 1),
    *(pytest.param(shape, 2, marks=pytest.mark.slow) for shape in ((1, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 1, 1))),
    pytest.param((1, 1, 1, 2), 1, marks=pytest.mark.slow),
  ],
)
def test_the_policy_gradient_on_a_mesh_is_the_one_written_out_in_float64(shape, accumulation):
  batch = batch_of(policykit.rows_of(all_advantages()))
  batch = {name: array.reshape(accumulation, -1, T) for name, array in batch.items()}
  got, sums = gradient(batch, shape)
  want, loss, clipped, kl = policykit.naive_gradient()
  num = sum(len(token_T) - START for token_T, _, _ in policykit.make_samples())
  assert float(sums.weight) == float(sums.policy.count) == num
  np.testing.assert_allclose(float(sums.loss) / num, loss, rtol=1e-5)
  assert float(sums.policy.clipped) / num == clipped == 0.5
  np.testing.assert_allclose(float(sums.policy.kl) / num, kl, rtol=1e-5)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(np.asarray(a) - b) <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.parametrize("shape", [(1, 2, 1), pytest.param((1, 1, 2), marks=pytest.mark.slow)])
def test_old_log_p_are_those_of_the_forward_pass_of_the_step(shape):
  rows = policykit.rows_of(all_advantages())
  mesh = make_mesh(shape)
  shardings = step.TrainState(None, sharding.params_shardings(llama.shapes(MODEL), mesh), None)
  run = types.SimpleNamespace(shardings=shardings, frozen=None)
  config = types.SimpleNamespace(policy=POLICY)
  num = len(rows) + 2 - len(rows) % 2  # the last rows of the batch are padding
  got_BT = logps.measure_of(config, run, llama.Llama(MODEL, "float32", "none"), mesh, num, np.arange(num))(
    rows, make_params()
  )
  np.testing.assert_array_equal(got_BT != 0, rows.weight_BT != 0)
  ratio_N = np.exp(got_BT - rows.old_BT)[rows.weight_BT != 0]
  np.testing.assert_allclose(np.unique(ratio_N.round(4)), policykit.RATIOS)


@pytest.mark.slow
def test_the_decoder_and_the_forward_pass_give_sampled_tokens_nearly_the_same_log_p():
  sampler = samplerkit.model_of(MODEL, make_params())
  prompts = [token_T[:START].astype(np.int32) for token_T, _, _ in policykit.make_samples()]
  written = sampler.generate(prompts, max_tokens=8, temperature=1.0, seed=3, stop_ids=[1], batch_size=8)
  made = [
    (np.r_[prompt, text.tokens], *(np.r_[np.zeros(START), text.logprobs],) * 2)
    for prompt, text in zip(prompts, written, strict=True)
  ]
  rows = policykit.rows_of(np.ones(len(made)), made)
  mesh = make_mesh((1, 1, 1))
  shardings = step.TrainState(None, sharding.params_shardings(llama.shapes(MODEL), mesh), None)
  got_BT = logps.measure_of(
    types.SimpleNamespace(policy=dataclasses.replace(POLICY, temperature=1.0)),
    types.SimpleNamespace(shardings=shardings, frozen=None),
    llama.Llama(MODEL, "float32", "none"),
    mesh,
    len(rows),
    np.arange(len(rows)),
  )(rows, make_params())
  assert (rows.weight_BT != 0).sum() == sum(len(text.tokens) for text in written)
  np.testing.assert_allclose(got_BT, rows.old_BT, atol=1e-4)


def test_a_policy_and_a_batch_without_its_log_p_are_refused_and_the_reverse():
  batch = batch_of(policykit.rows_of(all_advantages()))
  with pytest.raises(ValueError, match="beside what every batch has"):
    gradient(batch, (1, 1, 1), None)
  without = {name: array for name, array in batch.items() if name[:-4] not in step.OLD}
  with pytest.raises(ValueError, match="beside what every batch has"):
    gradient(without, (1, 1, 1))


def test_a_line_has_the_mean_kl_and_the_fraction_outside_the_clip_and_survives_json():
  zeros_R = np.zeros(NUM_ROLES, np.float32)
  sums = Sums(np.float32(3), np.float32(8), zeros_R, zeros_R, zeros_R, None, PolicySums(*np.float32([2, 4, 8])))
  steps = metrics.StepMetrics(sums, np.int32(1), np.float32(1), np.float32(1))
  meter = metrics.Meter()
  meter.add(steps)
  again = metrics.Meter(json.loads(json.dumps(meter.to_json())))
  again.add(steps._replace(sums=sums._replace(policy=PolicySums(*np.float32([0, 0, 8])))))
  line = again.line()
  assert (line["policy/kl"], line["policy/clipped"]) == (2 / 16, 4 / 16)
  earlier = [[totals[0][:6], *totals[1:]] for totals in meter.to_json()]  # as versions without a policy saved them
  again = metrics.Meter(earlier)
  again.add(steps._replace(sums=sums._replace(policy=None)))
  line = again.line()
  assert line["loss"] == 3 / 8
  assert "policy/kl" not in line

"""Averages of the weights through the programs: what train measures and saves is what export writes."""

import numpy as np
import pytest
from modelkit import run
from orbax.checkpoint import v1 as ocp
from training_runs import train, write_home

from insec_jax.model import hf
from insec_jax.training import layout, stored

pytestmark = pytest.mark.processes
STEPS = 3
RUNS = {
  "plain": (),
  "ema": ("optimizer.ema=0.5",),
  "free": ("optimizer.name=schedule_free", "optimizer.final_share=1.0"),
}
SHARED = ("optimizer.warmup_steps=0", f"train.steps={STEPS}", "train.checkpoint_every=1", "train.keep=3")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a workdir of each run, and the exports NAME-STEP of their last two steps."""
  folder = tmp_path_factory.mktemp("averages")
  write_home(folder)
  for name, changes in RUNS.items():
    train(folder, name, *SHARED, *changes)
  exports = [
    [f"--model={name}", f"--step={step}", f"--output={name}-{step}"] for name in RUNS for step in (STEPS - 1, STEPS)
  ]
  for code, _, said in run("export", *exports, folder=folder):
    assert code == 0, said
  return folder


def exported(home, name, step):
  """Some weights of an export, as one array."""
  folder = home / f"{name}-{step}"
  weights = hf.stored(folder, hf.read_config(folder))
  return np.concatenate([weights[path][...].ravel() for path in ("embed", "head")])


def test_a_run_with_ema_exports_the_average_of_the_weights_of_a_run_without(home):
  before, after = (exported(home, "ema", step) for step in (STEPS - 1, STEPS))
  weights = exported(home, "plain", STEPS)
  np.testing.assert_allclose(after, 0.5 * before + 0.5 * weights, rtol=1e-5, atol=1e-7)
  assert np.abs(after - weights).max() > 1e-3


def test_a_schedule_free_run_exports_the_average_of_the_weights_that_it_moves(home):
  before, after = (exported(home, "free", step) for step in (STEPS - 1, STEPS))
  moved = fast_weights(home / "free")
  np.testing.assert_allclose(after, before + (moved - before) / STEPS, rtol=1e-5, atol=1e-6)  # each step counts alike
  assert np.abs(after - moved).max() > 1e-3


def fast_weights(workdir):
  """z of the last checkpoint's optimizer state, as `exported` gives the weights."""
  checkpoint = (workdir / layout.CHECKPOINTS / str(STEPS)).absolute()
  prints = ocp.checkpointables_metadata(checkpoint).custom_metadata["run"]["fingerprints"]
  return np.concatenate(
    [
      stored.StoredWeight(checkpoint / "optimizer", f"z/{path}", fingerprint=prints[f"optimizer/z/{path}"])[...].ravel()
      for path in ("embed", "head")
    ]
  )

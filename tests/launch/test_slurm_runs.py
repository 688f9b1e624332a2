"""Real runs on two nodes of a pretended Slurm, disturbed: they end with the losses of one that was not."""

import json

import launchkit
import numpy as np
import pytest
from launchkit import until
from slurmkit import Cluster
from training_runs import read_lines, write_home

pytestmark = pytest.mark.processes
STEPS = 20
# The program train; process 0 pauses once at each place of `PAUSES`, with a file of its name for the test to see.
TRAIN = """
import os, pathlib, sys, time
from insec_jax import command, train
from insec_jax.training import checkpoint, metrics
folder = pathlib.Path(sys.argv[1])
del sys.argv[1]
def pause(place):
  if os.environ["SLURM_PROCID"] == "0" and not (folder / place).exists():
    (folder / place).touch()
    time.sleep(4)
write, save = metrics.Log.write, checkpoint.Saver.save
def write_then(self, step, values):
  write(self, step, values)
  pause(f"after.{step}")
def save_then(self, step, *arguments, **options):
  save(self, step, *arguments, **options)
  pause(f"save.{step}")
metrics.Log.write, checkpoint.Saver.save = write_then, save_then
command.run(train.main)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  return launchkit.clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def cluster(tmp_path, repository):
  made = Cluster(tmp_path, repository)
  write_home(made.home, STEPS)
  (made.home / "train.py").write_text(TRAIN)
  yield made
  made.end()


def start(cluster, workdir, pauses, *, code=None):
  """Queue the run, in which process 0 pauses at these places; with `code` wait for its end."""
  folder = cluster.home / f"{workdir}.places"
  folder.mkdir()
  for place in {f"after.{step}" for step in range(STEPS + 1)} | {f"save.{step}" for step in range(STEPS + 1)}:
    if place not in pauses:
      (folder / place).touch()
  words = [f"{cluster.home}/train.py", str(folder), f"--config={cluster.home}/config.py:"]
  words += [f"--workdir={cluster.home / workdir}", "--config.data.rows_per_device=4"]
  words += [f"--config.data.path={cluster.home}/records.jsonl", f"--config.tokenizer.path={cluster.home}/tokenizer"]
  options = ["--nodes=2", "--gpus=0", "--secret=LAB_PASSWORD", *(["--wait"] if code is not None else [])]
  variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", **launchkit.SECRETS}
  cluster.slurm("run", f"--job={workdir}", "--no-check", *options, "python", *words, code=code or 0, **variables)
  return folder


def test_a_run_preempted_during_a_save_or_short_of_a_node_has_the_same_losses(cluster):
  start(cluster, "whole", (), code=0)
  places = start(cluster, "hurt", ("after.2", "save.5", "after.8", "after.14"))
  for place, ask, value in (
    ("after.2", "preempt", "0"),  # before the first checkpoint; killed at once
    ("save.5", "preempt", "0"),  # while it is written
    ("after.8", "lose", ""),
    ("after.14", "preempt", "60"),  # SIGTERM, and time to save
  ):
    until(lambda place=place: (places / place).exists(), 120)
    cluster.ask(ask, value, job="4001")
  done = cluster.slurm("logs", "--job=hurt")
  assert done.stdout.count("--- ") >= 5 + 2
  assert "exit code 42; queued again" in done.stdout
  status = cluster.status("hurt")
  assert (status["state"], status["code"], status["metrics"]["step"]) == ("ended", 0, STEPS)
  whole, hurt = (read_lines(cluster.home / name) for name in ("whole", "hurt"))
  assert [line["step"] for line in hurt] == [line["step"] for line in whole]
  for one, other in zip(whole, hurt, strict=True):
    np.testing.assert_array_equal(list(one.values()), list(other.values()))
  # The secrets of the run are nowhere: not in its workdirs, logs and records of Slurm.
  environment = json.loads((cluster.home / "hurt" / "environment.json").read_text())
  assert len(environment["resumed"]) in (2, 3)  # 2 if the first save was not complete when the run was killed
  assert environment["commit"].startswith(status["commit"])
  assert launchkit.leaks(cluster.home, cluster.state, texts=(json.dumps(environment),)) == []

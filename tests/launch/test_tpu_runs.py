"""From create to an exported model by the commands of launch/tpu.sh: two hosts with two CPU devices each, a bucket."""

import json
import pathlib
import re
import signal

import numpy as np
import pytest
from bucketkit import Bucket, new_bucket
from cloudkit import NAME, Cloud, ended, make_cloud, until
from launchkit import clone
from safetensors.numpy import load
from training_runs import GRAPH, is_timed

pytestmark = pytest.mark.processes
CREATE = ("--type=cpu-4", "--version=none", "--spot")
CONFIG = (
  GRAPH.replace("c.rounds = 3", "c.rounds = 0")
  .replace("mined=0.4", "mined=0.0")
  .replace("rows_per_device=8", "rows_per_device=2")
  .replace("num_problems=1, num_probes=1", "num_problems=8, num_probes=8")
)
STEPS = 60


@pytest.fixture(scope="module")
def store() -> Bucket:
  """The bucket of all these runs."""
  return new_bucket()


@pytest.fixture
def cloud(tmp_path, store, tmp_path_factory) -> Cloud:
  """A cloud whose hosts are processes of one run on CPU, and reach the bucket; its code is this working tree."""
  code = tmp_path_factory.mktemp("code")
  clone(code)
  made = make_cloud(
    tmp_path / "cloud",
    code,
    **store.variables,
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="2",
    JAX_COORDINATOR_PORT="{port}",
    OMPI_MCA_orte_hnp_uri="0.0;tcp://127.0.0.1:1",
    OMPI_COMM_WORLD_SIZE="{size}",
    OMPI_COMM_WORLD_RANK="{rank}",
    OMPI_COMM_WORLD_LOCAL_RANK="0",
    JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.getbasetemp() / "launch-cache"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
  )
  (tmp_path / "config.py").write_text(CONFIG)
  yield made
  made.end()


def training(folder: pathlib.Path, workdir: str) -> list[str]:
  """The command of the run."""
  words = [f"--config={folder}/config.py", f"--workdir={workdir}", f"--config.train.steps={STEPS}"]
  return ["python", "-m", "insec_jax.train", *words, "--config.train.log_every=2", "--config.train.checkpoint_every=12"]


def lines(store: Bucket, name: str) -> list[dict]:
  """The lines of metrics of a workdir, without what the clock says."""
  found = [json.loads(line) for line in store.read(f"{name}/metrics.jsonl").splitlines()]
  return [{key: value for key, value in line.items() if not is_timed(key)} for line in found]


def last_step(cloud: Cloud) -> int:
  """The last step that a host has logged."""
  found = [
    path for home in cloud.hosts() for path in (home / "insec_jax/jobs/run/tmp").glob("insec_gs_*/**/metrics.jsonl")
  ]
  logged = [json.loads(line)["step"] for path in found for line in path.read_text().splitlines()[-1:]]
  return max(logged, default=0)


def test_from_create_to_an_exported_model_with_two_preemptions_between(cloud, store, tmp_path):
  cloud.tpu("create", *CREATE)
  said = cloud.tpu("run", "--wait", *training(tmp_path, f"{store.url}/whole"), timeout=200)
  assert re.search(r"^workdir +all 2  ok ", said, re.MULTILINE), "the table of the checks"
  watcher = cloud.start("run", "--keep-alive", *CREATE, *training(tmp_path, f"{store.url}/run"))
  for step in (2, 30):  # before the first checkpoint, and between two
    until(lambda step=step: last_step(cloud) >= step, 120)
    cloud.preempt(number=signal.SIGKILL)
    until(lambda: not cloud.read()["nodes"])
  assert "try 2 of 20" in ended(watcher, timeout=200)
  assert lines(store, "run") == lines(store, "whole")
  resumed = json.loads(store.read("run/environment.json"))
  assert [one["step"] for one in resumed["resumed"]]
  assert resumed["commit"]
  assert resumed["diff"] == ""
  reading = [f"--model={store.url}/run", f"--config={tmp_path}/config.py"]
  words = ("python", "-m", "insec_jax.evaluate", *reading, f"--output={store.url}/run/results.json")
  cloud.tpu("run", "--wait", "--job=evaluate", *words, timeout=200)
  assert json.loads(store.read("run/results.json"))
  for name in ("run", "whole"):
    words = ("python", "-m", "insec_jax.export", f"--model={store.url}/{name}", f"--output={store.url}/{name}-hf")
    cloud.tpu("run", "--wait", f"--job=export-{name}", f"--host={NAME}/0", *words, timeout=120)
  one, other = (load(store.read(f"{name}-hf/model.safetensors")) for name in ("run", "whole"))
  assert one.keys() == other.keys()
  for key in one:
    np.testing.assert_array_equal(one[key], other[key])
  cloud.tpu("delete")
  assert cloud.nothing_costs_money()

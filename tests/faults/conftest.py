"""Inputs that are made once for all tries."""

import os
import pathlib
import subprocess

import pytest
import tries
from datakit import config as make_config
from modelkit import save_model
from workdirs import Programs

from insec_jax.data import vocabulary


@pytest.fixture(scope="session")
def home(tmp_path_factory):
  """A folder with a config, a model, prompts, a trained workdir and a cache of compiled programs."""
  if given := os.environ.get("FAULTS_HOME"):  # kept between calls of pytest
    folder = pathlib.Path(given)
    folder.mkdir(exist_ok=True)
  else:
    folder = tmp_path_factory.mktemp("faults")
  if (folder / "ready").exists():
    return folder
  (folder / "config.py").write_text(tries.CONFIG)
  config = make_config(
    task__name="graph",
    task__min_size=2,
    task__max_size=3,
    task__modulus=10,
    data__path="",
    data__num_records=9,
    mistakes__source="injected",
  )
  save_model(folder / "hf", vocabulary.open_tokenizer(config).tokenizer)
  (folder / "prompts.jsonl").write_text('{"tokens": [3, 4, 5]}\n')
  tries.attempt(folder, (*tries.TRAIN, "--workdir=trained", "--config.train.keep=9"), folder).check(0)
  for program in ("evaluate", "mine", "generate"):  # compiled programs
    out = folder / f"warm_{program}"
    out.mkdir()
    tries.attempt(folder, program, out).check(0)
  (folder / "ready").touch()
  return folder


@pytest.fixture(scope="module")
def programs(home):
  """The programs, to be started in the folder `home` of the test file."""
  found = Programs(home)
  yield found
  found.close()


@pytest.fixture
def small_disk(tmp_path):
  """A function that mounts a small disk with these options and gives its folder; unmounted at the end."""
  mounted = []

  def mount(options: str) -> pathlib.Path:
    folder = tmp_path / f"disk{len(mounted)}"
    folder.mkdir()
    done = subprocess.run(
      ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
      pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    mounted.append(folder)
    return folder

  yield mount
  for folder in mounted:
    subprocess.run(["umount", "-l", str(folder)], check=False)

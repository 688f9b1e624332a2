"""Several processes train one model: real ones, on this machine, forked from one that has imported what is slow."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from training_runs import read_lines, write_home

from insec_jax.training import layout, stored

pytestmark = pytest.mark.processes
ROOT = pathlib.Path(__file__).parents[2]
ROWS, STEPS = 8, 20
# Forks a process for each job of a line; no device is touched before the fork. Answers with their exit codes, and how
# long after the first of them each ended.
SERVER = """
import json, os, runpy, signal, sys, time
import flax.linen, grain, jax, optax, orbax.checkpoint, tensorboardX, tqdm, transformers
from insec_jax.distributed.relay import Relay
from insec_jax.training import checkpoint, metrics

def slow(seconds):
  send = Relay._send
  class Line:
    def __init__(self, line):
      self.line = line
    def recv(self, size):
      data = self.line.recv(size)
      time.sleep(seconds)
      return data
  Relay._send = lambda self, near, far: send(self, Line(near), far)

def hurt(at, number, pause):
  add, steps = metrics.Meter.add, []
  def add_then(self, step):
    add(self, step)
    steps.append(step)
    if len(steps) >= at:
      os.kill(os.getpid(), number if len(steps) == at else 0)
      time.sleep(pause)
  metrics.Meter.add = add_then

for line in sys.stdin:
  jobs, children = json.loads(line), {}
  for number, job in enumerate(jobs):
    child = os.fork()
    children[child] = number
    if not child:
      file = os.open(job["out"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
      os.dup2(file, 1)
      os.dup2(file, 2)
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      sys.argv = ["train", *job["arguments"]]
      code = 0
      if job["slow"]:
        slow(job["slow"])
      if job["hurt"]:
        os.chdir(job["hurt"][1]) if job["hurt"][0] == "chdir" else hurt(*job["hurt"])
      try:
        runpy.run_module("insec_jax.train", run_name="__main__", alter_sys=True)
      except SystemExit as stop:
        code = stop.code
      except BaseException as error:
        print(repr(error))
        code = 1
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
  ended, first = [None] * len(jobs), None
  while children:
    child, status = os.wait()
    first = first or time.monotonic()
    ended[children.pop(child)] = os.waitstatus_to_exitcode(status), time.monotonic() - first
  print(json.dumps(ended), flush=True)
"""


class Ended(NamedTuple):
  """How a process ended: exit code, seconds after the first of its run, and what it said."""

  code: int
  seconds: float
  said: str

  @property
  def last_line(self) -> str:
    return self.said.splitlines()[-1]


def free_port() -> int:
  with socket.socket() as one:
    one.bind(("", 0))
    return one.getsockname()[1]


class Runs:
  """Runs of train in a folder that holds config, records and tokenizer."""

  def __init__(self, home: pathlib.Path):
    self.home = home
    environment = {
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "1",
      "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "TOKENIZERS_PARALLELISM": "false",
    }
    self._server = subprocess.Popen(
      [sys.executable, "-c", SERVER],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
      cwd=home,
    )

  def __call__(self, workdir, num, *changes, hurt=(), only=None, each=None, flags=(), slow=0) -> list[Ended]:
    """Each process of a run of `num`, or those of them named by `only`.

    `changes` of the config are for all, `each` has those of one process. `hurt` holds, by process, (step, signal that
    it sends itself then, seconds by which it is slower from then on). `slow` is in seconds a message to process 0.
    """
    port, jobs = free_port(), []
    for index in range(num) if only is None else only:
      together = (f"--coordinator=localhost:{port}", f"--num_processes={num}", f"--process_id={index}")
      values = (f"data.rows_per_device={ROWS // num}", *changes, *(each or {}).get(index, ()))
      jobs.append(
        {
          "out": str(self.home / f"said.{index}"),
          "hurt": dict(hurt).get(index),
          "slow": slow,
          "arguments": [
            f"--config={self.home / 'config.py'}:",
            f"--workdir={workdir}",
            *(together if num > 1 else ()),
            *flags,
            *(f"--config.{value}" for value in values),
          ],
        }
      )
    self._server.stdin.write(json.dumps(jobs) + "\n")
    self._server.stdin.flush()
    ended = json.loads(self._server.stdout.readline())
    return [Ended(*end, pathlib.Path(job["out"]).read_text()) for end, job in zip(ended, jobs, strict=True)]

  def well(self, *arguments, code=0, **options) -> list[Ended]:
    """As a call; every process must end with this code."""
    ended = self(*arguments, **options)
    assert [end.code for end in ended] == [code] * len(ended), "\n\n".join(end.said for end in ended)
    return ended

  def lines(self, workdir):
    return read_lines(self.home / workdir)

  def files(self, workdir):
    """Every file with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in (self.home / workdir).rglob("*")}

  def checkpoints(self, workdir):
    return sorted(int(path.name) for path in (self.home / workdir / "checkpoints").iterdir())

  def close(self):
    self._server.stdin.close()
    self._server.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  home = tmp_path_factory.mktemp("hosts")
  write_home(home, steps=STEPS)
  made = Runs(home)
  yield made
  made.close()


@pytest.fixture(scope="module")
def alone(runs):
  """What a single process logs."""
  runs.well("alone", 1)
  return runs.lines("alone")


@pytest.fixture(scope="module")
def four(runs):
  """What four processes log that nothing interrupted."""
  said = [end.said for end in runs.well("four", 4)]
  assert f"step {STEPS}/{STEPS}" in said[0]
  assert not any("step" in other for other in said[1:])  # one speaks for all
  return runs.lines("four")


def assert_same_losses(got, want):
  assert [line["step"] for line in got] == [line["step"] for line in want] == list(range(0, STEPS + 1, 2))
  for key in ("loss", "eval/loss"):
    np.testing.assert_allclose(*([line[key] for line in lines if key in line] for lines in (got, want)), rtol=1e-6)


def test_two_and_four_processes_give_the_losses_of_one(runs, alone, four):
  assert_same_losses(four, alone)
  runs.well("two", 2)
  assert_same_losses(runs.lines("two"), alone)
  environment = json.loads((runs.home / "four" / "environment.json").read_text())
  assert environment["devices"]["processes"] == len(environment["hosts"]) == 4


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_processes_that_share_rows_give_the_losses_of_one(runs, alone, axis):
  """By heads, or by positions: then each reads the whole rows and keeps its columns of them."""
  runs.well(axis, 2, "mesh.fsdp=1", f"mesh.{axis}=2", f"data.rows_per_device={ROWS}")
  assert_same_losses(runs.lines(axis), alone)


def test_two_processes_train_lora_to_the_losses_and_the_checkpoint_of_one(runs):
  lora = ("lora.rank=4", "lora.matrices=('wq','wo','down')")
  for name, num in (("lora_alone", 1), ("lora_two", 2)):
    runs.well(name, num, *lora)
  assert_same_losses(runs.lines("lora_two"), runs.lines("lora_alone"))
  one, two = (lora_checkpoint(runs.home / name) for name in ("lora_alone", "lora_two"))
  assert one.keys() == two.keys() >= {"layers/mlp/down/a", "layers/attn/wo/b", "rows/embed", "rows/head"}
  for path, array in one.items():
    np.testing.assert_allclose(two[path], array, rtol=1e-3, atol=1e-5, err_msg=path)
    assert np.abs(array).max() > 1e-3


def lora_checkpoint(workdir):
  """The trained arrays of the last checkpoint, after the frozen weights have been read and recognised."""

  def use(_, checkpoint):
    for weight in jax.tree.leaves(checkpoint.read_base()):
      weight[(slice(None),) * len(weight.shape)]
    return flatten_dict(checkpoint.trained, sep="/")

  return stored.read_params(workdir, layout.read_model(workdir), STEPS, use, of_part=lambda checkpoint: checkpoint)


def test_sigterm_saves_on_all_after_one_step_also_with_messages_slower_than_steps(runs):
  ended = runs.well("slow", 2, code=42, hurt={0: (5, 15, 0.02), 1: (5, 0, 0.5)}, slow=0.3)
  step = int(re.search(r"stopped by a signal: saved after step (\d+)", ended[0].said)[1])
  assert 5 <= step < STEPS
  assert runs.checkpoints("slow")[-1] == step
  assert max(end.seconds for end in ended) < 30


def test_losses_are_the_same_from_four_processes_to_one_past_a_damaged_checkpoint(runs, alone):
  slowly = {number: (7, 15 if number == 2 else 0, 0.2) for number in range(4)}  # SIGTERM to one of them
  stopped = runs.well("elastic", 4, code=42, hurt=slowly)
  step = int(re.search(r"stopped by a signal: saved after step (\d+)", stopped[0].said)[1])
  assert 7 <= step < STEPS
  assert runs.checkpoints("elastic")[-1] == step
  assert max(end.seconds for end in stopped) < 30

  before = runs.files("elastic")
  refused = runs.well("elastic", 2, "data.rows_per_device=3", code=2)
  assert all(
    "is 6, was 8; give data.rows_per_device and data.accumulation 4 and 1, or 2 and 2, or 1 and 4" in end.last_line
    for end in refused
  )
  assert runs.files("elastic") == before

  newest = runs.home / "elastic" / "checkpoints" / str(step) / "params"
  largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)
  good = runs.checkpoints("elastic")[-2]
  stopped = runs.well("elastic", 2, code=42, hurt=dict.fromkeys(range(2), (3, 15, 0.2)))  # SIGTERM to all
  assert len(re.findall(f"checkpoint {step} of elastic is damaged", stopped[0].said)) == 1
  assert f"resuming elastic after step {good}" in stopped[0].said
  assert (runs.home / "elastic" / "damaged" / str(step)).is_dir()

  runs.well("elastic", 1)
  assert_same_losses(runs.lines("elastic"), alone)
  assert len(json.loads((runs.home / "elastic" / "environment.json").read_text())["resumed"]) == 2


def test_one_of_four_is_killed_the_others_name_it_and_the_run_goes_on_to_the_bit(runs, four):
  ended = runs("killed", 4, hurt={2: (12, 9, 0)})
  assert [end.code for end in ended] == [1, 1, -9, 1]
  assert max(end.seconds for end in ended) < 60
  for end in (ended[0], ended[1], ended[3]):
    assert end.last_line.startswith(f"error: missing: process 2 ({socket.gethostname()})")
    assert "Traceback" not in end.said
  runs.well("killed", 4)
  assert runs.lines("killed") == four


def test_process_0_is_killed_and_the_other_names_it(runs):
  ended = runs("first", 2, hurt={0: (3, 9, 0)})
  assert [end.code for end in ended] == [-9, 1]
  assert ended[1].last_line.startswith(f"error: missing: process 0 ({socket.gethostname()})")
  assert ended[1].seconds < 60


def test_another_config_is_named_with_its_process_by_all_and_nothing_is_written(runs):
  ended = runs.well("other", 2, code=2, each={1: ["optimizer.b1=0.8"]})
  assert all(
    f"process 1 ({socket.gethostname()}) has optimizer.b1 0.8, the others 0.9" in end.last_line for end in ended
  )
  assert not (runs.home / "other").exists()


def test_a_missing_process_is_named_when_time_is_up(runs):
  ended = runs.well("lonely", 4, code=2, only=(0, 2), flags=["--join_seconds=3"])
  assert all("missing: processes 1, 3 of 4; waited 3 s" in end.last_line for end in ended)
  ended = runs.well("lonely", 2, code=2, only=(1,), flags=["--join_seconds=1"])
  assert "process 0 is missing: process 1" in ended[0].last_line


def test_input_that_is_wrong_on_one_host_ends_all_with_code_2_and_names_it(runs):
  elsewhere = runs.home / "elsewhere"
  elsewhere.mkdir(exist_ok=True)
  ended = runs.well("wrong", 2, code=2, hurt={1: ("chdir", str(elsewhere), 0)})
  assert all(f"process 1 ({socket.gethostname()})" in end.last_line for end in ended)
  assert not (runs.home / "wrong").exists()

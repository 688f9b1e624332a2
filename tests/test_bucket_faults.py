"""Runs in a bucket whose store or processes fail: they are the same in the end, or end in one line and resume."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from bucketkit import Proxy, new_bucket
from training_runs import ROOT, SIGNALLED, read_lines, train, train_in_two, write_home

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a config and the workdir `whole` of a run on the disk."""
  folder = tmp_path_factory.mktemp("faults")
  write_home(folder, steps=20)
  train(folder, "whole")
  return folder


def proxied(rule):
  """(bucket, the environment of programs that reach it through a proxy with this rule)."""
  proxy = Proxy(rule)
  bucket = new_bucket(proxy.address)
  return bucket, {**bucket.variables}


def lines_of(bucket, tmp_path):
  return read_lines(bucket.download("run", tmp_path / "copy"))


def test_a_store_that_fails_and_is_slow_now_and_then_changes_nothing(home, tmp_path):
  numbers, answers = itertools.count(), {5: 503, 60: 429, 100: 0.8, 140: 500, 180: 503, 230: 408, 280: 0.8}
  bucket, variables = proxied(lambda *_: answers.get(next(numbers)))
  train(home, f"{bucket.url}/run", **variables)
  assert next(numbers) > 280
  assert lines_of(bucket, tmp_path) == read_lines(home / "whole")


def test_a_refusal_in_the_middle_is_one_line_and_the_run_goes_on_later(home, tmp_path):
  refusing = []

  def rule(method, path, body):
    if b"checkpoints/10" in body or "checkpoints%2F10" in path:
      refusing.append(path)
    return 403 if refusing and method == "POST" else None

  bucket, variables = proxied(rule)
  said = train(home, f"{bucket.url}/run", code=None, **variables)
  assert "Traceback" not in said
  assert said.splitlines()[-1].startswith("error: ")
  assert "denied" in said.splitlines()[-1] or "refuses access" in said.splitlines()[-1]
  said = train(home, f"{bucket.url}/run", **new_bucket().variables)
  assert "after step 5" in said
  assert lines_of(bucket, tmp_path) == read_lines(home / "whole")


def test_a_stopped_run_has_uploaded_its_lines_and_given_back_its_lease(home):
  bucket = new_bucket()
  train(home, f"{bucket.url}/run", program=("-c", SIGNALLED), code=42, SIGNAL=15, SIGNAL_AT=6, **bucket.variables)
  lines = [json.loads(line)["step"] for line in bucket.read("run/metrics.jsonl").splitlines()]
  assert lines == [0, 2, 4, 6]
  assert not [name for name in bucket.names() if name.endswith(".lock")]


def test_two_processes_train_into_a_bucket_and_resume(home, tmp_path):
  bucket = new_bucket()
  for code, signal_at in ((42, 8), (0, -1)):
    words = (f"--workdir={bucket.url}/run", "--config.data.rows_per_device=4")
    train_in_two(home, SIGNALLED, *words, code=code, SIGNAL=15, SIGNAL_AT=signal_at, **bucket.variables)
  got, want = lines_of(bucket, tmp_path), read_lines(home / "whole")
  assert [line["step"] for line in got] == [line["step"] for line in want]
  np.testing.assert_allclose([line["loss"] for line in got[1:]], [line["loss"] for line in want[1:]], rtol=1e-4)


WRITER = """
import os, sys, time
from insec_jax import command
from insec_jax.files.writing import written_whole
def main():
  with written_whole(sys.argv[1]) as file:
    file.write("half")
    if len(sys.argv) > 2:
      os.kill(os.getpid(), int(sys.argv[2]))
      time.sleep(60)
stop = sys.argv[2:]
url = sys.argv[1]
sys.argv = ["x"]
command.run(lambda: (sys.argv.extend([url, *stop]), main())[1])
"""


def test_a_signal_gives_a_lease_back_and_a_killed_writer_is_followed_at_once():
  bucket = new_bucket()
  environment = {**os.environ, **bucket.variables, "PYTHONPATH": str(ROOT)}
  ran = []
  for signals in (["15"], ["9"], []):
    words = [sys.executable, "-c", WRITER, f"{bucket.url}/out", *signals]
    ran.append(subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=40))
    assert bucket.names() == ([".out.lock"] if signals == ["9"] else [] if signals else ["out"]), ran[-1].stderr
  assert [one.returncode for one in ran] == [143, -9, 0]

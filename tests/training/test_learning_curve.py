"""A run measures its learning curve as it goes; stopped anywhere, it has each point once, and trains the same."""

import pytest
from training_runs import GRAPH, SIGNALLED, read_lines, train, train_in_two

pytestmark = pytest.mark.processes
WITHOUT = ("rounds=0", "mistakes.mined=0.0", "train.log_every=1", "train.keep=1", "evaluate.num_problems=8")
POINTS = (*WITHOUT, "train.curve_points=4")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("curve")
  (folder / "config.py").write_text(GRAPH)
  return folder


@pytest.fixture(scope="module")
def whole(home):
  train(home, "whole", *POINTS)
  return read_lines(home / "whole")


def test_points_stand_in_the_lines_of_their_steps_and_change_nothing_else(home, whole):
  at = {line["step"]: line for line in whole if "curve/problems" in line}
  assert sorted(at) == [5, 10, 15, 20]
  for line in at.values():
    assert line["curve/problems"] == 8
    assert 0 <= line["curve/accuracy"] <= 1
    assert 0 <= line["curve/accuracy_banned"] <= 1
    assert line["trained_tokens"] > 0
  train(home, "without", *WITHOUT)
  plain = [{key: value for key, value in line.items() if not key.startswith("curve/")} for line in whole]
  assert read_lines(home / "without") == plain


def test_killed_after_a_point_the_run_has_each_point_once_without_its_checkpoints(home, whole):
  train(home, "cut", *POINTS, program=("-c", SIGNALLED), code=-9, SIGNAL=9, SIGNAL_AT=15)
  train(home, "cut", *POINTS)
  assert read_lines(home / "cut") == whole
  assert [path.name for path in (home / "cut" / "checkpoints").iterdir() if path.name.isnumeric()] == ["20"]


def test_two_processes_share_the_problems_of_a_point(home):
  changes = [f"--config.{change}" for change in (*POINTS, "data.rows_per_device=4")]
  program = "from insec_jax import command, train\ncommand.run(train.main)\n"
  train_in_two(home, program, f"--workdir={home / 'two'}", *changes)
  found = [line for line in read_lines(home / "two") if "curve/problems" in line]
  assert [(line["step"], line["curve/problems"]) for line in found] == [(step, 8) for step in (5, 10, 15, 20)]

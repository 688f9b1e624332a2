"""A run by distillation finds mistakes as it goes; stopped anywhere, it ends as if it never had been."""

import json

import numpy as np
import pytest
from training_runs import GRAPH, MINING, SIGNALLED, read_lines, train, train_in_two

pytestmark = pytest.mark.processes
CHANGES = (
  "mistakes.mined=0.0",
  "policy.method=distill",
  "policy.contrast=0.5",
  "policy.forward=0.25",
  "mine.num_problems=12",
  "mine.samples=4",
  "data.row_length=96",
)
AFTER_LINE = SIGNALLED.replace(
  "command.run", "from insec_jax.mining import miner\nminer.SAMPLES_PER_CHUNK = 8\ncommand.run"
)
CHUNKS = 6  # of a round, of eight samples each


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("distill")
  (folder / "config.py").write_text(GRAPH)
  return folder


@pytest.fixture(scope="module")
def whole(home):
  """(workdir of a run that nothing interrupted, what it said)."""
  said = train(home, "whole", *CHANGES, program=("-c", MINING))
  return home / "whole", said


def held(workdir, number):
  return (workdir / "mined" / f"round_{number}.jsonl").read_bytes()


def test_each_part_of_the_steps_is_trained_on_mistakes_of_the_weights_before_it(whole):
  workdir, said = whole
  files = {path.name for path in (workdir / "mined").iterdir()}
  assert files == {f"round_{number}.{kind}" for number in (1, 2, 3) for kind in ("jsonl", "json", "txt")}
  assert "round 1 of 3\n48 samples of 12 problems" in said
  lines = {line["step"]: line for line in read_lines(workdir)}
  for number, step in ((1, 2), (2, 8), (3, 20)):
    found = json.loads((workdir / "mined" / f"round_{number}.json").read_text())["found"]
    assert found["mistakes"] > 0
    assert lines[step]["policy/wrong"] == found["wrong"] / 48
    assert lines[step]["divergence/flag"] > 0
  # The teacher keeps the weights of the start, and random ones read no hint: the student has hardly left it.
  assert lines[20]["loss"] < 1
  assert len({held(workdir, number) for number in (1, 2, 3)}) == 3


def test_stopped_anywhere_it_gives_the_same_losses_and_mistakes(home, whole):
  given = {"program": ("-c", MINING)}
  train(home, "cut", *CHANGES, code=-9, SIGNAL=9, SIGNAL_AFTER=2, **given)  # in the first round, before any step
  said = train(home, "cut", *CHANGES, code=42, SIGNAL=15, SIGNAL_AFTER=CHUNKS - 2 + 3, **given)  # in the second
  assert "2 of 6 chunks were made before" in said
  said = train(home, "cut", *CHANGES, program=("-c", AFTER_LINE), code=-9, SIGNAL=9, SIGNAL_AT=10)  # within the second
  assert "3 of 6 chunks were made before" in said
  said = train(home, "cut", *CHANGES, **given)
  assert "resuming" in said
  assert read_lines(home / "cut") == read_lines(whole[0])
  assert [held(home / "cut", number) for number in (1, 2, 3)] == [held(whole[0], number) for number in (1, 2, 3)]


def test_lora_distils_from_base_and_adapters_on_two_devices_and_resumes(home):
  changes = (
    *CHANGES,
    "lora.rank=4",
    "precision.params=bfloat16",
    "rounds=2",
    "train.steps=8",
    "policy.teacher=current",
  )
  given = {"program": ("-c", MINING), "devices": 2}
  changes = (*changes, "data.rows_per_device=4")  # the same rows a step on two devices
  train(home, "lora", *changes, **given)
  train(home, "lora_cut", *changes, code=42, SIGNAL_AFTER=CHUNKS + 2, SIGNAL=15, **given)  # in the second round
  train(home, "lora_cut", *changes, **given)
  assert read_lines(home / "lora_cut") == read_lines(home / "lora")


def test_two_processes_share_the_sampling_and_train_to_the_same_losses(home, whole):
  changes = [f"--config.{change}" for change in (*CHANGES, "data.rows_per_device=4")]
  train_in_two(home, MINING, f"--workdir={home / 'two'}", *changes)
  assert held(home / "two", 1) == held(whole[0], 1)
  got, want = (read_lines(folder) for folder in (home / "two", whole[0]))
  np.testing.assert_allclose([line["loss"] for line in got[1:3]], [line["loss"] for line in want[1:3]], rtol=1e-3)

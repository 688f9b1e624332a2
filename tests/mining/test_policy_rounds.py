"""A run by policy gradient samples as it goes; stopped anywhere, it ends as if it never had been."""

import json
import shutil

import numpy as np
import pytest
from bucketkit import new_bucket
from training_runs import GRAPH, MINING, SIGNALLED, read_lines, train, train_in_two

pytestmark = pytest.mark.processes
CHANGES = (
  "mistakes.mined=0.0",
  "policy.method=gradient",
  "policy.flag_price=0.125",  # random weights give no right answer: rewards differ by flags
  "policy.kl=0.5",
  "mine.num_problems=12",
  "mine.samples=4",
)
AFTER_LINE = SIGNALLED.replace(
  "command.run", "from insec_jax.mining import miner\nminer.SAMPLES_PER_CHUNK = 8\ncommand.run"
)
CHUNKS = 6  # of a round, of eight samples each


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("policy")
  (folder / "config.py").write_text(GRAPH)
  return folder


@pytest.fixture(scope="module")
def whole(home):
  """(workdir of a run that nothing interrupted, what it said)."""
  said = train(home, "whole", *CHANGES, program=("-c", MINING))
  return home / "whole", said


def held(workdir, number):
  folder = workdir / "mined"
  return (folder / f"round_{number}.jsonl").read_bytes(), json.loads(
    (folder / f"round_{number}.logps.json").read_text()
  )


def test_each_part_of_the_steps_is_trained_on_samples_of_the_weights_before_it(whole):
  workdir, said = whole
  files = {path.name for path in (workdir / "mined").iterdir()}
  assert files == {f"round_{number}.{kind}" for number in (1, 2, 3) for kind in ("jsonl", "json", "txt", "logps.json")}
  assert "round 1 of 3\n48 samples of 12 problems" in said
  lines = {line["step"]: line for line in read_lines(workdir)}
  for number, step in ((1, 2), (2, 8), (3, 20)):
    samples, logps = held(workdir, number)
    found = json.loads((workdir / "mined" / f"round_{number}.json").read_text())["found"]
    assert found["samples"] == 48
    assert lines[step]["policy/reward"] == found["reward"] / 48
    records = [json.loads(line) for line in samples.splitlines()]
    assert len(logps["old"]) == sum(len(record["tokens"]) - record["start"] for record in records)
    # Before the first step the reference has sampled; later it is still the weights that the run began with.
    assert (logps["old"] == logps["reference"]) == (number == 1)
  assert lines[2]["policy/kl"] < lines[20]["policy/kl"]


def test_stopped_anywhere_it_gives_the_same_losses_and_samples(home, whole):
  given = {"program": ("-c", MINING)}
  train(home, "cut", *CHANGES, code=-9, SIGNAL=9, SIGNAL_AFTER=2, **given)  # in the first round, before any step
  said = train(home, "cut", *CHANGES, code=42, SIGNAL=15, SIGNAL_AFTER=CHUNKS - 2 + 3, **given)  # in the second
  assert "2 of 6 chunks were made before" in said
  assert "mining is cut short before step 7" in said.splitlines()[-1]
  said = train(home, "cut", *CHANGES, program=("-c", AFTER_LINE), code=-9, SIGNAL=9, SIGNAL_AT=10)  # within the second
  assert "3 of 6 chunks were made before" in said
  said = train(home, "cut", *CHANGES, **given)
  assert "resuming" in said
  assert read_lines(home / "cut") == read_lines(whole[0])
  assert [held(home / "cut", number) for number in (1, 2, 3)] == [held(whole[0], number) for number in (1, 2, 3)]


@pytest.mark.parametrize("name", ["round_3.jsonl", "round_3.logps.json"])
def test_a_run_does_not_go_on_without_the_samples_it_was_trained_on(home, whole, tmp_path, name):
  shutil.copytree(whole[0], tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "checkpoints" / "20")
  (tmp_path / "broken" / "mined" / name).unlink()
  said = train(home, tmp_path / "broken", *CHANGES, code=2)
  assert name in said.splitlines()[-1]


def test_in_a_bucket_a_run_killed_while_it_samples_goes_on_from_its_chunks(home, whole, tmp_path):
  store = new_bucket()
  workdir = f"{store.url}/runs/a"
  given = {"program": ("-c", MINING), **store.variables}
  train(home, workdir, *CHANGES, code=-9, SIGNAL=9, SIGNAL_AFTER=2 * CHUNKS + 2, **given)  # in the third round
  said = train(home, workdir, *CHANGES, **given)
  assert "2 of 6 chunks were made before" in said
  copy = store.download("runs/a", tmp_path / "a")
  assert read_lines(copy) == read_lines(whole[0])
  assert [held(copy, number) for number in (1, 2, 3)] == [held(whole[0], number) for number in (1, 2, 3)]


def test_lora_samples_with_base_and_adapters_and_its_reference_is_the_base(home):
  changes = (*CHANGES, "lora.rank=4", "precision.params=bfloat16", "optimizer.learning_rate=0.02", "rounds=2")
  given = {"program": ("-c", MINING), "devices": 2}
  changes = (*changes, "train.steps=8", "data.rows_per_device=4")  # the same rows a step on two devices
  train(home, "lora", *changes, **given)
  train(home, "lora_cut", *changes, code=42, SIGNAL_AFTER=CHUNKS + 2, SIGNAL=15, **given)  # in the second round
  train(home, "lora_cut", *changes, **given)
  assert read_lines(home / "lora_cut") == read_lines(home / "lora")
  assert held(home / "lora_cut", 2) == held(home / "lora", 2)
  _, logps = held(home / "lora", 2)
  assert logps["old"] != logps["reference"]


def test_two_processes_share_the_sampling_and_measure_the_same_log_p(home, whole):
  changes = [f"--config.{change}" for change in (*CHANGES, "data.rows_per_device=4")]
  train_in_two(home, MINING, f"--workdir={home / 'two'}", *changes)
  (samples, logps), (want_samples, want_logps) = held(home / "two", 1), held(whole[0], 1)
  assert samples == want_samples
  np.testing.assert_allclose(logps["old"], want_logps["old"], rtol=1e-4)
  got, want = (read_lines(folder) for folder in (home / "two", whole[0]))
  np.testing.assert_allclose([line["loss"] for line in got[1:3]], [line["loss"] for line in want[1:3]], rtol=1e-3)

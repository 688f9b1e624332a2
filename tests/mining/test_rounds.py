"""A run in rounds mines its own mistakes as it goes; stopped anywhere, it ends as if it never had been."""

import json
import shutil
from signal import SIGTERM

import jax
import numpy as np
import pytest
from training_runs import GRAPH, MINING, SIGNALLED, read_lines, train, train_in_two

from insec_jax.generation.loading import load_model

pytestmark = pytest.mark.processes
CHUNKS = 6  # of a round


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rounds")
  (folder / "config.py").write_text(GRAPH)
  return folder


@pytest.fixture(scope="module")
def whole(home):
  """(workdir of a run that nothing interrupted, what it said)."""
  said = train(home, "whole", program=("-c", MINING))
  return home / "whole", said


def mined(workdir):
  return [(workdir / "mined" / f"round_{number}.jsonl").read_bytes() for number in (1, 2, 3)]


def test_each_part_of_the_steps_is_trained_on_what_the_weights_before_it_got_wrong(whole):
  workdir, said = whole
  files = {path.name for path in (workdir / "mined").iterdir()}
  assert files == {f"round_{number}.{kind}" for number in (1, 2, 3) for kind in ("jsonl", "json", "txt")}
  records = mined(workdir)
  assert len({*records}) == 3
  assert all(lines.count(b"\n") > 3 for lines in records)
  for number in (1, 2, 3):
    summary = json.loads((workdir / "mined" / f"round_{number}.json").read_text())
    assert summary["found"]["counts"]["samples"] == 48
    found = summary["found"]
    assert found["mistake_records"] + found["right_records"] == records[number - 1].count(b"\n")
    receipt = (workdir / "mined" / f"round_{number}.txt").read_text()
    assert "48 samples of 24 problems" in receipt
    assert "records           250" in receipt  # 150 and, as 40 % of all, 100 mined
    assert f"round {number} of 3" in said
  places = [
    said.index(words)
    for words in ("round 1 of 3", "step 6/", "round 2 of 3", "step 8/", "step 12/", "round 3 of 3", "step 14/")
  ]
  assert places == sorted(places)


@pytest.fixture(scope="module")
def cut(home):
  """The workdir of a run that was stopped in every way and place, in its last round now."""
  mining, after_line = (
    ("-c", MINING),
    (
      "-c",
      SIGNALLED.replace("command.run", "from insec_jax.mining import miner\nminer.SAMPLES_PER_CHUNK = 8\ncommand.run"),
    ),
  )
  train(home, "cut", program=mining, code=-9, SIGNAL=9, SIGNAL_AFTER=2)  # in the first round, before any step
  said = train(home, "cut", program=mining, code=42, SIGNAL=15, SIGNAL_AFTER=CHUNKS - 2 + 3)  # in the second
  assert "2 of 6 chunks were made before" in said
  assert "mining is cut short before step 7" in said.splitlines()[-1]
  said = train(home, "cut", program=after_line, code=-9, SIGNAL=9, SIGNAL_AT=14)  # right after the third began
  assert "3 of 6 chunks were made before" in said
  said = train(home, "cut", program=after_line, code=42, SIGNAL=15, SIGNAL_AT=16)  # within the third
  assert "after step 13" in said
  assert "mining, " not in said  # these weights have mined already
  assert "saved after step 17" in said
  return home / "cut"


def test_stopped_anywhere_it_gives_the_same_losses_mined_records_and_weights(home, whole, cut):
  shutil.copytree(cut, home / "mended")
  train(home, "mended")
  assert read_lines(home / "mended") == read_lines(whole[0])
  assert mined(home / "mended") == mined(whole[0])
  weights = [load_model(str(folder)).params for folder in (home / "mended", whole[0])]
  jax.tree.map(np.testing.assert_array_equal, *weights)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda file: file.write_bytes(file.read_bytes().split(b"\n", 1)[1]), "the data (SHA-256 of the rows to train on)"),
    (lambda file: file.unlink(), "round_3.jsonl is gone, and the run was trained on it"),
  ],
)
def test_a_run_does_not_go_on_without_the_records_it_was_trained_on(home, cut, tmp_path, damage, message):
  shutil.copytree(cut, tmp_path / "broken")
  damage(tmp_path / "broken" / "mined" / "round_3.jsonl")
  said = train(home, tmp_path / "broken", code=2)
  assert message in said.splitlines()[-1]


def test_two_processes_share_the_mining_and_see_the_same_records(home, whole):
  said = train_in_two(home, MINING, f"--workdir={home / 'two'}", "--config.data.rows_per_device=4")
  assert mined(home / "two")[0] == mined(whole[0])[0]  # later weights differ in the last bits
  got, want = (read_lines(folder) for folder in (home / "two", whole[0]))
  np.testing.assert_allclose([line["loss"] for line in got[1:4]], [line["loss"] for line in want[1:4]], rtol=1e-5)
  assert all("mining, 1 of 6" in one or "mining, 2 of 6" in one for one in said)


def test_lora_mines_with_base_and_adapters_and_draws_its_random_base_again(home):
  changes = ("lora.rank=4", "precision.params=bfloat16", "optimizer.learning_rate=0.02", "rounds=2", "train.steps=8")
  rows = ("data.rows_per_device=4",)  # the same rows a step on two devices
  train(home, "lora", *changes, *rows, program=("-c", MINING), devices=2)
  stop = {"code": 42, "SIGNAL_AFTER": CHUNKS + 2, "SIGNAL": int(SIGTERM)}  # in the second round
  train(home, "lora_cut", *changes, *rows, program=("-c", MINING), devices=2, **stop)
  train(home, "lora_cut", *changes, *rows, program=("-c", MINING), devices=2)
  assert read_lines(home / "lora_cut") == read_lines(home / "lora")
  first, second = ((home / "lora" / "mined" / f"round_{number}.jsonl").read_bytes() for number in (1, 2))
  assert first != second  # other problems, and other weights
  assert [(home / "lora_cut" / "mined" / f"round_{number}.jsonl").read_bytes() for number in (1, 2)] == [first, second]
  weights = [json.loads((home / "lora" / "mined" / f"round_{number}.json").read_text())["weights"] for number in (1, 2)]
  assert weights[0] != weights[1]  # of the merged model

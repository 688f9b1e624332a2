"""The program train, end to end on a tiny model. Programs define flags at import: a process for each run."""

import json
import os
import pathlib
import random
import re
import time

import jax
import numpy as np
import pytest
from modelkit import run, small_llama
from training_runs import SIGNALLED, TIMED, read_lines, train, write_home

from insec_jax.config import TokenizerConfig
from insec_jax.data.vocabulary import build_tokenizer
from insec_jax.generation.loading import load_model
from insec_jax.model import build, hf_writing
from insec_jax.training import layout, ledger

GOLDEN = pathlib.Path(__file__).parent / "golden" / "toy.txt"
# Gives the batch of one step weights that are not finite; every other step is as it was.
NOT_FINITE = """
import os
import numpy as np
from insec_jax import command, train
from insec_jax.data import pipeline
batches = pipeline.batches
def poisoned(*arguments, start_step, **more):
  for number, batch in enumerate(batches(*arguments, start_step=start_step, **more), start_step + 1):
    if number == int(os.environ["AT"]):
      batch = {**batch, "weight_ABT": batch["weight_ABT"] * np.float32(np.nan)}
    yield batch
pipeline.batches = poisoned
command.run(train.main)
"""
# Steps of half a second.
SLOW = """
import time
from insec_jax import command, train
from insec_jax.training import metrics
add = metrics.Meter.add
metrics.Meter.add = lambda *arguments: (time.sleep(0.5), add(*arguments))
command.run(train.main)
"""
REWRITE = "REWRITE_GOLDEN=1 python -m pytest tests/test_train.py -k golden"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a config, records, their tokenizer, and a cache of compiled programs."""
  folder = tmp_path_factory.mktemp("train")
  write_home(folder)
  return folder


@pytest.fixture(scope="module")
def whole(home):
  """The workdir of a run that nothing interrupted."""
  train(home, "whole")
  return home / "whole"


def test_a_workdir_explains_its_run(whole):
  names = {path.name for path in whole.iterdir()}
  assert names == {
    "config.json",
    "environment.json",
    "receipt.txt",
    "model.json",
    "metrics.jsonl",
    "tokenizer",
    "tb",
    "checkpoints",
  }
  environment = json.loads((whole / "environment.json").read_text())
  assert environment["devices"] == {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1}
  assert environment["packages"]["jax"] == jax.__version__
  assert set(environment) >= {"commit", "diff", "python", "mesh", "attention"}
  assert environment["optimizer"] == "AdamW; moments float32"
  assert (whole / "receipt.txt").read_text().endswith("\noptimizer         AdamW; moments float32\n")
  assert {path.name for path in (whole / "checkpoints").iterdir()} == {"35", "40"}  # the newest two


def test_metrics_have_a_line_every_log_every_steps_and_heldout_loss_of_every_role(whole):
  lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(0, 41, 2))
  trained = {"text", "mistake", "flag", "reason", "correction"}  # prompt has weight 0
  assert set(lines[1]) == {
    "step",
    "loss",
    "tokens",
    "trained_tokens",
    "lr",
    "grad_norm",
    *TIMED,
    *(f"time/{part}" for part in ledger.PARTS),
    *(f"{kind}/{role}" for kind in ("loss", "accuracy") for role in trained),
  }
  heldout = {"eval/loss", *(f"eval/{kind}/{role}" for kind in ("loss", "accuracy") for role in {*trained, "prompt"})}
  assert [line["step"] for line in lines if heldout <= set(line)] == [0, 20, 40]
  assert lines[-1]["eval/loss"] < lines[0]["eval/loss"] - 1
  assert lines[-1]["tokens"] > lines[-1]["trained_tokens"] > lines[-2]["trained_tokens"]
  assert lines[-1]["lr"] == pytest.approx(1e-3)


def test_the_losses_are_those_of_the_golden_file(whole):
  losses = [line["loss"] for line in read_lines(whole) if "loss" in line]
  assert len(losses) == 20
  if os.environ.get("REWRITE_GOLDEN"):
    GOLDEN.write_text("".join(f"{loss:.6f}\n" for loss in losses))
  want = np.loadtxt(GOLDEN)
  np.testing.assert_allclose(
    losses, want, rtol=1e-4, err_msg=f"the curve moved; if it should, say why in the commit and run {REWRITE}"
  )


@pytest.mark.slow
def test_a_weight_on_repeats_makes_them_less_likely_and_is_logged_and_in_the_receipt(home, whole):
  eval_p = {}
  for repeat in (1e-9, 5.0):
    workdir = home / f"repeat_{repeat}"
    train(home, workdir.name, f"loss.repeat={repeat}")
    lines = read_lines(workdir)
    assert {"loss/repeat", "p/repeat"} <= set(lines[1])
    assert {"eval/loss/repeat", "eval/p/repeat"} <= set(lines[0])
    assert "\nnegative tokens   " in (workdir / "receipt.txt").read_text()
    eval_p[repeat] = lines[-1]["eval/p/repeat"]
  # So short a run learns which symbols come, not yet what they hang on: little is left to be less likely.
  assert eval_p[5.0] < 0.98 * eval_p[1e-9]
  # Of no weight, it only measures.
  losses = [[line["loss"] for line in read_lines(folder)[1:]] for folder in (home / "repeat_1e-09", whole)]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def last_time(folder):
  """The seconds of every part in the newest line of metrics."""
  line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
  return {key: value for key, value in line.items() if key.startswith("time/")}


def test_killed_at_a_random_step_and_run_again_it_gives_the_same_losses_to_the_bit(home, whole):
  killed_at = random.SystemRandom().randrange(6, 40, 2)  # after the first checkpoint
  print(f"killed at step {killed_at}")
  program = ("-c", SIGNALLED)
  train(home, "killed", program=program, code=-9, SIGNAL=9, SIGNAL_AT=killed_at)
  assert [line["step"] for line in read_lines(home / "killed")] == list(range(0, killed_at + 1, 2))
  logged, saved = last_time(home / "killed"), max(layout.steps(home / "killed"), default=0)
  said = train(home, "killed")
  assert read_lines(home / "killed") == read_lines(whole)
  # The resumed run says what was done twice: at most what was logged before, and none where a checkpoint was newest.
  time = last_time(home / "killed")
  assert 0 <= time["time/lost"] <= ledger.total(logged)  # all of it where no save was complete
  assert (time["time/lost"] > 0) == (saved < killed_at)  # a save of the last step may have been cut short
  assert ledger.total(time) > ledger.total(logged)
  assert re.search(r"^all +[0-9.]+  100.0%$", said, re.MULTILINE)
  weights = [load_model(str(folder)).params for folder in (home / "killed", whole)]
  jax.tree.map(np.testing.assert_array_equal, *weights)


def long_axes(mesh: dict[str, int]) -> dict[str, int]:
  """Those of more than one device."""
  return {axis: size for axis, size in mesh.items() if size > 1}


@pytest.mark.processes
def test_sigterm_saves_and_exits_42_and_the_run_goes_on_from_there_on_another_mesh(home, whole):
  said = train(
    home,
    "stopped",
    "data.rows_per_device=1",
    program=("-c", SIGNALLED),
    code=42,
    devices=8,
    SIGNAL=15,
    SIGNAL_AT=12,
    NPROC=32,
  )
  assert "saved after step 13" in said.splitlines()[-1]  # asked in step 12, seen at the end of the next one
  assert (home / "stopped" / "checkpoints" / "13").is_dir()
  for folder in ("stopped", "never"):
    said = train(home, folder, "mesh.sequence=8", "data.rows_per_device=8", code=2, devices=8, NPROC=32)
    assert "a device has 4 query heads and 2 key heads; use 1, 2, 4" in said
  assert not (home / "never").exists()
  said = train(home, "stopped", "mesh.tensor=2", "mesh.sequence=2", "data.rows_per_device=4", devices=8, NPROC=32)
  assert "resuming" in said
  got, want = (read_lines(folder) for folder in (home / "stopped", whole))
  assert [line["step"] for line in got] == [line["step"] for line in want]
  for key in ("loss", "loss/correction", "tokens", "trained_tokens", "grad_norm"):
    np.testing.assert_allclose([line[key] for line in got[1:]], [line[key] for line in want[1:]], rtol=1e-5)
  environment = json.loads((home / "stopped" / "environment.json").read_text())
  assert long_axes(environment["mesh"]) == {"fsdp_y": 2, "fsdp_z": 4}
  resumed = environment["resumed"][0]
  assert resumed["step"] == 13
  assert long_axes(resumed["mesh"]) == {"fsdp_z": 2, "sequence_z": 2, "tensor": 2}


@pytest.mark.processes
def test_a_session_that_ends_is_saved_before_and_the_run_goes_on_to_the_same_losses(home, whole):
  start = time.monotonic()
  minutes = 0.5
  said = train(home, "limited", f"train.minutes={minutes}", program=("-c", SLOW), code=42)
  assert time.monotonic() - start < 60 * minutes
  assert re.search(r"^stopped by train.minutes=0.5: saved after step \d+; run the same command to go on$", said, re.M)
  assert 5 < layout.steps(home / "limited")[-1] < 40
  train(home, "limited")
  assert read_lines(home / "limited") == read_lines(whole)
  said = train(home, "limits", "train.minutes=0.01", code=2)
  line = (
    r"train.minutes=0.01 leaves no time for a step and a save after the start of the program; give at least ([\d.]+)$"
  )
  enough = float(re.search(line, said.strip()).group(1))
  assert not (home / "limits").exists()
  train(home, "limits", f"train.minutes={1.5 * enough}", "train.steps=400", program=("-c", SLOW), code=42)
  assert layout.steps(home / "limits")


def test_a_loss_that_is_not_finite_ends_with_code_3_and_the_state_before_it_saved(home):
  short = ["train.steps=4", "train.keep=4", "optimizer.warmup_steps=1"]
  train(home, "clean", *short, "train.checkpoint_every=1")
  said = train(
    home, "lost", *short, "train.checkpoint_every=4", "train.log_every=4", code=3, program=("-c", NOT_FINITE), AT=3
  )
  assert said.strip().split("\n")[-1].startswith("error: the loss is nan")
  assert "in step 3; the state after step 2 is saved" in said
  assert "Traceback" not in said
  assert layout.steps(home / "lost") == [2]
  metadata = [home / name / "checkpoints" / "2" / "_CHECKPOINT_METADATA" for name in ("clean", "lost")]
  clean, lost = (json.loads(path.read_text())["custom_metadata"]["run"]["fingerprints"] for path in metadata)
  assert lost == clean


def test_rows_of_new_markers_start_as_the_mean_of_the_other_rows(home):
  tokenizer = build_tokenizer(
    [*"0123456789+= ?\n", "wrong sum"],
    TokenizerConfig(path="", flag="<a>", fix="<b>", special=False, confidence=(), confidence_first=()),
  )
  model = small_llama(vocab_size=len(tokenizer), tied=True, init_std=0.1, max_positions=128, eos_ids=())
  before = build.init(model, jax.random.key(0), "float32")
  hf_writing.save(home / "hf", before, model, tokenizer=tokenizer)
  # A rate so small that what is read back is what training began with.
  said = train(
    home,
    "grown",
    "tokenizer.path=",
    "train.steps=1",
    "optimizer.warmup_steps=1",
    "optimizer.learning_rate=1e-30",
    arm="hf",
  )
  assert "grown to 128" in said
  opened = load_model(str(home / "grown"))
  assert (opened.config.vocab_size, opened.flag_id, opened.fix_id) == (128, len(tokenizer), len(tokenizer) + 1)
  assert opened.config.eos_ids == (tokenizer.eos_token_id,)
  old_VD = np.asarray(before["embed"])
  np.testing.assert_allclose(opened.params["embed"][: len(old_VD)], old_VD, rtol=1e-6)
  new_VD = np.tile(old_VD.mean(0), (128 - len(old_VD), 1))
  np.testing.assert_allclose(opened.params["embed"][len(old_VD) :], new_VD, rtol=1e-4)


AGAIN = ["--config=config.py:", "--workdir=whole"]
WRONG = {  # arguments and what the line says
  "train.steps=41": ([*AGAIN, "--config.train.steps=41"], ("train.steps=41", "was 40")),
  "trian.steps=3": (["--config=config.py:", "--workdir=nothing", "--config.trian.steps=3"], ("did you mean", "train")),
}


def contents(folder):
  """Every file below the folder with the time of its last change."""
  return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def again(whole):
  """What runs gave that have nothing to do, by name; files and their times before the first and after the last."""
  home = whole.parent
  before = contents(home)
  found = run("train", AGAIN, *(arguments for arguments, _ in WRONG.values()), folder=home)
  return dict(zip(("again", *WRONG), found, strict=True)), before, contents(home)


def test_run_again_at_its_end_it_says_so_and_does_nothing(again):
  found, before, after = again
  code, _, said = found["again"]
  assert code == 0, said
  assert "trained to its last step, 40" in said
  assert after == before


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_value_is_answered_in_one_line_with_code_2_and_nothing_is_written(home, again, change):
  found, before, after = again
  code, _, said = found[change]
  assert code == 2, said
  errors = [line for line in said.splitlines() if line.startswith("error: ")]
  assert errors == said.splitlines()[-1:]
  assert all(word in errors[0].lower() for word in WRONG[change][1])
  assert after == before
  assert not (home / "nothing").exists()

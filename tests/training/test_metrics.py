"""Sums over windows, and files that survive a kill."""

import json

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.method.roles import NUM_ROLES
from insec_jax.training import metrics
from insec_jax.training.scores import Negatives, Sums


def make_step(seed, negatives=True):
  rng = np.random.default_rng(seed)
  count_R = rng.integers(0, 50, NUM_ROLES).astype(np.float32)
  count_R[0] = 0
  of_negatives = Negatives(*rng.random(2).astype(np.float32), np.float32(seed))
  sums = Sums(
    np.float32(rng.random() * 100),
    np.float32(count_R.sum() * 0.7),
    rng.random(NUM_ROLES).astype(np.float32) * count_R,
    np.floor(count_R / 3),
    count_R,
    of_negatives if negatives else None,
  )
  return metrics.StepMetrics(sums, np.int32(count_R.sum() * 2), np.float32(rng.random()), np.float32(seed))


def timeless(line):
  return {key: value for key, value in line.items() if "seconds" not in key and "per_s" not in key}


def test_a_line_is_the_sums_of_its_window_divided_once():
  meter = metrics.Meter()
  for seed in range(3):
    meter.add(make_step(seed))
  meter.line()
  steps = [make_step(seed) for seed in (3, 4)]
  for step in steps:
    meter.add(step)
  line = meter.line()
  loss, weight = (sum(np.float64(getattr(step.sums, name)) for step in steps) for name in ("loss", "weight"))
  assert line["loss"] == loss / weight
  nll, count = (sum(np.float64(getattr(step.sums, name)[3]) for step in steps) for name in ("nll_R", "count_R"))
  assert line["loss/flag"] == nll / count
  assert "loss/prompt" not in line
  cost, p = (sum(np.float64(getattr(step.sums.negatives, name)) for step in steps) for name in ("cost", "p"))
  assert (line["loss/repeat"], line["p/repeat"]) == (cost / 7, p / 7)
  assert line["tokens"] == sum(int(make_step(seed).tokens) for seed in range(5))  # since the start of the run
  assert line["trained_tokens"] == sum(int(make_step(seed).sums.count_R.sum()) for seed in range(5))
  assert (line["lr"], line["grad_norm"]) == (4.0, float(steps[1].grad_norm))


@pytest.mark.parametrize("saved_at", range(1, 6))
def test_a_meter_that_went_through_json_gives_the_same_lines_to_the_bit(saved_at):
  whole, cut = metrics.Meter(), metrics.Meter()
  for seed in range(6):
    whole.add(make_step(seed))
    cut.add(make_step(seed))
    if seed == 2:  # a step has its line before its checkpoint
      assert timeless(cut.line()) == timeless(whole.line())
    if seed + 1 == saved_at:
      cut = metrics.Meter(json.loads(json.dumps(cut.to_json())))
  assert timeless(cut.line()) == timeless(whole.line())


def test_a_run_without_negatives_logs_none_and_has_the_same_other_figures():
  with_negatives, without = metrics.Meter(), metrics.Meter()
  for seed in range(1, 4):
    with_negatives.add(make_step(seed))
    without.add(make_step(seed, negatives=False))
  line = with_negatives.line()
  assert {key for key in line if "repeat" in key} == {"loss/repeat", "p/repeat"}
  assert timeless({key: line[key] for key in line if "repeat" not in key}) == timeless(without.line())


def test_a_loss_that_is_not_finite_stops_the_run():
  meter = metrics.Meter()
  step = make_step(0)
  meter.add(step._replace(sums=step.sums._replace(loss=np.float32("nan"))))
  meter.add(step)
  with pytest.raises(metrics.NotFiniteError, match="nan") as error:
    meter.to_json()
  assert error.value.num_lost == 2


def test_heldout_loss_weighs_each_role_and_shows_all_of_them():
  count_R = np.array([10.0, 20.0, 5.0, 1.0, 0.0, 4.0])
  sums = Sums(0.0, 0.0, np.array([30.0, 20.0, 5.0, 2.0, 0.0, 4.0]), count_R / 2, count_R, Negatives(3.0, 1.0, 2.0))
  line = metrics.heldout_line(sums, (0.0, 1.0, -0.5, 2.0, 1.0, 1.0))
  assert line["eval/loss"] == (20 + 2 * 2 + 4) / (20 + 2 * 1 + 4)
  assert line["eval/loss/prompt"] == 3
  assert line["eval/loss/mistake"] == 1
  assert line["eval/accuracy/text"] == 0.5
  assert "eval/loss/reason" not in line
  assert (line["eval/loss/repeat"], line["eval/p/repeat"]) == (1.5, 0.5)  # of no weight in eval/loss


def test_lines_after_the_checkpoint_are_cut_and_a_torn_line_with_them(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0, "x": 1}\n{"step": 2, "x": 2}\n{"step": 4, "x": 3}\n{"step": 6, "x"')
  log = metrics.Log(tmp_path, 2)
  log.write(4, {"x": 5.0})
  log.close()
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    {"step": 0, "x": 1},
    {"step": 2, "x": 2},
    {"step": 4, "x": 5.0},
  ]


def test_a_damaged_line_is_named_and_the_file_left_alone(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0}\nnonsense\n{"step": 4}\n')
  with pytest.raises(InputError, match=r"metrics.jsonl:2 "):
    metrics.Log(tmp_path, 4)
  assert "nonsense" in path.read_text()


def test_without_a_terminal_progress_is_plain_lines(capsys, monkeypatch):
  progress = metrics.TrainProgress(0, 100)
  progress.step(1)
  monkeypatch.setattr(progress._progress, "left", lambda: "1:05 left")
  progress.line(50, {"loss": 1.23456, "tokens_per_s": 12345.0, "seconds": 65.0})
  progress.close()
  assert capsys.readouterr().err == "step 50/100: loss 1.2346, 12,345 tokens/s, 1:05 left\n"

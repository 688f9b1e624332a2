"""Rounds of a policy gradient: the log p of samples under the weights that sampled and under those of the start."""

import dataclasses
import json
import types

import numpy as np
import pytest
from miningkit import CONFIG, PROBLEM, TOKENIZER, right
from modelkit import mesh_of

from insec_jax.command import InputError
from insec_jax.config import PolicyConfig
from insec_jax.distributed.processes import alone
from insec_jax.mining import phases, rounds
from insec_jax.mining.phases import PolicyRounds

SAMPLED = dataclasses.replace(
  CONFIG, policy=PolicyConfig(method="gradient"), rounds=2, mine=dataclasses.replace(CONFIG.mine, samples=2)
)
RUN = types.SimpleNamespace(all_params=lambda params: params, tokenizer=TOKENIZER, config=None, first=0)
PROMPT = TOKENIZER(PROBLEM.prompt, add_special_tokens=False)["input_ids"]


class Model:
  """In place of a model's config."""

  vocab_size, max_positions = len(TOKENIZER), 512


def write_samples(workdir, number, weights):
  """Two samples of one problem, as a round with these weights leaves them."""
  folder = workdir / rounds.FOLDER
  folder.mkdir(exist_ok=True)
  path = folder / f"round_{number}.jsonl"
  texts = (right(PROBLEM), PROBLEM.steps[0])
  written = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
  lines = [
    {"tokens": [*PROMPT, *token_T], "start": len(PROMPT), "advantage": advantage, "round": number}
    for token_T, advantage in zip(written, (1.0, -1.0), strict=True)
  ]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  found = dict(problems=1, samples=2, groups=1, right=1, flags=0, unfinished=0, tokens=9, reward=1.0)
  path.with_suffix(".json").write_text(json.dumps({"weights": weights, "found": found}))


@pytest.fixture
def policy(tmp_path, monkeypatch):
  """Rounds whose weights are numbers: the log p of every token is minus this number, its place added."""

  def mine(_config, workdir, number, params, *_, **__):
    write_samples(workdir, number, str(params))
    return "text"

  monkeypatch.setattr(rounds, "mine", mine)
  monkeypatch.setattr(phases, "fingerprint", str)
  monkeypatch.setattr(phases, "first_params", lambda *_: 1.5)
  return PolicyRounds(SAMPLED, tmp_path, mesh_of((1, 1, 1)), alone())


def measured(calls):
  def logps(packed, params):
    calls.append(params)
    place_T = np.arange(packed.token_BT.shape[1], dtype=np.float32)
    return np.where(packed.weight_BT != 0, -params - place_T / 1024, 0).astype(np.float32)

  return logps


def prepared(policy, number, params, calls=None):
  calls = [] if calls is None else calls
  assert policy.prepare(number, params, RUN, measured(calls), stopped=lambda: False) == "text"
  return calls


def test_the_reference_of_every_round_is_the_weights_that_the_run_began_with(policy):
  assert prepared(policy, 1, 1.5) == [1.5]
  assert prepared(policy, 2, 2.5) == [2.5, 1.5]
  for number, old in ((1, 1.5), (2, 2.5)):
    rows = policy.load(number, TOKENIZER, Model).train
    is_sampled_BT = rows.weight_BT != 0
    assert is_sampled_BT.sum() == sum(len(TOKENIZER(text)["input_ids"]) for text in (right(PROBLEM), PROBLEM.steps[0]))
    want_BT = measured([])(rows, np.float32(0))
    np.testing.assert_array_equal(rows.old_BT, np.where(is_sampled_BT, want_BT - np.float32(old), 0))
    np.testing.assert_array_equal(rows.reference_BT, np.where(is_sampled_BT, want_BT - np.float32(1.5), 0))


def test_log_p_of_the_same_weights_and_samples_are_measured_once(policy):
  prepared(policy, 1, 1.5)
  assert prepared(policy, 1, 1.5) == []
  assert prepared(policy, 1, 3.5) == [3.5]


def test_log_p_are_published_before_other_processes_look_for_them(policy, monkeypatch):
  done, share = [], rounds.share
  monkeypatch.setattr(phases.buckets, "publish", lambda path: done.append(("published", path.name)))
  monkeypatch.setattr(rounds, "share", lambda path, *rest: (done.append(("shared", path.name)), share(path, *rest)))
  prepared(policy, 1, 1.5)
  assert done == [("published", "round_1.logps.json"), ("shared", "round_1.logps.json")]


def test_without_a_kl_the_first_weights_are_not_read_again(policy):
  policy._config = dataclasses.replace(SAMPLED, policy=dataclasses.replace(SAMPLED.policy, kl=0.0))
  prepared(policy, 1, 1.5)
  assert prepared(policy, 2, 2.5) == [2.5]


def test_other_first_weights_than_those_of_the_run_are_refused(policy):
  prepared(policy, 1, 7.5)
  with pytest.raises(InputError, match="has other weights than the run began with"):
    prepared(policy, 2, 2.5)


def test_a_round_without_an_advantage_ends_the_run_in_one_line(policy, monkeypatch):
  def mine(_config, workdir, number, *_, **__):
    write_samples(workdir, number, "w")
    rounds.mined_path(workdir, number).write_text("")
    return "text"

  monkeypatch.setattr(rounds, "mine", mine)
  with pytest.raises(InputError, match="round 1: the samples of each problem have equal rewards"):
    prepared(policy, 1, 1.5)


@pytest.mark.parametrize(
  ("marked", "message"),
  [
    ({"confidence": [0.1], "rewind": False}, r"tokenizer\.confidence=\(\).* were trained with \(0\.1,\)"),
    ({"confidence": None, "rewind": True}, r"mistakes\.rewind=False.* were trained with True"),
  ],
)
def test_weights_that_write_other_tokens_than_the_config_says_are_refused(policy, monkeypatch, marked, message):
  monkeypatch.setattr(phases, "read_markers", lambda _: marked)
  monkeypatch.setattr(phases.hub, "model_folder", lambda *_, **__: None)
  policy._config = dataclasses.replace(SAMPLED, model=dataclasses.replace(SAMPLED.model, path="/there", size=None))
  with pytest.raises(InputError, match=message):
    prepared(policy, 1, 1.5)


def test_log_p_that_do_not_fit_the_samples_are_refused(policy, tmp_path):
  prepared(policy, 1, 1.5)
  path = phases.logps_path(tmp_path, 1)
  held = json.loads(path.read_text())
  path.write_text(json.dumps({**held, "old": held["old"][1:]}))
  with pytest.raises(InputError, match="does not fit the samples beside it"):
    policy.load(1, TOKENIZER, Model)


def test_a_teacher_with_the_first_weights_gets_them_before_and_after_the_first_round(policy):
  config = dataclasses.replace(SAMPLED, policy=PolicyConfig(method="distill", teacher="start"))
  policy._config = config
  assert policy.first(RUN) == 1.5
  run = types.SimpleNamespace(**{**vars(RUN), "first": 3})
  write_samples(policy._workdir, 1, "1.5")
  assert policy.first(run) == 1.5
  write_samples(policy._workdir, 1, "2.5")
  with pytest.raises(InputError, match=r"has other weights than the run began with, which policy\.teacher reads"):
    policy.first(run)


def test_a_distillation_without_a_mistake_ends_the_run_in_one_line(policy, monkeypatch):
  policy._config = dataclasses.replace(SAMPLED, policy=PolicyConfig(method="distill"))

  def mine(_config, workdir, number, *_, **__):
    write_samples(workdir, number, "w")
    rounds.mined_path(workdir, number).write_text("")
    return "text"

  monkeypatch.setattr(rounds, "mine", mine)
  with pytest.raises(InputError, match="round 1: no sample has a mistake that the task can correct"):
    policy.prepare(1, 1.5, RUN, None, stopped=lambda: False)


def test_lines_of_a_round_have_its_reward_and_its_receipt_how_often_rows_are_read(policy):
  prepared(policy, 1, 1.5)
  assert policy.values(1) == {
    "policy/reward": 0.5,
    "policy/right": 0.5,
    "policy/flags": 0.0,
    "policy/groups": 1.0,
    "policy/tokens": 4.5,
  }
  receipt = policy.load(1, TOKENIZER, Model).receipt
  assert "2 with an advantage" in receipt
  assert "rows read         2 in the 1 steps of the round: each 2.00 times" in receipt

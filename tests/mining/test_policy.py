"""Rewards, advantages and rows of sampled texts, with scripted models whose every reward is known."""

import dataclasses
import json
import types

import numpy as np
import pytest
from miningkit import CONFIG, MARKERS, PROBLEM, PROBLEMS, TASK, TOKENIZER, right

from insec_jax.command import InputError
from insec_jax.config import PolicyConfig
from insec_jax.data import samples, vocabulary
from insec_jax.generation.generator import Completion
from insec_jax.method.rewind import NEVER
from insec_jax.method.roles import FLAG, PROMPT, TEXT
from insec_jax.mining import policy
from insec_jax.mining.policy import PolicySampler, advantages, join, reward_of

POLICY = PolicyConfig(method="gradient", flag_price=0.125)
SAMPLED = dataclasses.replace(CONFIG, policy=POLICY, rounds=1, mine=dataclasses.replace(CONFIG.mine, samples=4))


def said(text, finish="stop"):
  """A completion of one token for each symbol."""
  ids = TOKENIZER(text, add_special_tokens=False)["input_ids"] + [TOKENIZER.eos_token_id] * (finish == "stop")
  return Completion(text, types.SimpleNamespace(finish=finish, tokens=np.array(ids)))


def corrected(problem):
  """A right solution whose first step is wrong and withdrawn."""
  bad, good = "ab\n", problem.steps[0]
  return bad + MARKERS.flag + "calc" + MARKERS.fix + good + "".join(problem.steps[1:])


def test_an_advantage_is_the_reward_minus_the_mean_over_the_deviation():
  np.testing.assert_allclose(advantages([1, 0, 0, 0], scaled=True), np.array([3, -1, -1, -1]) / 3**0.5)
  np.testing.assert_array_equal(advantages([1, 0, 0, 0], scaled=False), [0.75, -0.25, -0.25, -0.25])
  np.testing.assert_array_equal(advantages([0.98] * 7, scaled=True), np.zeros(7))  # its mean is another number


@pytest.mark.parametrize(
  ("text", "finish", "answer", "steps"),
  [
    (right(PROBLEM), "stop", 1.0, 1.0),
    (corrected(PROBLEM), "stop", 0.875, 0.875),  # a flag costs 0.125
    (right(PROBLEM), "length", 0.0, 0.0),  # it does not end
    (PROBLEM.steps[0], "stop", 0.0, 1 / 3),
    (PROBLEM.steps[0] + "ab\n" + PROBLEM.steps[1], "stop", 0.0, 1 / 3),
    (PROBLEM.steps[0] + MARKERS.flag + "calc" + MARKERS.fix, "stop", -0.125, 1 / 3 - 0.125),  # no correction follows
    ("", "stop", 0.0, 0.0),
  ],
)
def test_the_checker_rewards_right_answers_or_the_steps_before_the_first_wrong_one(text, finish, answer, steps):
  for reward, want in (("answer", answer), ("steps", steps)):
    rule = dataclasses.replace(POLICY, reward=reward)
    got, is_right, flags = reward_of(PROBLEM, said(text, finish), TASK, MARKERS, "line", rule)
    assert got == pytest.approx(want)
    assert flags == text.count(MARKERS.flag)
    assert is_right == (answer > 0)


class Scripted:
  """In place of a TextGenerator: writes what `answer` makes of a problem and the number of the sample."""

  tokenizer = TOKENIZER

  def __init__(self, answer):
    self._answer, self.asked = answer, []

  def encode(self, prompt):
    return np.array(TOKENIZER(prompt, add_special_tokens=False)["input_ids"])

  def write(self, begins, **options):
    self.asked.append(options)
    seen, written = {}, []
    for begin in begins:
      prompt = TOKENIZER.decode(begin, clean_up_tokenization_spaces=False)
      seen[prompt] = seen.get(prompt, -1) + 1
      written.append(said(self._answer(problem_of(prompt), seen[prompt])))
    return written


def problem_of(prompt):
  return next(problem for problem in PROBLEMS if problem.prompt == prompt)


@pytest.fixture(autouse=True)
def _the_problems(monkeypatch):
  monkeypatch.setattr(policy, "problems_to_mine", lambda *_, **__: PROBLEMS)


def sampled(answer, tmp_path, config=SAMPLED):
  """(summary, samples written, the scripted writer)."""
  writer = Scripted(answer)
  sampler = PolicySampler(writer, TASK, config, seed=0, weights="w")
  chunks = [json.loads(json.dumps(sampler.chunk(number))) for number in range(sampler.num_chunks)]
  summary = join(chunks, str(tmp_path / "round_1.jsonl"))
  return summary, [json.loads(line) for line in (tmp_path / "round_1.jsonl").read_text().splitlines()], writer


def half_right(problem, number):
  """Of every second problem one right sample, one corrected one and two wrong ones; of the others four right ones."""
  if PROBLEMS.index(problem) % 2:
    return right(problem)
  return (right(problem), corrected(problem), problem.steps[0], "ab\n")[number]


def test_groups_whose_rewards_differ_are_written_with_advantages_the_others_counted(tmp_path):
  summary, written, writer = sampled(half_right, tmp_path)
  assert len(written) == 4 * 12
  want = advantages([1, 0.875, 0, 0], scaled=True)
  np.testing.assert_allclose([sample["advantage"] for sample in written], np.tile(want, 12))
  assert [sample["reward"] for sample in written[:4]] == [1, 0.875, 0, 0]
  assert (summary.problems, summary.samples, summary.groups, summary.right, summary.flags) == (24, 96, 12, 72, 12)
  assert summary.values()["policy/reward"] == pytest.approx((48 + 12 * 1.875) / 96)
  assert writer.asked[0]["temperature"] == 1.0
  assert writer.asked[0]["flag_bias"] == 0


def test_only_sampled_tokens_have_the_advantage_and_forced_ones_have_none(tmp_path):
  _, written, _ = sampled(half_right, tmp_path)
  read = samples.read(tmp_path / "round_1.jsonl")
  rows = samples.pack(read, TOKENIZER, SAMPLED)
  first = rows.segment_BT[0] == 1
  start, length = written[0]["start"], len(written[0]["tokens"])
  np.testing.assert_array_equal(rows.token_BT[0][first], written[0]["tokens"])
  assert rows.weight_BT[0][first].tolist() == [0] * start + [np.float32(written[0]["advantage"])] * (length - start)
  assert set(rows.role_BT[0][first][:start].tolist()) == {PROMPT}
  flagged = next(sample for sample in read if sample.advantage == written[1]["advantage"])
  alone = samples.pack([flagged], TOKENIZER, SAMPLED)
  ids = [TOKENIZER.convert_tokens_to_ids(marker) for marker in (MARKERS.flag, MARKERS.fix)]
  is_marker_T = np.isin(alone.token_BT[0], ids)
  assert set(alone.role_BT[0][is_marker_T].tolist()) == {FLAG}
  assert set(alone.role_BT[0][~is_marker_T][flagged.start : len(flagged.token_T) - 2].tolist()) == {TEXT}
  sure = dataclasses.replace(SAMPLED, tokenizer=dataclasses.replace(SAMPLED.tokenizer, confidence=(0.1,)))
  tokenizer = vocabulary.open_tokenizer(sure).tokenizer
  forced = tokenizer.convert_tokens_to_ids("<|sure_1|>")
  token_T = np.insert(flagged.token_T, flagged.start + 2, forced)
  with_forced = samples.pack([dataclasses.replace(flagged, token_T=token_T)], tokenizer, sure)
  assert with_forced.weight_BT[0, flagged.start + 2] == 0
  assert (with_forced.weight_BT != 0).sum() == (alone.weight_BT != 0).sum()


def test_rows_of_samples_hide_a_withdrawn_mistake_as_the_decoder_does():
  rewound = dataclasses.replace(SAMPLED, mistakes=dataclasses.replace(SAMPLED.mistakes, rewind=True))
  prompt, text = (
    TOKENIZER(part, add_special_tokens=False)["input_ids"] for part in (PROBLEM.prompt, corrected(PROBLEM))
  )
  rows = samples.pack([samples.Sample(np.array(prompt + text), len(prompt), 1.0, "here")], TOKENIZER, rewound)
  fix = text.index(TOKENIZER.convert_tokens_to_ids(MARKERS.fix))
  hidden_T = np.flatnonzero(rows.until_BT[0] < NEVER)
  np.testing.assert_array_equal(hidden_T, len(prompt) + np.arange(fix + 1))
  assert rows.position_BT[0, hidden_T[-1] + 1] == len(prompt)  # the correction has the place of the mistake


def test_samples_that_cannot_fit_in_a_row_are_refused_before_any_is_written():
  config = dataclasses.replace(SAMPLED, data=dataclasses.replace(SAMPLED.data, row_length=16))
  with pytest.raises(InputError, match=r"raise it, or lower evaluate\.max_tokens"):
    PolicySampler(Scripted(half_right), TASK, config, seed=0, weights="w")


def test_a_damaged_file_of_samples_is_refused_with_its_line(tmp_path):
  (tmp_path / "round_1.jsonl").write_text('{"tokens": [1, 2], "start": 1, "advantage": 1.0}\n{"tokens": [1]}\n')
  with pytest.raises(InputError, match=r"round_1\.jsonl:2 is no sample"):
    samples.read(tmp_path / "round_1.jsonl")

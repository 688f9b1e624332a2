"""Corrections that a scripted model writes after its own wrong steps, and their rows for student and teacher."""

import dataclasses
import json
import types

import numpy as np
import pytest
from miningkit import CALC, CONFIG, FIRST, MARKERS, PROBLEM, PROBLEMS, SECOND, TASK, THIRD, TOKENIZER, right

from insec_jax.command import InputError
from insec_jax.config import PolicyConfig
from insec_jax.data import corrections
from insec_jax.data.tokens import encode_prompt
from insec_jax.generation.generator import Completion
from insec_jax.method.rewind import NEVER
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, NO_NEGATIVE, PROMPT, REASON, TEXT
from insec_jax.mining import policy
from insec_jax.mining.distill import NO_LINE, NO_ROOM, CorrectionSampler, join

SAMPLED = dataclasses.replace(
  CONFIG,
  policy=PolicyConfig(method="distill", no_flag=0.5),
  rounds=1,
  loss=dataclasses.replace(CONFIG.loss, flag=2.0, reason=0.5, correction=1.5),
  mine=dataclasses.replace(CONFIG.mine, samples=2),
)
FLAG_ID, FIX_ID = (TOKENIZER.convert_tokens_to_ids(marker) for marker in (MARKERS.flag, MARKERS.fix))


def ids(text):
  return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def said(text, finish="stop"):
  """A completion of one token for each symbol."""
  return Completion(
    text,
    types.SimpleNamespace(finish=finish, tokens=np.array(ids(text) + [TOKENIZER.eos_token_id] * (finish == "stop"))),
  )


class Scripted:
  """In place of a TextGenerator: writes `answer(problem, sample)`, and `correction(text so far)` after a flag."""

  tokenizer, flag_id = TOKENIZER, FLAG_ID

  def __init__(self, answer, correction):
    self._answer, self._correction, self.asked, self.begins = answer, correction, [], []

  def encode(self, prompt):
    return encode_prompt(prompt, TOKENIZER, "plain")

  def decode(self, tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

  def past_confidence(self, _, place):
    return place

  def has_room(self, *_):
    return True

  def write(self, begins, **options):
    self.asked.append(options)
    prompts = [self.decode(begin) for begin in begins]
    numbers = [prompts[:k].count(prompt) for k, prompt in enumerate(prompts)]
    problem_of = {problem.prompt: problem for problem in PROBLEMS}
    return [said(self._answer(problem_of[prompt], k)) for prompt, k in zip(prompts, numbers, strict=True)]

  def draw_steps(self, begins, **options):
    self.asked.append(options)
    self.begins += [self.decode(begin) for begin in begins]
    return [types.SimpleNamespace(tokens=np.array(ids(self._correction(self.decode(begin))))) for begin in begins]


@pytest.fixture(autouse=True)
def _the_problem(monkeypatch):
  monkeypatch.setattr(policy, "problems_to_mine", lambda *_, **__: [PROBLEM, PROBLEMS[-1]])


REASON_TEXT = "calco"
HINT = CALC.removeprefix(FIRST + SECOND) + "calco\n" + THIRD
START, WRONG, FLAGGED = (len(ids(PROBLEM.prompt + text)) for text in ("", FIRST + SECOND, CALC))


def one_wrong(problem, number):
  return CALC + "ab\n" if (problem, number) == (PROBLEM, 0) else right(problem)


def both_wrong(problem, number):
  return "ab\n" if (problem, number) == (PROBLEMS[-1], 1) else one_wrong(problem, number)


def well(_):
  return REASON_TEXT + MARKERS.fix + THIRD


def sampled(tmp_path, answer=one_wrong, correction=well, config=SAMPLED):
  """(summary, lines of the file, the scripted writer)."""
  writer = Scripted(answer, correction)
  sampler = CorrectionSampler(writer, TASK, config, seed=0, weights="w")
  chunks = [json.loads(json.dumps(sampler.chunk(number))) for number in range(sampler.num_chunks)]
  summary = join(chunks, str(tmp_path / "round_1.jsonl"), right=config.mine.right, seed=0)
  return summary, [json.loads(line) for line in (tmp_path / "round_1.jsonl").read_text().splitlines()], writer


def packed(tmp_path, config=SAMPLED, tokenizer=TOKENIZER):
  return corrections.pack(corrections.read(tmp_path / "round_1.jsonl"), tokenizer, config)


def test_the_flag_is_forced_after_the_first_wrong_step_and_the_hint_has_the_verdict(tmp_path):
  summary, written, writer = sampled(tmp_path)
  assert writer.begins == [PROBLEM.prompt + CALC + MARKERS.flag]
  assert (writer.asked[0]["flag_bias"], writer.asked[1]["temperature"]) == (-np.inf, 1.0)
  of_mistake, of_right = written
  assert of_mistake["text"] == CALC + MARKERS.flag + REASON_TEXT + MARKERS.fix + THIRD
  assert of_mistake["hint"] == HINT
  assert [of_mistake[name] for name in ("start", "wrong", "flag")] == [START, WRONG, FLAGGED]
  assert of_mistake["right"] == [START + len(ids(FIRST)), WRONG]
  assert (of_right["flag"], of_right["hint"], len(of_right["right"])) == (corrections.NO_MISTAKE, "", 3)
  assert (summary.samples, summary.right, summary.wrong, summary.mistakes) == (4, 3, 1, 1)
  assert summary.values()["policy/corrected"] == 1


@pytest.mark.parametrize(("said_after", "corrected", "repeated"), [("b9\n", 0, 0), (CALC[-8:], 0, 1), (THIRD, 1, 0)])
def test_a_forced_correction_is_counted_as_right_or_as_the_mistake_again(tmp_path, said_after, corrected, repeated):
  summary, _, _ = sampled(tmp_path, correction=lambda _: REASON_TEXT + MARKERS.fix + said_after)
  assert (summary.corrected, summary.repeated) == (corrected, repeated)


def test_a_correction_has_the_weights_of_its_roles_and_right_steps_avoid_a_flag(tmp_path):
  sampled(tmp_path)
  rows = packed(tmp_path)
  first = rows.segment_BT[0] == 1
  after = [FLAG, REASON, REASON, FLAG, *[CORRECTION] * len(ids(THIRD))]
  assert rows.role_BT[0][first].tolist() == [
    *[PROMPT] * START,
    *[TEXT] * (WRONG - START),
    *[MISTAKE] * (FLAGGED - WRONG),
    *after,
  ]
  weight_of = {FLAG: 2.0, REASON: 0.5, CORRECTION: 1.5}
  assert rows.weight_BT[0][first].tolist() == [0.0] * FLAGGED + [weight_of[role] for role in after]
  assert np.flatnonzero(rows.negative_BT[0][first] != NO_NEGATIVE).tolist() == [START + len(ids(FIRST)), WRONG]
  assert set(rows.negative_BT.ravel().tolist()) == {NO_NEGATIVE, FLAG_ID}
  assert not rows.weight_BT[0][rows.segment_BT[0] == 2].any()


@pytest.mark.parametrize("rewind", [False, True])
def test_a_teacher_reads_the_hint_then_the_same_tokens_at_the_places_of_the_rows(tmp_path, rewind):
  config = dataclasses.replace(
    SAMPLED,
    policy=dataclasses.replace(SAMPLED.policy, contrast=0.5),
    mistakes=dataclasses.replace(SAMPLED.mistakes, rewind=rewind),
  )
  _, written, _ = sampled(tmp_path, both_wrong, config=config)
  rows = packed(tmp_path, config)
  hints = [line["hint"] for line in written if line["hint"]]
  assert len(hints) == 2
  segment = 0
  for line in written:
    segment += 1
    here = np.flatnonzero(rows.segment_BT[0] == segment)[line["start"] :]
    if not line["hint"]:
      assert not (rows.hinted["right_segment"] == segment).any()
      continue
    for name, hint in (("right", line["hint"]), ("wrong", next(hint for hint in hints if hint != line["hint"]))):
      told = rows.hinted[f"{name}_token"][0][rows.hinted[f"{name}_segment"][0] == segment]
      assert told.tolist() == ids(line["prompt"] + hint) + line["tokens"][line["start"] :]
      place = rows.hinted[f"{name}_place"][0][here]
      np.testing.assert_array_equal(rows.hinted[f"{name}_token"][0][place], rows.token_BT[0][here])
      np.testing.assert_array_equal(rows.hinted[f"{name}_segment"][0][place], segment)
      if rewind:
        is_hidden = rows.until_BT[0][here] < NEVER
        assert is_hidden.any()
        np.testing.assert_array_equal(rows.hinted[f"{name}_until"][0][place] < NEVER, is_hidden)


def test_mistakes_that_cannot_be_flagged_or_do_not_fit_are_left_out_and_counted(tmp_path):
  no_line, _, _ = sampled(tmp_path, lambda problem, _: CALC[:-1] if problem == PROBLEM else right(problem))
  assert no_line.left_out == {NO_LINE: 2, NO_ROOM: 0}
  narrow = dataclasses.replace(SAMPLED, data=dataclasses.replace(SAMPLED.data, row_length=FLAGGED + 12))
  too_long, written, _ = sampled(tmp_path, config=narrow)
  assert (too_long.left_out, too_long.mistakes, written) == ({NO_ROOM: 1}, 0, [])


def test_a_contrast_needs_the_hint_of_another_mistake(tmp_path):
  sampled(tmp_path)
  config = dataclasses.replace(SAMPLED, policy=dataclasses.replace(SAMPLED.policy, contrast=1.0))
  with pytest.raises(InputError, match=r"round_1\.jsonl:1: policy\.contrast=1 needs the hint of another mistake"):
    packed(tmp_path, config)


def test_a_damaged_file_of_corrections_is_refused_with_its_line(tmp_path):
  sampled(tmp_path)
  path = tmp_path / "round_1.jsonl"
  path.write_text(path.read_text() + '{"tokens": [1]}\n')
  with pytest.raises(InputError, match=r"round_1\.jsonl:3 is no correction"):
    corrections.read(path)

"""A text with flags is read up to the first thing in it that must be put right, and becomes a record of that."""

import dataclasses

import pytest
from miningkit import CALC, CONFIG, FIRST, MARKERS, PROBLEM, SECOND, TASK, THIRD, TOKENIZER, said

from insec_jax.data import tokens
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT
from insec_jax.method.tasks import MALFORMED
from insec_jax.method.transcript import check_marks, clean, split_steps
from insec_jax.mining.judging import Mistake, Sample, judge_flagged
from insec_jax.mining.records import corrected_transcript

F, X = MARKERS.flag, MARKERS.fix
NUM_RIGHT = next(
  k for k, (step, own) in enumerate(zip(PROBLEM.steps, split_steps(CALC, "line"), strict=False)) if step != own
)
BEFORE, RIGHT, AFTER = (
  "".join(PROBLEM.steps[:NUM_RIGHT]),
  PROBLEM.steps[NUM_RIGHT],
  "".join(PROBLEM.steps[NUM_RIGHT + 1 :]),
)
BAD = split_steps(CALC, "line")[NUM_RIGHT]
WRONG, UGLY = Mistake(NUM_RIGHT, BAD, "calc"), Mistake(NUM_RIGHT, "ab\n", MALFORMED)
TEXTS = {
  "not flagged": (BEFORE + BAD + AFTER, "wrong", NUM_RIGHT, [WRONG]),
  "corrected": (BEFORE + BAD + F + "calc" + X + RIGHT + AFTER, "wrong", 3, [WRONG]),
  "corrected wrongly": (BEFORE + BAD + F + X + "ab\n" + AFTER, "wrong", NUM_RIGHT, [WRONG, UGLY]),
  "the mistake again": (BEFORE + BAD + F + X + BAD + RIGHT + AFTER, "wrong", NUM_RIGHT, [WRONG, WRONG]),
  "corrected at last": (BEFORE + BAD + F + X + "ab\n" + F + X + RIGHT + AFTER, "wrong", 3, [WRONG, UGLY]),
  "a flag left open": (BEFORE + BAD + F + "calc", "wrong", NUM_RIGHT, [WRONG]),
  "a fix with nothing after it": (BEFORE + BAD + F + X, "wrong", NUM_RIGHT, [WRONG]),
  "a false alarm": (FIRST + F + "calc" + X + SECOND + THIRD, "false alarm", 1, []),
  "a false alarm left open": (FIRST + SECOND + F + "calc", "false alarm", 2, []),
  "a right correction flagged": (BEFORE + BAD + F + X + RIGHT + F + X + BAD, "wrong", NUM_RIGHT + 1, [WRONG]),
  "a flag at the beginning": (F + X + FIRST + SECOND + THIRD, "false alarm", 0, []),
  "a fix without a flag": (FIRST + X + SECOND + THIRD, "false alarm", 1, []),
  "steps forgotten": (FIRST + SECOND, "forgotten", 2, []),
  "a step forgotten after a correction": (BEFORE + BAD + F + X + RIGHT, "wrong", NUM_RIGHT + 1, [WRONG]),
  "all right": (FIRST + SECOND + THIRD, "right", 3, []),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_flagged_text_is_read_up_to_what_must_be_put_right(name):
  text, kind, num_steps, mistakes = TEXTS[name]
  sample = judge_flagged(PROBLEM, said(text), TASK, MARKERS, "line", most=4)
  assert (sample.kind, sample.steps, list(sample.mistakes)) == (kind, PROBLEM.steps[:num_steps], mistakes)
  record = corrected_transcript(PROBLEM, sample, TASK, MARKERS, reason="label", unit="line")
  check_marks(record, MARKERS)
  assert clean(record) == PROBLEM.prompt + "".join(PROBLEM.steps)
  assert [piece.text for piece in record if piece.role == MISTAKE] == [one.step for one in mistakes]
  assert sum(piece.text == F for piece in record) == len(mistakes)  # and so none at a false alarm
  example = tokens.tokenize(record, name, TOKENIZER, CONFIG)
  assert not example.weight_T[example.role_T == MISTAKE].any()


def test_a_failed_correction_is_flagged_again_with_its_own_reason():
  text, *_ = TEXTS["corrected wrongly"]
  sample = judge_flagged(PROBLEM, said(text), TASK, MARKERS, "line", most=4)
  record = corrected_transcript(PROBLEM, sample, TASK, MARKERS, reason="label", unit="line")
  roles = [piece.role for piece in record if piece.role not in (PROMPT, TEXT)]
  assert roles == [MISTAKE, FLAG, REASON, FLAG] * 2 + [CORRECTION]
  reasons = [piece.text for piece in record if piece.role == REASON]
  assert reasons == [TASK.explain(PROBLEM, PROBLEM.steps[:NUM_RIGHT], wrong, "label") for wrong in (BAD, "ab\n")]


def test_a_text_cut_short_is_no_forgotten_step():
  for text in (FIRST + SECOND, FIRST + SECOND[:3]):
    sample = judge_flagged(PROBLEM, said(text, "length"), TASK, MARKERS, "line", most=4)
    assert (sample.kind, len(sample.steps)) == ("incomplete", text.count("\n"))
  cut = judge_flagged(PROBLEM, said(BEFORE + BAD + F + X + RIGHT[:3], "length"), TASK, MARKERS, "line", most=4)
  assert cut == Sample("wrong", PROBLEM.steps[:NUM_RIGHT], (WRONG,))


def test_no_more_mistakes_are_read_than_asked_for():
  text, *_ = TEXTS["corrected at last"]
  sample = judge_flagged(PROBLEM, said(text), TASK, MARKERS, "line", most=1)
  assert (sample.mistakes, sample.is_open) == ((WRONG,), True)
  closed = judge_flagged(PROBLEM, said(BEFORE + BAD + F + X + RIGHT + "ab\n" + AFTER), TASK, MARKERS, "line", most=1)
  assert (closed.mistakes, len(closed.steps), closed.is_open) == ((WRONG,), NUM_RIGHT + 1, False)


def test_what_follows_a_step_that_stands_is_read_with_it():
  sample = judge_flagged(PROBLEM, said(FIRST + F + X + SECOND), TASK, MARKERS, "line", stands=(FIRST,), most=4)
  assert [dataclasses.astuple(one) for one in sample.mistakes] == [(1, FIRST, "repeat")]
  assert sample.steps == (FIRST, SECOND)

"""A sample is checked up to its first wrong step, and becomes a transcript that ends in the right answer."""

import pytest
from miningkit import CALC, FIRST, MARKERS, PROBLEM, SECOND, TASK, THIRD, said

from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT
from insec_jax.method.transcript import clean
from insec_jax.mining.judging import Mistake, judge
from insec_jax.mining.records import corrected_transcript


@pytest.mark.parametrize(
  ("text", "finish", "kind", "num_steps", "error"),
  [
    (FIRST + SECOND + THIRD, "stop", "right", 3, ""),
    (FIRST + FIRST + SECOND, "stop", "wrong", 1, "repeat"),
    (FIRST + SECOND + "ab", "stop", "wrong", 2, "malformed"),
    (FIRST + SECOND + "ab", "length", "incomplete", 2, ""),  # a step cut short was never said
    (FIRST + SECOND, "stop", "incomplete", 2, ""),
    (FIRST + SECOND + THIRD, "length", "incomplete", 3, ""),
    (FIRST + MARKERS.flag + "calc" + MARKERS.fix + SECOND + THIRD, "stop", "incomplete", 1, ""),
    (FIRST + FIRST[0] + MARKERS.fix + FIRST, "stop", "wrong", 1, "malformed"),
    ("", "stop", "incomplete", 0, ""),
  ],
)
def test_a_sample_is_judged_up_to_its_first_wrong_step_or_marker(text, finish, kind, num_steps, error):
  sample = judge(PROBLEM, said(text, finish), TASK, MARKERS, "line")
  assert (sample.kind, sample.steps) == (kind, PROBLEM.steps[:num_steps])
  assert [(one.place, one.error) for one in sample.mistakes] == ([(num_steps, error)] if error else [])
  assert "".join((*sample.steps, *(one.step for one in sample.mistakes))) in text


def test_steps_that_stand_are_known_to_what_is_written_after_them():
  after_one = judge(PROBLEM, said(SECOND + THIRD), TASK, MARKERS, "line", stands=(FIRST,))
  assert (after_one.kind, after_one.steps) == ("right", PROBLEM.steps)
  again = judge(PROBLEM, said(SECOND + FIRST), TASK, MARKERS, "line", stands=(FIRST,))
  assert again.mistakes == (Mistake(2, FIRST, "repeat"),)


def test_a_record_has_the_own_wrong_step_and_then_the_rest_of_the_solution_put_right():
  sample = judge(PROBLEM, said(CALC), TASK, MARKERS, "line")
  before = sample.steps
  (bad,) = sample.mistakes
  record = corrected_transcript(PROBLEM, sample, TASK, MARKERS, reason="recompute", unit="line")
  own = [piece for piece in record if piece.role in (PROMPT, MISTAKE)]
  assert [piece.text for piece in own] == [PROBLEM.prompt, bad.step]
  assert CALC.startswith("".join(before) + bad.step)
  assert clean(record) == PROBLEM.prompt + "".join(PROBLEM.steps)
  order = [piece.role for piece in record if piece.role != TEXT]
  assert order == [PROMPT, MISTAKE, FLAG, REASON, FLAG, CORRECTION]
  reason = next(piece.text for piece in record if piece.role == REASON)
  assert reason == TASK.explain(PROBLEM, before, bad.step, "recompute")
  bare = corrected_transcript(PROBLEM, sample, TASK, MARKERS, reason="none", unit="line")
  assert REASON not in [piece.role for piece in bare]
  paper = corrected_transcript(PROBLEM, sample, TASK, MARKERS, reason="paper", unit="line")
  assert "Found an error in the previous line. Reason: wrong calculation." in [piece.text for piece in paper]


def test_a_task_whose_correction_is_wrong_gives_no_record(monkeypatch):
  sample = judge(PROBLEM, said(CALC), TASK, MARKERS, "line")
  monkeypatch.setattr(type(TASK), "correction", lambda *_: sample.mistakes[0].step)
  monkeypatch.setattr(type(TASK), "next_step", lambda *_: None)
  monkeypatch.setattr(type(TASK), "answer_of", lambda *_: PROBLEM.answer)
  assert corrected_transcript(PROBLEM, sample, TASK, MARKERS, reason="none", unit="line") is None

"""GSM8K-style records: annotations become facts, and every accepted mistake is really wrong."""

from fractions import Fraction

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.config import MistakesConfig, TaskConfig
from insec_jax.method import tasks
from insec_jax.method.mistakes import with_mistakes
from insec_jax.method.roles import MISTAKE
from insec_jax.method.tasks.arithmetic import numbers_of, words_of
from insec_jax.method.tasks.gsm8k import Gsm8k
from insec_jax.method.tasks.gsm8k_records import problem_of
from insec_jax.method.transcript import Markers, clean, clean_text, render

RECORDS = [
  {
    "question": "A baker fills 3 trays with 12 rolls each and sells 20 rolls. What do the rolls left bring at $2 each?",
    "answer": "The baker makes 3 * 12 = <<3*12=36>>36 rolls in the morning.\n"
    "After the sale there are 36 - 20 = <<36-20=16>>16 rolls left. "
    "He then earns 16 x $2 = $<<16*2=32>>32 for them.\n"
    "#### 32",
  },
  {
    "question": "Tickets cost $1,200 for 48 guests, half of whom pay twice as much. What do two of the cheap half pay?",
    "answer": "Half of the guests are 48 / 2 = <<48/2=24>>24 guests.\n"
    "Counted by shares there are 24 * 2 + 24 = <<24*2+24=72>>72 shares to pay.\n"
    "One share of the tickets is 1,200 / 72 = $<<1200/72=16.67>>16.67.\n"
    "So two guests of the cheap half pay $33.34 in all.\n"
    "#### 33.34",
  },
  {
    "question": "Nora is 15 years younger than Max, who is 52. How old is she in 5 years?",
    "answer": "Max is 52 years old, therefore Nora is <<37=37>>37 years old today.\n"
    "In five years Nora will be 37 + 5 = <<37+5=42>>42 years old.\n\n"
    "#### 42",
  },
]
TASK = tasks.get(TaskConfig(name="gsm8k", min_size=0, max_size=0, modulus=0))
BAKER, TICKETS, NORA = map(problem_of, RECORDS)


def verdict(problem, k, step):
  found = TASK.check(problem, problem.steps[:k], step)
  return found.kind, found.error


def test_annotations_leave_the_text_and_become_facts():
  assert BAKER.prompt == RECORDS[0]["question"] + "\n"
  assert BAKER.steps[0] == "The baker makes 3 * 12 = 36 rolls in the morning.\n"
  assert BAKER.steps[-1] == "#### 32\n"
  assert BAKER.answer == "32"
  solution = "".join(BAKER.steps)
  assert [(note.expression, note.result) for note in BAKER.facts.notes] == [("3*12", 36), ("36-20", 16), ("16*2", 32)]
  assert [solution[note.place : note.place + 2] for note in BAKER.facts.notes] == ["36", "16", "32"]
  assert TICKETS.answer == "33.34"
  assert NORA.steps[1].endswith("old.\n\n")


@pytest.mark.parametrize(
  ("answer", "message"),
  [
    ("It is 5.", "its last line must be '#### '"),
    ("#### five", "its last line must be '#### '"),
    ("so <<2+2=5>>5\n#### 5", "does not hold"),
    ("so <<2+x=5>>5\n#### 5", "does not hold"),
    ("so <<4>>4\n#### 4", "does not hold"),
    ("", "its last line must be"),
  ],
)
def test_a_record_that_cannot_be_checked_is_refused(answer, message):
  with pytest.raises(InputError, match=message):
    problem_of({"question": "q", "answer": answer})


@pytest.mark.parametrize("answer", ["#### 1,080", "#### $1080", "#### 1080.00", "####1080"])
def test_answers_are_compared_as_numbers(answer):
  problem = problem_of({"question": "q", "answer": f"So it is.\n{answer}"})
  assert problem.answer == "1080"
  assert TASK.answer_of(problem, problem.steps) == "1080"
  assert TASK.answer_of(problem, ("#### 1,080.0\n",)) == "1080"


@pytest.mark.parametrize("unit", ["line", "sentence", "paragraph"])
@pytest.mark.parametrize("problem", [BAKER, TICKETS, NORA])
def test_the_solution_is_right_step_by_step(problem, unit):
  problem = tasks.in_units(problem, unit)
  for k, step in enumerate(problem.steps):
    assert TASK.check(problem, problem.steps[:k], step) == tasks.RIGHT
    assert TASK.next_step(problem, problem.steps[:k]) == step
  assert TASK.next_step(problem, problem.steps) is None
  assert TASK.answer_of(problem, problem.steps) == problem.answer


def test_sentences_and_paragraphs_are_steps():
  assert len(BAKER.steps) == 3
  assert tasks.in_units(BAKER, "sentence").steps[1:3] == (
    "After the sale there are 36 - 20 = 16 rolls left. ",
    "He then earns 16 x $2 = $32 for them.\n",
  )
  assert len(tasks.in_units(NORA, "paragraph").steps) == 2


@pytest.mark.parametrize(
  ("k", "step", "expected"),
  [
    (0, "The baker makes 3 * 12 = 35 rolls in the morning.\n", ("wrong", "calc")),
    (0, "The baker makes 3*12=36 rolls in the morning.", ("right", "")),
    (0, "He has 3 * 12 = 35 rolls.\n", ("wrong", "calc")),  # in other words too
    (0, "The baker makes 12 * 3 = 36 rolls in the morning.\n", ("right", "")),  # the other way round
    (0, "So there are 3 x 12 = 36 rolls!\n", ("right", "")),  # a result of the solution's
    (0, "He pays 12 + 3 = 15 for flour.\n", ("unverified", "")),  # nobody can tell
    (0, "The baker makes 3 * 12 rolls in the morning.\n", ("unverified", "")),
    (0, "The baker makes 3 * 21 = 63 rolls in the morning.\n", ("wrong", "operand")),  # 21 comes from nowhere
    (0, "The baker makes 2 * 12 = 24 rolls in the morning.\n", ("unverified", "")),  # 2 and 24 have a source
    (2, "#### 23\n", ("wrong", "answer")),
    (2, "#### 32.0\n", ("right", "")),
    (2, "#### thirty-two\n", ("wrong", "malformed")),
    (2, "#####\n", ("wrong", "malformed")),
    (1, "The baker makes 3 * 12 = 36 rolls in the morning.", ("wrong", "repeat")),
  ],
)
def test_verdicts_one_by_one(k, step, expected):
  assert verdict(BAKER, k, step) == expected


def test_a_misread_earlier_result_is_a_carry_mistake():
  assert verdict(tasks.in_units(BAKER, "sentence"), 1, "After the sale there are 63 - 20 = 43 rolls left. ") == (
    "wrong",
    "carry",
  )


def test_a_value_without_arithmetic_is_wrong_only_when_it_has_no_source():
  step = "Max is 52 years old, therefore Nora is {} years old today.\n"
  assert verdict(NORA, 0, step.format(73)) == ("wrong", "value")
  assert verdict(NORA, 0, step.format(31)) == ("unverified", "")  # known to all
  assert verdict(NORA, 0, step.format(67)) == ("unverified", "")  # 52 + 15
  assert verdict(NORA, 0, step.format(73).replace("52", "58")) == ("unverified", "")  # who knows what it is about


def test_rounding_is_not_a_mistake():
  assert verdict(TICKETS, 2, "One share of the tickets is 1,200 / 72 = $16.7.\n")[0] != "wrong"
  assert verdict(TICKETS, 2, "One share of the tickets is 1,200 / 72 = $17.\n")[0] != "wrong"
  assert verdict(TICKETS, 2, "One share of the tickets is 1,200 / 72 = $18.\n") == ("wrong", "calc")


@pytest.mark.parametrize(
  ("k", "wrong", "label", "recompute"),
  [
    (0, "The baker makes 3 * 12 = 35 rolls in the morning.\n", "3*12 is not 35.", "3*12 is 36, not 35."),
    (0, "He has 4 + 4 = 9 rolls.\n", "4+4 is not 9.", "4+4 is 8, not 9."),
    (
      0,
      "The baker makes 3 * 21 = 63 rolls in the morning.\n",
      "21 is not the right number.",
      "The number is 12, not 21: 3*12 = 36.",
    ),
    (
      1,
      "The baker makes 3 * 12 = 36 rolls in the morning.\n",
      "This was said before.",
      "This was said before: 3*12 is 36.",
    ),
    (2, "#### 23\n", "The answer is not 23.", "The answer is 32, not 23."),
    (2, "#### many\n", "The answer is not a number.", "The answer is the number 32."),
  ],
)
def test_reasons_say_what_is_wrong_and_recompute_it(k, wrong, label, recompute):
  assert TASK.explain(BAKER, BAKER.steps[:k], wrong, "label") == label
  assert TASK.explain(BAKER, BAKER.steps[:k], wrong, "recompute") == recompute


@pytest.mark.parametrize(
  ("step", "error"),
  [
    ("He has 3 + 12 = 15 rolls.\n", "result"),
    ("That leaves 20 - 16 = $4.\n", "result"),
    ("So x = 7 rolls\n", "result"),
    ("He bakes 12 rolls = 12\n", ""),  # of the question
    ("He has 72 / 2 = 36 rolls.\n", ""),  # of the solution
    ("A third of 48 = 0.16 of it\n", ""),  # 16, as percent
    ("Rolls = 15 * 2\n", ""),  # no result yet
    ("He has 15 rolls.\n", ""),  # states no result
  ],
)
def test_a_result_that_neither_question_nor_solution_has_is_located(step, error):
  assert TASK.check(BAKER, (), step).kind in ("unverified", "right")
  assert TASK.locate(BAKER, step) == error
  if error:
    assert TASK.explain(BAKER, (), step, "recompute").endswith(" does not lead to the answer.")


def test_a_difference_the_other_way_round_is_no_mistake():
  assert verdict(BAKER, 1, "After the sale there are 20 - 36 = 16 rolls left.\n") == ("right", "")


def is_wrong(problem, k, error, wrong):
  """An independent look: same words as the step it replaces, and another result or answer; or a step said before."""
  right = problem.steps[k]
  if error == "repeat":
    return wrong in problem.steps[:k]
  before, after = numbers_of(right), numbers_of(wrong)
  changed = {old for old, new in zip(before, after, strict=True) if old != new}
  results = {note.result for note in problem.facts.notes} | {problem.facts.answer}
  return words_of(wrong) == words_of(right) and bool(changed & results)


@pytest.mark.parametrize("unit", ["line", "sentence", "paragraph"])
@pytest.mark.parametrize("error", Gsm8k.error_classes)
def test_every_injected_mistake_that_check_accepts_is_really_wrong(unit, error):
  rng = np.random.default_rng(0)
  accepted = 0
  for problem in (tasks.in_units(each, unit) for each in (BAKER, TICKETS, NORA)):
    for k in range(len(problem.steps)):
      for _ in range(30):
        wrong = TASK.inject(problem, problem.steps[:k], error, rng)
        if wrong is not None and TASK.check(problem, problem.steps[:k], wrong) == tasks.Verdict("wrong", error):
          accepted += 1
          assert is_wrong(problem, k, error, wrong)
  # A paragraph holds the earlier steps itself, so nothing is carried into it.
  assert accepted >= 10 or (unit, error) == ("paragraph", "carry")


def test_a_changed_operand_is_recomputed():
  rng = np.random.default_rng(0)
  found = [TASK.inject(BAKER, (), "operand", rng) for _ in range(50)]
  assert sum(wrong is not None for wrong in found) > 10
  for wrong in filter(None, found):
    first, second, result = numbers_of(wrong)
    assert first * second == result != 36
    assert TASK.check(BAKER, (), wrong) == tasks.Verdict("wrong", "operand")


def test_a_result_that_is_said_again_changes_everywhere():
  rng = np.random.default_rng(0)
  problem = problem_of({"question": "q", "answer": "Of all 36 rolls, 3 * 12 = <<3*12=36>>36 rolls are sold.\n#### 36"})
  for _ in range(10):
    first, _, _, last = numbers_of(TASK.inject(problem, (), "calc", rng))
    assert first == last != 36


def test_numbers_keep_their_style():
  rng = np.random.default_rng(0)
  wrong = {TASK.inject(TICKETS, TICKETS.steps[:2], "calc", rng) for _ in range(40)}
  assert all("$" in step and len(step.rpartition("$")[2].rstrip(".\n").partition(".")[2]) == 2 for step in wrong)


@pytest.mark.parametrize("unit", ["line", "sentence", "paragraph"])
def test_transcripts_of_any_unit_read_back_clean(unit):
  rng = np.random.default_rng(0)
  markers = Markers("<err>", "<fix>")
  config = MistakesConfig(
    source="injected",
    share=1.0,
    max_per_solution=3,
    classes=(),
    reason="recompute",
    unit=unit,
    mined=0.0,
    mined_path="",
  )
  for problem in (BAKER, TICKETS, NORA) * 20:
    transcript = with_mistakes(problem, TASK, config, markers, rng)
    assert any(piece.role == MISTAKE for piece in transcript)
    assert clean(transcript) == problem.prompt + "".join(problem.steps)
    assert clean_text(render(transcript[1:]), markers, unit) == "".join(problem.steps)


def test_the_next_step_follows_what_was_reached_in_other_words():
  before = ("He bakes 3 x 12 = 36 rolls.\n", "Baking is fun.\n")
  assert TASK.next_step(BAKER, before) == BAKER.steps[1]
  assert TASK.correction(BAKER, before, "36 - 20 = 6\n") == BAKER.steps[1]


def test_it_makes_no_problems_and_has_no_sizes():
  with pytest.raises(InputError, match=r"data\.path"):
    TASK.make(np.random.default_rng(0))
  with pytest.raises(InputError, match="min_size=1"):
    tasks.get(TaskConfig(name="gsm8k", min_size=1, max_size=1, modulus=0))


def test_numbers_are_exact():
  problem = problem_of({"question": "q", "answer": "0.1 + 0.2 = <<0.1+0.2=0.3>>0.3\n#### 0.3"})
  assert problem.facts.answer == Fraction(3, 10)

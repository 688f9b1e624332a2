"""What stands in results.json besides the rates, which tests/evaluation/test_probing.py reads."""

import dataclasses
import json

import pytest

from insec_jax.evaluation import results
from insec_jax.evaluation.measuring import GREEDY, SAMPLED, Measurements, Thresholds
from insec_jax.evaluation.probing import ProbeResults, SolveResults
from insec_jax.evaluation.scoring import Outcome, SolutionScore
from insec_jax.evaluation.steps import Step
from insec_jax.evaluation.tables import table
from insec_jax.method.roles import FLAG, MISTAKE, PROMPT
from insec_jax.method.transcript import Piece

SEEN = {
  "reason": "",
  "reason_right": False,
  "fix": "",
  "fix_kind": "none",
  "parroted": False,
  "recovered": False,
  "answered": True,
  "malformed": 0,
}
TRANSCRIPT = (Piece(PROMPT, "p"), Piece(MISTAKE, "m"), Piece(FLAG, "f"))
PERFECT = SolutionScore(
  num_right=1,
  num_wrong=0,
  num_unverified=0,
  false_alarms=0,
  catches=0,
  unverified_flagged=0,
  harmful_edits=0,
  own=None,
  right_first=True,
  right=True,
  strict=True,
  answer="7",
  malformed=0,
  errors={},
)
NOTHING = ProbeResults([], [], [], [])
CHOSEN = Thresholds(temperature=0.0, most=0.01, bias=None, score=None, steps=[])


def outcome(error: str, delay: int | None, **changes) -> Outcome:
  return Outcome(**{**SEEN, "error": error, "delay": delay, **changes})


def test_auroc_is_the_share_of_pairs_ordered_rightly():
  found = results.auroc([3.0, 1.0], [0.0, 1.0, 2.0])
  assert (found["rate"], found["k"], found["n"]) == (0.75, 4.5, 6)
  assert 0 <= found["low"] < 0.75 < found["high"] <= 1
  assert results.auroc([], [1.0]) == {"rate": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0}


def test_transcripts_of_successes_and_failures_take_turns_among_the_classes():
  good = {"fix_kind": "right", "recovered": True}
  outcomes = [outcome("calc", 0, **good)] * 9 + [outcome("early", 0, **good)] * 2 + [outcome("calc", None)] * 2
  shown = list(results.shown_probes("injected", ProbeResults(outcomes, None, [], [TRANSCRIPT] * 13)))
  assert [one["title"].removeprefix("injected mistake: ") for one in shown] == [
    "calc",
    "early",
    "calc",
    "early",
    "calc",
    "calc",
    "calc",
    "calc",
  ]
  assert [one["outcome"] for one in shown] == [
    *["flagged, corrected, answer right"] * 6,
    *["not flagged, answer wrong"] * 2,
  ]
  assert shown[0]["pieces"] == [
    {"role": "prompt", "text": "p"},
    {"role": "mistake", "text": "m"},
    {"role": "flag", "text": "f"},
  ]


@pytest.mark.parametrize(
  ("seen", "words"),
  [
    (outcome("calc", None, answered=False), "not flagged, answer missing"),
    (outcome("calc", 1), "flagged 1 step later, answer wrong"),
    (outcome("calc", 3, recovered=True), "flagged 3 steps later, answer right"),
    (outcome("calc", 0), "flagged, not replaced, answer wrong"),
    (outcome("calc", 0, fix_kind="wrong", parroted=True), "flagged, the mistake repeated, answer wrong"),
    (outcome("calc", 0, fix_kind="unverified"), "flagged, replaced by a step that is not wrong, answer wrong"),
  ],
)
def test_an_outcome_is_told_in_words(seen, words):
  assert results.in_words(seen) == words


def nothing_measured() -> Measurements:
  one = SolveResults([PERFECT], [3], [TRANSCRIPT], [], NOTHING)
  return Measurements(
    {GREEDY: NOTHING, SAMPLED: NOTHING}, {GREEDY: one, SAMPLED: one}, {GREEDY: CHOSEN, SAMPLED: CHOSEN}, [one]
  )


def test_nothing_measured_is_a_dash_in_the_table_and_null_in_the_file():
  found = results.results(nothing_measured())
  json.dumps(found, allow_nan=False)
  assert found["rates"]["injected"]["detection"] == {"rate": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0}
  lines = table(found).splitlines()
  assert lines[0].split() == ["injected", "own", "own", "sampled"]
  assert next(line for line in lines if line.startswith("detection ")).split() == ["detection", "-", "-", "-"]
  accuracy = next(line for line in lines if line.startswith("accuracy_t2"))
  assert accuracy.split()[1:5] == ["100.0", "%", "[20.7,", "100.0]"]
  assert lines[-2].split() == ["greedy", "-", "-", "0"]


def test_the_table_has_the_main_rates_and_tokens_of_every_source():
  measured = nothing_measured()
  measured.solved[", confidence"] = measured.solved[GREEDY]
  lines = table(results.results(measured)).splitlines()
  line = next(line for line in lines if line.startswith("solutions, confidence"))
  assert line.split()[2:6] == ["100.0", "%", "[20.7,", "100.0]"]
  assert line.split()[-1] == "3.0"
  measured.injected[", at threshold"] = ProbeResults([outcome("calc", 0)] * 3, None, [], [TRANSCRIPT] * 3)
  lines = table(results.results(measured)).splitlines()
  line = next(line for line in lines if line.startswith("injected, at threshold: calc"))
  assert line.split()[4:6] == ["100.0", "%"]  # detected, and then
  assert line.split()[9:11] == ["0.0", "%"]  # not corrected


def solved(*answers: str | None, right: str = "7", tokens: int = 10) -> SolveResults:
  scores = [dataclasses.replace(PERFECT, answer=answer, right=answer == right, right_first=False) for answer in answers]
  return SolveResults(scores, [tokens] * len(answers), [TRANSCRIPT] * len(answers), [], NOTHING)


def test_the_majority_is_given_at_every_odd_number_of_votes_with_all_its_tokens():
  measured = dataclasses.replace(
    nothing_measured(),
    votes=[
      solved("7", "5", "5"),
      solved("5", "7", "5", tokens=20),
      solved("5", "7", None, tokens=30),
      solved("7", "7", "7"),
    ],
  )
  found = results.results(measured)
  source = "solutions sampled, majority"
  points = found["accuracy_at_tokens"][source]
  assert [(point["votes"], point["accuracy"]["k"], point["tokens_per_problem"]["mean"]) for point in points] == [
    (1, 1, 10.0),
    (3, 1, 60.0),
    (4, 2, 70.0),
  ]
  assert found["solved"][source] == {"t1": [1, 0, 0], "t2": [1, 1, 0]}
  assert found["tokens_per_problem"][source]["mean"] == 70.0
  rates = found["rates"][source]
  assert [
    rates[name]["k"] for name in ("accuracy_t1", "accuracy_t2", "wrong_to_right", "right_to_wrong", "answered")
  ] == [1, 2, 1, 0, 3]


def test_first_tries_are_counted_by_kind_and_class_with_lucky_ones_apart():
  def step(solution: int, kind: str, error: str = "") -> Step:
    return Step(solution, kind, error, is_first_try=True, score=0.0, margin_P=None, flag_P=None)

  steps = [
    step(0, "right"),
    step(0, "unverified"),
    step(0, "wrong", "calc"),
    step(1, "right"),
    step(1, "wrong", "calc"),
    step(2, "wrong", "early"),
  ]
  one = dataclasses.replace(solved("7", "7", "7"), own=ProbeResults([], None, steps, []))
  found = results.first_tries(one)
  assert {name: (rate["k"], rate["n"]) for name, rate in found.items()} == {
    "right": (2, 6),
    "unverified": (1, 6),
    "calc": (2, 6),
    "early": (1, 6),
  }


def test_injected_minus_own_is_taken_between_sources_of_one_kind():
  measured = nothing_measured()
  seen, missed = outcome("calc", 0), outcome("calc", None)
  measured.injected[SAMPLED] = ProbeResults([seen, seen, seen, missed], [], [], [TRANSCRIPT] * 4)
  one = dataclasses.replace(measured.solved[SAMPLED], own=ProbeResults([seen, missed], [], [], [TRANSCRIPT] * 2))
  measured.solved[SAMPLED] = one
  measured.solved[SAMPLED + ", confidence"] = one
  gap = results.results(measured)["gap"]
  assert gap["own sampled"]["detection"]["difference"] == gap["own sampled: calc"]["detection"]["difference"] == 0.25
  assert gap["own"] == {}
  assert "own sampled, confidence" not in gap

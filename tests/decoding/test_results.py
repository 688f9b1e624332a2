"""What stands in results.json besides the rates, which tests/decoding/test_probing.py reads."""

import json

import pytest

from insec_jax.decoding import results
from insec_jax.decoding.probing import FlagScores, Probed, Solved
from insec_jax.method.roles import FLAG, MISTAKE, PROMPT
from insec_jax.method.scoring import Outcome, Rate, SolutionScore
from insec_jax.method.transcript import Piece

SEEN = {"reason": "", "reason_right": False, "fix": "", "fix_kind": "none", "parroted": False, "recovered": False,
        "answered": True, "malformed": 0}
TRANSCRIPT = (Piece(PROMPT, "p"), Piece(MISTAKE, "m"), Piece(FLAG, "f"))
PERFECT = SolutionScore(
    num_right=1, num_wrong=0, num_lucky=0, false_alarms=0, catches=0, lucky_flagged=0, harmful_edits=0, own=None,
    right_first=True, right=True, strict=True, answered=True, malformed=0, errors={})
NOTHING = Probed([], [], FlagScores([], []), [])


def outcome(error: str, delay: int | None, **changes) -> Outcome:
  return Outcome(**{**SEEN, "error": error, "delay": delay, **changes})


def test_the_interval_of_a_difference_is_the_published_one():
  gap = results.newcombe(Rate(56, 70), Rate(48, 80))  # Newcombe 1998, table II, (a), method 10
  assert [round(gap[key], 4) for key in ("difference", "low", "high")] == [0.2, 0.0524, 0.3339]


def test_a_mean_has_its_interval_and_n():
  found = results.mean([1.0, 2.0, 3.0, 4.0])
  assert found["mean"] == 2.5
  assert found["high"] - 2.5 == 2.5 - found["low"] == pytest.approx(1.96 * 1.2909944 / 2)
  assert results.mean([7]) == {"mean": 7.0, "low": None, "high": None, "n": 1}


def test_auroc_is_the_share_of_pairs_ordered_rightly():
  found = results.auroc([3.0, 1.0], [0.0, 1.0, 2.0])
  assert (found["rate"], found["k"], found["n"]) == (0.75, 4.5, 6)
  assert 0 <= found["low"] < 0.75 < found["high"] <= 1
  assert results.auroc([], [1.0]) == {"rate": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0}


def test_transcripts_of_successes_and_failures_take_turns_among_the_classes():
  good = {"fix_kind": "right", "recovered": True}
  outcomes = [outcome("calc", 0, **good)] * 9 + [outcome("early", 0, **good)] * 2 + [outcome("calc", None)] * 2
  shown = list(results.shown_probes("injected", Probed(outcomes, [], None, [TRANSCRIPT] * 13)))
  assert [one["title"].removeprefix("injected mistake: ") for one in shown] == [
      "calc", "early", "calc", "early", "calc", "calc", "calc", "calc"]
  assert [one["outcome"] for one in shown] == [
      *["flagged, corrected, answer right"] * 6, *["not flagged, answer wrong"] * 2]
  assert shown[0]["pieces"] == [
      {"role": "prompt", "text": "p"}, {"role": "mistake", "text": "m"}, {"role": "flag", "text": "f"}]


@pytest.mark.parametrize(("seen", "words"), [
    (outcome("calc", None, answered=False), "not flagged, answer missing"),
    (outcome("calc", 1), "flagged 1 step later, answer wrong"),
    (outcome("calc", 3, recovered=True), "flagged 3 steps later, answer right"),
    (outcome("calc", 0), "flagged, not replaced, answer wrong"),
    (outcome("calc", 0, fix_kind="wrong", parroted=True), "flagged, the mistake repeated, answer wrong"),
    (outcome("calc", 0, fix_kind="lucky"), "flagged, replaced by a step that is not wrong, answer wrong"),
])
def test_an_outcome_is_told_in_words(seen, words):
  assert results.in_words(seen) == words


def test_nothing_measured_is_a_dash_in_the_table_and_null_in_the_file():
  one = Solved([PERFECT], [3], [TRANSCRIPT], NOTHING)
  found = results.results(NOTHING, {"": one, " sampled": one}, within=2)
  json.dumps(found, allow_nan=False)
  assert found["rates"]["injected"]["detection"] == {"rate": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0}
  lines = results.table(found["rates"]).splitlines()
  assert lines[0].split() == ["injected", "own", "own", "sampled"]
  assert next(line for line in lines if line.startswith("detection ")).split() == ["detection", "-", "-", "-"]
  accuracy = next(line for line in lines if line.startswith("accuracy_t2"))
  assert accuracy.split()[1:5] == ["100.0", "%", "[20.7,", "100.0]"]

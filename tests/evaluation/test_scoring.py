"""Rates, and the reading of continuations and whole solutions."""

import dataclasses

import numpy as np
import pytest

from insec_jax.config import MistakesConfig, TaskConfig
from insec_jax.evaluation import scoring
from insec_jax.evaluation.scoring import (
  by_class,
  majority,
  probe_rates,
  read_probe,
  score_solution,
  solution_rates,
)
from insec_jax.evaluation.statistics import Rate
from insec_jax.method import tasks
from insec_jax.method.mistakes import with_mistakes
from insec_jax.method.roles import MISTAKE
from insec_jax.method.tasks import gsm8k_records
from insec_jax.method.tasks.graph import Facts
from insec_jax.method.transcript import Markers, render

MARKERS = Markers("<err>", "<fix>")
TASK = tasks.get(TaskConfig(name="graph", min_size=2, max_size=5, modulus=10))
# a4, b3 and g6 are given; cab and dca are needed for the asked fdb. E0 is true, but not the definition of e.
PROBLEM = tasks.Problem(
  "cab;a4;dca;b3;eag;g6;fdb?f:\n",
  ("ca4b3c7\n", "dc7a4d1\n", "fd1b3f4\n"),
  "4",
  "k",
  Facts(
    "f",
    {"c": ("a", "b"), "d": ("c", "a"), "f": ("d", "b"), "e": ("a", "g")},
    {"a": 4, "b": 3, "c": 7, "d": 1, "e": 0, "f": 4, "g": 6},
  ),
)
C, D, F = PROBLEM.steps
C8, D2, F5, E0 = "ca4b3c8\n", "dc7a4d2\n", "fd1b3f5\n", "ec7b3e0\n"


def probed(continuation, before=(C,), wrong=D2, *, finished=True, forced=False):
  return read_probe(
    PROBLEM, before, wrong, continuation, finished=finished, task=TASK, markers=MARKERS, unit="line", forced=forced
  )


def scored(text, *, finished=True):
  return score_solution(PROBLEM, text, finished=finished, task=TASK, markers=MARKERS, unit="line")


def test_the_majority_is_the_first_with_the_answer_given_most_often():
  six, five, none = "fd1b3f6\n", F5, "no idea\n"
  for texts, expected in (
    ([six, F, F], F),
    ([five, six, six, five], five),
    ([none, none, six], six),
    ([none, F, none], F),
    ([none, ""], none),
  ):
    scores = [scored(text) for text in texts]
    assert majority(scores) is scores[texts.index(expected)]


# One continuation


@pytest.mark.parametrize(
  ("continuation", "expected"),
  [
    (
      "<err>calcd<fix>" + D + F,
      dict(
        delay=0,
        reason="calcd",
        reason_right=True,
        fix=D,
        fix_kind="right",
        parroted=False,
        recovered=True,
        answered=True,
        malformed=0,
      ),
    ),
    ("<err>calc7+4=1<fix>" + D + F, dict(delay=0, reason_right=True, fix_kind="right")),
    ("<err>earlyc<fix>" + D + F, dict(delay=0, reason_right=False, fix_kind="right", recovered=True)),
    ("<err><fix>" + D + F, dict(delay=0, reason="", reason_right=False, fix_kind="right")),
    ("<err>calcd<fix>" + D2 + F, dict(delay=0, fix_kind="wrong", parroted=True, recovered=True)),
    ("<err>calcd<fix>" + D2, dict(delay=0, fix_kind="wrong", parroted=True, recovered=False, answered=False)),
    ("<err>calcd<fix>" + E0 + D + F, dict(delay=0, fix_kind="unverified", parroted=False, recovered=True)),
    ("<err>calcd<fix>rubbish\n", dict(delay=0, fix_kind="wrong", recovered=False)),
    ("<err>calcd", dict(delay=0, fix="", fix_kind="none", malformed=1, recovered=False)),
    ("<err>calcd<fix>", dict(delay=0, fix="", fix_kind="none", malformed=1)),
    ("<err>calcd\n" + D + F, dict(delay=0, fix_kind="none", malformed=1, recovered=False)),
    (
      "<err>calcd<fix>" + D2 + "<err>calcd<fix>" + D + F,
      dict(delay=0, fix=D2, fix_kind="wrong", parroted=True, recovered=True, malformed=0),
    ),
    (F5 + "<err>valued<fix>" + F, dict(delay=1, fix_kind="none", recovered=True)),
    (E0 + F + "<err>", dict(delay=2, fix_kind="none", malformed=1, recovered=True)),
    (F, dict(delay=None, reason="", fix="", fix_kind="none", recovered=True, malformed=0)),
    (F5, dict(delay=None, recovered=False, answered=True)),
    ("", dict(delay=None, recovered=False, answered=False, malformed=0)),
    ("<fix>" + D + F, dict(delay=None, fix="", fix_kind="none", malformed=1, recovered=True)),
  ],
)
def test_what_the_model_did_after_a_wrong_step(continuation, expected):
  outcome = dataclasses.asdict(probed(continuation))
  assert outcome["error"] == "calc"
  assert {name: outcome[name] for name in expected} == expected


def test_with_the_flag_forced_the_continuation_begins_in_the_reason():
  outcome = probed("calcd<fix>" + D + F, forced=True)
  assert (outcome.flagged, outcome.reason, outcome.fix_kind, outcome.recovered) == (True, "calcd", "right", True)
  assert probed("", forced=True).malformed == 1


def test_a_fix_cut_short_is_no_fix():
  cut = "<err>calcd<fix>dc7"
  assert probed(cut, finished=False).fix_kind == "none"
  assert probed(cut, finished=False).malformed == 1
  assert probed(cut).fix_kind == "wrong"
  assert probed(F5 + "f=", finished=False).delay is None


def test_rates_of_probes_have_the_right_numerators_and_denominators(monkeypatch):
  outcomes = [
    probed(text)
    for text in (
      "<err>calcd<fix>" + D + F,  # flagged, right reason, right fix, recovered
      "<err>valuea<fix>" + D2,  # flagged, wrong reason, parroted
      "<err>calcd<fix>" + E0,  # flagged, unverified fix
      "<err>calcd",  # flagged, no fix
      F5 + "<err>valued<fix>" + F,  # flagged one step later, recovered
      F5,  # never flagged
    )
  ]
  rates = probe_rates(outcomes)
  assert rates == {
    "detection": Rate(4, 6),
    "detection_within": Rate(5, 6),
    "reason": Rate(3, 4),
    "correction": Rate(1, 3),
    "corrected": Rate(1, 5),
    "parroting": Rate(1, 4),
    "parroting_failed": Rate(1, 2),
    "recovery": Rate(2, 6),
    "malformed": Rate(1, 6),
    "unverified_fix": Rate(1, 4),
  }
  monkeypatch.setattr(scoring, "WITHIN", 0)
  assert probe_rates(outcomes)["detection_within"] == rates["detection"]
  assert all(each == Rate(0, 0) for each in probe_rates([]).values())


def test_outcomes_come_by_class():
  outcomes = [probed(F), probed(D, before=(), wrong=C8), probed(F, before=(), wrong="fd3b3f6\n")]
  assert {name: len(found) for name, found in by_class(outcomes).items()} == {"calc": 2, "early": 1}


# Whole solutions


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (
      C + D + F,
      dict(
        num_right=3,
        num_wrong=0,
        num_unverified=0,
        right_first=True,
        right=True,
        strict=True,
        malformed=0,
        false_alarms=0,
        catches=0,
        harmful_edits=0,
        own=None,
        errors={},
      ),
    ),
    # own mistake, caught and put right
    (
      C + D2 + "<err>calcd<fix>" + D + F,
      dict(num_right=3, num_wrong=1, catches=1, right_first=False, right=True, strict=True, errors={"calc": 1}),
    ),
    # own mistake that stands, and what is built on it
    (
      C + D2 + "fd2b3f5\n",
      dict(
        num_right=1,
        num_wrong=2,
        catches=0,
        right_first=False,
        right=False,
        strict=False,
        answered=True,
        errors={"calc": 1, "value": 1},
      ),
    ),
    # a right step flagged and said again: a false alarm without harm
    (
      C + "<err>calcc<fix>" + C + D + F,
      dict(num_right=4, false_alarms=1, harmful_edits=0, right_first=True, right=True),
    ),
    # a right step flagged and changed to a wrong one
    (
      C + D + "<err>calcd<fix>" + D2 + "fd2b3f5\n",
      dict(num_right=2, num_wrong=2, false_alarms=1, harmful_edits=1, right_first=True, right=False),
    ),
    # right answer by another way round a wrong step that stands
    (C + D2 + F, dict(num_right=2, num_wrong=1, right_first=True, right=True, strict=False)),
    # a step that is true by chance is unverified, and so is its flag
    (C + E0 + D + F, dict(num_right=3, num_unverified=1, strict=True, right=True)),
    (
      C + E0 + "<err>copye<fix>" + D + F,
      dict(num_right=3, num_unverified=1, unverified_flagged=1, false_alarms=0, catches=0),
    ),
    # a repeat changes no answer, so withdrawing it gains none
    (
      C + C + "<err>repeatc<fix>" + D + F,
      dict(num_right=3, num_wrong=1, catches=1, right_first=True, right=True, errors={"repeat": 1}),
    ),
    # a false alarm left open: the step stands, the marker is malformed
    (C + D + F + "<err>", dict(num_right=3, false_alarms=1, malformed=1, right=True, right_first=True)),
    ("", dict(num_right=0, right=False, right_first=False, answered=False, own=None)),
    ("no idea\n", dict(num_wrong=1, errors={"malformed": 1}, answered=False)),
  ],
)
def test_what_a_whole_solution_is_worth(text, expected):
  score = scored(text)
  assert {name: getattr(score, name) for name in expected} == expected


def test_the_first_wrong_step_is_a_probe_of_its_own():
  own = scored(C + D2 + "<err>calcd<fix>" + D2 + F5).own
  assert own.prefix == C + D2
  assert (own.before, own.wrong) == ((C,), D2)
  assert own.outcome == probed("<err>calcd<fix>" + D2 + F5)
  assert own.outcome.parroted


def test_a_wrong_step_after_a_correction_is_found_with_its_whole_prefix():
  text = C + "<err>calcc<fix>" + C8 + D + F
  own = scored(text).own
  assert own.prefix == C + "<err>calcc<fix>" + C8
  assert (own.before, own.wrong) == ((), C8)


def test_a_last_step_cut_short_is_not_judged():
  assert scored(C + "dc7a", finished=False).num_wrong == 0
  assert scored(C + "dc7a").errors == {"malformed": 1}


def test_any_text_can_be_scored():
  rng = np.random.default_rng(0)
  gsm8k = tasks.get(TaskConfig(name="gsm8k", min_size=0, max_size=0, modulus=0))
  product = tasks.get(TaskConfig(name="multiplication", min_size=2, max_size=3, modulus=0))
  record = {"question": "2 and 3?", "answer": "It has 2 * 3 = <<2*3=6>>6 parts, 50% are red.\n#### 6"}
  problems = [(TASK, PROBLEM), (product, product.make(rng)), (gsm8k, gsm8k_records.problem_of(record))]
  words = [
    "<err>",
    "<fix>",
    "\n",
    "9" * 5000,
    "1,000,",
    "=",
    "+",
    "-",
    "*",
    "/",
    "/0",
    "(",
    ")",
    "%",
    "....",
    "x",
    "$",
    "#",
    "#### ",
    "####",
    "apples",
    " ",
    "7",
    "ca4",
    "b3",
    "c7",
    "\u0663",
    "\u00b2",
    "\u2028",
    "It has 2 * 3 = ",
  ]
  for _ in range(120):
    text = "".join(rng.choice(words, rng.integers(1, 30)))
    for task, problem in problems:
      score = score_solution(problem, text, finished=bool(rng.integers(2)), task=task, markers=MARKERS, unit="line")
      assert score.num_right + score.num_wrong + score.num_unverified >= score.false_alarms + score.catches
      read_probe(problem, (), text, text, finished=True, task=task, markers=MARKERS, unit="line")
      task.next_step(problem, tuple(text.split("\n")))


def test_rates_of_solutions_have_the_right_numerators_and_denominators():
  scores = [
    scored(text)
    for text in (
      C + D + F,
      C + D2 + "<err>calcd<fix>" + D + F,
      C + D + "<err>calcd<fix>" + D2 + "fd2b3f5\n",
      C + E0 + D2 + "fd2b3f5\n" + "<err>",
    )
  ]
  assert counted(solution_rates(scores)) == {
    "accuracy_t1": (2, 4),
    "accuracy_t2": (2, 4),
    "accuracy_strict": (2, 4),
    "wrong_to_right": (1, 4),
    "right_to_wrong": (1, 4),
    "false_alarms": (1, 9),
    "false_alarm_solutions": (1, 4),
    "precision": (2, 3),
    "harmful_edits": (1, 9),
    "wrong_steps": (5, 14),
    "unverified_steps": (1, 15),
    "own_mistakes": (3, 4),
    "answered": (4, 4),
    "malformed": (1, 4),
  }
  assert set(counted(solution_rates([])).values()) == {(0, 0)}
  assert all((each.low, each.high) == (0.0, 1.0) for each in solution_rates([]).values())


def counted(rates):
  return {name: (each.k, each.n) for name, each in rates.items()}


def test_a_model_that_writes_our_transcripts_is_scored_perfect():
  rng = np.random.default_rng(0)
  mistakes = MistakesConfig(
    source="injected",
    share=1.0,
    max_per_solution=2,
    classes=(),
    reason="recompute",
    unit="line",
    mined=0.0,
    mined_path="",
  )
  scores, num = [], 0
  for _ in range(200):
    problem = TASK.make(rng)
    transcript = with_mistakes(problem, TASK, mistakes, MARKERS, rng)
    num += sum(piece.role == MISTAKE for piece in transcript)
    text = render(transcript[1:])
    scores.append(score_solution(problem, text, finished=True, task=TASK, markers=MARKERS, unit="line"))
  rates = solution_rates(scores)
  assert rates["accuracy_t2"] == rates["accuracy_strict"] == Rate(200, 200)
  assert (rates["precision"].k, rates["precision"].n) == (num, num)
  assert rates["false_alarms"].k == rates["malformed"].k == 0
  own = probe_rates([score.own.outcome for score in scores if score.own])
  assert all(own[name].k == own[name].n > 0 for name in ("detection", "reason", "correction", "recovery"))

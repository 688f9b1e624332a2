"""Scripted models, whose every rate is known, are measured as what they are."""

import dataclasses

import pytest
from scripted import CONFIG, FLAG, TASK, WORDS, Policy, Scripted, fractions, prober, results_of

from insec_jax.data.problems import problems_to_solve
from insec_jax.evaluation import probing
from insec_jax.generation import generator
from insec_jax.method import tasks
from insec_jax.method.transcript import split_steps


@pytest.fixture(autouse=True)
def _scripted(monkeypatch):
  monkeypatch.setattr(generator, "Sampler", Scripted)


def test_a_model_that_sees_and_mends_everything_scores_all_of_it():
  found = results_of(prober(Policy(flags=True)))
  for source in ("injected", "injected: calc"):
    n = found["rates"][source]["detection"]["n"]
    assert (
      fractions(
        found["rates"][source],
        "detection",
        "correction",
        "corrected",
        "reason",
        "recovery",
        "correction, forced",
        "recovery, forced",
      )
      == [f"{n}/{n}"] * 7
    )
    assert fractions(found["rates"][source], "parroting", "parroting, forced", "malformed") == [f"0/{n}"] * 3
  assert found["rates"]["injected"]["auroc"] == {"rate": 1.0, "k": 400, "n": 400, "low": 1.0, "high": 1.0}
  assert fractions(found["rates"]["solutions"], "accuracy_t1", "accuracy_t2", "own_mistakes") == [
    "24/24",
    "24/24",
    "0/24",
  ]
  assert found["rates"]["own"]["detection"]["n"] == 0
  assert set(found["gap"]) == {"own", "own, at threshold", "own sampled", "own sampled, at threshold"}
  assert not any(found["gap"].values())
  assert found["solved"]["solutions"] == {"t1": [1] * 24, "t2": [1] * 24}


def test_a_blind_model_detects_nothing_and_corrects_with_the_flag_forced():
  found = results_of(prober(Policy()))["rates"]["injected"]
  assert fractions(found, "detection", "detection_within", "correction", "correction, forced") == [
    "0/20",
    "0/20",
    "0/0",
    "20/20",
  ]
  assert found["recovery, forced"]["rate"] == 1.0 > found["recovery"]["rate"]
  assert found["auroc"]["rate"] == 1.0  # its p(flag) tells what its choice does not


def test_a_parrot_is_called_one():
  found = results_of(prober(Policy(flags=True, parrots=True)))["rates"]["injected"]
  assert fractions(found, "detection", "correction", "parroting", "parroting, forced") == [
    "20/20",
    "0/20",
    "20/20",
    "20/20",
  ]


def test_own_mistakes_are_the_first_wrong_steps_of_the_models_own_solutions():
  one = prober(Policy(flags=True, slips=True))
  found = results_of(one)
  rates = found["rates"]
  assert fractions(rates["own"], "detection", "correction, forced") == ["0/24", "24/24"]
  assert fractions(rates["own: calc"], "detection", "correction, forced") == ["0/24", "24/24"]
  assert found["gap"]["own"]["detection"]["difference"] == 1.0
  assert found["gap"]["own: calc"]["detection"]["difference"] == 1.0
  assert rates["own"]["auroc"]["n"] == 24 * 24  # the wrong step, and the right one before it
  assert rates["own"]["auroc"]["rate"] == 1.0
  assert fractions(rates["solutions"], "own_mistakes", "false_alarms", "precision")[0] == "24/24"


def test_the_flag_is_forced_right_after_the_models_own_wrong_step():
  one = prober(Policy(slips=True))
  problems = problems_to_solve(TASK, CONFIG)
  one.solve(problems, label="solutions", temperature=0.0, force=True)
  asked, forced = one.writer.sampler.seen[:24], one.writer.sampler.seen[24:]
  assert asked == [problem.prompt for problem in problems]
  for problem, text in zip(problems, forced, strict=True):
    first, wrong = split_steps(text.removeprefix(problem.prompt).removesuffix(FLAG), "line")
    assert text.endswith(wrong + FLAG)
    assert [TASK.check(problem, (), first).kind, TASK.check(problem, (first,), wrong).error] == ["right", "calc"]


def test_an_own_mistake_that_leaves_no_room_is_counted_and_not_forced():
  roomy = prober(Policy(slips=True))
  roomy.solve(problems_to_solve(TASK, CONFIG), label="solutions", temperature=0.0, force=True)
  lengths = sorted(len(roomy.writer.tokenizer(text)["input_ids"]) for text in roomy.writer.sampler.seen[24:])
  assert lengths[0] < lengths[12]
  found = results_of(prober(Policy(slips=True), max_positions=lengths[12] - 1 + CONFIG.evaluate.max_tokens))
  assert 0 < found["counts"]["forced"]["own"] < found["counts"]["probes"]["own"] == 24
  assert found["rates"]["own"]["correction, forced"]["n"] == found["counts"]["forced"]["own"]
  assert found["rates"]["own"]["detection"]["n"] == 24


def test_markers_of_plain_words_are_forced_as_words_and_have_no_auroc():
  one = prober(Policy(slips=True), WORDS)
  found = results_of(one, WORDS)
  assert fractions(found["rates"]["injected"], "detection", "correction, forced") == ["0/20", "20/20"]
  assert fractions(found["rates"]["own"], "detection", "correction, forced") == ["0/24", "24/24"]
  assert "auroc" not in found["rates"]["injected"]
  assert sum(text.endswith(FLAG) for text in one.writer.sampler.seen) == 2 * 44  # greedy, and at the temperature


def test_probes_come_in_equal_shares_of_every_class_from_different_problems():
  probes = probing.injected_probes(TASK, CONFIG)
  assert [probe.error for probe in probes] == [error for error in TASK.error_classes for _ in range(4)]
  assert len({probe.problem.prompt for probe in probes}) == 20
  assert {tasks.split_of(probe.problem.key) for probe in probes} == {"probe"}
  for probe in probes:
    verdict = TASK.check(probe.problem, probe.before, probe.wrong)
    assert (verdict.kind, verdict.error) == ("wrong", probe.error)
  assert {tasks.split_of(problem.key) for problem in problems_to_solve(TASK, CONFIG)} == {"test"}


def test_the_share_of_a_class_that_is_found_nowhere_goes_to_no_other(monkeypatch):
  inject = TASK.inject
  monkeypatch.setattr(
    TASK,
    "inject",
    lambda problem, before, error, rng: None if error == "value" else inject(problem, before, error, rng),
  )
  config = dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, num_probes=22))
  errors = [probe.error for probe in probing.injected_probes(TASK, config)]
  assert {error: errors.count(error) for error in TASK.error_classes} == {
    "early": 4,
    "value": 0,
    "calc": 4,
    "copy": 5,
    "repeat": 5,
  }


def test_arms_meet_the_same_probes_and_problems():
  mistakes = dataclasses.replace(CONFIG.mistakes, share=0.0, classes=("early",), max_per_solution=3)
  clean = dataclasses.replace(CONFIG, mistakes=mistakes)
  assert probing.injected_probes(TASK, clean) == probing.injected_probes(TASK, CONFIG)
  assert problems_to_solve(TASK, clean) == problems_to_solve(TASK, CONFIG)

"""Which rivals are measured, and what stands in results.json for each, of scripted models."""

import concurrent.futures
import dataclasses
import json

import numpy as np
import pretended
import pytest
from scripted import CONFIG, TASK, WORDS, Policy, Scripted, fractions, measured, prober, results_of

from insec_jax import config_measures
from insec_jax.command import InputError
from insec_jax.config_types import RIVALS
from insec_jax.data.problems import problems_to_solve
from insec_jax.evaluation import linear_probe, measuring, results, rivals
from insec_jax.evaluation.linear_probe import ProbedSteps
from insec_jax.evaluation.steps import Step
from insec_jax.evaluation.tables import table
from insec_jax.generation import generator, journal
from insec_jax.pages import comparison, correction

SLIPS = Policy(slips=True)  # in its second step, unless the text before was given to it


@pytest.fixture(autouse=True)
def _scripted(monkeypatch):
  monkeypatch.setattr(generator, "Sampler", Scripted)


def with_rivals(*names, config=CONFIG, **changes):
  return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, rivals=names, **changes))


ALL = with_rivals(*RIVALS)


@pytest.fixture(scope="module")
def everything():
  """results.json of a model that slips, with all rivals."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(generator, "Sampler", Scripted)
    return results_of(prober(SLIPS, ALL), ALL)


def test_rivals_add_their_sources_and_change_no_other(everything):
  plain = results_of(prober(SLIPS))
  added = {
    *(f"solutions, {name} {k}" for name in ("redraw", "trigger") for k in (1, 2, 5)),
    *(f"solutions, beam {width}" for width in (2, 4, 8)),
    "solutions sampled, best redraw",
    "solutions sampled, best majority",
  }
  assert everything["solved"].keys() - plain["solved"].keys() == added
  others = {"state", "swapped", "swapped, at threshold", "linear probe", "linear probe sampled"}
  assert {source.partition(":")[0] for source in everything["rates"].keys() - plain["rates"].keys()} == added | others
  for field in ("rates", "solved", "tokens_per_problem"):
    assert {source: value for source, value in everything[field].items() if source in plain[field]} == plain[field]
  assert everything.keys() - plain.keys() == {"tokens", "temperatures", "strengths", "mistakes"}
  assert {source: len(nums) for source, nums in everything["tokens"].items()} == dict.fromkeys(everything["solved"], 24)


def test_a_redraw_of_the_step_that_is_wrong_mends_every_solution_and_pays_for_it(everything):
  rates, tokens = everything["rates"], everything["tokens_per_problem"]
  assert fractions(rates["solutions, flags banned"], "accuracy_strict", "own_mistakes") == ["0/24", "24/24"]
  right = results_of(prober(Policy()))["tokens_per_problem"]["solutions"]["mean"]
  deleted = len(problems_to_solve(TASK, CONFIG)[0].steps[1])  # a token a character, as long in every problem
  for k in (1, 2, 5):
    assert fractions(rates[f"solutions, redraw {k}"], "accuracy_t2", "own_mistakes") == ["24/24", "0/24"]
    assert tokens[f"solutions, redraw {k}"]["mean"] == pytest.approx(right + deleted)
    assert rates[f"solutions, trigger {k}"] == rates["solutions"]  # it flags none of its own
  for width in (2, 4, 8):
    assert fractions(rates[f"solutions, beam {width}"], "accuracy_t2") == ["24/24"]
    assert tokens[f"solutions, beam {width}"]["mean"] == pytest.approx(width * right)


def test_what_could_replace_own_mistakes_is_counted_for_all_and_for_those_flagged(everything):
  assert fractions(everything["rates"]["state"], "fresh_draw", "second_choice") == ["24/24"] * 2
  assert fractions(everything["rates"]["state"], "fresh_draw, flagged", "second_choice, flagged") == ["0/0"] * 2
  drawn = [rivals.Drawn(True, "wrong", "right"), rivals.Drawn(True, "unverified", "wrong")]
  drawn += [rivals.Drawn(False, "right", "right")]
  found = results.rival_rates(rivals.RivalResults(drawn=drawn))["state"]
  assert {name: (rate.k, rate.n) for name, rate in found.items()} == {
    "fresh_draw": (1, 2),
    "second_choice": (2, 3),
    "fresh_draw, flagged": (0, 1),
    "second_choice, flagged": (1, 2),
  }


def test_another_model_continues_from_the_mistakes_that_the_first_one_wrote(everything, tmp_path):
  (tmp_path / "first.json").write_text(json.dumps(everything))
  problems = problems_to_solve(TASK, CONFIG)
  swapped = rivals.read_mistakes(str(tmp_path / "first.json"), problems, TASK)
  assert [probe.problem for probe in swapped] == problems
  assert {TASK.check(probe.problem, probe.before, probe.wrong).error for probe in swapped} == {"calc"}
  some = with_rivals("swapped")
  found = results.results(measured(prober(Policy(flags=True), some), some, swapped))
  assert fractions(found["rates"]["swapped"], "detection", "correction", "recovery") == ["24/24"] * 3
  assert found["mistakes"] == []  # it makes none
  assert fractions(everything["rates"]["swapped"], "detection", "correction, forced") == ["0/24", "24/24"]


@pytest.mark.parametrize("content", ["{}", '{"mistakes": [{"prompt": "another"}]}', '{"mistakes": 3}', "[]"])
def test_results_without_mistakes_or_of_other_problems_are_refused_in_one_line(tmp_path, content):
  (tmp_path / "other.json").write_text(content)
  with pytest.raises(InputError, match=r"other\.json (has|holds)") as refusal:
    rivals.read_mistakes(str(tmp_path / "other.json"), problems_to_solve(TASK, CONFIG), TASK)
  assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "value"), [("wrong", "right"), ("wrong", ""), ("error", "another")])
def test_a_step_that_is_not_the_mistake_it_is_named_is_refused(everything, tmp_path, name, value):
  problems, mistake = problems_to_solve(TASK, CONFIG), dict(everything["mistakes"][0])
  problem = next(problem for problem in problems if problem.prompt == mistake["prompt"])
  mistake[name] = problem.steps[len(mistake["before"])] if value == "right" else value
  (tmp_path / "edited.json").write_text(json.dumps({"mistakes": [mistake]}))
  with pytest.raises(InputError, match=r"edited\.json: mistake 0, .*; give the file as evaluate wrote it"):
    rivals.read_mistakes(str(tmp_path / "edited.json"), problems, TASK)


def test_a_linear_probe_finds_what_the_hidden_states_know_and_no_output_says(everything):
  for source in ("linear probe", "linear probe sampled"):
    found = everything["rates"][source]
    assert found["auroc, linear probe"]["rate"] == 1.0
    assert found["auroc, linear probe"]["n"] == found["auroc"]["n"] == found["auroc, confidence"]["n"] == 24 * 24
  assert everything["strengths"].keys() == {"linear probe", "linear probe sampled"}


def probed(wrong_N, state_ND):
  steps = [
    Step(number, "wrong" if wrong else "right", "", is_first_try=True, score=0.0, margin_P=None, flag_P=None)
    for number, wrong in enumerate(wrong_N)
  ]
  return ProbedSteps(steps, state_ND)


def test_the_probe_separates_by_the_direction_that_differs_at_any_scale():
  rng = np.random.default_rng(0)
  wrong_N = rng.random(400) < 0.2
  state_ND = rng.normal(size=(400, 30)) * np.geomspace(0.01, 100, 30)[None] + 7
  state_ND[:, 3] += 3 * state_ND[:, 3].std() * wrong_N
  fitted = linear_probe.fit(probed(wrong_N[:200], state_ND[:200]))
  assert np.abs(fitted.weight_D).argmax() == 3
  score_N = fitted.scores(state_ND[200:])
  assert results.auroc(score_N[wrong_N[200:]], score_N[~wrong_N[200:]])["rate"] > 0.9
  assert linear_probe.fit(probed(np.zeros(5, bool), state_ND[:5])) is None


def test_the_temperature_with_most_right_validation_answers_is_taken(monkeypatch):
  some = with_rivals("temperature", temperatures=(0.5, 0.7, 0.9))
  one = prober(SLIPS, some)
  generate = one.writer.sampler.generate

  def only_at(*arguments, temperature, **options):
    one.writer.sampler.policy = Policy() if temperature in (0.7, 0.9) else SLIPS
    return generate(*arguments, temperature=temperature, **options)

  monkeypatch.setattr(one.writer.sampler, "generate", only_at)
  found = results_of(one, some)
  assert [found["temperatures"][name]["best"] for name in ("redraw", "majority")] == [0.5, 0.7]  # redraws mend at 0.5
  tried = found["temperatures"]["majority"]["validation"]
  assert [(point["temperature"], point["accuracy"]["k"]) for point in tried] == [(0.5, 16), (0.7, 24), (0.9, 24)]
  assert fractions(found["rates"]["solutions sampled, best majority"], "accuracy_t2") == ["24/24"]
  assert [point["votes"] for point in found["accuracy_at_tokens"]["solutions sampled, best majority"]] == [1, 3]


def test_what_words_and_other_units_and_a_server_cannot_do_is_named_and_left_out():
  words = with_rivals(*RIVALS, config=WORDS)
  one = prober(SLIPS, words)
  assert rivals.left_out(one.writer, words) == [
    "the markers are plain words: of evaluate.rivals trigger is left out",
  ]
  found = results_of(one, words)
  assert not any("trigger" in source for source in found["solved"])
  assert "solutions, redraw 5" in found["solved"]
  sentences = dataclasses.replace(ALL, mistakes=dataclasses.replace(ALL.mistakes, unit="sentence"))
  assert rivals.can_measure(one.writer, sentences) == ["temperature", "beam", "swapped", "linear_probe"]
  served = prober(SLIPS, ALL)
  served.writer.forces_tokens = False
  assert rivals.can_measure(served.writer, ALL) == ["redraw", "temperature", "trigger", "state", "swapped"]
  named = measuring.left_out(served.writer, ALL)[1:]
  assert named[0].endswith("of evaluate.rivals beam, linear_probe is left out")
  assert "the next best step of the rival state" in named[1]


def test_processes_that_share_the_rivals_have_the_results_of_one(everything, tmp_path, monkeypatch):
  monkeypatch.setattr(journal, "POLL_SECONDS", 0.01)
  some = with_rivals("redraw", "beam", "linear_probe")

  def share(process):
    one = prober(SLIPS, some)
    one.writer.sampler = journal.journaled(
      one.writer.sampler, str(tmp_path / "o"), {}, process=process, num_processes=2
    )
    found = results_of(one, some)
    one.writer.sampler.join(lambda: None)
    return found

  with concurrent.futures.ThreadPoolExecutor() as pool:
    for found in pool.map(share, range(2)):
      assert found["rates"].keys() > {"solutions, redraw 5", "solutions, beam 8", "linear probe"}
      for source in found["rates"].keys() - {"linear probe", "linear probe sampled"}:  # noise by place in the chunk
        assert found["rates"][source] == everything["rates"][source]
  assert not list(tmp_path.iterdir())


def test_page_and_table_show_the_rivals_with_their_tokens_beside_the_corrections(everything, tmp_path):
  whole = {**everything, "model": "", "config": dataclasses.asdict(ALL), "seconds": 0.0}
  correction.check(whole, tmp_path)
  costs = list(pretended.rows(comparison.controls(["one"], [[whole]], reference=0)))
  for name in (*config_measures.RIVALS.values(), "flags banned"):
    assert any(row.endswith(name) and cells[0].endswith(" tokens") for _, row, cells in costs), name
  read_first = pretended.rows(correction.main_rates(["one"], [[whole]]))
  assert any("AUROC of a linear probe" in name and "1.000" in cells[0] for _, name, cells in read_first)
  assert correction.breakdown(["one"], [[whole]])
  lines = table(everything).splitlines()
  start = lines.index(next(line for line in lines if line.startswith("right answers and their tokens")))
  shown = [line.partition("  ")[0] for line in lines[start + 1 : lines.index("", start)]]
  assert set(shown) == everything["solved"].keys()
  assert any(line.split()[:2] == ["state", "fresh_draw"] for line in lines)

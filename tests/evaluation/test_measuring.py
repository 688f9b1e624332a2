"""Which sources are measured, with what the sampler is asked for each, and what comes of it."""

import concurrent.futures
import dataclasses
import functools
import math
from functools import partial

import pytest
from scripted import CONFIG, LARGER, TASK, UNSURE, WORDS, Policy, Scripted, fractions, measured, prober, results_of

from insec_jax.data.problems import problems_to_solve, validation_problems
from insec_jax.evaluation import measuring, probing
from insec_jax.evaluation.redrawing import SHORT
from insec_jax.generation import generator, journal

WAYS = ("", ", flags banned", ", at threshold", ", confidence")


@pytest.fixture(autouse=True)
def _scripted(monkeypatch):
  monkeypatch.setattr(generator, "Sampler", Scripted)


def test_every_source_is_measured_greedily_and_at_the_temperature():
  found = results_of(prober(Policy(slips=True)))
  solutions = {
    *(f"solutions{how}{way}" for how in ("", " sampled") for way in WAYS),
    "solutions sampled, redraw",
    "solutions sampled, majority",
  }
  assert set(found["tokens_per_problem"]) == set(found["solved"]) == solutions
  assert {source for source in found["rates"] if ": " not in source} == solutions | {
    *(f"own{how}{way}" for how in ("", " sampled") for way in ("", ", at threshold", ", confidence")),
    *(f"injected{how}{way}" for how in ("", " sampled") for way in ("", ", at threshold")),
  }
  assert set(found["first_tries"]) == solutions - {"solutions sampled, majority"}
  assert set(found["operating"]) == {"injected", "injected sampled", "own", "own sampled"}
  assert set(found["operating_confidence"]) == {"own", "own sampled"}
  assert found["counts"]["forced"] == {"injected": 20, "own": 24, "injected sampled": 20, "own sampled": 24}
  for source in found["solved"].values():
    assert [len(source["t1"]), len(source["t2"])] == [24, 24]


def test_larger_problems_are_solved_unconstrained_and_their_own_mistakes_are_read():
  found = results_of(prober(Policy(slips=True)), LARGER)
  assert {source for source in found["solved"] if "larger" in source} == {
    "solutions, larger",
    "solutions sampled, larger",
  }
  for how in ("", " sampled"):
    assert fractions(found["rates"][f"own{how}, larger"], "detection") == ["0/24"]
    assert found["rates"][f"solutions{how}, larger"]["own_mistakes"]["k"] == 24
  plain = results_of(prober(Policy(slips=True)))
  longer = found["tokens_per_problem"]["solutions, larger"]["mean"] - plain["tokens_per_problem"]["solutions"]["mean"]
  assert longer > 8  # tokens of a step
  assert found["rates"]["solutions"] == plain["rates"]["solutions"]


@pytest.mark.parametrize("config", [CONFIG, LARGER])
def test_the_number_of_texts_is_that_of_the_passes_over_problems_and_probes(config, monkeypatch):
  texts = 0
  solve, injected = probing.Prober.solve, probing.Prober.injected

  def counted(run, problems, options):
    nonlocal texts
    texts += len(problems) * (1 + options.get("force", False))
    return run(problems, **options)

  monkeypatch.setattr(
    probing.Prober, "solve", lambda self, problems, **options: counted(partial(solve, self), problems, options)
  )
  monkeypatch.setattr(
    probing.Prober, "injected", lambda self, probes, **options: counted(partial(injected, self), probes, options)
  )
  results_of(prober(Policy(slips=True)), config)
  assert measuring.num_texts(config) == texts + config.evaluate.num_problems  # and the redraw


def test_what_the_model_reads_is_encoded_once_for_all_passes(monkeypatch):
  encoded = []
  encode = generator.TextGenerator.encode

  def counted(self, prompt, *, answer=""):
    encoded.append((prompt, answer))
    return encode(self, prompt, answer=answer)

  monkeypatch.setattr(generator.TextGenerator, "encode", counted)
  measured(prober(Policy(slips=True)))
  assert len(encoded) > 48  # problems, validation, and probes
  assert len(set(encoded)) == len(encoded)


def test_a_bias_from_validation_catches_own_mistakes_without_a_false_alarm():
  found = results_of(prober(Policy(slips=True)))
  chosen = found["thresholds"]
  assert chosen["flag_bias"]["greedy"] == pytest.approx(3.0, abs=1e-4)  # right steps have a margin of -3
  assert chosen["max_false_alarms"] == {"greedy": 0.01, "sampled": 0.02}
  assert chosen["temperature"] == {"greedy": 0.0, "sampled": 1.0}
  validation = validation_problems(TASK, CONFIG)
  assert chosen["n"]["greedy"]["wrong"] >= len(validation) == 24
  assert chosen["n"]["greedy"]["right"] >= 24
  rates = found["rates"]
  assert fractions(rates["own"], "detection") == ["0/24"]
  assert fractions(rates["own, at threshold"], "detection", "correction", "recovery") == ["24/24"] * 3
  assert fractions(rates["injected, at threshold"], "detection") == ["20/20"]
  assert rates["solutions, at threshold"]["false_alarms"]["k"] == 0
  assert fractions(rates["solutions, at threshold"], "accuracy_t2") == ["24/24"]
  assert found["gap"]["own, at threshold"]["detection"]["difference"] == 0.0
  assert "correction, forced" not in rates["own, at threshold"]


def test_low_confidence_forces_the_flag_after_the_models_own_mistakes():
  one = prober(Policy(slips=True))
  found = results_of(one)
  assert found["thresholds"]["confidence"]["greedy"] < UNSURE
  for how in ("", " sampled"):
    assert fractions(found["rates"][f"own{how}, confidence"], "detection", "correction") == ["24/24"] * 2
    assert found["rates"][f"own{how}"]["auroc, confidence"]["rate"] == 1.0
    assert found["rates"][f"own{how}: calc"]["auroc, confidence"]["n"] == 24 * 24
    assert [point["detection"]["rate"] for point in found["operating_confidence"][f"own{how}"]] == [1.0]
  assert "auroc, confidence" not in found["rates"]["injected"]


def test_the_redraw_mends_by_drawing_again_and_pays_for_what_it_deletes():
  found = results_of(prober(Policy(slips=True)))
  rates, tokens = found["rates"], found["tokens_per_problem"]
  # A scripted model slips only when it writes from the beginning.
  assert fractions(rates["solutions sampled, redraw"], "accuracy_t2", "accuracy_strict", "own_mistakes") == [
    "24/24",
    "24/24",
    "0/24",
  ]
  right = results_of(prober(Policy()))["tokens_per_problem"]["solutions sampled"]["mean"]
  deleted = len(problems_to_solve(TASK, CONFIG)[0].steps[1])  # a token a character, as long in every problem
  assert tokens["solutions sampled, redraw"]["mean"] == pytest.approx(right + deleted)
  assert "own sampled, redraw" not in rates


def test_the_curve_at_the_chosen_bias_says_what_decoding_with_it_gives():
  found = results_of(prober(Policy(slips=True)))
  at = found["thresholds"]["flag_bias"]["greedy"]
  for source in ("injected", "own"):
    # The curve has the same bound as the threshold, on other problems.
    point = next(point for point in found["operating"][source] if point["bias"] == pytest.approx(at, abs=1e-4))
    decoded = found["rates"][f"{source}, at threshold"]["detection"]
    assert (point["detection"]["k"], point["detection"]["n"]) == (decoded["k"], decoded["n"])
    assert point["false_alarms"]["k"] == 0


def test_each_pass_is_asked_for_with_its_bias_threshold_temperature_and_seed():
  config = dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, temperature=0.7))
  one = prober(Policy(slips=True), config)
  found = measured(one, config)
  asked = {}
  for num, most, temperature, seed, bias, threshold in one.writer.sampler.asked:
    asked.setdefault((temperature, seed, bias, threshold), []).append((num, most))
  whole = [(24, 200)]
  # Greedily nothing is asked for again that is known: without flags the solutions are the same with no bias.
  assert asked.pop((0.0, 0, -math.inf, None)) == whole * 2  # the problems and those of validation
  forced = whole  # after own mistakes
  assert asked.pop((0.0, 0, 0.0, None)) == [(20, 200), (20, 200), *forced, (40, 1)]
  assert asked.pop((0.7, 0, 0.0, None)) == [(20, 200), (20, 200), *whole, *forced]
  for how, temperature in ((measuring.GREEDY, 0.0), (measuring.SAMPLED, 0.7)):
    chosen = found.chosen[how]
    assert asked.pop((temperature, 0, chosen.bias, None)) == [(20, 200), *whole]
    assert asked.pop((temperature, 0, -math.inf, chosen.score)) == whole
  assert asked.pop((0.7, 0, -math.inf, None)) == whole * 3  # the two as above, and the first round of the redraw
  assert asked.pop((0.7, 1, -math.inf, None)) == [(24, SHORT), *whole]  # the second round of the redraw, and a vote
  assert asked.pop((0.7, 2, -math.inf, None)) == whole
  assert not asked


@pytest.mark.parametrize("policy", [Policy(), Policy(flags=True), Policy(slips=True), Policy(flags=True, slips=True)])
def test_what_is_not_asked_for_again_is_what_would_have_been_written(policy, monkeypatch):
  short = measured(prober(policy))
  monkeypatch.setattr(probing.Prober, "_says_the_same", lambda *_: False)
  long = measured(prober(policy))
  for how, one in long.solved.items():
    assert short.solved[how].scores == one.scores
    assert short.solved[how].num_tokens == one.num_tokens
  for how, one in long.injected.items():
    assert short.injected[how].outcomes == one.outcomes


def test_plain_words_and_other_units_leave_out_only_what_they_cannot_have():
  plain = results_of(prober(Policy(slips=True), WORDS), WORDS)
  assert set(plain["solved"]) == {
    "solutions",
    "solutions sampled",
    "solutions sampled, redraw",
    "solutions sampled, majority",
  }
  assert plain["operating"] == {}
  assert plain["thresholds"]["flag_bias"] == {"greedy": None, "sampled": None}
  assert plain["thresholds"]["confidence"]["greedy"] < UNSURE
  assert plain["rates"]["own"]["auroc, confidence"]["rate"] == 1.0
  sentences = dataclasses.replace(CONFIG, mistakes=dataclasses.replace(CONFIG.mistakes, unit="sentence"))
  found = results_of(prober(Policy(slips=True), sentences), sentences)["solved"]
  assert "solutions, at threshold" in found
  assert not any("confidence" in source or "redraw" in source for source in found)


def kept(output, policy, process=0, num_processes=1, calls=math.inf):
  """(the measured part of results.json, the calls of the engine); the engine dies after so many calls."""
  one = prober(policy)
  engine, generate = one.writer.sampler, one.writer.sampler.generate

  def until_killed(*arguments, **options):
    if len(engine.asked) == calls:
      raise InterruptedError
    return generate(*arguments, **options)

  engine.generate = until_killed
  one.writer.sampler = journal.journaled(engine, str(output), {}, process=process, num_processes=num_processes)
  found = results_of(one)
  one.writer.sampler.join(lambda: None)
  return found, engine.asked


@functools.cache
def undisturbed():
  """(the measured part of results.json, the calls of the engine)."""
  whole = prober(Policy(slips=True))
  return results_of(whole), whole.writer.sampler.asked


def test_a_killed_evaluation_goes_on_to_the_same_results_and_computes_only_the_rest(tmp_path):
  with pytest.raises(InterruptedError):
    kept(tmp_path / "o", Policy(slips=True), calls=10)
  found, asked = kept(tmp_path / "o", Policy(slips=True))
  assert found == undisturbed()[0]
  assert asked == undisturbed()[1][10:]
  assert not list(tmp_path.iterdir())


def test_processes_that_share_an_evaluation_all_have_its_results(tmp_path, monkeypatch):
  monkeypatch.setattr(journal, "POLL_SECONDS", 0.01)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    runs = [pool.submit(kept, tmp_path / "o", Policy(slips=True), process, 2) for process in range(2)]
  for run in runs:
    found, asked = run.result()
    assert found == undisturbed()[0]
    assert [num for num, *_ in asked] == [num // 2 for num, *_ in undisturbed()[1]]
  assert not list(tmp_path.iterdir())


def served(scores_flags: bool) -> probing.Prober:
  """A prober whose scripted model is a server's, which may not know the scores of flags that it does not write."""
  one = prober(Policy(slips=True))
  one.writer.forces_tokens, one.writer.scores_flags = False, scores_flags
  generate = one.writer.sampler.generate

  def answered(*arguments, **options):
    assert options["watch"] is None
    sampled = generate(*arguments, **options)
    if scores_flags:
      return sampled
    return [dataclasses.replace(one, flag_logprobs=None, margins=None) for one in sampled]

  one.writer.sampler.generate = answered
  return one


@pytest.mark.parametrize("scores_flags", [True, False])
def test_what_a_server_cannot_do_is_named_and_left_out_and_the_rest_is_the_same(scores_flags):
  whole, one = results_of(prober(Policy(slips=True))), served(scores_flags)
  found, lines = results_of(one), measuring.left_out(one.writer, CONFIG)
  missing = (", confidence",) if scores_flags else (", confidence", ", at threshold")
  assert [source for source in whole["rates"] if source not in found["rates"]] == [
    source for source in whole["rates"] if source.partition(":")[0].endswith(missing)
  ]
  assert found["solved"].keys() <= whole["solved"].keys()
  for source, rates in found["rates"].items():
    unknown = set() if scores_flags or "solutions" in source else {"auroc"}
    assert rates == {name: rate for name, rate in whole["rates"][source].items() if name not in unknown}
  assert found["operating"] == (whole["operating"] if scores_flags else {})
  assert found["operating_confidence"] == whole["operating_confidence"]
  assert [", confidence" in lines[0], any(", at threshold" in line for line in lines)] == [True, not scores_flags]
  assert not measuring.left_out(prober(Policy()).writer, CONFIG)

"""Scripted models, whose every rate is known, are measured as what they are."""

import dataclasses
import types
from collections.abc import Callable

import datakit
import numpy as np
import pytest

from insec_jax.data import tokens
from insec_jax.decoding import probing, results, writer
from insec_jax.decoding.sampler import Generation
from insec_jax.decoding.writer import Writer, Written
from insec_jax.method import tasks
from insec_jax.method.transcript import Markers, split_steps
from insec_jax.training.checkpoint import Opened

CONFIG = datakit.config(
    task__name="graph", task__min_size=2, task__max_size=4, task__modulus=10, data__path="", data__num_records=1,
    mistakes__source="injected", evaluate__num_problems=24, evaluate__num_probes=20, evaluate__max_tokens=200,
    evaluate__batch_size=8)
WORDS = dataclasses.replace(CONFIG, tokenizer=dataclasses.replace(CONFIG.tokenizer, special=False))
TASK = tasks.get(CONFIG.task)
FLAG, FIX = CONFIG.tokenizer.flag, CONFIG.tokenizer.fix
AFTER_WRONG, AFTER_RIGHT = -0.1, -3.0  # log p of the flag


@dataclasses.dataclass
class Policy:
  """How a scripted model behaves."""

  flags: bool = False  # a wrong step that was set before it
  parrots: bool = False  # the mistake, in place of the correction
  slips: bool = False  # writes a wrong second step of its own, and goes on


class Scripted:
  """In place of Sampler: continues texts as a policy says, and keeps what it was given to continue."""

  def __init__(self, config, params, *, compute):  # noqa: ARG002, as Sampler's
    self.config, self.policy, self.seen = config, Policy(), []
    self.tokenizer = params

  def generate(self, prompts, *, max_tokens, stop_ids, **_):
    written = []
    for prompt in prompts:
      text = self.tokenizer.decode(prompt)
      self.seen.append(text)
      problem = next(problem for problem in PROBLEMS if text.startswith(problem.prompt))
      continuation = continued(problem, text[len(problem.prompt):], self.policy)
      token_T = [*self.tokenizer(continuation)["input_ids"], stop_ids[0]]
      flag_T = [self.flag_logprob(problem, text[len(problem.prompt):] + self.tokenizer.decode(token_T[:k]))
                for k in range(len(token_T))]
      finish = "stop" if len(token_T) <= max_tokens else "length"
      written.append(Generation(np.array(token_T[:max_tokens]), np.zeros(len(token_T))[:max_tokens], finish,
                                np.array(flag_T)[:max_tokens]))
    return written

  def next_logprobs(self, prompts, token_ids, *, batch_size):
    assert self.tokenizer.decode(token_ids) == FLAG
    assert batch_size == CONFIG.evaluate.batch_size
    return np.full((len(prompts), 1), AFTER_RIGHT)

  def flag_logprob(self, problem, said) -> float:
    steps = split_steps(said, "line")
    at_end = said.endswith("\n") and FLAG not in said
    is_wrong = at_end and TASK.check(problem, steps[:-1], steps[-1]).kind == "wrong"
    return AFTER_WRONG if is_wrong else AFTER_RIGHT


def continued(problem: tasks.Problem, said: str, policy: Policy) -> str:
  """What a scripted model writes after its own or given beginning of a solution."""
  steps = split_steps(said.removesuffix(FLAG), "line")
  out = ""
  wrong = bool(steps) and TASK.check(problem, steps[:-1], steps[-1]).kind == "wrong"
  if wrong and (policy.flags or said.endswith(FLAG)):
    *before, last = steps
    right = last if policy.parrots else TASK.correction(problem, tuple(before), last)
    out += ("" if said.endswith(FLAG) else FLAG) + TASK.explain(problem, tuple(before), last, "label") + FIX + right
    steps = (*before, right)
  while (step := TASK.next_step(problem, tuple(steps))) is not None:
    if policy.slips and len(steps) == 1:
      step = TASK.inject(problem, tuple(steps), "calc", np.random.default_rng(0))
    out += step
    steps = (*steps, step)
  return out


PROBLEMS = [*tasks.problems(TASK, "test", num=24, seed=0), *tasks.problems(TASK, "probe", num=20, seed=0)]


@pytest.fixture
def prober(monkeypatch) -> Callable[..., probing.Prober]:
  monkeypatch.setattr(writer, "Sampler", Scripted)

  def make(policy: Policy, config=CONFIG, max_positions=1000) -> probing.Prober:
    marked = tokens.open_tokenizer(config)
    model = types.SimpleNamespace(eos_ids=(), max_positions=max_positions)
    opened = Opened(model, marked.tokenizer, marked.tokenizer, Markers(FLAG, FIX), marked.flag_id, marked.fix_id,
                    "line", "plain")
    prober = probing.Prober(Writer(opened, compute="float32"), TASK, config)
    prober.writer.sampler.policy = policy
    return prober
  return make


def measure(prober, config=CONFIG) -> dict:
  injected = prober.injected(probing.injected_probes(TASK, config))
  problems = probing.solved_problems(TASK, config)
  return results.results(injected, {"": prober.solve(problems, temperature=0.0)}, within=2)


def fractions(rates: dict, *names: str) -> list[str]:
  return [f"{rates[name]['k']}/{rates[name]['n']}" for name in names]


def test_a_model_that_sees_and_mends_everything_scores_all_of_it(prober):
  found = measure(prober(Policy(flags=True)))
  for source in ("injected", "injected: calc"):
    n = found["rates"][source]["detection"]["n"]
    assert fractions(found["rates"][source], "detection", "correction", "corrected", "reason", "recovery",
                     "correction, forced", "recovery, forced") == [f"{n}/{n}"] * 7
    assert fractions(found["rates"][source], "parroting", "parroting, forced", "malformed") == [f"0/{n}"] * 3
  assert found["rates"]["injected"]["auroc"] == {"rate": 1.0, "k": 400, "n": 400, "low": 1.0, "high": 1.0}
  assert fractions(found["rates"]["solutions"], "accuracy_t1", "accuracy_t2", "own_mistakes") == [
      "24/24", "24/24", "0/24"]
  assert found["rates"]["own"]["detection"]["n"] == 0
  assert found["gap"] == {"own": {}}
  assert found["solved"] == {"solutions": {"t1": [1] * 24, "t2": [1] * 24}}


def test_a_blind_model_detects_nothing_and_shows_with_the_flag_forced_that_it_could_mend(prober):
  found = measure(prober(Policy()))["rates"]["injected"]
  assert fractions(found, "detection", "detection_within", "correction", "correction, forced") == [
      "0/20", "0/20", "0/0", "20/20"]
  assert found["recovery, forced"]["rate"] == 1.0 > found["recovery"]["rate"]
  assert found["auroc"]["rate"] == 1.0  # its p(flag) tells what its choice does not


def test_a_parrot_is_called_one(prober):
  found = measure(prober(Policy(flags=True, parrots=True)))["rates"]["injected"]
  assert fractions(found, "detection", "correction", "parroting", "parroting, forced") == [
      "20/20", "0/20", "20/20", "20/20"]


def test_own_mistakes_are_the_first_wrong_steps_of_the_models_own_solutions(prober):
  one = prober(Policy(flags=True, slips=True))
  found = measure(one)
  rates = found["rates"]
  assert fractions(rates["own"], "detection", "correction, forced") == ["0/24", "24/24"]
  assert fractions(rates["own: calc"], "detection", "correction, forced") == ["0/24", "24/24"]
  assert found["gap"]["own"]["detection"]["difference"] == 1.0
  assert found["gap"]["own: calc"]["detection"]["difference"] == 1.0
  assert rates["own"]["auroc"]["n"] == 24 * 24  # the wrong step, and the right one before it
  assert rates["own"]["auroc"]["rate"] == 1.0
  assert fractions(rates["solutions"], "own_mistakes", "false_alarms", "precision")[0] == "24/24"


def test_the_flag_is_forced_right_after_the_models_own_wrong_step(prober):
  one = prober(Policy(slips=True))
  problems = probing.solved_problems(TASK, CONFIG)
  one.solve(problems, temperature=0.0)
  asked, forced = one.writer.sampler.seen[:24], one.writer.sampler.seen[24:]
  assert asked == [problem.prompt for problem in problems]
  for problem, text in zip(problems, forced, strict=True):
    first, wrong = split_steps(text.removeprefix(problem.prompt).removesuffix(FLAG), "line")
    assert text.endswith(wrong + FLAG)
    assert [TASK.check(problem, (), first).kind, TASK.check(problem, (first,), wrong).error] == ["right", "calc"]


def test_an_own_mistake_that_leaves_no_room_is_counted_and_not_forced(prober):
  roomy = prober(Policy(slips=True))
  roomy.solve(probing.solved_problems(TASK, CONFIG), temperature=0.0)
  lengths = sorted(len(roomy.writer.tokenizer(text)["input_ids"]) for text in roomy.writer.sampler.seen[24:])
  assert lengths[0] < lengths[12]
  found = measure(prober(Policy(slips=True), max_positions=lengths[12] - 1 + CONFIG.evaluate.max_tokens))
  assert 0 < found["counts"]["forced"]["own"] < found["counts"]["probes"]["own"] == 24
  assert found["rates"]["own"]["correction, forced"]["n"] == found["counts"]["forced"]["own"]
  assert found["rates"]["own"]["detection"]["n"] == 24


def test_markers_of_plain_words_are_forced_as_words_and_have_no_auroc(prober):
  one = prober(Policy(slips=True), WORDS)
  found = measure(one, WORDS)
  assert fractions(found["rates"]["injected"], "detection", "correction, forced") == ["0/20", "20/20"]
  assert fractions(found["rates"]["own"], "detection", "correction, forced") == ["0/24", "24/24"]
  assert "auroc" not in found["rates"]["injected"]
  assert sum(text.endswith(FLAG) for text in one.writer.sampler.seen) == 44


def test_probes_come_in_equal_shares_of_every_class_from_different_problems():
  probes = probing.injected_probes(TASK, CONFIG)
  assert [probe.error for probe in probes] == [error for error in TASK.error_classes for _ in range(4)]
  assert len({probe.problem.prompt for probe in probes}) == 20
  assert {tasks.split_of(probe.problem.key) for probe in probes} == {"probe"}
  for probe in probes:
    verdict = TASK.check(probe.problem, probe.before, probe.wrong)
    assert (verdict.kind, verdict.error) == ("wrong", probe.error)
  assert {tasks.split_of(problem.key) for problem in probing.solved_problems(TASK, CONFIG)} == {"test"}


def test_the_share_of_a_class_that_is_found_nowhere_goes_to_no_other(monkeypatch):
  inject = TASK.inject
  monkeypatch.setattr(TASK, "inject", lambda problem, before, error, rng: None if error == "value" else
                      inject(problem, before, error, rng))
  config = dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, num_probes=22))
  errors = [probe.error for probe in probing.injected_probes(TASK, config)]
  assert {error: errors.count(error) for error in TASK.error_classes} == {
      "early": 4, "value": 0, "calc": 4, "copy": 5, "repeat": 5}


def test_arms_meet_the_same_probes_and_problems():
  mistakes = dataclasses.replace(CONFIG.mistakes, share=0.0, classes=("early",), place="last_half", max_per_solution=3)
  clean = dataclasses.replace(CONFIG, mistakes=mistakes)
  assert probing.injected_probes(TASK, clean) == probing.injected_probes(TASK, CONFIG)
  assert probing.solved_problems(TASK, clean) == probing.solved_problems(TASK, CONFIG)


def written_as(*words: str) -> tuple[Written, types.SimpleNamespace]:
  decoder = types.SimpleNamespace(decode=lambda some: "".join(words[k] for k in some))
  return Written("".join(words), Generation(np.arange(len(words)), np.zeros(1), "length", None)), decoder


def test_tokens_up_to_a_character_are_counted_unless_one_lies_across():
  written, decoder = written_as("1+", "1", "=2", "\n", "2", "+2=4\n")
  assert probing.num_tokens(written, 4, decoder) is None
  assert probing.num_tokens(written, 5, decoder) == 3
  assert probing.num_tokens(written, 6, decoder) == 4
  assert probing.num_tokens(written, 11, decoder) is None
  assert probing.num_tokens(written, 12, decoder) == 6


def test_only_steps_before_any_marker_and_up_to_the_first_wrong_one_are_first_tries():
  problem = PROBLEMS[0]
  right = problem.steps
  wrong = TASK.inject(problem, right[:1], "calc", np.random.default_rng(0))

  def kinds(text, finish="stop"):
    written = Written(text, Generation(np.zeros(1), np.zeros(1), finish, None))
    tries = probing.first_tries(problem, written, TASK, Markers(FLAG, FIX), "line")
    return [(end, verdict.kind) for end, verdict in tries]

  ends = np.cumsum([len(right[0]), len(wrong)]).tolist()
  assert kinds(right[0] + wrong + right[1]) == [(ends[0], "right"), (ends[1], "wrong")]
  assert kinds(right[0] + FLAG + "calc" + FIX + right[0] + wrong) == [(ends[0], "right")]
  assert kinds(right[0] + wrong[:-2], "length") == [(ends[0], "right")]

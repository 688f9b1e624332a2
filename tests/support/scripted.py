"""What the tests of probing and measuring share: scripted models, whose every rate is known."""

import dataclasses
import math
import types

import datakit
import numpy as np

from insec_jax.data import vocabulary
from insec_jax.data.problems import larger_problems, problems_to_solve, validation_problems
from insec_jax.evaluation import measuring, probing, results
from insec_jax.generation.generator import TextGenerator
from insec_jax.generation.loading import LoadedModel
from insec_jax.generation.sampler import SampledTokens
from insec_jax.method import tasks
from insec_jax.method.transcript import Markers, split_steps

CONFIG = datakit.config(
  task__name="graph",
  task__min_size=2,
  task__max_size=4,
  task__modulus=10,
  data__path="",
  data__num_records=1,
  mistakes__source="injected",
  evaluate__num_problems=24,
  evaluate__num_probes=20,
  evaluate__max_tokens=200,
  evaluate__batch_size=8,
)
WORDS = dataclasses.replace(CONFIG, tokenizer=dataclasses.replace(CONFIG.tokenizer, special=False))
TASK = tasks.get(CONFIG.task)
FLAG, FIX = CONFIG.tokenizer.flag, CONFIG.tokenizer.fix
AFTER_WRONG, AFTER_RIGHT = -0.1, -3.0  # log p of the flag
MARGIN_WRONG, MARGIN_RIGHT = -1.0, -3.0
UNSURE, SURE = 2.0, 0.1  # -log p of a token
WIDTH = 3  # of the stream


@dataclasses.dataclass
class Policy:
  """How a scripted model behaves."""

  flags: bool = False  # a wrong step that was set before it; its own never, unless a bias or a watch makes it
  parrots: bool = False  # the mistake, in place of the correction
  slips: bool = False  # writes a wrong second step of its own, unsurely, and goes on


class Scripted:
  """In place of Sampler: continues texts as a policy says, and keeps what it was given to continue."""

  def __init__(self, config, params, *, compute, mesh, kind_V):  # noqa: ARG002, as Sampler's
    self.config, self.policy, self.seen, self.asked = config, Policy(), [], []
    self.tokenizer = params

  def reserve(self, max_tokens):
    pass

  def generate(self, prompts, *, max_tokens, stop_ids, temperature, seed, flag_bias=0.0, watch=None, **_):
    self.asked.append((len(prompts), max_tokens, temperature, seed, flag_bias, watch and watch.threshold))
    written = []
    for prompt in prompts:
      text = self.tokenizer.decode(prompt)
      self.seen.append(text)
      problem = problem_of(text)
      said = text[len(problem.prompt) :]
      continuation = continued(problem, said, self.policy, flag_bias, watch)
      token_T = [*self.tokenizer(continuation)["input_ids"], stop_ids[0]]
      token_T = token_T[: 1 + next(k for k, token in enumerate(token_T) if token in stop_ids)]
      near_T = [nearness(problem, said, self.tokenizer.decode(token_T[:k]), self.policy) for k in range(len(token_T))]
      sure_T = [unsure(said, self.tokenizer.decode(token_T[: k + 1]), self.policy) for k in range(len(token_T))]
      finish = "stop" if len(token_T) <= max_tokens else "length"
      written.append(
        SampledTokens(
          tokens=np.array(token_T[:max_tokens]),
          logprobs=-np.array(sure_T)[:max_tokens],
          finish=finish,
          flag_logprobs=np.array([logprob for _, logprob in near_T])[:max_tokens],
          margins=np.array([margin for margin, _ in near_T])[:max_tokens],
        )
      )
    return written

  def beam(self, prompts, *, width, excluded=None, **options):
    """The text of a greedy model that makes no mistake; every beam writes as much."""
    del excluded
    self.policy, policy = Policy(), self.policy
    written = self.generate(prompts, temperature=0.0, seed=0, **{"flag_bias": -math.inf, **limits(options)})
    self.policy = policy
    return [(dataclasses.replace(one, flag_logprobs=None, margins=None), width * len(one.tokens)) for one in written]

  def streams(self, texts, places, *, batch_size):
    """Whether the step at each place is wrong, hidden among other numbers."""
    del batch_size
    rng, found = np.random.default_rng(0), []
    for text_T, wanted in zip(texts, places, strict=True):
      said = [self.tokenizer.decode(text_T[: place + 1]) for place in wanted]
      wrong = [is_wrong(problem := problem_of(text), text[len(problem.prompt) :]) for text in said]
      noise = rng.normal(size=(len(wanted), WIDTH - 1))
      found.append(np.concatenate([np.array(wrong, float).reshape(-1, 1), noise], 1).astype(np.float32))
    return found


def limits(options: dict) -> dict:
  """The options of a text among those of a search."""
  return {name: options[name] for name in ("max_tokens", "stop_ids", "batch_size")}


def problem_of(text: str) -> tasks.Problem:
  """The problem that the text begins with."""
  return next(problem for problem in PROBLEMS if text.startswith(problem.prompt))


def is_wrong(problem: tasks.Problem, said: str) -> bool:
  steps = split_steps(said, "line")
  return bool(steps) and TASK.check(problem, steps[:-1], steps[-1]).kind == "wrong"


def nearness(problem: tasks.Problem, given: str, written: str, policy: Policy) -> tuple[float, float]:
  """The margin and log p of the flag after all this."""
  said = given + written
  if not said.endswith("\n") or FLAG in said:
    return -9.0, -9.0
  if not is_wrong(problem, said):
    return MARGIN_RIGHT, AFTER_RIGHT
  return (1.0 if policy.flags and not written else MARGIN_WRONG), AFTER_WRONG


def unsure(given: str, written: str, policy: Policy) -> float:
  """-log p of the last token: great at the end of the model's own wrong second step."""
  second = written.count("\n") == 2 and written.endswith("\n") and FLAG not in written
  slipped = policy.slips and not given and second
  return UNSURE if slipped else SURE


def continued(problem: tasks.Problem, said: str, policy: Policy, flag_bias: float, watch) -> str:
  """What a scripted model writes after its own or given beginning of a solution."""
  steps = split_steps(said.removesuffix(FLAG), "line")
  out = ""

  def flags_now() -> bool:
    margin, _ = nearness(problem, said, out, policy)
    return margin + flag_bias > 0 or (watch is not None and unsure(said, out, policy) > watch.threshold)

  def mend() -> None:
    nonlocal out, steps
    *before, last = steps
    right = last if policy.parrots else TASK.correction(problem, tuple(before), last)
    out += ("" if said.endswith(FLAG) else FLAG) + TASK.explain(problem, tuple(before), last, "label") + FIX + right
    steps = (*before, right)

  if is_wrong(problem, said.removesuffix(FLAG)) and (said.endswith(FLAG) or flags_now()):
    mend()
  while (step := TASK.next_step(problem, tuple(steps))) is not None:
    if policy.slips and len(steps) == 1 and not said:
      step = TASK.inject(problem, tuple(steps), "calc", np.random.default_rng(0))
    out += step
    steps = (*steps, step)
    if FLAG not in out and is_wrong(problem, said + out) and flags_now():
      mend()
  return out


LARGER = dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, max_size=6))
PROBLEMS = [
  *tasks.problems(TASK, "test", num=24, seed=0),
  *tasks.problems(TASK, "probe", num=20, seed=0),
  *validation_problems(TASK, CONFIG),
  *larger_problems(LARGER),
]


def prober(policy: Policy, config=CONFIG, max_positions=1000) -> probing.Prober:
  """A prober of a scripted model; `writer.Sampler` must have been replaced by Scripted."""
  prober = probing.Prober(TextGenerator(loaded(config, max_positions)), TASK, config)
  prober.writer.sampler.policy = policy
  return prober


def loaded(config=CONFIG, max_positions=1000) -> LoadedModel:
  """A scripted model as a file would give it."""
  marked = vocabulary.open_tokenizer(config)
  model = types.SimpleNamespace(eos_ids=(), max_positions=max_positions, vocab_size=len(marked.tokenizer), width=WIDTH)
  return LoadedModel(
    model,
    marked.tokenizer,
    marked.tokenizer,
    None,
    "float32",
    Markers(FLAG, FIX),
    marked.flag_id,
    marked.fix_id,
    "line",
    "plain",
  )


def measured(prober: probing.Prober, config=CONFIG, swapped=None) -> measuring.Measurements:
  return measuring.measure(
    prober,
    config,
    probes=probing.injected_probes(TASK, config),
    problems=problems_to_solve(TASK, config),
    validation=validation_problems(TASK, config),
    larger=larger_problems(config),
    swapped=swapped,
  )


def results_of(prober: probing.Prober, config=CONFIG) -> dict:
  """The measured part of results.json."""
  return results.results(measured(prober, config))


def fractions(rates: dict, *names: str) -> list[str]:
  return [f"{rates[name]['k']}/{rates[name]['n']}" for name in names]

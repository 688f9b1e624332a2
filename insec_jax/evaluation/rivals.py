"""Rivals of a correction, named in evaluate.rivals: what the same weights reach without its text.

Whole solutions, flags banned unless said; k is 1, 2 and 5. A bound is the score that evaluate.max_false_alarms of the
right validation steps exceed, greedily, and twice as many at a temperature.

    redraw        "solutions, redraw k"           greedy; a step above the bound is deleted and drawn at temperature 1,
                                                  up to k times, until one is not above; else the surest is kept
                                                  (redrawing.py)
    trigger       "solutions, trigger k"          the same where the model flags a step, until a draw is not flagged;
                                                  flags allowed but inside draws: a correction without its text
    temperature   "solutions sampled, best redraw" and "solutions sampled, best majority"
                                                  the redraw and the majority at the temperature of
                                                  evaluate.temperatures that has most right answers on validation
    beam          "solutions, beam W"             W = 2, 4, 8: sum of log p, no penalty for length (generation/beam.py)

Not whole solutions:

    state         "state"           before each own mistake of the greedy solutions: whether a step drawn at
                                    temperature 1 is right, and the likeliest step of 8 beams other than the mistake;
                                    of all mistakes, and of those flagged: the base rate of their correction
    swapped       "swapped", "swapped, at threshold"
                                    greedily after the own mistakes of evaluate.swapped_path, the results of another
                                    model on the same problems, or of this model; results.json has its own
    linear_probe  "linear probe", "linear probe sampled"
                                    AUROC of a probe on hidden states (linear_probe.py) that was fitted on validation
                                    steps, of p(flag) and of the score, all on the first tries without flags
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.config_measures import BEAMS, BEST_REDRAW, DRAWS, SWAPPED
from insec_jax.evaluation import linear_probe, redrawing, scoring, statistics, thresholds
from insec_jax.evaluation.linear_probe import ProbedSteps
from insec_jax.evaluation.probing import NO_FLAG, Prober, ProbeResults, SolveResults
from insec_jax.evaluation.statistics import Rate
from insec_jax.files.reading import local_path, read_json
from insec_jax.generation.generator import TextGenerator
from insec_jax.method.mistakes import Probe
from insec_jax.method.tasks import Problem, Task, Verdict

CHOOSING = 500  # validation problems, at most, on which a temperature is chosen
LINES = ("redraw", "trigger", "state")  # rivals whose steps must be lines


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What stands in place of an own mistake: the verdict on a fresh draw and on the next best step; None: not known."""

  flagged: bool  # the mistake was
  fresh: str
  second: str | None


@dataclasses.dataclass(frozen=True)
class Probed:
  """Test steps, the score of each by a linear probe, and the strength of its L2; None where none could be fitted."""

  test: ProbedSteps
  scores: list[float] | None
  strength: float | None


@dataclasses.dataclass
class RivalResults:
  """What was measured of the rivals beside whole solutions; empty where they were not asked for."""

  temperatures: dict[str, float] = dataclasses.field(default_factory=dict)  # of "redraw" and "majority"
  on_validation: list[tuple[str, float, Rate]] = dataclasses.field(
    default_factory=list
  )  # (name, temperature, accuracy)
  votes: list[SolveResults] = dataclasses.field(default_factory=list)  # at the best temperature
  drawn: list[Drawn] | None = None
  mistakes: list[tuple[int, Probe]] | None = None  # own ones, with the number of the problem
  swapped: dict[str, ProbeResults] = dataclasses.field(default_factory=dict)  # by ending of the source
  probed: dict[str, Probed] = dataclasses.field(default_factory=dict)  # by temperature


def is_rival(how: str) -> bool:
  """Return whether these solutions (the source without "solutions") are those of a rival."""
  return how.partition(", ")[2].startswith(("redraw ", "trigger ", "best ", "beam "))


def left_out(writer: TextGenerator, config: Config) -> list[str]:
  """Return which of evaluate.rivals cannot be measured, one line for each reason."""
  names, lines = can_measure(writer, config), []
  for reason, unable in (
    ("the steps are no lines", LINES if config.mistakes.unit != "line" else ()),
    ("the markers are plain words", ("trigger",) if writer.flag_id is None else ()),
    ("a server searches no beams and gives no hidden states", () if writer.forces_tokens else ("beam", "linear_probe")),
  ):
    if missing := [name for name in config.evaluate.rivals if name in unable and name not in names]:
      lines.append(f"{reason}: of evaluate.rivals {', '.join(missing)} is left out")
  if "state" in names and not writer.forces_tokens:
    lines.append("a server searches no beams: the next best step of the rival state is left out")
  return lines


def can_measure(writer: TextGenerator, config: Config) -> list[str]:
  """Return the names of evaluate.rivals that this model can be measured with."""
  names = [name for name in config.evaluate.rivals if config.mistakes.unit == "line" or name not in LINES]
  if writer.flag_id is None:
    names = [name for name in names if name != "trigger"]
  return names if writer.forces_tokens else [name for name in names if name not in ("beam", "linear_probe")]


def num_texts(config: Config) -> int:
  """Return about how many texts the rivals write: each round of draws, and each beam, as a pass over the problems."""
  amount = config.evaluate
  num, some = amount.num_problems, min(amount.num_problems, CHOOSING)
  each = {
    "redraw": 2 * len(DRAWS) * num,
    "trigger": 2 * len(DRAWS) * num,
    "temperature": (amount.votes + 1) * (num + len(amount.temperatures) * some),
    "beam": sum(BEAMS) * num,
    "state": (1 + max(BEAMS)) * num,
    "swapped": 3 * num,
    "linear_probe": 0,
  }
  return sum(each[name] for name in amount.rivals)


class Rivals:
  """Measures the rivals of a model.

  `solved` are its solutions by the ending of their source; those that are measured here are added to it.
  """

  def __init__(
    self,
    prober: Prober,
    config: Config,
    *,
    problems: Sequence[Problem],
    validation: Sequence[Problem],
    solved: dict[str, SolveResults],
    on_validation: dict[str, SolveResults],
    bound: float | None,
    flag_bias: float | None,
    swapped: Sequence[Probe] | None,
  ):
    """`bound` and `flag_bias` are the thresholds of greedy decoding; `on_validation` the solutions they were chosen by.

    `swapped` are the mistakes to continue from; None: the model's own.
    """
    self._prober, self._config, self._problems, self._validation = prober, config, problems, validation
    self._solved, self._on_validation, self._bound, self._flag_bias = solved, on_validation, bound, flag_bias
    self._given = swapped
    self._writer = prober.writer
    self._results = RivalResults()
    self._banned = ", flags banned" if prober.writer.flag_id is not None else ""
    self._ban = NO_FLAG if prober.writer.flag_id is not None else 0.0

  def measure(self) -> RivalResults:
    """Measure those of evaluate.rivals that this model can be measured with."""
    ways: dict[str, Callable[[], None]] = {
      "redraw": self._redraw,
      "temperature": self._temperature,
      "beam": self._beam,
      "trigger": self._trigger,
      "state": self._state,
      "swapped": self._swapped,
      "linear_probe": self._linear_probe,
    }
    for name in can_measure(self._writer, self._config):
      ways[name]()
    return self._results

  def _redraw(self) -> None:
    if self._bound is not None:
      self._drawn_again("redraw", redrawing.ByScore(self._writer, self._bound), self._solved[self._banned])

  def _trigger(self) -> None:
    finder = redrawing.ByFlag(self._writer, batch_size=self._prober.limits["batch_size"])
    self._drawn_again("trigger", finder, self._solved[""])

  def _drawn_again(self, name: str, finder: redrawing.Finder, begun: SolveResults) -> None:
    prompts = [self._prober.encode(problem.prompt) for problem in self._problems]
    by_draws = redrawing.redrawn(
      self._writer,
      prompts,
      begun.written,
      finder,
      label=f"solutions, {name}",
      draws=DRAWS,
      seed=self._prober.seed,
      **self._prober.limits,
    )
    for most, (written, nums) in by_draws.items():
      read = self._prober.read(self._problems, written)
      self._solved[f", {name} {most}"] = dataclasses.replace(read, num_tokens=nums)

  def _beam(self) -> None:
    prompts = [self._prober.encode(problem.prompt) for problem in self._problems]
    for width in BEAMS:
      found = self._writer.beam(prompts, label=f"solutions, beam {width}", width=width, **self._prober.limits)
      read = self._prober.read(self._problems, [self._writer.written(sampled) for sampled, _ in found])
      self._solved[f", beam {width}"] = dataclasses.replace(read, num_tokens=[num for _, num in found])

  def _temperature(self) -> None:
    some, amount = self._validation[:CHOOSING], self._config.evaluate
    bounds = {}
    for temperature in amount.temperatures:
      votes = self._votes(some, "validation", temperature)
      right = [score.right for score in majority_of(votes)]
      self._results.on_validation.append(("majority", temperature, statistics.rate(right)))
      bounds[temperature] = thresholds.choose_score(votes[0].steps, most=2 * amount.max_false_alarms)
      if self._prober.unit == "line" and bounds[temperature] is not None:
        right = [score.right for score in self._redrawn(some, "validation", temperature, bounds[temperature]).scores]
        self._results.on_validation.append(("redraw", temperature, statistics.rate(right)))
    for name in ("redraw", "majority"):
      tried = [(rate.k, temperature) for tried, temperature, rate in self._results.on_validation if tried == name]
      if tried:
        self._results.temperatures[name] = max(tried, key=lambda pair: pair[0])[1]  # the first of equal ones
    if (best := self._results.temperatures.get("redraw")) is not None:
      self._solved[f" sampled, {BEST_REDRAW}"] = self._redrawn(self._problems, "solutions", best, bounds[best])
    self._results.votes += self._votes(self._problems, "solutions", self._results.temperatures["majority"])

  def _votes(self, problems: Sequence[Problem], what: str, temperature: float) -> list[SolveResults]:
    return [
      self._prober.solve(
        problems,
        label=f"{what} at {temperature:g}, vote {vote + 1}",
        temperature=temperature,
        flag_bias=self._ban,
        seed=self._prober.seed + vote,
      )
      for vote in range(self._config.evaluate.votes)
    ]

  def _redrawn(self, problems: Sequence[Problem], what: str, temperature: float, bound: float) -> SolveResults:
    return self._prober.redrawn(
      problems,
      label=f"{what} at {temperature:g}, redraw",
      temperature=temperature,
      threshold=bound,
      most=self._config.evaluate.redraws,
    )

  def _state(self) -> None:
    solved, limits = self._solved[""], self._prober.limits
    own = list(self._prober.own_mistakes(self._problems, solved))
    begins = [begin for _, begin, _ in own]
    fresh = self._writer.draw_steps(begins, label="a draw in place of own mistakes", seed=self._prober.seed, **limits)
    second: list[Any] = [None] * len(own)
    if self._writer.forces_tokens:
      second = self._writer.beam(
        begins,
        label="the next best step in place of own mistakes",
        width=max(BEAMS),
        step=True,
        excluded=[wrong for *_, wrong in own],
        **limits,
      )
    self._results.drawn = []
    for (number, *_), draw, next_best in zip(own, fresh, second, strict=True):
      score = solved.scores[number].own
      kinds = [
        None if sampled is None else self._kind(self._problems[number], score.before, sampled)
        for sampled in (draw, next_best and next_best[0])
      ]
      self._results.drawn.append(Drawn(score.outcome.flagged, *kinds))

  def _kind(self, problem: Problem, before: tuple[str, ...], sampled) -> str:
    """Return the verdict on a step; a text that ends instead of having one is wrong."""
    ends = len(sampled.tokens) and sampled.tokens[-1] in self._writer.stop_ids
    text = self._writer.decode(sampled.tokens[:-1] if ends else sampled.tokens)
    return self._prober.task.check(problem, before, text).kind if text else "wrong"

  def _swapped(self) -> None:
    solved = self._solved[self._banned]
    self._results.mistakes = [
      (number, Probe(problem, score.own.before, score.own.wrong, score.own.outcome.error))
      for number, (problem, score) in enumerate(zip(self._problems, solved.scores, strict=True))
      if score.own is not None and not self._has_special(score.own)
    ]
    given = self._given if self._given is not None else [probe for _, probe in self._results.mistakes]
    probes, inject = list(filter(self._has_room, given)), self._prober.injected
    self._results.swapped[""] = inject(probes, label=SWAPPED, temperature=0.0, force=True)
    if self._flag_bias is not None:
      at = ", at threshold"
      self._results.swapped[at] = inject(probes, label=SWAPPED + at, temperature=0.0, flag_bias=self._flag_bias)

  def _has_special(self, own: scoring.OwnMistake) -> bool:
    """Return whether a special token is in the steps: as text it would be encoded as other tokens."""
    text = "".join((*own.before, own.wrong))
    return any(token in text for token in self._writer.tokenizer.all_special_tokens)

  def _has_room(self, probe: Probe) -> bool:
    """Return whether the model can continue after this mistake, its confidence tokens and a flag."""
    begin = self._prober.encode(probe.problem.prompt, answer="".join((*probe.before, probe.wrong)))
    return self._writer.has_room(begin, self._prober.limits["max_tokens"] + len(probe.before) + 2)

  def _linear_probe(self) -> None:
    for how, validation in self._on_validation.items():
      fitted = linear_probe.fit(linear_probe.read(self._prober, self._validation, validation))
      test = linear_probe.read(self._prober, self._problems, self._solved[how + self._banned])
      scores = None if fitted is None else fitted.scores(test.state_ND).tolist()
      self._results.probed[how] = Probed(test, scores, fitted and fitted.strength)


def majority_of(votes: Sequence[SolveResults]) -> list[scoring.SolutionScore]:
  """Return the majority of each problem's solutions."""
  return [scoring.majority(scores) for scores in zip(*(solved.scores for solved in votes), strict=True)]


def read_mistakes(path: str, problems: Sequence[Problem], task: Task) -> list[Probe]:
  """Return the own mistakes that another evaluation with the rival "swapped" wrote into its results.

  Raises InputError where the file has none, a problem that is not solved here, or a step that is not wrong.
  """
  values = read_json(local_path(path, "evaluate.swapped_path"), "evaluate.swapped_path")
  if not isinstance(values, dict) or not isinstance(given := values.get("mistakes"), list):
    raise InputError(
      f"evaluate.swapped_path={path} has no 'mistakes'; give a results.json that evaluate wrote with 'swapped' in "
      "evaluate.rivals"
    )
  of_prompt = {problem.prompt: problem for problem in problems}
  try:
    probes = [
      Probe(of_prompt[mistake["prompt"]], tuple(mistake["before"]), mistake["wrong"], mistake["error"])
      for mistake in given
    ]
    verdicts = [task.check(probe.problem, probe.before, probe.wrong) for probe in probes]
  except (KeyError, TypeError) as error:
    raise InputError(
      f"evaluate.swapped_path={path} has a mistake in a problem that is not solved here ({error!s:.60}); give results "
      "with the same task, seed, data and evaluate.num_problems"
    ) from None
  for number, (probe, verdict) in enumerate(zip(probes, verdicts, strict=True)):
    if verdict != Verdict("wrong", probe.error):
      raise InputError(
        f"evaluate.swapped_path={path}: mistake {number}, {probe.wrong!r:.60}, is {verdict.kind} ({verdict.error!r}), "
        f"and it is named wrong ({probe.error!r}); give the file as evaluate wrote it"
      )
  return probes

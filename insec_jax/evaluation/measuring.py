"""All measurements of a model, in as few passes of the decoder as possible.

Greedily, then at evaluate.temperature:

    injected              after injected mistakes; again with the flag forced
    solutions             and own, their first wrong steps; again with the flag forced after these
    , flags banned        whole solutions without a flag: the baseline for corrections
    (validation)          the same on other problems, on which the two thresholds are chosen
    , at threshold        injected and solutions with the bias on the flag that keeps false alarms per right step within
                          evaluate.max_false_alarms (at the temperature twice that)
    , larger              solutions of problems larger than any trained on, where evaluate.max_size asks for them
    , confidence          solutions with flags banned, but forced after steps whose score is above the threshold that
                          keeps the same bound

Only at the temperature:

    , redraw              control: steps above the threshold deleted and sampled again, flags banned
    , majority            control: most frequent answer of evaluate.votes solutions, flags banned; the first solutions
                          are those of ", flags banned"

The rivals of a correction that evaluate.rivals names come last: see rivals.py.

These are 9 greedy passes, which rewrite only texts that a bias or a forced flag changes (2 of the 5 over all problems
are whole); 8 + votes at the temperature; for the redraw one a round until no step is left to redraw, at most
redraws * steps + 1; one more each with larger problems; and one of a single token. AUROCs, curves and thresholds are
computed from these and need no further pass.

The bound holds for the steps of validation solutions written without flags. Corrections add steps, which may be flagged
again: measured false alarms can be above it.

Where markers are plain words no flag can be banned, biased or forced: sources that need this are left out, and the rest
is written without a ban. Where steps are not lines, sources that need scores while decoding are left out. A server
(--server) forces no flags while decoding: ", confidence" is left out. Where it does not give the log p of flags that
are not written, so are ", at threshold", the operating curves and "auroc", and no greedy text is reused.
"""

import dataclasses
import functools
from collections.abc import Sequence

from insec_jax.config import Config
from insec_jax.evaluation import rivals, thresholds
from insec_jax.evaluation.probing import NO_FLAG, Prober, ProbeResults, SolveResults
from insec_jax.evaluation.rivals import RivalResults, Rivals
from insec_jax.evaluation.steps import Step
from insec_jax.generation.generator import TextGenerator
from insec_jax.method.mistakes import Probe
from insec_jax.method.tasks import Problem

# Suffixes of "injected", "own" or "solutions" in the name of a source: one of the first two, then at most one other.
GREEDY, SAMPLED = "", " sampled"
BANNED, AT_THRESHOLD, CONFIDENCE = ", flags banned", ", at threshold", ", confidence"
REDRAW, MAJORITY = ", redraw", ", majority"
LARGER = ", larger"


@dataclasses.dataclass(frozen=True)
class Thresholds:
  """Thresholds for one temperature, None without a right step to choose by, and the steps they were chosen on."""

  temperature: float
  most: float  # false alarms per right step
  bias: float | None  # also None where the flag is no special token
  score: float | None
  steps: list[Step]


@dataclasses.dataclass(frozen=True)
class Measurements:
  """Sources by the suffix of "injected", or of "own" and "solutions", in their names."""

  injected: dict[str, ProbeResults]
  solved: dict[str, SolveResults]
  chosen: dict[str, Thresholds]  # by GREEDY and SAMPLED
  votes: list[SolveResults]  # the solutions of each vote, flags banned
  rivals: RivalResults | None = None  # None: none was asked for


def measure(
  prober: Prober,
  config: Config,
  *,
  probes: Sequence[Probe],
  problems: Sequence[Problem],
  validation: Sequence[Problem],
  larger: Sequence[Problem],
  swapped: Sequence[Probe] | None = None,
) -> Measurements:
  """Return all measurements listed above; `swapped` are the mistakes for the rival of this name, None: the own ones."""
  measured, on_validation = Measurements({}, {}, {}, []), {}
  settings = {
    GREEDY: (0.0, config.evaluate.max_false_alarms),
    SAMPLED: (config.evaluate.temperature, 2 * config.evaluate.max_false_alarms),
  }
  for how, (temperature, most) in settings.items():
    solve = functools.partial(prober.solve, temperature=temperature)
    inject = functools.partial(prober.injected, probes, temperature=temperature)
    measured.injected[how] = inject(label=f"injected{how}", force=True)
    if can_ban(prober):  # first, since most greedy solutions are the same with flags
      measured.solved[how + BANNED] = solve(problems, label=f"solutions{how}{BANNED}", flag_bias=NO_FLAG)
    measured.solved[how] = solve(problems, label=f"solutions{how}", force=True)
    on_validation[how] = solve(validation, label=f"validation{how}", flag_bias=NO_FLAG if can_ban(prober) else 0.0)
    chosen = measured.chosen[how] = choose(prober, on_validation[how].steps, temperature, most)
    if chosen.bias is not None:
      at = how + AT_THRESHOLD
      measured.injected[at] = inject(label=f"injected{at}", flag_bias=chosen.bias)
      measured.solved[at] = solve(problems, label=f"solutions{at}", flag_bias=chosen.bias)
    if can_ban(prober) and can_watch(prober, chosen) and prober.writer.forces_tokens:
      measured.solved[how + CONFIDENCE] = solve(
        problems, label=f"solutions{how}{CONFIDENCE}", flag_bias=NO_FLAG, watch=prober.writer.watch(chosen.score)
      )
    if larger:
      measured.solved[how + LARGER] = solve(larger, label=f"solutions{how}{LARGER}")
  controls(measured, prober, config, problems)
  probe_steps = prober.told_apart(probes)
  injected = {how: dataclasses.replace(probed, steps=probe_steps) for how, probed in measured.injected.items()}
  measured = dataclasses.replace(measured, injected=injected)
  if not config.evaluate.rivals:
    return measured
  chosen = measured.chosen[GREEDY]
  contest = Rivals(
    prober,
    config,
    problems=problems,
    validation=validation,
    solved=measured.solved,
    on_validation=on_validation,
    bound=chosen.score,
    flag_bias=chosen.bias,
    swapped=swapped,
  )
  return dataclasses.replace(measured, rivals=contest.measure())


def num_texts(config: Config) -> int:
  """Return the number of texts that `measure` writes, each pass counted whole and the redraw as one pass.

  Greedy texts that a bias does not change are reused, and a flag is forced only after own mistakes: there it is less.
  Later rounds of the redraw write more. Of the rivals it is about the number.
  """
  amount = config.evaluate
  larger = amount.num_problems if amount.max_size else 0
  each_temperature = 3 * amount.num_probes + 6 * amount.num_problems + larger
  redraw, votes = 1, amount.votes - 1  # the first vote is that with flags banned
  return 2 * each_temperature + (redraw + votes) * amount.num_problems + rivals.num_texts(config)


def choose(prober: Prober, steps: list[Step], temperature: float, most: float) -> Thresholds:
  """Return the thresholds that keep false alarms within `most` on these steps."""
  bias = thresholds.choose_bias(steps, temperature=temperature, most=most) if prober.writer.scores_flags else None
  return Thresholds(temperature, most, bias, thresholds.choose_score(steps, most=most), steps)


def controls(measured: Measurements, prober: Prober, config: Config, problems: Sequence[Problem]) -> None:
  """Add the redraw and the votes to `measured`."""
  chosen = measured.chosen[SAMPLED]
  if can_watch(prober, chosen):
    measured.solved[SAMPLED + REDRAW] = prober.redrawn(
      problems,
      label=f"solutions{SAMPLED}{REDRAW}",
      temperature=chosen.temperature,
      threshold=chosen.score,
      most=config.evaluate.redraws,
    )
  measured.votes.append(measured.solved[SAMPLED + BANNED if can_ban(prober) else SAMPLED])
  for vote in range(1, config.evaluate.votes):
    measured.votes.append(
      prober.solve(
        problems,
        label=f"solutions{SAMPLED}, vote {vote + 1}",
        temperature=chosen.temperature,
        flag_bias=NO_FLAG if can_ban(prober) else 0.0,
        seed=prober.seed + vote,
      )
    )


def left_out(writer: TextGenerator, config: Config) -> list[str]:
  """Return what a server cannot measure, and the rivals that cannot be measured, one line for each."""
  lines = []
  if not writer.forces_tokens:
    lines.append("the server forces no flags while decoding: the sources ', confidence' are left out")
  if writer.flag_id is not None and not writer.scores_flags:
    lines.append(
      "the server does not give the log p of a flag that is not written (logprob_token_ids, prompt_logprobs): "
      "'auroc', the operating curves and the sources ', at threshold' are left out"
    )
  return [*lines, *rivals.left_out(writer, config)]


def can_ban(prober: Prober) -> bool:
  """Return whether the flag is a special token."""
  return prober.writer.flag_id is not None


def can_watch(prober: Prober, chosen: Thresholds) -> bool:
  """Return whether scores are known while decoding, and a threshold for them was chosen."""
  return prober.unit == "line" and chosen.score is not None

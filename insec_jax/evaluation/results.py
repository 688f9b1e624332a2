"""The numbers and transcripts of results.json, from the measurements."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from insec_jax.config_measures import BEST_MAJORITY, PROBE, STATE, SWAPPED
from insec_jax.evaluation import measuring, scoring, statistics, thresholds
from insec_jax.evaluation.measuring import BANNED, GREEDY, MAJORITY, SAMPLED, Measurements, Thresholds
from insec_jax.evaluation.probing import ProbeResults, SolveResults
from insec_jax.evaluation.rivals import Drawn, Probed, RivalResults, is_rival
from insec_jax.evaluation.scoring import Outcome
from insec_jax.evaluation.statistics import Rate
from insec_jax.evaluation.steps import Step
from insec_jax.method import roles
from insec_jax.method.transcript import Transcript

FORCED = ("correction", "parroting", "recovery")  # also measured with the flag forced
COMPARED = ("detection", "detection_within", "correction", "correction, forced", "corrected", "parroting", "recovery")
MOST_SHOWN = 6  # transcripts of each kind


def results(measured: Measurements) -> dict:
  """Return the measured part of results.json, as evaluate.py describes it."""
  own = {"own" + how: solved.own for how, solved in measured.solved.items() if how in own_sources(measured)}
  contest = measured.rivals or RivalResults()
  swapped = {SWAPPED + how: probed for how, probed in contest.swapped.items()}
  sources = {**{"injected" + how: probed for how, probed in measured.injected.items()}, **own, **swapped}
  solved = {"solutions" + how: solutions for how, solutions in measured.solved.items()}
  rates = {}
  for source, probed in sources.items():
    rates |= source_rates(source, probed)
  for source, solutions in solved.items():
    rates[source] = scoring.solution_rates(solutions.scores)
  majorities = {f"solutions{SAMPLED}{MAJORITY}": votes_of(measured.votes)}
  if contest.votes:
    majorities[f"solutions{SAMPLED}, {BEST_MAJORITY}"] = votes_of(contest.votes)
  all_votes = {source: list(votes.values())[-1] for source, votes in majorities.items()}
  rates |= {source: votes.rates for source, votes in all_votes.items()}
  rates |= rival_rates(contest)
  operating, by_score = curves(measured)
  return {
    "counts": counts(solved, sources),
    "rates": {
      source: {name: rate.to_json() if isinstance(rate, Rate) else rate for name, rate in named.items()}
      for source, named in rates.items()
    },
    "gap": gaps(rates),
    "first_tries": {source: first_tries(solutions) for source, solutions in solved.items()},
    "thresholds": chosen_thresholds(measured.chosen),
    "operating": operating,
    "operating_confidence": by_score,
    "tokens_per_problem": {
      **{source: statistics.mean(solutions.num_tokens) for source, solutions in solved.items()},
      **{source: statistics.mean(votes.num_tokens) for source, votes in all_votes.items()},
    },
    "accuracy_at_tokens": {source: list(at_tokens(votes)) for source, votes in majorities.items()},
    **({} if measured.rivals is None else rival_fields(contest, solved, all_votes)),
    "solved": {
      **{
        source: {
          "t1": [int(score.right_first) for score in solutions.scores],
          "t2": [int(score.right) for score in solutions.scores],
        }
        for source, solutions in solved.items()
      },
      **{source: {"t1": votes.first, "t2": votes.right} for source, votes in all_votes.items()},
    },
    "transcripts": [
      *(shown for source, probed in sources.items() for shown in shown_probes(source, probed)),
      *(shown for source, solutions in solved.items() for shown in shown_alarms(source, solutions)),
    ],
  }


def own_sources(measured: Measurements) -> list[str]:
  """Return the ways of solving in which the model may flag its own mistakes."""
  return [how for how in measured.solved if not how.endswith((BANNED, measuring.REDRAW)) and not is_rival(how)]


def source_rates(source: str, probed: ProbeResults) -> Iterator[tuple[str, dict]]:
  """Yield (source, its rates), then ("source: CLASS", the rates of that class)."""
  yield source, _rates(probed.outcomes, probed.forced, probed.steps, "")
  for error, outcomes in scoring.by_class(probed.outcomes).items():
    forced = None if probed.forced is None else [outcome for outcome in probed.forced if outcome.error == error]
    yield f"{source}: {error}", _rates(outcomes, forced, probed.steps, error)


def _rates(outcomes: Sequence[Outcome], forced: Sequence[Outcome] | None, steps: Sequence[Step], error: str) -> dict:
  rates = scoring.probe_rates(outcomes)
  if forced is not None:
    forced_rates = scoring.probe_rates(forced)
    rates |= {f"{name}, forced": forced_rates[name] for name in FORCED}
  wrong = [step for step in steps if step.kind == "wrong" and error in ("", step.error)]
  right = thresholds.select_kind(steps, "right")
  if all(step.flag_P is not None for step in steps):
    rates["auroc"] = auroc([step.flag_P[-1] for step in wrong], [step.flag_P[-1] for step in right])
  if all(not math.isnan(step.score) for step in steps):
    rates["auroc, confidence"] = auroc([step.score for step in wrong], [step.score for step in right])
  return rates


def auroc(wrong: Sequence[float], right: Sequence[float]) -> dict[str, float | int | None]:
  """Return the fraction of pairs in which the wrong step has the higher score, in the form of a rate."""
  n = len(wrong) * len(right)
  value = statistics.auroc(wrong, right)
  low, high = statistics.auroc_interval(wrong, right)
  return {"rate": value if n else None, "k": value * n if n else 0, "n": n, "low": low, "high": high}


@dataclasses.dataclass(frozen=True)
class MajorityVote:
  """The results of a majority vote over some solutions of each problem."""

  rates: dict[str, Rate]
  num_tokens: list[int]  # of all solutions of a problem together
  first: list[int]  # whether the first solution is right, 0 or 1
  right: list[int]  # whether the majority is


def vote(solutions: Sequence[SolveResults]) -> MajorityVote:
  """Return the majority over these solutions, problem by problem; t1 is the first solution alone."""
  by_problem = list(zip(*(solved.scores for solved in solutions), strict=True))
  first = [int(scores[0].right) for scores in by_problem]
  chosen = [scoring.majority(scores) for scores in by_problem]
  right = [int(score.right) for score in chosen]
  return MajorityVote(
    {
      "accuracy_t1": statistics.rate(first),
      "accuracy_t2": statistics.rate(right),
      "wrong_to_right": statistics.rate(after > before for before, after in zip(first, right, strict=True)),
      "right_to_wrong": statistics.rate(after < before for before, after in zip(first, right, strict=True)),
      "answered": statistics.rate(score.answered for score in chosen),
    },
    [sum(nums) for nums in zip(*(solved.num_tokens for solved in solutions), strict=True)],
    first,
    right,
  )


def votes_of(votes: Sequence[SolveResults]) -> dict[int, MajorityVote]:
  """Return the majority of 1, 3, 5 and so on, and of all of these solutions."""
  return {number: vote(votes[:number]) for number in vote_numbers(len(votes))}


def at_tokens(votes: dict[int, MajorityVote]) -> Iterator[dict]:
  """Yield accuracy and tokens at each number of votes."""
  for number, majority_vote in votes.items():
    yield {
      "votes": number,
      "accuracy": majority_vote.rates["accuracy_t2"].to_json(),
      "tokens_per_problem": statistics.mean(majority_vote.num_tokens),
    }


def rival_rates(contest: RivalResults) -> dict[str, dict]:
  """Return the rates of the rivals that are neither whole solutions nor probes."""
  rates: dict[str, dict] = {}
  if contest.drawn is not None:
    rates[STATE] = {**_drawn_rates(contest.drawn, ""), **_drawn_rates(contest.drawn, ", flagged")}
  for how, probed in contest.probed.items():
    rates[PROBE + how] = _probed_rates(probed)
  return rates


def _drawn_rates(drawn: Sequence[Drawn], ending: str) -> dict[str, Rate]:
  """Return the rates of right steps in place of mistakes, without unverified ones; with an ending, of those flagged."""
  some = [one for one in drawn if one.flagged or not ending]
  kinds = {"fresh_draw": [one.fresh for one in some], "second_choice": [one.second for one in some]}
  return {
    name + ending: statistics.rate(kind == "right" for kind in found if kind not in (None, "unverified"))
    for name, found in kinds.items()
    if None not in found
  }


def _probed_rates(probed: Probed) -> dict[str, dict]:
  """Return the AUROC of the linear probe, of p(flag) and of the score, on the same steps."""
  steps, wrong_N = probed.test.steps, probed.test.wrong_N
  scores = {"auroc, confidence": [step.score for step in steps]}
  if all(step.flag_P is not None for step in steps):
    scores["auroc"] = [step.flag_P[-1] for step in steps]
  if probed.scores is not None:
    scores["auroc, linear probe"] = probed.scores
  return {name: auroc(np.array(score)[wrong_N], np.array(score)[~wrong_N]) for name, score in scores.items()}


def rival_fields(
  contest: RivalResults, solved: dict[str, SolveResults], all_votes: dict[str, MajorityVote]
) -> dict[str, dict | list]:
  """Return the fields of results.json that are there with rivals only."""
  fields: dict[str, dict | list] = {
    "tokens": {source: one.num_tokens for source, one in [*solved.items(), *all_votes.items()]}
  }
  if contest.temperatures:
    fields["temperatures"] = {
      name: {
        "best": best,
        "validation": [
          {"temperature": temperature, "accuracy": accuracy.to_json()}
          for tried, temperature, accuracy in contest.on_validation
          if tried == name
        ],
      }
      for name, best in contest.temperatures.items()
    }
  if contest.probed:
    fields["strengths"] = {PROBE + how: probed.strength for how, probed in contest.probed.items()}
  if contest.mistakes is not None:
    fields["mistakes"] = [
      {
        "problem": number,
        "prompt": probe.problem.prompt,
        "before": list(probe.before),
        "wrong": probe.wrong,
        "error": probe.error,
      }
      for number, probe in contest.mistakes
    ]
  return fields


def vote_numbers(most: int) -> list[int]:
  """Return 1, 3, 5 and so on, and `most` itself."""
  return [*range(1, most, 2), most]


def first_tries(solved: SolveResults) -> dict[str, dict]:
  """Return the rates of right, unverified and wrong steps (by class) among all up to the first marker or wrong step."""
  steps = solved.own.steps
  names = {
    "right": [],
    "unverified": [],
    **{step.error: [] for step in sorted(steps, key=lambda step: step.error) if step.kind == "wrong"},
  }
  total = np.bincount([step.solution for step in steps], minlength=len(solved.scores)).tolist()
  for step in steps:
    names[step.error or step.kind].append(step.solution)
  rates = statistics.grouped_rates(
    [(np.bincount(solutions, minlength=len(solved.scores)).tolist(), total) for solutions in names.values()]
  )
  return {name: rate.to_json() for name, rate in zip(names, rates, strict=True)}


def chosen_thresholds(chosen: dict[str, Thresholds]) -> dict:
  """Return the thresholds, the bounds they keep, and how many steps of validation problems they were chosen on."""
  named = {{GREEDY: "greedy", SAMPLED: "sampled"}[how]: threshold for how, threshold in chosen.items()}
  return {
    "flag_bias": {name: threshold.bias for name, threshold in named.items()},
    "confidence": {name: threshold.score for name, threshold in named.items()},
    "max_false_alarms": {name: threshold.most for name, threshold in named.items()},
    "temperature": {name: threshold.temperature for name, threshold in named.items()},
    "n": {
      name: {kind: len(thresholds.select_kind(threshold.steps, kind)) for kind in ("right", "wrong")}
      for name, threshold in named.items()
    },
  }


def curves(measured: Measurements) -> tuple[dict, dict]:
  """Return {source: operating curve} over the bias on the flag, and over the confidence threshold."""
  over_bias, over_score = {}, {}
  for how, chosen in measured.chosen.items():
    unflagged = measured.solved.get(how + BANNED)
    steps = [] if unflagged is None else [*measured.injected[how].steps, *unflagged.steps]
    if unflagged is not None and all(step.flag_P is not None for step in steps):
      over_bias["injected" + how] = thresholds.operating(measured.injected[how].steps, temperature=chosen.temperature)
      over_bias["own" + how] = thresholds.operating(unflagged.own.steps, temperature=chosen.temperature)
    over_score["own" + how] = thresholds.operating_by_score((unflagged or measured.solved[how]).own.steps)
  return over_bias, over_score


def gaps(rates: dict[str, dict]) -> dict:
  """Return injected minus own of the same kind, overall and for each class that both have; rates with n 0 have none."""
  differences = {}
  for source in rates:
    injected = source.replace("own", "injected", 1)
    if source.startswith("own") and injected in rates:
      differences[source] = {
        metric: statistics.newcombe(rates[injected][metric], rates[source][metric])
        for metric in COMPARED
        if metric in rates[source] and rates[injected][metric].n and rates[source][metric].n
      }
  return differences


def counts(solved: dict[str, SolveResults], sources: dict[str, ProbeResults]) -> dict:
  """Return the numbers of solutions and probes; a forced probe is missing where it left no room to go on."""
  return {
    "solutions": {source: len(solutions.scores) for source, solutions in solved.items()},
    "probes": {source: len(probed.outcomes) for source, probed in sources.items()},
    "forced": {source: len(probed.forced) for source, probed in sources.items() if probed.forced is not None},
  }


def shown_probes(source: str, probed: ProbeResults) -> Iterator[dict]:
  """Yield up to MOST_SHOWN probes that were corrected at once, then as many that were not, alternating over classes."""
  seen = collections.Counter()
  turns = []
  for index, outcome in enumerate(probed.outcomes):
    turns.append((seen[outcome.error], index))
    seen[outcome.error] += 1
  for corrected in (True, False):
    indices = [
      index
      for _, index in sorted(turns)
      if (probed.outcomes[index].flagged and probed.outcomes[index].fix_kind == "right") == corrected
    ]
    for index in indices[:MOST_SHOWN]:
      outcome = probed.outcomes[index]
      yield shown(f"{source} mistake: {outcome.error}", in_words(outcome), probed.transcripts[index])


def shown_alarms(source: str, solved: SolveResults) -> Iterator[dict]:
  """Yield up to MOST_SHOWN solutions in which a right step was flagged."""
  alarms = [index for index, score in enumerate(solved.scores) if score.false_alarms]
  for index in alarms[:MOST_SHOWN]:
    score = solved.scores[index]
    what = "a right step flagged" + (" and changed to wrong" if score.harmful_edits else "")
    yield shown(
      source.replace("solutions", "solution"),
      f"{what}, answer {'right' if score.right else 'wrong'}",
      solved.transcripts[index],
    )


def shown(title: str, outcome: str, transcript: Transcript) -> dict:
  return {
    "title": title,
    "outcome": outcome,
    "pieces": [{"role": roles.NAMES[piece.role], "text": piece.text} for piece in transcript],
  }


def in_words(outcome: Outcome) -> str:
  """Return the outcome of a probe in words, as a caption of its transcript."""
  if outcome.delay is None:
    text = "not flagged"
  elif outcome.delay:
    text = f"flagged {outcome.delay} step{'s' if outcome.delay > 1 else ''} later"
  else:
    fix = {
      "right": "corrected",
      "unverified": "replaced by a step that is not wrong",
      "none": "not replaced",
      "wrong": "replaced by another wrong step",
    }[outcome.fix_kind]
    text = "flagged, " + ("the mistake repeated" if outcome.parroted else fix)
  return f"{text}, answer {'right' if outcome.recovered else 'wrong' if outcome.answered else 'missing'}"

"""Aggregates over the seeds of an arm: means, pooled intervals, and differences between arms problem by problem.

Results are always the content of results.json, and an arm is the list of its results, one a seed.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence

from insec_jax.config import FROM_FILE
from insec_jax.evaluation import statistics

# Config keys that determine the problems and their parsing; the second tuple, for problems from a file.
SAME = ("seed", "task", "mistakes.unit", "evaluate.num_problems", "evaluate.max_size", "evaluate.max_tokens")
SAME_FILE = ("data.path", "data.heldout_path", "data.num_records", "data.num_heldout")
NEWER = {"evaluate.max_size": 0}  # keys that older results lack, with the values they used


def pooled(arm: Sequence[dict]) -> dict:
  """Return "rates", "gap", "tokens_per_problem" of an arm as for one seed, with "seeds": one value each, or None.

  An arm of one seed is returned as in results.json, without "seeds".
  """
  if len(arm) == 1:
    return arm[0]
  return {
    "rates": by_metric([result["rates"] for result in arm]),
    "gap": by_metric([result["gap"] for result in arm], lambda _, gaps: averaged("difference", gaps)),
    "tokens_per_problem": _by_key(
      [result["tokens_per_problem"] for result in arm], lambda _, means: averaged("mean", means)
    ),
  }


def _by_key(values: Sequence[dict], merge: Callable) -> dict:
  """Return merge(key, the values of all seeds, None where a seed has none) for every key of any seed."""
  keys = dict.fromkeys(key for value in values for key in value)
  return {key: merge(key, [value.get(key) for value in values]) for key in keys}


def by_metric(values: Sequence[dict], merge: Callable | None = None) -> dict:
  """Return {source: {metric: pooled rate}} from one {source: {metric: rate}} a seed.

  `merge(metric, values)` replaces the pooling where it is given. The dict of a single seed is returned unchanged.
  """
  if len(values) == 1:
    return values[0]
  return _by_key(values, lambda _, metrics: _by_key([metric or {} for metric in metrics], merge or pooled_rate))


def pooled_rate(metric: str, rates: Sequence[dict | None]) -> dict:
  """Return one rate for all seeds: "rate" is their mean, "pooled" all k out of all n, with its 95 % interval.

  The interval is Wilson's. Where a seed's interval is wider than Wilson's, since its n come in groups, the seeds'
  intervals are combined (each end's distances, weighted by n, add up as independent errors). An AUROC is not pooled:
  its interval is that of the mean, combined in the same way.
  """
  measured = [rate for rate in rates if rate is not None and rate["n"]]
  seeds = [None if rate is None else rate["rate"] for rate in rates]
  if not measured:
    return {"rate": None, "pooled": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0, "seeds": seeds}
  k, n = (sum(rate[key] for rate in measured) for key in ("k", "n"))
  mean = sum(rate["rate"] for rate in measured) / len(measured)
  pairs = metric.startswith("auroc")
  middle = mean if pairs else k / n
  if not pairs and all(_is_wilson(rate) for rate in measured):
    low, high = statistics.wilson(k, n)
  else:
    weights = [1 / len(measured) if pairs else rate["n"] / n for rate in measured]
    below, above = (
      math.hypot(*(weight * (rate["rate"] - rate[end]) for weight, rate in zip(weights, measured, strict=True)))
      for end in ("low", "high")
    )
    low, high = max(0.0, middle - below), min(1.0, middle + above)
    if not pairs:
      low, high = min(low, statistics.wilson(k, n)[0]), max(high, statistics.wilson(k, n)[1])
  return {"rate": mean, "pooled": middle, "k": k, "n": n, "low": low, "high": high, "seeds": seeds}


def _is_wilson(rate: dict) -> bool:
  low, high = statistics.wilson(rate["k"], rate["n"])
  return math.isclose(low, rate["low"], abs_tol=1e-9) and math.isclose(high, rate["high"], abs_tol=1e-9)


def averaged(middle: str, values: Sequence[dict | None]) -> dict:
  """Return the mean over seeds of values with a `middle`, "low" and "high"; errors add up as independent ones."""
  present = [value for value in values if value is not None]
  mean = sum(value[middle] for value in present) / len(present)
  merged = {middle: mean, "low": None, "high": None, "seeds": [value and value[middle] for value in values]}
  if all(value["low"] is not None for value in present):
    below, above = (
      math.hypot(*(value[middle] - value[end] for value in present)) / len(present) for end in ("low", "high")
    )
    merged |= {"low": mean - below, "high": mean + above}
  if any("n" in value for value in present):
    merged["n"] = sum(value["n"] for value in present)
  return merged


def matched(first: Sequence[dict], second: Sequence[dict]) -> list[tuple[dict, dict]]:
  """Return pairs of one result of each arm on the same problems; a result without a partner is in none."""
  left = list(first)
  pairs = []
  for result in second:
    partner = next((candidate for candidate in left if met_otherwise(candidate, result) is None), None)
    if partner is not None:
      left.remove(partner)
      pairs.append((partner, result))
  return pairs


def met_otherwise(first: dict, second: dict) -> tuple[str, str, str] | None:
  """Return a config key that makes the problems differ and both of its values; None if the problems are the same."""
  for key in SAME + (SAME_FILE if first["config"]["task"]["name"] in FROM_FILE else ()):
    first_value, second_value = (_value(result["config"], key) for result in (first, second))
    if first_value != second_value:
      return key, json.dumps(first_value), json.dumps(second_value)
  return None


def _value(config: dict, key: str) -> object:
  *sections, name = key.split(".")
  for section in sections:
    config = config[section]
  return NEWER[key] if key in NEWER and name not in config else config[name]


def difference(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> dict:
  """Return second minus first, problem by problem, each a list of 0 and 1 a seed: the mean over problems and seeds.

  "low", "high": 95 % by bootstrap over problems; "p": McNemar's, exact; "seeds": the difference of each seed;
  "spread": the 95 % t-interval over seeds of these, which covers other sets of seeds; None for one seed.
  """
  first_right, second_right = ([right for seed in arm for right in seed] for arm in (first, second))
  mean, low, high = statistics.paired_difference(first_right, second_right, seed=0)
  seeds = [sum(after) / len(after) - sum(before) / len(before) for before, after in zip(first, second, strict=True)]
  return {
    "difference": mean,
    "low": low,
    "high": high,
    "p": statistics.mcnemar(first_right, second_right),
    "n": len(first_right),
    "seeds": seeds,
    "spread": statistics.t_interval(seeds),
  }


def differences(first: Sequence[dict], second: Sequence[dict], source: str, minus: str, time: str) -> dict | None:
  """Return `difference` of the second arm's `source` minus the first's `minus`; None where no seed has both."""
  pairs = [
    (first_result["solved"][minus][time], second_result["solved"][source][time])
    for first_result, second_result in matched(first, second)
    if time in first_result["solved"].get(minus, {}) and time in second_result["solved"].get(source, {})
  ]
  return difference(*zip(*pairs, strict=True)) if pairs else None


def solved_sources(arms: Sequence[Sequence[dict]]) -> Iterator[tuple[str, str]]:
  """Yield (source, "t1" or "t2") of all that some seed of some arm has in "solved", in its order."""
  yield from dict.fromkeys(
    (source, time) for arm in arms for result in arm for source, times in result["solved"].items() for time in times
  )

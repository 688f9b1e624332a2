"""Aggregates over the seeds of an arm: means, t-intervals over seeds, and differences between arms by problem.

Results are always the content of results.json, and an arm is the list of its results, one a seed.
"""

import json
from collections.abc import Callable, Hashable, Iterator, Sequence

from insec_jax.config import FROM_FILE
from insec_jax.evaluation import over_seeds, statistics, structures

# Config keys that determine the problems and their parsing; the second tuple, for problems from a file.
SAME = ("seed", "task", "mistakes.unit", "evaluate.num_problems", "evaluate.max_size", "evaluate.max_tokens")
SAME_FILE = ("data.path", "data.heldout_path", "data.num_records", "data.num_heldout")
LARGER = structures.LARGER.removeprefix(structures.SOLVED)
TIMES = ("t1", "t2")  # of "solved": first attempts kept, after corrections
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
  """Return one rate for all seeds: "rate" is their mean, "k" and "n" are sums.

  The interval is the t-interval over seeds, widened to hold Wilson's of all k out of all n: seeds that agree, at 0 for
  example, would have none. The n pairs of an AUROC are not independent, so there it is the t-interval alone. That of an
  only seed that has a rate is its own, and does not cover other seeds.
  """
  measured = [rate for rate in rates if rate is not None and rate["n"]]
  seeds = [None if rate is None else rate["rate"] for rate in rates]
  if not measured:
    return {"rate": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0, "seeds": seeds}
  k, n = (sum(rate[key] for rate in measured) for key in ("k", "n"))
  mean = sum(rate["rate"] for rate in measured) / len(measured)
  low, high = t_interval(measured, "rate")
  if len(measured) > 1 and not metric.startswith("auroc"):
    low, high = min(low, statistics.wilson(k, n)[0]), max(high, statistics.wilson(k, n)[1])
  return {"rate": mean, "k": k, "n": n, "low": max(0.0, low), "high": min(1.0, high), "seeds": seeds}


def t_interval(values: Sequence[dict], middle: str) -> tuple[float | None, float | None]:
  """Return the 95 % t-interval over seeds of the mean of their `middle`; of one value its own "low" and "high"."""
  interval = statistics.t_interval([value[middle] for value in values])
  return (values[0]["low"], values[0]["high"]) if interval is None else interval


def averaged(middle: str, values: Sequence[dict | None]) -> dict:
  """Return the mean over seeds of values with a `middle`, "low" and "high", and its interval as `t_interval` does."""
  present = [value for value in values if value is not None]
  mean = sum(value[middle] for value in present) / len(present)
  low, high = t_interval(present, middle)
  merged = {middle: mean, "low": low, "high": high, "seeds": [value and value[middle] for value in values]}
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


def difference(
  first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], classes: Sequence[Sequence[Hashable]]
) -> dict:
  """Return second minus first, problem by problem, each a list of 0 and 1 a seed: the mean over seeds.

  "low", "high": 95 % by a bootstrap over seeds and the structure classes of the problems (`bootstrap_interval`);
  "seeds": the difference of each seed; "spread": the 95 % t-interval over seeds of these; None for one seed. "n" and
  "classes": the numbers of problems and of different classes.
  """
  by_problem = [[right - wrong for wrong, right in zip(*seed, strict=True)] for seed in zip(first, second, strict=True)]
  mean, low, high = over_seeds.bootstrap_interval(by_problem, classes)
  seeds = [sum(after) / len(after) - sum(before) / len(before) for before, after in zip(first, second, strict=True)]
  return {
    "difference": mean,
    "low": low,
    "high": high,
    "n": sum(map(len, by_problem)),
    "classes": len({name for names in classes for name in names}),
    "seeds": seeds,
    "spread": statistics.t_interval(seeds),
  }


def differences(first: Sequence[dict], second: Sequence[dict], source: str, minus: str, time: str) -> dict | None:
  """Return `difference` of the second arm's `source` minus the first's `minus`; None where no seed has both."""
  pairs = [
    (first_result["solved"][minus][time], second_result["solved"][source][time], classes_of(second_result, source))
    for first_result, second_result in matched(first, second)
    if time in first_result["solved"].get(minus, {}) and time in second_result["solved"].get(source, {})
  ]
  return difference(*zip(*pairs, strict=True)) if pairs else None


def classes_of(result: dict, source: str) -> list[Hashable]:
  """Return the structure class of each problem of a source; each problem is its own in results of older versions."""
  problems = structures.LARGER if source.endswith(LARGER) else structures.SOLVED
  if "structures" not in result:
    return [(result["config"]["seed"], problems, number) for number in range(len(result["solved"][source]["t2"]))]
  return result["structures"][problems]


def num_classes(arms: Sequence[Sequence[dict]]) -> str:
  """Return a sentence with the number of different structure classes of all seeds; "" where no result names them."""
  kinds = {"": structures.SOLVED, ", of the larger ones ": structures.LARGER}
  found = {
    words: {name for arm in arms for result in arm for name in result.get("structures", {}).get(problems, ())}
    for words, problems in kinds.items()
  }
  numbers = "".join(f"{words}{len(names):,}" for words, names in found.items() if names)
  return f"Structure classes of the problems of all seeds: {numbers}." if numbers else ""


def solved_sources(arms: Sequence[Sequence[dict]]) -> Iterator[tuple[str, str]]:
  """Yield (source, "t1" or "t2") of all that some seed of some arm has in "solved", in its order."""
  yield from dict.fromkeys(
    (source, time)
    for arm in arms
    for result in arm
    for source, times in result["solved"].items()
    for time in TIMES
    if time in times
  )

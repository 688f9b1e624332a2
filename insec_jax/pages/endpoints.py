"""Endpoints of a study: what its config named before the first run, tested together; all else is description.

Results are the content of results.json. See config_endpoints.py for the grammar.
"""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

from insec_jax.config_endpoints import SHORT, Endpoint, Measure, parse
from insec_jax.evaluation import over_seeds, statistics
from insec_jax.evaluation.tables import aligned
from insec_jax.pages import seeds
from insec_jax.pages.correction import NONE, points
from insec_jax.pages.elements import element, table
from insec_jax.pages.runs import Run

TIMES = {metric: time for time, metric in SHORT.items()}  # metrics that results.json has problem by problem
HEADER = ("mean", "t-interval over seeds", "bootstrap: seeds, classes", "p", "p after Holm", "seeds", "n", "each seed")
WORDS = (
  "Named in evaluate.endpoints before the first run. 95 % intervals; the bootstrap draws seeds and structure classes "
  "of problems. p is of a paired t-test over seeds (at least 3), then adjusted after Holm for all differences in this "
  "table. A rate of one arm is an estimate without a test. Everything after this table is description."
)
NONE_NAMED = "No endpoint was named before the runs (evaluate.endpoints): everything here is description."


@dataclasses.dataclass(frozen=True)
class Measured:
  """Value of an endpoint: None where no seed has it."""

  endpoint: Endpoint
  seeds: list[float]
  of: int  # seeds of its arms: fewer have it where one is not evaluated, or has nothing to measure
  mean: float | None
  spread: tuple[float, float] | None  # the t-interval over seeds
  interval: tuple[float, float] | None  # of the bootstrap; None for one seed, or where single problems are not known
  p: float | None
  num: int | None = None  # problems of all seeds
  classes: int | None = None  # different ones


def named(runs: Sequence[Run]) -> tuple[list[Endpoint], list[str]]:
  """Return the endpoints that all evaluated runs name, and a line for what makes them void: then there are none.

  They are void where two runs name others, or where results.json names others than config.json, which was there before.
  """
  evaluated = [run for run in runs if run.results]
  given = [
    (run.name, *(tuple(values["evaluate"]["endpoints"]) for values in (run.config, run.results["config"])))
    for run in evaluated
  ]
  if not given:
    return [], []
  first, endpoints, _ = given[0]
  for name, before, measured in given:
    if before != measured:
      return [], [
        f"the endpoints of {name} changed after its training began ({_listed(before)}; then {_listed(measured)}), so "
        "none is tested: everything here is description"
      ]
    if measured != endpoints:
      return [], [
        f"{first} and {name} name different endpoints ({_listed(endpoints)}; {_listed(measured)}), so none is tested: "
        "everything here is description"
      ]
  return list(map(parse, endpoints)), []


def _listed(endpoints: Sequence[str]) -> str:
  return ", ".join(map(repr, endpoints)) or "none"


def measured(endpoint: Endpoint, arms: Mapping[str, Sequence[dict]]) -> Measured:
  """Return the value of an endpoint over the seeds that have it.

  `arms` holds the results of each seed of each arm, empty for one that is not evaluated.
  """
  num_seeds = max(len(arms.get(arm, ())) for arm in endpoint.arms)
  arms = {arm: [result for result in results if result] for arm, results in arms.items()}
  left, measure = arms.get(endpoint.arm, ()), endpoint.measure
  if endpoint.minus is None:
    return _rate(endpoint, left, num_seeds)
  other, minus = endpoint.minus
  pairs = [
    (first, second)
    for first, second in seeds.matched(arms.get(other, ()), left)
    if None not in (_value(first, minus), _value(second, measure))
  ]
  values = [_value(second, measure) - _value(first, minus) for first, second in pairs]
  if not values:
    return Measured(endpoint, [], num_seeds, None, None, None, None)
  spread, p = statistics.t_interval(values), over_seeds.p_value(values)
  found = Measured(endpoint, values, num_seeds, sum(values) / len(values), spread, None, p)
  same_problems = minus.source.endswith(seeds.LARGER) == measure.source.endswith(seeds.LARGER)
  if (
    len(pairs) < 2
    or not same_problems
    or not all(_by_problem(first, minus) and _by_problem(second, measure) for first, second in pairs)
  ):
    return found
  solved = [
    (first["solved"][minus.source][TIMES[minus.metric]], second["solved"][measure.source][TIMES[measure.metric]])
    for first, second in pairs
  ]
  classes = [seeds.classes_of(second, measure.source) for _, second in pairs]
  difference = seeds.difference(*zip(*solved, strict=True), classes)
  return dataclasses.replace(
    found, interval=(difference["low"], difference["high"]), num=difference["n"], classes=difference["classes"]
  )


def _rate(endpoint: Endpoint, arm: Sequence[dict], num_seeds: int) -> Measured:
  measure = endpoint.measure
  there = [result for result in arm if _value(result, measure) is not None]
  values = [_value(result, measure) for result in there]
  if not values:
    return Measured(endpoint, [], num_seeds, None, None, None, None)
  found = Measured(endpoint, values, num_seeds, sum(values) / len(values), statistics.t_interval(values), None, None)
  if len(there) < 2 or not all(_by_problem(result, measure) for result in there):
    return found
  classes = [seeds.classes_of(result, measure.source) for result in there]
  right = [result["solved"][measure.source][TIMES[measure.metric]] for result in there]
  _, low, high = over_seeds.bootstrap_interval(right, classes)
  num = len({name for names in classes for name in names})
  return dataclasses.replace(found, interval=(low, high), num=sum(map(len, right)), classes=num)


def _value(result: dict, measure: Measure) -> float | None:
  rate = result["rates"].get(measure.source, {}).get(measure.metric)
  return None if rate is None else rate["rate"]


def _by_problem(result: dict, measure: Measure) -> bool:
  return TIMES.get(measure.metric) in result["solved"].get(measure.source, {})


def rows(endpoints: Sequence[Endpoint], arms: Mapping[str, Sequence[dict]]) -> list[tuple[str, ...]]:
  """Return the table of the endpoints, a header first; the p-values of all differences are adjusted together."""
  values = [measured(endpoint, arms) for endpoint in endpoints]
  tested = [value for value in values if value.endpoint.minus is not None]
  adjusted = dict(
    zip([value.endpoint.text for value in tested], over_seeds.holm([one.p for one in tested]), strict=True)
  )
  return [("endpoint", *HEADER)] + [_row(value, adjusted.get(value.endpoint.text)) for value in values]


def _row(value: Measured, adjusted: float | None) -> tuple[str, ...]:
  if value.mean is None:
    return (value.endpoint.text, "not measured", *[NONE] * (len(HEADER) - 1))
  is_auroc = value.endpoint.measure.metric.startswith("auroc")
  if value.endpoint.minus is None:
    written = "{:.3f}".format if is_auroc else lambda rate: f"{100 * rate:.1f} %"
    ends = (0.0, 1.0)
  else:
    written, ends = ("{:+.3f}".format if is_auroc else points), (-1.0, 1.0)

  def between(interval: tuple[float, float] | None) -> str:
    if interval is None:
      return NONE
    return f"{written(max(interval[0], ends[0]))} to {written(min(interval[1], ends[1]))}"

  num = NONE if value.num is None else f"{value.num:,}"
  if value.classes is not None and value.classes < value.num:
    num += f" in {value.classes:,} classes"
  return (
    value.endpoint.text,
    written(value.mean),
    between(value.spread),
    between(value.interval),
    over_seeds.p_text(value.p),
    over_seeds.p_text(adjusted),
    f"{len(value.seeds)}" + (f" of {value.of}" if len(value.seeds) < value.of else ""),
    num,
    ", ".join(map(written, value.seeds)),
  )


def text(endpoints: Sequence[Endpoint], arms: Mapping[str, Sequence[dict]], notes: Sequence[str]) -> str:
  """Return the table for a terminal, or why there is none."""
  if not endpoints:
    return "\n".join(notes or [NONE_NAMED])
  words = textwrap.fill(WORDS, 120)
  return f"endpoints (differences in points):\n{aligned(rows(endpoints, arms))}\n\n{words}"


def section(endpoints: Sequence[Endpoint], arms: Mapping[str, Sequence[dict]], notes: Sequence[str]) -> list[Element]:
  """Return the table for the page, or why there is none."""
  if not endpoints:
    return [element("p", note, class_="soft") for note in notes or [NONE_NAMED]]
  _, *found = rows(endpoints, arms)
  return [
    element("h2", "Endpoints"),
    element("p", WORDS, class_="soft"),
    table("", HEADER, [("", found)]),
  ]

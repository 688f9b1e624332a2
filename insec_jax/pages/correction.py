"""The self-correction tables: rates of every source of mistakes, arms side by side, as evaluate wrote them.

An arm is the list of its results, one a seed, each the content of results.json of that run.
"""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

from insec_jax.command import InputError
from insec_jax.config_measures import METRICS, PLAIN, PROBE, SOURCES, STATE, SWAPPED
from insec_jax.pages import charts, seeds
from insec_jax.pages.elements import element, table

NONE = "–"  # in a cell: not measured, or n is 0
MAIN = (
  ("injected", "detection"),
  ("injected", "corrected"),
  ("own", "detection"),
  ("own", "corrected"),
  ("own", "correction, forced"),
  ("solutions", "false_alarms"),
  ("solutions", "accuracy_t1"),
  ("solutions", "accuracy_t2"),
)
# Shown with MAIN where some arm has them.
MAIN_VARIANTS = (
  ("own, at threshold", "detection"),
  ("own, at threshold", "correction"),
  ("own, at threshold", "parroting"),
  ("solutions, at threshold", "false_alarms"),
  ("own, confidence", "detection"),
  ("own, confidence", "correction"),
  ("solutions, confidence", "false_alarms"),
  ("solutions, larger", "accuracy_t2"),
  ("solutions sampled, larger", "accuracy_t2"),
  (STATE, "fresh_draw, flagged"),
  (STATE, "second_choice, flagged"),
  (SWAPPED, "detection"),
  (SWAPPED, "correction"),
  (SWAPPED, "recovery"),
  (PROBE, "auroc, linear probe"),
  (PROBE, "auroc"),
  (PROBE, "auroc, confidence"),
)
BY_CLASS = ("detection", "correction", "correction, forced", "recovery")
NEEDED = ("model", "config", "seconds", "rates", "gap", "tokens_per_problem", "solved", "transcripts")


def check(results: dict, path: pathlib.Path) -> None:
  """Raise InputError when the results lack a key, or have a source or metric that this page does not know."""
  if missing := [key for key in NEEDED if key not in results]:
    raise InputError(f"{path} has no key {missing[0]!r}; write it again with this version of evaluate")
  solved = dict.fromkeys(results["solved"], ())
  for values in (results["rates"], results["gap"], solved):
    for source, metrics in values.items():
      for name, known in [(source.partition(": ")[0], SOURCES), *((metric, METRICS) for metric in metrics)]:
        if name not in known:
          raise InputError(
            f"{path} has {name!r}, known are {', '.join(known)}; write it again with this version of evaluate"
          )


def main_rates(names: Sequence[str], arms: Sequence[Sequence[dict]]) -> list[Element]:
  """Return the table to read first, under a line that explains its cells."""
  rates = [seeds.pooled(arm)["rates"] for arm in arms]
  rows = [
    (
      element("span", METRICS[metric][0], element("small", SOURCES[source])),
      *(_cell(value, source, metric, rate_cell) for value in rates),
    )
    for source, metric in main_rows(rates)
  ]
  words = f"{intervals_in_words(arms)} {seeds.num_classes(arms)}"
  return [element("p", words.strip(), class_="soft"), table("", names, [("", rows)])]


def breakdown(names: Sequence[str], arms: Sequence[Sequence[dict]]) -> list[Element]:
  """Return injected minus own, the rates of each class of mistake, and, folded, all rates of every source."""
  merged = [seeds.pooled(arm) for arm in arms]
  rates = [result["rates"] for result in merged]
  tokens = [result["tokens_per_problem"] for result in merged]
  parts = _gap_tables(names, [result["gap"] for result in merged])
  by_class = _class_tables("", names, rates, rate_cell)
  if by_class:
    shown, folded = ([tables for source, tables in by_class if (source in PLAIN) == plain] for plain in (True, False))
    parts += [
      element("h3", "By class of mistake"),
      element("div", *shown, class_="tables"),
      *(
        [
          element(
            "details", element("summary", "At thresholds and by confidence"), element("div", *folded, class_="tables")
          )
        ]
        if folded
        else []
      ),
    ]
  every = [
    (source, _rows(rates, source, rate_cell) + _tokens(tokens, source)) for source in SOURCES if source in _keys(rates)
  ]
  return [
    *parts,
    *_first_tries(names, arms),
    element("h3", "All rates"),
    *(_folded_table(source, names, rows) for source, rows in every),
  ]


def main_rows(rates: Sequence[dict]) -> list[tuple[str, str]]:
  """Return (source, metric) of the rates to read first; those of variants only where some arm has them."""
  return [
    *MAIN,
    *((source, metric) for source, metric in MAIN_VARIANTS if any(metric in value.get(source, {}) for value in rates)),
  ]


def intervals_in_words(arms: Sequence[Sequence[dict]]) -> str:
  """Return the explanation of a cell."""
  if all(len(arm) == 1 for arm in arms):
    return "Below each rate: n, and the 95 % interval."
  return (
    "Each rate is the mean over seeds. Below it: the 95 % t-interval over seeds (or Wilson’s of all problems, where "
    "that reaches further), n of all seeds, and the rate of each seed."
  )


def _first_tries(names: Sequence[str], arms: Sequence[Sequence[dict]]) -> list[Element]:
  """Return the grades of steps before any flag, by class, folded per source; older results do not have them."""
  rates = [seeds.by_metric([result.get("first_tries", {}) for result in arm]) for arm in arms]
  tables = []
  for source in SOURCES:
    rows = [
      (kind, *(_cell(rate, source, kind, rate_cell) for rate in rates))
      for kind in _keys([rate.get(source, {}) for rate in rates])
    ]
    tables += [_folded_table(source, names, rows)] if rows else []
  if not tables:
    return []
  return [
    element("h3", "First tries"),
    element(
      "p", "Of all steps up to the first wrong one or marker: right, unverified, and wrong by class.", class_="soft"
    ),
    *tables,
  ]


def _folded_table(source: str, names: Sequence[str], rows: Sequence[tuple]) -> Element:
  return element("details", element("summary", SOURCES[source]), table(SOURCES[source], names, [("", rows)]))


def _gap_tables(names: Sequence[str], gaps: Sequence[dict]) -> list[Element]:
  """Return injected minus own, per source, and folded per class; empty where no run has a gap."""
  minus = "Injected minus "
  tables = [
    table(minus + SOURCES[source].lower(), names, [("", rows)])
    for source in SOURCES
    if (rows := _rows(gaps, source, gap_cell))
  ]
  if not tables:
    return []
  by_class = [class_table for _, class_table in _class_tables(minus, names, gaps, gap_cell)]
  return [
    element("h3", "The gap: injected minus own"),
    element(
      "p", "In percentage points. Large where a model has only learned the look of injected mistakes.", class_="soft"
    ),
    element("div", *tables, class_="tables"),
    *(
      [
        element(
          "details", element("summary", "The gap by class of mistake"), element("div", *by_class, class_="tables")
        )
      ]
      if by_class
      else []
    ),
  ]


def _keys(values: Sequence[dict]) -> list[str]:
  return list(dict.fromkeys(itertools.chain(*values)))


def _cell(values: dict, source: str, metric: str, cell: Callable[[str, dict], Element]) -> Element | str:
  return cell(metric, values[source][metric]) if source in values and metric in values[source] else NONE


def _rows(values: Sequence[dict], source: str, cell: Callable[[str, dict], Element]) -> list[tuple]:
  """Return a row for each metric that some run has for this source."""
  return [
    (metric_cell(metric), *(_cell(value, source, metric, cell) for value in values))
    for metric in METRICS
    if any(source in value and metric in value[source] for value in values)
  ]


def metric_cell(metric: str) -> Element:
  """Return the metric in words, as the head of a row."""
  name, what = METRICS[metric]
  return element("span", name, element("small", what))


def _class_tables(
  prefix: str,
  names: Sequence[str],
  values: Sequence[dict],
  cell: Callable[[str, dict], Element],
) -> list[tuple[str, Element]]:
  """Return (source, table) of each source split by class: a group for each metric of BY_CLASS, a row for each class."""
  tables = []
  for name, title in SOURCES.items():
    classed = [source for source in _keys(values) if source.startswith(f"{name}: ")]
    groups = []
    for metric in BY_CLASS:
      rows = [
        (source.partition(": ")[2], *(_cell(value, source, metric, cell) for value in values))
        for source in sorted(classed)
        if any(source in value and metric in value[source] for value in values)
      ]
      groups += [(METRICS[metric][0], rows)] if rows else []
    tables += [(name, table((prefix + title.lower()).capitalize(), names, groups))] if groups else []
  return tables


def rate_cell(metric: str, rate: dict) -> Element:
  """Return the rate in per cent (an AUROC as a fraction), a picture of its interval, n, the interval, the seeds."""
  if not rate["n"]:
    return element("span", NONE, element("small", "n 0"))
  is_auroc = metric.startswith("auroc")
  written = "{:.3f}".format if is_auroc else lambda value: f"{100 * value:.1f}"
  between = f"{written(rate['low'])} to {written(rate['high'])}"
  drawn = element(
    "span",
    charts.interval(rate["low"], rate["rate"], rate["high"], ends=(0, 1)),
    element("span", written(rate["rate"]) + ("" if is_auroc else " %"), class_="number"),
  )
  if "seeds" not in rate:
    drawn.append(element("small", f"n {rate['n']:,} · {between}"))
    return drawn
  drawn.append(element("small", between))
  drawn.append(element("small", f"n {rate['n']:,} · {in_seeds(rate, written)}", class_="seeds"))
  return drawn


def gap_cell(metric: str, gap: dict) -> Element:  # noqa: ARG001, the signature of rate_cell
  """Return a difference of rates in percentage points, its interval, and the seeds."""
  low, middle, high = (points(gap[key]) for key in ("low", "difference", "high"))
  drawn = element(
    "span",
    charts.interval(gap["low"], gap["difference"], gap["high"], ends=(-1, 1)),
    element("span", middle, class_="number"),
    element("small", f"{low} to {high}"),
  )
  if "seeds" in gap:
    drawn.append(element("small", in_seeds(gap, points), class_="seeds"))
  return drawn


def points(difference: float) -> str:
  """Return a difference of rates in percentage points, with its sign and never as minus zero."""
  return f"{round(100 * difference, 1) + 0.0:+.1f}"


def in_seeds(value: dict, written: Callable[[float], str]) -> str:
  """Return the value of each seed, in their order."""
  return "seeds " + ", ".join(NONE if seed_value is None else written(seed_value) for seed_value in value["seeds"])


def _tokens(means: Sequence[dict], source: str) -> list[tuple]:
  """Return the row of tokens generated per problem, where a source has it."""
  if not any(source in mean for mean in means):
    return []
  return [
    (
      element("span", "Tokens per problem", element("small", "generated")),
      *(tokens_cell(mean[source]) if source in mean else NONE for mean in means),
    )
  ]


def tokens_cell(mean: dict) -> Element:
  """Return the tokens per problem, n, the interval, and the seeds."""
  between = "" if mean["low"] is None else f" · {mean['low']:,.1f} to {mean['high']:,.1f}"
  drawn = element("span", f"{mean['mean']:,.1f}", element("small", f"n {mean['n']:,}{between}"))
  if "seeds" in mean:
    drawn.append(element("small", in_seeds(mean, "{:,.1f}".format), class_="seeds"))
  return drawn

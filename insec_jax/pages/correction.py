"""The self-correction tables: rates of every source of mistakes, arms side by side, as evaluate wrote them."""

import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

from insec_jax.command import InputError
from insec_jax.method import scoring
from insec_jax.pages import charts
from insec_jax.pages.elements import element, table

NONE = "–"  # in a cell: not measured, or out of nothing
SOURCES = {"injected": "Injected mistakes, greedy", "own": "Own mistakes, greedy",
           "own sampled": "Own mistakes, temperature 1", "solutions": "Whole solutions, greedy",
           "solutions sampled": "Whole solutions, temperature 1"}
METRICS = {
  "detection": ("Detection", "flag right after the wrong step"),
  "detection_within": ("Detection, or soon", "at most evaluate.within later"),
  "reason": ("Reason right", "of those flagged"),
  "correction": ("Correction given detection", "next step right, of those flagged"),
  "corrected": ("Detected and corrected", "next step right, of all probes"),
  "parroting": ("Parroting", "mistake repeated, of those flagged"),
  "parroting_failed": ("Parroting in failed fixes", "mistake repeated, of those"),
  "recovery": ("Recovery", "final answer right, of all probes"),
  "malformed": ("Malformed", "with a marker out of place"),
  "lucky_fix": ("Lucky fix", "not wrong, of those flagged"),
  "correction, forced": ("Correction, flag forced", "next step right"),
  "parroting, forced": ("Parroting, flag forced", "mistake repeated"),
  "recovery, forced": ("Recovery, flag forced", "final answer right"),
  "auroc": ("AUROC of p(flag)", "wrong over right; n pairs"),
  "accuracy_t1": ("Acc@t1", "first attempts kept"),
  "accuracy_t2": ("Acc@t2", "after corrections"),
  "accuracy_strict": ("Acc@t2, strict", "no wrong step stands"),
  "wrong_to_right": ("Wrong → right", "of solutions"),
  "right_to_wrong": ("Right → wrong", "of solutions"),
  "false_alarms": ("False alarms per right step", "flagged, of right steps"),
  "false_alarm_solutions": ("False alarms per solution", "solutions with at least one"),
  "precision": ("Precision of the flag", "wrong, of flagged steps"),
  "harmful_edits": ("Harmful edits", "made wrong, of right steps"),
  "wrong_steps": ("Wrong steps", "of right and wrong steps"),
  "lucky_steps": ("Lucky steps", "not wrong, of all steps"),
  "own_mistakes": ("With a wrong step", "of solutions"),
  "answered": ("Answered", "of solutions"),
}
MAIN = (("injected", "detection"), ("injected", "corrected"), ("own", "detection"), ("own", "corrected"),
        ("own", "correction, forced"), ("solutions", "false_alarms"), ("solutions", "accuracy_t1"),
        ("solutions", "accuracy_t2"))
BY_CLASS = ("detection", "correction", "correction, forced", "recovery")
NEEDED = ("model", "config", "seconds", "rates", "gap", "tokens_per_problem", "solved", "transcripts")
# Keys of the config on which the problems and their reading depend; the second, where a file holds the problems.
SAME = ("seed", "task", "mistakes.unit", "evaluate.num_problems", "evaluate.max_tokens")
SAME_FILE = ("data.path", "data.num_records", "data.num_heldout")
FROM_FILE = ("gsm8k", "records")


def check(results: dict, path: pathlib.Path) -> None:
  """Nothing; InputError when the results lack a key, or have a source or metric that this page has no words for."""
  if missing := [key for key in NEEDED if key not in results]:
    raise InputError(f"{path} has no key {missing[0]!r}; write it again with this version of evaluate")
  for values in (results["rates"], results["gap"]):
    for source, metrics in values.items():
      for name, known in [(source.partition(": ")[0], SOURCES), *((metric, METRICS) for metric in metrics)]:
        if name not in known:
          raise InputError(f"{path} has {name!r}, known are {', '.join(known)}; write it again with this version of "
                           "evaluate")


def self_correction(names: Sequence[str], results: Sequence[dict]) -> list[Element]:
  """The tables of evaluated arms: the main rates, all rates, those per class, injected minus own, and arm minus arm.

  Each of `results` is what results.json of that arm holds.
  """
  rates = [result["rates"] for result in results]
  gaps = [result["gap"] for result in results]
  tokens = [result["tokens_per_problem"] for result in results]
  whole = [source for source in SOURCES if source in _keys(rates)]
  main_rates = [(element("span", METRICS[metric][0], element("small", SOURCES[source])),
                 *(_cell(value, source, metric, rate_cell) for value in rates)) for source, metric in MAIN]
  by_class = _class_tables("", names, rates, rate_cell)
  parts = [element("p", "Below each rate: n, and the 95 % interval.", class_="soft"),
           table("", names, [("", main_rates)])]
  parts += [element("h3", "All rates"), element("div", *(
    table(SOURCES[source], names, [("", _rows(rates, source, rate_cell) + _tokens(tokens, source))])
    for source in whole), class_="tables")]
  if by_class:
    parts += [element("h3", "By class of mistake"), element("div", *by_class, class_="tables")]
  minus = "Injected minus "
  differences = [table(minus + SOURCES[source].lower(), names, [("", rows)]) for source in SOURCES
                 if (rows := _rows(gaps, source, gap_cell))]
  if differences:
    parts += [element("h3", "The gap: injected minus own"),
              element("p", "In percentage points. Large where a model has only learned the look of injected mistakes.",
                      class_="soft"),
              element("div", *differences, class_="tables"),
              element("details", element("summary", "The gap by class of mistake"),
                      element("div", *_class_tables(minus, names, gaps, gap_cell), class_="tables"))]
  if len(names) > 1:
    parts += [element("h3", f"Accuracy minus that of {names[0]}, problem by problem"), *paired(names, results)]
  return parts


def _keys(values: Sequence[dict]) -> list[str]:
  return list(dict.fromkeys(itertools.chain(*values)))


def _cell(values: dict, source: str, metric: str, cell: Callable[[str, dict], Element]) -> Element | str:
  return cell(metric, values[source][metric]) if source in values and metric in values[source] else NONE


def _rows(values: Sequence[dict], source: str, cell: Callable[[str, dict], Element]) -> list[tuple]:
  """A row for each metric that some run has for this source."""
  return [(_metric(metric), *(_cell(value, source, metric, cell) for value in values)) for metric in METRICS
          if any(source in value and metric in value[source] for value in values)]


def _metric(metric: str) -> Element:
  name, what = METRICS[metric]
  return element("span", name, element("small", what))


def _class_tables(
    prefix: str, names: Sequence[str], values: Sequence[dict], cell: Callable[[str, dict], Element]) -> list[Element]:
  """A table for each source that is split by class: a group for each metric of BY_CLASS, a row for each class."""
  tables = []
  for name, title in SOURCES.items():
    classed = [source for source in _keys(values) if source.startswith(f"{name}: ")]
    groups = []
    for metric in BY_CLASS:
      rows = [(source.partition(": ")[2], *(_cell(value, source, metric, cell) for value in values))
              for source in sorted(classed) if any(source in value and metric in value[source] for value in values)]
      groups += [(METRICS[metric][0], rows)] if rows else []
    tables += [table((prefix + title.lower()).capitalize(), names, groups)] if groups else []
  return tables


def rate_cell(metric: str, rate: dict) -> Element:
  """The rate in per cent (an AUROC as a share), a picture of its interval, and n and the interval in figures."""
  if not rate["n"]:
    return element("span", NONE, element("small", "n 0"))
  written = "{:.3f}".format if metric == "auroc" else lambda share: f"{100 * share:.1f}"
  return element("span", charts.interval(rate["low"], rate["rate"], rate["high"], ends=(0, 1)),
                 element("span", written(rate["rate"]) + ("" if metric == "auroc" else " %"), class_="number"),
                 element("small", f"n {rate['n']:,} · {written(rate['low'])} to {written(rate['high'])}"))


def gap_cell(metric: str, gap: dict) -> Element:  # noqa: ARG001, the cells of a table are made alike
  """A difference of shares in percentage points, and its interval."""
  low, middle, high = (f"{round(100 * gap[key], 1) + 0.0:+.1f}" for key in ("low", "difference", "high"))
  return element("span", charts.interval(gap["low"], gap["difference"], gap["high"], ends=(-1, 1)),
                 element("span", middle, class_="number"), element("small", f"{low} to {high}"))


def _tokens(means: Sequence[dict], source: str) -> list[tuple]:
  """The row of tokens generated per problem, where a source has it."""
  if not any(source in mean for mean in means):
    return []

  def cell(mean: dict) -> Element:
    between = "" if mean["low"] is None else f" · {mean['low']:,.1f} to {mean['high']:,.1f}"
    return element("span", f"{mean['mean']:,.1f}", element("small", f"n {mean['n']:,}{between}"))

  return [(element("span", "Tokens per problem", element("small", "generated")),
           *(cell(mean[source]) if source in mean else NONE for mean in means))]


def paired(names: Sequence[str], results: Sequence[dict]) -> list[Element]:
  """Accuracy of each arm minus that of the first on the same problems; a sentence where the problems differ."""
  first, *others = results
  for name, other in zip(names[1:], others, strict=True):
    for key in SAME + (SAME_FILE if first["config"]["task"]["name"] in FROM_FILE else ()):
      one, two = (_value(result["config"], key) for result in (first, other))
      if one != two:
        return [element("p", f"Not compared, since they met other problems: {names[0]} was evaluated with {key}="
                        f"{json.dumps(one)}, {name} with {json.dumps(two)}.")]
  groups = [(SOURCES[source], [
    (_metric(f"accuracy_{time}"), *(_paired_cell(before, other["solved"][source][time]) for other in others))
    for time, before in times.items()]) for source, times in first["solved"].items()]
  return [element("p", "In percentage points, with a 95 % bootstrap interval over problems and McNemar’s exact p.",
                  class_="soft"), table("", [f"{name} − {names[0]}" for name in names[1:]], groups)]


def _value(config: dict, key: str) -> object:
  for word in key.split("."):
    config = config[word]
  return config


def _paired_cell(first: Sequence[int], second: Sequence[int]) -> Element:
  difference, low, high = scoring.paired_difference(first, second, seed=0)
  p = scoring.mcnemar(first, second)
  cell = gap_cell("", {"difference": difference, "low": low, "high": high})
  cell.append(element("small", f"n {len(first):,} · p {f'{p:.3f}' if p >= .001 else 'below 0.001'}"))
  return cell

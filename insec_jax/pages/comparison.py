"""Comparison of arms on the same problems: accuracy, its cost in tokens, and the controls without flags.

An arm is the list of its results, one a seed, each the content of results.json of that run.
"""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from insec_jax.config_measures import RIVALS, SOURCES
from insec_jax.pages import charts, seeds
from insec_jax.pages.correction import NONE, in_seeds, metric_cell, points, rate_cell
from insec_jax.pages.elements import element, table

# Sources without corrections; the last ones are the baselines for a correction.
BASELINES = (
  "solutions sampled, redraw",
  "solutions sampled, majority",
  *(f"solutions{' sampled' if rival.startswith('best') else ''}, {rival}" for rival in RIVALS),
)
CONTROLS = ("solutions, flags banned", "solutions sampled, flags banned", *BASELINES)
OTHER_PROBLEMS = ("solutions, larger", "solutions sampled, larger")  # than those of the controls


def paired(names: Sequence[str], arms: Sequence[Sequence[dict]], *, reference: int) -> list[Element]:
  """Return accuracy of each arm minus the reference's on the same problems; a sentence where the problems differ."""
  first = arms[reference]
  others = [number for number in range(len(arms)) if number != reference]
  alone = [number for number in others if not seeds.matched(first, arms[number])]
  parts = []
  for number in alone:
    key, reference_value, value = seeds.met_otherwise(first[0], arms[number][0])
    parts.append(
      element(
        "p",
        f"Not compared, since they met other problems: {names[reference]} was evaluated with "
        f"{key}={reference_value}, {names[number]} with {value}.",
      )
    )
  compared = [number for number in others if number not in alone]
  groups = {}
  for source, time in seeds.solved_sources(arms):
    if time == "t1" and ", " in source:
      continue  # t1 is of interest only with flags unconstrained
    cells = [difference_cell(seeds.differences(first, arms[number], source, source, time)) for number in compared]
    if any(cell != NONE for cell in cells):
      groups.setdefault(source, []).append((metric_cell(f"accuracy_{time}"), *cells))
  if groups:
    parts += [
      element("p", intervals_in_words(arms), class_="soft"),
      table(
        "",
        [f"{names[number]} − {names[reference]}" for number in compared],
        [(SOURCES[source], rows) for source, rows in groups.items()],
      ),
    ]
  return parts


def intervals_in_words(arms: Sequence[Sequence[dict]]) -> str:
  """Return the explanation of a difference."""
  if all(len(arm) == 1 for arm in arms):
    words = (
      "In percentage points, with a 95 % bootstrap interval over the structure classes of the problems. One seed an "
      "arm: the interval does not cover other seeds."
    )
  else:
    words = (
      "In percentage points, the mean over seeds, with a 95 % interval: a bootstrap over seeds and the structure "
      "classes of the problems. Below, the difference of each seed and, after the colon, their 95 % t-interval."
    )
  if any("structures" not in result for arm in arms for result in arm):
    words += " Results of older versions name no classes: there each problem counts as its own."
  return words


def difference_cell(difference: dict | None) -> Element | str:
  """Return the difference, its interval, the numbers of problems and classes, and the seeds with their t-interval."""
  if difference is None:
    return NONE
  few = difference["classes"] < difference["n"]
  num = f"n {difference['n']:,}" + (f" in {difference['classes']:,} classes" if few else "")
  cell = element(
    "span",
    charts.interval(difference["low"], difference["difference"], difference["high"], ends=(-1, 1)),
    element("span", points(difference["difference"]), class_="number"),
    element("small", f"{points(difference['low'])} to {points(difference['high'])} · {num}"),
  )
  if difference["spread"] is not None:
    low, high = difference["spread"]
    cell.append(element("small", f"{in_seeds(difference, points)}: {points(low)} to {points(high)}", class_="seeds"))
  return cell


def controls(names: Sequence[str], arms: Sequence[Sequence[dict]], *, reference: int) -> list[Element]:
  """Return cost and accuracy of each way to write solutions, and each minus the controls of the reference arm.

  The controls need no flag: a correction must beat them at the same number of generated tokens.
  """
  merged = [seeds.pooled(arm) for arm in arms]
  ways = [
    source
    for source in SOURCES
    if source.startswith("solutions") and any("accuracy_t2" in result["rates"].get(source, {}) for result in merged)
  ]
  if not any(", " in source for source in ways):
    return []
  cost = [(_short(source), *(_cost_cell(result, source) for result in merged)) for source in ways]
  parts = [
    element("h3", "Accuracy and what it costs"),
    element(
      "p", "Right answers in the end, and tokens generated per problem (deleted and outvoted ones too).", class_="soft"
    ),
    table("", names, [("", cost)]),
  ]
  groups = []
  for control in CONTROLS:
    sampled = control.startswith("solutions sampled")
    rows = []
    for source in ways:
      if source.startswith("solutions sampled") != sampled or source in (*BASELINES, *OTHER_PROBLEMS):
        continue
      cells = [
        difference_cell(seeds.differences(arms[reference], arm, source, control, "t2"))
        if (source, number) != (control, reference)
        else NONE
        for number, arm in enumerate(arms)
      ]
      if any(cell != NONE for cell in cells):
        rows.append((_short(source), *cells))
    if rows:
      groups.append((f"Minus {names[reference]}, {_short(control)}", rows))
  if groups:
    parts += [element("h3", f"Acc@t2 minus the controls of {names[reference]}"), table("", names, groups)]
  return parts


def _short(source: str) -> str:
  return SOURCES[source].removeprefix("Whole solutions, ")


def _cost_cell(result: dict, source: str) -> Element | str:
  """Return accuracy over tokens per problem."""
  if "accuracy_t2" not in result["rates"].get(source, {}):
    return NONE
  cell = rate_cell("accuracy_t2", result["rates"][source]["accuracy_t2"])
  if source in result["tokens_per_problem"]:
    cell.append(element("small", f"{result['tokens_per_problem'][source]['mean']:,.1f} tokens"))
  return cell

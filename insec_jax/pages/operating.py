"""Operating curves: wrong steps flagged over false alarms, and accuracy over the tokens of a majority vote."""

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

from insec_jax.config_measures import SOURCES
from insec_jax.pages import charts
from insec_jax.pages.correction import NONE
from insec_jax.pages.elements import element, table

CLOSE = 5.0  # per cent of right steps flagged, the useful range
CURVES = {
  "operating": "as the bias on the flag moves",
  "operating_confidence": "as the confidence moves below which the flag is forced",
}


def operating(names: Sequence[str], arms: Sequence[Sequence[dict]], *, numbers: Sequence[int]) -> list[Element]:
  """Return the charts that the results have points for, one curve a seed, and the thresholds chosen on validation.

  `numbers` are the numbers of the arms among all of the page, for their colours. Empty where no result has any points:
  older results have none.
  """
  legend = charts.legend(names, numbers)
  parts = []
  for key, words in CURVES.items():
    drawn = list(_caught(key, arms, numbers))
    if drawn:
      parts += [
        element("h3", f"Operating curves, {words}"),
        element(
          "p",
          "Wrong steps flagged right away (up, in per cent) over right steps flagged. One line a "
          "seed, in the colour of its arm.",
          class_="soft",
        ),
        legend,
        element("div", *drawn, class_="charts"),
      ]
  drawn = list(_at_tokens(arms, numbers))
  if drawn:
    parts += [
      element("h3", "Accuracy for generated tokens"),
      element(
        "p",
        "Right answers (up, in per cent) of the majority of more and more votes, over the tokens of all of them.",
        class_="soft",
      ),
      legend,
      element("div", *drawn, class_="charts"),
    ]
  return parts + thresholds_table(names, arms)


def _points_by_source(
  key: str, arms: Sequence[Sequence[dict]], numbers: Sequence[int]
) -> Iterator[tuple[str, tuple[int, ...], tuple[list, ...]]]:
  """Yield (source, arm number of each seed, points of each seed) of each source that some result has under `key`."""
  for source in dict.fromkeys(source for arm in arms for result in arm for source in result.get(key, {})):
    seeds = [
      (number, result[key][source])
      for number, arm in zip(numbers, arms, strict=True)
      for result in arm
      if source in result.get(key, {})
    ]
    yield source, *zip(*seeds, strict=True)


def _caught(key: str, arms: Sequence[Sequence[dict]], numbers: Sequence[int]) -> Iterator[Element]:
  for source, arm_numbers, points in _points_by_source(key, arms, numbers):
    curves = [curve(seed_points) for seed_points in points]
    for high in (100.0, CLOSE):
      if any(charts.cut(seed_curve, high) for seed_curve in curves):
        title = SOURCES[source] + ("" if high == 100 else f", up to {CLOSE:g} % false alarms")
        yield charts.chart(title, curves, "% of right steps flagged", arms=arm_numbers, box=(high, 100.0))


def _at_tokens(arms: Sequence[Sequence[dict]], numbers: Sequence[int]) -> Iterator[Element]:
  for source, arm_numbers, points in _points_by_source("accuracy_at_tokens", arms, numbers):
    curves = [
      [(point["tokens_per_problem"]["mean"], 100 * point["accuracy"]["rate"]) for point in seed_points]
      for seed_points in points
    ]
    yield charts.chart(SOURCES[source], curves, "tokens per problem", arms=arm_numbers)


def curve(points: Sequence[dict]) -> list[tuple[float, float]]:
  """Return (false alarms, detection) in per cent, by rising false alarms; points with n 0 are left out."""
  return sorted(
    (100 * point["false_alarms"]["rate"], 100 * point["detection"]["rate"])
    for point in points
    if point["false_alarms"]["n"] and point["detection"]["n"]
  )


def thresholds_table(names: Sequence[str], arms: Sequence[Sequence[dict]]) -> list[Element]:
  """Return the thresholds that validation chose, of each seed; empty where no result has any."""

  def cell(arm: Sequence[dict], kind: str, how: str) -> str:
    values = [result["thresholds"][kind][how] for result in arm if "thresholds" in result]
    return ", ".join(NONE if value is None else f"{value:.2f}" for value in values) or NONE

  if not any("thresholds" in result for arm in arms for result in arm):
    return []
  rows = [
    (element("span", title, element("small", how)), *(cell(arm, kind, how) for arm in arms))
    for kind, title in (("flag_bias", "Flag bias"), ("confidence", "Score of a step above which it is flagged"))
    for how in ("greedy", "sampled")
  ]
  return [element("h3", "Thresholds chosen on validation problems"), table("", names, [("", rows)])]

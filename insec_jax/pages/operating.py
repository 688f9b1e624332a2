"""Operating curves: how many wrong steps are flagged for how many false alarms, as the flag's bias moves."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from insec_jax.pages import charts
from insec_jax.pages.correction import NONE, SOURCES
from insec_jax.pages.elements import element, table

CLOSE = 5.0  # per cent of right steps flagged: beyond, a model is of no use


def operating(names: Sequence[str], arms: Sequence[Sequence[dict]]) -> list[Element]:
  """Charts of every source that some result has curves for, one curve a seed, and the thresholds chosen on validation.

  Nothing where no result has any: evaluate did not always write them.
  """
  sources = dict.fromkeys(source for arm in arms for result in arm for source in result.get("operating", {}))
  drawn = []
  for source in sources:
    numbered = [(number, curve(result["operating"][source])) for number, arm in enumerate(arms) for result in arm
                if source in result.get("operating", {})]
    of, curves = zip(*numbered, strict=True)
    for high in (100.0, CLOSE):
      title = SOURCES[source].partition(",")[0] + ("" if high == 100 else f", up to {CLOSE:g} % false alarms")
      if any(charts.cut(points, high) for points in curves):
        drawn.append(charts.chart(title, curves, "% of right steps flagged", arms=of, box=(high, 100.0)))
  thresholds = thresholds_table(names, arms)
  if not drawn and not thresholds:
    return []
  return [element("h3", "Operating curves"),
          element("p", "Wrong steps flagged right away (up, in per cent) over right steps flagged, as flag_bias moves. "
                  "One line a seed, in the colour of its arm.", class_="soft"),
          charts.legend(names), element("div", *drawn, class_="charts"), *thresholds]


def curve(points: Sequence[dict]) -> list[tuple[float, float]]:
  """(false alarms, detection) in per cent, from the fewest false alarms on; points out of nothing are left out."""
  return sorted((100 * point["false_alarms"]["rate"], 100 * point["detection"]["rate"]) for point in points
                if point["false_alarms"]["n"] and point["detection"]["n"])


def thresholds_table(names: Sequence[str], arms: Sequence[Sequence[dict]]) -> list[Element]:
  """The thresholds that validation chose, of each seed; nothing where no result has any."""
  def cell(arm: Sequence[dict], kind: str, how: str) -> str:
    found = [result["thresholds"][kind][how] for result in arm if "thresholds" in result]
    return ", ".join(NONE if value is None else f"{value:.2f}" for value in found) or NONE

  if not any("thresholds" in result for arm in arms for result in arm):
    return []
  rows = [(element("span", title, element("small", how)), *(cell(arm, kind, how) for arm in arms))
          for kind, title in (("flag_bias", "Flag bias"), ("confidence", "Score of a step above which it is flagged"))
          for how in ("greedy", "sampled")]
  return [element("h3", "Thresholds chosen on validation problems"), table("", names, [("", rows)])]

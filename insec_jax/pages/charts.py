"""Charts as inline SVG: the curves of several arms over each other, and the interval of a single number."""

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from insec_jax.pages.elements import element

# The colour-blind-safe palette of Okabe and Ito without yellow and black, which have too little contrast on a page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("", "7 3", "3 2", "9 3 2 3")
MAX_POINTS = 150  # of a curve: more are not visible


def ticks(low: float, high: float, *, log: bool) -> list[float]:
  """Return round numbers from `low` to `high`; with `log` 1, 2, 5 of each decade or, where those are many, decades."""
  if log:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = [m * 10.0**e for e in decades for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    whole = [10.0**e for e in decades if low <= 10.0**e <= high]
    return few if len(few) <= 6 else whole[:: math.ceil(len(whole) / 8)]
  rough = (high - low) / 4
  scale = 10.0 ** math.floor(math.log10(rough))
  step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= rough)
  return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
  """Return at most `most` points, each the mean of neighbours, so that a noisy curve keeps its height."""
  size = max(1, math.ceil(len(points) / most))
  groups = [points[k : k + size] for k in range(0, len(points), size)]
  return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def cut(curve: Sequence[tuple[float, float]], high: float) -> list[tuple[float, float]]:
  """Return the points up to x = `high` (x never decreases) and the point where the line to the next one crosses it."""
  inside = [point for point in curve if point[0] <= high]
  if inside and len(inside) < len(curve):
    (x0, y0), (x1, y1) = inside[-1], curve[len(inside)]
    inside.append((high, y0 + (y1 - y0) * (high - x0) / (x1 - x0)))
  return inside


def chart(
  title: str,
  curves: Sequence[Sequence[tuple[float, float]]],
  x_label: str,
  *,
  arms: Sequence[int] | None = None,
  box: tuple[float, float] | None = None,
  bars: Sequence[Sequence[tuple[float, float, float]]] | None = None,
) -> Element:
  """Return the curves in the order of the arms, at least one with a point; y is logarithmic for a large range.

  `arms` gives the number of each curve's arm when an arm has several, one a seed. `box` gives the highest x and y of
  linear axes from 0; a curve ends where it leaves it to the right. `bars` are (x, low, high) of each curve's intervals.
  """
  W, H, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 46, 20, 8, 34
  if box is None:
    x_values, y_values = zip(*(point for curve in curves for point in curve), strict=True)
    y_values += tuple(end for curve in bars or () for _, *ends in curve for end in ends)
    log = min(y_values) > 0 and max(y_values) > 8 * min(y_values)
    low_x, high_x = _ends(min(x_values), max(x_values), room=0, log=False)
    low_y, high_y = _ends(min(y_values), max(y_values), room=0.06, log=log)
  else:
    log, low_x, low_y, (high_x, high_y) = False, 0.0, 0.0, box
    curves = [cut(curve, high_x) for curve in curves]

  def at_x(x: float) -> float:
    return round(LEFT + (x - low_x) / (high_x - low_x) * (W - LEFT - RIGHT), 1)

  def at_y(y: float) -> float:
    height = math.log(y / low_y) / math.log(high_y / low_y) if log else (y - low_y) / (high_y - low_y)
    return round(H - BOTTOM - height * (H - TOP - BOTTOM), 1)

  drawn = []
  for y in ticks(low_y, high_y, log=log):
    drawn += [
      element("line", x1=LEFT, x2=W - RIGHT, y1=at_y(y), y2=at_y(y), class_="grid"),
      element("text", f"{y:,.10g}", x=LEFT - 6, y=at_y(y) + 4, text_anchor="end"),
    ]
  for x in ticks(low_x, high_x, log=False):
    drawn.append(element("text", f"{x:,.10g}", x=at_x(x), y=H - BOTTOM + 15, text_anchor="middle"))
  drawn.append(element("text", x_label, x=(LEFT + W - RIGHT) / 2, y=H - 4, text_anchor="middle"))
  numbers = range(len(curves)) if arms is None else arms
  for number, curve, intervals in zip(numbers, curves, bars or [()] * len(curves), strict=True):
    drawn += _curve(
      [(at_x(x), at_y(y)) for x, y in thinned(curve)],
      [(at_x(x), at_y(low), at_y(high)) for x, low, high in intervals],
      number,
    )
  return element(
    "figure",
    element("figcaption", title, element("small", " (logarithmic)" if log else "")),
    element("svg", *drawn, viewBox=f"0 0 {W} {H}", role="img", aria_label=title),
  )


def _curve(
  places: Sequence[tuple[float, float]], bars: Sequence[tuple[float, float, float]], number: int
) -> list[Element]:
  """Return the line through the places, with dots where they are few, and the bars (x, low, high) in its colour."""
  colour = COLOURS[number % len(COLOURS)]
  drawn = [element("line", x1=x, x2=x, y1=low, y2=high, stroke=colour, stroke_opacity=0.5) for x, low, high in bars]
  if len(places) <= 20:
    drawn += [element("circle", cx=x, cy=y, r=2.4, fill=colour) for x, y in places]
  return [*drawn, element("polyline", points=" ".join(f"{x},{y}" for x, y in places), **_stroke(number))]


def legend(names: Sequence[str], arms: Sequence[int] | None = None) -> Element:
  """Return the name of each arm beside its line; `arms` are their numbers when they are not all arms of the page."""
  return element(
    "p",
    *(
      element(
        "span",
        element(
          "svg", element("line", x1=1, x2=31, y1=6, y2=6, **_stroke(number)), viewBox="0 0 32 12", width=32, height=12
        ),
        " " + name,
      )
      for number, name in zip(range(len(names)) if arms is None else arms, names, strict=True)
    ),
    class_="legend",
  )


def interval(low: float, middle: float, high: float, *, ends: tuple[float, float]) -> Element:
  """Return a dot at `middle` on a bar from `low` to `high`, cut at the two `ends` of its line, with a mark at 0."""
  low, high = max(low, ends[0]), min(high, ends[1])
  low_x, middle_x, high_x = (round(100 * (value - ends[0]) / (ends[1] - ends[0]), 1) for value in (low, middle, high))
  zero = round(100 * (0 - ends[0]) / (ends[1] - ends[0]), 1)
  return element(
    "svg",
    element("line", x1=0, x2=100, y1=4, y2=4, class_="track"),
    element("line", x1=zero, x2=zero, y1=0, y2=8, class_="track"),
    element("line", x1=low_x, x2=high_x, y1=4, y2=4, class_="interval"),
    element("circle", cx=middle_x, cy=4, r=3),
    viewBox="-4 0 108 8",
    class_="bar",
    aria_hidden="true",
  )


def _ends(low: float, high: float, *, room: float, log: bool) -> tuple[float, float]:
  """Return the ends of an axis: those of the values with some room around them, never of length zero."""
  if log:
    factor = (high / low) ** room
    return low / factor, high * factor
  around = (high - low) * room if high > low else max(abs(high) / 2, 0.5)
  return low - around, high + around


def _stroke(number: int) -> dict[str, object]:
  # Colour and dashes together distinguish arms in print, and more than six arms.
  return {
    "fill": "none",
    "stroke": COLOURS[number % len(COLOURS)],
    "stroke_width": 1.8,
    "stroke_linejoin": "round",
    "stroke_dasharray": DASHES[(number + number // len(COLOURS)) % len(DASHES)],
  }

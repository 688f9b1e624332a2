import math

import pytest

from insec_jax.pages.charts import MAX_POINTS, chart, interval, legend, thinned, ticks


@pytest.mark.parametrize(
  ("low", "high", "expected"),
  [
    (0, 1, [0, 0.5, 1]),
    (0, 3000, [0, 1000, 2000, 3000]),
    (2.1, 2.9, [2.2, 2.4, 2.6, 2.8]),
    (-1, 1, [-1, -0.5, 0, 0.5, 1]),
  ],
)
def test_ticks_are_round_numbers_inside_the_axis(low, high, expected):
  assert ticks(low, high, log=False) == pytest.approx(expected)


def test_ticks_of_a_logarithmic_axis_are_1_2_5_or_decades_alone():
  assert ticks(0.15, 3, log=True) == pytest.approx([0.2, 0.5, 1, 2])
  assert ticks(1e-6, 20, log=True) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10])


@pytest.mark.parametrize("low", [1e-9, 0.003, 1, 77, 1e6])
@pytest.mark.parametrize("factor", [1.0001, 1.1, 3, 40, 1e5])
def test_any_axis_gets_ticks_inside_it(low, factor):
  for log in (False, True) if factor > 8 else (False,):
    found = ticks(low, low * factor, log=log)
    assert 1 <= len(found) <= 12
    assert all(low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6) for tick in found)


def test_thinning_keeps_the_mean_of_neighbours_and_short_curves_whole():
  curve = [(float(x), (-1.0) ** x) for x in range(10 * MAX_POINTS)]
  assert len(thinned(curve)) == MAX_POINTS
  assert thinned(curve)[0] == (4.5, 0.0)
  assert thinned(curve[:7]) == curve[:7]
  assert thinned([]) == []


def places(figure):
  """The points of each curve of a chart, in its own coordinates."""
  return [
    [tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in figure.iter("polyline")
  ]


def test_a_lower_loss_is_drawn_lower_and_a_later_step_further_right():
  (first, second), other = places(chart("loss", [[(0, 2.0), (10, 1.0)], [(5, 1.5)]], "step"))
  assert first[0] < other[0][0] < second[0]
  assert first[1] < other[0][1] < second[1]  # y grows downward


def test_values_that_span_much_get_a_logarithmic_axis_unless_one_is_not_positive():
  (halves,) = places(chart("loss", [[(0, 4.0), (1, 2.0), (2, 1.0), (3, 0.25)]], "step"))
  assert halves[1][1] - halves[0][1] == pytest.approx(halves[2][1] - halves[1][1], abs=0.2)
  assert "logarithmic" in "".join(chart("loss", [[(0, 4.0), (1, 0.25)]], "step").itertext())
  assert "logarithmic" not in "".join(chart("loss", [[(0, 4.0), (1, -0.25)]], "step").itertext())


@pytest.mark.parametrize("curve", [[(0, 1.0)], [(3, 0.0), (4, 0.0)], [(7, -2.0)], [(0, 1e-30), (1, 1e30)]])
def test_degenerate_curves_are_drawn_inside_the_chart(curve):
  (drawn,) = places(chart("loss", [curve], "step"))
  assert all(math.isfinite(x) and 0 <= x <= 360 and 0 <= y <= 210 for x, y in drawn)


def test_no_two_of_twelve_arms_look_alike():
  drawn = legend([str(number) for number in range(12)])
  lines = [(line.get("stroke"), line.get("stroke-dasharray")) for line in drawn.iter("line")]
  assert len(set(lines)) == 12


def test_an_interval_stands_between_its_ends():
  bar = next(line for line in interval(-0.5, 0, 0.25, ends=(-1, 1)).iter("line") if line.get("class") == "interval")
  assert (float(bar.get("x1")), float(bar.get("x2"))) == (25, 62.5)

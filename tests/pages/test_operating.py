import pytest

from insec_jax.pages.operating import operating


def points(*pairs):
  return [{"bias": bias, "false_alarms": {"rate": alarms, "n": 9}, "detection": {"rate": caught, "n": 9}}
          for bias, (alarms, caught) in enumerate(pairs)]


def result(*pairs):
  return {"operating": {"own": points(*pairs)}}


def lines(parts, title):
  figures = [figure for part in parts for figure in part.iter("figure") if title in "".join(figure.itertext())]
  return [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
          for line in figures[0].iter("polyline")], [line.get("stroke") for line in figures[0].iter("polyline")]


def test_every_seed_has_a_curve_in_the_colour_of_its_arm():
  arms = [[result((0, 0), (1, 1)), result((0, 0), (1, .5))], [result((0, 0), (1, .2))]]
  _, colours = lines(operating(["clean", "insec"], arms), "Own mistakes")
  assert colours[0] == colours[1] != colours[2]


def test_more_detection_is_higher_more_false_alarms_further_right_and_the_near_chart_ends_at_five_per_cent():
  parts = operating(["a"], [[result((0, 0), (.04, .4), (.06, .6), (1, 1))]])
  (whole,), _ = lines(parts, "Own mistakes")
  assert [x for x, _ in whole] == sorted(x for x, _ in whole)
  assert [y for _, y in whole] == sorted((y for _, y in whole), reverse=True)
  (near,), _ = lines(parts, "up to 5 %")
  assert len(near) == 3
  assert near[-1][0] == whole[-1][0]  # both end at the right edge
  assert (near[-1][1] - near[0][1]) / (whole[-1][1] - whole[0][1]) == pytest.approx(.5, abs=.01)


def test_points_out_of_nothing_are_left_out():
  empty = [{"bias": 0, "false_alarms": {"rate": None, "n": 0}, "detection": {"rate": None, "n": 0}}]
  parts = operating(["a", "b"], [[result((.1, .2))], [{"operating": {"own": empty}}]])
  assert [len(line) for line in lines(parts, "Own mistakes")[0]] == [1, 0]


def test_older_results_have_no_curves_and_no_thresholds():
  assert operating(["a"], [[{"rates": {}}]]) == []


def test_thresholds_of_every_seed_are_listed():
  chosen = {"flag_bias": {"greedy": -1.0, "sampled": None}, "confidence": {"greedy": 2.5, "sampled": 3.0}, "n": {}}
  parts = operating(["a"], [[{"thresholds": chosen}, {"thresholds": chosen}]])
  cells = ["".join(cell.itertext()) for part in parts for cell in part.iter("td")]
  assert cells == ["-1.00, -1.00", "–, –", "2.50, 2.50", "3.00, 3.00"]

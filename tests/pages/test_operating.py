import pytest

from insec_jax.pages import charts
from insec_jax.pages.operating import operating


def points(*pairs):
  return [
    {"bias": bias, "false_alarms": {"rate": alarms, "n": 9}, "detection": {"rate": caught, "n": 9}}
    for bias, (alarms, caught) in enumerate(pairs)
  ]


def result(*pairs):
  return {"operating": {"own": points(*pairs)}}


def lines(parts, title):
  figures = [figure for part in parts for figure in part.iter("figure") if title in "".join(figure.itertext())]
  return [
    [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    for line in figures[0].iter("polyline")
  ], [line.get("stroke") for line in figures[0].iter("polyline")]


def test_every_seed_has_a_curve_in_the_colour_of_its_arm():
  arms = [[result((0, 0), (1, 1)), result((0, 0), (1, 0.5))], [result((0, 0), (1, 0.2))]]
  _, colours = lines(operating(["clean", "insec"], arms, numbers=[1, 2]), "Own mistakes")
  assert colours == [charts.COLOURS[1], charts.COLOURS[1], charts.COLOURS[2]]


def test_detection_goes_up_false_alarms_right_and_the_near_chart_ends_at_5_per_cent():
  parts = operating(["a"], [[result((0, 0), (0.04, 0.4), (0.06, 0.6), (1, 1))]], numbers=[0])
  (whole,), _ = lines(parts, "Own mistakes")
  assert [x for x, _ in whole] == sorted(x for x, _ in whole)
  assert [y for _, y in whole] == sorted((y for _, y in whole), reverse=True)
  (near,), _ = lines(parts, "up to 5 %")
  assert len(near) == 3
  assert near[-1][0] == whole[-1][0]  # both end at the right edge
  assert (near[-1][1] - near[0][1]) / (whole[-1][1] - whole[0][1]) == pytest.approx(0.5, abs=0.01)


def test_points_out_of_nothing_are_left_out():
  empty = [{"bias": 0, "false_alarms": {"rate": None, "n": 0}, "detection": {"rate": None, "n": 0}}]
  parts = operating(["a", "b"], [[result((0.1, 0.2))], [{"operating": {"own": empty}}]], numbers=[0, 1])
  assert [len(line) for line in lines(parts, "Own mistakes")[0]] == [1, 0]


def test_older_results_have_no_curves_and_no_thresholds():
  assert operating(["a"], [[{"rates": {}}]], numbers=[0]) == []


def test_thresholds_of_every_seed_are_listed():
  chosen = {"flag_bias": {"greedy": -1.0, "sampled": None}, "confidence": {"greedy": 2.5, "sampled": 3.0}, "n": {}}
  parts = operating(["a"], [[{"thresholds": chosen}, {"thresholds": chosen}]], numbers=[0])
  cells = ["".join(cell.itertext()) for part in parts for cell in part.iter("td")]
  assert cells == ["-1.00, -1.00", "–, –", "2.50, 2.50", "3.00, 3.00"]


def test_the_majority_of_more_votes_is_drawn_over_the_tokens_of_all():
  votes = [
    {"votes": num, "accuracy": {"rate": 0.5 + num / 100}, "tokens_per_problem": {"mean": 20.0 * num}}
    for num in (1, 3, 5)
  ]
  parts = operating(["a"], [[{"accuracy_at_tokens": {"solutions sampled, majority": votes}}]], numbers=[0])
  (drawn,), _ = lines(parts, "majority vote")
  assert drawn[1][0] - drawn[0][0] == pytest.approx(drawn[2][0] - drawn[1][0], abs=0.2)
  assert drawn[0][1] > drawn[1][1] > drawn[2][1]


def test_curves_over_confidence_have_charts_of_their_own():
  own = {"own": points((0, 0), (1, 1))}
  parts = operating(["a"], [[{"operating": own, "operating_confidence": own}]], numbers=[0])
  heads = ["".join(part.itertext()) for part in parts if part.tag == "h3"]
  assert heads == [
    "Operating curves, as the bias on the flag moves",
    "Operating curves, as the confidence moves below which the flag is forced",
  ]

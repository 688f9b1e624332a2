"""Thresholds keep false alarms where they should be, and curves say what a decode with them would give."""

import numpy as np
import pytest

from insec_jax.evaluation import thresholds
from insec_jax.evaluation.steps import Step
from insec_jax.evaluation.thresholds import Places, choose_bias, choose_score, operating, operating_by_score


def step(kind: str, *margins: float, solution: int = 0, score: float = 0.0, others: int = 1) -> Step:
  """A step whose flag has these margins over each of `others` other tokens that are equally likely."""
  margin_P = np.array(margins)
  flag_P = margin_P - np.log(np.exp(margin_P) + others)
  return Step(
    solution, kind, "calc" if kind == "wrong" else "", is_first_try=True, score=score, margin_P=margin_P, flag_P=flag_P
  )


def drawn(margins: np.ndarray, bias: float, temperature: float, others: int) -> float:
  """How often a flag is drawn in none but the last place, by drawing."""
  rng = np.random.default_rng(0)
  last = np.zeros(20_000, bool)
  inside = np.zeros(20_000, bool)
  for margin in margins:
    logits_NV = np.tile([(margin + bias) / temperature, *[0.0] * others], (20_000, 1))
    inside |= last
    last = (logits_NV + rng.gumbel(size=logits_NV.shape)).argmax(-1) == 0
  return float((last & ~inside).mean()), float((last | inside).mean())


def test_greedy_flags_come_where_margin_and_bias_are_above_0():
  places = Places([step("wrong", -5, -5, -1), step("wrong", -5, -1, -1), step("right", -3)], temperature=0.0)
  for bias, after, at_all in ((0.9, [0, 0, 0], [0, 0, 0]), (1.1, [1, 0, 0], [1, 1, 0]), (3.1, [1, 0, 1], [1, 1, 1])):
    after_N, at_all_N = places.chances(bias)
    assert (after_N.tolist(), at_all_N.tolist()) == (after, at_all)


def test_at_temperature_1_the_chances_are_those_of_drawing():
  margins = np.array([-4.0, -2.0, 0.5])
  after_N, at_all_N = Places([step("wrong", *margins, others=3)], temperature=1.0).chances(0.7)
  assert (after_N[0], at_all_N[0]) == pytest.approx(drawn(margins, 0.7, 1.0, 3), abs=0.01)


@pytest.mark.parametrize("temperature", [0.5, 0.9, 1.2, 2.0])
def test_at_other_temperatures_the_chance_of_an_alarm_is_never_too_low(temperature):
  margins = np.array([-2.0, -1.0])
  for others in (1, 5):
    _, at_all_N = Places([step("right", *margins, others=others)], temperature=temperature).chances(0.5)
    _, true = drawn(margins, 0.5, temperature, others)
    assert true - 0.01 < at_all_N[0]
    if others == 1:  # one other token: nothing is unknown
      assert at_all_N[0] == pytest.approx(true, abs=0.01)


def test_the_bias_is_the_largest_that_keeps_the_bound():
  steps = [
    *(step("right", -9.0, -float(margin)) for margin in range(1, 101)),
    step("wrong", 5.0),
    step("unverified", 5.0),
  ]
  for most, expected in ((0.0, 1.0), (0.01, 2.0), (0.05, 6.0), (0.059, 6.0)):
    bias = choose_bias(steps, temperature=0.0, most=most)
    assert bias == pytest.approx(expected, abs=1e-4)
    right = Places(thresholds.select_kind(steps, "right"), temperature=0.0)
    assert right.chances(bias)[1].mean() <= most < right.chances(bias + 1e-4)[1].mean()
  sampled = choose_bias(steps, temperature=1.0, most=0.02)
  assert Places(steps[:100], temperature=1.0).chances(sampled)[1].mean() == pytest.approx(0.02, abs=1e-4)


def test_a_flag_inside_a_right_step_is_a_false_alarm_too():
  assert choose_bias([step("right", -2.0, -9.0)] * 3, temperature=0.0, most=0.0) == pytest.approx(2.0, abs=1e-4)


def test_the_score_is_the_smallest_that_keeps_the_bound():
  steps = [step("right", 0.0, score=float(score)) for score in range(100)] + [step("wrong", 0.0, score=1e6)]
  for most, expected in ((0.0, 99.0), (0.01, 98.0), (0.059, 94.0)):
    assert choose_score(steps, most=most) == expected
  assert choose_score([step("right", 0.0, score=1.0)] * 50, most=0.1) == 1.0  # above it is none: ties stay together


def test_without_a_right_step_nothing_is_chosen_and_a_constant_flag_is_banned():
  wrong = [step("wrong", 1.0, score=1.0)]
  assert choose_bias(wrong, temperature=0.0, most=0.01) is None
  assert choose_score(wrong, most=0.01) is None
  assert choose_bias([step("right", 90.0)], temperature=0.0, most=0.01) == -thresholds.MOST_BIAS
  assert [point["bias"] for point in operating(wrong, temperature=0.0)] == [0.0]
  assert operating_by_score(wrong) == []
  assert operating([], temperature=1.0)[0]["detection"]["rate"] is None


def test_the_operating_curve_counts_each_step_and_both_rates_rise_with_the_bias():
  rng = np.random.default_rng(0)
  steps = [
    step("right" if number % 4 else "wrong", -20.0, rng.normal(-3 if number % 4 else -1), solution=number // 4)
    for number in range(400)
  ]
  curve = operating(steps, temperature=0.0)
  biases = [point["bias"] for point in curve]
  assert biases == sorted(biases)
  assert 0.0 in biases
  for point in curve:
    wrong, right = (
      np.mean([one.margin_P[-1] + point["bias"] > 0 for one in steps if one.kind == kind])
      for kind in ("wrong", "right")
    )
    assert (point["detection"]["rate"], point["false_alarms"]["rate"]) == (wrong, right)
    assert (point["detection"]["n"], point["false_alarms"]["n"]) == (100, 300)
  assert curve[-1]["false_alarms"]["rate"] == 0.5
  sampled = operating(steps, temperature=1.0)
  for name in ("detection", "false_alarms"):
    assert [point[name]["rate"] for point in sampled] == sorted(point[name]["rate"] for point in sampled)


def test_the_curve_by_score_has_a_point_for_each_level_of_false_alarms():
  steps = [step("right", 0.0, score=float(score), solution=score % 50) for score in range(1000)]
  steps += [step("wrong", 0.0, score=994.5, solution=number) for number in range(50)]
  curve = operating_by_score(steps)
  assert [point["false_alarms"]["rate"] for point in curve] == list(thresholds.LEVELS)
  assert [point["detection"]["rate"] for point in curve] == [0.0] * 3 + [1.0] * 7
  assert [point["threshold"] for point in curve[:3]] == [999.0, 998.0, 997.0]

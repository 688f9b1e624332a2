import math

import pytest

from insec_jax.evaluation import statistics
from insec_jax.pages.seeds import averaged, difference, differences, matched, pooled, pooled_rate


def rate(k, n):
  low, high = statistics.wilson(k, n)
  return {"rate": k / n if n else None, "k": k, "n": n, "low": low, "high": high}


def result(seed=0, **solved):
  return {
    "config": {
      "seed": seed,
      "task": {"name": "graph"},
      "mistakes": {"unit": "line"},
      "evaluate": {"num_problems": 4, "max_tokens": 8},
    },
    "solved": solved,
  }


def test_a_rate_over_seeds_is_their_mean_with_wilsons_interval_of_all_k_of_all_n():
  found = pooled_rate("detection", [rate(1, 10), rate(9, 30), None, rate(0, 0)])
  assert found["rate"] == pytest.approx((0.1 + 0.3) / 2)
  assert (found["pooled"], found["k"], found["n"]) == (0.25, 10, 40)
  assert (found["low"], found["high"]) == statistics.wilson(10, 40)
  assert found["seeds"] == [0.1, 0.3, None, None]


def test_a_rate_out_of_nothing_on_every_seed_stays_one():
  found = pooled_rate("detection", [rate(0, 0), rate(0, 0)])
  assert (found["rate"], found["n"], found["low"], found["high"]) == (None, 0, 0, 1)


def test_wider_intervals_of_grouped_steps_are_not_narrowed_to_wilsons_by_pooling():
  grouped = {"rate": 0.1, "k": 100, "n": 1000, "low": 0.05, "high": 0.2}
  found = pooled_rate("false_alarms", [grouped] * 4)
  assert (found["low"], found["high"]) == (pytest.approx(0.1 - 0.05 / 2), pytest.approx(0.1 + 0.1 / 2))
  assert found["high"] > statistics.wilson(400, 4000)[1]


def test_an_auroc_is_not_pooled_but_averaged():
  few, many = (
    {"rate": value, "k": value * n, "n": n, "low": value - 0.1, "high": value + 0.1}
    for value, n in ((0.6, 10), (0.8, 1000))
  )
  found = pooled_rate("auroc, confidence", [few, many])
  assert found["rate"] == found["pooled"] == pytest.approx(0.7)
  assert (found["low"], found["high"]) == (
    pytest.approx(0.7 - 0.1 / math.sqrt(2)),
    pytest.approx(0.7 + 0.1 / math.sqrt(2)),
  )


def test_errors_of_seeds_add_up_as_independent_ones():
  found = averaged(
    "mean", [{"mean": 10.0, "low": 7.0, "high": 13.0, "n": 5}, None, {"mean": 20.0, "low": 16.0, "high": 24.0, "n": 5}]
  )
  assert found == {"mean": 15.0, "low": 12.5, "high": 17.5, "n": 10, "seeds": [10.0, None, 20.0]}


def test_one_seed_is_left_as_it_is():
  one = result()
  assert pooled([one]) is one


def test_a_class_that_only_one_seed_met_is_kept():
  arm = [
    {"rates": {"own: copy": {"detection": rate(1, 2)}}, "gap": {}, "tokens_per_problem": {}},
    {
      "rates": {},
      "gap": {"own": {"detection": {"difference": 0.5, "low": 0.25, "high": 0.75}}},
      "tokens_per_problem": {},
    },
  ]
  found = pooled(arm)
  assert found["rates"]["own: copy"]["detection"]["seeds"] == [0.5, None]
  assert found["gap"]["own"]["detection"] == {"difference": 0.5, "low": 0.25, "high": 0.75, "seeds": [None, 0.5]}


def test_seeds_are_paired_by_the_problems_they_met_in_whatever_order():
  first, second = [result(0), result(1), result(2)], [result(2), result(0), result(7)]
  assert matched(first, second) == [(first[2], second[0]), (first[0], second[1])]


def test_a_difference_over_seeds_is_second_minus_first_over_all_problems():
  found = difference([[0, 0, 0, 0], [0, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 1]])
  assert (found["difference"], found["n"], found["seeds"]) == (0.375, 8, [0.5, 0.25])
  assert found["p"] == pytest.approx(0.25)
  assert found["low"] < 0.375 < found["high"]
  assert found["spread"] == statistics.t_interval([0.5, 0.25])


def test_a_source_is_set_against_another_of_the_other_arm_on_the_same_problems_only():
  control = [result(seed, **{"redraw": {"t2": [0, 0]}}) for seed in (0, 1)]
  arm = [result(1, ours={"t2": [1, 0]}), result(2, ours={"t2": [1, 1]})]
  found = differences(control, arm, "ours", "redraw", "t2")
  assert (found["difference"], found["n"]) == (0.5, 2)
  assert differences(control, arm, "ours", "ours", "t2") is None
  assert differences(control, arm, "ours", "redraw", "t1") is None

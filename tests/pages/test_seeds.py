import pytest

from insec_jax.evaluation import statistics
from insec_jax.pages.seeds import (
  averaged,
  classes_of,
  difference,
  differences,
  matched,
  num_classes,
  pooled,
  pooled_rate,
  solved_sources,
)


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


def test_a_rate_over_seeds_is_their_mean_with_the_t_interval_over_seeds():
  found = pooled_rate("detection", [rate(100, 1000), rate(90, 300), rate(20, 100), None, rate(0, 0)])
  assert found["rate"] == pytest.approx((0.1 + 0.3 + 0.2) / 3)
  assert (found["k"], found["n"]) == (210, 1400)
  assert found["high"] == pytest.approx(statistics.t_interval([0.1, 0.3, 0.2])[1])
  assert found["low"] == 0.0
  assert found["seeds"] == [0.1, 0.3, 0.2, None, None]


def test_the_interval_holds_the_mean_of_seeds_with_very_different_n():
  found = pooled_rate("detection", [rate(5000, 5000), rate(0, 10)])
  assert found["low"] <= found["rate"] == 0.5 <= found["high"]
  assert statistics.wilson(5000, 5010)[0] > 0.5


def test_seeds_that_agree_have_the_interval_of_their_problems():
  found = pooled_rate("detection", [rate(0, 20), rate(0, 20)])
  assert (found["low"], found["high"]) == statistics.wilson(0, 40)


def test_of_one_seed_that_has_a_rate_the_interval_is_its_own():
  found = pooled_rate("detection", [None, rate(3, 20)])
  assert (found["rate"], found["low"], found["high"]) == (0.15, *statistics.wilson(3, 20))


def test_a_rate_out_of_nothing_on_every_seed_stays_one():
  found = pooled_rate("detection", [rate(0, 0), rate(0, 0)])
  assert (found["rate"], found["n"], found["low"], found["high"]) == (None, 0, 0, 1)


def test_the_pairs_of_an_auroc_do_not_count_as_problems():
  few, many = (
    {"rate": value, "k": value * n, "n": n, "low": value - 0.1, "high": value + 0.1}
    for value, n in ((0.6, 10), (0.8, 1000))
  )
  same = pooled_rate("auroc, confidence", [many, many])
  assert same["rate"] == same["low"] == same["high"] == pytest.approx(0.8)
  found = pooled_rate("auroc, confidence", [few, many])
  assert found["rate"] == pytest.approx(0.7)
  assert (found["low"], found["high"]) == (0.0, 1.0)  # two seeds say little


def test_a_mean_over_seeds_has_their_t_interval():
  found = averaged(
    "mean", [{"mean": 10.0, "low": 7.0, "high": 13.0, "n": 5}, None, {"mean": 20.0, "low": 16.0, "high": 24.0, "n": 5}]
  )
  assert (found["low"], found["high"]) == statistics.t_interval([10.0, 20.0])
  assert (found["mean"], found["n"], found["seeds"]) == (15.0, 10, [10.0, None, 20.0])


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
  found = difference([[0, 0, 0, 0], [0, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 1]], [list("aabb"), list("abcc")])
  assert (found["difference"], found["n"], found["seeds"]) == (0.375, 8, [0.5, 0.25])
  assert found["classes"] == 3
  assert found["low"] < 0.375 < found["high"]
  assert found["spread"] == statistics.t_interval([0.5, 0.25])


def test_a_source_is_set_against_another_of_the_other_arm_on_the_same_problems_only():
  control = [result(seed, **{"redraw": {"t2": [0, 0]}}) for seed in (0, 1)]
  arm = [result(1, ours={"t2": [1, 0]}), result(2, ours={"t2": [1, 1]})]
  found = differences(control, arm, "ours", "redraw", "t2")
  assert (found["difference"], found["n"]) == (0.5, 2)
  assert differences(control, arm, "ours", "ours", "t2") is None
  assert differences(control, arm, "ours", "redraw", "t1") is None


def test_copies_of_one_puzzle_in_every_seed_widen_the_interval():
  plain, changed = [[0] * 8] * 4, [[1, 1, 1, 1, 0, 0, 0, 0]] * 4
  alone = difference(plain, changed, [[(seed, k) for k in range(8)] for seed in range(4)])
  shared = difference(plain, changed, [[k // 4 for k in range(8)]] * 4)
  assert shared["high"] - shared["low"] > 2 * (alone["high"] - alone["low"]) > 0


def test_classes_are_those_of_the_source_and_in_older_results_one_a_problem():
  solved = {"solutions": {"t2": [0, 1]}, "solutions, larger": {"t2": [0, 1]}}
  newer = result(3, **solved) | {"structures": {"solutions": ["a", "a"], "solutions, larger": ["b", "c"]}}
  assert classes_of(newer, "solutions") == ["a", "a"]
  assert classes_of(newer, "solutions, larger") == ["b", "c"]
  older = [*classes_of(result(3, **solved), "solutions"), *classes_of(result(4, **solved), "solutions")]
  assert len(set(older)) == 4


def test_of_solved_only_first_attempts_and_answers_after_corrections_are_compared():
  assert list(solved_sources([[result(ours={"t1": [0], "t2": [1], "tokens": [9]})]])) == [
    ("ours", "t1"),
    ("ours", "t2"),
  ]


def test_the_numbers_of_different_classes_are_those_of_all_seeds():
  first = result(0) | {"structures": {"solutions": ["a", "b"], "solutions, larger": ["x"]}}
  second = result(1) | {"structures": {"solutions": ["b", "c", "c"], "solutions, larger": ["x"]}}
  assert num_classes([[first], [second, result(2)]]).endswith("of all seeds: 3, of the larger ones 1.")
  assert num_classes([[result(0)]]) == ""

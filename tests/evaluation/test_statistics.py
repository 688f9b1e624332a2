"""Rates, intervals and tests are the published ones, and cover what they should."""

import math

import numpy as np
import pytest
from scipy import stats

from insec_jax.evaluation.statistics import (
  Rate,
  auroc,
  auroc_interval,
  grouped_rates,
  mean,
  newcombe,
  rate,
  t_interval,
  wilson,
)


@pytest.mark.parametrize(
  ("k", "n", "low", "high"),
  [
    (0, 10, 0.0, 0.2775),
    (10, 10, 0.7225, 1.0),
    (5, 10, 0.2366, 0.7634),
    (81, 263, 0.2553, 0.3662),
    (0, 0, 0.0, 1.0),
  ],
)
def test_wilson_gives_the_published_intervals(k, n, low, high):
  assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_the_interval_of_scipy_where_k_is_whole():
  for k, n in ((0, 3), (1, 1), (7, 19), (400, 4000)):
    assert wilson(k, n) == pytest.approx(tuple(stats.binomtest(k, n).proportion_ci(method="wilson")))


def test_wilson_covers_the_true_rate_19_times_in_20():
  rng = np.random.default_rng(0)
  for p in (0.1, 0.5):
    inside = [low <= p <= high for low, high in (wilson(int(k), 60) for k in rng.binomial(60, p, 2000))]
    assert 0.93 < np.mean(inside) < 0.98


def test_a_rate_has_its_n_and_interval_and_says_when_it_is_empty():
  assert Rate(3, 4).share == 0.75
  assert str(Rate(3, 4)) == "75.0% [30.1%, 95.4%] n=4"
  assert Rate(0, 0).to_json() == {"rate": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0}
  assert math.isnan(Rate(0, 0).share)
  assert rate([True, False, True]) == Rate(2, 3)
  with pytest.raises(ValueError, match="no rate"):
    _ = Rate(2, 1).low


def test_auroc_is_the_share_of_pairs_in_order():
  rng = np.random.default_rng(0)
  positive, negative = rng.integers(0, 6, 30), rng.integers(0, 5, 40)
  pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
  assert auroc(positive, negative) == pytest.approx(np.mean(pairs))
  assert auroc([2, 3], [0, 1]) == 1.0
  assert auroc([0], [1]) == 0.0
  assert math.isnan(auroc([], [1.0]))
  assert math.isnan(auroc([1.0], []))
  with pytest.raises(ValueError, match="nan"):
    auroc([math.nan], [1.0])


def test_the_auroc_interval_covers_the_true_area():
  rng = np.random.default_rng(0)
  true = 0.5 * (1 + math.erf(1 / 2))  # normal scores one deviation apart
  inside = 0
  for _ in range(400):
    low, high = auroc_interval(rng.normal(1, 1, 50), rng.normal(0, 1, 60))
    inside += low <= true <= high
  assert 0.91 < inside / 400 < 0.98
  assert auroc_interval([1.0], [0.0, 1.0]) == (0.0, 1.0)


def test_the_interval_of_grouped_rates_covers_the_true_rate_where_wilsons_does_not():
  rng = np.random.default_rng(0)
  inside, too_narrow = 0, 0
  for _ in range(100):
    p_G = rng.choice([0.0, 0.4], 80, p=[0.75, 0.25])  # most solutions have no alarm, some have many
    n_G = rng.integers(5, 15, 80)
    k_G = rng.binomial(n_G, p_G)
    (one,) = grouped_rates([(k_G.tolist(), n_G.tolist())])
    assert (one.k, one.n) == (k_G.sum(), n_G.sum())
    inside += one.low <= 0.1 <= one.high
    low, high = wilson(one.k, one.n)
    too_narrow += not low <= 0.1 <= high
  assert inside >= 88
  assert too_narrow > 15


def test_groups_that_are_all_alike_leave_as_much_doubt_as_wilson():
  none, all_of_them, nothing = grouped_rates([([0] * 20, [3] * 20), ([3] * 20, [3] * 20), ([0] * 20, [0] * 20)])
  assert (none.low, none.high) == wilson(0, 60)
  assert (all_of_them.low, all_of_them.high) == wilson(60, 60)
  assert (nothing.low, nothing.high, nothing.n) == (0.0, 1.0, 0)
  assert none.to_json() == {"rate": 0.0, "k": 0, "n": 60, "low": none.low, "high": none.high}
  assert grouped_rates([([], [])])[0].to_json() == {"rate": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0}


def test_the_interval_of_a_difference_is_the_published_one():
  gap = newcombe(Rate(56, 70), Rate(48, 80))  # Newcombe 1998, table II, (a), method 10
  assert [round(gap[key], 4) for key in ("difference", "low", "high")] == [0.2, 0.0524, 0.3339]


def test_a_mean_has_its_interval_and_n():
  found = mean([1.0, 2.0, 3.0, 4.0])
  assert found["mean"] == 2.5
  assert found["high"] - 2.5 == 2.5 - found["low"] == pytest.approx(1.959964 * 1.2909944 / 2)
  assert mean([7]) == {"mean": 7.0, "low": None, "high": None, "n": 1}


def test_the_t_interval_of_three_values_is_the_published_one():
  assert t_interval([1.0, 2.0, 3.0]) == (
    pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-3),
    pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-3),
  )
  assert t_interval([1.0]) is None

"""Intervals and tests over seeds hold where seeds, or the structures of problems, differ more than draws do."""

import numpy as np
import pytest

from insec_jax.evaluation import statistics
from insec_jax.evaluation.over_seeds import bootstrap_interval, holm, p_text, p_value

STUDIES = 200


def coverage(interval, *, seeds, classes, problems, seed_effect, class_effect):
  """Share of studies whose interval holds the true mean; each class has so many problems, the same in every seed."""
  rng = np.random.default_rng(0)
  true, held = 0.6, 0
  for _ in range(STUDIES):
    share_S = true + seed_effect * rng.standard_normal(seeds)
    share_C = class_effect * rng.standard_normal(classes)
    share_SP = np.repeat(np.clip(share_S[:, None] + share_C[None], 0, 1), problems, axis=1)
    low, high = interval((rng.random(share_SP.shape) < share_SP).astype(float), np.arange(classes).repeat(problems))
    held += low <= true <= high
  return held / STUDIES


def hierarchical(right_SP, class_P):
  return bootstrap_interval(right_SP, [class_P] * len(right_SP))[1:]


def over_problems(right_SP, class_P):  # noqa: ARG001, the signature of hierarchical
  return statistics.wilson(right_SP.sum(), right_SP.size)


def over_seeds(right_SP, class_P):  # noqa: ARG001
  return statistics.t_interval(right_SP.mean(1))


@pytest.mark.parametrize("seeds", [3, 8])
def test_the_interval_holds_in_95_of_100_studies_where_seeds_differ_much(seeds):
  sizes = {"seeds": seeds, "classes": 60, "problems": 8, "seed_effect": 0.06, "class_effect": 0.05}
  assert 0.93 <= coverage(hierarchical, **sizes) <= 0.99
  assert coverage(over_problems, **sizes) < 0.75


def test_the_interval_holds_where_seeds_share_few_structures_unlike_that_over_seeds():
  sizes = {"seeds": 5, "classes": 12, "problems": 30, "seed_effect": 0.01, "class_effect": 0.12}
  assert coverage(hierarchical, **sizes) >= 0.93
  assert coverage(over_seeds, **sizes) < 0.75


def test_the_interval_is_symmetric_about_the_mean_of_seeds_and_repeatable():
  values, classes = [[1, 0, 1, 1], [1, 1]], [["a", "a", "b", "c"], ["a", "d"]]
  mean, low, high = bootstrap_interval(values, classes)
  assert mean == pytest.approx((0.75 + 1) / 2)
  assert mean - low == pytest.approx(high - mean)
  assert high > mean
  assert bootstrap_interval(values, classes) == (mean, low, high)


def test_with_classes_that_do_not_differ_it_is_the_t_interval_over_seeds():
  shares = [0.5, 0.75, 1.0, 0.25]
  values = [[float(k < 4 * share) for k in range(4)] for share in shares]
  mean, low, high = bootstrap_interval(values, [["one"] * 4] * 4)
  assert (low, high) == pytest.approx(statistics.t_interval(shares))
  assert mean == pytest.approx(np.mean(shares))


def test_of_one_seed_the_interval_is_over_its_structure_classes():
  right = [1.0] * 30 + [0.0] * 30
  alone = bootstrap_interval([right], [range(60)])
  grouped = bootstrap_interval([right], [[k // 10 for k in range(60)]])
  assert alone[2] - alone[1] == pytest.approx(2 * 1.96 * (0.25 / 60) ** 0.5, rel=0.1)
  assert grouped[2] - grouped[1] == pytest.approx(2 * 1.96 * (0.25 / 6) ** 0.5, rel=0.1)


def test_a_p_value_needs_three_seeds_that_differ():
  assert p_value([0.1, 0.2, 0.3]) == pytest.approx(0.0742, abs=1e-4)
  assert p_value([0.1, 0.2]) is None
  assert p_value([0.1, 0.1, 0.1]) is None


def test_holm_multiplies_by_the_number_of_hypotheses_that_are_left():
  assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert holm([0.02, None, 0.9]) == [pytest.approx(0.06), None, 1.0]
  assert holm([]) == []


def test_a_p_value_is_shown_with_two_digits_down_to_a_millionth():
  assert [p_text(p) for p in (None, 0.0312, 0.5, 2e-5, 1e-197)] == ["–", "0.031", "0.5", "2e-05", "< 1e-6"]

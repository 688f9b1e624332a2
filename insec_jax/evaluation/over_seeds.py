"""Statistics over seeds: the unit of a claim about arms is a seed, and inside it a structure class of problems.

The same classes may occur in every seed, so a resample draws them for all seeds together.
"""

import functools
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

from insec_jax.evaluation.statistics import NORMAL

RESAMPLES = 2000
FEWEST_SEEDS = 3  # for a p-value
SMALLEST_P = 1e-6  # smaller ones are not told apart: no seed effect is known to be normal that far out


def bootstrap_interval(
  values_SP: Sequence[Sequence[float]], classes_SP: Sequence[Sequence[Hashable]]
) -> tuple[float, float, float]:
  """Return the mean over seeds of the mean over problems, and its 95 % interval.

  `values_SP` has one value for each problem of each seed, `classes_SP` the structure class of that problem. Two levels
  of resampling, with replacement: of seeds, and of classes with all their problems. Both errors are added as
  independent ones, each with the quantile of its number of draws. That of resampled seeds is known in closed form, the
  standard error of their means, and its quantile is that of t: percentiles over three seeds would hold the true value
  in 3 of 4 studies. One resample of both would count the noise of single problems twice. The interval of one seed is
  over classes alone: it does not cover other seeds.
  """
  place = {name: number for number, name in enumerate(dict.fromkeys(name for names in classes_SP for name in names))}
  S, C = len(values_SP), len(place)
  index_SP = [[place[name] for name in names] for names in classes_SP]
  num_SC = np.array([np.bincount(index_P, minlength=C) for index_P in index_SP], np.float64)
  total_SC = np.array(
    [np.bincount(index_P, value_P, minlength=C) for index_P, value_P in zip(index_SP, values_SP, strict=True)]
  )
  mean_S = total_SC.sum(1) / num_SC.sum(1)
  num_RS = _draws(C) @ num_SC.T
  # A seed none of whose classes was drawn is left out of that resample.
  mean_RS = np.where(num_RS > 0, _draws(C) @ total_SC.T / np.maximum(num_RS, 1.0), np.nan)
  half = NORMAL * float(np.std(np.nanmean(mean_RS[(num_RS > 0).any(1)], 1)))
  if S > 1:
    half = float(np.hypot(half, stats.t.ppf(0.975, S - 1) * stats.sem(mean_S)))
  mean = float(mean_S.mean())
  return mean, mean - half, mean + half


@functools.lru_cache(maxsize=4)
def _draws(num: int) -> np.ndarray:
  """Return how often each of `num` is drawn in each resample [RESAMPLES, num]; the same for every call."""
  rng = np.random.default_rng(num)
  return rng.multinomial(num, np.full(num, 1 / num), size=RESAMPLES).astype(np.float64)


def p_value(differences: Sequence[float]) -> float | None:
  """Return the two-sided p of a paired t-test, from the difference of each seed.

  None for fewer than FEWEST_SEEDS, and for differences that do not vary: then the error is not known.
  """
  if len(differences) < FEWEST_SEEDS or np.ptp(differences) < 1e-12:
    return None
  return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Return the p-values adjusted for their number after Holm (1979); one that is None counts in it, and stays None."""
  order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
  adjusted: list[float | None] = [None] * len(p_values)
  largest = 0.0
  for rank, (p, index) in enumerate(order):
    largest = max(largest, min(1.0, (len(p_values) - rank) * p))
    adjusted[index] = largest
  return adjusted


def p_text(p: float | None) -> str:
  """Return the p-value as text; a dash where there is none."""
  if p is None:
    return "\N{EN DASH}"
  return f"< {SMALLEST_P:.0e}".replace("e-0", "e-") if p < SMALLEST_P else f"{p:.2g}"

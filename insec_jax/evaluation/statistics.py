"""Rates with their n, 95 % intervals, and tests of differences, on scipy.stats."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import stats

NORMAL = float(stats.norm.ppf(0.975))
RESAMPLES, BATCH = 2000, 100  # of a bootstrap; BATCH are in memory at once


@dataclasses.dataclass(frozen=True)
class Rate:
  """k out of n; `share` is nan and the interval [0, 1] when n is 0.

  Where each of the n counts with a chance (whether a flag would be drawn), `k` is the sum of the chances.
  """

  k: float
  n: int
  interval: tuple[float, float] | None = None  # that of `grouped_rates`; None: Wilson's, for independent n

  @property
  def share(self) -> float:
    return self.k / self.n if self.n else math.nan

  @property
  def low(self) -> float:
    return (self.interval or wilson(self.k, self.n))[0]

  @property
  def high(self) -> float:
    return (self.interval or wilson(self.k, self.n))[1]

  def to_json(self) -> dict[str, float | int | None]:
    """Return the rate with its n and interval; "rate" is None when n is 0, since JSON has no nan."""
    return {"rate": self.share if self.n else None, "k": self.k, "n": self.n, "low": self.low, "high": self.high}

  def __str__(self) -> str:
    return f"{self.share:.1%} [{self.low:.1%}, {self.high:.1%}] n={self.n}" if self.n else "- n=0"


def wilson(k: float, n: int) -> tuple[float, float]:
  """Return Wilson's interval of k out of n; (0, 1) when n is 0.

  It is that of `scipy.stats.binomtest(k, n)`, which takes no k that is a sum of chances.
  """
  if not 0 <= k <= n:
    raise ValueError(f"{k} out of {n} is no rate")
  if n == 0:
    return 0.0, 1.0
  centre = (k + NORMAL**2 / 2) / (n + NORMAL**2)
  half = NORMAL / (n + NORMAL**2) * math.sqrt(k * (n - k) / n + NORMAL**2 / 4)
  return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def rate(flags: Iterable[bool]) -> Rate:
  """Return the fraction of true flags."""
  flags = list(flags)
  return Rate(sum(map(bool, flags)), len(flags))


def grouped_rates(counts: Sequence[tuple[Sequence[float], Sequence[int]]]) -> list[Rate]:
  """Return for each (k of every group, n of every group) the rate over all; steps come in groups, their solutions.

  The interval is a bootstrap over the groups, which are the same for all of `counts`. It is at least as wide as
  Wilson's: with identical groups, for example where k is 0, the bootstrap alone would have no width.
  """
  rates = [Rate(k := sum(k_G), n := sum(n_G), wilson(k, n)) for k_G, n_G in counts]
  if not counts or len(counts[0][0]) < 2:
    return rates
  k_CR, n_CR = _resampled(np.array(list(zip(*counts, strict=True)), np.float64), np.sum, seed=0)
  for place, (k_R, n_R) in enumerate(zip(k_CR, n_CR, strict=True)):
    if rates[place].n:
      low, high = np.quantile(k_R[n_R > 0] / n_R[n_R > 0], (0.025, 0.975)).tolist()
      interval = min(rates[place].low, low), max(rates[place].high, high)
      rates[place] = dataclasses.replace(rates[place], interval=interval)
  return rates


def _resampled(sample: np.ndarray, statistic: Callable, *, seed: int) -> np.ndarray:
  """Return the statistic of each resample along the last axis, which must have at least two entries."""
  return stats.bootstrap(
    (sample,),
    statistic,
    n_resamples=RESAMPLES,
    batch=BATCH,
    vectorized=True,
    axis=-1,
    method="percentile",
    rng=np.random.default_rng(seed),
  ).bootstrap_distribution


def newcombe(first: Rate, second: Rate) -> dict[str, float]:
  """Return first - second and its interval (Newcombe 1998, method 10: from the two Wilson intervals)."""
  difference = first.share - second.share
  return {
    "difference": difference,
    "low": difference - math.hypot(first.share - first.low, second.high - second.share),
    "high": difference + math.hypot(first.high - first.share, second.share - second.low),
  }


def mean(values: Sequence[float]) -> dict[str, float | int | None]:
  """Return the mean, its interval (a normal one; None for fewer than two values) and n."""
  middle, n = float(np.mean(values)), len(values)
  half = NORMAL * float(stats.sem(values)) if n > 1 else None
  low, high = (None, None) if half is None else (middle - half, middle + half)
  return {"mean": middle, "low": low, "high": high, "n": n}


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
  """Return the t-interval of the mean; None for one value."""
  if len(values) < 2:
    return None
  middle, half = float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
  return middle - half, middle + half


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
  """Return P(score of a positive > score of a negative), ties counting half; nan when either is empty."""
  above_P, _ = _placements(positive, negative)
  return float(above_P.mean()) if len(above_P) and len(negative) else math.nan


def auroc_interval(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
  """Return DeLong's interval of `auroc`, cut at 0 and 1; (0, 1) with fewer than two scores on a side."""
  above_P, below_N = _placements(positive, negative)
  if min(len(above_P), len(below_N)) < 2:
    return 0.0, 1.0
  half = NORMAL * math.hypot(stats.sem(above_P), stats.sem(below_N))
  centre = float(above_P.mean())
  return max(0.0, centre - half), min(1.0, centre + half)


def _placements(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return the fraction of negatives below each positive and of positives above each negative; ties count half."""
  positive_P, negative_N = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
  if np.isnan(positive_P).any() or np.isnan(negative_N).any():
    raise ValueError("a score is nan; scores must be numbers")
  rank_PN = stats.rankdata(np.concatenate([positive_P, negative_N]))  # equal scores share their mean rank
  below_P = rank_PN[: len(positive_P)] - stats.rankdata(positive_P)
  not_above_N = rank_PN[len(positive_P) :] - stats.rankdata(negative_N)
  return below_P / max(len(negative_N), 1), 1 - not_above_N / max(len(positive_P), 1)

"""Operating points: detection and false alarms by the bias on the flag, or by the bound on the confidence score.

All are computed from solutions written with the flag banned, without further decoding.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from insec_jax.evaluation import statistics
from insec_jax.evaluation.steps import Step

MOST_BIAS = 60.0  # e^60 times as likely: above any difference of logits that occurs
LEVELS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # false alarms at which curves are given
_HALVINGS = 24  # of 2 * MOST_BIAS: the bias to 1e-5


class Places:
  """Steps, with every place where a flag could come."""

  def __init__(self, steps: Sequence[Step], *, temperature: float):
    self.steps = list(steps)
    self._temperature = temperature
    sizes = [len(step.margin_P) for step in self.steps]
    self._first_N = np.cumsum([0, *sizes])[:-1]
    self._last_N = np.cumsum(sizes) - 1
    self._margin_P = np.concatenate([np.zeros(0), *(step.margin_P for step in self.steps)], dtype=np.float64)
    p_P = np.exp(np.concatenate([np.zeros(0), *(step.flag_P for step in self.steps)], dtype=np.float64))
    with np.errstate(divide="ignore"):
      self._log_odds_P = np.log(p_P) - np.log1p(-np.minimum(p_P, 1.0))

  def chances(self, bias: float) -> tuple[np.ndarray, np.ndarray]:
    """Return for each step the chance of a flag right after it, and of one right after or inside it.

    Greedy (temperature 0) these are 0 or 1. At temperature 1 they are exact. Else the odds of the
    other tokens are not known: each place then has the least upper bound that margin and log p give.
    """
    if not self.steps:
      return np.zeros(0), np.zeros(0)
    if self._temperature == 0:
      p_P = (self._margin_P + bias > 0).astype(np.float64)
    else:
      # The sum over the others is at least its greatest term, and above temperature 1 at least the power of the sum.
      log_odds_P = self._margin_P if self._temperature < 1 else self._log_odds_P
      with np.errstate(over="ignore"):
        p_P = 1 / (1 + np.exp(-(log_odds_P + bias) / self._temperature))
    none_N = np.multiply.reduceat(1 - p_P, self._first_N)
    inside_P = p_P.copy()
    inside_P[self._last_N] = 0
    return np.multiply.reduceat(1 - inside_P, self._first_N) * p_P[self._last_N], 1 - none_N


def choose_bias(steps: Sequence[Step], *, temperature: float, most: float) -> float | None:
  """Return the largest bias (to 1e-5) that flags at most a fraction `most` of the right steps, after or inside them.

  It is between -MOST_BIAS, which bans the flag, and MOST_BIAS. None without a right step.
  """
  places = Places(select_kind(steps, "right"), temperature=temperature)
  return _largest_bias(places, most) if places.steps else None


def _largest_bias(places: Places, most: float) -> float:
  low, high = -MOST_BIAS, MOST_BIAS
  for _ in range(_HALVINGS):
    middle = (low + high) / 2
    if places.chances(middle)[1].mean() > most:
      high = middle
    else:
      low = middle
  return low


def choose_score(steps: Sequence[Step], *, most: float) -> float | None:
  """Return the smallest score that at most a fraction `most` of the right steps exceed; None without a right step."""
  scores = sorted((step.score for step in select_kind(steps, "right")), reverse=True)
  return scores[math.floor(most * len(scores))] if scores else None


def operating(steps: Sequence[Step], *, temperature: float) -> list[dict]:
  """Return the curve over the bias: {"bias", "detection", "false_alarms"} at 0 and at each of LEVELS, bias rising.

  Each step counts independently of those before it: a flag right after a wrong one, and one after or inside a right
  one. For first tries of a greedy model the curve is exact: no flag has changed the text before them.
  """
  wrong, right = (Places(select_kind(steps, kind), temperature=temperature) for kind in ("wrong", "right"))
  biases = {0.0, *(_largest_bias(right, level) for level in LEVELS if right.steps)}
  return _curve(
    "bias",
    sorted(biases),
    wrong.steps,
    lambda bias: wrong.chances(bias)[0],
    right.steps,
    lambda bias: right.chances(bias)[1],
  )


def operating_by_score(steps: Sequence[Step]) -> list[dict]:
  """Return the curve over the confidence threshold, as `operating` does, with "threshold" for "bias"."""
  wrong, right = select_kind(steps, "wrong"), select_kind(steps, "right")
  wrong_N, right_N = (np.array([step.score for step in scored]) for scored in (wrong, right))
  thresholds = {choose_score(right, most=level) for level in LEVELS if right}
  return _curve(
    "threshold",
    sorted(thresholds, reverse=True),
    wrong,
    lambda threshold: wrong_N > threshold,
    right,
    lambda threshold: right_N > threshold,
  )


def select_kind(steps: Sequence[Step], kind: str) -> list[Step]:
  """Return the steps of a kind: "right", "unverified" or "wrong"."""
  return [step for step in steps if step.kind == kind]


def _curve(
  name: str,
  settings: Sequence[float],
  wrong: Sequence[Step],
  caught: Callable[[float], np.ndarray],
  right: Sequence[Step],
  alarmed: Callable[[float], np.ndarray],
) -> list[dict]:
  """Return a point for each setting: the rates of flagged wrong steps and of flagged right ones, by solution."""
  groups = 1 + max((step.solution for step in (*wrong, *right)), default=-1)

  def counted(steps: Sequence[Step], flagged_N: np.ndarray) -> tuple[list[float], list[int]]:
    solution_N = np.array([step.solution for step in steps], np.int64)
    return (np.bincount(solution_N, flagged_N, groups).tolist(), np.bincount(solution_N, minlength=groups).tolist())

  counts = [
    counts for setting in settings for counts in (counted(wrong, caught(setting)), counted(right, alarmed(setting)))
  ]
  rates = statistics.grouped_rates(counts)
  return [
    {name: setting, "detection": detection.to_json(), "false_alarms": alarms.to_json()}
    for setting, detection, alarms in zip(settings, rates[::2], rates[1::2], strict=True)
  ]

"""Search for the largest number of rows that fit, in few compilations."""

import math
from collections.abc import Callable

from insec_jax.sizing.estimate import Estimate

MOST_ROWS = 4096  # of a device; the search ends here


def most_rows(measured: Callable[[int], Estimate]) -> Estimate:
  """Return the estimate with the most rows that fit; that of one row if not even one fits.

  The peak grows almost linearly: the limit is extrapolated from two estimates and then verified.
  """
  best = measured(1)
  if not best.memory.fits:
    return best
  low, high, rows = 1, MOST_ROWS + 1, 2  # `low` rows fit; `high` do not, or exceed MOST_ROWS
  while high - low > 1:
    trial = measured(rows)
    if trial.memory.fits:
      a_row = (trial.memory.peak - best.memory.peak) / (rows - low)
      best, low = trial, rows
      rows = low + max(1, math.floor((trial.memory.limit - trial.memory.peak) / a_row)) if a_row > 0 else 2 * low
    else:
      high = rows
      rows = high - 1  # not the middle: the extrapolation is seldom wrong by much
    rows = min(max(rows, low + 1), high - 1)
  return best

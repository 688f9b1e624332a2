"""The most rows that fit, in few compilations."""

import math
from collections.abc import Callable

from insec_jax.sizing.estimate import Estimate

MOST_ROWS = 4096  # of a device; nobody asks for more


def most_rows(measured: Callable[[int], Estimate]) -> Estimate:
  """The estimate with the most rows that fit, while one row more does not; that of one row when not even it fits.

  The peak grows almost evenly: one row and two say where the end must be, and then it is seen that it is there.
  """
  best = measured(1)
  if not best.memory.fits:
    return best
  low, high, rows = 1, MOST_ROWS + 1, 2  # `low` rows fit, `high` do not or are not wanted
  while high - low > 1:
    one = measured(rows)
    if one.memory.fits:
      a_row = (one.memory.peak - best.memory.peak) / (rows - low)
      best, low = one, rows
      rows = low + max(1, math.floor((one.memory.limit - one.memory.peak) / a_row)) if a_row > 0 else 2 * low
    else:
      high = rows
      rows = high - 1  # not the middle: the guess is seldom wrong by much
    rows = min(max(rows, low + 1), high - 1)
  return best

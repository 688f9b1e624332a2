"""Search for the largest number of rows that fit, in few compilations."""

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

from insec_jax.sizing.compiled import Memory

MOST_ROWS = 4096  # of a device; the search ends here


class Measured(Protocol):
  """Estimate that has a memory."""

  @property
  def memory(self) -> Memory: ...


Found = TypeVar("Found", bound=Measured)


def most_rows(measured: Callable[[int], Found], *, start: int = 1, growth: float | None = None) -> Found:
  """Return the estimate with the most rows that fit; that of one row if not even one fits.

  The peak grows almost linearly: the limit is extrapolated from the trial before and verified. The first trial has
  `start` rows; `growth`, the GiB of a row, is taken from two trials where it is None.
  """
  best, trial = None, None
  low, high, rows = 0, MOST_ROWS + 1, min(start, MOST_ROWS)  # `low` rows fit; `high` do not, or exceed MOST_ROWS
  while high - low > 1:
    trial = measured(rows)
    memory = trial.memory
    if memory.fits:
      if best is not None:
        growth = (memory.peak - best.memory.peak) / (rows - low)
      best, low = trial, rows
      rows = low + max(1, math.floor((memory.limit - memory.peak) / growth)) if growth and growth > 0 else 2 * low
    else:
      high = rows
      # Without a growth that was measured: one row less, as the extrapolation is seldom wrong by much.
      rows = high - (1 if best is not None or not growth else math.ceil(memory.missing / growth))
    rows = min(max(rows, low + 1), high - 1)
  return trial if best is None else best

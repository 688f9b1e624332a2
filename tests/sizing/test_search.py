"""The search for the most rows, on peaks that are made up."""

from types import SimpleNamespace

import pytest

from insec_jax.sizing.estimate import Memory
from insec_jax.sizing.search import MOST_ROWS, most_rows


def searched(peak_of, limit: float) -> tuple[int, list[int]]:
  """(the rows found, the rows that were compiled); a peak above the limit is refused."""
  compiled = []

  def measured(rows: int):
    compiled.append(rows)
    peak = peak_of(rows)
    return SimpleNamespace(
      rows=rows, memory=Memory(weights=1, optimizer=2, temporary=peak - 3, peak=peak, limit=limit, refused=peak > limit)
    )

  return most_rows(measured).rows, compiled


@pytest.mark.parametrize(
  ("peak_of", "limit", "rows", "most_compiled"),
  [
    (lambda rows: 4 + 1.87 * rows, 31.24, 14, 4),
    (lambda rows: 4 + 1.87 * rows, 6, 1, 2),
    (lambda rows: 4 + 1.87 * rows + (1.5 if rows > 5 else 0), 31.24, 13, 4),  # the guess is too high
    (lambda rows: 4 + 1.87 * rows - (1.5 if rows > 5 else 0), 31.24, 15, 5),  # too low
    (lambda rows: 4 + 0 * rows, 31.24, MOST_ROWS, 13),
    (lambda rows: 40 + rows, 31.24, 1, 1),
  ],
)
def test_the_most_rows_that_fit_are_found_in_few_compilations(peak_of, limit, rows, most_compiled):
  found, compiled = searched(peak_of, limit)
  assert found == rows
  assert len(compiled) == len(set(compiled)) <= most_compiled
  assert peak_of(1) > limit or rows == MOST_ROWS or {rows, rows + 1} <= set(compiled)

"""The search for the most rows, on peaks that are made up."""

from types import SimpleNamespace

import pytest

from insec_jax.sizing.compiled import Memory
from insec_jax.sizing.search import MOST_ROWS, most_rows


def searched(peak_of, limit: float, **options) -> tuple[int, list[int]]:
  """(the rows found, the rows that were compiled); a peak above the limit is refused."""
  compiled = []

  def measured(rows: int):
    compiled.append(rows)
    peak = peak_of(rows)
    return SimpleNamespace(rows=rows, memory=Memory(held={"weights": 3}, peak=peak, limit=limit, refused=peak > limit))

  return most_rows(measured, **options).rows, compiled


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


@pytest.mark.parametrize(
  ("start", "rows", "most_compiled"),
  [(20, 20, 2), (21, 20, 2), (14, 20, 3), (30, 20, 3), (1, 20, 4), (5000, 20, 8)],
)
def test_a_known_growth_and_a_start_near_the_end_save_compilations(start, rows, most_compiled):
  found, compiled = searched(lambda rows: 4 + 0.25 * rows, 9.2, start=start, growth=0.26)
  assert found == rows
  assert len(compiled) == len(set(compiled)) <= most_compiled
  assert searched(lambda rows: 10 + 0.25 * rows, 9.2, start=start, growth=0.25)[0] == 1

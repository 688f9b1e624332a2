"""Sudoku by naked singles: every move is judged by the grid as it stands, against a judge that tries all grids."""

import itertools

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method import tasks
from insec_jax.method.tasks import RIGHT, Verdict, sudoku
from insec_jax.method.tasks.sudoku import CELLS


def make(**changes):
  sizes = {"name": "sudoku", "min_size": 6, "max_size": 10, "modulus": 0}
  return tasks.get(TaskConfig(**sizes | changes))


TASK = make()
PROBLEMS = tasks.problems(TASK, "train", num=100, seed=0)


def peers(cell):
  """The other cells of its row, column and box, by counting."""
  row, column = divmod(cell, 4)
  return {
    4 * r + c
    for r in range(4)
    for c in range(4)
    if (r == row or c == column or (r // 2 == row // 2 and c // 2 == column // 2))
  } - {cell}


def test_there_are_288_grids_and_in_each_rows_columns_and_boxes_hold_four_numbers():
  assert len({tuple(grid) for grid in sudoku.GRIDS.tolist()}) == 288
  for grid in sudoku.GRIDS[::17]:
    assert all(grid[cell] not in grid[list(peers(cell))] for cell in range(16))


def test_every_solution_is_right_move_by_move_and_fills_the_grid():
  for problem in PROBLEMS:
    for k, step in enumerate(problem.steps):
      assert TASK.check(problem, problem.steps[:k], step) == RIGHT
    assert TASK.answer_of(problem, problem.steps) == problem.answer
    assert TASK.answer_of(problem, problem.steps[:-1]) is None
    assert TASK.next_step(problem, problem.steps) is None


def test_a_puzzle_has_one_solution():
  for problem in PROBLEMS[:30]:
    givens = sorted(problem.facts.givens)
    assert sum((grid[givens] == np.array(problem.facts.grid)[givens]).all() for grid in sudoku.GRIDS) == 1


def test_every_move_there_is_gets_the_verdict_of_the_rules():
  kinds = set()
  for problem, num in itertools.product(PROBLEMS[:20], (0, 3)):
    before = problem.steps[:num]
    known = {cell: problem.facts.grid[cell] for cell in problem.facts.givens}
    known |= {CELLS.index(step[0]): int(step[1]) for step in before}
    for cell, number in itertools.product(range(16), range(1, 5)):
      fits = {1, 2, 3, 4} - {known[peer] for peer in peers(cell) if peer in known}
      if cell in known or number not in fits:
        expected = Verdict("wrong", "invalid")
      else:
        expected = RIGHT if fits == {number} else Verdict("wrong", "open")
      assert TASK.check(problem, before, f"{CELLS[cell]}{number}\n") == expected
      kinds.add(expected)
  assert kinds == {Verdict("wrong", "invalid"), Verdict("wrong", "open"), RIGHT}


@pytest.mark.parametrize("step", ["a1", "q1\n", "a5\n", "a1 \n", "\n", "a1\n\n"])
def test_what_is_no_move_is_malformed(step):
  assert TASK.check(PROBLEMS[0], (), step) == Verdict("wrong", "malformed")


def test_an_uncorrected_move_counts_as_filled_and_the_rest_is_graded_by_the_solution():
  problem = PROBLEMS[0]
  cell = CELLS.index(problem.steps[0][0])
  wrong = f"{CELLS[cell]}{problem.facts.grid[cell] % 4 + 1}\n"
  assert TASK.check(problem, (wrong,), problem.steps[1]) == TASK.check(problem, problem.steps[:1], problem.steps[1])
  assert TASK.answer_of(problem, (wrong, *problem.steps[1:])) not in (None, problem.answer)


def test_what_is_injected_is_wrong_and_of_its_class():
  rng = np.random.default_rng(0)
  count = dict.fromkeys(TASK.error_classes, 0)
  for problem in PROBLEMS:
    for k in range(len(problem.steps)):
      for error in TASK.error_classes:
        wrong = TASK.inject(problem, problem.steps[:k], error, rng)
        if wrong is not None:
          assert TASK.check(problem, problem.steps[:k], wrong) == Verdict("wrong", error)
          count[error] += 1
  assert min(count.values()) > 200


def test_the_reason_says_why_and_takes_the_number_back():
  for problem, num in itertools.product(PROBLEMS[:40], (0, 2)):
    before, facts = problem.steps[:num], problem.facts
    known = facts.givens | {CELLS.index(step[0]) for step in before}
    for cell, number in itertools.product(range(16), range(1, 5)):
      step = f"{CELLS[cell]}{number}\n"
      verdict = TASK.check(problem, before, step)
      if verdict.kind != "wrong":
        continue
      assert TASK.explain(problem, before, step, "label") == verdict.error + CELLS[cell]
      said = TASK.explain(problem, before, step, "recompute")
      again = cell in known and facts.grid[cell] == number
      assert said.endswith(f"{CELLS[cell]}!{number}") != again
      if verdict.error == "invalid":  # the peer that clashes, or the cell itself
        clash = CELLS.index(said.removeprefix("invalid")[0])
        assert clash in known
        assert clash == cell if cell in known else (clash in peers(cell) and facts.grid[clash] == number)
        assert said.removeprefix("invalid")[1] == str(facts.grid[clash])


def test_a_correction_is_of_the_same_cell_where_it_is_settled_else_the_next_move():
  for problem in PROBLEMS[:40]:
    for cell in set(range(16)) - problem.facts.givens:
      wrong = f"{CELLS[cell]}{problem.facts.grid[cell] % 4 + 1}\n"
      right = f"{CELLS[cell]}{problem.facts.grid[cell]}\n"
      settled = TASK.check(problem, (), right) == RIGHT
      assert TASK.correction(problem, (), wrong) == (right if settled else problem.steps[0])


def test_copies_with_moved_lines_or_renamed_numbers_share_a_key_others_do_not():
  rng = np.random.default_rng(0)
  keys = [problem.key for problem in PROBLEMS]
  assert len(set(keys)) > 80
  for problem in PROBLEMS[:20]:
    grid, givens = np.array(problem.facts.grid), problem.facts.givens
    names = np.concatenate([[0], rng.permutation(4) + 1])
    for turned in (False, True):
      order = [0, 1, 2, 3] if rng.random() < 0.5 else [3, 2, 0, 1]  # rows within their band, and bands
      columns = [1, 0, 2, 3]
      places = [4 * r + c for r in order for c in columns]
      if turned:
        places = np.array(places).reshape(4, 4).T.reshape(-1).tolist()
      moved = names[grid[places]]
      assert sudoku._key(moved, frozenset(k for k, place in enumerate(places) if place in givens)) == problem.key


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"modulus": 10}, "sudoku takes modulus 0"),
    ({"min_size": 0}, "min_size of at least 1"),
    ({"max_size": 13}, "a sudoku has 1 to 12 empty cells"),
  ],
)
def test_sizes_that_it_cannot_have_are_refused(changes, words):
  with pytest.raises(InputError, match=words):
    make(**changes)

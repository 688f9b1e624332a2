"""Sudoku: a 4x4 grid solved by naked singles, cells with a single candidate.

    prompt   a1c3f1g4h2j4k2p3?\\n    the givens: cells a to p row by row, each with its number
    steps    e3\\n                   row, column and box of cell e hold 1, 2 and 4: only 3 is left
             d4\\n

Finding a settled cell takes a search over the grid; checking one takes only its peers, so checking is easier.
The two error classes are those of arXiv 2512.02389.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method.tasks import MALFORMED, RIGHT, Problem, Task, Verdict

CELLS = "abcdefghijklmnop"
NUMBERS = frozenset(range(1, 5))
CLASSES = ("invalid", "open")
FEWEST_GIVENS = 4  # fewer leave more than one solution
_STEP = re.compile(r"([a-p])([1-4])\n")
_PLACES = tuple(itertools.product(range(4), range(4)))
PEERS = tuple(
  tuple(
    peer
    for peer, (r, c) in enumerate(_PLACES)
    if (r, c) != (row, column) and (r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2))
  )
  for row, column in _PLACES
)
_LINES = tuple(
  tuple(2 * band + line for band in bands for line in (order[band], 1 - order[band]))
  for bands in ((0, 1), (1, 0))
  for order in itertools.product((0, 1), repeat=2)
)
# Every permutation of the cells that maps rows, columns and boxes to rows, columns and boxes.
_MOVES = np.array(
  [
    [4 * rows[k % 4] + columns[k // 4] if turned else 4 * rows[k // 4] + columns[k % 4] for k in range(16)]
    for rows in _LINES
    for columns in _LINES
    for turned in (False, True)
  ]
)


@dataclass(frozen=True)
class Facts:
  """The solved grid and which cells are given."""

  grid: tuple[int, ...]
  givens: frozenset[int]


def _grids() -> np.ndarray:
  """Return all 288 solved grids [288, 16]."""
  grids = []

  def fill(grid: list[int]) -> None:
    if len(grid) == 16:
      grids.append(grid)
      return
    taken = {grid[peer] for peer in PEERS[len(grid)] if peer < len(grid)}
    for number in sorted(NUMBERS - taken):
      fill([*grid, number])

  fill([])
  return np.array(grids)


GRIDS = _grids()


def _format_step(cell: int, number: int) -> str:
  return f"{CELLS[cell]}{number}\n"


def _read(step: str) -> tuple[int, int] | None:
  """Return (cell, number) of a step; None when it is malformed."""
  match = _STEP.fullmatch(step)
  return match and (CELLS.index(match[1]), int(match[2]))


def _candidates(grid: tuple[int, ...], known: Iterable[int], cell: int) -> frozenset[int]:
  """Return the numbers that no known peer of the cell has."""
  return NUMBERS - {grid[peer] for peer in PEERS[cell] if peer in known}


def _key(grid: np.ndarray, givens: frozenset[int]) -> str:
  """Return the least form over all moves of the cells and renamings of numbers; such copies of a puzzle share it."""
  shown = np.where([cell in givens for cell in range(16)], grid, 0)
  forms = []
  for moved in shown[_MOVES].tolist():
    names = {0: 0}
    forms.append(tuple(names.setdefault(number, len(names)) for number in moved))
  return "".join(map(str, min(forms)))


class Sudoku(Task[Facts]):
  """The sudoku task; its size is the number of empty cells.

  `open` is a number in a cell that has several candidates: a guess, which counts as wrong even where the solution has
  that number, since the cells known before it do not determine it. `invalid` is a number that a peer has, or a cell
  that is filled. No step is unverified.
  """

  name = "sudoku"
  error_classes = CLASSES
  units = ("line", "sentence")
  symbols = (
    *CLASSES,
    MALFORMED,
    *CELLS,
    *map(str, sorted(NUMBERS)),
    *(f"!{number}" for number in sorted(NUMBERS)),
    "?",
    "\n",
  )

  def __init__(self, task: TaskConfig):
    super().__init__(task)
    if self.max_size > 16 - FEWEST_GIVENS:
      raise InputError(f"task.max_size={task.max_size}; a sudoku has 1 to {16 - FEWEST_GIVENS} empty cells")

  def make(self, rng: np.random.Generator) -> Problem[Facts]:
    size = int(rng.integers(self.min_size, self.max_size + 1))
    while True:
      grid = tuple(GRIDS[rng.integers(len(GRIDS))].tolist())
      givens = frozenset(rng.permutation(16)[size:].tolist())
      if order := self._solve(grid, givens, rng):
        break
    return self._problem(grid, givens, order)

  def problem_of(self, prompt: str) -> Problem[Facts] | None:
    if not re.fullmatch(r"([a-p][1-4])*\?\n", prompt):
      return None
    number_of = {CELLS.index(prompt[k]): int(prompt[k + 1]) for k in range(0, len(prompt) - 2, 2)}
    fitting = GRIDS[(GRIDS[:, list(number_of)] == list(number_of.values())).all(axis=1)]
    if len(fitting) != 1:
      return None
    grid, givens = tuple(fitting[0].tolist()), frozenset(number_of)
    order = self._solve(grid, givens, np.random.default_rng(0))
    return self._problem(grid, givens, order) if order else None

  def _problem(self, grid: tuple[int, ...], givens: frozenset[int], order: list[int]) -> Problem[Facts]:
    """Return the problem whose solution fills the cells in this order."""
    return Problem(
      "".join(f"{CELLS[cell]}{grid[cell]}" for cell in sorted(givens)) + "?\n",
      tuple(_format_step(cell, grid[cell]) for cell in order),
      "".join(map(str, grid)),
      _key(np.array(grid), givens),
      Facts(grid, givens),
    )

  def check(self, problem: Problem[Facts], before: tuple[str, ...], step: str) -> Verdict:
    facts, read = problem.facts, _read(step)
    if read is None:
      return Verdict("wrong", MALFORMED)
    cell, number = read
    known = self._known(facts, before)
    fits = _candidates(facts.grid, known, cell)
    if cell in known or number not in fits:
      return Verdict("wrong", "invalid")
    return RIGHT if len(fits) == 1 else Verdict("wrong", "open")

  def inject(
    self, problem: Problem[Facts], before: tuple[str, ...], error: str, rng: np.random.Generator
  ) -> str | None:
    facts = problem.facts
    known = self._known(facts, before)
    choices = []
    for cell in range(16):
      fits = _candidates(facts.grid, known, cell)
      if error == "invalid":
        choices += [(cell, number) for number in (NUMBERS if cell in known else NUMBERS - fits)]
      elif len(fits) > 1 and cell not in known:
        choices += [(cell, number) for number in fits]
    return _format_step(*choices[rng.integers(len(choices))]) if choices and len(known) < 16 else None

  def explain(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str, detail: str) -> str:
    """Return the class and the cell; with "recompute" also why, and that the number is withdrawn.

    class      wrong step  label      recompute
    invalid    e2          invalide   invalidh2e!2    the peer h has 2
    invalid    e2          invalide   invalide4e!2    e itself has 4
    invalid    e4          invalide   invalide4       e has it already
    open       e3          opene      open34e!3       3 and 4 fit
    malformed  malformed in both
    """
    facts = problem.facts
    error = self.check(problem, before, wrong).error
    assert error, f"{wrong!r} is not wrong; there is nothing to explain"
    read = _read(wrong)
    if read is None:
      return MALFORMED
    cell, number = read
    if detail == "label":
      return error + CELLS[cell]
    known = self._known(facts, before)
    withdrawn = f"{CELLS[cell]}!{number}"
    if error == "open":
      return error + "".join(map(str, sorted(_candidates(facts.grid, known, cell)))) + withdrawn
    clash = (
      cell if cell in known else next(peer for peer in PEERS[cell] if peer in known and facts.grid[peer] == number)
    )
    why = f"{error}{CELLS[clash]}{facts.grid[clash]}"
    return why if cell in known and facts.grid[cell] == number else why + withdrawn

  def structure(self, problem: Problem[Facts]) -> str:
    """Return the essentially different puzzle: its least form over all moves of the cells and renamings of numbers."""
    return problem.key

  def next_step(self, problem: Problem[Facts], before: tuple[str, ...]) -> str | None:
    known = self._known(problem.facts, before)
    # The first that is not stated: the steps before it in the solution settle it.
    return next((step for step in problem.steps if CELLS.index(step[0]) not in known), None)

  def correction(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str) -> str | None:
    facts, read = problem.facts, _read(wrong)
    known = self._known(facts, before)
    if read is not None and read[0] not in known and len(_candidates(facts.grid, known, read[0])) == 1:
      return _format_step(read[0], facts.grid[read[0]])
    return self.next_step(problem, before)

  def answer_of(self, problem: Problem[Facts], steps: tuple[str, ...]) -> str | None:
    """Return the grid as filled, with the last number stated for a cell; None while a cell is empty."""
    facts = problem.facts
    stated = {cell: facts.grid[cell] for cell in facts.givens}
    stated |= dict(read for step in steps if (read := _read(step)) is not None)
    return "".join(str(stated[cell]) for cell in range(16)) if len(stated) == 16 else None

  def _known(self, facts: Facts, before: tuple[str, ...]) -> set[int]:
    """Return the cells that are given or stated; their numbers count as the solution's, even if stated wrong."""
    return set(facts.givens).union(read[0] for step in before if (read := _read(step)) is not None)

  def _solve(self, grid: tuple[int, ...], givens: frozenset[int], rng: np.random.Generator) -> list[int]:
    """Return the empty cells in a uniform draw from the orders of naked singles; empty when there is none."""
    known, order = set(givens), []
    while len(known) < 16:
      settled = [cell for cell in range(16) if cell not in known and len(_candidates(grid, known, cell)) == 1]
      if not settled:
        return []
      cell = settled[rng.integers(len(settled))]
      known.add(cell)
      order.append(cell)
    return order


TASK = Sudoku

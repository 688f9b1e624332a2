"""Structure classes: which problems are copies of each other up to labels, order or numbers."""

import dataclasses

import numpy as np

from insec_jax.config import TaskConfig
from insec_jax.evaluation import structures
from insec_jax.method import tasks
from insec_jax.method.tasks import sudoku
from insec_jax.method.tasks.graph import Facts

GRAPH = tasks.get(TaskConfig(name="graph", min_size=1, max_size=4, modulus=10))
SUDOKU = tasks.get(TaskConfig(name="sudoku", min_size=10, max_size=12))


def graph_of(operands, value):
  """A problem with these definitions; its prompt and steps are not read."""
  return tasks.Problem("", (), "", "", Facts(list(value)[-1], operands, value))


def test_sums_of_one_shape_are_a_class_whatever_their_names_values_and_order():
  one = graph_of({"c": ("a", "b"), "d": ("c", "a")}, {"a": 4, "b": 3, "c": 7, "d": 1})
  same = graph_of({"x": ("p", "q"), "y": ("q", "x")}, {"p": 9, "q": 2, "x": 1, "y": 3})
  longer = graph_of({"c": ("a", "b"), "d": ("c", "a"), "e": ("d", "c")}, {"a": 4, "b": 3, "c": 7, "d": 1, "e": 8})
  with_third = graph_of({"c": ("a", "b"), "d": ("c", "e")}, {"a": 4, "b": 3, "e": 4, "c": 7, "d": 1})
  first, second, *others = structures.labels(GRAPH, [one, same, longer, with_third])
  assert first == second
  assert len({first, *others}) == 3
  assert len(first) == 12


def test_graphs_with_one_key_are_in_one_class_and_classes_are_few():
  problems = tasks.problems(GRAPH, "test", num=400, seed=0)
  labels = structures.labels(GRAPH, problems)
  class_of_key = {}
  for problem, label in zip(problems, labels, strict=True):
    givens = [value for name, value in problem.facts.value.items() if name not in problem.facts.operands]
    if len(set(givens)) < len(givens):
      continue  # the key does not tell equal givens apart
    assert class_of_key.setdefault(problem.key, label) == label
  assert 10 < len(set(labels)) < 100 < len(class_of_key)


def test_moved_and_renamed_sudokus_are_a_class_that_other_seeds_meet_too():
  problem = tasks.problems(SUDOKU, "test", num=1, seed=0)[0]
  grid, givens = problem.facts.grid, problem.facts.givens
  for places in sudoku._MOVES[::17]:
    moved = np.array([5 - grid[place] for place in places])
    key = sudoku._key(moved, frozenset(k for k, place in enumerate(places) if place in givens))
    assert structures.labels(SUDOKU, [dataclasses.replace(problem, key=key)]) == structures.labels(SUDOKU, [problem])
  first, second = (set(structures.labels(SUDOKU, tasks.problems(SUDOKU, "test", num=40, seed=s))) for s in (0, 1))
  assert len(first) < 40
  assert len(first & second) > 5


def test_where_a_task_names_no_class_a_problem_is_its_own():
  task = tasks.get(TaskConfig(name="multiplication", min_size=2, max_size=2))
  problems = tasks.problems(task, "test", num=50, seed=0)
  assert len(set(structures.labels(task, problems))) == 50


def test_only_larger_problems_have_classes_beside_those_of_all_other_sources():
  problems = tasks.problems(GRAPH, "test", num=3, seed=0)
  assert set(structures.by_source(GRAPH, problems, [])) == {"solutions"}
  assert len(structures.by_source(GRAPH, problems, problems[:2])["solutions, larger"]) == 2

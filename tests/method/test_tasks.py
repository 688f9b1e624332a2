"""Splits and sets of problems."""

import collections

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method import tasks

GRAPH = tasks.get(TaskConfig(name="graph", min_size=2, max_size=4, modulus=10))
SPLITS = ("train", "mine", "probe", "test")


def test_splits_have_their_shares():
  found = collections.Counter(tasks.split_of(f"key {k}") for k in range(4000))
  assert [round(found[name] / 4000, 1) for name in SPLITS] == [0.7, 0.1, 0.1, 0.1]


def test_a_key_stays_in_its_split_for_ever():
  assert [tasks.split_of(f"key {k}") for k in (0, 1, 2, 9)] == ["test", "train", "mine", "probe"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_size_has_its_share_in_every_split_and_no_prompt_comes_twice(split):
  task = tasks.get(TaskConfig(name="graph", min_size=1, max_size=3, modulus=10))
  problems = tasks.problems(task, split, num=600, seed=0)
  sizes = collections.Counter(len(problem.steps) for problem in problems)
  assert all(sizes[size] > 130 for size in (1, 2, 3))
  assert len({problem.prompt for problem in problems}) == 600


def test_problems_of_different_splits_share_no_key():
  sets = {split: tasks.problems(GRAPH, split, num=200, seed=0) for split in SPLITS}
  keys = [{problem.key for problem in problems} for problems in sets.values()]
  assert len(set.union(*keys)) == sum(map(len, keys))
  assert all(tasks.split_of(problem.key) == split for split, problems in sets.items() for problem in problems)


def test_problems_are_the_same_for_the_same_seed_and_a_longer_list_begins_as_a_shorter():
  few, many = tasks.problems(GRAPH, "test", num=20, seed=1), tasks.problems(GRAPH, "test", num=50, seed=1)
  assert [problem.prompt for problem in few] == [problem.prompt for problem in many[:20]]
  other = tasks.problems(GRAPH, "test", num=20, seed=2)
  assert [problem.prompt for problem in few] != [problem.prompt for problem in other]


def test_too_few_different_problems_are_an_error_and_not_an_endless_search():
  class One(type(GRAPH)):
    def make(self, rng):  # noqa: ARG002
      return super().make(np.random.default_rng(0))

  tiny = One(TaskConfig(name="graph", min_size=1, max_size=1, modulus=2))
  with pytest.raises(InputError, match="different problems"):
    tasks.problems(tiny, "test", num=2, seed=0)


def test_an_unknown_split_or_task_is_refused():
  with pytest.raises(InputError, match="split"):
    tasks.problems(GRAPH, "valid", num=1, seed=0)
  with pytest.raises(InputError, match="records"):
    tasks.get(TaskConfig(name="records", min_size=0, max_size=0, modulus=0))


@pytest.mark.parametrize("name", ["graph", "chain_sum"])
def test_sentences_of_a_symbolic_task_are_its_lines(name):
  task = tasks.get(TaskConfig(name=name, min_size=2, max_size=4, modulus=10 if name == "graph" else 0))
  for problem in tasks.problems(task, "train", num=20, seed=0):
    assert tasks.in_units(problem, "sentence").steps == problem.steps == tasks.in_units(problem, "line").steps

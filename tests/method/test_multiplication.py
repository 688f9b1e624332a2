"""Multiplication by hand: every line is judged, and each wrong one has the class that it was made for."""

import collections

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method import tasks
from insec_jax.method.tasks import RIGHT, Verdict, multiplication


def make(digits=4, **changes):
  return tasks.get(TaskConfig(**{"name": "multiplication", "min_size": 1, "max_size": digits, "modulus": 0} | changes))


TASK = make()


def problem_of(first, second):
  """The problem with these numbers."""
  lines = multiplication._solution(first, second)
  return tasks.Problem(f"{first}*{second}=\n", tuple(map(multiplication._format_line, lines)), str(first * second), "",
                       multiplication.Facts(lines))


HAND = problem_of(47, 306)
STEPS = ("47*6=282\n", "47*300=14100\n", "282+14100=14382\n")


def test_a_solution_has_a_line_for_each_digit_that_is_not_zero_and_a_sum_after_each_but_the_first():
  assert HAND.steps == STEPS
  assert problem_of(20, 40).steps == ("20*40=800\n",)


def test_every_solution_is_right_line_by_line_and_ends_in_the_product():
  for problem in tasks.problems(TASK, "train", num=300, seed=0):
    for k, step in enumerate(problem.steps):
      assert TASK.check(problem, problem.steps[:k], step) == RIGHT
      assert TASK.next_step(problem, problem.steps[:k]) == step
    first, second = problem.prompt.rstrip("=\n").split("*")
    assert TASK.answer_of(problem, problem.steps) == problem.answer == str(int(first) * int(second))
    assert TASK.next_step(problem, problem.steps) is None
    assert TASK.answer_of(problem, problem.steps[:-1]) is None


@pytest.mark.parametrize(("before", "step", "error"), [
  ((), "47*6=282", "malformed"),
  ((), "47*6=0282\n", "malformed"),
  ((), "47*5=235\n", "copy"),
  ((), "282+14100=14382\n", "copy"),  # neither line is there yet
  (STEPS[:1], "282+14100=14382\n", "copy"),
  (STEPS[:1], STEPS[0], "repeat"),
  ((), "47*6=242\n", "carry"),  # 42 and a forgotten 4
  ((), "47*6=272\n", "ten"),
  ((), "47*6=382\n", "hundred"),
  ((), "47*6=284\n", "near"),
  ((), "47*6=289\n", "digit"),
  ((), "47*6=255\n", "adjacent"),
  ((), "47*6=1282\n", "calc"),
  ((), "47*6=585\n", "calc"),
])
def test_a_wrong_line_has_its_class(before, step, error):
  assert TASK.check(HAND, before, step) == Verdict("wrong", error)


def test_products_may_come_in_any_order():
  assert TASK.check(HAND, (), STEPS[1]) == RIGHT
  assert TASK.check(HAND, (STEPS[1],), STEPS[0]) == RIGHT
  assert TASK.next_step(HAND, (STEPS[1],)) == STEPS[0]


def test_a_wrong_line_that_stands_counts_as_stated_and_later_lines_are_judged_by_the_true_values():
  before = ("47*6=272\n", STEPS[1])
  assert TASK.check(HAND, before, STEPS[2]) == RIGHT
  assert TASK.check(HAND, before, "272+14100=14372\n").error == "copy"


def test_a_forgotten_carry_is_one_that_was_carried_and_not_written_down():
  assert multiplication._without_a_carry("47*6") == {242}
  assert multiplication._without_a_carry("47*600") == {24200}
  assert multiplication._without_a_carry("99+1") == {90, 0}
  assert multiplication._without_a_carry("12*3") == set()


def test_every_class_can_be_injected_and_is_found_again_by_the_check():
  rng = np.random.default_rng(0)
  found = collections.Counter()
  for problem in tasks.problems(TASK, "train", num=200, seed=1):
    for k, right in enumerate(problem.steps):
      for error in TASK.error_classes:
        wrong = TASK.inject(problem, problem.steps[:k], error, rng)
        if wrong is None:
          continue
        verdict = TASK.check(problem, problem.steps[:k], wrong)
        found[error] += verdict.error == error
        if verdict.kind == "wrong":
          assert TASK.correction(problem, problem.steps[:k], wrong) == right
  assert min(found[error] for error in TASK.error_classes) > 200


def test_the_reason_names_the_class_and_with_recompute_the_right_line():
  assert TASK.explain(HAND, (), "47*6=272\n", "label") == "ten"
  assert TASK.explain(HAND, (), "47*6=272\n", "recompute") == "ten47*6=282"
  assert TASK.explain(HAND, STEPS[:1], "47*5=235\n", "recompute") == "copy47*300=14100"
  assert TASK.explain(HAND, (), "47", "recompute") == "malformed"


def test_swapped_numbers_are_in_one_split():
  keys = collections.defaultdict(set)
  for seed in range(3):
    for split in ("train", "mine", "probe", "test"):
      for problem in tasks.problems(make(1), split, num=5, seed=seed):
        first, second = problem.prompt.rstrip("=\n").split("*")
        keys[frozenset((first, second))].add(split)
  assert max(map(len, keys.values())) == 1


@pytest.mark.parametrize("changes", [{"modulus": 10}, {"min_size": 0}, {"max_size": 7}])
def test_sizes_that_it_cannot_have_are_refused(changes):
  with pytest.raises(InputError, match="multiplication takes numbers of 1 to 6 digits"):
    make(**changes)

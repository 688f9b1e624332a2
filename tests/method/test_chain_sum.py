"""The chain_sum task."""

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method import tasks
from insec_jax.method.tasks.chain_sum import ChainSum, Facts

TASK = tasks.get(TaskConfig(name="chain_sum", min_size=1, max_size=4, modulus=0))
PROBLEM = tasks.Problem("17+25+8=\n", ("17+25=42\n", "42+8=50\n"), "50", "k", Facts((17, 25, 8)))
FIRST = PROBLEM.steps[:1]


def test_the_solution_is_right_step_by_step():
  rng = np.random.default_rng(0)
  for _ in range(200):
    problem = TASK.make(rng)
    numbers = [int(number) for number in problem.prompt.removesuffix("=\n").split("+")]
    assert problem.answer == str(sum(numbers)) == TASK.answer_of(problem, problem.steps)
    assert len(problem.steps) == len(numbers) - 1
    for k, step in enumerate(problem.steps):
      assert TASK.check(problem, problem.steps[:k], step) == tasks.RIGHT
      assert TASK.next_step(problem, problem.steps[:k]) == step
      total, number, result = map(int, step.replace("=", "+").split("+"))
      assert (total, number, result) == (sum(numbers[: k + 1]), numbers[k + 1], sum(numbers[: k + 2]))
    assert TASK.next_step(problem, problem.steps) is None


@pytest.mark.parametrize("error", ChainSum.error_classes)
def test_every_injected_mistake_that_check_accepts_is_really_wrong(error):
  rng = np.random.default_rng(1)
  accepted = 0
  for _ in range(300):
    problem = TASK.make(rng)
    k = int(rng.integers(len(problem.steps)))
    wrong = TASK.inject(problem, problem.steps[:k], error, rng)
    if wrong is not None and TASK.check(problem, problem.steps[:k], wrong).kind == "wrong":
      accepted += 1
      assert TASK.check(problem, problem.steps[:k], wrong).error == error
      total, number, result = map(int, wrong.replace("=", "+").split("+"))
      true_total = sum(problem.facts.numbers[: k + 1])
      assert (
        wrong in problem.steps[:k]
        if error == "repeat"
        else (total != true_total or number not in problem.facts.numbers[k + 1 :] or result != total + number)
      )
  assert accepted > 80


@pytest.mark.parametrize(
  ("before", "step", "kind", "error"),
  [
    ((), "17+25=42\n", "right", ""),
    ((), "25+17=42\n", "right", ""),
    ((), "17+8=25\n", "right", ""),  # any order
    (("17+8=25\n",), "25+25=50\n", "right", ""),
    ((), "17+25=43\n", "wrong", "calc"),
    (FIRST, "43+8=51\n", "wrong", "value"),
    (FIRST, "42+9=51\n", "wrong", "copy"),
    (FIRST, "17+25=42\n", "wrong", "repeat"),
    (FIRST, "42+25=67\n", "wrong", "copy"),  # 25 is used up
    (("17+25=43\n",), "43+8=51\n", "wrong", "value"),
    ((), "17+25=042\n", "wrong", "malformed"),
    ((), "17+25=\n", "wrong", "malformed"),
  ],
)
def test_verdicts_one_by_one(before, step, kind, error):
  verdict = TASK.check(PROBLEM, before, step)
  assert (verdict.kind, verdict.error) == (kind, error)


@pytest.mark.parametrize(
  ("before", "wrong", "label", "recompute"),
  [
    ((), "17+25=43\n", "calc43", "calc17+25=42"),
    (FIRST, "43+8=51\n", "value43", "value42not43"),
    (FIRST, "42+9=51\n", "copy9", "copy8not9"),
    (PROBLEM.steps, "50+9=59\n", "copy9", "copy9"),
    (FIRST, "17+25=42\n", "repeat42", "repeat17+25=42"),
    ((), "17+", "malformed", "malformed"),
  ],
)
def test_reasons_say_what_is_wrong_and_recompute_it(before, wrong, label, recompute):
  assert TASK.explain(PROBLEM, before, wrong, "label") == label
  assert TASK.explain(PROBLEM, before, wrong, "recompute") == recompute


def test_the_answer_is_the_last_result_once_all_is_added():
  assert TASK.answer_of(PROBLEM, FIRST) is None
  assert TASK.answer_of(PROBLEM, (*FIRST, "42+8=51\n")) == "51"


def test_a_modulus_is_refused():
  with pytest.raises(InputError, match="modulus"):
    tasks.get(TaskConfig(name="chain_sum", min_size=1, max_size=4, modulus=10))

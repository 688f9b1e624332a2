"""Sums in English: every verdict by an example, and what may be injected."""

import collections
import re

import numpy as np
import pytest

from insec_jax.config import TaskConfig
from insec_jax.method import tasks
from insec_jax.method.mistakes import wrong_step
from insec_jax.method.tasks import RIGHT, UNVERIFIED, Problem, english, english_words
from insec_jax.method.tasks.english import Facts, Sum

TASK = tasks.get(TaskConfig(name="english", min_size=2, max_size=4))
SUMS = (
  Sum("After buying more, Rosa has", "apples", 14, "+", 9, ()),
  Sum("Ben has", "apples", 23, "-", 5, (0,)),
  Sum("Together, Rosa and Ben have", "apples", 23, "+", 18, (0, 1)),
)
BUYS, BEN, BOTH, ANSWER = STEPS = (
  "After buying more, Rosa has 14 + 9 = 23 apples.\n",
  "Ben has 23 - 5 = 18 apples.\n",
  "Together, Rosa and Ben have 23 + 18 = 41 apples.\n",
  "The answer is 41.\n",
)
PROBLEM = Problem(
  "Rosa has 14 apples. Rosa buys 9 more apples. Paul is 31 years old. Ben has 5 fewer apples than Rosa. How many "
  "apples do Rosa and Ben have together?\n",
  STEPS,
  "41",
  "14 +9 -5 +#0",
  Facts(SUMS, (14, 9, 31, 5)),
)


@pytest.mark.parametrize(
  ("num", "step", "error"),
  [
    (0, "After buying more, Rosa has 14 + 31 = 45 apples.\n", "copy"),
    (0, "After buying more, Rosa has 14 - 9 = 5 apples.\n", "operation"),
    (0, "After buying more, Rosa has 14 + 9 = 24 apples.\n", "calc"),
    (0, "Ben has 14 - 5 = 9 apples.\n", "skip"),
    (1, "Ben has 14 - 5 = 9 apples.\n", "copy"),
    (1, "Ben has 5 - 23 = 18 apples.\n", "operation"),
    (1, "Ben has 24 - 5 = 18 apples.\n", "copy"),
    (1, BUYS, "repeat"),
    (1, "He now owns 23 - 5 = 19 apples.\n", "calc"),
    (3, "The answer is 18.\n", "answer"),
    (4, ANSWER, "repeat"),
    (0, "Rosa has 23 apples.\n", "malformed"),
    (0, "After buying more, Rosa has 14 + 9 = 023 apples.\n", "malformed"),
    (0, "After buying more, Rosa has 14 + 9 = 23 apples.", "malformed"),
  ],
)
def test_a_wrong_step_is_of_this_class_and_its_correction_is_right(num, step, error):
  before = STEPS[:num]
  verdict = TASK.check(PROBLEM, before, step)
  assert (verdict.kind, verdict.error) == ("wrong", error)
  label, recompute = (TASK.explain(PROBLEM, before, step, detail) for detail in ("label", "recompute"))
  assert recompute.startswith(label)
  if num < 4:
    assert TASK.check(PROBLEM, before, TASK.correction(PROBLEM, before, step)) == RIGHT


@pytest.mark.parametrize(
  ("num", "step", "verdict"),
  [
    (0, "After buying more, Rosa has 9 + 14 = 23 apples.\n", RIGHT),
    (1, "Ben has 36 / 2 = 18 apples.\n", UNVERIFIED),  # the value by chance
    (0, BEN, UNVERIFIED),  # right, but its number is not there yet
    (1, "He now owns 23 - 5 = 18 apples.\n", UNVERIFIED),  # words of another kind
    (1, "Ben has 23 - 5 = 18 pears.\n", UNVERIFIED),
    (1, ANSWER, UNVERIFIED),
  ],
)
def test_a_step_that_is_not_wrong_is_right_only_where_all_of_it_is_proved(num, step, verdict):
  assert TASK.check(PROBLEM, STEPS[:num], step) == verdict


def test_what_is_wrong_is_said_with_the_right_numbers():
  for num, step, said in (
    (1, "Ben has 14 - 5 = 9 apples.\n", "A wrong number was used. It is 23 - 5."),
    (0, "After buying more, Rosa has 14 + 9 = 24 apples.\n", "The result is wrong. 14 + 9 is 23."),
    (0, "Ben has 14 - 5 = 9 apples.\n", "A step was skipped. Before it comes 14 + 9."),
    (3, "The answer is 18.\n", "The answer is not the last result. It is 41."),
  ):
    assert TASK.explain(PROBLEM, STEPS[:num], step, "recompute") == said


def test_every_class_is_injected_where_it_can_be_and_what_is_made_is_right():
  rng, seen, num = np.random.default_rng(0), collections.Counter(), 0
  for problem in tasks.problems(TASK, "train", num=150, seed=0):
    assert TASK.answer_of(problem, problem.steps) == problem.answer
    assert TASK.next_step(problem, problem.steps) is None
    for place, step in enumerate(problem.steps):
      before = problem.steps[:place]
      assert TASK.check(problem, before, step) == RIGHT
      assert TASK.next_step(problem, before) == step
      seen.update(error for error in TASK.error_classes if wrong_step(problem, before, TASK, (error,), rng))
    num += len(problem.steps) - 1
  assert seen["answer"] == 150
  assert all(seen[error] > 0.95 * num for error in ("calc", "operation", "copy", "repeat"))
  assert 0.85 * (num - 150) < seen["skip"] < num - 150  # any sum but the last, where the next one leaves no rest


def test_problems_have_their_sizes_and_bounds_and_their_key_is_the_computation():
  task = tasks.get(TaskConfig(name="english", min_size=1, max_size=8))
  sizes, seen = collections.Counter(), collections.defaultdict(set)
  for seed in range(1500):
    problem = task.make(np.random.default_rng(seed))
    sizes[len(problem.facts.sums)] += 1
    words = [(one.words, one.noun) for one in problem.facts.sums]
    assert len(set(words)) == len(words)
    assert all(english.SMALLEST <= one.result <= 2 * english.LARGEST for one in problem.facts.sums)
    assert sorted(map(int, re.findall(r"\d+", problem.prompt))) == sorted(problem.facts.numbers)
    seen[problem.key].add(tuple((one.x, one.sign, one.y) for one in problem.facts.sums))
  assert min(sizes[size] for size in range(1, 9)) > 120
  assert all(len(computed) == 1 for computed in seen.values())


def test_there_are_20_to_40_templates_that_change_the_sums_and_others_that_do_not():
  telling = (*english_words.STARTS, *english_words.CHANGES, *english_words.COMPARISONS, *english_words.LASTS)
  assert 20 <= len(telling) <= 40
  assert len(english_words.DISTRACTORS) >= 5

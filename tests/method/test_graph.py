"""The graph task against an independent reading of its text."""

import collections
import hashlib
import itertools
import re

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method import tasks
from insec_jax.method.tasks.graph import MAX_SIZE, Facts, Graph, _key, _read


def graph(min_size=2, max_size=6, modulus=10):
  return tasks.get(TaskConfig(name="graph", min_size=min_size, max_size=max_size, modulus=modulus))


def made(num, seed=0, **sizes):
  task, rng = graph(**sizes), np.random.default_rng(seed)
  return task, [task.make(rng) for _ in range(num)]


def solved(prompt, modulus):
  """Definitions, true values and the asked name, from the text of the prompt alone."""
  body, asked = re.fullmatch(r"(.*)\?([a-z]):\n", prompt).groups()
  definitions = {part[0]: part[1:] for part in body.split(";")}

  def value(name):
    said = definitions[name]
    return int(said) if said.isdigit() else sum(map(value, said)) % modulus

  return definitions, {name: value(name) for name in definitions}, asked


def needed_by_asked(prompt):
  """The sums that the asked quantity needs, itself included."""
  definitions, _, asked = solved(prompt, 2)
  needed, todo = set(), [asked]
  while todo:
    name = todo.pop()
    if name not in needed and definitions[name].isalpha():
      needed.add(name)
      todo += definitions[name]
  return needed


def is_wrong(prompt, modulus, before, step):
  """Whether the step is wrong: malformed, a repeat of a right step, with an untrue number, or a sum that is none."""
  found = re.fullmatch(r"([a-z])([a-z])(\d+)([a-z])(\d+)([a-z])(\d+)\n", step)
  definitions, values, _ = solved(prompt, modulus)
  if not found:
    return True
  name, first, x, second, y, again, result = found.groups()
  if name != again or any(str(int(number)) != number or int(number) >= modulus for number in (x, y, result)):
    return True
  if any(earlier.endswith(f"{name}{values.get(name)}\n") for earlier in before):
    return True
  if not definitions.get(name, "").isalpha() or first not in values or second not in values:
    return True
  true = (values[first], values[second], values[name]) == (int(x), int(y), int(result))
  return not true or (int(x) + int(y) - int(result)) % modulus != 0


def fixed_problem():
  """cab;a4;dca;b3;ecb, where d is asked."""
  task = graph()
  rng = np.random.default_rng(0)
  problem = task.make(rng)
  facts = type(problem.facts)(
    asked="d",
    operands={"c": ("a", "b"), "d": ("c", "a"), "e": ("c", "b")},
    value={"a": 4, "b": 3, "c": 7, "d": 1, "e": 0},
  )
  return task, tasks.Problem("cab;a4;dca;b3;ecb?d:\n", ("ca4b3c7\n", "dc7a4d1\n"), "1", "k", facts)


def test_the_problems_are_the_ones_on_which_the_sums_were_measured():
  said = hashlib.blake2b(digest_size=8)
  for modulus in (10, 23):
    for problem in made(200, seed=5, min_size=1, max_size=8, modulus=modulus)[1]:
      said.update("|".join((problem.prompt, *problem.steps, problem.answer, problem.key)).encode())
  assert said.hexdigest() == "1fbc73cb0878874c"


@pytest.mark.parametrize("modulus", [2, 10, 23])
def test_the_solution_is_what_the_prompt_says(modulus):
  task, problems = made(300, modulus=modulus)
  for problem in problems:
    definitions, values, asked = solved(problem.prompt, modulus)
    stated = {name for name, definition in definitions.items() if definition.isdigit()}
    for k, step in enumerate(problem.steps):
      name, first, x, second, y, again, result = re.fullmatch(
        r"([a-z])([a-z])(\d+)([a-z])(\d+)([a-z])(\d+)\n", step
      ).groups()
      assert definitions[name] == first + second
      assert name == again
      assert name not in stated
      assert {first, second} <= stated
      assert (int(x), int(y), int(result)) == (values[first], values[second], values[name])
      stated.add(name)
      assert task.next_step(problem, problem.steps[:k]) == step
      assert task.check(problem, problem.steps[:k], step) == tasks.RIGHT
    assert name == asked
    assert task.answer_of(problem, problem.steps) == problem.answer == str(values[asked])
    assert task.next_step(problem, problem.steps) is None


@pytest.mark.parametrize("size", [1, 4, 20])
def test_the_size_is_the_number_of_sums_that_the_answer_needs(size):
  for problem in made(60, min_size=size, max_size=size)[1]:
    assert len(problem.steps) == size
    assert {step[0] for step in problem.steps} == needed_by_asked(problem.prompt)


def test_all_sizes_come_equally_often():
  sizes = collections.Counter(len(problem.steps) for problem in made(1200, min_size=2, max_size=5)[1])
  assert set(sizes) == {2, 3, 4, 5}
  assert min(sizes.values()) > 240


def test_each_sum_reads_the_one_before_it():
  for problem in made(300, min_size=6, max_size=6)[1]:
    operands = problem.facts.operands
    assert all(before in operands[name] for before, name in itertools.pairwise(operands))


def test_definitions_come_in_any_order_and_every_sum_is_needed():
  _, problems = made(300)
  assert any(problem.prompt[1].isalpha() for problem in problems)
  assert any(problem.prompt[1].isdigit() for problem in problems)
  assert all(set(problem.facts.operands) == {step[0] for step in problem.steps} for problem in problems)


def test_check_agrees_with_an_independent_reading_on_any_step():
  rng = np.random.default_rng(3)
  task, problems = made(150, max_size=4, modulus=3)
  kinds = set()
  for problem in problems:
    names = re.findall("[a-z]", problem.prompt)
    for _ in range(40):
      before = problem.steps[: rng.integers(len(problem.steps) + 1)]
      name, first, second = rng.choice(names, 3)
      if rng.random() < 0.7:
        name = str(rng.choice(sorted(problem.facts.operands)))
        first, second = problem.facts.operands[name]
      x, y, result = rng.integers(0, 4, 3)
      step = f"{name}{first}{x}{second}{y}{name}{result}\n"
      verdict = task.check(problem, before, step)
      assert (verdict.kind == "wrong") == is_wrong(problem.prompt, 3, before, step), (
        problem.prompt,
        before,
        step,
      )
      assert bool(verdict.error) == (verdict.kind == "wrong")
      kinds.add(verdict.kind)
  assert kinds == {"right", "unverified", "wrong"}


@pytest.mark.parametrize("error", Graph.error_classes)
@pytest.mark.parametrize("modulus", [2, 10, 23])
def test_every_injected_mistake_that_check_accepts_is_really_wrong(error, modulus):
  rng = np.random.default_rng(4)
  task, problems = made(400, modulus=modulus)
  accepted = 0
  for problem in problems:
    before = problem.steps[: rng.integers(len(problem.steps))]
    wrong = task.inject(problem, before, error, rng)
    if wrong is not None and task.check(problem, before, wrong).kind == "wrong":
      accepted += 1
      assert is_wrong(problem.prompt, modulus, before, wrong)
      assert task.check(problem, before, wrong).error == error
  assert accepted > 100


@pytest.mark.parametrize(
  ("before", "step", "kind", "error"),
  [
    ((), "ca4b3c7\n", "right", ""),
    ((), "cb3a4c7\n", "right", ""),  # operands in the other order
    ((), "dc7a4d1\n", "unverified", ""),  # guessed: c is not stated yet
    ((), "cd1b3c7\n", "wrong", "copy"),  # every number is true, but 1 + 3 is not 7
    ((), "ea4b3e7\n", "wrong", "copy"),
    ((), "ce0c7c7\n", "unverified", ""),  # another definition, by chance all is true
    (("ca4b3c7\n",), "da4c7d1\n", "right", ""),
    (("ca4b3c7\n",), "dc7b3d0\n", "wrong", "copy"),
    ((), "dc8a4d2\n", "wrong", "early"),
    ((), "dc7a4d2\n", "wrong", "early"),
    ((), "ca5b3c8\n", "wrong", "value"),
    ((), "ca5b2c7\n", "wrong", "value"),  # two misread values, right sum: still not true
    ((), "ca4b3c8\n", "wrong", "calc"),
    (("ca4b3c7\n",), "ca4b3c7\n", "wrong", "repeat"),
    (("ca4b3c8\n",), "ca4b3c7\n", "right", ""),  # a wrong statement put right is no repeat
    (("ca4b3c8\n",), "dc8a4d2\n", "wrong", "value"),  # built on a wrong step that stands
    ((), "ab3c7a0\n", "wrong", "copy"),  # a given has no such definition
    ((), "za4b3z7\n", "wrong", "copy"),  # no such quantity
    ((), "ca4z3c7\n", "wrong", "copy"),
    ((), "ca4b3d7\n", "wrong", "malformed"),
    ((), "ca4b3c07\n", "wrong", "malformed"),
    ((), "ca4b3c17\n", "wrong", "malformed"),
    ((), "ca4b3c7", "wrong", "malformed"),
    ((), "ca\u0664b3c7\n", "wrong", "malformed"),
    ((), "ca4b3c7\n\n", "wrong", "malformed"),
    ((), "", "wrong", "malformed"),
  ],
)
def test_verdicts_one_by_one(before, step, kind, error):
  task, problem = fixed_problem()
  verdict = task.check(problem, before, step)
  assert (verdict.kind, verdict.error) == (kind, error)


@pytest.mark.parametrize(
  ("before", "wrong", "label", "recompute"),
  [
    ((), "dc5a4d9\n", "earlyc", "earlycab"),
    ((), "ca5b3c8\n", "valuea", "valuea4"),
    ((), "ca4b3c8\n", "calcc", "calc4+3=7"),
    (("ca4b3c7\n",), "dc7b3d0\n", "copyd", "copydca"),
    ((), "dc7a3d0\n", "earlyc", "earlycab"),  # and the value of a is wrong
    ((), "da4b3d7\n", "copyd", "copydcacab"),  # nor can d be computed now
    ((), "ab3c7a0\n", "copya", "copya4dcacab"),
    ((), "za4b3z7\n", "copyz", "copyzdcacab"),
    (("ca4b3c7\n",), "ca4b3c7\n", "repeatc", "repeatc7dca"),
    (("ca4b3c7\n", "dc7a4d1\n"), "ca4b3c7\n", "repeatc", "repeatc7"),  # nothing is left to compute
    ((), "ca4", "malformed", "malformeddcacab"),
    (("ca4b3c7\n",), "ca4", "malformed", "malformeddca"),
  ],
)
def test_reasons_say_what_is_wrong_and_recompute_it(before, wrong, label, recompute):
  task, problem = fixed_problem()
  assert task.explain(problem, before, wrong, "label") == label
  assert task.explain(problem, before, wrong, "recompute") == recompute


def test_the_reason_for_early_ends_in_the_quantity_that_the_correction_computes():
  task = graph()
  facts = type(fixed_problem()[1].facts)(
    asked="e",
    operands={"e": ("a", "d"), "d": ("c", "b"), "c": ("b", "a")},
    value={"a": 4, "b": 3, "c": 7, "d": 0, "e": 4},
  )
  problem = tasks.Problem("ead;a4;dcb;b3;cba?e:\n", ("cb3a4c7\n", "dc7b3d0\n", "ea4d0e4\n"), "4", "k", facts)
  assert task.explain(problem, (), "ea4d1e5\n", "recompute") == "earlydcbcba"
  assert task.explain(problem, (), "ea4d1e5\n", "label") == "earlyd"
  assert task.correction(problem, (), "ea4d1e5\n") == "cb3a4c7\n"
  assert task.explain(problem, problem.steps[:1], "ea4d1e5\n", "recompute") == "earlydcb"
  assert task.correction(problem, problem.steps[:1], "ea4d1e5\n") == "dc7b3d0\n"


def test_a_wrong_number_is_corrected_in_the_same_quantity():
  rng = np.random.default_rng(8)
  task, problems = made(100, min_size=4, max_size=8)
  for problem in problems:
    before = problem.steps[: rng.integers(len(problem.steps) - 1)]
    for error in ("value", "calc"):
      wrong = task.inject(problem, before, error, rng)
      assert task.correction(problem, before, wrong) == problem.steps[len(before)]
      assert wrong[0] == problem.steps[len(before)][0]


@pytest.mark.parametrize("error", ["early", "copy", "repeat", "malformed"])
def test_the_correction_is_the_sum_that_the_reason_ends_with(error):
  rng = np.random.default_rng(8)
  task, problems = made(300, min_size=3, max_size=8)
  seen = 0
  for problem in problems:
    before = problem.steps[: rng.integers(len(problem.steps) - 1)]
    wrong = "ca4" if error == "malformed" else task.inject(problem, before, error, rng)
    if wrong is None or task.check(problem, before, wrong).error != error:
      continue
    right = task.correction(problem, before, wrong)
    assert task.check(problem, before, right) == tasks.RIGHT
    name, operands = right[0], problem.facts.operands[right[0]]
    assert task.explain(problem, before, wrong, "recompute").endswith(name + "".join(operands))
    seen += 1
  assert seen > 150


@pytest.mark.parametrize(
  ("before", "wrong", "right"),
  [
    ((), "ca4b3c8\n", "ca4b3c7\n"),
    ((), "dc5a4d9\n", "ca4b3c7\n"),  # too early for d: c comes first
    (("ca4b3c7\n",), "rubbish", "dc7a4d1\n"),
  ],
)
def test_the_correction_is_about_the_same_quantity_where_it_can_come_now(before, wrong, right):
  task, problem = fixed_problem()
  assert task.correction(problem, before, wrong) == right


@pytest.mark.parametrize("error", ["early", "value", "calc", "copy"])
def test_an_injected_mistake_is_wrong_in_its_own_way_only(error):
  rng = np.random.default_rng(7)
  task, problems = made(200)
  for problem in problems:
    before = problem.steps[: rng.integers(len(problem.steps))]
    wrong = task.inject(problem, before, error, rng)
    if wrong is None:
      continue
    read, facts = _read(wrong, 10), problem.facts
    stated = {_read(step, 10).name for step in before}
    untrue = [name for name, value in zip(read.operands, read.values, strict=True) if facts.value[name] != value]
    early = [name for name in read.operands if name in facts.operands and name not in stated]
    assert (sorted(read.operands) == sorted(facts.operands[read.name])) == (error != "copy")
    assert (sum(read.values) % 10 == read.result) == (error != "calc")
    assert read.name not in stated
    assert bool(early) == (error == "early")
    assert untrue == early if error != "value" else len(untrue) == 1


def test_any_valid_order_is_right():
  facts = Facts("e", {"c": ("a", "b"), "d": ("b", "b"), "e": ("c", "d")}, {"a": 4, "b": 3, "c": 7, "d": 6, "e": 3})
  task, _ = made(0)
  problem = tasks.Problem("cab;a4;dbb;b3;ecd?e:\n", ("ca4b3c7\n", "db3b3d6\n", "ec7d6e3\n"), "3", "k", facts)
  for order in ((0, 1, 2), (1, 0, 2)):
    steps = tuple(problem.steps[k] for k in order)
    assert [task.check(problem, steps[:k], step) for k, step in enumerate(steps)] == [tasks.RIGHT] * 3
    assert task.answer_of(problem, steps) == problem.answer
  assert task.check(problem, (), problem.steps[2]).kind == "unverified"


def test_a_wrong_answer_is_read_as_it_stands():
  task, problem = fixed_problem()
  assert task.answer_of(problem, ("ca4b3c7\n", "dc7a4d2\n")) == "2"
  assert task.answer_of(problem, ("ca4b3c7\n", "rubbish")) is None


@pytest.mark.parametrize("modulus", [10, 23])
def test_symbols_cut_every_text_of_the_task_in_one_way(modulus):
  rng = np.random.default_rng(6)
  task, problems = made(200, modulus=modulus)
  longest_first = sorted(task.symbols, key=len, reverse=True)
  pattern = re.compile("|".join(map(re.escape, longest_first)))
  assert len(set(task.symbols)) == len(task.symbols)
  for problem in problems:
    assert all(len(pattern.findall(step)) == 8 for step in problem.steps)
    wrong = task.inject(problem, (), "value", rng)
    for text in (problem.prompt, *problem.steps, task.explain(problem, (), wrong, "recompute")):
      assert "".join(pattern.findall(text)) == text
    for error in task.error_classes:
      k = rng.integers(len(problem.steps))
      wrong = task.inject(problem, problem.steps[:k], error, rng)
      if wrong is not None and task.check(problem, problem.steps[:k], wrong).error == error:
        reason = task.explain(problem, problem.steps[:k], wrong, "recompute")
        words = pattern.findall(reason)
        assert "".join(words) == reason
        assert words[0] == error
        assert 2 <= len(words) <= 3 + 3 * len(problem.facts.operands)


def test_copies_with_other_names_or_order_share_a_key_and_other_values_do_not():
  assert _key([[], [], [0, 1], [2, 0]], [4, 3, 7, 1]) == _key([[], [], [1, 0], [1, 2]], [3, 4, 7, 1])
  assert _key([[], [], [0, 1], [2, 0]], [4, 3, 7, 1]) != _key([[], [], [0, 1], [2, 1]], [4, 3, 7, 1])
  assert _key([[], [], [0, 1], [2, 0]], [4, 3, 7, 1]) != _key([[], [], [0, 1], [2, 0]], [5, 3, 8, 3])


@pytest.mark.parametrize(
  "sizes",
  [
    {"min_size": 0, "max_size": 3, "modulus": 10},
    {"min_size": 1, "max_size": MAX_SIZE + 1, "modulus": 10},
    {"min_size": 1, "max_size": 3, "modulus": 0},
    {"min_size": 1, "max_size": 3, "modulus": 1},
  ],
)
def test_sizes_and_moduli_it_cannot_have_are_refused(sizes):
  with pytest.raises(InputError):
    graph(**sizes)

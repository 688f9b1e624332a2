"""The multiplication task against plain arithmetic."""

import itertools
import re

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method import tasks
from insec_jax.method.tasks.multiplication import CALC, MAX_DIGITS, Facts, Multiplication, Step, _class_of, _columns

RESULTS = ("carry", "ten", "hundred", "near", "digit", "adjacent")
PROBLEM = tasks.Problem("47*86=\n", ("47*6=282\n", "47*80=3760\n", "282+3760=4042\n"), "4042", "k", Facts(47, 86))
THREE = tasks.Problem(
  "12*345=\n",
  ("12*5=60\n", "12*40=480\n", "12*300=3600\n", "60+480=540\n", "540+3600=4140\n"),
  "4140",
  "k",
  Facts(12, 345),
)


def multiplication(min_size=1, max_size=4):
  return tasks.get(TaskConfig(name="multiplication", min_size=min_size, max_size=max_size, modulus=0))


TASK = multiplication()


def made(num, seed=0, **sizes):
  task, rng = multiplication(**sizes), np.random.default_rng(seed)
  return [task.make(rng) for _ in range(num)]


def numbers(step):
  """Operands, sign and result of a step, read on their own."""
  first, sign, second, result = re.fullmatch(r"(\d+)([*+])(\d+)=(\d+)\n", step).groups()
  return int(first), sign, int(second), int(result)


def test_the_solution_is_right_step_by_step():
  for problem in made(300):
    a, b = map(int, problem.prompt.removesuffix("=\n").split("*"))
    assert len(str(a)) == len(str(b))
    stated, left = [], [int(digit) * 10**k for k, digit in enumerate(str(b)[::-1]) if digit != "0"]
    for k, step in enumerate(problem.steps):
      first, sign, second, result = numbers(step)
      if sign == "*":
        assert first == a
        left.remove(second)
        assert result == first * second
      else:
        assert not left
        stated.remove(first)
        stated.remove(second)
        assert result == first + second
      stated.append(result)
      assert TASK.check(problem, problem.steps[:k], step) == tasks.RIGHT
      assert TASK.next_step(problem, problem.steps[:k]) == step
    assert stated == [a * b]
    assert problem.answer == str(a * b) == TASK.answer_of(problem, problem.steps)
    assert TASK.next_step(problem, problem.steps) is None


def test_sizes_are_numbers_of_digits():
  for sizes in ((4, 4), (1, 3)):
    found = {len(problem.prompt) for problem in made(60, min_size=sizes[0], max_size=sizes[1])}
    assert found == {2 * size + len("*=\n") for size in range(sizes[0], sizes[1] + 1)}


@pytest.mark.parametrize(
  ("text", "columns"),
  [
    ((47, "*", 80), [(1, 56), (2, 37)]),
    ((282, "+", 3760), [(0, 2), (1, 14), (2, 10), (3, 4)]),
    ((95, "+", 7), [(0, 12), (1, 10)]),
    ((3, "*", 9), [(0, 27)]),
  ],
)
def test_columns_carry_from_the_last_place_on(text, columns):
  assert _columns(*text) == columns


def test_columns_come_to_the_result():
  rng = np.random.default_rng(0)
  for _ in range(300):
    first, second = rng.integers(1, 10**5, 2).tolist()
    part = int(rng.integers(1, 10)) * 10 ** int(rng.integers(4))
    for step in (Step(first, "+", second, 0), Step(first, "*", part, 0)):
      columns = _columns(*step[:3])
      *written, (place, last) = columns
      assert sum(value % 10 * 10**at for at, value in written) + last * 10**place == step.true


@pytest.mark.parametrize(
  ("step", "error"),
  [
    ((47, "*", 80, 3260), "carry"),  # 4*8 = 32 without the 5
    ((282, "+", 3760, 3942), "carry"),  # hundreds: 2 + 7 without the 1; 100 too little as well
    ((282, "+", 3760, 3042), "carry"),  # thousands
    ((282, "+", 3760, 4052), "ten"),
    ((282, "+", 3760, 4032), "ten"),
    ((95, "+", 7, 92), "carry"),  # 10 too little, because a carry is forgotten
    ((95, "+", 7, 2), "carry"),  # of the last column
    ((47, "*", 80, 760), "carry"),
    ((95, "+", 7, 112), "ten"),
    ((282, "+", 3760, 4142), "hundred"),
    ((282, "+", 3760, 2042), "near"),
    ((282, "+", 3760, 4044), "near"),
    ((282, "+", 3760, 4043), "digit"),
    ((282, "+", 3760, 4082), "digit"),
    ((282, "+", 3760, 4024), "adjacent"),  # swapped
    ((282, "+", 3760, 4171), "calc"),  # three digits
    ((282, "+", 3760, 4119), "calc"),
    ((282, "+", 3760, 4952), "adjacent"),
    ((282, "+", 3760, 5043), "calc"),  # two digits, not side by side
    ((282, "+", 3760, 404), "calc"),
    ((282, "+", 3760, 40420), "calc"),
  ],
)
def test_the_class_of_a_wrong_result(step, error):
  assert _class_of(Step(*step)) == error


def test_the_class_of_a_wrong_result_is_the_first_that_fits():
  def fits(right, said, step):
    """Each class by itself, said in another way than the code says it."""
    forgotten, carry = set(), 0
    if step.sign == "+":
      for place in range(len(str(max(step.first, step.second)))):
        carry = (step.first // 10**place % 10 + step.second // 10**place % 10 + carry) // 10
        forgotten |= {right - carry * 10 ** (place + 1)} if carry else set()
    pairs = list(zip(str(right), str(said), strict=True)) if len(str(right)) == len(str(said)) else []
    changed = "".join("x" if a != b else "." for a, b in pairs).strip(".")
    far = [abs(int(a) - int(b)) for a, b in pairs if a != b]
    return {
      "carry": said in forgotten,
      "ten": abs(right - said) == 10,
      "hundred": abs(right - said) == 100,
      "near": far == [2],
      "digit": changed == "x",
      "adjacent": changed == "xx",
      "calc": True,
    }

  for first, second in ((95, 7), (28, 376), (999, 1), (50, 50)):
    step = Step(first, "+", second, 0)
    for said in range(2 * step.true + 200):
      if said != step.true:
        found = fits(step.true, said, step)
        assert _class_of(step._replace(result=said)) == next(error for error in (*RESULTS, "calc") if found[error])


@pytest.mark.parametrize("error", Multiplication.error_classes)
def test_every_injected_mistake_is_wrong_and_of_its_class(error):
  rng = np.random.default_rng(1)
  found = 0
  for problem in made(300, seed=2, max_size=5):
    before = problem.steps[: rng.integers(len(problem.steps))]
    wrong = TASK.inject(problem, before, error, rng)
    if wrong is None:
      continue
    found += 1
    assert TASK.check(problem, before, wrong) == tasks.Verdict("wrong", error)
    assert wrong not in problem.steps or error == "repeat"
    first, sign, second, result = numbers(wrong)
    holds = result == (first * second if sign == "*" else first + second)
    assert holds == (error in ("copy", "repeat"))
    right = numbers(problem.steps[len(before)])
    assert ((first, sign, second) == right[:3]) == (error in RESULTS)
  assert found > 150


@pytest.mark.parametrize(
  ("before", "step", "kind", "error"),
  [
    ((), "47*6=282\n", "right", ""),
    ((), "47*80=3760\n", "right", ""),  # any order
    ((), "80*47=3760\n", "right", ""),
    (("47*80=3760\n", "47*6=282\n"), "3760+282=4042\n", "right", ""),
    ((), "47*6=292\n", "wrong", "ten"),
    ((), "6*47=292\n", "wrong", "ten"),
    ((), "47*6=242\n", "wrong", "carry"),
    ((), "47*8=376\n", "wrong", "copy"),  # the place is missing
    ((), "46*6=276\n", "wrong", "copy"),
    ((), "282+3760=4042\n", "unverified", ""),  # true, but nothing of it is stated yet
    ((), "282+3760=4043\n", "wrong", "copy"),
    ((), "47*86=4042\n", "unverified", ""),  # all at once
    ((), "47*86=4043\n", "wrong", "copy"),
    ((), "86*7=602\n", "unverified", ""),  # the other number taken apart
    ((), "47*0=0\n", "wrong", "copy"),
    ((), "0+0=0\n", "wrong", "copy"),
    ((), "47+6=53\n", "wrong", "copy"),
    (PROBLEM.steps[:2], "282+282=564\n", "wrong", "copy"),
    (PROBLEM.steps[:2], "282+3860=4142\n", "wrong", "copy"),
    (("47*6=292\n", "47*80=3760\n"), "292+3760=4052\n", "wrong", "copy"),  # built on a wrong step that stands
    (("47*6=292\n", "47*80=3760\n"), "282+3760=4042\n", "right", ""),
    (("47*6=292\n",), "47*6=282\n", "right", ""),  # a wrong statement put right is no repeat
    (("47*6=292\n",), "47*6=292\n", "wrong", "ten"),
    (("47*6=282\n",), "47*6=282\n", "wrong", "repeat"),
    (("47*6=282\n",), "6*47=282\n", "wrong", "repeat"),
    (PROBLEM.steps, "3760+282=4042\n", "wrong", "repeat"),
    ((), "47*06=282\n", "wrong", "malformed"),
    ((), "47*6=0282\n", "wrong", "malformed"),
    ((), "47*6=\n", "wrong", "malformed"),
    ((), "47*6=282", "wrong", "malformed"),
    ((), "47-6=41\n", "wrong", "malformed"),
    ((), "4\u0667*6=282\n", "wrong", "malformed"),
    ((), "", "wrong", "malformed"),
  ],
)
def test_verdicts_one_by_one(before, step, kind, error):
  verdict = TASK.check(PROBLEM, before, step)
  assert (verdict.kind, verdict.error) == (kind, error)


def test_any_valid_order_is_right_and_leads_to_the_answer():
  right = 0
  for order in itertools.permutations((*THREE.steps[:3], "60+3600=3660\n", "3660+480=4140\n")):
    kinds = [TASK.check(THREE, order[:k], step).kind for k, step in enumerate(order)]
    assert "wrong" not in kinds  # every number is true
    valid = max(order.index("12*5=60\n"), order.index("12*300=3600\n")) < order.index("60+3600=3660\n") and max(
      order.index("60+3600=3660\n"), order.index("12*40=480\n")
    ) < order.index("3660+480=4140\n")
    assert valid == (kinds == ["right"] * 5)
    right += valid
    if valid:
      assert TASK.answer_of(THREE, order) == "4140"
      assert all(TASK.check(THREE, order[:k], TASK.next_step(THREE, order[:k])) == tasks.RIGHT for k in range(5))
      assert TASK.next_step(THREE, order) is None
  assert right > 5


@pytest.mark.parametrize(
  ("before", "wrong", "label", "recompute"),
  [
    ((), "47*80=3660\n", "hundred3660", "hundred56,37"),
    ((), "80*47=3660\n", "hundred3660", "hundred56,37"),
    (PROBLEM.steps[:2], "282+3760=4043\n", "digit4043", "digit2,14,10,4"),
    ((), "47*6=999\n", "calc999", "calc42,28"),
    ((), "46*6=276\n", "copy46", "copy47*6"),
    ((), "47*8=376\n", "copy8", "copy47*6"),
    (PROBLEM.steps[:2], "292+3760=4052\n", "copy292", "copy282+3760"),
    (PROBLEM.steps, "4042+3=4045\n", "copy3", "copy3"),
    (PROBLEM.steps[:1], "47*6=282\n", "repeat282", "repeat47*6=282"),
    ((), "47*", "malformed", "malformed"),
  ],
)
def test_reasons_say_what_is_wrong_and_recompute_it(before, wrong, label, recompute):
  assert TASK.explain(PROBLEM, before, wrong, "label") == label
  assert TASK.explain(PROBLEM, before, wrong, "recompute") == recompute


@pytest.mark.parametrize(
  ("before", "wrong", "right"),
  [
    ((), "47*6=292\n", "47*6=282\n"),
    ((), "47*80=3660\n", "47*80=3760\n"),  # about the same product, which can come now
    (PROBLEM.steps[:2], "3760+282=4043\n", "3760+282=4042\n"),
    ((), "282+3760=4043\n", "47*6=282\n"),  # it cannot come yet
    (PROBLEM.steps[:1], "47*6=282\n", "47*80=3760\n"),
    (PROBLEM.steps[:1], "rubbish", "47*80=3760\n"),
    (PROBLEM.steps, "rubbish", None),
  ],
)
def test_the_correction_is_about_the_same_quantity_where_it_can_come_now(before, wrong, right):
  assert TASK.correction(PROBLEM, before, wrong) == right


def test_the_answer_is_the_last_result_right_or_wrong_once_all_is_done():
  assert TASK.answer_of(PROBLEM, PROBLEM.steps[:2]) is None
  assert TASK.answer_of(PROBLEM, ("47*6=282\n", "47*6=282\n", "47*80=3760\n")) is None
  assert TASK.answer_of(PROBLEM, ("47*6=292\n", "47*80=3760\n", "292+3760=4052\n")) == "4052"
  assert TASK.answer_of(PROBLEM, ("47*6=292\n", "rubbish", "292+3760=4052\n")) is None


def test_symbols_cut_every_text_of_the_task_in_one_way():
  rng = np.random.default_rng(6)
  pattern = re.compile("|".join(map(re.escape, sorted(TASK.symbols, key=len, reverse=True))))
  assert len(set(TASK.symbols)) == len(TASK.symbols)
  assert CALC in TASK.symbols
  for problem in made(60):
    before = problem.steps[: rng.integers(len(problem.steps))]
    texts = [problem.prompt, *problem.steps]
    for error in TASK.error_classes:
      if (wrong := TASK.inject(problem, before, error, rng)) is not None:
        texts += [TASK.explain(problem, before, wrong, detail) for detail in ("label", "recompute")]
    assert all("".join(pattern.findall(text)) == text for text in texts)


@pytest.mark.parametrize("changes", [{"modulus": 10}, {"min_size": 0}, {"max_size": MAX_DIGITS + 1}])
def test_sizes_and_settings_it_cannot_have_are_refused(changes):
  with pytest.raises(InputError, match="multiplication"):
    tasks.get(TaskConfig(**{"name": "multiplication", "min_size": 1, "max_size": 4, "modulus": 0, **changes}))

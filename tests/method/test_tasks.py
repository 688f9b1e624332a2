"""Splits and sets of problems."""

import collections
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import string
import subprocess
import sys

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.config import TASKS, TaskConfig
from insec_jax.method import tasks
from insec_jax.method.tasks import graph, sudoku

GRAPH = tasks.get(TaskConfig(name="graph", min_size=2, max_size=4, modulus=10))
ROOT = pathlib.Path(tasks.__file__).parents[3]
SPLITS = ("train", "mine", "validation", "probe", "test")
MADE = ("english", "graph", "grounded", "instructions", "multiplication", "sudoku")  # tasks that make their problems


def made_by(name, size=4):
  size, modulus = 0 if name == "gsm8k" else size, 10 if name == "graph" else 0
  return tasks.get(TaskConfig(name=name, min_size=min(size, 2), max_size=size, modulus=modulus))


@pytest.mark.parametrize("name", sorted({*MADE} - {"english"}))
def test_a_prompt_gives_its_problem_back(name):
  task = made_by(name)
  for problem in tasks.problems(task, "mine", num=30, seed=0):
    found = task.problem_of(problem.prompt)
    assert dataclasses.replace(found, steps=()) == dataclasses.replace(problem, steps=())
    assert sorted(found.steps) == sorted(problem.steps)
    assert all(task.check(found, found.steps[:k], step) == tasks.RIGHT for k, step in enumerate(found.steps))
  for prompt in ("", "?\n", "a1?\n", "12*=\n", "aab?a:\n", "ab1;c?", "a1;b2;cab?a:\n"):
    assert task.problem_of(prompt) is None


def test_splits_have_their_shares():
  found = collections.Counter(tasks.split_of(f"key {k}") for k in range(4000))
  assert [round(found[name] / 4000, 2) for name in SPLITS] == pytest.approx([0.7, 0.05, 0.05, 0.1, 0.1], abs=0.012)


def test_a_key_stays_in_its_split_for_ever():
  assert [tasks.split_of(f"key {k}") for k in (0, 1, 2, 9, 28)] == ["test", "train", "mine", "probe", "validation"]


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


def test_one_seed_gives_the_same_problems_and_a_longer_list_begins_as_a_shorter():
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


@pytest.mark.parametrize("name", sorted({*MADE} - {"instructions"}))
def test_sentences_of_a_symbolic_task_are_its_lines(name):
  task = made_by(name)
  for problem in tasks.problems(task, "train", num=20, seed=0):
    assert tasks.in_units(problem, "sentence").steps == problem.steps == tasks.in_units(problem, "line").steps


def test_the_tasks_are_the_modules_of_the_folder_that_hold_one():
  assert set(TASKS) == {*MADE, "gsm8k", "records"}
  for name in (*MADE, "gsm8k"):
    task = made_by(name)
    assert isinstance(task, tasks.Task)
    assert task.name == name


def test_a_task_that_leaves_one_of_the_four_functions_out_cannot_be_made():
  class Silent(type(GRAPH)):
    explain = tasks.Task.explain

  with pytest.raises(TypeError, match="explain"):
    Silent(TaskConfig(name="graph", min_size=1, max_size=1, modulus=10))
  assert tasks.Task.__abstractmethods__ == {"make", "check", "inject", "explain"}


class Counting(tasks.Task):
  """Counts up, with nothing of its own but the four functions; its solution may say the same step twice."""

  name = "counting"
  error_classes = ("off",)
  symbols = tuple("0123456789\n")

  def make(self, rng):
    size = int(rng.integers(self.min_size, self.max_size + 1))
    steps = tuple(f"{k % 3}\n" for k in range(size))
    return tasks.Problem(f"{size}\n", steps, steps[-1].strip(), str(size), None)

  def check(self, problem, before, step):
    return tasks.RIGHT if step == self.next_step(problem, before) else tasks.Verdict("wrong", "off")

  def inject(self, problem, before, error, rng):  # noqa: ARG002
    return "9\n"

  def explain(self, problem, before, wrong, detail):  # noqa: ARG002
    return "off"


def test_a_task_of_four_functions_has_the_others_for_a_solution_of_one_order():
  task = Counting(TaskConfig(name="graph", min_size=5, max_size=5, modulus=0))
  problem = task.make(np.random.default_rng(0))
  assert problem.steps == ("0\n", "1\n", "2\n", "0\n", "1\n")
  for k, step in enumerate(problem.steps):
    assert task.next_step(problem, problem.steps[:k]) == task.correction(problem, problem.steps[:k], "9\n") == step
    assert task.answer_of(problem, problem.steps[:k]) is None
  assert task.next_step(problem, problem.steps) is None
  assert task.next_step(problem, ("9\n", "0\n")) == "1\n"  # a wrong step that stands does not count
  assert task.answer_of(problem, problem.steps) == problem.answer == "1"
  assert task.answer_of(problem, (*problem.steps[:4], "9\n")) == "9"


@pytest.mark.parametrize("wrong", [{"modulus": 10}, {"min_size": 0}])
def test_a_task_that_takes_only_sizes_refuses_the_rest(wrong):
  with pytest.raises(InputError, match=f"{next(iter(wrong))}=.*counting takes"):
    Counting(TaskConfig(**{"name": "graph", "min_size": 1, "max_size": 4, "modulus": 0, **wrong}))


def renamed_and_reshuffled(problem, rng):
  """A graph problem with other names, its definitions in another order and each operand pair turned or not."""
  body, asked = problem.prompt.removesuffix(":\n").split("?")
  names = dict(zip(string.ascii_lowercase, rng.permutation(list(string.ascii_lowercase)).tolist(), strict=True))
  definitions = ["".join(names.get(sign, sign) for sign in definition) for definition in body.split(";")]
  turned = [text[0] + text[:0:-1] if text[1].isalpha() and rng.random() < 0.5 else text for text in definitions]
  return ";".join(rng.permutation(turned).tolist()) + f"?{names[asked]}:\n"


def graph_key(prompt, modulus=10):
  """The key of the problem of that prompt, which the task itself only gives when it makes one."""
  body, asked = prompt.removesuffix(":\n").split("?")
  definitions = {text[0]: text[1:] for text in body.split(";")}
  names = [name for name, text in definitions.items() if text.isdigit()]

  def reach(name):
    if name not in names:
      for other in definitions[name]:
        reach(other)
      names.append(name)

  reach(asked)
  reads = [[names.index(other) for other in definitions[name] if other.isalpha()] for name in names]
  values = []
  for name, pair in zip(names, reads, strict=True):
    values.append(sum(values[k] for k in pair) % modulus if pair else int(definitions[name]))
  return graph._key(reads, values)


def test_renamed_and_reshuffled_graphs_fall_in_one_split():
  rng = np.random.default_rng(0)
  task = tasks.get(TaskConfig(name="graph", min_size=1, max_size=6, modulus=10))
  for split in SPLITS:
    for problem in tasks.problems(task, split, num=40, seed=0):
      copy = renamed_and_reshuffled(problem, rng)
      assert copy != problem.prompt
      assert graph_key(copy) == problem.key
      assert tasks.split_of(graph_key(copy)) == split


def test_moved_and_renamed_sudokus_fall_in_one_split():
  rng = np.random.default_rng(0)
  for split in SPLITS:
    for problem in tasks.problems(made_by("sudoku"), split, num=20, seed=0):
      square = np.arange(16).reshape(2, 2, 2, 2)  # band, row in it, stack, column in it
      cells = square[rng.permutation(2)][:, rng.permutation(2)][:, :, rng.permutation(2)][..., rng.permutation(2)]
      cells = (cells.reshape(4, 4).T if rng.random() < 0.5 else cells).ravel()
      names = np.concatenate([[0], rng.permutation([1, 2, 3, 4])])
      grid = names[np.array(problem.facts.grid)[cells]]
      givens = frozenset(k for k in range(16) if cells[k] in problem.facts.givens)
      assert tasks.split_of(sudoku._key(grid, givens)) == split


def test_the_same_factors_in_another_order_fall_in_one_split():
  task = made_by("multiplication", size=2)
  keys, prompts = {}, set()
  for seed in range(3000):
    problem = task.make(np.random.default_rng(seed))
    prompts.add(problem.prompt)
    numbers = problem.prompt.removesuffix("=\n").split("*")
    keys.setdefault(tuple(sorted(numbers)), set()).add((problem.key, tasks.split_of(problem.key)))
  assert all(len(found) == 1 for found in keys.values())
  assert len(keys) < len(prompts)  # some came in several orders


OWN = """
import collections
import numpy as np
from insec_jax.config import MistakesConfig, TaskConfig
from insec_jax.method import tasks
from insec_jax.method.mistakes import with_mistakes
from insec_jax.method.roles import CORRECTION, MISTAKE, TEXT
from insec_jax.method.transcript import Markers, clean

task = tasks.get(TaskConfig(name="collatz", min_size=3, max_size=6, modulus=0))
config = MistakesConfig(source="injected", share=1.0, max_per_solution=2, classes=(),
                        reason="recompute", unit="line", mined=0.0, mined_path="")
rng, seen = np.random.default_rng(0), collections.Counter()
for split in ("train", "mine", "validation", "probe", "test"):
  for problem in tasks.problems(task, split, num=30, seed=0):
    assert task.answer_of(problem, problem.steps) == problem.answer
    assert task.check(problem, (), "rubbish").kind == "wrong"
    assert all(task.inject(problem, problem.steps, error, rng) is None for error in task.error_classes)
    transcript, before = with_mistakes(problem, task, config, Markers("<err>", "<fix>"), rng), []
    assert clean(transcript) == problem.prompt + "".join(problem.steps)
    for piece in transcript:
      if piece.role == MISTAKE:
        verdict = task.check(problem, tuple(before), piece.text)
        assert verdict.kind == "wrong" and task.explain(problem, before, piece.text, "label").startswith(verdict.error)
        seen[verdict.error] += 1
      elif piece.role in (TEXT, CORRECTION):
        for step in piece.text.splitlines(keepends=True):
          assert task.check(problem, tuple(before), step) == tasks.RIGHT
          before.append(step)
assert min(seen["rule"], seen["off"]) > 50, seen
print(tasks.__file__)
"""


def test_the_task_that_the_readme_shows_is_one_file_of_40_lines_that_works(tmp_path):
  section = (ROOT / "insec_jax" / "README.md").read_text().split("\n## A task of your own\n")[1].split("\n## ")[0]
  (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
  (command,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
  assert code.count("\n") <= 40
  for folder in ("insec_jax", "configs"):
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
  (tmp_path / "insec_jax/method/tasks/collatz.py").write_text(code)
  arguments = shlex.split(command.replace("\\\n", " "))
  assert arguments[0] == "python"
  for said in (["-c", OWN], arguments[1:]):
    done = subprocess.run(
      [sys.executable, *said],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      check=False,
      env={**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("collatz problem 0" if "insec_jax.preview" in said else str(tmp_path)) in done.stdout

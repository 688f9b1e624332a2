"""Tasks: problems whose every step can be checked, and the wrong steps that can be injected.

A task is one module of this folder, whose name is the task's: a subclass of `Task`, and `TASK = ` that class.
"""

import abc
import dataclasses
import hashlib
import importlib
from typing import Generic, TypeVar

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import TASKS, TaskConfig
from insec_jax.method.transcript import split_steps

MALFORMED = "malformed"  # class of a step that cannot be parsed: only models write these, none is injected
_PARTS = (("train", 0.7), ("mine", 0.1), ("probe", 0.1), ("test", 0.1))  # of the range of the hash
_SPLITS = ("train", "mine", "validation", "probe", "test")
_MAX_TRIES = 200  # draws for each problem asked for
_MAX_MISSES = 100_000  # draws in a row without a new problem: few or none are left
FactsT = TypeVar("FactsT")


@dataclasses.dataclass(frozen=True)
class Problem(Generic[FactsT]):
  """A problem with its solution; `prompt + "".join(steps)` is the whole text, and each step ends in a newline.

  `key` identifies the problem (two problems with one key are in one split); the task alone defines and reads `facts`.
  """

  prompt: str
  steps: tuple[str, ...]
  answer: str
  key: str
  facts: FactsT


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A step's grade.

  right   true, and useful for the answer
  unverified   not wrong, but not confirmed either: true by chance, or beyond what the task can check.
          Never injected as a mistake, never a false alarm when flagged, counted on its own
  wrong   wrong by the rules of the task, malformed or a repeat; `error` is the class, "" for the other two kinds
  """

  kind: str
  error: str


RIGHT, UNVERIFIED = Verdict("right", ""), Verdict("unverified", "")


class Task(abc.ABC, Generic[FactsT]):
  """Interface of a task. `before` are the accepted or corrected steps before the one in question.

  A task implements make, check, inject and explain; the other methods have defaults for a solution with one order.
  """

  name: str
  error_classes: tuple[str, ...]  # those that can be injected
  symbols: tuple[str, ...] | None  # vocabulary of a tokenizer built for the task; None: the text needs a real tokenizer
  units: tuple[str, ...] = ("line",)  # units of a step that the task supports
  # Classes of a wrong answer. A mined one needs right steps before it, and its reason does not state the right answer.
  answer_classes: tuple[str, ...] = ()

  def __init__(self, task: TaskConfig):
    """Check the settings of a task that has sizes only; a task with more settings or bounds overrides this."""
    if task.modulus or task.min_size < 1:
      raise InputError(
        f"task.modulus={task.modulus} task.min_size={task.min_size}; {self.name} takes modulus 0 and a min_size of at "
        "least 1"
      )
    self.min_size, self.max_size = task.min_size, task.max_size

  @abc.abstractmethod
  def make(self, rng: np.random.Generator) -> Problem[FactsT]:
    """Return a new problem."""

  @abc.abstractmethod
  def check(self, problem: Problem[FactsT], before: tuple[str, ...], step: str) -> Verdict:
    """Return the verdict on `step` after `before`; steps may come in any valid order."""

  @abc.abstractmethod
  def inject(
    self, problem: Problem[FactsT], before: tuple[str, ...], error: str, rng: np.random.Generator
  ) -> str | None:
    """Return a wrong step of class `error` in place of the next one; None where there is none."""

  @abc.abstractmethod
  def explain(self, problem: Problem[FactsT], before: tuple[str, ...], wrong: str, detail: str) -> str:
    """Return what is wrong with a wrong step: "label" names it, "recompute" also corrects it."""

  def next_step(self, problem: Problem[FactsT], before: tuple[str, ...]) -> str | None:
    """Return the right next step; None when the problem is solved.

    The default is the first step of the solution that is not in `before`.
    """
    left = list(problem.steps)
    for step in before:
      if step in left:
        left.remove(step)
    return left[0] if left else None

  def correction(self, problem: Problem[FactsT], before: tuple[str, ...], wrong: str) -> str | None:
    """Return the right step in place of `wrong`: of the same quantity if it can come now, else the next step."""
    del wrong
    return self.next_step(problem, before)

  def structure(self, problem: Problem[FactsT]) -> str:
    """Return the name of the structure class: problems that differ only in labels, order or numbers share it.

    The default is the prompt: each problem is a class of its own.
    """
    return problem.prompt

  def locate(self, problem: Problem[FactsT], step: str) -> str:
    """Return the class of an unverified step that is taken as wrong if the answer after it is wrong; "" for none.

    Only mining asks, for the first such step of a solution. The default takes none as wrong.
    """
    del problem, step
    return ""

  def problem_of(self, prompt: str) -> Problem[FactsT] | None:
    """Return the problem that `make` gives this prompt, its steps in any right order; None where it does not say."""
    del prompt
    return None

  def answer_of(self, problem: Problem[FactsT], steps: tuple[str, ...]) -> str | None:
    """Return the final answer that the steps state, right or wrong, to compare with `problem.answer`; None if none.

    The default is the last step, once there are as many steps as in the solution.
    """
    return steps[-1].strip() if len(steps) >= len(problem.steps) else None


def get(task: TaskConfig) -> Task:
  """Return the task that the config names; raise InputError for sizes or a modulus that it does not support."""
  if task.name == "records":
    checked = ", ".join(name for name in TASKS if name != "records")
    raise InputError(f"task.name='records' has no step checker; one of {checked} is needed here")
  # Imported here: each task module imports Problem from this one.
  return importlib.import_module(f"{__name__}.{task.name}").TASK(task)


def split_of(key: str) -> str:
  """Return the split of the problem with this key, by hash.

  70 % are "train", 5 % each "mine" and "validation", 10 % each "probe" and "test".
  """
  position = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
  for name, size in _PARTS:
    if position < size:
      return "validation" if name == "mine" and position >= size / 2 else name
    position -= size
  return _PARTS[-1][0]


def problems(task: Task, split: str, *, num: int, seed: int) -> list[Problem]:
  """Return `num` problems of the split with different prompts.

  The same seed gives the same problems, and a longer list begins with the shorter one. Prompts differ, not keys:
  otherwise small problems, which are few, would be rare. No key is in two splits.
  Raises InputError when the task has too few different problems.
  """
  if split not in _SPLITS:
    raise InputError(f"split {split!r}; must be one of {', '.join(_SPLITS)}")
  rng = np.random.default_rng((seed, *split.encode()))
  problem_of_prompt: dict[str, Problem] = {}
  misses = 0
  for _ in range(_MAX_TRIES * num):
    if len(problem_of_prompt) == num or misses == _MAX_MISSES:
      break
    problem = task.make(rng)
    misses += 1
    if problem.prompt not in problem_of_prompt and split_of(problem.key) == split:
      problem_of_prompt[problem.prompt] = problem
      misses = 0
  if len(problem_of_prompt) < num:
    raise InputError(
      f"task {task.name} gave only {len(problem_of_prompt)} different problems of split {split!r}, {num} are "
      "needed; ask for fewer, or for larger sizes or numbers"
    )
  return list(problem_of_prompt.values())


def in_units(problem: Problem, unit: str) -> Problem:
  """Return the same problem with its solution cut into steps of that unit."""
  if unit == "line":
    return problem
  return dataclasses.replace(problem, steps=split_steps("".join(problem.steps), unit))

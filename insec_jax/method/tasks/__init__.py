"""Tasks: problems whose every step can be checked, and the wrong steps that can be put in them.

A task is one module of this folder, whose name is the task's: a class that fills in `Task`, and `TASK = ` that class.
"""

import abc
import dataclasses
import hashlib
import importlib

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import TASKS, TaskConfig
from insec_jax.method.transcript import split_steps

MALFORMED = "malformed"  # class of a step that cannot be read: only a model writes these, none is injected
_SPLITS = (("train", 0.7), ("mine", 0.1), ("probe", 0.1), ("test", 0.1))
_MAX_TRIES = 200  # draws for each problem asked for
_MAX_MISSES = 100_000  # draws in a row without a new problem: few or none are left


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem with its solution; `prompt + "".join(steps)` is the whole text, and each step ends in a newline.

  `key` is what makes the problem that problem (two problems with one key are in one split); `facts` belong to the task.
  """

  prompt: str
  steps: tuple[str, ...]
  answer: str
  key: str
  facts: object


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a step is worth.

  right   true, and of use for the answer
  unverified   not wrong, but nothing vouches for it: true by chance, unneeded, or beyond what the task can check.
          Set apart everywhere: never injected as a mistake, never a false alarm when flagged, counted on its own
  wrong   numerically wrong, malformed or a repeat; `error` is the class, "" for the other two kinds
  """

  kind: str
  error: str


RIGHT, UNVERIFIED = Verdict("right", ""), Verdict("unverified", "")


class Task(abc.ABC):
  """What a task can do. `before` are the steps that stand (accepted or corrected) before the one in question.

  A task has to say how it makes, checks, spoils and explains; the rest is there, for a solution that has one order.
  """

  name: str
  error_classes: tuple[str, ...]  # those that can be injected
  symbols: tuple[str, ...] | None  # vocabulary of a tokenizer built for the task; None: the text needs a real tokenizer
  units: tuple[str, ...] = ("line",)  # what a step may be

  def __init__(self, task: TaskConfig):
    """For a task that has sizes and no more; one that has other settings, or bounds for them, checks them itself."""
    if task.modulus or task.unneeded or task.min_size < 1:
      raise InputError(
        f"task.modulus={task.modulus} task.unneeded={task.unneeded} task.min_size={task.min_size}; "
        f"{self.name} takes modulus 0, unneeded 0 and a min_size of at least 1"
      )
    self.min_size, self.max_size = task.min_size, task.max_size

  @abc.abstractmethod
  def make(self, rng: np.random.Generator) -> Problem:
    """A new problem."""

  @abc.abstractmethod
  def check(self, problem: Problem, before: tuple[str, ...], step: str) -> Verdict:
    """Whether `step` is right after `before`, in whatever valid order the steps come."""

  @abc.abstractmethod
  def inject(self, problem: Problem, before: tuple[str, ...], error: str, rng: np.random.Generator) -> str | None:
    """A wrong step of class `error` in place of the next one; None where there is none."""

  @abc.abstractmethod
  def explain(self, problem: Problem, before: tuple[str, ...], wrong: str, detail: str) -> str:
    """What is wrong with a wrong step: "label" names it, "recompute" also puts it right."""

  def next_step(self, problem: Problem, before: tuple[str, ...]) -> str | None:
    """The right next step, None when the problem is solved; here the first of the solution that does not stand."""
    left = list(problem.steps)
    for step in before:
      if step in left:
        left.remove(step)
    return left[0] if left else None

  def correction(self, problem: Problem, before: tuple[str, ...], wrong: str) -> str | None:
    """The right step in place of `wrong`: about the same quantity where it can come now, else the next step."""
    del wrong
    return self.next_step(problem, before)

  def answer_of(self, problem: Problem, steps: tuple[str, ...]) -> str | None:
    """The final answer that the steps state, right or wrong, to be compared with `problem.answer`; None: no answer.

    Here the last step as it stands, once there are as many as in the solution.
    """
    return steps[-1].strip() if len(steps) >= len(problem.steps) else None


def get(task: TaskConfig) -> Task:
  """The task that the config names; InputError for sizes or a modulus that it cannot have."""
  if task.name == "records":
    checked = ", ".join(name for name in TASKS if name != "records")
    raise InputError(f"task.name='records' has no step checker; one of {checked} is needed here")
  # Here, because each of them imports Problem from above.
  return importlib.import_module(f"{__name__}.{task.name}").TASK(task)


def split_of(key: str) -> str:
  """The split of the problem with this key: 70 % "train", 10 % each "mine", "probe" and "test"; disjoint by hash."""
  share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
  for name, size in _SPLITS:
    if share < size:
      return name
    share -= size
  return _SPLITS[-1][0]


def problems(task: Task, split: str, *, num: int, seed: int) -> list[Problem]:
  """`num` problems of the split with different prompts; the same for the same seed, a longer list begins as a shorter.

  Different by prompt and not by key, or small problems, of which there are few, would be rare; no key is in two splits.
  InputError when the task has too few different problems for that.
  """
  if split not in dict(_SPLITS):
    raise InputError(f"split {split!r}; must be one of {', '.join(dict(_SPLITS))}")
  rng = np.random.default_rng((seed, *split.encode()))
  found, misses = {}, 0
  for _ in range(_MAX_TRIES * num):
    if len(found) == num or misses == _MAX_MISSES:
      break
    problem = task.make(rng)
    misses += 1
    if problem.prompt not in found and split_of(problem.key) == split:
      found[problem.prompt] = problem
      misses = 0
  if len(found) < num:
    raise InputError(
      f"task {task.name} gave only {len(found)} different problems of split {split!r}, {num} are "
      "needed; ask for fewer, or for larger sizes or numbers"
    )
  return list(found.values())


def in_units(problem: Problem, unit: str) -> Problem:
  """The same problem with its solution cut into steps of that unit."""
  if unit == "line":
    return problem
  return dataclasses.replace(problem, steps=split_steps("".join(problem.steps), unit))

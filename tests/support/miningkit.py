"""What the tests of mining share: a config, its problems, and solutions of them."""

import dataclasses
import types

import datakit
import numpy as np

from insec_jax.data import vocabulary
from insec_jax.generation.generator import Completion
from insec_jax.method import mistakes, tasks
from insec_jax.method.transcript import Markers

CONFIG = datakit.config(
  task__name="graph",
  task__min_size=3,
  task__max_size=4,
  task__modulus=10,
  data__path="",
  data__num_records=1,
  mistakes__source="injected",
  evaluate__batch_size=4,
  mine__num_problems=24,
  mine__samples=2,
)
TASK = tasks.get(CONFIG.task)
MARKERS = Markers(CONFIG.tokenizer.flag, CONFIG.tokenizer.fix)
TOKENIZER = vocabulary.open_tokenizer(CONFIG).tokenizer
PROBLEMS = tasks.problems(TASK, "mine", num=24, seed=0)
CLASSES = ("early", "value", "calc", "copy", "repeat")


def said(text, finish="stop"):
  return Completion(text, types.SimpleNamespace(finish=finish, tokens=text))


def right(problem, _=0):
  return "".join(problem.steps)


def wrong(problem, sample, error=None):
  """A solution with one wrong step, and some steps after it."""
  number = PROBLEMS.index(problem)
  only = dataclasses.replace(CONFIG.mistakes, classes=(error or CLASSES[number % 5],))
  probe = mistakes.probe(problem, TASK, only, np.random.default_rng((number, sample)))
  return "".join((*probe.before, probe.wrong, *problem.steps[len(probe.before) + 1 :]))


PROBLEM = next(problem for problem in PROBLEMS if len(problem.steps) == 3)
FIRST, SECOND, THIRD = PROBLEM.steps
CALC = wrong(PROBLEM, 0, "calc")

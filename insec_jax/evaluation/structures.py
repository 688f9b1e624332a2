"""Structure classes of the problems that a model solves: the groups in which their outcomes are alike.

Problems of one class differ only in labels, order or numbers, so they are no independent draws of a problem.
"""

import hashlib
from collections.abc import Sequence

from insec_jax.method.tasks import Problem, Task

SOLVED, LARGER = "solutions", "solutions, larger"  # the two sets of problems that sources are of


def by_source(task: Task, problems: Sequence[Problem], larger: Sequence[Problem]) -> dict[str, list[str]]:
  """Return the class of each problem, as a short hash, of the problems of "solutions" and of "solutions, larger"."""
  return {SOLVED: labels(task, problems), **({LARGER: labels(task, larger)} if larger else {})}


def labels(task: Task, problems: Sequence[Problem]) -> list[str]:
  """Return the hash of each problem's structure class, 12 hexadecimal digits."""
  return [hashlib.blake2b(task.structure(problem).encode(), digest_size=6).hexdigest() for problem in problems]

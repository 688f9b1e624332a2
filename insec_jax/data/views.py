"""Views: what mined records become before they are trained on, so that arms separate the causes of a gain.

  full       a4  b9  <flag> calcb  <fix> b7      c1    as mined
  dagger     a4                          b7      c1    the right step where the model erred (arXiv 1011.0686), no more
  silent     a4  b9                      b7      c1    nothing says that a step was wrong
  shuffled   a4  b9  <flag> earlyd <fix> d2  b7  c1    reason and correction of another mistake, then the right step
  right      a4                          b7      c1    only the records without a mistake

A right step keeps the role of a correction in `dagger` and `silent`, and so its weight. Confidence tokens stay with
their steps. `full`, `dagger`, `silent` and `shuffled` have the same records, each as often.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import FROM_FILE, Config
from insec_jax.data import records
from insec_jax.method import roles, tasks
from insec_jax.method.roles import CORRECTION, TEXT
from insec_jax.method.tasks import Problem, Task
from insec_jax.method.transcript import Transcript, split_steps

_MOST_TRIES = 64  # corrections looked at in place of one, of the same class and of all
# Kinds of pieces: role, or F flag, X fix, s confidence. A failed correction is a mistake that is flagged again.
_WITHDRAWN = re.compile("m+s?Fr?X")
_MARKED = re.compile("Fr?X")
_CORRECTED = re.compile("(?P<wrong>m+)s?F(?P<reason>r?)X(?P<right>cs?)")

Placed = tuple[Transcript, str]  # a transcript and its place: "file:line"


def viewed(mined: Sequence[Placed], config: Config) -> list[Placed]:
  """Return the records as mistakes.view says; raise InputError where none is left, or no other correction is wrong."""
  view = config.mistakes.view
  if view == "shuffled":
    return list(_shuffled(mined, config))
  if view == "right":
    kept = [(pieces, where) for pieces, where in mined if all(piece.role != roles.MISTAKE for piece in pieces)]
    if not kept:
      raise InputError(
        f"{config.mistakes.mined_path}: mistakes.view='right' trains on records without a mistake, and none of the "
        f"{len(mined)} is; {_more_right(config)}, or choose another view"
      )
    return kept
  if view == "full":
    return list(mined)
  dropped = _WITHDRAWN if view == "dagger" else _MARKED
  return [(_without(pieces, dropped, config), where) for pieces, where in mined]


def _more_right(config: Config) -> str:
  """Return what to do where nothing right was mined."""
  if not config.mine.right:
    return "mine.right=0 keeps none: mine with a larger one, such as 1"
  return (
    f"mine again with mine.right above 0 and more than mine.num_problems={config.mine.num_problems} or "
    f"mine.samples={config.mine.samples}, or with a model that solves some problems without a mistake"
  )


def _kinds(pieces: Transcript, config: Config) -> str:
  """Return a letter for each piece; "?" is a marker of another config, which tokenisation refuses by its name."""
  letters = {config.tokenizer.flag: "F", config.tokenizer.fix: "X"} | dict.fromkeys(
    config.tokenizer.confidence_names, "s"
  )
  return "".join(
    letters.get(piece.text.strip(), "?") if piece.role == roles.FLAG else "ptm?rc"[piece.role] for piece in pieces
  )


def _without(pieces: Transcript, dropped: re.Pattern, config: Config) -> Transcript:
  numbers = {k for match in dropped.finditer(_kinds(pieces, config)) for k in range(*match.span())}
  return tuple(piece for k, piece in enumerate(pieces) if k not in numbers)


@dataclasses.dataclass(frozen=True)
class _Correction:
  """The last correction of a mistake in a record: the pieces after its flag, and the state in which it was written."""

  wrong: str  # the mistake
  error: str  # its class, "" where it was located (Task.locate)
  reason: Transcript
  right: Transcript  # the step, and its confidence
  before: tuple[str, ...]
  span: tuple[int, int]  # of the pieces from flag to right step


def _corrections(pieces: Transcript, problem: Problem, task: Task, config: Config) -> Iterator[_Correction]:
  for match in _CORRECTED.finditer(_kinds(pieces, config)):
    stated = "".join(piece.text for piece in pieces[: match.start()] if piece.role in (TEXT, CORRECTION))
    before = split_steps(stated, config.mistakes.unit) if stated else ()
    wrong = "".join(piece.text for piece in pieces[slice(*match.span("wrong"))])
    yield _Correction(
      wrong,
      task.check(problem, before, wrong).error,
      pieces[slice(*match.span("reason"))],
      pieces[slice(*match.span("right"))],
      before,
      (match.end("wrong"), match.end()),
    )


def _shuffled(mined: Sequence[Placed], config: Config) -> Iterator[Placed]:
  """Yield the records with reason and correction of another mistake, of the same class where one is found."""
  task = tasks.get(config.task)
  problem_of = _problems(mined, task, config)
  corrections = [
    list(_corrections(pieces, problem, task, config)) for (pieces, _), problem in zip(mined, problem_of, strict=True)
  ]
  others = collections.defaultdict(list)
  for correction in itertools.chain(*corrections):
    others[correction.error].append(correction)
  every = list(itertools.chain(*corrections))
  # A step of another solution is mostly beyond what a task from a file can check.
  wrong = ("wrong", "unverified") if task.name in FROM_FILE else ("wrong",)
  for number, ((pieces, where), problem) in enumerate(zip(mined, problem_of, strict=True)):
    rng = np.random.default_rng((config.seed, number, *b"shuffled"))
    for one in reversed(corrections[number]):

      def is_wrong(other: _Correction, one: _Correction = one, problem: Problem = problem) -> bool:
        step = other.right[0].text
        return step.strip() != one.wrong.strip() and task.check(problem, one.before, step).kind in wrong

      drawn = (
        pool[k] for pool in (others[one.error], every) for k in rng.integers(len(pool), size=_MOST_TRIES).tolist()
      )
      if (other := next(filter(is_wrong, drawn), None)) is None:
        raise InputError(
          f"{where}: mistakes.view='shuffled' finds no correction of another mistake that is wrong here; mine more "
          "problems, or choose another view"
        )
      pieces = _replaced(pieces, one, other)
    yield pieces, where


def _replaced(pieces: Transcript, one: _Correction, other: _Correction) -> Transcript:
  """Return the pieces with reason and correction of `other`; the right step of `one` follows as text."""
  start, end = one.span
  marked = [piece for piece in pieces[start : end - len(one.right)] if piece.role != roles.REASON]  # confidence, F, X
  right = [dataclasses.replace(piece, role=TEXT) if piece.role == CORRECTION else piece for piece in one.right]
  return (*pieces[:start], *marked[:-1], *other.reason, marked[-1], *other.right, *right, *pieces[end:])


def _problems(mined: Sequence[Placed], task: Task, config: Config) -> list[Problem]:
  """Return the problem of each record; raise InputError for a prompt that is none of the task's, or of data.path."""
  if task.name in FROM_FILE:
    contents = (record.content for record in records.read(config.data.path, limit=0, columns=config.data.fields))
    given = {content.prompt: content for content in contents if isinstance(content, Problem)}
    found = list(map(given.get, map(_prompt, mined)))
    known = f"data.path={config.data.path}"
  else:
    found, known = [task.problem_of(prompt) for prompt in map(_prompt, mined)], f"task.name={task.name!r}"
  for problem, (pieces, where) in zip(found, mined, strict=True):
    if problem is None:
      raise InputError(
        f"{where}: mistakes.view='shuffled' checks corrections, and its prompt {_prompt((pieces, where))!r:.60} is "
        f"none of {known}; choose another view, or other mined records"
      )
  return [problem for problem in found if problem is not None]


def _prompt(mined: Placed) -> str:
  return "".join(piece.text for piece in mined[0] if piece.role == roles.PROMPT)

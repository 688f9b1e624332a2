"""Mixture: the transcripts that training reads, by the source of their mistakes.

  clean      a solution as given, without mistakes                           the rest
  injected   mistakes put in by rule (mistakes.source="injected")            mistakes.share of the problems and prose
  recorded   mistakes that a record of data.path has in its pieces or spans  every such record, unchanged
  mined      the model's own mistakes (mistakes.mined_path, see views.py)    mistakes.mined of the whole

The function `split_records` (problems.py) chooses the records of a split. Wrong steps come from method/mistakes.py:
`with_mistakes` returns a problem as a transcript with mistakes, `in_prose` wrong steps for prose by number of the step.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data.problems import digest, held_out_prompts, is_to_mine, split_records
from insec_jax.data.records import Chat, Record, Turn, as_transcript, has_roles, pieces_by_turn, read
from insec_jax.data.storage import Computed, Records
from insec_jax.data.views import viewed
from insec_jax.method import hints, roles, tasks
from insec_jax.method.mistakes import in_prose, pieces_of, prose_classes_of, with_mistakes
from insec_jax.method.prose import Corpus, ProseRecord
from insec_jax.method.tasks import Problem
from insec_jax.method.transcript import Markers, Transcript, check_marks, split_steps

Placed = tuple[Transcript | Chat, str]  # a transcript and its place: "file:line"


def transcripts(
  config: Config, split: str, *, left_out: list[str] | None = None, kept: Records | None = None
) -> Sequence[Placed]:
  """Return the transcripts of the split "train" or "heldout", each with its place, in a fixed order.

  Each is made, and its mistakes are put in, when it is read; what it is made from is in `kept`.

  A problem gets its mistakes here when they are injected, and so does any prose where task.name="records". A record
  that has its roles is used unchanged; reading one raises InputError where its mistakes are not flagged and corrected.
  Records of mistakes.mined_path are added to "train". Only these have confidence tokens, each after a step, which name
  the model's confidence in that step. Then hints are added to "train" (mistakes.hinted). `left_out` and `kept` are
  those of `split_records`.
  """
  contents = _transcripts(config, split, left_out, kept)
  if split != "train":
    return contents
  contents = with_mined(contents, config) if config.mistakes.mined_path else contents
  return _with_hints(contents, config) if config.mistakes.hinted else contents


def _with_hints(contents: Sequence[Placed], config: Config) -> Sequence[Placed]:
  """Return the contents, each one with mistakes having a hint with probability mistakes.hinted, by its place."""

  def placed(number: int) -> Placed:
    content, where = contents[number]
    if np.random.default_rng((config.seed, number, *b"hint")).random() >= config.mistakes.hinted:
      return content, where
    if isinstance(content, Chat):
      if any(piece.role == roles.MISTAKE for turn in content.turns for piece in turn.pieces):
        raise InputError(f"{where}: a hint ends a prompt, and this record is a chat; set mistakes.hinted=0")
      return content, where
    return hints.hinted(content, config.mistakes.hint), where

  return Computed(len(contents), placed)


def _transcripts(config: Config, split: str, left_out: list[str] | None, kept: Records | None) -> Sequence[Placed]:
  """Return what `transcripts` does, without records of mistakes.mined_path."""
  markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
  indexed = split_records(config, split, left_out=left_out, kept=kept)
  if split == "train" and config.data.to_mine:
    indexed = _not_to_mine(indexed, config)
  if config.mistakes.source == "injected" and config.task.name == "records":
    return _with_prose_mistakes(indexed, config, markers)
  # Recorded or mined: nothing is put in here.
  task = tasks.get(config.task) if config.mistakes.source == "injected" else None

  def placed(number: int) -> Placed:
    index, record = indexed[number]
    content = _checked(record, markers)
    if task is not None and isinstance(record.content, Problem):
      # One generator a problem: its mistakes do not depend on which other problems are read.
      rng = np.random.default_rng((config.seed, index))
      content = with_mistakes(record.content, task, config.mistakes, markers, rng)
    return content, record.where

  return Computed(len(indexed), placed)


def _not_to_mine(indexed: Sequence[tuple[int, Record]], config: Config) -> Sequence[tuple[int, Record]]:
  """Return the records whose prompts are not of those to mine; raise InputError if none is left."""
  kept = [number for number in range(len(indexed)) if not is_to_mine(indexed[number][1], config)]
  if not kept:
    raise InputError(
      f"data.to_mine={config.data.to_mine} leaves none of the {len(indexed)} records of data.path to train on; lower it"
    )
  return Computed(len(kept), lambda place: indexed[kept[place]])


def with_mined(contents: Sequence[Placed], config: Config) -> Sequence[Placed]:
  """Return the contents with records of mistakes.mined_path spread evenly among them, mistakes.mined of the whole.

      c c c  and mined  m n  at 0.4     m c c n c
      c c c  and mined  m n  at 0.25    c n c c        which one is drawn by the seed
      c c c  and mined  m n  at 1       m n

  All contents are kept, except at 1. The counts of two mined records differ by at most one. What a record becomes says
  mistakes.view. Raises InputError for a record that is not in pieces, or whose prompt is in the split "heldout".
  """
  path, fraction = config.mistakes.mined_path, config.mistakes.mined
  held = held_out_prompts(config)
  mined: list[tuple[Transcript, str]] = []
  for record in read(path, limit=0, name="mistakes.mined_path"):
    if not has_roles(record.content):
      raise InputError(f"{record.where}: a mined record has pieces; give this file as data.path")
    if digest(record) in held:
      raise InputError(f"{record.where}: its prompt is held out here; mine with this config's data section")
    mined.append((record.content, record.where))
  mined = viewed(mined, config)
  if fraction == 1:
    return mined
  total = len(contents)
  num = round(total * fraction / (1 - fraction))
  order = np.random.default_rng((config.seed, *b"mined")).permutation(len(mined))
  place = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in (total, num)])
  number_of_place = np.argsort(place, kind="stable")

  def placed(place: int) -> Placed:
    number = int(number_of_place[place])
    return contents[number] if number < total else mined[order[(number - total) % len(mined)]]

  return Computed(total + num, placed)


def _checked(record: Record, markers: Markers) -> Transcript | Chat:
  """Return the content as pieces; raise InputError where mistakes that came with it are not flagged and corrected."""
  if has_roles(record.content):
    try:
      check_marks(record.content, markers)
    except InputError as error:
      raise InputError(f"{record.where}: {error}") from error
  return as_transcript(record.content)


def _with_prose_mistakes(indexed: Sequence[tuple[int, Record]], config: Config, markers: Markers) -> Sequence[Placed]:
  """Return the transcripts, with mistakes where they can be verified; raise InputError if no record can have one.

  A mistake uses text of other records of the same split only, so held-out text is never trained on.
  """
  unit = config.mistakes.unit
  candidates = [number for number, (_, record) in enumerate(indexed) if not has_roles(record.content)]
  place_of = {number: place for place, number in enumerate(candidates)}
  corpus = Corpus(
    Computed(len(candidates), lambda place: _prose_record(as_transcript(indexed[candidates[place]][1].content), unit))
  )

  def wrong_steps(number: int, index: int) -> dict[int, tuple[str, str]] | None:
    return in_prose(corpus, place_of[number], config.mistakes, np.random.default_rng((config.seed, index)))

  def placed(number: int) -> Placed:
    index, record = indexed[number]
    content = _checked(record, markers)
    wrong = wrong_steps(number, index) if number in place_of else None
    # None: by mistakes.share this record gets none. An empty dict: none can be verified.
    return content if wrong is None else _insert_mistakes(content, wrong, markers, unit), record.where

  _check_possible((wrong_steps(number, indexed[number][0]) for number in candidates), config)
  return Computed(len(indexed), placed)


def _check_possible(wrong_steps: Iterable[dict[int, tuple[str, str]] | None], config: Config) -> None:
  """Read wrong steps until a record has one; raise InputError where records were drawn and none has any."""
  num_drawn = 0
  for wrong in wrong_steps:
    if wrong:
      return
    num_drawn += wrong is not None
  if num_drawn:
    classes = ", ".join(prose_classes_of(config.mistakes))
    raise InputError(
      f"{config.data.path}: no mistake of class {classes} is possible in any of the {num_drawn} records drawn, with "
      f"{config.mistakes.unit}s as steps; choose other mistakes.classes, another mistakes.unit, or give more records"
    )


def _prose_record(content: Transcript | Chat, unit: str) -> ProseRecord:
  """Return the prompt and the steps of the answer as a ProseRecord."""
  pieces = [piece for turn in pieces_by_turn(content) for piece in turn]
  steps = [step for piece in pieces if piece.role == roles.TEXT for step in split_steps(piece.text, unit)]
  prompt = "\n".join(piece.text for piece in pieces if piece.role == roles.PROMPT)
  return ProseRecord(prompt, tuple(steps), follows_text=pieces[0].role == roles.PROMPT)


def _insert_mistakes(content: Transcript | Chat, wrong: dict[int, tuple[str, str]], markers: Markers, unit: str):
  """Return the content with mistakes; `wrong` has (wrong step, reason) by number of the step over all turns."""
  runs, num = [], 0
  for run in pieces_by_turn(content):
    pieces = []
    for piece in run:
      if piece.role != roles.TEXT:
        pieces.append(piece)
        continue
      steps = split_steps(piece.text, unit)
      here = {k: wrong[num + k] for k in range(len(steps)) if num + k in wrong}
      pieces += pieces_of(steps, here, markers)
      num += len(steps)
    runs.append(tuple(pieces))
  if isinstance(content, Chat):
    return Chat(tuple(Turn(turn.speaker, run) for turn, run in zip(content.turns, runs, strict=True)))
  return runs[0]

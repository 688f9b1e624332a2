"""Mixture: the transcripts that training reads, by the source of their mistakes.

  clean      a solution as given, without mistakes                           the rest
  injected   mistakes put in by rule (mistakes.source="injected")            mistakes.share of the problems and prose
  recorded   mistakes that a record of data.path has in its pieces or spans  every such record, unchanged
  mined      the model's own mistakes (mistakes.mined_path)                  mistakes.mined of the whole

The function `split_records` (problems.py) chooses the records of a split. Wrong steps come from method/mistakes.py:
`with_mistakes` returns a problem as a transcript with mistakes, `in_prose` wrong steps for prose by number of the step.
"""

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data.problems import split_records
from insec_jax.data.records import Chat, Record, Turn, as_transcript, has_roles, pieces_by_turn, prompt_text, read
from insec_jax.method import roles, tasks
from insec_jax.method.mistakes import in_prose, pieces_of, prose_classes_of, with_mistakes
from insec_jax.method.prose import Corpus, ProseRecord
from insec_jax.method.tasks import Problem
from insec_jax.method.transcript import Markers, Transcript, check_marks, split_steps


def transcripts(
  config: Config, split: str, *, left_out: list[str] | None = None
) -> list[tuple[Transcript | Chat, str]]:
  """Return the transcripts of the split "train" or "heldout", each with its place ("file:line"), in a fixed order.

  A problem gets its mistakes here when they are injected, and so does any prose where task.name="records". A record
  that has its roles is used unchanged; raises InputError where its mistakes are not flagged and corrected. Records of
  mistakes.mined_path are added to "train". Only these have confidence tokens, each after a step, which name the model's
  confidence in that step. `left_out` is that of `split_records`.
  """
  contents = _transcripts(config, split, left_out)
  return with_mined(contents, config) if split == "train" and config.mistakes.mined_path else contents


def _transcripts(config: Config, split: str, left_out: list[str] | None) -> list[tuple[Transcript | Chat, str]]:
  """Return what `transcripts` does, without records of mistakes.mined_path."""
  markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
  indexed = split_records(config, split, left_out=left_out)
  for _, record in indexed:
    if has_roles(record.content):
      _check_marks(record.content, record.where, markers)
  if config.mistakes.source != "injected":  # recorded or mined: nothing is put in here
    return [(as_transcript(record.content), record.where) for _, record in indexed]
  if config.task.name == "records":
    return _with_prose_mistakes(indexed, config, markers)
  task = tasks.get(config.task)
  contents = []
  for index, record in indexed:
    content = as_transcript(record.content)
    if isinstance(record.content, Problem):
      # One generator a problem: its mistakes do not depend on which other problems are read.
      rng = np.random.default_rng((config.seed, index))
      content = with_mistakes(record.content, task, config.mistakes, markers, rng)
    contents.append((content, record.where))
  return contents


def with_mined(contents: list[tuple[Transcript | Chat, str]], config: Config) -> list[tuple[Transcript | Chat, str]]:
  """Return the contents with records of mistakes.mined_path spread evenly among them, mistakes.mined of the whole.

      c c c  and mined  m n  at 0.4     m c c n c
      c c c  and mined  m n  at 0.25    c n c c        which one is drawn by the seed
      c c c  and mined  m n  at 1       m n

  All contents are kept, except at 1. The counts of two mined records differ by at most one.
  Raises InputError for a record that is not in pieces, or whose prompt is in the split "heldout".
  """
  path, fraction = config.mistakes.mined_path, config.mistakes.mined
  held = {prompt_text(record.content) for _, record in split_records(config, "heldout")}
  mined: list[tuple[Transcript | Chat, str]] = []
  for record in read(path, limit=0, name="mistakes.mined_path"):
    if not has_roles(record.content):
      raise InputError(f"{record.where}: a mined record has pieces; give this file as data.path")
    if prompt_text(record.content) in held:
      raise InputError(f"{record.where}: its prompt is held out here; mine with this config's data section")
    mined.append((record.content, record.where))
  if fraction == 1:
    return mined
  num = round(len(contents) * fraction / (1 - fraction))
  order = np.random.default_rng((config.seed, *b"mined")).permutation(len(mined))
  both = contents + [mined[order[k % len(mined)]] for k in range(num)]
  place = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in (len(contents), num)])
  return [both[k] for k in np.argsort(place, kind="stable")]


def _check_marks(transcript: Transcript, where: str, markers: Markers) -> None:
  try:
    check_marks(transcript, markers)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error


def _with_prose_mistakes(
  indexed: list[tuple[int, Record]], config: Config, markers: Markers
) -> list[tuple[Transcript | Chat, str]]:
  """Return the transcripts, with mistakes where they can be verified; raise InputError if no record can have one.

  A mistake uses text of other records of the same split only, so held-out text is never trained on.
  """
  unit, classes = config.mistakes.unit, prose_classes_of(config.mistakes)
  contents = [(as_transcript(record.content), record.where) for _, record in indexed]
  candidates = [number for number, (_, record) in enumerate(indexed) if not has_roles(record.content)]
  corpus = Corpus([_prose_record(contents[number][0], unit) for number in candidates])
  num_drawn = num_put = 0
  for place, number in enumerate(candidates):
    wrong = in_prose(corpus, place, config.mistakes, np.random.default_rng((config.seed, indexed[number][0])))
    if wrong is None:  # by mistakes.share this record gets none; an empty dict: none can be verified
      continue
    content, where = contents[number]
    contents[number] = (_insert_mistakes(content, wrong, markers, unit), where)
    num_drawn += 1
    num_put += bool(wrong)
  if num_drawn and not num_put:
    raise InputError(
      f"{config.data.path}: no mistake of class {', '.join(classes)} is possible in any of the {num_drawn} records "
      f"drawn, with {unit}s as steps; choose other mistakes.classes, another mistakes.unit, or give more records"
    )
  return contents


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

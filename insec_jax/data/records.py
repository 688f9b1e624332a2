"""Records: one JSON object a line, in one of five formats, and the transcripts that training reads.

  {"question", "answer"}                                       GSM8K as published: a problem; or any prose, unchecked
  {"messages": [{"role", "content"}, ...]}                     chat between system, user and assistant
  {"text"}                                                     prose without a prompt
  {"pieces": [{"role", "text"[, "weight"]}, ...]}              roles already known
  {"text", "spans": [{"start", "end", "role"[, "weight"]}]}    character offsets, end exclusive; the rest is text

A key "meta" may be added to any of them; it is a comment and is not read. Any other key is an error.
One file may mix the formats.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.files.reading import local_path, read_json_lines
from insec_jax.method import roles, tasks
from insec_jax.method.mistakes import in_prose, pieces_of, prose_classes_of, with_mistakes
from insec_jax.method.prose import Corpus, ProseRecord
from insec_jax.method.tasks import Problem, gsm8k
from insec_jax.method.transcript import Markers, Piece, Transcript, check_marks, split_steps

SPEAKERS = ("system", "user", "assistant")
MOST_WEIGHT = 1_000_000  # so that float32 can add up the weights of any batch


@dataclasses.dataclass(frozen=True)
class Turn:
  """A message of one speaker."""

  speaker: str
  pieces: Transcript


@dataclasses.dataclass(frozen=True)
class Chat:
  """A record of messages: those of the system and the user are prompt, those of the assistant are text."""

  turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True)
class PlainRecord:
  """A prompt, which may be empty, and the answer to it, whose steps cannot be checked."""

  prompt: str
  text: str


Content = Problem | PlainRecord | Transcript | Chat


@dataclasses.dataclass(frozen=True)
class Record:
  """The content of one line, and its place `where`: "file:line"."""

  content: Content
  where: str


def read(path: str, *, limit: int, checked: bool = True, name: str = "data.path") -> Iterator[Record]:
  """Yield the records of a .jsonl or .jsonl.gz file in order, at most `limit` of them (0: all).

  With `checked`, each question's answer must end as GSM8K's do; else it may be any text. Raises InputError with file
  and line for every defect, and for a file without records; `name` is the config key that gave the path.
  """
  for values, where in itertools.islice(read_json_lines(local_path(path, name), name), limit or None):
    yield Record(_content(values, where, checked), where)


def transcripts(config: Config, split: str) -> list[tuple[Transcript | Chat, str]]:
  """Return the transcripts of the split "train" or "heldout", each with its source, in a fixed order.

  A problem gets its mistakes here when they are injected, and so does any prose where task.name="records". A record
  that has its roles is used unchanged; raises InputError where its mistakes are not flagged and corrected. Records of
  mistakes.mined_path are added to the split "train"; only they have confidence tokens.
  """
  contents = _transcripts(config, split)
  return with_mined(contents, config) if split == "train" and config.mistakes.mined_path else contents


def _transcripts(config: Config, split: str) -> list[tuple[Transcript | Chat, str]]:
  """Return the same without mined records."""
  markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
  indexed = _split_records(config, split)
  for _, record in indexed:
    if isinstance(record.content, tuple):
      _check_marks(record, markers)
  if config.mistakes.source != "injected":
    return [(_without_mistakes(record.content), record.where) for _, record in indexed]
  if config.task.name == "records":
    return _with_prose_mistakes(indexed, config, markers)
  task = tasks.get(config.task)
  contents = []
  for index, record in indexed:
    content = _without_mistakes(record.content)
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
  Raises InputError for a record that is not in pieces, or whose prompt is held out.
  """
  path, fraction = config.mistakes.mined_path, config.mistakes.mined
  held = {_prompt(record.content) for _, record in _split_records(config, "heldout")}
  mined = []
  for record in read(path, limit=0, name="mistakes.mined_path"):
    if not isinstance(record.content, tuple):
      raise InputError(f"{record.where}: a mined record has pieces; give this file as data.path")
    if _prompt(record.content) in held:
      raise InputError(f"{record.where}: its prompt is held out here; mine with this config's data section")
    mined.append((record.content, record.where))
  if fraction == 1:
    return mined
  num = round(len(contents) * fraction / (1 - fraction))
  order = np.random.default_rng((config.seed, *b"mined")).permutation(len(mined))
  both = contents + [mined[order[k % len(mined)]] for k in range(num)]
  place = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in (len(contents), num)])
  return [both[k] for k in np.argsort(place, kind="stable")]


def _check_marks(record: Record, markers: Markers) -> None:
  try:
    check_marks(record.content, markers)
  except InputError as error:
    raise InputError(f"{record.where}: {error}") from error


def _without_mistakes(content: Content) -> Transcript | Chat:
  """Return the content to train on where no mistake is injected."""
  if isinstance(content, Problem):
    content = PlainRecord(content.prompt, "".join(content.steps))
  if isinstance(content, PlainRecord):
    return (*([Piece(roles.PROMPT, content.prompt)] if content.prompt else []), Piece(roles.TEXT, content.text))
  return content


def _with_prose_mistakes(
  indexed: list[tuple[int, Record]], config: Config, markers: Markers
) -> list[tuple[Transcript | Chat, str]]:
  """Return the transcripts, with mistakes wherever they can be verified; raise InputError where that is nowhere.

  A mistake uses text of other records of the same split only, so held-out text is never trained on.
  """
  unit, classes = config.mistakes.unit, prose_classes_of(config.mistakes)
  contents = [(_without_mistakes(record.content), record.where) for _, record in indexed]
  open_to = [number for number, (_, record) in enumerate(indexed) if not isinstance(record.content, tuple)]
  corpus = Corpus([_prose_record(contents[number][0], unit) for number in open_to])
  num_drawn = num_put = 0
  for place, number in enumerate(open_to):
    wrong = in_prose(corpus, place, config.mistakes, np.random.default_rng((config.seed, indexed[number][0])))
    if wrong is None:
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


def _runs(content: Transcript | Chat) -> list[Transcript]:
  """Return the pieces turn by turn."""
  return [turn.pieces for turn in content.turns] if isinstance(content, Chat) else [content]


def _prose_record(content: Transcript | Chat, unit: str) -> ProseRecord:
  """Return the prompt and the steps of the answer as a ProseRecord."""
  pieces = [piece for run in _runs(content) for piece in run]
  steps = [step for piece in pieces if piece.role == roles.TEXT for step in split_steps(piece.text, unit)]
  prompt = "\n".join(piece.text for piece in pieces if piece.role == roles.PROMPT)
  return ProseRecord(prompt, tuple(steps), led=pieces[0].role == roles.PROMPT)


def _insert_mistakes(content: Transcript | Chat, wrong: dict[int, tuple[str, str]], markers: Markers, unit: str):
  """Return the content with wrong steps (and reasons) before steps, whose numbers count over all answers."""
  runs, num = [], 0
  for run in _runs(content):
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


def problems(config: Config, split: str) -> list[tuple[Problem, str]]:
  """Return the problems among the records of the split "train" or "heldout", without mistakes, each with its place."""
  return [
    (record.content, record.where) for _, record in _split_records(config, split) if isinstance(record.content, Problem)
  ]


def _split_records(config: Config, split: str) -> list[tuple[int, Record]]:
  if split not in ("train", "heldout"):
    raise ValueError(f"split {split!r} is neither 'train' nor 'heldout'")
  if config.task.name in ("gsm8k", "records") or config.mistakes.source != "injected":
    if not config.data.path:
      raise InputError(
        f"mistakes.source={config.mistakes.source!r} reads records from a file; give --config.data.path=FILE.jsonl"
      )
    records = list(read(config.data.path, limit=config.data.num_records, checked=config.task.name != "records"))
    held = _held_out(records, config)
    return [(index, record) for index, record in enumerate(records) if held[index] == (split == "heldout")]
  num = config.data.num_records if split == "train" else config.data.num_heldout
  made = tasks.problems(tasks.get(config.task), "train" if split == "train" else "test", num=num, seed=config.seed)
  return [
    (index, Record(problem, f"{config.task.name} problem {index} ({split})")) for index, problem in enumerate(made)
  ]


def _held_out(records: list[Record], config: Config) -> list[bool]:
  """Return which records are held out: prompts in order of their hash until data.num_heldout records are reached.

  Records with the same prompt stay together, so a held-out prompt is never trained on.
  """
  prompts = [_prompt(record.content) for record in records]
  count = {}
  for prompt in prompts:
    count[prompt] = count[prompt] + 1 if prompt in count else 1
  held, num = set(), 0
  for prompt in sorted(count, key=lambda text: hashlib.sha256(text.encode()).digest()):
    if num >= config.data.num_heldout:
      break
    held.add(prompt)
    num += count[prompt]
  if num == len(records):
    raise InputError(
      f"{config.data.path}: data.num_heldout={config.data.num_heldout} leaves none of the {len(records)} "
      "records read to train on; lower it or give more records"
    )
  return [prompt in held for prompt in prompts]


def _prompt(content: Content) -> str:
  pieces = [piece for run in _runs(_without_mistakes(content)) for piece in run]
  prompt = "".join(piece.text for piece in pieces if piece.role == roles.PROMPT)
  return (prompt or "".join(piece.text for piece in pieces)).strip()


def _content(record: dict[str, Any], where: str, checked: bool) -> Content:
  keys = frozenset(record) - {"meta"}
  if keys not in FORMATS:
    known = "; or ".join(" and ".join(sorted(form)) for form in FORMATS)
    raise InputError(
      f"{where}: keys are {', '.join(sorted(record)) or 'none':.200}; needed are {known} "
      "(and what need not be read under 'meta')"
    )
  if keys == QUESTION and not checked:
    return _question(record, where)
  return FORMATS[keys](record, where)


def _question(record: dict, where: str) -> Problem | PlainRecord:
  """Return a problem where the answer ends as in GSM8K (annotations are removed), else prose as given."""
  question, answer = (_text(record[key], where, key).strip() for key in ("question", "answer"))
  if not question or not answer:
    raise InputError(f"{where}: {'answer' if question else 'question'} is white space; must be text")
  if answer.rpartition("\n")[2].startswith("####"):
    return _problem(record, where)
  return PlainRecord(question + "\n", answer + "\n")


def _prose(record: dict, where: str) -> PlainRecord:
  return PlainRecord("", _text(record["text"], where, "text"))


def _problem(record: dict, where: str) -> Problem:
  for key in ("question", "answer"):
    _text(record[key], where, key)
  try:
    return gsm8k.problem_of(record)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error


def _chat(record: dict, where: str) -> Chat:
  turns = []
  for number, message in enumerate(_list(record["messages"], where, "messages")):
    name = f"messages[{number}]"
    _keys(message, {"role", "content"}, set(), where, name)
    if message["role"] not in SPEAKERS:
      raise InputError(f"{where}: {name}.role is {message['role']!r:.60}; must be one of {', '.join(SPEAKERS)}")
    role = roles.TEXT if message["role"] == "assistant" else roles.PROMPT
    turns.append(Turn(message["role"], (Piece(role, _text(message["content"], where, f"{name}.content")),)))
  return Chat(tuple(turns))


def _pieces(record: dict, where: str) -> Transcript:
  pieces = []
  for number, piece in enumerate(_list(record["pieces"], where, "pieces")):
    name = f"pieces[{number}]"
    _keys(piece, {"role", "text"}, {"weight"}, where, name)
    text = _text(piece["text"], where, f"{name}.text")
    pieces.append(Piece(_role(piece, where, name), text, _weight(piece, where, name)))
  return tuple(pieces)


def _spans(record: dict, where: str) -> Transcript:
  text = _text(record["text"], where, "text")
  spans = []
  for number, span in enumerate(_list(record["spans"], where, "spans")):
    name = f"spans[{number}]"
    _keys(span, {"start", "end", "role"}, {"weight"}, where, name)
    start, end = span["start"], span["end"]
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
      raise InputError(
        f"{where}: {name} goes from {start!r:.60} to {end!r:.60}; must be whole numbers with "
        f"0 <= start < end <= {len(text)}, the length of the text"
      )
    spans.append((start, end, Piece(_role(span, where, name), text[start:end], _weight(span, where, name))))
  pieces, done = [], 0
  for start, end, piece in sorted(spans, key=lambda span: span[:2]):
    if start < done:
      raise InputError(
        f"{where}: the span from {start} to {end} begins before the one in front of it ends at {done}; "
        "spans must not overlap"
      )
    if done < start:
      pieces.append(Piece(roles.TEXT, text[done:start]))
    pieces.append(piece)
    done = end
  if done < len(text):
    pieces.append(Piece(roles.TEXT, text[done:]))
  return tuple(pieces)


QUESTION = frozenset({"question", "answer"})
FORMATS: dict[frozenset[str], Callable[[dict, str], Content]] = {
  QUESTION: _problem,
  frozenset({"messages"}): _chat,
  frozenset({"text"}): _prose,
  frozenset({"pieces"}): _pieces,
  frozenset({"text", "spans"}): _spans,
}


def _list(value: Any, where: str, name: str) -> list:
  if not isinstance(value, list) or not value:
    raise InputError(f"{where}: {name} is {value!r:.60}; must be a list that is not empty")
  return value


def _keys(value: Any, needed: set[str], optional: set[str], where: str, name: str) -> None:
  if not isinstance(value, dict) or not needed <= set(value) <= needed | optional:
    seen = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
    also = f", and may have {', '.join(sorted(optional))}" if optional else ""
    raise InputError(
      f"{where}: {name} has {seen or 'no keys':.200}; must be an object with {', '.join(sorted(needed))}{also}"
    )


def _text(value: Any, where: str, name: str) -> str:
  if not isinstance(value, str) or not value:
    raise InputError(f"{where}: {name} is {value!r:.60}; must be text that is not empty")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise InputError(
      f"{where}: {name} holds half a surrogate pair at character {error.start}; write the character in full"
    ) from error
  return value


def _role(value: dict, where: str, name: str) -> int:
  if value["role"] not in roles.NAMES:
    raise InputError(f"{where}: {name}.role is {value['role']!r:.60}; must be one of {', '.join(roles.NAMES)}")
  return roles.NAMES.index(value["role"])


def _weight(value: dict, where: str, name: str) -> float | None:
  if "weight" not in value:
    return None
  weight = value["weight"]
  if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= MOST_WEIGHT:
    raise InputError(f"{where}: {name}.weight is {weight!r:.60}; must be a number from {-MOST_WEIGHT} to {MOST_WEIGHT}")
  return float(weight)

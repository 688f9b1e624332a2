"""Records: objects of files (files/sources.py), each in one of five formats.

  {"question", "answer"}                                       GSM8K as published: a problem; or any prose, unchecked
  {"messages": [{"role", "content"}, ...]}                     chat between system, user and assistant
  {"text"}                                                     prose without a prompt
  {"pieces": [{"role", "text"[, "weight"]}, ...]}              roles already known
  {"text", "spans": [{"start", "end", "role"[, "weight"]}]}    character offsets, end exclusive; the rest is text

A key "meta" may be added to any of them; it is a comment and is not read. Any other key is an error.
One file may mix the formats. Their contents become, with the types of the package `method`,

  Problem       prompt, steps, answer: its steps can be checked, so mistakes can be put in
  PlainRecord   prompt and text, unchecked
  Transcript    a tuple of Piece(role, text, weight); a weight of None is that of the role in config.loss
  Chat          turns of pieces
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

from insec_jax.command import InputError
from insec_jax.data import fields
from insec_jax.files import sources
from insec_jax.method import roles
from insec_jax.method.tasks import Problem, gsm8k_records
from insec_jax.method.transcript import Piece, Transcript

SPEAKERS = ("system", "user", "assistant")
MOST_WEIGHT = 1_000_000  # so that float32 can add up the weights of any batch


@dataclasses.dataclass(frozen=True)
class Turn:
  """A message of one speaker."""

  speaker: str
  pieces: Transcript


@dataclasses.dataclass(frozen=True)
class Chat:
  """Messages in order; the pieces of system and user have the role prompt, those of the assistant the role text."""

  turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True)
class PlainRecord:
  """A prompt, which may be empty, and the answer to it, whose steps cannot be checked."""

  prompt: str
  text: str


Content = Problem | PlainRecord | Transcript | Chat


@dataclasses.dataclass(frozen=True)
class Record:
  """The content of one object of a file, and its place `where`: "file:line"."""

  content: Content
  where: str


def read(
  path: str, *, limit: int, checked: bool = True, name: str = "data.path", columns: str = ""
) -> Iterator[Record]:
  """Yield the records of the files that `path` names (files/sources.py) in order, at most `limit` of them (0: all).

  With `checked`, the answer of a question must end in a line "#### NUMBER", as in GSM8K; else it may be any text.
  `columns` is data.fields: the columns that make a record; empty where the files have our formats.
  Raises InputError with file and line (or object, or row) for every defect, and for a file without records; `name` is
  the config key that gave the path.
  """
  named = fields.parse(columns) if columns else {}
  _check_keys(columns, named)
  read_columns = fields.columns_of(named)
  files = sources.find(path, name)
  rows = itertools.chain.from_iterable(sources.read(file, name, columns=read_columns) for file in files)
  for values, where in itertools.islice(rows, limit or None):
    yield Record(_content(fields.mapped(named, values, where) if named else values, where, checked), where)


def has_roles(content: Content) -> TypeGuard[Transcript]:
  """Return whether the record came with a role for each piece of its text."""
  return isinstance(content, tuple)


def as_transcript(content: Content) -> Transcript | Chat:
  """Return the content as pieces, with no mistakes added; a Transcript or a Chat is returned unchanged."""
  if isinstance(content, Problem):
    content = PlainRecord(content.prompt, "".join(content.steps))
  if isinstance(content, PlainRecord):
    return (*([Piece(roles.PROMPT, content.prompt)] if content.prompt else []), Piece(roles.TEXT, content.text))
  return content


def pieces_by_turn(content: Transcript | Chat) -> list[Transcript]:
  """Return the pieces of each turn; a transcript is one turn."""
  return [turn.pieces for turn in content.turns] if isinstance(content, Chat) else [content]


def prompt_text(content: Content) -> str:
  """Return the text of the prompt, or the whole text where there is no prompt, without white space around it."""
  pieces = [piece for turn in pieces_by_turn(as_transcript(content)) for piece in turn]
  prompt = "".join(piece.text for piece in pieces if piece.role == roles.PROMPT)
  return (prompt or "".join(piece.text for piece in pieces)).strip()


def _content(record: dict[str, Any], where: str, checked: bool) -> Content:
  """Return the content, read by the function for its keys in FORMATS, the table after these functions."""
  keys = frozenset(record) - {"meta"}
  if keys not in FORMATS:
    proposed = fields.proposal(record)
    raise InputError(
      f"{where}: keys are {', '.join(sorted(record)) or 'none':.200}; needed are {_known()} "
      "(and what need not be read under 'meta')" + (f"; data.fields={proposed} reads these" if proposed else "")
    )
  if keys == QUESTION and not checked:
    return _question(record, where)
  return FORMATS[keys](record, where)


def _known() -> str:
  return "; or ".join(" and ".join(sorted(form)) for form in FORMATS)


def _check_keys(columns: str, named: fields.Fields) -> None:
  if named and frozenset(named) not in FORMATS:
    raise InputError(f"data.fields={columns} makes {' and '.join(sorted(named))}; needed are {_known()}")


def _question(record: dict, where: str) -> Problem | PlainRecord:
  """Return a problem where the answer ends as in GSM8K (annotations <<3+4=7>> are removed), else prose, stripped."""
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
    return gsm8k_records.problem_of(record)
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

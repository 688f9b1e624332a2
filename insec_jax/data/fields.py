"""Fields: columns of other data sets become the keys of the formats that records.py reads (data.fields).

  question=problem,answer=solution            KEY=COLUMN for each key of a format
  question=instruction+input,answer=output    the columns that are not empty, with an empty line between
  messages=conversations                      a chat; {"from", "value"} are read as {"role", "content"}
  messages=prompt+completion                  lists are joined
  messages                                    KEY alone is the column of that name

Columns that are not named are not read.
"""

from collections.abc import Mapping
from typing import Any

from insec_jax.command import InputError

SPEAKERS = {"human": "user", "gpt": "assistant"}  # names in "from"; any other stays
BETWEEN = "\n\n"  # texts of one key
# What to write for data sets with these columns; the first that fits is proposed.
SHAPES = {
  ("problem", "solution"): "question=problem,answer=solution",
  ("query", "response"): "question=query,answer=response",
  ("instruction", "input", "output"): "question=instruction+input,answer=output",
  ("instruction", "output"): "question=instruction,answer=output",
  ("instruction", "response"): "question=instruction,answer=response",
  ("conversations",): "messages=conversations",
  ("messages",): "messages",
  ("prompt", "completion"): "question=prompt,answer=completion",
  ("question", "answer"): "question,answer",
  ("text",): "text",
}

Fields = Mapping[str, tuple[str, ...]]  # key of a format -> columns


def parse(text: str) -> Fields:
  """Return the columns of each key; InputError where a key has none, or a key or a column is given twice."""
  fields: dict[str, tuple[str, ...]] = {}
  used: set[str] = set()
  for part in text.split(","):
    key, equals, given = (word.strip() for word in part.partition("="))
    columns = tuple(column.strip() for column in given.split("+")) if equals else (key,)
    if not key or not all(columns):
      raise InputError(f"data.fields={text}: {part!r} is not KEY=COLUMN; write such as {SHAPES['problem', 'solution']}")
    if key in fields:
      raise InputError(f"data.fields={text}: {key} is given twice; join its columns with +")
    if twice := [column for column in columns if column in used or columns.count(column) > 1]:
      raise InputError(f"data.fields={text}: the column {twice[0]} is given twice; each belongs to one key")
    fields[key] = columns
    used |= set(columns)
  return fields


def columns_of(fields: Fields) -> tuple[str, ...]:
  """Return all columns that are read."""
  return tuple(column for columns in fields.values() for column in columns)


def mapped(fields: Fields, row: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Return the record that a row becomes; InputError, with the place, where it lacks a column or has other values."""
  found = {key: [_column(row, column, where) for column in columns] for key, columns in fields.items()}
  return {key: _value(values, key, where) for key, values in found.items()}


def proposal(row: Mapping[str, Any]) -> str:
  """Return the data.fields that would read a row with these columns; empty where none is known."""
  return next((text for columns, text in SHAPES.items() if set(columns) <= set(row)), "")


def _column(row: Mapping[str, Any], column: str, where: str) -> Any:
  if column not in row:
    raise InputError(
      f"{where}: has no column {column!r}, it has {', '.join(sorted(row)) or 'none':.200}; correct data.fields"
    )
  return row[column]


def _value(values: list[Any], key: str, where: str) -> Any:
  given = [value for value in values if value is not None and value != ""]
  if all(isinstance(value, list) for value in given) and given:
    items = [item for value in given for item in value]
    return [_message(item) for item in items] if key == "messages" else items
  if not all(isinstance(value, str) for value in given):
    raise InputError(f"{where}: {key} is {given!r:.60}; the columns of a key must all be texts, or all be lists")
  return BETWEEN.join(given)


def _message(item: Any) -> Any:
  """Return a message with the keys role and content, without those that are null (parquet has them in every row)."""
  if not isinstance(item, dict):
    return item
  kept = {key: value for key, value in item.items() if value is not None}
  if {"from", "value"} <= kept.keys():
    speaker = kept.pop("from")
    kept = {"role": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, **kept}
    kept["content"] = kept.pop("value")
  return kept

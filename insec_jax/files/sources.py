"""Sources of records: the files that a text names, and the objects in each, whatever its format.

  a.jsonl,b/*.parquet      several, with commas between; a pattern takes its files in order of their names
  gs://bucket/*.jsonl.gz   objects of a bucket (buckets.py)
  hf://datasets/org/name   data sets of the Hugging Face Hub (datasets.py)

  .jsonl, any other name   one object a line        "file:line"
  .json                    a list of objects        "file: object N", N from 1; else one object a line
  .parquet                 rows                     "file: row N"

All but .parquet may be compressed (.gz, .zst).
"""

import glob
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from insec_jax.command import InputError
from insec_jax.files import buckets, datasets
from insec_jax.files.reading import (
  COMPRESSED,
  import_pyarrow,
  local_path,
  open_decompressed,
  open_to_read,
  parse_json,
  read_json_lines,
)

ROWS_AT_ONCE = 1_000  # of a parquet file that are held in memory


class Source(NamedTuple):
  """A file, and the name that errors give it."""

  path: pathlib.Path
  shown: str


def split(text: str) -> list[str]:
  """Return the paths and patterns in a text; one that is the name of a file with a comma stays whole."""
  return [text] if os.path.lexists(text) else [part.strip() for part in text.split(",")]


def checked(text: str, name: str) -> str:
  """Return the text with `~` expanded in each path; InputError for a part that cannot be a path."""
  return ",".join(_checked(part, name) for part in _parts(text, name))


def _parts(text: str, name: str) -> list[str]:
  parts = split(text)
  if not all(parts):
    raise InputError(f"{name}={text!r:.200} has an empty name; take out the comma, or name a file")
  return parts


def _checked(part: str, name: str) -> str:
  if part.lower().startswith("hf:"):  # also what is nearly the scheme
    datasets.check(part, name)
    return part
  return f"{local_path(part, name)}"


def find(text: str, name: str) -> list[Source]:
  """Return the files that a text names, in its order; `name` is the config key that gave it.

  Raises InputError for a pattern that no file matches, and for a file that is named twice.
  """
  found = list(itertools.chain.from_iterable(_find(part, name) for part in _parts(text, name)))
  seen: dict[str, Source] = {}
  for source in found:
    if (real := os.path.realpath(source.path)) in seen:
      raise InputError(f"{name}: {source.shown} is given twice in {text}; name each file once")
    seen[real] = source
  return found


def _find(part: str, name: str) -> list[Source]:
  if part.startswith(datasets.SCHEME):
    return [Source(*found) for found in datasets.find(part, name)]
  path = local_path(part, name)
  if not glob.has_magic(part) or os.path.lexists(path):
    return [Source(path, f"{path}")]
  if not (matches := _matches(path)):
    raise InputError(f"{name}={part} matches no file; correct the pattern")
  return [Source(match, f"{match}") for match in matches]


def _matches(pattern: pathlib.Path) -> Sequence[pathlib.Path]:
  """Return the files that a pattern matches, in order of their names."""
  if isinstance(pattern, buckets.BucketPath):
    return buckets.matches(pattern)
  found = sorted(glob.glob(str(pattern), recursive=True))
  return [pathlib.Path(match) for match in found if not os.path.isdir(match)]


def local_files(text: str) -> list[str]:
  """Return the local files that a text names now, which no output may replace."""
  return [match for part in split(text) for match in ([part] if os.path.lexists(part) else glob.glob(part))]


def read(source: Source, name: str, *, columns: Sequence[str] = ()) -> Iterator[tuple[dict[str, Any], str]]:
  """Yield (object, place) for each record of a file, in order.

  With `columns`, only these are read of a parquet file, which must have them. Raises InputError, with the place, for
  anything that is not an object, and for a file without records.
  """
  kind = _kind(source.path)
  if kind == ".parquet":
    return _rows(source, name, columns)
  if kind == ".json" and _is_list(source, name):
    return _listed(source, name)
  return read_json_lines(source.path, name, source.shown)


def _kind(path: pathlib.Path) -> str:
  """Return the end of the name, without that of a compression."""
  return pathlib.Path(path.stem).suffix if path.suffix in COMPRESSED.values() else path.suffix


def _is_list(source: Source, name: str) -> bool:
  with open_decompressed(source.path, name) as file:
    return file.peek(64).lstrip()[:1] == b"["


def _listed(source: Source, name: str) -> Iterator[tuple[dict[str, Any], str]]:
  with open_decompressed(source.path, name) as file:
    values = parse_json(file.read(), source.shown)
  if not values:
    raise InputError(f"{name}: {source.shown} is an empty list; it must hold objects")
  for number, value in enumerate(values, 1):
    where = f"{source.shown}: object {number}"
    if not isinstance(value, dict):
      raise InputError(f"{where} is {type(value).__name__}; the list must hold objects only")
    yield value, where


def _rows(source: Source, name: str, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
  pyarrow = import_pyarrow(source.shown)
  number = 0
  with open_to_read(source.path, name) as file:
    try:
      table = pyarrow.parquet.ParquetFile(file)
      has = table.schema_arrow.names
      if missing := [column for column in columns if column not in has]:
        raise InputError(
          f"{source.shown}: has no column {missing[0]!r}, it has {', '.join(sorted(has)):.200}; correct data.fields"
        )
      wanted = list(columns) or None
      for batch in table.iter_batches(ROWS_AT_ONCE, columns=wanted):
        for number, values in enumerate(batch.to_pylist(), number + 1):  # noqa: B020 (goes on counting)
          yield values, f"{source.shown}: row {number}"
    except (pyarrow.ArrowException, OSError) as error:
      if isinstance(error, OSError) and error.errno is not None:
        raise
      said = " ".join(str(error).split())[:200]
      raise InputError(f"{source.shown} is damaged or no parquet file ({said}); fetch it again") from None
  if not number:
    raise InputError(f"{name}: {source.shown} has no rows; it must hold one record a row")

"""Reading: paths from users, files that are regular, JSON and JSON lines with file:line errors.

A wrong path or content raises InputError. An error of the machine (a bad disk, no descriptors) remains an OSError.
"""

import codecs
import collections
import contextlib
import errno
import gzip
import json
import math
import os
import pathlib
import re
import stat
import zlib
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from insec_jax.command import InputError
from insec_jax.files import buckets

MOST_LINE_BYTES = 1 << 28  # of one JSON line, decompressed
COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # first bytes -> end of the name
NAMES = {".gz": "gzip", ".zst": "zstd"}
SCHEME = re.compile(r"(([A-Za-z][A-Za-z0-9+.-]+):/|(gs|hf|s3):)", re.IGNORECASE)
NEEDED = {  # scheme -> what to write instead
  "gs": "write gs://BUCKET/NAME, in small letters and with two slashes",
  "hf": "give a model as org/name[@revision], and records (data.path) as hf://datasets/org/name",
}
# Errors about the given path, not about the state of the machine.
PATH_ERRORS = (
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EACCES,
  errno.EPERM,
  errno.ENAMETOOLONG,
  errno.ELOOP,
  errno.EINVAL,
  errno.ENXIO,
  errno.ENODEV,
  errno.ETXTBSY,
)


def local_path(text: str | os.PathLike, name: str) -> pathlib.Path:
  """Return the path with `~` expanded, of gs:// that of the local copy; `name` is the flag or config key that gave it.

  Raises InputError for an empty path, a scheme that is not supported (s3://), or a path that no file can have.
  """
  if isinstance(text, buckets.BucketPath):
    return text
  text = os.fspath(text)
  if not text:
    raise InputError(f"{name} is empty; give a path")
  is_remote = text.startswith(buckets.SCHEME)
  if (match := SCHEME.match(text)) and not is_remote:
    scheme = (match[2] or match[3]).lower()
    needed = NEEDED.get(scheme, f"{scheme}:// is not supported; give a local path or gs://BUCKET/NAME")
    raise InputError(f"{name}={text:.200}: {needed}")
  try:
    text.encode()
    path = buckets.local_copy(text, name) if is_remote else pathlib.Path(text).expanduser()
    os.stat(path)
  except InputError:
    raise
  except UnicodeEncodeError:
    raise InputError(f"{name}={text!r} is not UTF-8; rename the file") from None
  except RuntimeError as error:
    raise InputError(f"{name}={text}: {error}; give the path in full") from None
  except ValueError as error:
    raise InputError(f"{name}={text!r} is no path ({error}); give another") from None
  except OSError as error:
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
      raise InputError(f"{name}={text:.100} cannot be used ({error.strerror}); give another path") from None
  return path


def folder_to_read(text: str | os.PathLike, name: str) -> pathlib.Path:
  """Return `local_path` of a folder that is there already; of one in a bucket the small files are fetched."""
  path = local_path(text, name)
  buckets.fetch_folder(path)
  return path


def open_to_read(path: str | os.PathLike, name: str) -> BufferedReader:
  """Open a regular file, fetched from its bucket first; InputError if it cannot be read. `name` describes the file."""
  try:
    if isinstance(path, buckets.BucketPath):
      buckets.fetch(path)
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
      raise InputError(f"{name}: {path} is {kind_of(mode)}, needed is a file; give its path")
    return open(path, "rb")
  except OSError as error:
    if error.errno in PATH_ERRORS:
      raise InputError(f"{name}: cannot read {path} ({error.strerror}); give a file that is there") from None
    raise


def kind_of(mode: int) -> str:
  """Return what kind of file has this mode, other than a regular one."""
  kinds = {
    "a folder": stat.S_ISDIR,
    "a FIFO": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": stat.S_ISCHR,
    "a block device": stat.S_ISBLK,
  }
  return next((kind for kind, holds in kinds.items() if holds(mode)), "no regular file")


def read_text(path: str | os.PathLike, name: str) -> str:
  """Return the content of a UTF-8 file; InputError if it cannot be read as such."""
  with open_to_read(path, name) as file:
    content = file.read()
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"{path}: byte {error.start} is not UTF-8; write the file again as UTF-8") from None


def parse_json(text: str | bytes, where: str) -> Any:
  """Return the value of strict JSON; InputError for any other text, NaN, a repeated key, or deep nesting."""

  def refuse(word: str):
    raise ValueError(f"{word} is no JSON number")

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
      names = collections.Counter(name for name, _ in pairs)
      raise ValueError(f"the key {names.most_common(1)[0][0]!r:.60} is given twice")
    return values

  def number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
      raise ValueError(f"the number {digits:.60} is too large")
    return value

  try:
    if isinstance(text, bytes):
      text = text.decode("utf-8")
    return json.loads(text, parse_constant=refuse, parse_float=number, object_pairs_hook=unique)
  except UnicodeDecodeError as error:
    raise InputError(f"{where}: byte {error.start} is not UTF-8; write the file again as UTF-8") from None
  except json.JSONDecodeError as error:
    at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
    raise InputError(f"{where}: not JSON at {at} ({error.msg}); write it again as JSON") from None
  except RecursionError:
    raise InputError(f"{where}: nested too deeply; needed is an object of a few levels") from None
  except ValueError as error:
    raise InputError(f"{where}: not JSON ({error}); write it again as JSON") from None


def read_json(path: str | os.PathLike, name: str) -> dict[str, Any]:
  """Return the JSON object that the file holds; InputError if it holds anything else."""
  with open_to_read(path, name) as file:
    value = parse_json(file.read(), f"{path}")
  if not isinstance(value, dict):
    raise InputError(f"{path} holds {json.dumps(value):.40}; needed is a JSON object: write the file again")
  return value


def read_json_lines(path: str | os.PathLike, name: str, shown: str = "") -> Iterator[tuple[dict[str, Any], str]]:
  """Yield (object, "file:line") for every line of a .jsonl file, which may be compressed (.gz, .zst).

  `shown` is the name of the file in these places, by default its path.

  Raises InputError, with file and line, for a line that is not a JSON object, and for a file without lines.
  """
  number = 0
  for number, line in enumerate(_lines(path, name), 1):
    where = f"{shown or path}:{number}"
    if not line.strip():
      raise InputError(f"{where}: the line is empty; each must be one JSON object: delete it")
    value = parse_json(line.rstrip(b"\r\n"), where)
    if not isinstance(value, dict):
      raise InputError(f"{where}: holds {type(value).__name__}; each line must be one JSON object")
    yield value, where
  if not number:
    raise InputError(f"{name}: {path} is empty; it must hold one JSON object a line")


def _lines(path: str | os.PathLike, name: str) -> Iterator[bytes]:
  with open_decompressed(path, name) as file:
    while line := file.readline(MOST_LINE_BYTES + 1):
      if len(line) > MOST_LINE_BYTES:
        raise InputError(f"{path}: a line has more than {MOST_LINE_BYTES >> 20} MiB; give one JSON object a line")
      yield line


@contextlib.contextmanager
def open_decompressed(path: str | os.PathLike, name: str) -> Iterator[BufferedReader | gzip.GzipFile]:
  """Yield the content of a file, decompressed if its name ends in .gz or .zst, without a byte order mark at its start.

  Raises InputError, also while the block reads, for a file that is damaged, or compressed without such a name.
  """
  ending = next((ending for ending in COMPRESSED.values() if os.fspath(path).endswith(ending)), "")
  with contextlib.ExitStack() as stack:
    file: BufferedReader | gzip.GzipFile = stack.enter_context(open_to_read(path, name))
    if ending == ".gz":
      file = stack.enter_context(gzip.GzipFile(fileobj=file))
    elif ending == ".zst":
      pyarrow = import_pyarrow(f"{path}")
      file = BufferedReader(stack.enter_context(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")))
    try:
      begin = file.peek(4)[:4]
      for magic, kind in COMPRESSED.items():
        if begin.startswith(magic):
          raise InputError(
            f"{path} is compressed by {NAMES[kind]}{' twice' if ending == kind else ''}; give it a name that ends in "
            f"{kind}, or decompress it"
          )
      if begin.startswith(codecs.BOM_UTF8):  # some editors write it at the start
        file.read(3)
      yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise InputError(f"{path} is damaged or no gzip file ({error}); compress it again") from None
    except OSError as error:
      if ending != ".zst" or error.errno is not None:  # pyarrow's own have no number
        raise
      raise InputError(f"{path} is damaged or no zstd file ({error}); compress it again") from None


def import_pyarrow(path: str) -> Any:
  """Return pyarrow, which reads .parquet and .zst files; InputError that names the path where it is not installed."""
  try:
    import pyarrow.parquet
  except ImportError:
    raise InputError(
      f"{path}: files of this kind are read by pyarrow, which is not installed; pip install 'insec_jax[data]'"
    ) from None
  return pyarrow

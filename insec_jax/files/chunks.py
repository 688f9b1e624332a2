"""Work in chunks, shared by processes through a folder only; interrupted work resumes.

      mined.jsonl.parts/0.jsonl    header   {"chunk": 0, ...}   {"chunk": 2, ...}  of process 0
      mined.jsonl.parts/1.jsonl    header   {"chunk": 1, ...}   {"chu              of process 1, killed while writing

The header identifies the work; parts of other work are never mixed in. The process that finds all chunks joins them and
removes the folder. A chunk that was written completely is not computed again, whatever the number of processes.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from insec_jax.command import InputError
from insec_jax.files.locks import one_writer
from insec_jax.files.reading import local_path, parse_json
from insec_jax.files.writing import is_stream

Made = TypeVar("Made")


def unfinished(process: int, num_processes: int, output: str) -> str:
  """Return the line of a process that is done before others."""
  return (
    f"process {process} is done; the last of the {num_processes} to end writes {output} (if none does, start one again)"
  )


@contextlib.contextmanager
def one_process(output: str, process: int) -> Iterator[None]:
  """Make this the only process of that id that writes chunks of a file, or the file, inside the block.

  Raises InputError when another process has the id. Does nothing where the output is a stream.
  """
  folder = parts_of(output)
  if is_stream(local_path(output, "--output")):
    yield
    return
  # Outside the folder, which the last process removes.
  lock = folder.with_name(f".{folder.name[:80]}.{process}.lock")
  with one_writer(lock, str(folder / f"{process}.jsonl"), "--output or --process_id"):
    yield


def parts_of(output: str) -> pathlib.Path:
  """Return the folder of the chunks of a file."""
  return pathlib.Path(f"{output}.parts")


class _Place(NamedTuple):
  """A place in a file, after whole lines."""

  byte: int
  lines: int


class ChunkStore:
  """Chunks of the file `output`, in one file a process; `header`, a JSON object, is all that the chunks depend on.

  `same_without` maps names that headers of earlier versions may have in addition to the value with which their work is
  the same.
  """

  def __init__(self, output: str, header: dict[str, Any], *, same_without: Mapping[str, Any] | None = None):
    self.folder = parts_of(output)
    self.header = json.loads(json.dumps(header))  # as after reading: lists for tuples
    self._same_without = same_without or {}

  def read(self) -> dict[int, Any]:
    """Return the value of each finished chunk, by chunk; raise InputError when a file is of other work."""
    with self._locked():
      return self._read({})

  def follow(self) -> Callable[[], dict[int, Any]]:
    """Return a function that returns, as `read` does, the chunks that were finished since its last call."""
    read: dict[pathlib.Path, _Place] = {}

    def finished() -> dict[int, Any]:
      with self._locked():
        return self._read(read)

    return finished

  def fill(
    self,
    num_chunks: int,
    make: Callable[[int], Any],
    *,
    process: int,
    num_processes: int,
    stopped: Callable[[], bool] = lambda: False,
  ) -> bool:
    """Append make(chunk) of each missing chunk that falls to this process; return whether all of them are done.

    False when `stopped` returned True before. The caller is inside `one_process`.
    """
    done = self.read()
    own = range(process, num_chunks, num_processes)
    if earlier := [chunk for chunk in own if chunk in done]:
      print(f"{len(earlier)} of {len(own)} chunks were made before", file=sys.stderr, flush=True)
    for chunk in own:
      if chunk not in done:
        if stopped():
          return False
        self.append(chunk, make(chunk), process=process)
    return True

  def append(self, chunk: int, value: Any, *, process: int) -> None:
    """Append the chunk to this process's file and fsync it."""
    self.folder.mkdir(exist_ok=True)
    with open(self.folder / f"{process}.jsonl", "a+b") as file:
      size = file.tell()
      if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":  # a kill has cut the last line short
          file.seek(0)
          size = file.read().rfind(b"\n") + 1
          file.truncate(size)
      if not size:
        file.write(_line(self.header))
      file.write(_line({"chunk": chunk, "value": value, "check": _checksum(chunk, value)}))
      file.flush()
      os.fsync(file.fileno())

  def join(self, num_chunks: int, make: Callable[[list], Made]) -> Made | None:
    """Return `make` of all chunks in order; None when some are missing, or when another process has joined them.

    One process at a time calls `make`; afterwards the folder is removed.
    """
    with self._locked():
      chunks = self._read({})
      if len(chunks) < num_chunks:
        return None
      made = make([chunks[chunk] for chunk in range(num_chunks)])
      shutil.rmtree(self.folder)
      return made

  def discard_others(self) -> None:
    """Remove the folder if it holds files of other work, or damaged ones."""
    try:
      self.read()
    except InputError:
      shutil.rmtree(self.folder)

  @contextlib.contextmanager
  def _locked(self) -> Iterator[None]:
    """Lock the folder inside the block: no other process reads or removes it; each may still append to its own file."""
    if not self.folder.is_dir():
      yield
      return
    handle = os.open(self.folder, os.O_RDONLY)
    try:
      fcntl.flock(handle, fcntl.LOCK_EX)  # released by the system when the process dies
      yield
    finally:
      os.close(handle)

  def _read(self, places: "dict[pathlib.Path, _Place]") -> dict[int, Any]:
    """Return the chunks that come after these places of the files, and move the places to the ends."""
    values = {}
    for path in sorted(self.folder.glob("*.jsonl")):
      start, number = places.get(path, _Place(0, 0))
      with open(path, "rb") as file:
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]  # the text after the last newline is incomplete
      for line in lines:
        number += 1
        start += len(line) + 1
        entry = self._parse(line, f"{path}:{number}")
        if number == 1:
          self._check_header(entry, path)
        elif entry.keys() != {"chunk", "value", "check"} or entry["check"] != _checksum(entry["chunk"], entry["value"]):
          raise InputError(f"{path}:{number} is not what was written; {self._remedy}")
        else:
          values[entry["chunk"]] = entry["value"]
      places[path] = _Place(start, number)
    return values

  def _check_header(self, header: dict[str, Any], path: pathlib.Path) -> None:
    for name in sorted(header.keys() | self.header.keys()):
      was, now = header.get(name), self.header.get(name)
      if was != now and not (name in self._same_without and was == self._same_without[name]):
        raise InputError(
          f"{path} was begun with {name}={was!r:.200}, now it is {now!r:.200}; go on with what it was "
          f"begun with, or remove {self.folder}, or give another --output"
        )

  @property
  def _remedy(self) -> str:
    return f"remove {self.folder}, and it is done again"

  def _parse(self, line: bytes, where: str) -> dict[str, Any]:
    try:
      value = parse_json(line, where)
    except InputError as error:
      raise InputError(f"{str(error).partition(';')[0]}; {self._remedy}") from None
    if not isinstance(value, dict):
      raise InputError(f"{where} holds {type(value).__name__}, needed is an object; {self._remedy}")
    return value


def _checksum(chunk: int, value: Any) -> int:
  """Return a checksum of the chunk; a chunk read back has the same."""
  return zlib.crc32(json.dumps([chunk, value]).encode())


def _line(value: Any) -> bytes:
  return json.dumps(value, ensure_ascii=False).encode() + b"\n"

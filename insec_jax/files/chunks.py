"""Work in chunks, shared by processes through a folder only; interrupted work resumes.

      mined.jsonl.parts/0.jsonl    header   {"chunk": 0, ...}   {"chunk": 2, ...}  of process 0
      mined.jsonl.parts/1.jsonl    header   {"chunk": 1, ...}   {"chu              of process 1, killed while writing

In a bucket, where nothing can be appended, each chunk is an object of its own:

      gs://bucket/mined.jsonl.parts/0.2.jsonl    header   {"chunk": 2, ...}        of process 0

The header identifies the work; parts of other work are never mixed in. The process that finds all chunks joins them and
removes the folder. A chunk that was written completely is not computed again, whatever the number of processes.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from insec_jax.command import InputError
from insec_jax.files import buckets
from insec_jax.files.bucket_paths import BucketPath
from insec_jax.files.leases import lease
from insec_jax.files.locks import one_writer
from insec_jax.files.reading import local_path, parse_json
from insec_jax.files.writing import is_stream

Made = TypeVar("Made")
AnyPath = TypeVar("AnyPath", bound=pathlib.Path)
NO_LOCK = contextlib.nullcontext()


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
  with one_writer(_lock(folder, process), f"{folder / str(process)}.jsonl", "--output or --process_id"):
    yield


def _lock(folder: AnyPath, who: int | str) -> AnyPath:
  return folder.with_name(f".{folder.name[:80]}.{who}.lock")


def parts_of(output: str) -> pathlib.Path:
  """Return the folder of the chunks of a file."""
  return local_path(f"{output}.parts", "--output")


class _Place(NamedTuple):
  """A place in a file, after whole lines."""

  byte: int
  lines: int


class ChunkStore:
  """Chunks of the file `output`, in one file a process; `header`, a JSON object, is all that the chunks depend on.

  `same_without` maps names that headers of earlier versions may have in addition to the value with which their work is
  the same. Names for which `is_free` is True may be in addition with any value.
  """

  def __init__(
    self,
    output: str,
    header: dict[str, Any],
    *,
    same_without: Mapping[str, Any] | None = None,
    is_free: Callable[[str], bool] = lambda _: False,
  ):
    self.folder = parts_of(output)
    self.header = json.loads(json.dumps(header))  # as after reading: lists for tuples
    self._same_without, self._is_free = same_without or {}, is_free

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
    """Append the chunk to this process's file and fsync it; in a bucket, write its object."""
    self.folder.mkdir(exist_ok=True)
    line = _line({"chunk": chunk, "value": value, "check": _checksum(chunk, value)})
    if isinstance(self.folder, BucketPath):
      piece = self.folder / f"{process}.{chunk}.jsonl"
      piece.write_bytes(_line(self.header) + line)
      buckets.publish(piece)
      return
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
      file.write(line)
      file.flush()
      os.fsync(file.fileno())

  def join(self, num_chunks: int, make: Callable[[list], Made]) -> Made | None:
    """Return `make` of all chunks in order; None when some are missing, or when another process has joined them.

    One process at a time calls `make`; afterwards the folder is removed.
    """
    with self._locked(to_join=True):
      chunks = self._read({})
      if len(chunks) < num_chunks:
        return None
      made = make([chunks[chunk] for chunk in range(num_chunks)])
      buckets.remove(self.folder)
      return made

  def discard_others(self) -> None:
    """Remove the folder if it holds files of other work, or damaged ones."""
    try:
      self.read()
    except InputError:
      buckets.remove(self.folder)

  @contextlib.contextmanager
  def _locked(self, *, to_join: bool = False) -> Iterator[None]:
    """Lock the folder inside the block: no other process reads or removes it; each may still append to its own file.

    In a bucket only those that join lock it: chunks are whole, and are read before they are counted.
    """
    if isinstance(self.folder, BucketPath):
      with lease(_lock(self.folder, "join"), f"{self.folder}", "--output", waits=True) if to_join else NO_LOCK:
        yield
      return
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
    buckets.refresh_folder(self.folder)
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
    additional = {name for name in header.keys() - self.header.keys() if self._is_free(name)}
    for name in sorted(header.keys() - additional | self.header.keys()):
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

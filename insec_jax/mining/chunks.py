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
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from insec_jax.command import InputError
from insec_jax.config import REMOVED
from insec_jax.files.locks import one_writer
from insec_jax.files.reading import parse_json

Made = TypeVar("Made")


class ChunkStore:
  """Chunks of the file `output`, in one file a process; `header`, a JSON object, is all that the chunks depend on."""

  def __init__(self, output: str, header: dict[str, Any]):
    self.folder = pathlib.Path(f"{output}.parts")
    self.header = json.loads(json.dumps(header))  # as after reading: lists for tuples

  def read(self) -> dict[int, Any]:
    """Return the value of each finished chunk, by chunk; raise InputError when a file is of other work."""
    with self._locked():
      return self._read()

  @contextlib.contextmanager
  def writer(self, process: int) -> Iterator[None]:
    """Make this the only process of that id inside the block; raise InputError when another one has the id."""
    # Outside the folder, which the last process removes.
    lock = self.folder.with_name(f".{self.folder.name[:80]}.{process}.lock")
    with one_writer(lock, str(self.folder / f"{process}.jsonl"), "--output or --process_id"):
      yield

  def append(self, chunk: int, value: Any, *, process: int) -> None:
    """Append the chunk to this process's file and fsync it."""
    self.folder.mkdir(exist_ok=True)
    with open(self.folder / f"{process}.jsonl", "a+b") as file:
      file.seek(0)
      lines = file.read()
      whole = lines[: lines.rfind(b"\n") + 1]
      file.truncate(len(whole))  # a kill may have cut the last line short
      if not whole:
        file.write(_line(self.header))
      file.write(_line({"chunk": chunk, "value": value, "check": _checksum(chunk, value)}))
      file.flush()
      os.fsync(file.fileno())

  def join(self, num_chunks: int, make: Callable[[list], Made]) -> Made | None:
    """Return `make` of all chunks in order; None when some are missing, or when another process has joined them.

    One process at a time calls `make`; afterwards the folder is removed.
    """
    with self._locked():
      chunks = self._read()
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

  def _read(self) -> dict[int, Any]:
    values = {}
    for path in sorted(self.folder.glob("*.jsonl")):
      lines = path.read_bytes().split(b"\n")[:-1]  # the text after the last newline is incomplete
      if not lines:
        continue
      header, *chunks = (self._parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1))
      for name in sorted(header.keys() | self.header.keys()):
        was, now = header.get(name), self.header.get(name)
        removed = name in REMOVED and was == REMOVED[name][0]  # of an earlier version, which did the same work
        if was != now and not removed:
          raise InputError(
            f"{path} was begun with {name}={was!r:.200}, now it is {now!r:.200}; go on with what it was "
            f"begun with, or remove {self.folder}, or give another --output"
          )
      for number, entry in enumerate(chunks, 2):
        if entry.keys() != {"chunk", "value", "check"} or entry["check"] != _checksum(entry["chunk"], entry["value"]):
          raise InputError(f"{path}:{number} is not what was written; {self._remedy}")
        values[entry["chunk"]] = entry["value"]
    return values

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

"""Work in chunks, shared by processes that know nothing of each other but a folder: cut short, it goes on.

      mined.jsonl.parts/0.jsonl    header   {"chunk": 0, ...}   {"chunk": 2, ...}  of process 0
      mined.jsonl.parts/1.jsonl    header   {"chunk": 1, ...}   {"chu              of process 1, killed while writing

The header says what the work is of; parts of other work are never mixed in. Whoever finds all chunks there joins them
and removes the folder. A chunk that was once written whole is not done again, by whatever number of processes.
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
from insec_jax.files import one_writer, parse_json

Made = TypeVar("Made")


class ChunkStore:
  """The parts of the file `output`; `header`, any JSON by name, is all that the chunks depend on."""

  def __init__(self, output: str, header: dict[str, Any]):
    self.folder = pathlib.Path(f"{output}.parts")
    self.header = json.loads(json.dumps(header))  # as it will be read: lists for tuples

  def read(self) -> dict[int, Any]:
    """What each chunk gave that is done, by chunk; InputError when a part is of other work."""
    with self._alone():
      return self._read()

  @contextlib.contextmanager
  def writer(self, process: int) -> Iterator[None]:
    """Make this the one process of that id inside the block; InputError when another one has the id."""
    # Not in the folder, which whoever ends last removes.
    lock = self.folder.with_name(f".{self.folder.name[:80]}.{process}.lock")
    with one_writer(lock, str(self.folder / f"{process}.jsonl"), "--output or --process_id"):
      yield

  def append(self, chunk: int, value: Any, *, process: int) -> None:
    """Append the chunk to this process's part and fsync it."""
    self.folder.mkdir(exist_ok=True)
    with open(self.folder / f"{process}.jsonl", "a+b") as file:
      file.seek(0)
      lines = file.read()
      whole = lines[: lines.rfind(b"\n") + 1]
      file.truncate(len(whole))  # a kill may have cut the last line short
      if not whole:
        file.write(_line(self.header))
      file.write(_line({"chunk": chunk, "value": value, "check": _check(chunk, value)}))
      file.flush()
      os.fsync(file.fileno())

  def join(self, num_chunks: int, make: Callable[[list], Made]) -> Made | None:
    """What `make` makes of all chunks in order; None when some are missing, or when another process has joined them.

    One process at a time comes to `make`; after it the folder is gone.
    """
    with self._alone():
      found = self._read()
      if len(found) < num_chunks:
        return None
      made = make([found[chunk] for chunk in range(num_chunks)])
      shutil.rmtree(self.folder)
      return made

  def discard_others(self) -> None:
    """Remove the folder if it holds parts of other work, or damaged ones."""
    try:
      self.read()
    except InputError:
      shutil.rmtree(self.folder)

  @contextlib.contextmanager
  def _alone(self) -> Iterator[None]:
    """Inside, no other process reads all parts or removes them; each may go on appending to its own."""
    if not self.folder.is_dir():
      yield
      return
    handle = os.open(self.folder, os.O_RDONLY)
    try:
      fcntl.flock(handle, fcntl.LOCK_EX)  # given back by the system when the process dies
      yield
    finally:
      os.close(handle)

  def _read(self) -> dict[int, Any]:
    found = {}
    for path in sorted(self.folder.glob("*.jsonl")):
      lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut short
      if not lines:
        continue
      header, *chunks = (self._parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1))
      for name in sorted(header.keys() | self.header.keys()):
        was, now = header.get(name), self.header.get(name)
        if was != now:
          raise InputError(
            f"{path} was begun with {name}={was!r:.200}, now it is {now!r:.200}; go on with what it was "
            f"begun with, or remove {self.folder}, or give another --output"
          )
      for number, done in enumerate(chunks, 2):
        if done.keys() != {"chunk", "value", "check"} or done["check"] != _check(done["chunk"], done["value"]):
          raise InputError(f"{path}:{number} is not what was written; {self._remedy}")
        found[done["chunk"]] = done["value"]
    return found

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


def _check(chunk: int, value: Any) -> int:
  """Return a number that any change of the chunk changes; what was read back gives the same."""
  return zlib.crc32(json.dumps([chunk, value]).encode())


def _line(value: Any) -> bytes:
  return json.dumps(value, ensure_ascii=False).encode() + b"\n"

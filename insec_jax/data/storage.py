"""Storage of records, examples and rows while rows are made: in memory, or in files of a folder."""

import array
import contextlib
import os
import pathlib
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, overload

import numpy as np

from insec_jax.data.records import Record
from insec_jax.data.tokens import Example

T = TypeVar("T")


class Computed(Sequence[T]):
  """Sequence of `num` items, each computed by `get(index)` whenever it is read."""

  def __init__(self, num: int, get: Callable[[int], T]):
    self._range, self._get = range(num), get

  def __len__(self) -> int:
    return len(self._range)

  @overload
  def __getitem__(self, index: int) -> T: ...

  @overload
  def __getitem__(self, index: slice) -> list[T]: ...

  def __getitem__(self, index: int | slice) -> T | list[T]:
    """Return an item, or the list of those of a slice."""
    numbers = self._range[index]
    return self._get(numbers) if isinstance(numbers, int) else [self._get(number) for number in numbers]


class Records(Protocol):
  """Records that are added in order, and read in any."""

  def __len__(self) -> int:
    """Return the number of records."""

  def __getitem__(self, index: int, /) -> Record:
    """Return a record."""

  def extend(self, records: Iterable[Record], /) -> None:
    """Add records."""


class Examples(Protocol):
  """Examples that are added in order, and read in this order."""

  def __iter__(self) -> Iterator[Example]:
    """Yield the examples."""

  def extend(self, examples: Sequence[Example], /) -> None:
    """Add examples."""


class Storage(Protocol):
  """Place for the records, examples and rows of a split."""

  def records(self) -> AbstractContextManager[Records]:
    """Return an empty collection of records, which is there inside the block."""

  def examples(self) -> AbstractContextManager[Examples]:
    """Return an empty collection of examples, which is there inside the block."""

  def array(self, split: str, name: str, shape: tuple[int, int], value: int, dtype: Any) -> np.ndarray:
    """Return a new array for a field of the rows of the split, full of the value."""


class Memory:
  """Storage in memory."""

  def records(self) -> AbstractContextManager[Records]:
    """Return a list."""
    return contextlib.nullcontext(list[Record]())

  def examples(self) -> AbstractContextManager[Examples]:
    """Return a list."""
    return contextlib.nullcontext(list[Example]())

  def array(self, split: str, name: str, shape: tuple[int, int], value: int, dtype: Any) -> np.ndarray:  # noqa: ARG002
    """Return an array in memory."""
    return np.full(shape, value, dtype)


class Disk:
  """Storage in files of a folder: one for each field of the rows, in NumPy's format, mapped into memory."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def records(self) -> AbstractContextManager[Records]:
    """Return a collection whose records are in a temporary file."""
    return contextlib.closing(_RecordFile(self._folder))

  def examples(self) -> AbstractContextManager[Examples]:
    """Return a collection whose arrays are in a temporary file."""
    return contextlib.closing(_Spool(self._folder))

  def array(self, split: str, name: str, shape: tuple[int, int], value: int, dtype: Any) -> np.ndarray:
    """Return an array that is mapped from a file; on Linux OSError where the disk has no room for it."""
    path = path_of(self._folder, split, name)
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS, where a full disk ends the process by a signal
      with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    if value:
      mapped[:] = value
    return mapped.view(np.ndarray)  # the same memory: indexing a memmap takes several times as long


def path_of(folder: pathlib.Path, split: str, name: str) -> pathlib.Path:
  """Return the file of a field of the rows of a split."""
  return folder / f"{split}_{name}.npy"


class _RecordFile:
  """Records in one file, each pickled; in memory are their places in it."""

  def __init__(self, folder: pathlib.Path):
    self._stops = array.array("q", [0])
    self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

  def close(self) -> None:
    """Remove the file."""
    self._file.close()

  def __len__(self) -> int:
    return len(self._stops) - 1

  def __getitem__(self, index: int, /) -> Record:
    start, stop = self._stops[index], self._stops[index + 1]
    return pickle.loads(os.pread(self._file.fileno(), stop - start, start))  # written by this process

  def extend(self, records: Iterable[Record], /) -> None:
    """Add records."""
    self._file.seek(0, 2)
    for record in records:
      self._stops.append(self._stops[-1] + self._file.write(pickle.dumps(record, pickle.HIGHEST_PROTOCOL)))
    self._file.flush()


class _Spool:
  """Examples whose arrays are in one file, one array after the other; what they were read from is not kept."""

  FIELDS = (("token_T", np.int32), ("role_T", np.int8), ("weight_T", np.float32), ("negative_T", np.int32))
  REWOUND = (("position_T", np.int32), ("until_T", np.int32))  # of examples that have them: all or none

  def __init__(self, folder: pathlib.Path):
    self._lengths: list[int] = []
    self._fields: tuple[tuple[str, Any], ...] = self.FIELDS
    self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

  def close(self) -> None:
    """Remove the file."""
    self._file.close()

  def extend(self, examples: Sequence[Example], /) -> None:
    """Add examples."""
    self._file.seek(0, 2)
    for example in examples:
      self._fields = self.FIELDS if example.until_T is None else self.FIELDS + self.REWOUND
      self._lengths.append(len(example.token_T))
      self._file.write(b"".join(getattr(example, name).astype(dtype).tobytes() for name, dtype in self._fields))

  def __iter__(self) -> Iterator[Example]:
    self._file.seek(0)
    size = sum(np.dtype(dtype).itemsize for _, dtype in self._fields)
    for length in self._lengths:
      content = self._file.read(length * size)
      arrays, start = {}, 0
      for name, dtype in self._fields:
        arrays[name] = np.frombuffer(content, dtype, length, start)
        start += arrays[name].nbytes
      yield Example(**arrays, where="", num_boundary=0, num_end=0)

"""Reading and writing of one safetensors file: a checked header and mapped tensors, or one tensor written at a time.

8 bytes   n, the length of the header, little-endian
n bytes   JSON {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [start, end]}, ..., "__metadata__": {...}}
the rest  the tensors' bytes, row-major, without gaps; offsets count from here
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from insec_jax.command import InputError
from insec_jax.files import buckets
from insec_jax.files.bucket_paths import BucketPath
from insec_jax.files.reading import open_to_read, parse_json

LARGEST = 1 << 60  # bytes that an entry of a header may claim to have
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
MOST_AXES = 8  # of a tensor
MOST_NAMED = 5  # tensors listed in one error
PIECE_BYTES = 1 << 25  # written at once


class Source(NamedTuple):
  """Tensor to be written: `read` returns it, in this shape and dtype, and is called once, when it is written."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class RemoteTensor:
  """Tensor of a file in a bucket: a slice of its first axis reads the bytes of these rows."""

  def __init__(self, path: BucketPath, start: int, dtype: np.dtype, shape: tuple[int, ...]):
    self._path, self._start, self.dtype, self.shape = path, start, dtype, shape

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice) -> np.ndarray:
    first, last, _ = rows.indices(len(self))
    row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
    data = buckets.read_range(self._path, self._start + first * row_bytes, self._start + last * row_bytes)
    return np.frombuffer(data, self.dtype).reshape(last - first, *self.shape[1:])


Tensor = np.ndarray | RemoteTensor


def open_tensors(path: pathlib.Path) -> dict[str, Tensor]:
  """Return every tensor of the file as a read-only view of the mapped file: only bytes that are used are read.

  Those of a file in a bucket are `RemoteTensor`. Raises InputError when the file is cut short, has a damaged header,
  names a tensor twice, or has a dtype other than DTYPES.
  """
  if isinstance(path, BucketPath):
    size, place = buckets.size(path), path

    def read(start: int, stop: int) -> bytes:
      return bytes(buckets.read_range(place, start, min(stop, size)))

    return {name: RemoteTensor(path, start, dtype, shape) for name, start, dtype, shape in _entries(path, size, read)}
  with open_to_read(path, "weights") as file:
    size = os.fstat(file.fileno()).st_size
    entries = _entries(path, size, lambda start, stop: os.pread(file.fileno(), stop - start, start))
    # Not closed explicitly: the views keep the map open until the last of them is deleted.
    data = np.memmap(file, np.uint8, "r")
  return {
    name: data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    for name, start, dtype, shape in entries
  }


def _entries(
  path: pathlib.Path, size: int, read: Callable[[int, int], bytes]
) -> list[tuple[str, int, np.dtype, tuple[int, ...]]]:
  """Return (name, first byte in the file, dtype, shape) of each tensor, in the order of their bytes.

  `read(start, stop)` returns bytes of the file, which has `size` of them.
  """
  length = int.from_bytes(read(0, 8), "little")
  if length > min(size - 8, LARGEST_HEADER):
    raise InputError(
      f"{path} has {size:,} bytes, too few for its header; it is cut short or no safetensors file: fetch it again"
    )
  begin = 8 + length
  header = _parse_header(path, read(8, begin), size)
  end = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
  if end != size:
    raise InputError(
      f"{path} has {size:,} bytes, its header promises {end:,}; it is cut short or damaged: fetch it again"
    )
  entries = []
  used = 0
  for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
    start, stop = entry["data_offsets"]
    if start != used:
      raise InputError(
        f"{path}: {name:.100} starts at byte {start:,} of the data where {used:,} was due; tensors "
        "overlap or leave a gap, the file is damaged: fetch it again"
      )
    used = stop
    entries.append((name, begin + start, DTYPES[entry["dtype"]], tuple(entry["shape"])))
  return entries


def _parse_header(path: pathlib.Path, text: bytes, size: int) -> dict[str, dict]:
  """Return name -> {"dtype", "shape", "data_offsets"}, each entry valid in itself for a file of `size` bytes."""
  header = parse_json(text, f"{path}: its header")
  if not isinstance(header, dict):
    raise InputError(f"{path}: its header is no JSON object; fetch it again")
  header.pop("__metadata__", None)
  foreign, wrong = [], []
  for name, entry in header.items():
    if isinstance(entry, dict) and _is_entry(entry, LARGEST) and entry["data_offsets"][1] > size:
      raise InputError(
        f"{path}: {name:.100} ends at byte {entry['data_offsets'][1]:,} of the data, and the whole file "
        f"has {size:,} bytes; it is cut short: fetch it again"
      )
    if not _is_entry(entry, size):
      raise InputError(
        f"{path}: its header says {entry!r:.100} of {name:.100}, which is no tensor of this file; fetch it again"
      )
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
      foreign.append(f"{name:.100} {entry['dtype']:.20}")
    elif stop - start != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
      wrong.append(f"{name:.100}")
  if foreign:
    raise InputError(
      f"{path}: {some_of(foreign, MOST_NAMED)}: only {', '.join(DTYPES)} weights can be read; "
      "take the checkpoint that is not quantized"
    )
  if wrong:
    raise InputError(
      f"{path}: the bytes of {some_of(wrong, MOST_NAMED)} do not hold their shape; the file is damaged: fetch it again"
    )
  return header


def _is_entry(entry, size: int) -> bool:
  """Return whether the entry has the form of a tensor, with axes and offsets that a file of `size` bytes can have."""

  def are_sizes(values, most_values):
    return (
      isinstance(values, list)
      and len(values) <= most_values
      and all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= size for value in values)
    )

  return (
    isinstance(entry, dict)
    and entry.keys() == {"dtype", "shape", "data_offsets"}
    and isinstance(entry["dtype"], str)
    and are_sizes(entry["shape"], MOST_AXES)
    and are_sizes(entry["data_offsets"], 2)
    and len(entry["data_offsets"]) == 2
    and entry["data_offsets"][0] <= entry["data_offsets"][1]
  )


def some_of(names: list[str], most: int, separator: str = ", ") -> str:
  """Return the first `most` names and the number of the others, as text for an error."""
  return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_tensors(path: pathlib.Path, sources: Iterable[Source]) -> None:
  """Write the file; at most one tensor is in memory at a time."""
  sources = list(sources)
  header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers rejects a file without a format
  offset = 0
  for source in sources:
    header[source.name] = {
      "dtype": CODES[source.dtype],
      "shape": list(source.shape),
      "data_offsets": [offset, offset + source.num_bytes],
    }
    offset += source.num_bytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # data starts on a multiple of 8
  with buckets.opened_to_write(path) as file:
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for source in sources:
      _write_pieces(file, _read_bytes(source))


def _write_pieces(file: BinaryIO, data: np.ndarray) -> None:
  for start in range(0, len(data), PIECE_BYTES):  # what is uploaded is held once more
    file.write(data[start : start + PIECE_BYTES])


def _read_bytes(source: Source) -> np.ndarray:
  array = np.ascontiguousarray(source.read())
  assert (array.shape, array.dtype) == (source.shape, source.dtype), source.name
  return array.reshape(-1).view(np.uint8)

"""Packing: examples packed into rows of one length, none of them split.

      token     a  b  c  |  d  e  |  .
      segment   1  1  1     2  2     0        0 is padding
      position  0  1  2     0  1     0        restarts with each segment
      role      0  1  5     0  1    -1        0 prompt, 1 text, 5 correction; roles.NO_ROLE is padding
      weight    0  1  1     0  1     0
      negative -1 -1  8    -1 -1    -1        id of a token to avoid here; roles.NO_NEGATIVE where there is none
      until     2  .  .     .  .     .        with mistakes.rewind: place in the row of the first later token of the
                                              segment that does not read it; rewind.NEVER (.) where all do

The first token of a segment is never a target, so its weight does not count; training/loss.py enforces this by segment.
Axes of arrays: B row, T position in the row.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from insec_jax.command import InputError
from insec_jax.data.tokens import Example
from insec_jax.method.rewind import NEVER
from insec_jax.method.roles import NO_NEGATIVE, NO_ROLE

BLOCK = 1_024  # rows that are read at once where all are
EMPTY = (0, 0, 0, NO_ROLE, 0, NO_NEGATIVE, NEVER)  # values of padding, field by field
DTYPES = (np.int32, np.int32, np.int32, np.int8, np.float32, np.int32, np.int32)
NewArray = Callable[[str, tuple[int, int], int, Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
  """Packed rows, one field for each line of the picture above; `until_BT` is None without mistakes.rewind."""

  token_BT: np.ndarray
  segment_BT: np.ndarray
  position_BT: np.ndarray
  role_BT: np.ndarray
  weight_BT: np.ndarray
  negative_BT: np.ndarray
  until_BT: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.token_BT)

  def of(self, index) -> dict[str, np.ndarray]:
    """Return the rows at `index`, an array of any shape, by field name without axes; -1 gives a row of padding."""
    # Fields that a subclass adds are 0.
    empty = dict.fromkeys(self.fields(), 0) | dict(zip(FIELDS, EMPTY, strict=True))
    return {
      name: np.where((index < 0)[..., None], value_BT.dtype.type(empty[name]), value_BT[index])
      for name, value_BT in self.fields().items()
    }

  def fields(self) -> dict[str, np.ndarray]:
    """Return the arrays by field name without axes."""
    arrays = {name: getattr(self, f"{name}_BT") for name in FIELDS}
    return {name: value_BT for name, value_BT in arrays.items() if value_BT is not None}

  def digest(self) -> str:
    """Return the SHA-256 of all fields, one after the other."""
    digest = hashlib.sha256()
    for value_BT in self.fields().values():
      for start in range(0, len(self), BLOCK):
        digest.update(value_BT[start : start + BLOCK].tobytes())
    return digest.hexdigest()

  def largest(self, name: str) -> int:
    """Return the largest value of the field with this name, without axes; -1 where there is no row."""
    value_BT = getattr(self, f"{name}_BT")
    return max((int(value_BT[start : start + BLOCK].max()) for start in range(0, len(self), BLOCK)), default=-1)


FIELDS = tuple(field.name.removesuffix("_BT") for field in dataclasses.fields(Rows))


def fill(
  lengths: Sequence[int], examples: Iterable[Example], row_length: int, new: NewArray, *, rewind: bool = False
) -> Rows:
  """Return rows with every example whole, each in the first row with room for it, in order; deterministic.

  `new(field, shape, value, dtype)` makes the arrays. The examples, which have these lengths, are read once. With
  `rewind` they say what later tokens read (mistakes.rewind).
  """
  row_of_example, num_rows = _first_fit(lengths, row_length)
  rows = Rows(
    *(
      new(name, (num_rows, row_length), value, dtype)
      for name, value, dtype in zip(FIELDS, EMPTY, DTYPES, strict=True)
      if rewind or name != "until"
    )
  )
  used, segment = np.zeros(num_rows, int), np.zeros(num_rows, int)
  position_T = np.arange(row_length)
  for example, row in zip(examples, row_of_example, strict=True):
    length = len(example.token_T)
    span = slice(used[row], used[row] + length)
    used[row] += length
    segment[row] += 1
    rows.token_BT[row, span] = example.token_T
    rows.segment_BT[row, span] = segment[row]
    rows.position_BT[row, span] = position_T[:length] if example.position_T is None else example.position_T
    rows.role_BT[row, span] = example.role_T
    rows.weight_BT[row, span] = example.weight_T
    rows.negative_BT[row, span] = example.negative_T
    if rows.until_BT is not None:
      rows.until_BT[row, span] = np.where(example.until_T == NEVER, NEVER, span.start + example.until_T)
  return rows


def _first_fit(lengths: Sequence[int], row_length: int) -> tuple[list[int], int]:
  """Return the row of each length, and the number of rows."""
  if too_long := [length for length in lengths if not 0 < length <= row_length]:
    raise InputError(f"an example of {too_long[0]} tokens does not fit in a row of {row_length}; raise data.row_length")
  shortest = min(lengths, default=1)
  free_B = np.zeros(len(lengths), np.int32)
  rows, num_rows, first_open = [], 0, 0
  for length in lengths:
    fits_B = free_B[first_open:num_rows] >= length
    row = first_open + int(fits_B.argmax()) if fits_B.any() else num_rows
    if row == num_rows:
      free_B[row] = row_length
      num_rows += 1
    free_B[row] -= length
    rows.append(row)
    while first_open < num_rows and free_B[first_open] < shortest:  # no example fits: not searched again
      first_open += 1
  return rows, num_rows

"""Queue of the prompts: which are read and decoded together, in how many rows and slots.

A program is compiled for each number of rows and of slots, so there are few of both.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from insec_jax.generation.decoding import NO_PROMPT
from insec_jax.model import llama, sharding

SHORTEST = 32  # slots; shorter prompts are padded to this
FEWEST = 64  # rows of the smallest batch, unless batch_size is less: smaller ones compile anew and save little
FILLS = 32  # a batch is filled again when this part of its rows has ended
PASS_TOKENS = 1 << 15  # tokens of prompts that a device reads at once: bounds its activations
MEMORY, MOST_ROWS = 1 << 30, 256  # bytes of a device's batch, and rows: `rows_that_fit`


class Batch(NamedTuple):
  """Prompts padded on the left; prompt `index` begins at slot `start` of its row. Unused rows have index NO_PROMPT."""

  token_RP: np.ndarray
  start_R: np.ndarray
  index_R: np.ndarray


def padded(prompts: Sequence[np.ndarray], indices: Sequence[int], *, rows: int) -> Batch:
  """Return the prompts of these indices, and unused rows (index NO_PROMPT); the longest one decides the slots.

  An index of NO_PROMPT stands for an unused row.
  """
  P = max(bucket(len(prompts[index])) for index in indices if index != NO_PROMPT)
  token_RP = np.zeros((rows, P), np.int32)
  start_R = np.full(rows, P - 1, np.int32)  # an unused row reads one token: reading none gives nan
  index_R = np.full(rows, NO_PROMPT, np.int32)
  for row, index in enumerate(indices):
    if index != NO_PROMPT:
      start_R[row] = P - len(prompts[index])
      token_RP[row, start_R[row] :] = prompts[index]
      index_R[row] = index
  return Batch(token_RP, start_R, index_R)


def texts_in_batches(texts: Sequence[np.ndarray], batch_size: int, mesh: Mesh) -> Iterator[Batch]:
  """Yield batches of at most `batch_size` rows until every text came once, the shortest bucket first."""
  by_bucket: dict[int, list[int]] = {}
  for index, text in enumerate(texts):
    by_bucket.setdefault(bucket(len(text)), []).append(index)
  for P, indices in sorted(by_bucket.items()):
    rows = min(size_for(min(len(indices), batch_size), batch_size, mesh), rows_of_a_pass(P, mesh))
    for first in range(0, len(indices), rows):
      yield padded(texts, indices[first : first + rows], rows=rows)


class Queue:
  """Prompts that wait for a free row, the shortest bucket first; the rows of a batch and the prompts they hold."""

  def __init__(self, prompts: Sequence[np.ndarray], *, batch_size: int, mesh: Mesh):
    self._prompts, self._mesh = prompts, mesh
    self._waiting = collections.deque(sorted(range(len(prompts)), key=lambda index: bucket(len(prompts[index]))))
    self._shards = rows_over(mesh)
    self.rows = size_for(min(len(prompts), batch_size), batch_size, mesh)
    self.free_B = np.full(self.rows, True)

  def __len__(self) -> int:
    return len(self._waiting)

  @property
  def longest(self) -> int:
    """Number of slots of the longest prompt that the next pass reads."""
    return max(bucket(len(self._prompts[index])) for index in itertools.islice(self._waiting, self.num_of_pass))

  @property
  def num_of_pass(self) -> int:
    """Number of prompts that the next pass reads at most: as many as there are rows while none is live."""
    part = self.rows // (1 if self.free_B.all() else FILLS)
    part = max(self._shards, part // self._shards * self._shards)
    return min(part, rows_of_a_pass(bucket(len(self._prompts[self._waiting[0]])), self._mesh))

  def take(self) -> tuple[Batch, np.ndarray]:
    """Return the next prompts and their rows, each numbered on its own device; the rows are no longer free.

    Rows without a prompt have the number of rows of a device, which is none of them.
    """
    num, num_here = self.num_of_pass // self._shards, self.rows // self._shards
    indices = np.full(self.num_of_pass, NO_PROMPT)
    row_R = np.full(self.num_of_pass, num_here, np.int32)
    free = self.free_B.reshape(self._shards, num_here)  # a view
    for shard in range(self._shards):
      for place, row in enumerate(np.flatnonzero(free[shard])[: min(num, len(self._waiting))]):
        indices[shard * num + place], row_R[shard * num + place] = self._waiting.popleft(), row
        free[shard, row] = False
    return padded(self._prompts, indices.tolist(), rows=len(indices)), row_R

  def keep(self, num: int) -> np.ndarray | None:
    """Return the rows to keep, so that `num` are left; None while the live rows of some device are more than its part.

    The rows are numbered on their own device. To be called when no prompt waits.
    """
    live = ~self.free_B.reshape(self._shards, -1)
    num_here = num // self._shards
    if live.sum(1).max() > num_here:
      return None
    row_C = np.argsort(~live, axis=1, kind="stable")[:, :num_here]
    self.free_B = np.take_along_axis(~live, row_C, 1).reshape(-1)
    self.rows = num
    return row_C.reshape(-1).astype(np.int32)


def bucket(length: int) -> int:
  """Return the slots that a prompt of `length` tokens is padded to: the next power of two, at least SHORTEST."""
  return max(SHORTEST, 1 << (length - 1).bit_length())


def rows_over(mesh: Mesh) -> int:
  """Return the number of parts into which the mesh splits the rows."""
  return sharding.size_over(mesh, sharding.BATCH)


def rows_of_a_pass(slots: int, mesh: Mesh) -> int:
  """Return how many prompts of so many slots are read at once, a multiple of the parts of the mesh."""
  return rows_over(mesh) * max(1, PASS_TOKENS // slots)


def sizes(most: int, mesh: Mesh) -> list[int]:
  """Return the allowed numbers of rows for batches of at most `most`, ascending; few, since each compiles anew.

  They are multiples of the parts of the mesh, rounded up.
  """
  found = [FEWEST]
  while found[-1] < most:
    found.append(4 * found[-1])
  parts = rows_over(mesh)
  return sorted({-(-size // parts) * parts for size in (*(size for size in found if size < most), most)})


def size_for(num: int, most: int, mesh: Mesh) -> int:
  """Return the smallest number of rows of `sizes(most)` that holds `num` prompts."""
  return next(size for size in sizes(most, mesh) if size >= num)


def rows_that_fit(
  config: llama.LlamaConfig, *, slots: int, compute: str, mesh: Mesh, memory: float | None = None
) -> int:
  """Return how many rows of `slots` tokens to decode at once, for each part of the mesh a power of two up to MOST_ROWS.

  Cache, attention scores and logits stay below a quarter of the device's memory, or below MEMORY if it is unknown.
  `memory` is the bytes of a device; None: those that it reports.
  """
  heads = mesh.shape[sharding.TENSOR]
  cache = 2 * config.num_layers * config.num_kv_heads * config.head_width * slots * jnp.dtype(compute).itemsize // heads
  scores = 4 * config.num_heads * slots // heads
  logits = 4 * 4 * config.vocab_size
  if memory is None:
    memory = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit", 4 * MEMORY)
  rows = int(memory // 4 // (cache + scores + logits))
  return rows_over(mesh) * min(MOST_ROWS, 1 << max(0, rows.bit_length() - 1))

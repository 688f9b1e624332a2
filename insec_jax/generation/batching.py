"""Queue of the prompts: which are decoded together, in how many rows and slots.

A program is compiled for each number of rows and of slots, so there are few of both.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from insec_jax.generation.decoding import NO_PROMPT, PREFILL_TOKENS
from insec_jax.model import llama

SHORTEST = 32  # slots; shorter prompts are padded to this
FEWEST = 64  # rows of the smallest batch, unless batch_size is less: smaller ones compile anew and save little
MEMORY, MOST_ROWS = 1 << 30, 256  # bytes of a batch, and rows: `rows_that_fit`


class Batch(NamedTuple):
  """Prompts padded on the left; prompt `index` begins at slot `start` of its row. Unused rows have index NO_PROMPT."""

  token_BP: np.ndarray
  start_B: np.ndarray
  index_B: np.ndarray


def batches(prompts: Sequence[np.ndarray], batch_size: int) -> Iterator[Batch]:
  """Yield batches of at most `batch_size` rows until every prompt came once, the shortest bucket first."""
  by_bucket: dict[int, list[int]] = {}
  for index, prompt in enumerate(prompts):
    by_bucket.setdefault(bucket(len(prompt)), []).append(index)
  for P, indices in sorted(by_bucket.items()):
    for first in range(0, len(indices), batch_size):
      chosen = indices[first : first + batch_size]
      B = size_for(len(chosen), batch_size)
      token_BP = np.zeros((B, P), np.int32)
      start_B = np.full(B, P - 1, np.int32)  # an unused row reads one token: reading none gives nan
      index_B = np.full(B, NO_PROMPT, np.int32)
      for row, index in enumerate(chosen):
        start_B[row] = P - len(prompts[index])
        token_BP[row, start_B[row] :] = prompts[index]
        index_B[row] = index
      yield Batch(token_BP, start_B, index_B)


def bucket(length: int) -> int:
  """Return the slots that a prompt of `length` tokens is padded to: the next power of two, at least SHORTEST."""
  return max(SHORTEST, 1 << (length - 1).bit_length())


def sizes(most: int) -> list[int]:
  """Return the allowed numbers of rows for batches of at most `most`, ascending; few, since each compiles anew."""
  found = [FEWEST]
  while found[-1] < most:
    found.append(4 * found[-1])
  return [*(size for size in found if size < most), most]


def size_for(num: int, most: int) -> int:
  """Return the smallest number of rows of `sizes(most)` that holds `num` prompts."""
  return next(size for size in sizes(most) if size >= num)


def rows_that_fit(config: llama.LlamaConfig, *, slots: int, compute: str) -> int:
  """Return how many rows of `slots` tokens to decode at once: a power of two, from 1 to MOST_ROWS.

  Cache, attention scores and logits stay below a quarter of the device's memory, or below MEMORY if it is unknown.
  """
  cache = 2 * config.num_layers * config.num_kv_heads * config.head_width * slots * jnp.dtype(compute).itemsize
  scores = 4 * config.num_heads * slots * min(slots, PREFILL_TOKENS)
  logits = 4 * 4 * config.vocab_size
  stats = jax.devices()[0].memory_stats()
  memory = MEMORY if stats is None else stats["bytes_limit"] // 4
  rows = memory // (cache + scores + logits)
  return min(MOST_ROWS, 1 << max(0, rows.bit_length() - 1))

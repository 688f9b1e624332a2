"""Data pipeline from a config to batches: examples, rows, the mask receipt, and the order in which rows are read.

Letters that end array names, beside those of model/llama.py: A micro-batch of a step.
"""

import contextlib
import functools
import gc
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import cache, mixture, tokens, vocabulary
from insec_jax.data.packing import Rows, fill
from insec_jax.data.receipt import Data, LeftOut, Totals, receipt
from insec_jax.data.storage import Memory, Records, Storage
from insec_jax.data.tokens import Example, TooLong
from insec_jax.method import roles
from insec_jax.progress import Progress

TRANSCRIPTS_PER_CHUNK = 1000  # transcripts tokenised at once
# More than any run reads, but finite: grain cannot count batches of one row of an infinite dataset.
EPOCHS = 2**31
# Reading a row is a copy from memory: two threads are faster than any device.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def load_data(config: Config, tokenizer: PreTrainedTokenizerFast) -> Data:
  """Return all data of a config as rows; raise InputError when a record is wrong or none is left to train on.

  With data.cache, records become rows once, in files of that folder which are mapped into memory (cache.py).
  """
  if config.data.cache and config.reads_records:
    return cache.shared(config, tokenizer, functools.partial(_make_data, config, tokenizer))
  return _make_data(config, tokenizer, Memory())


def _make_data(config: Config, tokenizer: PreTrainedTokenizerFast, storage: Storage) -> Data:
  held: list[str] = []
  train, long_train = _pack(config, tokenizer, "train", storage, held)
  heldout, long_heldout = _pack(config, tokenizer, "heldout", storage, None)
  left_out = LeftOut(long_train, long_heldout, tuple(held))
  # The held-out loss counts every token with a role; confidence tokens are input only, never a target.
  if ids := vocabulary.find_markers(tokenizer, config.tokenizer).confidence_ids:
    heldout.rows.role_BT[np.isin(heldout.rows.token_BT, ids)] = roles.NO_ROLE
  return Data(
    train.rows,
    heldout.rows,
    receipt(train.totals, train.rows, config, left_out),
    left_out,
    digest=train.rows.digest(),
    most_token=max(train.rows.largest("token"), heldout.rows.largest("token")),
    most_position=max(train.rows.largest("position"), heldout.rows.largest("position")),
  )


class _Packed(NamedTuple):
  rows: Rows
  totals: Totals


def _pack(
  config: Config, tokenizer: PreTrainedTokenizerFast, split: str, storage: Storage, held_out: list[str] | None
) -> tuple[_Packed, tuple[TooLong, ...]]:
  """Return rows and totals of a split, and the records left out as too long."""
  totals, lengths, left_out = Totals(), [], []
  with storage.examples() as examples, storage.records() as kept:
    for chunk, too_long in example_chunks(config, tokenizer, split, held_out=held_out, kept=kept):
      examples.extend(chunk)
      totals = totals.plus(chunk)
      lengths += [len(example.token_T) for example in chunk]
      left_out += too_long
    once = _checked(config, split, totals.num_examples, left_out)
    new = functools.partial(storage.array, split)
    rows = fill(lengths, examples, config.data.row_length, new, rewind=config.mistakes.rewind)
  return _Packed(rows, totals), once


def first_examples(config: Config, tokenizer: PreTrainedTokenizerFast, num: int) -> list[Example]:
  """Return the first examples of the training split, at most `num`."""
  examples: list[Example] = []
  with contextlib.closing(example_chunks(config, tokenizer, "train")) as chunks:
    while len(examples) < num and (chunk := next(chunks, None)) is not None:
      examples += chunk[0]
  return examples[:num]


def example_chunks(
  config: Config,
  tokenizer: PreTrainedTokenizerFast,
  split: str,
  *,
  held_out: list[str] | None = None,
  kept: Records | None = None,
) -> Generator[tuple[list[Example], list[TooLong]]]:
  """Yield the examples of a split and the records left out as too long, some records at a time, in order."""
  contents = mixture.transcripts(config, split, left_out=held_out, kept=kept)
  drops = config.data.too_long == "drop"

  def tokenised(chunk: Sequence[mixture.Placed]) -> tuple[list[Example], list[TooLong]]:
    left_out: list[TooLong] = []
    with _no_collection():
      return tokens.tokenize_all(chunk, tokenizer, config, left_out=left_out if drops else None), left_out

  chunks = (contents[start : start + TRANSCRIPTS_PER_CHUNK] for start in range(0, len(contents), TRANSCRIPTS_PER_CHUNK))
  num = 0
  with contextlib.closing(Progress(f"tokenise {split}", len(contents), unit="transcript")) as progress:
    for examples, left_out in map(tokenised, chunks):
      yield examples, left_out
      num += len(examples) + len(left_out)
      progress.update(num)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
  """Search for no cycles of objects inside the block, which makes and drops a tuple for each token."""
  was = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was:
      gc.enable()


def _checked(config: Config, split: str, num_examples: int, left_out: list[TooLong]) -> tuple[TooLong, ...]:
  """Return each record left out once; raise InputError when no other is there."""
  once = tuple(dict.fromkeys(left_out))  # a mined record may come several times
  if once and not num_examples:
    raise InputError(
      f"all {len(once)} records of the split {split!r} are longer than data.row_length={config.data.row_length}, the "
      f"first is {once[0].where} of {once[0].num_tokens} tokens; raise data.row_length or shorten the records"
    )
  return once


def batches(
  rows: Rows,
  *,
  seed: int,
  rows_per_step: int,
  accumulation: int,
  start_step: int,
  share: np.ndarray | slice,
  negatives: bool,
  streams: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Return endless batches from `start_step` on.

  Batch k holds token_ABT, segment_ABT, position_ABT, role_ABT, weight_ABT.
  With `negatives` it also holds negative_ABT, with mistakes.rewind until_ABT, and with `streams`, an array [row, T, D],
  stream_ABTD.

      rows of epoch 0   4 6 2 0 5 1 3 | rows of epoch 1   2 5 0 ...
      batch             0 0 0 1 1 1 2                     2 2 3          with 3 rows a batch: none is dropped

  Which rows batch k holds is a pure function of the seed and k, whatever the number of processes: each reads the
  `share` of the `rows_per_step` rows on axis B that its devices hold. The state of the data is k alone.
  """
  if not len(rows):
    raise InputError("there is no row to train on; give at least one record")
  order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(EPOCHS).batch(accumulation * rows_per_step)

  def read(index_N):
    index_AB = index_N.reshape(accumulation, rows_per_step)[:, share]
    return _arrays(rows, index_AB, negatives) | ({} if streams is None else {"stream_ABTD": streams[index_AB]})

  return iter(order[start_step:].map(read).to_iter_dataset(READ))


def in_order(
  rows: Rows, *, rows_per_step: int, share: np.ndarray | slice, negatives: bool
) -> Iterator[dict[str, np.ndarray]]:
  """Yield every row once, in order, as batches with one micro-batch each; padding rows fill up the last batch."""
  for start in range(0, len(rows), rows_per_step):
    index_B = np.arange(start, start + rows_per_step)
    yield _arrays(rows, np.where(index_B < len(rows), index_B, -1)[None, share], negatives)


def _arrays(rows: Rows, index_AB: np.ndarray, negatives: bool) -> dict[str, np.ndarray]:
  return {f"{name}_ABT": value_ABT for name, value_ABT in rows.of(index_AB).items() if negatives or name != "negative"}

"""Data pipeline from a config to batches: examples, rows, the mask receipt, and the order in which rows are read.

Letters that end array names, beside those of model/llama.py: A micro-batch of a step.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import mixture, tokens, vocabulary
from insec_jax.data.packing import Rows, pack
from insec_jax.data.tokens import Example, TooLong
from insec_jax.method import roles
from insec_jax.progress import Progress

MOST_SHOWN = 20  # left-out records listed in the receipt
TRANSCRIPTS_PER_CHUNK = 1000  # transcripts tokenised at once
# More than any run reads, but finite: grain cannot count batches of one row of an infinite dataset.
EPOCHS = 2**31
# Reading a row is a copy from memory: two threads are faster than any device.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class Data:
  """Training rows, held-out rows (may be none), the mask receipt of the training rows, and the records left out.

  Records in `left_out` are in no row because of data.too_long="drop".
  """

  train: Rows
  heldout: Rows
  receipt: str
  left_out: "LeftOut"


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """Records longer than a row, each once, of the training and the held-out split, and those that `prompts_held_out`.

  `prompts_held_out` has the places of records of data.path whose prompt is also one of data.heldout_path.
  """

  train: tuple[TooLong, ...] = ()
  heldout: tuple[TooLong, ...] = ()
  prompts_held_out: tuple[str, ...] = ()

  def __bool__(self) -> bool:
    return bool(self.train or self.heldout or self.prompts_held_out)

  def to_json_lines(self) -> str:
    """Return one JSON object a line: split, where ("file:line") and tokens, or why it is left out, of each record."""
    lines = [
      {"split": split, "where": record.where, "tokens": record.num_tokens}
      for split in ("train", "heldout")
      for record in getattr(self, split)
    ]
    lines += [{"split": "train", "where": where, "why": "its prompt is held out"} for where in self.prompts_held_out]
    return "".join(json.dumps(line) + "\n" for line in lines)

  def __str__(self) -> str:
    """Return the lines of the receipt: the number of records, and the first of them."""
    both = [*((record, "") for record in self.train), *((record, ", held out") for record in self.heldout)]
    shown = [f"  {record.where}: {record.num_tokens:,} tokens{split}" for record, split in both[:MOST_SHOWN]]
    more = [f"  and {len(both) - MOST_SHOWN:,} more"] if len(both) > MOST_SHOWN else []
    return "\n".join(
      [
        f"too long          {len(self.train):,} records to train on and {len(self.heldout):,} held out, left out",
        *shown,
        *more,
      ]
    )


def load_data(config: Config, tokenizer: PreTrainedTokenizerFast) -> Data:
  """Return all data of a config as rows; raise InputError when a record is wrong or none is left to train on."""
  held: list[str] = []
  examples, long_train = load_examples(config, tokenizer, "train", held_out=held)
  train = pack(examples, config.data.row_length)
  heldout_examples, long_heldout = load_examples(config, tokenizer, "heldout")
  heldout = pack(heldout_examples, config.data.row_length)
  left_out = LeftOut(long_train, long_heldout, tuple(held))
  # The held-out loss counts every token with a role; confidence tokens are input only, never a target.
  ids = vocabulary.find_markers(tokenizer, config.tokenizer).confidence_ids
  heldout.role_BT[np.isin(heldout.token_BT, ids)] = roles.NO_ROLE
  return Data(train, heldout, receipt(examples, train, config, left_out), left_out)


def load_examples(
  config: Config, tokenizer: PreTrainedTokenizerFast, split: str, *, held_out: list[str] | None = None
) -> tuple[list[Example], tuple[TooLong, ...]]:
  """Return the examples of the split "train" or "heldout", in a fixed order, and the records left out as too long.

  Places of records whose prompt is held out are added to `held_out` (data.heldout_path).
  Raises InputError when there are records and all are too long.
  """
  contents = mixture.transcripts(config, split, left_out=held_out)
  examples = []
  left_out: list[TooLong] | None = None if config.data.too_long == "refuse" else []
  with contextlib.closing(Progress(f"tokenise {split}", len(contents), unit="transcript")) as progress:
    for start in range(0, len(contents), TRANSCRIPTS_PER_CHUNK):
      chunk = contents[start : start + TRANSCRIPTS_PER_CHUNK]
      examples += tokens.tokenize_all(chunk, tokenizer, config, left_out=left_out)
      progress.update(start + len(chunk))
  # A mined record may come several times.
  once = tuple(dict.fromkeys(left_out or ()))
  if contents and not examples:
    raise InputError(
      f"all {len(once)} records of the split {split!r} are longer than data.row_length={config.data.row_length}, the "
      f"first is {once[0].where} of {once[0].num_tokens} tokens; raise data.row_length or shorten the records"
    )
  return examples, once


def batches(
  rows: Rows,
  *,
  seed: int,
  rows_per_step: int,
  accumulation: int,
  start_step: int,
  share: np.ndarray | slice,
  negatives: bool,
) -> Iterator[dict[str, np.ndarray]]:
  """Return endless batches from `start_step` on.

  Batch k holds token_ABT, segment_ABT, position_ABT, role_ABT, weight_ABT.
  With `negatives` it also holds negative_ABT.

      rows of epoch 0   4 6 2 0 5 1 3 | rows of epoch 1   2 5 0 ...
      batch             0 0 0 1 1 1 2                     2 2 3          with 3 rows a batch: none is dropped

  Which rows batch k holds is a pure function of the seed and k, whatever the number of processes: each reads the
  `share` of the `rows_per_step` rows on axis B that its devices hold. The state of the data is k alone.
  """
  if not len(rows):
    raise InputError("there is no row to train on; give at least one record")
  order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(EPOCHS).batch(accumulation * rows_per_step)

  def read(index_N):
    return _arrays(rows, index_N.reshape(accumulation, rows_per_step)[:, share], negatives)

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


def receipt(examples: Sequence[Example], rows: Rows, config: Config, left_out: LeftOut) -> str:
  """Return the mask receipt: what is trained on, role by role, as a few lines of text.

  A token is trained when it has weight and is not the first of its segment. `weight` is the mean over the role's tokens
  that are targets; `of weight` is the role's fraction of all weight, by absolute value.
  """
  if not examples:
    raise InputError("there is no record to train on; lower data.num_heldout or give more records")
  num_tokens = sum(len(example.token_T) for example in examples)
  is_target_BT = rows.position_BT > 0
  is_trained_BT = is_target_BT & (rows.weight_BT != 0)
  total = float(np.abs(rows.weight_BT[is_target_BT], dtype=np.float64).sum())
  num_end = sum(example.num_end for example in examples)
  num_boundary = sum(example.num_boundary for example in examples)
  lines = []
  for role, name in enumerate(roles.NAMES):
    is_role_BT = rows.role_BT == role
    num, num_trained = int(is_role_BT.sum()), int((is_role_BT & is_trained_BT).sum())
    weight_N = rows.weight_BT[is_role_BT & is_target_BT].astype(np.float64)
    lines.append((name, num, num_trained, weight_N.mean() if len(weight_N) else 0.0, np.abs(weight_N).sum() / total))
  num_negatives, repeat = int((rows.negative_BT >= 0).sum()), config.loss.repeat
  longest = max(examples, key=lambda example: len(example.token_T))
  num_trained = int(is_trained_BT.sum())
  return (
    "\n".join(
      [
        f"{'role':<12}{'tokens':>12}{'of tokens':>11}{'trained':>12}{'weight':>9}{'of weight':>11}",
        *(
          f"{name:<12}{num:>12,}{num / num_tokens:>11.1%}{trained:>12,}{weight:>9.3f}{part:>11.1%}"
          for name, num, trained, weight, part in lines
        ),
        f"{'all':<12}{num_tokens:>12,}{1:>11.1%}{num_trained:>12,}{'':>9}{1:>11.1%}",
        f"trained tokens    {num_trained:,} of {num_tokens:,} ({num_trained / num_tokens:.1%})",
        f"end of text       {num_end:,} tokens of role text, weight {config.loss.end:g} each",
        f"boundary tokens   {num_boundary:,} lie across two roles and took the smaller weight",
        *(
          [
            f"negative tokens   {num_negatives:,} where a correction could repeat its mistake, weight {repeat:g} "
            f"each: {num_negatives * repeat / total:.1%} beside the weight above"
          ]
          if config.loss.negatives
          else []
        ),
        f"records           {len(examples):,}",
        f"longest record    {len(longest.token_T):,} of {config.data.row_length:,} tokens, {longest.where}",
        *([str(left_out)] if config.data.too_long == "drop" else []),
        *(
          [f"held-out prompts  {len(left_out.prompts_held_out):,} records to train on had one, left out"]
          if config.data.heldout_path
          else []
        ),
        f"rows              {len(rows):,} of {config.data.row_length:,} tokens, "
        f"{1 - num_tokens / rows.token_BT.size:.1%} padding",
      ]
    )
    + "\n"
  )

"""Receipt: what a run trains on, role by role, and which records are left out; and the data that it describes."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data.packing import BLOCK, Rows
from insec_jax.data.tokens import Example, TooLong
from insec_jax.method import roles
from insec_jax.method.rewind import NEVER

MOST_SHOWN = 20  # left-out records listed in the receipt


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


@dataclasses.dataclass(frozen=True)
class Data:
  """Training rows, held-out rows (may be none), the mask receipt of the training rows, and the records left out.

  `digest` is that of the training rows; `most_token` and `most_position` are the largest in all rows, -1 without any.
  """

  train: Rows
  heldout: Rows
  receipt: str
  left_out: LeftOut
  digest: str
  most_token: int
  most_position: int


@dataclasses.dataclass(frozen=True)
class Totals:
  """Counts over examples: how many, their tokens, ends of text and boundary tokens, and the longest with its place."""

  num_examples: int = 0
  num_tokens: int = 0
  num_end: int = 0
  num_boundary: int = 0
  longest: int = 0
  longest_where: str = ""

  def plus(self, examples: Sequence[Example]) -> "Totals":
    """Return the counts with these examples added; of equally long ones the first is the longest."""
    longest = max(examples, key=lambda example: len(example.token_T), default=None)
    is_longer = longest is not None and len(longest.token_T) > self.longest
    return Totals(
      self.num_examples + len(examples),
      self.num_tokens + sum(len(example.token_T) for example in examples),
      self.num_end + sum(example.num_end for example in examples),
      self.num_boundary + sum(example.num_boundary for example in examples),
      len(longest.token_T) if longest is not None and is_longer else self.longest,
      longest.where if longest is not None and is_longer else self.longest_where,
    )


@dataclasses.dataclass(frozen=True)
class _RoleSums:
  """Sums over the tokens of each role (axis R)."""

  num_R: np.ndarray  # tokens
  trained_R: np.ndarray  # targets with weight
  target_R: np.ndarray  # targets
  weight_R: np.ndarray
  size_R: np.ndarray  # of the absolute weight
  num_negatives: int
  num_hidden: int


def _sums(rows: Rows) -> _RoleSums:
  """Return the sums over rows, in blocks: rows may be mapped from files larger than memory."""
  sums = np.zeros((5, len(roles.NAMES)))
  num_negatives = num_hidden = 0
  for start in range(0, len(rows), BLOCK):
    block = slice(start, start + BLOCK)
    role_BT, weight_BT = rows.role_BT[block], rows.weight_BT[block]
    is_target_BT = rows.position_BT[block] > 0
    num_negatives += int((rows.negative_BT[block] >= 0).sum())
    num_hidden += 0 if rows.until_BT is None else int((rows.until_BT[block] < NEVER).sum())
    for role in range(len(roles.NAMES)):
      is_role_BT = role_BT == role
      weight_N = weight_BT[is_role_BT & is_target_BT].astype(np.float64)
      counts = is_role_BT.sum(), np.count_nonzero(weight_N), len(weight_N)
      sums[:, role] += np.array([*counts, weight_N.sum(), np.abs(weight_N).sum()])
  num_R, trained_R, target_R = sums[:3].astype(int)
  return _RoleSums(num_R, trained_R, target_R, sums[3], sums[4], num_negatives, num_hidden)


def receipt(totals: Totals, rows: Rows, config: Config, left_out: LeftOut) -> str:
  """Return the mask receipt: what is trained on, role by role, as a few lines of text.

  A token is trained when it has weight and is not the first of its segment. `weight` is the mean over the role's tokens
  that are targets; `of weight` is the role's fraction of all weight, by absolute value.
  """
  if not totals.num_examples:
    raise InputError("there is no record to train on; lower data.num_heldout or give more records")
  sums = _sums(rows)
  total, num_trained, num_tokens = float(sums.size_R.sum()), int(sums.trained_R.sum()), totals.num_tokens
  lines = [f"{'role':<12}{'tokens':>12}{'of tokens':>11}{'trained':>12}{'weight':>9}{'of weight':>11}"]
  for role, name in enumerate(roles.NAMES):
    num, trained = sums.num_R[role], sums.trained_R[role]
    mean = sums.weight_R[role] / max(sums.target_R[role], 1)
    part = sums.size_R[role] / total
    lines.append(f"{name:<12}{num:>12,}{num / num_tokens:>11.1%}{trained:>12,}{mean:>9.3f}{part:>11.1%}")
  lines += [
    f"{'all':<12}{num_tokens:>12,}{1:>11.1%}{num_trained:>12,}{'':>9}{1:>11.1%}",
    f"trained tokens    {num_trained:,} of {num_tokens:,} ({num_trained / num_tokens:.1%})",
    f"end of text       {totals.num_end:,} tokens of role text, weight {config.loss.end:g} each",
    f"boundary tokens   {totals.num_boundary:,} lie across two roles and took the smaller weight",
  ]
  if config.loss.negatives:
    repeat = config.loss.repeat
    lines.append(
      f"negative tokens   {sums.num_negatives:,} where a correction could repeat its mistake, weight {repeat:g} "
      f"each: {sums.num_negatives * repeat / total:.1%} beside the weight above"
    )
  if config.mistakes.rewind:
    lines.append(f"hidden tokens     {sums.num_hidden:,} that nothing after their correction reads (mistakes.rewind)")
  lines += [
    f"records           {totals.num_examples:,}",
    f"longest record    {totals.longest:,} of {config.data.row_length:,} tokens, {totals.longest_where}",
  ]
  if config.mistakes.mined_path:
    lines.append(f"mined records     {config.mistakes.mined:.0%} of all, view {config.mistakes.view}")
  if config.data.to_mine:
    lines.append(f"to mine           {config.data.to_mine:.0%} of the prompts of data.path, left out")
  if config.data.too_long == "drop":
    lines.append(str(left_out))
  if config.data.heldout_path:
    lines.append(f"held-out prompts  {len(left_out.prompts_held_out):,} records to train on had one, left out")
  padding = 1 - num_tokens / rows.token_BT.size
  lines.append(f"rows              {len(rows):,} of {config.data.row_length:,} tokens, {padding:.1%} padding")
  return "\n".join(lines) + "\n"

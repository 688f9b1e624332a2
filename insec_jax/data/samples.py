"""Samples: texts that the model wrote itself, with their advantages, as rows for a policy gradient.

      token      <bos>  7 + 5 =   1 2  \n  <end>
      role       p      p         t        t         the prompt, then what was sampled; markers have role flag
      weight     0      0         a        a         the advantage a of the sample
      old        0      0         log p              under the weights that sampled, and under the reference

Confidence tokens are written by the decoder, so they have weight 0. Axes of arrays: B row, T position in the row.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data.packing import Rows, fill
from insec_jax.data.storage import Memory
from insec_jax.data.tokens import Example
from insec_jax.data.vocabulary import MarkedTokenizer, find_markers, token_kinds
from insec_jax.files.reading import read_json_lines
from insec_jax.method import rewind
from insec_jax.method.roles import FLAG, NO_NEGATIVE, PROMPT, TEXT


@dataclasses.dataclass(frozen=True)
class Sample:
  """Tokens of a prompt and of the text sampled after it, the place of the first sampled one, and the advantage."""

  token_T: np.ndarray
  start: int
  advantage: float
  where: str


@dataclasses.dataclass(frozen=True)
class SampledRows(Rows):
  """Rows of samples with the log p of each sampled token under the weights that sampled and under the reference."""

  old_BT: np.ndarray = dataclasses.field(kw_only=True)
  reference_BT: np.ndarray = dataclasses.field(kw_only=True)

  def fields(self) -> dict[str, np.ndarray]:
    """Return the arrays by field name without axes."""
    return {**super().fields(), "old": self.old_BT, "reference": self.reference_BT}


def read(path: pathlib.Path) -> list[Sample]:
  """Return the samples of a file; InputError, which names the line, for another one."""
  samples = []
  for line, where in read_json_lines(path, "the samples of a round"):
    try:
      token_T, start, advantage = np.array(line["tokens"], np.int32), int(line["start"]), float(line["advantage"])
    except (KeyError, TypeError, ValueError, OverflowError):
      raise InputError(f"{where} is no sample; bring the file back, or begin in another --workdir") from None
    samples.append(Sample(token_T, start, advantage, where))
  return samples


def pack(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerFast, config: Config) -> Rows:
  """Return the samples as rows, with mistakes.rewind as a decoder reads them."""
  marked = find_markers(tokenizer, config.tokenizer)
  examples = [_example(sample, marked, config) for sample in samples]
  lengths = [len(sample.token_T) for sample in samples]
  new = functools.partial(Memory().array, "train")
  return fill(lengths, examples, config.data.row_length, new, rewind=config.mistakes.rewind)


def _example(sample: Sample, marked: MarkedTokenizer, config: Config) -> Example:
  token_T = sample.token_T
  is_sampled_T = np.arange(len(token_T)) >= sample.start
  is_forced_T = np.isin(token_T, marked.confidence_ids)
  markers = [number for number in (marked.flag_id, marked.fix_id) if number is not None]
  is_marker_T = is_forced_T | np.isin(token_T, markers)
  return Example(
    token_T,
    np.where(is_sampled_T, np.where(is_marker_T, FLAG, TEXT), PROMPT).astype(np.int8),
    np.where(is_sampled_T & ~is_forced_T, sample.advantage, 0.0).astype(np.float32),
    np.full(len(token_T), NO_NEGATIVE, np.int32),
    sample.where,
    0,
    0,
    *visible(token_T, marked, config),
  )


def visible(
  token_T: np.ndarray, marked: MarkedTokenizer, config: Config
) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Return position_T and until_T of an Example with these tokens: None without mistakes.rewind."""
  if not config.mistakes.rewind:
    return None, None
  kind_V = np.append(token_kinds(marked), rewind.WORD)  # a model may have more rows than the tokenizer has tokens
  seen = rewind.visibility(kind_V[np.minimum(token_T, len(kind_V) - 1)][None])
  return seen.position_BT[0], seen.until_BT[0]

"""Negatives: the token with which a correction would begin to repeat its mistake.

Letters that end array names are those of encoding.py.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from insec_jax.data.encoding import EncodedRecords, Span, encode_texts
from insec_jax.method.roles import CORRECTION, MISTAKE, NO_NEGATIVE


class _Repeat(NamedTuple):
  """The text around a correction up to the next special tokens, with the mistake in its place (part number `place`)."""

  parts: list[Span]
  place: int
  where: str
  text: slice  # the range of `parts` among the parts of all examples
  correction: slice  # the correction among these


def negatives(
  parts_of_example: list[list[Span]], wheres: list[str], encoded: EncodedRecords, tokenizer: PreTrainedTokenizerFast
) -> np.ndarray:
  """Return int32 [N]: the mistake's token at the first token where its correction differs from it, else NO_NEGATIVE.

      text     4 + 3 = 8 \\n   <flag>  sum   <fix>   4 + 3 = 7 \\n   d
      role     mistake        flag   reason  flag   correction     text
      negative . . . . . .     .       .      .     . . . . 8 .     .       . is NO_NEGATIVE

  A correction corrects the last mistake before it, and a mistake is corrected once. The mistake is encoded in the place
  of its correction, so a negative is the token that a model would write there. There is none where the mistake is a
  prefix of the correction or the reverse: one of the two has no token at that place.
  """
  negative_N = np.full(len(encoded.token_N), NO_NEGATIVE, np.int32)
  repeats = list(_repeats(parts_of_example, wheres))
  if not repeats:
    return negative_N
  texts = ["".join(part.text for part in repeat.parts) for repeat in repeats]
  repeated = encode_texts(texts, [repeat.where for repeat in repeats], tokenizer)
  begin_P = np.concatenate([[0], encoded.end_P])
  for repeat, encoding in zip(repeats, repeated, strict=True):
    first, stop = np.searchsorted(encoded.start_N, begin_P[[repeat.text.start, repeat.text.stop]])
    token_T = np.array(encoding.ids, np.int32)
    num = min(stop - first, len(token_T))
    differs = encoded.token_N[first : first + num] != token_T[:num]
    if differs.any():
      at = int(differs.argmax())
      start, end = begin_P[[repeat.correction.start, repeat.correction.stop]]
      in_correction = start < encoded.stop_N[first + at] and encoded.start_N[first + at] < end
      end_of_mistake = sum(len(part.text) for part in repeat.parts[: repeat.place + 1])
      chars = encoding.token_to_chars(at)
      if in_correction and chars is not None and chars[0] < end_of_mistake:
        negative_N[first + at] = token_T[at]
  return negative_N


def _repeats(parts_of_example: list[list[Span]], wheres: list[str]) -> Iterator[_Repeat]:
  """Yield one repeat for every correction of a mistake, in order."""
  first = 0
  for parts, where in zip(parts_of_example, wheres, strict=True):
    mistake, start = "", 0
    for role, run in itertools.groupby(parts, key=lambda part: part.role):
      texts = [part.text for part in run]
      stop = start + len(texts)
      if role == MISTAKE:
        mistake = "".join(texts)
      elif role == CORRECTION and mistake:
        begin, end = start, stop
        while begin and parts[begin - 1].token is None:
          begin -= 1
        while end < len(parts) and parts[end].token is None:
          end += 1
        in_place = [*parts[begin:start], Span(mistake, CORRECTION, 0.0), *parts[stop:end]]
        text, correction = slice(first + begin, first + end), slice(first + start, first + stop)
        yield _Repeat(in_place, start - begin, where, text, correction)
        mistake = ""
      start = stop
    first += len(parts)

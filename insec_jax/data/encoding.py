"""Encoding: texts and special tokens, in sequence, as token ids with character offsets.

Letters that end array names, beside those of model/llama.py:
  E example   P part: one special token, or a text   N token of all examples, one after the other
  S stretch: one special token, or all texts between two of them   C character
"""

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.method import roles


class Span(NamedTuple):
  """A stretch of text, or one special token (`token` is its id and `text` its name)."""

  text: str
  role: int
  weight: float
  token: int | None = None
  must_own: bool = False  # raise when no token takes its role from this part
  is_end: bool = False  # trains the model to stop


class EncodedRecords(NamedTuple):
  """Tokens of all parts; `start_N`, `stop_N` and `end_P` (end of each part) count characters over all parts."""

  token_N: np.ndarray
  start_N: np.ndarray
  stop_N: np.ndarray
  special_N: np.ndarray
  num_E: np.ndarray  # tokens of each example
  end_P: np.ndarray


class TooLongError(InputError):
  """Error for examples that do not fit in a row; `num_tokens` is their number of tokens, by index of the example."""

  def __init__(self, num_tokens: dict[int, int], message: str):
    super().__init__(message)
    self.num_tokens = num_tokens


def owner_of_tokens(start_N, stop_N, end_P, role_P, weight_P):
  """Return the part whose role and weight each token takes, and whether a token spans parts that differ in either.

  chars    7   =   9   \\n  <flag>        end_P     2, 4, 9
  part     0   0   1   1    2            weight_P  1.0, 0.0, 1.0
  tokens   7  [=   9]  \\n  <flag>
  owner    0     1      1    2            of the parts that a token touches, the one of smallest weight, then the first
  """
  owner_N = np.searchsorted(end_P, start_N, side="right")
  last_N = np.searchsorted(end_P, stop_N - 1, side="right")
  is_boundary_N = np.zeros(len(owner_N), bool)
  for token in np.flatnonzero(owner_N != last_N):
    touched = slice(owner_N[token], last_N[token] + 1)
    is_boundary_N[token] = len({*zip(role_P[touched].tolist(), weight_P[touched].tolist(), strict=True)}) > 1
    owner_N[token] += int(np.argmin(weight_P[touched]))
  return owner_N, is_boundary_N


@contextlib.contextmanager
def _all_plain(backend: tokenizers.Tokenizer) -> Iterator[None]:
  """Encode no text as a special token inside the block, and let offsets include the white space before a word."""
  processor, special = backend.post_processor, backend.encode_special_tokens
  backend.post_processor, backend.encode_special_tokens = None, True
  try:
    yield
  finally:
    backend.post_processor, backend.encode_special_tokens = processor, special


def encode(
  parts_of_example: list[list[Span]],
  wheres: list[str],
  tokenizer: PreTrainedTokenizerFast,
  *,
  row_length: int | None = None,
  needs_number: bool = False,
) -> EncodedRecords:
  """Return the tokens of all parts; neighbouring texts are encoded as one, and cut only at special tokens.

  With `row_length`, raises TooLongError when examples have more tokens than that; without `needs_number` this happens
  before any text is encoded if its characters alone are certainly too many.
  """
  texts: list[str] = []
  stretches: list[int | Span] = []  # a special part, or the number of a text
  num_stretches = []
  for parts in parts_of_example:
    before = len(stretches)
    for is_text, run in itertools.groupby(parts, key=lambda part: part.token is None):
      if is_text:
        stretches.append(len(texts))
        texts.append("".join(part.text for part in run))
      else:
        stretches += run
    num_stretches.append(len(stretches) - before)
  example_S = np.repeat(np.arange(len(wheres)), num_stretches)
  if row_length is not None and not needs_number:
    least_S = [
      least_tokens(texts[stretch], row_length, tokenizer) if isinstance(stretch, int) else 1 for stretch in stretches
    ]
    _check_lengths(np.bincount(example_S, least_S, minlength=len(wheres)), wheres, row_length, "at least ")
  where_of_text = [
    wheres[number] for number, stretch in zip(example_S, stretches, strict=True) if isinstance(stretch, int)
  ]
  encodings = encode_texts(texts, where_of_text, tokenizer)
  num_S = np.array([len(encodings[stretch]) if isinstance(stretch, int) else 1 for stretch in stretches], int)
  num_E = np.bincount(example_S, num_S, minlength=len(wheres)).astype(int)
  if row_length is not None:  # before the tokens are processed, which takes most of the time and memory
    _check_lengths(num_E, wheres, row_length)
  is_text_S = np.array([isinstance(stretch, int) for stretch in stretches], bool)
  ids = [encodings[stretch].ids if isinstance(stretch, int) else (stretch.token,) for stretch in stretches]
  token_N = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
  start_N, stop_N = _characters(stretches, texts, encodings, token_N, num_S, tokenizer)
  example_N = np.repeat(example_S, num_S)
  encoded = EncodedRecords(
    token_N,
    start_N,
    stop_N,
    ~np.repeat(is_text_S, num_S),
    num_E,
    np.cumsum([len(part.text) for parts in parts_of_example for part in parts]),
  )
  _check_encoded(encoded, example_N, parts_of_example, wheres, tokenizer)
  return encoded


def _characters(stretches, texts, encodings, token_N, num_S, tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Return (start_N, stop_N), the characters of each token, counted over all stretches.

  They are sums of the lengths of tokens where these are known and make up the stretch, and the tokenizer's offsets,
  which are slower to read, elsewhere.
  """
  length_S = np.array([len(texts[part] if isinstance(part, int) else part.text) for part in stretches], np.int64)
  begin_S = np.cumsum(length_S) - length_S
  stretch_N = np.repeat(np.arange(len(stretches)), num_S)
  length_N = byte_lengths(tokenizer)[token_N]
  is_special_S = np.array([not isinstance(stretch, int) for stretch in stretches], bool)
  length_N[is_special_S[stretch_N]] = length_S[is_special_S]
  found_S = np.bincount(stretch_N, length_N, minlength=len(stretches)).astype(np.int64)
  stop_N = np.cumsum(length_N) + (begin_S - (np.cumsum(found_S) - found_S))[stretch_N]
  start_N = stop_N - length_N
  is_plain_S = (found_S == length_S) & [isinstance(part, Span) or texts[part].isascii() for part in stretches]
  if not is_plain_S.all():
    offsets = [encodings[stretches[number]].offsets for number in np.flatnonzero(~is_plain_S)]
    chained = itertools.chain.from_iterable(itertools.chain.from_iterable(offsets))
    by_offset_N = ~is_plain_S[stretch_N]
    offset_N2 = np.fromiter(chained, np.int64).reshape(-1, 2) + begin_S[stretch_N[by_offset_N]][:, None]
    start_N[by_offset_N], stop_N[by_offset_N] = offset_N2.T
  return start_N, stop_N


def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
  """Return int64 [V]: the bytes of each token of a byte-level tokenizer; of any other, and of added tokens, -1.

  The tokens of a byte-level tokenizer are the bytes of the text in order, one character of their name for each.
  """
  return _byte_lengths(tokenizer, len(tokenizer))  # the vocabulary may grow


@functools.lru_cache(maxsize=4)
def _byte_lengths(tokenizer: PreTrainedTokenizerFast, size: int) -> np.ndarray:
  backend = tokenizer.backend_tokenizer
  names = backend.get_vocab(with_added_tokens=True)
  length_V = np.full(max(size, *names.values()) + 1, -1, np.int64)
  if _keeps_every_byte(backend):
    for name, number in backend.get_vocab(with_added_tokens=False).items():
      length_V[number] = len(name)
    length_V[list(backend.get_added_tokens_decoder())] = -1
  return length_V


def _keeps_every_byte(backend: tokenizers.Tokenizer) -> bool:
  """Return whether the tokenizer is byte-level and neither adds nor drops a character before its tokens."""
  if backend.normalizer is not None or not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
    return False
  state: dict[str, Any] = {"type": None}
  if backend.pre_tokenizer is not None:
    state = json.loads(backend.pre_tokenizer.__getstate__())
  steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
  return all(
    step["type"] in ("ByteLevel", "Split", "Digits")
    and not step.get("add_prefix_space")
    and step.get("behavior") != "Removed"
    for step in steps
  )


def encode_texts(texts: list[str], wheres: list[str], tokenizer: PreTrainedTokenizerFast) -> list[tokenizers.Encoding]:
  """Return the encoding of each text; raise InputError, which names the longest, when the tokenizer gives up."""
  try:
    with _all_plain(tokenizer.backend_tokenizer):
      return tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
  except BaseException as error:
    if type(error).__name__ != "PanicException":  # a BaseException without a public name
      raise
    longest = wheres[max(range(len(texts)), key=lambda number: len(texts[number]))]
    raise InputError(
      f"{longest}, or a shorter text read with it: the tokenizer gives up ({error}); shorten it, or a "
      "run of one character in it"
    ) from None


def least_tokens(text: str, row_length: int, tokenizer: PreTrainedTokenizerFast) -> int:
  """Return a lower bound on the number of tokens of the text; 0 for a text short enough to encode directly.

  A token covers at most as many characters as its name has, and each character that is no white space has a token, or
  `_check_encoded` raises. A normalizer may merge several characters into one.
  """
  backend = tokenizer.backend_tokenizer
  if len(text) <= 16 * row_length or backend.normalizer is not None:
    return 0
  return len("".join(text.split())) // max(map(len, backend.get_vocab()))


def _check_lengths(num_E: np.ndarray, wheres: list[str], row_length: int, least: str = "") -> None:
  if too_long := {int(number): int(num_E[number]) for number in np.flatnonzero(num_E > row_length)}:
    first, num = next(iter(too_long.items()))
    raise TooLongError(
      too_long,
      (
        f"{wheres[first]}: {least}{num} tokens do not fit in a row of data.row_length={row_length}, and cutting could "
        "part a mistake from its correction; raise data.row_length, shorten the record, or leave such records out with "
        "data.too_long='drop'"
      ),
    )


def _check_encoded(encoded: EncodedRecords, example_N, parts_of_example, wheres, tokenizer) -> None:
  """Raise InputError for a character that the tokenizer lacks or drops, and for a special token made from text."""

  @functools.cache
  def text() -> str:
    return "".join(part.text for parts in parts_of_example for part in parts)

  def chars(start, stop):
    return text()[start:stop]

  is_text_N = ~encoded.special_N
  for n in np.flatnonzero(is_text_N & (encoded.token_N == tokenizer.unk_token_id))[:1]:
    raise InputError(
      f"{wheres[example_N[n]]}: the tokenizer has no token for {chars(encoded.start_N[n], encoded.stop_N[n])!r:.60}; "
      "change the text or the tokenizer"
    )
  added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
  special_ids = [number for number, token in added.items() if token.special]
  for n in np.flatnonzero(is_text_N & np.isin(encoded.token_N, special_ids))[:1]:
    raise InputError(
      f"{wheres[example_N[n]]}: the tokenizer makes the special token {added[int(encoded.token_N[n])].content!r} "
      "out of ordinary text; use a tokenizer that can keep them apart"
    )
  num_C = int(encoded.end_P[-1])
  depth_C = np.cumsum(
    np.bincount(encoded.start_N, minlength=num_C + 1) - np.bincount(encoded.stop_N, minlength=num_C + 1)
  )
  example_P = np.repeat(np.arange(len(wheres)), [len(parts) for parts in parts_of_example])
  for c in np.flatnonzero(depth_C[:num_C] == 0):
    if not chars(c, c + 1).isspace():
      where = wheres[example_P[np.searchsorted(encoded.end_P, c, side="right")]]
      # Offsets after a dropped character are shifted, so the place is approximate.
      raise InputError(
        f"{where}: the tokenizer drops a character at or before {chars(c, c + 1)!r}; change the text or the tokenizer"
      )
  for n in np.flatnonzero(encoded.start_N >= encoded.stop_N)[:1]:
    raise InputError(
      f"{wheres[example_N[n]]}: the tokenizer makes a token of no character, which would have no role; "
      "use another tokenizer"
    )


def check_like_whole_text(
  parts_of_example: list[list[Span]], encoded: EncodedRecords, tokenizer: PreTrainedTokenizerFast
) -> None:
  """Raise InputError if cutting at special tokens changes the tokens of the whole text; one example is tried."""
  pattern = special_pattern(tokenizer)
  begins = np.cumsum(encoded.num_E) - encoded.num_E
  for parts, begin, num in zip(parts_of_example, begins, encoded.num_E, strict=True):
    typed = "".join(part.text if part.token is None else "\n" for part in parts)
    if sum(part.token is not None for part in parts) < 2 or pattern.search(typed):
      continue
    whole = tokenizer.backend_tokenizer.encode("".join(part.text for part in parts), add_special_tokens=False).ids
    if whole != encoded.token_N[begin : begin + num].tolist():
      raise InputError(
        "the tokenizer encodes what follows a special token otherwise than a text of its own (it may put a "
        "space in front), which is not supported; use a tokenizer that does not"
      )
    return


def special_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern:
  """Return a pattern that finds every special token of the tokenizer in a trusted text."""
  return _special_pattern(tokenizer, len(tokenizer))  # tokens may be added


@functools.lru_cache(maxsize=4)
def _special_pattern(tokenizer: PreTrainedTokenizerFast, size: int) -> re.Pattern:  # noqa: ARG001
  names = [token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values() if token.special]
  longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
  return re.compile(f"({longest_first or '(?!)'})")


def template_parts(text: str, pattern: re.Pattern, tokenizer: PreTrainedTokenizerFast, weight: float) -> list[Span]:
  """Return the text of a chat template as prompt parts: its special tokens and the text between them."""
  return [
    Span(piece, roles.PROMPT, weight, tokenizer.backend_tokenizer.token_to_id(piece) if number % 2 else None)
    for number, piece in enumerate(pattern.split(text))
    if piece
  ]


def begin_parts(tokenizer: PreTrainedTokenizerFast, weight: float) -> list[Span]:
  """Return the tokens that the tokenizer puts in front of every text."""
  backend = tokenizer.backend_tokenizer
  bare = backend.encode("a", add_special_tokens=False).ids
  if not bare:
    raise InputError("the tokenizer makes no token of the letter a; use a tokenizer that knows letters")
  whole = backend.encode("a", add_special_tokens=True)
  num = whole.ids.index(bare[0])
  return [
    Span(name, roles.PROMPT, weight, token) for name, token in zip(whole.tokens[:num], whole.ids[:num], strict=True)
  ]

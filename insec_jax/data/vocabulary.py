"""The tokenizer of a run: read from a folder or built from a task's symbols, with the markers as special tokens."""

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config, TokenizerConfig
from insec_jax.data import tokenizer_files
from insec_jax.files import hub
from insec_jax.files.reading import folder_to_read
from insec_jax.method import rewind, tasks
from insec_jax.method.mistakes import paper_reason

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"


class MarkedTokenizer(NamedTuple):
  """A tokenizer with its markers; ids are None for plain words."""

  tokenizer: PreTrainedTokenizerFast
  flag_id: int | None
  fix_id: int | None
  confidence_ids: tuple[int, ...]


def load(folder: str | pathlib.Path) -> PreTrainedTokenizerFast:
  """Return the tokenizer of an HF folder, as its tokenizer.json defines it, without downloads.

  The files of a pathlib.Path are here already. The tokenizer neither truncates nor pads, whatever the file says. Raises
  InputError when it cannot be opened.
  """
  path = folder_to_read(folder, "tokenizer") if isinstance(folder, str) else folder
  listed = tokenizer_files.check(path)
  try:
    with _without_panics():  # directly first: the library reports a damaged file in more detail than transformers
      backend = tokenizers.Tokenizer.from_file(str(path / tokenizer_files.BACKEND))
      _cut_and_pad_nothing(backend)
      backend.encode("a b")
    # Not AutoTokenizer: it rebuilds some classes (GPT2Tokenizer) from vocabulary and merges alone.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
  except (OSError, MemoryError):
    raise
  except BaseException as error:  # the two libraries may raise anything; a Rust panic is no Exception
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise InputError(
      f"the tokenizer in {path} cannot be opened ({' '.join(str(error).split()):.200}); write it again"
    ) from None
  _cut_and_pad_nothing(tokenizer.backend_tokenizer)
  for content, number in listed.items():
    if (given := tokenizer.backend_tokenizer.token_to_id(content)) != number:
      raise InputError(
        f"the tokenizer in {path} says that {content!r:.60} is token {number}, it becomes {given}; write it again"
      )
  return tokenizer


def _cut_and_pad_nothing(backend: tokenizers.Tokenizer) -> None:
  backend.no_truncation()
  backend.no_padding()


@contextlib.contextmanager
def _without_panics() -> Iterator[None]:
  """Keep Rust's panic message off stderr; the exception that follows says the same in one line."""
  kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(null)


def build_tokenizer(symbols: Sequence[str], config: TokenizerConfig) -> PreTrainedTokenizerFast:
  """Return a tokenizer with one token for each symbol, pad, end, unknown and the two markers; decoding is exact.

  Longer symbols match first. A character of no symbol becomes the unknown token, for which `tokens.tokenize` raises.
  """
  markers = (config.flag, config.fix)
  words = list(symbols) + ([] if config.special else [marker for marker in markers if marker not in symbols])
  vocabulary = {word: number for number, word in enumerate([PAD, END, UNKNOWN, *words])}
  if len(vocabulary) != len(words) + 3:
    raise ValueError("a symbol is given twice, or is one of the reserved words")
  backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
  longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
  backend.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
  backend.decoder = decoders.Fuse()
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD, unk_token=UNKNOWN)
  return add_markers(tokenizer, config).tokenizer


def add_markers(tokenizer: PreTrainedTokenizerFast, config: TokenizerConfig) -> MarkedTokenizer:
  """Make both markers special tokens of the tokenizer, in place, and return it; with special=False nothing changes.

  Confidence tokens, where the config has any, become special tokens as well.
  """
  if not config.special:
    return MarkedTokenizer(tokenizer, None, None, ())
  markers = (config.flag, config.fix, *config.confidence_names)
  tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers], special_tokens=True)
  return _marked(tokenizer, config)


def find_markers(tokenizer: PreTrainedTokenizerFast, config: TokenizerConfig) -> MarkedTokenizer:
  """Return the tokenizer of a trained model with the markers it already has; raise InputError if one is missing."""
  return MarkedTokenizer(tokenizer, None, None, ()) if not config.special else _marked(tokenizer, config)


def _marked(tokenizer: PreTrainedTokenizerFast, config: TokenizerConfig) -> MarkedTokenizer:
  ids = []
  added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
  special = {
    token.content: number for number, token in added.items() if token.special and not token.lstrip and not token.rstrip
  }
  for marker in (config.flag, config.fix, *config.confidence_names):
    if marker not in special:
      raise InputError(
        f"the tokenizer has no special token {marker!r} that keeps the white space around it; name one that "
        "it has in tokenizer.flag and tokenizer.fix, or train a model that has it"
      )
    ids.append(special[marker])
  return MarkedTokenizer(tokenizer, ids[0], ids[1], tuple(ids[2:]))


def token_kinds(marked: MarkedTokenizer) -> np.ndarray:
  """Return int8 [V]: the kind of each token by which mistakes are hidden from later text (method/rewind.py)."""
  tokenizer, *ids = marked
  return _token_kinds(tokenizer, len(tokenizer), *ids)  # the vocabulary may grow


@functools.lru_cache(maxsize=4)
def _token_kinds(
  tokenizer: PreTrainedTokenizerFast, size: int, flag_id: int, fix_id: int, confidence_ids: tuple[int, ...]
) -> np.ndarray:
  kind_V = np.full(size, rewind.WORD, np.int8)
  for token in range(size):
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if text.endswith("\n"):
      kind_V[token] = rewind.BLANK if text.isspace() else rewind.LINE_END
  added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
  kind_V[[number for number, token in added.items() if token.special]] = rewind.SPECIAL
  kind_V[list(confidence_ids)] = rewind.CONFIDENCE
  kind_V[flag_id], kind_V[fix_id] = rewind.FLAG, rewind.FIX
  kind_V.flags.writeable = False  # shared by all callers
  return kind_V


def open_tokenizer(config: Config) -> MarkedTokenizer:
  """Return the config's tokenizer with markers: from tokenizer.path, model.path, or built from the task's symbols."""
  marked = _open_tokenizer(config)
  if config.mistakes.reason == "paper":
    _check_can_write(paper_reason("calc", config.mistakes.unit), marked.tokenizer)
  return marked


def _check_can_write(words: str, tokenizer: PreTrainedTokenizerFast) -> None:
  """Raise InputError where the tokenizer has no tokens for the words of the paper's annotation."""
  if tokenizer.unk_token_id in tokenizer.backend_tokenizer.encode(words, add_special_tokens=False).ids:
    raise InputError(
      f"mistakes.reason='paper' writes {words!r}, for which the tokenizer has no tokens; "
      "use 'none', 'label' or 'recompute', or a tokenizer for English in tokenizer.path"
    )


def tokenizer_folder(config: Config) -> pathlib.Path | None:
  """Return the local folder of tokenizer.path, else of model.path; None where the tokenizer is built from symbols."""
  name = "tokenizer.path" if config.tokenizer.path else "model.path"
  text = config.tokenizer.path or config.model.path
  return hub.model_folder(text, name, weights=False) if text else None


def _open_tokenizer(config: Config) -> MarkedTokenizer:
  if folder := tokenizer_folder(config):
    return add_markers(load(folder), config.tokenizer)
  symbols = None if config.task.name == "records" else tasks.get(config.task).symbols
  if symbols is None:
    raise InputError(f"task.name={config.task.name!r} has no symbols to build a tokenizer from; give tokenizer.path")
  return add_markers(build_tokenizer(symbols, config.tokenizer), config.tokenizer)

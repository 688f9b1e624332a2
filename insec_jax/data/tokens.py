"""Tokens: transcripts as tokens that each have a role and a weight.

A transcript is laid out as parts (`Span`: a text, or one special token with its id), these are encoded to tokens with
the characters that each covers (encoding.py), and each token takes role and weight from the part that owns it.

Letters that end array names, as in encoding.py: E example, P part, N token of all examples one after the other, T token
of one example, R role.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data.encoding import (
  EncodedRecords,
  Span,
  TooLongError,
  begin_parts,
  check_like_whole_text,
  encode,
  owner_of_tokens,
  special_pattern,
  template_parts,
)
from insec_jax.data.negatives import negatives
from insec_jax.data.records import Chat, Turn
from insec_jax.data.template import Template, check_syntax
from insec_jax.data.vocabulary import find_markers, token_kinds
from insec_jax.method import rewind, roles
from insec_jax.method.transcript import Piece, Transcript

# End tokens of Llama 3.1: of a text, of a tool call and of a turn.
LLAMA_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


class TooLong(NamedTuple):
  """A record that was left out: "file:line" and number of tokens."""

  where: str
  num_tokens: int


@dataclasses.dataclass(frozen=True)
class Example:
  """One transcript as tokens.

  num_boundary: how many of them cover parts of different role or weight. num_end: how many are special tokens that end
  the text or a turn.
  negative_T: the mistake's token where a correction first differs from it (data/negatives.py); elsewhere NO_NEGATIVE.
  position_T, until_T: with mistakes.rewind the position of each token, and the number of the first later one that does
  not read it (method/rewind.py); else None, positions ascend.
  """

  token_T: np.ndarray
  role_T: np.ndarray
  weight_T: np.ndarray
  negative_T: np.ndarray
  where: str
  num_boundary: int
  num_end: int
  position_T: np.ndarray | None = None
  until_T: np.ndarray | None = None


def tokenize(content: Transcript | Chat, where: str, tokenizer: PreTrainedTokenizerFast, config: Config) -> Example:
  """Return one transcript as tokens; see `tokenize_all`."""
  return tokenize_all([(content, where)], tokenizer, config)[0]


def tokenize_all(
  contents: Sequence[tuple[Transcript | Chat, str]],
  tokenizer: PreTrainedTokenizerFast,
  config: Config,
  *,
  left_out: list[TooLong] | None = None,
) -> list[Example]:
  """Return transcripts as tokens: the text between two special tokens is encoded at once, as the model reads it.

      text    <bos> 7 + 5 =   <flag> a d d  <fix>  12   <end>
      role      p     mistake   f    reason   f  correct.  t

  The tokens in front and a chat template are prompt; <end> is text, with the weight loss.end.

  A token takes its role from the part of smallest weight among those whose characters it covers (`owner_of_tokens`).
  Only pieces of role flag, the template and the end become special tokens; other text never does. With `left_out`,
  transcripts of too many tokens for a row are appended to it and not returned.

  Raises InputError, which names the record, when text holds a marker (data.marker_text="refuse"), a flag piece is no
  marker, a piece gets no token, the tokenizer has no token for a character, nothing is trained, no end of text is
  trained, or the tokens do not fit in a row.
  """
  layout = _Layout(tokenizer, config)
  parts_of_example = [layout.parts(content, where) for content, where in contents]
  wheres = [where for _, where in contents]
  try:
    encoded = encode(
      parts_of_example, wheres, tokenizer, row_length=config.data.row_length, needs_number=left_out is not None
    )
  except TooLongError as error:
    if left_out is None:
      raise
    left_out += [TooLong(wheres[number], num) for number, num in error.num_tokens.items()]
    fit = [content for number, content in enumerate(contents) if number not in error.num_tokens]
    return tokenize_all(fit, tokenizer, config) if fit else []
  check_like_whole_text(parts_of_example, encoded, tokenizer)
  examples = _examples(parts_of_example, wheres, encoded, negatives(parts_of_example, wheres, encoded, tokenizer))
  if not config.mistakes.rewind:
    return examples
  return _rewound(examples, token_kinds(find_markers(tokenizer, config.tokenizer)), tokenizer)


class _Layout:
  """Conversion of transcripts to parts, each a text or one special token, with role and weight."""

  def __init__(self, tokenizer: PreTrainedTokenizerFast, config: Config):
    self._config = config
    self._tokenizer = tokenizer
    marked = find_markers(tokenizer, config.tokenizer)
    self._confidence_ids = dict(zip(config.tokenizer.confidence_names, marked.confidence_ids, strict=True))
    self._marker_ids = {config.tokenizer.flag: marked.flag_id, config.tokenizer.fix: marked.fix_id}
    self._marker_ids |= self._confidence_ids
    self._weight_R = config.loss.weight_R
    self._is_chat = config.data.template == "chat"
    if self._is_chat:
      self._template, self._pattern = Template(tokenizer), special_pattern(tokenizer)
      return
    self._begin = begin_parts(tokenizer, self._weight_R[roles.PROMPT])
    self._end = Span(tokenizer.eos_token, roles.TEXT, config.loss.end, end_token(tokenizer, "plain"), is_end=True)

  def parts(self, content: Transcript | Chat, where: str) -> list[Span]:
    """Return the parts of a transcript: what the tokenizer or chat template adds, and the pieces."""
    if self._is_chat:
      return self._chat(content.turns if isinstance(content, Chat) else _turns(content), where)
    if isinstance(content, Chat):
      raise InputError(
        f"{where}: messages are rendered with the tokenizer's chat template, and prompts must be too; "
        "set data.template='chat'"
      )
    return [*self._begin, *self._pieces(content, where), self._end]

  def _pieces(self, pieces: Transcript, where: str) -> list[Span]:
    parts: list[Span] = []
    stretch: list[str] = []  # texts since the last flag piece: a marker may begin in one and end in the next
    for piece in pieces:
      if piece.role == roles.FLAG:
        self._check_no_marker("".join(stretch), where)
        stretch = []
        parts += self._flag(piece, where)
      else:
        stretch.append(piece.text)
        parts.append(Span(piece.text, piece.role, self._weight(piece), must_own=not piece.text.isspace()))
    self._check_no_marker("".join(stretch), where)
    return parts

  def _weight(self, piece: Piece) -> float:
    return self._weight_R[piece.role] if piece.weight is None else piece.weight

  def _flag(self, piece: Piece, where: str) -> list[Span]:
    marker = piece.text if piece.text in self._marker_ids else piece.text.strip()
    if marker not in self._marker_ids:
      raise InputError(
        f"{where}: the flag piece {piece.text!r:.60} is neither tokenizer.flag={self._config.tokenizer.flag!r} "
        f"nor tokenizer.fix={self._config.tokenizer.fix!r}; change the record or the config"
      )
    weight, token = self._weight(piece), self._marker_ids[marker]
    if marker in self._confidence_ids:
      weight = 0.0  # written by the decoder, only read by the model
    if token is None:  # tokenizer.special=False: markers are ordinary text
      return [Span(piece.text, roles.FLAG, weight, must_own=True)]
    before, after = piece.text.split(marker)
    parts = [Span(before, roles.FLAG, weight), Span(marker, roles.FLAG, weight, token), Span(after, roles.FLAG, weight)]
    return [part for part in parts if part.text]

  def _check_no_marker(self, text: str, where: str) -> None:
    if self._config.data.marker_text == "plain":
      return
    for marker in self._marker_ids:
      if marker in text:
        raise InputError(
          f"{where}: the text holds the marker {marker!r}, which only a piece of role flag may; remove it, "
          "choose other markers, or encode it as plain characters with data.marker_text='plain'"
        )

  def _chat(self, turns: tuple[Turn, ...], where: str) -> list[Span]:
    """Return the parts of a chat; `gaps` are what the template puts before, between and after the contents."""
    texts = ["".join(piece.text for piece in turn.pieces) for turn in turns]
    gaps, contents = self._template.fill(tuple(turn.speaker for turn in turns), texts, where, generation=False)
    prompt, end = self._weight_R[roles.PROMPT], self._config.loss.end
    parts = template_parts(gaps[0], self._pattern, self._tokenizer, prompt)
    for turn, content, gap in zip(turns, contents, gaps[1:], strict=True):
      parts += self._pieces(
        turn.pieces if content == "".join(piece.text for piece in turn.pieces) else _stripped(turn.pieces), where
      )
      after = template_parts(gap, self._pattern, self._tokenizer, prompt)
      if turn.speaker == "assistant":
        last, _ = _end_of_turn(after, where)
        after[: last + 1] = [part._replace(role=roles.TEXT, weight=end, is_end=True) for part in after[: last + 1]]
      parts += after
    return parts


def _turns(transcript: Transcript) -> tuple[Turn, ...]:
  """Return each run of prompt pieces as a turn of the user, and the pieces between as turns of the assistant."""
  runs = itertools.groupby(transcript, key=lambda piece: piece.role == roles.PROMPT)
  return tuple(Turn("user" if is_prompt else "assistant", tuple(run)) for is_prompt, run in runs)


def _stripped(pieces: Transcript) -> Transcript:
  """Return the pieces without white space at both ends of their text, as a template that trims renders them."""
  text = "".join(piece.text for piece in pieces)
  first, last = len(text) - len(text.lstrip()), len(text.rstrip())
  kept, end = [], 0
  for piece in pieces:
    start, end = end, end + len(piece.text)
    if cut := piece.text[max(first - start, 0) : max(last - start, 0)]:
      kept.append(dataclasses.replace(piece, text=cut))
  return tuple(kept)


def _examples(
  parts_of_example: list[list[Span]], wheres: list[str], encoded: EncodedRecords, negative_N: np.ndarray
) -> list[Example]:
  """Return the tokens of each example, with role and weight of the part that owns each."""
  parts = list(itertools.chain.from_iterable(parts_of_example))
  example_P = np.repeat(np.arange(len(wheres)), [len(example_parts) for example_parts in parts_of_example])
  weight_P = np.array([part.weight for part in parts], np.float32)
  role_P = np.array([part.role for part in parts], np.int8)
  owner_N, is_boundary_N = owner_of_tokens(encoded.start_N, encoded.stop_N, encoded.end_P, role_P, weight_P)

  owned_P = np.bincount(owner_N, minlength=len(parts))
  for part in np.flatnonzero(owned_P == 0).tolist():
    if parts[part].must_own:
      raise InputError(
        f"{wheres[example_P[part]]}: the {roles.NAMES[parts[part].role]} piece {parts[part].text!r:.60} "
        "gets no token of its own, because a neighbour of smaller weight shares its characters; "
        "move the boundary to where a token ends"
      )
  example_N = example_P[owner_N]
  role_N = role_P[owner_N]
  weight_N = weight_P[owner_N]
  is_end_N = np.array([part.is_end for part in parts])[owner_N]
  first_E = np.searchsorted(example_N, np.arange(len(wheres) + 1))
  examples = []
  for number, where in enumerate(wheres):
    span = slice(first_E[number], first_E[number + 1])
    example = Example(
      encoded.token_N[span],
      role_N[span],
      weight_N[span],
      negative_N[span],
      where,
      int(is_boundary_N[span].sum()),
      int((is_end_N[span] & (encoded.special_N[span])).sum()),
    )
    _check_example(example, is_end_N[span])
    examples.append(example)
  return examples


def _check_example(example: Example, is_end_T: np.ndarray) -> None:
  if not example.num_end:
    raise InputError(
      f"{example.where}: no end of text is trained, because nothing is said by the assistant; add an answer"
    )
  # The first token is never a target.
  if not (example.weight_T[1:] * ~is_end_T[1:]).any():
    raise InputError(
      f"{example.where}: no token is trained, because every role or span in it weighs 0; "
      "give a role that it has a weight in loss, or take the record out"
    )


def _rewound(examples: list[Example], kind_V: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> list[Example]:
  """Return the examples with positions and with what later tokens read, by the kinds of their tokens.

  Raises InputError, which names the record, where these hide other text than mistakes, flags and reasons.
  """
  kind_ET = np.full((len(examples), max(len(example.token_T) for example in examples)), rewind.PADDING, np.int8)
  for kind_T, example in zip(kind_ET, examples, strict=True):
    kind_T[: len(example.token_T)] = kind_V[example.token_T]
  seen = rewind.visibility(kind_ET)
  rewound = []
  for number, example in enumerate(examples):
    span = slice(len(example.token_T))
    until_T, kind_T = seen.until_BT[number, span], kind_ET[number, span]
    hides_T = np.isin(example.role_T, (roles.MISTAKE, roles.FLAG, roles.REASON))
    differs_T = ((until_T < rewind.NEVER) != hides_T) & (kind_T != rewind.CONFIDENCE) & (kind_T != rewind.BLANK)
    for token in example.token_T[differs_T][:1]:
      raise InputError(
        f"{example.where}: mistakes.rewind hides the line before a flag, the flag, the reason and the fix, and "
        f"{tokenizer.decode([token])!r:.60} is in only one of these and of the pieces with such a role; make each "
        "mistake a line of the answer right before its flag, each correction a line, end the prompt in a newline, or "
        "set mistakes.rewind=False"
      )
    rewound.append(dataclasses.replace(example, position_T=seen.position_BT[number, span], until_T=until_T))
  return rewound


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerFast, template: str, *, answer: str = "") -> np.ndarray:
  """Return the int32 tokens of a prompt and the start of its `answer`, exactly as `tokenize` begins a transcript.

  `text` and `answer` never become special tokens; those of the chat template (template="chat") and bos are kept.
  """
  if template not in ("plain", "chat"):
    raise ValueError(f"template {template!r} is neither 'plain' nor 'chat'")
  if template == "chat":
    gaps, contents = Template(tokenizer).fill(("user",), [text], "the prompt", generation=True)
    pattern = special_pattern(tokenizer)
    parts = [
      *template_parts(gaps[0], pattern, tokenizer, 0.0),
      Span(contents[0], roles.PROMPT, 0.0),
      *template_parts(gaps[1], pattern, tokenizer, 0.0),
    ]
  else:
    parts = [*begin_parts(tokenizer, 0.0), Span(text, roles.PROMPT, 0.0)]
  encoded = encode([[*parts, Span(answer, roles.TEXT, 0.0)]], ["the prompt"], tokenizer)
  if not len(encoded.token_N):
    raise InputError("the prompt is empty and the tokenizer adds nothing in front; give at least one character")
  return encoded.token_N


def encode_text(text: str, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
  """Return the int32 tokens of a text as encoded right after a special token; nothing is added, none is special."""
  return encode([[Span(text, roles.TEXT, 0.0)]], ["the text"], tokenizer).token_N


def end_token(tokenizer: PreTrainedTokenizerFast, template: str) -> int:
  """Return the id of the token that `tokenize` puts at the end of an answer, at which generation has to stop."""
  if template == "chat":
    gaps, _ = Template(tokenizer).fill(("user", "assistant"), ["a", "b"], "an example", generation=False)
    after = template_parts(gaps[-1], special_pattern(tokenizer), tokenizer, 0.0)
    return _end_of_turn(after, "an example")[1]
  if tokenizer.eos_token_id is None:
    raise InputError(
      "the tokenizer names no end-of-text token, so the model would never learn to stop; "
      "set eos_token in its tokenizer_config.json"
    )
  return tokenizer.eos_token_id


def stop_ids(eos_ids: Sequence[int], tokenizer: PreTrainedTokenizerFast, *, vocab_size: int) -> tuple[int, ...]:
  """Return every token that ends a text.

  These are the model's `eos_ids` (of config.json and generation_config.json), the tokenizer's, the one with which its
  chat template ends an assistant's turn, and all three of Llama 3.1 where the tokenizer has them.

  Raises InputError when one of them is not among the `vocab_size` tokens of the model.
  """
  known = tokenizer.get_added_vocab()
  ends = [*eos_ids, tokenizer.eos_token_id, _template_end(tokenizer)]
  if all(token in known for token in LLAMA_ENDS):
    ends += [known[token] for token in LLAMA_ENDS]
  ids = tuple(dict.fromkeys(number for number in ends if number is not None))
  if ids and max(ids) >= vocab_size:
    raise InputError(
      f"the tokenizer ends a text with token {max(ids)}, and the model has {vocab_size}; use "
      "the tokenizer that belongs to the model"
    )
  return ids


def _template_end(tokenizer: PreTrainedTokenizerFast) -> int | None:
  """Return the token with which the chat template ends an assistant's turn; None without one that can be used."""
  if not tokenizer.chat_template:
    return None
  try:
    return end_token(tokenizer, "chat")
  except InputError:
    check_syntax(tokenizer)  # a template with a syntax error may still have an end token
    return None  # using the template raises later


def _end_of_turn(after: list[Span], where: str) -> tuple[int, int]:
  """Return index and id of the first special token after an answer, where the template ends the assistant's turn."""
  for number, part in enumerate(after):
    if part.token is not None:
      return number, part.token
  raise InputError(
    f"{where}: the chat template puts no special token after what the assistant says, so the model would never learn "
    "to stop; use a tokenizer whose template ends a turn"
  )

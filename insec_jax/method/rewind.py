"""Rewind: what follows a correction reads neither its mistake nor flag, reason and fix, and positions go back.

    token      ?  \n   a  7  \n  <flag>  r  <fix>   a  9  \n   b
    position   5  6    7  8  9    10     11   12    7  8  9    10
    until      .  .   10 10 10    10     10   10    .  .  .    .      . is NEVER

Token t reads token s of its text if s <= t < until_s. In the picture s and t are numbers from that of `?`, 0, and the
end of the correction's line is token 10. So the tokens that write the correction read the mistake and the reason, and
have the positions that the mistake had. The end of its line, which predicts what follows, and all later tokens read the
prompt, the steps before and the correction. To them the text looks as if the mistake had never been written, except
that keys and values of the correction were computed with the mistake in view. A decoder need not compute them again: it
marks entries of its cache as unread when the correction ends.

The rule depends on token ids alone, through their kinds, so that training, prompts and decoding follow the same one:
  - A step is a line. The mistake is the line before the flag, or what is written of it.
  - The first line of a text, and the line that begins with a special token, belong to the prompt or a chat template: a
    flag after it hides nothing.
  - A correction that is flagged is a mistake as well. It has ended, so its own mistake is hidden from its flag on. One
    that is flagged before its line ends is hidden together with its mistake.

Letters as in model/llama.py. `advance` takes NumPy and JAX arrays: the decoder calls it token by token.
"""

from typing import Any, NamedTuple

import numpy as np

NEVER = np.iinfo(np.int32).max  # number of the first token that does not read a token which all later ones read
NONE = -(1 << 30)  # number of no token; stays below 0 when the slot of a text is added
# Kinds of tokens. LINE_END: ends in a newline; BLANK: only white space, ending in a newline, so that after the end of a
# line it belongs to that line. SPECIAL: any other special token. PADDING: no token.
WORD, LINE_END, BLANK, SPECIAL, FLAG, FIX, CONFIDENCE, PADDING = range(8)
IN_STEP, IN_REASON, IN_CORRECTION = range(3)  # phases of a text


class State(NamedTuple):
  """State of each text after a token; tokens are numbered as the caller numbers them."""

  phase: Any
  position: Any  # of that token
  following: Any  # position of the next one
  step: Any  # number of the first token of the line that a flag would call wrong; below 0: none
  step_position: Any
  ended: Any  # whether the line has ended, so that the next word begins another
  mistake: Any  # number of the first token that the end of the correction hides; below 0: none


class Visibility(NamedTuple):
  """Position of each token, the number of the first later one that does not read it, and the state after the last."""

  position_BT: np.ndarray
  until_BT: np.ndarray
  state: State


def begin(xp, num: int) -> State:
  """Return the state of `num` texts before their first token."""
  zero_B, none_B = xp.zeros(num, xp.int32), xp.full(num, NONE, xp.int32)
  return State(zero_B, zero_B - 1, zero_B, none_B, zero_B, xp.full(num, False), none_B)


def advance(xp, state: State, kind_B, index_B) -> tuple[State, tuple[Any, Any]]:
  """Return the state after one more token of each text, and the range (first, stop) of tokens that it hides.

  `xp` is numpy or jax.numpy; `index_B` are the numbers of the tokens, int32. The token itself does not read the range
  either; an empty range hides nothing.
  """
  where = xp.where
  is_step, is_reason, is_correction = (state.phase == phase for phase in (IN_STEP, IN_REASON, IN_CORRECTION))
  is_word, is_special = kind_B == WORD, kind_B == SPECIAL
  is_flag, is_fix = (kind_B == FLAG) & ~is_reason, (kind_B == FIX) & ~is_correction
  ends_line = (kind_B == LINE_END) | ((kind_B == BLANK) & ~state.ended)
  begins = is_step & state.ended & (is_word | (kind_B == LINE_END))
  step = where(begins, index_B, state.step)
  step_position = where(begins, state.following, state.step_position)

  hides = is_correction & (ends_line | is_special)
  opens = is_fix & is_reason & (state.mistake >= 0)  # a correction, in the place of the line that is wrong
  phase = where(is_fix | hides | is_special, IN_STEP, state.phase)
  after = State(
    phase=where(is_flag, IN_REASON, where(opens, IN_CORRECTION, phase)),
    position=state.following,
    following=where(opens, step_position, state.following + 1),
    step=where(is_special, NONE, where(opens, index_B + 1, step)),
    step_position=step_position,
    ended=(is_fix | ends_line | (state.ended & ~is_word)) & ~is_special,
    mistake=where(is_flag & is_step, step, where(hides | is_special, NONE, state.mistake)),
  )
  is_padding = kind_B == PADDING
  kept = State(*(where(is_padding, old, new) for old, new in zip(state, after, strict=True)))
  return kept, (where(hides, state.mistake, 0), where(hides, step, 0))


def visibility(kind_BT: np.ndarray) -> Visibility:
  """Return what later tokens read of texts, padded at either end; a token's number is its place on axis T."""
  position_BT, until_BT = np.zeros(kind_BT.shape, np.int32), np.full(kind_BT.shape, NEVER, np.int32)
  state = begin(np, len(kind_BT))
  for t, kind_B in enumerate(np.ascontiguousarray(kind_BT.T)):
    state, (first_B, stop_B) = advance(np, state, kind_B, np.full(len(kind_B), t, np.int32))
    position_BT[:, t] = state.position
    for row in np.flatnonzero(stop_B > first_B):
      until_BT[row, first_B[row] : stop_B[row]] = t
  return Visibility(position_BT, until_BT, state)

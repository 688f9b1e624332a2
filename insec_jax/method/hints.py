"""Hints: the verdict on a mistake in the prompt, before the mistake is written (policy.method="distill").

    prompt   a3b4d1...?\\n   c1\\ninvalidd1c!1\\nc2\\n      mistakes.hint="{wrong}{reason}\\n{right}" follows the prompt
    answer   j3\\n   c1\\n   <flag>   invalidd1c!1   <fix>   c2\\n

A model makes use of a hint only if it was trained on some (mistakes.hinted), or understands its words.
"""

import itertools

from insec_jax.method.roles import CORRECTION, MISTAKE, PROMPT, REASON
from insec_jax.method.transcript import Piece, Transcript


def hint_of(text: str, *, wrong: str, reason: str, right: str) -> str:
  """Return the hint, `text` being mistakes.hint."""
  return text.format(wrong=wrong, reason=reason, right=right)


def hinted(pieces: Transcript, text: str) -> Transcript:
  """Return the pieces with a hint about the first mistake after the prompt before it; unchanged without a mistake."""
  roles = [piece.role for piece in pieces]
  if MISTAKE not in roles:
    return pieces
  first = roles.index(MISTAKE)
  wrong = "".join(piece.text for piece in itertools.takewhile(lambda piece: piece.role == MISTAKE, pieces[first:]))
  reason, right = (
    next((piece.text for piece in pieces[first:] if piece.role == role), "") for role in (REASON, CORRECTION)
  )
  hint = hint_of(text, wrong=wrong, reason=reason, right=right)
  prompt = max(k for k in range(first) if roles[k] == PROMPT) + 1
  return (*pieces[:prompt], Piece(PROMPT, hint), *pieces[prompt:])

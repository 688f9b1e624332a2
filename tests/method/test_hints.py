"""A hint ends the prompt of a transcript with mistakes, and says what the first one is."""

import datakit
import numpy as np

from insec_jax.data import mixture
from insec_jax.method.hints import hinted
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT
from insec_jax.method.transcript import Piece, render

TOLD = "{wrong}: {reason}. {right}"


def test_a_hint_about_the_first_mistake_follows_the_prompt_before_it():
  pieces = (
    Piece(PROMPT, "7+5+1?\n"),
    Piece(TEXT, "7\n"),
    Piece(MISTAKE, "13"),
    Piece(MISTAKE, "\n", 1.0),  # as mining writes the end of a wrong line
    Piece(FLAG, "<err>"),
    Piece(REASON, "calc"),
    Piece(FLAG, "<fix>"),
    Piece(CORRECTION, "12\n"),
    Piece(MISTAKE, "9\n"),
    Piece(FLAG, "<err>"),
    Piece(FLAG, "<fix>"),
    Piece(CORRECTION, "13\n"),
  )
  assert hinted(pieces, TOLD) == (pieces[0], Piece(PROMPT, "13\n: calc. 12\n"), *pieces[1:])
  assert hinted(pieces[:2], TOLD) == pieces[:2]
  assert hinted((pieces[0], *pieces[8:]), TOLD)[1] == Piece(PROMPT, "9\n: . 13\n")


def test_a_share_of_training_transcripts_with_mistakes_has_hints_and_no_held_out_one():
  common = dict(
    task__name="graph",
    task__min_size=3,
    task__max_size=3,
    task__modulus=10,
    data__path="",
    data__num_records=300,
    data__num_heldout=20,
    mistakes__source="injected",
  )
  plain, told = (datakit.config(**common, mistakes__share=0.5, mistakes__hinted=hinted) for hinted in (0.0, 0.4))
  num_wrong = num_hinted = 0
  for (before, _), (after, _) in zip(
    mixture.transcripts(plain, "train"), mixture.transcripts(told, "train"), strict=True
  ):
    num_wrong += any(piece.role == MISTAKE for piece in before)
    if after != before:
      num_hinted += 1
      assert after == hinted(before, told.mistakes.hint)
      assert render(after) != render(before)
  np.testing.assert_allclose(num_hinted / num_wrong, 0.4, atol=0.1)
  assert list(mixture.transcripts(plain, "heldout")) == list(mixture.transcripts(told, "heldout"))

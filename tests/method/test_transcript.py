"""Transcripts: render, clean, split and parse."""

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT
from insec_jax.method.transcript import (
  Markers,
  Piece,
  check_marks,
  clean,
  clean_text,
  mistake_pieces,
  parse,
  render,
  split_steps,
)

MARKERS = Markers("<err>", "<fix>")


def shape(text, unit="line"):
  return [(piece.role, piece.text) for piece in parse(text, MARKERS, unit)]


def test_marks_are_checked_where_the_roles_are_known():
  rows = (
    Piece(MISTAKE, "c=5\n"),
    Piece(FLAG, "<err>"),
    Piece(REASON, "calc c"),
    Piece(FLAG, "<fix>"),
    Piece(MISTAKE, "c=6\n"),
    Piece(FLAG, "<err>"),
    Piece(FLAG, "<fix>"),
    Piece(CORRECTION, "c=7\n"),
  )
  check_marks(rows, MARKERS)
  for k in (1, 3, 5, 6, 7):
    with pytest.raises(InputError, match=r"is not (flagged|closed)|closes no flag|no correction"):
      check_marks(rows[:k] + rows[k + 1 :], MARKERS)
  with pytest.raises(InputError, match="'c=5' is the mistake again"):
    check_marks((*rows[:-1], Piece(CORRECTION, "c=5")), MARKERS)
  for k in (5, 6, 7):
    check_marks((*rows[:k], Piece(FLAG, "<what>")), MARKERS)  # no marker: the tokenizer says so


def test_a_mistake_is_wrong_step_flag_reason_fix_right_step():
  pieces = mistake_pieces(MARKERS, wrong="c=5\n", reason="calc c", right="c=7\n")
  assert [(piece.role, piece.text) for piece in pieces] == [
    (MISTAKE, "c=5\n"),
    (FLAG, "<err>"),
    (REASON, "calc c"),
    (FLAG, "<fix>"),
    (CORRECTION, "c=7\n"),
  ]
  assert REASON not in [piece.role for piece in mistake_pieces(MARKERS, wrong="a", reason="", right="b")]


def test_clean_takes_out_mistake_flag_and_reason():
  transcript = (Piece(PROMPT, "p\n"), Piece(TEXT, "a\n"), *mistake_pieces(MARKERS, wrong="b", reason="r", right="c"))
  assert render(transcript) == "p\na\nb<err>r<fix>c"
  assert clean(transcript) == "p\na\nc"


@pytest.mark.parametrize(
  ("unit", "text", "steps"),
  [
    ("line", "a\nb\n", ["a\n", "b\n"]),
    ("line", "a\n\nb", ["a\n\n", "b"]),
    ("line", "\n a\n", ["\n a\n"]),
    ("line", "a\x0cb\u2028c\n", ["a\x0cb\u2028c\n"]),
    ("line", "\n", ["\n"]),
    ("line", "", []),
    ("sentence", "He has 5. She has 7.\nBoth have 12.\n", ["He has 5. ", "She has 7.\n", "Both have 12.\n"]),
    (
      "sentence",
      'Mr. Lee pays $0.50! "Why?" No. 5 is it. e.g. this',
      ["Mr. Lee pays $0.50! ", '"Why?" ', "No. 5 is it. ", "e.g. this"],
    ),
    ("sentence", "no end of sentence\n#### 72\n", ["no end of sentence\n", "#### 72\n"]),
    ("sentence", "so... it is.  \n  Then", ["so... ", "it is.  \n  ", "Then"]),
    ("paragraph", "a\nb\n\nc\n \n\nd", ["a\nb\n\n", "c\n \n\n", "d"]),
  ],
)
def test_steps_are_cut_at_the_ends_of_their_unit(unit, text, steps):
  assert list(split_steps(text, unit)) == steps


@pytest.mark.parametrize("unit", ["line", "sentence", "paragraph"])
def test_steps_concatenate_to_the_text(unit):
  rng = np.random.default_rng(0)
  for _ in range(300):
    text = "".join(rng.choice(["a", " ", "\n", ". ", "?", "Mr. ", "5", "\n\n"], rng.integers(0, 15)))
    assert "".join(split_steps(text, unit)) == text
    assert all(step.strip() for step in split_steps(text, unit)) or not text.strip()


def test_an_unknown_unit_is_refused():
  with pytest.raises(InputError, match="unit 'word'"):
    split_steps("a", "word")


def test_the_step_before_a_flag_is_the_mistake_that_after_a_fix_the_correction():
  assert shape("a\nb\nwrong\n<err>why<fix>right\nc\n") == [
    (TEXT, "a\nb\n"),
    (MISTAKE, "wrong\n"),
    (FLAG, "<err>"),
    (REASON, "why"),
    (FLAG, "<fix>"),
    (CORRECTION, "right\n"),
    (TEXT, "c\n"),
  ]


def test_a_correction_that_is_flagged_is_a_mistake_too():
  text = "a\n<err>r<fix>b\n<err><fix>c\n"
  assert shape(text) == [
    (MISTAKE, "a\n"),
    (FLAG, "<err>"),
    (REASON, "r"),
    (FLAG, "<fix>"),
    (MISTAKE, "b\n"),
    (FLAG, "<err>"),
    (FLAG, "<fix>"),
    (CORRECTION, "c\n"),
  ]
  assert clean_text(text, MARKERS, "line") == "c\n"


def test_parse_reads_back_what_a_transcript_renders():
  transcript = (Piece(TEXT, "a\n"), *mistake_pieces(MARKERS, wrong="b\n", reason="r", right="c\n"), Piece(TEXT, "d\n"))
  assert parse(render(transcript), MARKERS, "line") == transcript


@pytest.mark.parametrize("unit", ["line", "sentence", "paragraph"])
def test_parse_loses_nothing_of_any_text(unit):
  rng = np.random.default_rng(1)
  for _ in range(500):
    text = "".join(rng.choice(["a", "\n", ". ", "<err>", "<fix>", "<er", "b\n"], rng.integers(0, 12)))
    pieces = parse(text, MARKERS, unit)
    assert render(pieces) == text
    assert all(piece.text for piece in pieces)


@pytest.mark.parametrize(
  "text",
  [
    "a\nwrong\n<err>",  # nothing after the flag
    "a\nwrong\n<err>reason",  # cut in the reason
    "a\nwrong\n<err>reason<fix>",  # cut before the correction
    "a\nwrong\n<err>right\nb\n",  # no fix: where the reason ends is unknown
    "<err>reason<fix>right\n",  # no step to flag
    "a\n<fix>b\n",  # no flag
    "wrong\n<err>x\n<err>y",  # flags only
  ],
)
def test_a_malformed_correction_stays_visible_in_the_clean_text(text):
  assert clean_text(text, MARKERS, "line") == text


def test_a_complete_correction_is_cleaned_even_beside_a_malformed_one():
  text = "x\n<err>r<fix>y\nz\n<err>cut"
  assert clean_text(text, MARKERS, "line") == "y\nz\n<err>cut"


def test_markers_that_look_like_patterns_are_plain_text():
  markers = Markers("(wait.)", "[so]")
  roles = [piece.role for piece in parse("a\n(wait.)r[so]b\n", markers, "line")]
  assert roles == [MISTAKE, FLAG, REASON, FLAG, CORRECTION]

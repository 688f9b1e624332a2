"""What later tokens read of a text with mistakes, and the positions, against the roles of a text that is made."""

import numpy as np
import pytest

from insec_jax.method import rewind
from insec_jax.method.rewind import NEVER

# A letter for each kind: word, end of a line, blank, special token, flag, fix, confidence, padding.
KINDS = dict(zip("wnbsFXc.", range(8), strict=True))


def read(text):
  """(positions, until) of a text given by the letters of its tokens, with . for NEVER."""
  seen = rewind.visibility(np.array([[KINDS[letter] for letter in text]], np.int8))
  return seen.position_BT[0].tolist(), ["." if until == NEVER else int(until) for until in seen.until_BT[0]]


def test_positions_and_what_is_hidden_are_those_of_the_docstring():
  rows = [line.split()[1:] for line in rewind.__doc__.splitlines() if line.startswith("    ")]
  position_T, until_T = read("wnwwnFwXwwnw")
  assert [str(position + 5) for position in position_T] == rows[1]
  assert [str(until) for until in until_T] == rows[2][: len(until_T)]


def test_a_flagged_correction_hides_its_own_mistake_first():
  assert read("wn" + "wnFwX" + "wnFwX" + "wn" + "w") == (
    [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6, 2, 3, 4],
    [".", ".", *[8] * 5, *[13] * 5, ".", ".", "."],
  )


def test_a_correction_flagged_within_its_line_is_hidden_with_its_mistake():
  assert read("wn" + "wnFX" + "wFX" + "wn") == ([0, 1, 2, 3, 4, 5, 2, 3, 4, 2, 3], [".", ".", *[10] * 7, ".", "."])


@pytest.mark.parametrize(
  ("text", "hidden"),
  [
    ("wn" + "FwX" + "wnw", 0),  # the first line is the prompt's
    ("wFwX" + "wnw", 0),
    ("wns" + "wn" + "FX" + "wnw", 0),  # a line after a special token is the template's
    ("wn" + "wns" + "wn" + "FX" + "wnw", 0),  # whatever stands before the special token
    ("sbs" + "b" + "wnFX" + "wnw", 4),  # the line after that is not
    ("wn" + "wFX" + "wnw", 3),  # a mistake without an end of line
    ("wn" + "wncFwX" + "wnc" + "w", 6),  # a confidence token after it
    ("wn" + "wnbFX" + "wnw", 5),  # a blank line belongs to the line before
    ("wn" + "wnFX" + "ws", 4),  # a special token ends a correction
    ("wn" + "wnFFwX" + "wnw", 6),  # of two flags, the first counts
    ("wn" + "wnFws" + "X" + "wnw", 0),  # a reason that a special token cuts off
    ("wn" + "wnX" + "wnw", 0),  # a fix that closes no flag
    ("wn" + "wnFwX" + "w", 0),  # a correction that has not ended
  ],
)
def test_a_mistake_is_the_line_before_the_flag(text, hidden):
  _, until_T = read(text)
  assert len(until_T) - until_T.count(".") == hidden


def test_a_blank_line_is_no_correction():
  assert read("wn" + "wnFX" + "bwn" + "w")[1] == [".", ".", 8, 8, 8, 8, ".", ".", ".", "."]


def made_text(rng):
  """(letters, until, positions) of a text of lines, some of which are corrected once or twice."""
  letters, until, position = list("wwn"), [NEVER] * 3, [0, 1, 2]

  def add(tokens, at):
    letters.extend(tokens)
    until.extend([NEVER] * len(tokens))
    position.extend(range(at, at + len(tokens)))

  for _ in range(4):
    at, mistakes, begins = position[-1] + 1, rng.integers(0, 3), None
    for number in range(mistakes + 1):
      first = len(letters)
      add("w" * rng.integers(0, 3) + "n" + "c" * rng.integers(0, 2), at)
      if begins is not None:
        until[begins:first] = [letters.index("n", first)] * (first - begins)
      if number < mistakes:
        begins = first
        add("F" + "w" * rng.integers(0, 3) + "X", position[-1] + 1)
  return letters, until, position


def test_many_texts_at_once_padded_at_either_end_are_read_as_each_alone():
  rng = np.random.default_rng(0)
  texts = [made_text(rng) for _ in range(40)]
  longest = max(len(letters) for letters, *_ in texts)
  assert sum(until != NEVER for _, until_T, _ in texts for until in until_T) > 200
  for padded in (lambda text: text + "." * (longest - len(text)), lambda text: "." * (longest - len(text)) + text):
    kind_BT = np.array([[KINDS[letter] for letter in padded("".join(letters))] for letters, *_ in texts], np.int8)
    seen = rewind.visibility(kind_BT)
    for row, (letters, until_T, position_T) in enumerate(texts):
      start = int((kind_BT[row] != rewind.PADDING).argmax())
      span = slice(start, start + len(letters))
      np.testing.assert_array_equal(seen.position_BT[row, span], position_T)
      got_T = seen.until_BT[row, span]
      np.testing.assert_array_equal(np.where(got_T == NEVER, NEVER, got_T - start), until_T)
      assert seen.state.position[row] == position_T[-1]

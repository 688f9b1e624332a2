"""Tokens and rows with mistakes.rewind: what later tokens read, at which positions."""

import dataclasses
import hashlib

import numpy as np
import pytest
from datakit import IM_TEMPLATE, LLAMA_TEMPLATE, bpe_tokenizer, config, gsm8k, question

from insec_jax.command import InputError
from insec_jax.data import pipeline, tokens, vocabulary
from insec_jax.data.template import fix_date
from insec_jax.method.rewind import NEVER
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT
from insec_jax.method.transcript import Markers, Piece, mistake_pieces

MARKERS = Markers("<err>", "<fix>")
ASKED = (Piece(PROMPT, "What is 12 + 30?\n"),)
TWICE = (
  *mistake_pieces(MARKERS, wrong="12 + 30 = 43\n", reason=" wrong", right="12 + 30 = 42\n"),
  Piece(TEXT, "He adds 12.\n"),
  *mistake_pieces(MARKERS, wrong="#### 43\n", reason="", right="#### 42\n"),
)
WRONG_AGAIN = (*TWICE[:4], Piece(MISTAKE, "12 + 30 = 41\n"), *TWICE[1:])


def examples(contents, template=None, **changes):
  some = config(**{"mistakes__rewind": True, "data__template": "chat" if template else "plain", **changes})
  tokenizer = vocabulary.add_markers(bpe_tokenizer(template), some.tokenizer).tokenizer
  fix_date(tokenizer, "2024-07-26")
  return tokens.tokenize_all([(content, "file:3") for content in contents], tokenizer, some), tokenizer


def text_of(example, tokenizer, chosen_T):
  return tokenizer.decode(example.token_T[chosen_T])


@pytest.mark.parametrize("template", [None, LLAMA_TEMPLATE, IM_TEMPLATE])
@pytest.mark.parametrize("answer", [TWICE, WRONG_AGAIN, TWICE[:5]])
def test_mistake_flag_reason_and_fix_are_hidden_and_the_rest_stands_as_without_them(answer, template):
  right = tuple(piece for piece in answer if piece.role in (TEXT, CORRECTION))
  (wrong_one, right_one), tokenizer = examples([(*ASKED, *answer), (*ASKED, *right)], template)
  kept_T = wrong_one.until_T == NEVER
  assert (np.isin(wrong_one.role_T, (MISTAKE, FLAG, REASON)) == ~kept_T).all()
  np.testing.assert_array_equal(wrong_one.token_T[kept_T], right_one.token_T)
  np.testing.assert_array_equal(wrong_one.position_T[kept_T], np.arange(len(right_one.token_T)))
  assert (right_one.until_T == NEVER).all()
  for until in set(wrong_one.until_T[~kept_T].tolist()):
    ends_line = tokenizer.decode(wrong_one.token_T[until]).endswith("\n")
    assert wrong_one.role_T[until] in ((CORRECTION, MISTAKE) if ends_line else (TEXT,))


def test_a_correction_at_the_end_of_the_text_ends_with_it():
  (example,), _ = examples([(*ASKED, *mistake_pieces(MARKERS, wrong="1 + 1 = 3\n", reason="", right="1 + 1 = 2"))])
  assert set(example.until_T.tolist()) == {len(example.token_T) - 1, NEVER}


@pytest.mark.parametrize(
  "transcript",
  [
    (Piece(PROMPT, "What is 12 + 30?"), *TWICE),  # the first line would be the prompt's
    (*ASKED, Piece(TEXT, "so "), *TWICE),
    (*ASKED, Piece(MISTAKE, "12\n"), *TWICE),
    (*ASKED, Piece(TEXT, "He adds 12 and 30.\n"), *TWICE[1:]),  # a right line that is flagged
  ],
)
def test_a_mistake_that_is_no_line_of_the_answer_is_refused(transcript):
  with pytest.raises(InputError, match=r"file:3: mistakes.rewind hides the line before a flag.*rewind=False"):
    examples([transcript])


def test_without_rewind_examples_say_nothing_of_it():
  (example,), _ = examples([(*ASKED, *TWICE)], mistakes__rewind=False)
  assert example.position_T is None
  assert example.until_T is None


def load(tmp_path, **changes):
  lines = [question(number) for number in range(30)]
  some = gsm8k(tmp_path, lines, **{"mistakes__share": 1.0, "data__row_length": 128, "data__num_heldout": 4} | changes)
  return pipeline.load_data(some, vocabulary.add_markers(bpe_tokenizer(), some.tokenizer).tokenizer)


def test_rows_hold_what_their_examples_say_each_at_its_place(tmp_path):
  data = load(tmp_path, mistakes__rewind=True)
  rows, hidden = data.train, 0
  for token_T, segment_T, position_T, role_T, until_T in zip(
    rows.token_BT, rows.segment_BT, rows.position_BT, rows.role_BT, rows.until_BT, strict=True
  ):
    for segment in range(1, segment_T.max() + 1):
      inside_T = segment_T == segment
      kept_T = inside_T & (until_T == NEVER)
      np.testing.assert_array_equal(position_T[kept_T], np.arange(kept_T.sum()))
      hides_T = inside_T & np.isin(role_T, (MISTAKE, FLAG, REASON))
      np.testing.assert_array_equal(hides_T, inside_T & ~kept_T)
      (until,) = set(until_T[hides_T].tolist())
      assert segment_T[until] == segment
      assert role_T[until] == CORRECTION
      assert role_T[until + 1] != CORRECTION
      hidden += hides_T.sum()
    assert (until_T[segment_T == 0] == NEVER).all()
    assert token_T.dtype == until_T.dtype
  assert rows.segment_BT.max() > 1
  assert f"hidden tokens     {hidden} that nothing after their correction reads" in data.receipt
  options = {"rows_per_step": 64, "share": slice(None), "negatives": False}
  (batch,) = pipeline.in_order(rows, **options)
  np.testing.assert_array_equal(batch["until_ABT"][0, : len(rows)], rows.until_BT)
  assert (batch["until_ABT"][0, len(rows) :] == NEVER).all()


def test_without_rewind_rows_batches_and_digest_are_as_before(tmp_path):
  data = load(tmp_path)
  assert data.train.until_BT is None
  assert "hidden" not in data.receipt
  names = ("token", "segment", "position", "role", "weight", "negative")
  whole = b"".join(getattr(data.train, f"{name}_BT").tobytes() for name in names)
  assert data.digest == hashlib.sha256(whole).hexdigest()
  (batch,) = pipeline.in_order(data.train, rows_per_step=64, share=slice(None), negatives=True)
  assert set(batch) == {f"{name}_ABT" for name in names}


def test_the_digest_changes_with_what_is_hidden(tmp_path):
  rows = load(tmp_path, mistakes__rewind=True).train
  until_BT = np.where(rows.until_BT == NEVER, NEVER, rows.until_BT + 1)
  assert dataclasses.replace(rows, until_BT=until_BT).digest() != rows.digest()


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"mistakes__unit": "sentence"}, "set mistakes.unit='line'"),
    ({"tokenizer__special": False}, "tokenizer.special=False has none"),
  ],
)
def test_a_config_whose_tokens_do_not_tell_where_mistakes_are_is_refused(changes, said):
  with pytest.raises(InputError, match=said):
    config(mistakes__rewind=True, **changes)

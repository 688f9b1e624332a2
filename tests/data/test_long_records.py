"""Records longer than a row: refused or left out; and whatever their size, the work is linear in it."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from datakit import IM_TEMPLATE, bpe_tokenizer, config, write_lines

from insec_jax.command import InputError
from insec_jax.data import encoding, pipeline, tokens, vocabulary
from insec_jax.method.tasks import gsm8k_records
from insec_jax.method.transcript import split_steps

ROOT = Path(__file__).parents[2]
DIGEST = """
import hashlib, sys
from datakit import bpe_tokenizer, config
from insec_jax.data import pipeline, tokens, vocabulary
some = config(data__path=sys.argv[1], data__num_heldout=1, mistakes__source="injected", mistakes__share=1.0,
              mistakes__unit="sentence")
tokenizer = vocabulary.add_markers(bpe_tokenizer(), some.tokenizer).tokenizer
print(hashlib.sha256(pipeline.load_data(some, tokenizer).train.token_BT.tobytes()).hexdigest())
"""


def said(text):
  return {"pieces": [{"role": "prompt", "text": f"{text[:2]}?"}, {"role": "text", "text": text}]}


def load(tmp_path, lines, **changes):
  some = config(data__path=write_lines(tmp_path / "r.jsonl", lines), data__row_length=16, **changes)
  return pipeline.load_data(some, vocabulary.build_tokenizer((*"0123456789ab?",), some.tokenizer))


def test_a_record_too_long_is_refused_unless_it_is_to_be_dropped(tmp_path):
  lines = [said("1ab"), said("2" * 30), said("3ba")]
  with pytest.raises(InputError, match=r"r\.jsonl:2: 34 tokens do not fit in a row of data\.row_length=16"):
    load(tmp_path, lines)
  data = load(tmp_path, lines, data__too_long="drop")
  assert data.left_out.train == ((f"{tmp_path}/r.jsonl:2", 34),)
  assert "too long          1 records to train on and 0 held out, left out\n" in data.receipt
  assert f"  {tmp_path}/r.jsonl:2: 34 tokens\n" in data.receipt
  assert "records           2\n" in data.receipt
  assert json.loads(data.left_out.to_json_lines()) == {"split": "train", "where": f"{tmp_path}/r.jsonl:2", "tokens": 34}


def test_rows_without_dropped_records_are_those_of_a_file_without_them(tmp_path):
  short = [said(f"{number}ab") for number in range(9)]
  mixed = [line for number, line in enumerate(short) for line in (said(str(number) * 40), line)]
  dropped, without = (load(tmp_path, lines, data__too_long="drop").train for lines in (mixed, short))
  assert (dropped.token_BT == without.token_BT).all()
  assert (dropped.segment_BT == without.segment_BT).all()


def test_held_out_records_too_long_are_counted_apart(tmp_path):
  lines = [said(f"{number}" + "ab" * (number % 3 * 8)) for number in range(10)]
  data = load(tmp_path, lines, data__too_long="drop", data__num_heldout=5)
  assert len(data.left_out.train) + len(data.left_out.heldout) == 6
  assert data.left_out.heldout
  assert ", held out\n" in data.receipt


def test_the_receipt_lists_twenty_of_the_dropped_and_counts_all(tmp_path):
  data = load(tmp_path, [said("a"), *(said("b" * 30) for _ in range(25))], data__too_long="drop")
  assert data.receipt.count(" tokens\n  ") == 20
  assert "  and 5 more\n" in data.receipt
  assert len(data.left_out.to_json_lines().splitlines()) == 25


def test_a_split_whose_records_are_all_too_long_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"all 2 records of the split 'train' are longer than data\.row_length=16"):
    load(tmp_path, [said("b" * 30), said("a" * 30)], data__too_long="drop")


def test_mined_records_too_long_are_dropped_and_each_is_listed_once(tmp_path):
  mined = write_lines(tmp_path / "mined.jsonl", [said("7" * 20), said("8ab")])
  data = load(
    tmp_path,
    [said(f"{number}a") for number in range(4)],
    data__too_long="drop",
    mistakes__mined=0.5,
    mistakes__mined_path=mined,
  )
  assert [record.where for record in data.left_out.train] == [f"{mined}:1"]


def test_a_text_certainly_too_long_is_refused_before_it_is_encoded(tmp_path, monkeypatch):
  monkeypatch.setattr(encoding, "_all_plain", None)  # encoding would fail
  with pytest.raises(InputError, match=r"r\.jsonl:1: at least [0-9]+ tokens do not fit"):
    load(tmp_path, [said("a" * 10_000)])


def counted(function, *arguments):
  """Return how many calls of Python and C functions it makes: a time that no load of the machine changes."""
  num = 0

  def count(*_):
    nonlocal num
    num += 1

  sys.setprofile(count)
  try:
    function(*arguments)
  finally:
    sys.setprofile(None)
  return num


def test_annotations_are_placed_in_time_linear_in_the_line():
  def answer(num):
    return {"question": "q", "answer": "1 = <<1=1>>1 " * num + "\n#### 1"}

  small, large = (counted(gsm8k_records.problem_of, answer(num)) for num in (100, 1000))
  assert large <= 10.5 * small
  assert gsm8k_records.problem_of(answer(2)).facts.notes[1] == gsm8k_records.Note(10, "1", Fraction(1))


def test_steps_of_dots_or_blank_lines_are_split_in_time_linear_in_them():
  # With the square of the length these would take hours.
  assert split_steps("." * 1_000_000 + "a", "sentence") == ("." * 1_000_000 + "a",)
  assert len(split_steps("a" + "\n \n" * 300_000, "line")) == 1


def test_arithmetic_of_any_length_is_read_or_refused():
  with pytest.raises(InputError, match="does not hold"):
    gsm8k_records.problem_of({"question": "q", "answer": f"<<{'(' * 100_000}1=1>>\n#### 1"})


def test_messages_by_the_thousand_are_taken_apart_in_linear_time():
  tokenizer = bpe_tokenizer(IM_TEMPLATE)
  some = tokens.Template(tokenizer)

  def fill(num):
    return some.fill(("user", "assistant") * num, ["a", "b"] * num, "it", generation=False)

  fill(1)
  small, large = counted(fill, 100), counted(fill, 1000)
  assert large <= 10.5 * small


def test_rows_are_the_same_with_any_seed_of_hashes_and_any_locale(tmp_path):
  lines = [
    {"question": f"What does {name} see?", "answer": f"{name} sees {3 + k} boats in {town}. Nobody is late."}
    for k, (name, town) in enumerate((("Anna", "Riga"), ("Bela", "Turin"), ("Carl", "Porto")))
  ]
  path = write_lines(tmp_path / "r.jsonl", lines)
  digests = set()
  for seed, locale in (("0", "C"), ("12345", "C.UTF-8")):
    environment = {
      **os.environ,
      "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
      "PYTHONHASHSEED": seed,
      "LC_ALL": locale,
    }
    digests.add(
      subprocess.run(
        [sys.executable, "-c", DIGEST, path], capture_output=True, text=True, check=True, env=environment
      ).stdout
    )
  assert len(digests) == 1

"""Natural wrong solutions of GSM8K: the first wrong line is named, nothing unverified is trained, no answer is told."""

import dataclasses
import json
import types

import datakit
import pytest
from datakit import gsm8k
from miningkit import MARKERS, said

from insec_jax.command import InputError
from insec_jax.data import mixture, problems, tokens, vocabulary
from insec_jax.data.problems import split_records
from insec_jax.method import tasks
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, REASON, TEXT
from insec_jax.mining import miner
from insec_jax.mining.miner import Miner

RECORD = {
  "question": "A baker fills 3 trays with 12 rolls each and sells 20 rolls. What do the rolls left bring at $2 each?",
  "answer": "The baker makes 3 * 12 = <<3*12=36>>36 rolls.\nThere are 36 - 20 = <<36-20=16>>16 rolls left.\n"
  "He earns 16 x $2 = $<<16*2=32>>32.\n#### 32",
}
MAKES, LEFT = "The baker makes 3 * 12 = 36 rolls.\n", "There are 36 - 20 = 16 rolls left.\n"
EARNS = "He earns 16 x $2 = $32.\n"
ADDS = "There are 3 + 12 = 15 rolls.\n"  # holds, but leads nowhere
SELLS = "He sells some of them.\n"  # says nothing that can be checked


def mined(tmp_path, text, reason="recompute"):
  """(the result of mining one problem whose solution is this text, its record as a transcript, None without one)."""
  config = gsm8k(
    tmp_path, [RECORD], mine__num_problems=1, mine__samples=1, mistakes__reason=reason, data__row_length=999
  )
  tokenizer = datakit.bpe_tokenizer()
  writer = types.SimpleNamespace(
    tokenizer=tokenizer,
    flag_id=None,
    confidence_ids=(),
    encode=lambda prompt: prompt,
    write=lambda begins, **_: [said(text) for _ in begins],
  )
  found = Miner(writer, tasks.get(config.task), config, seed=0, weights="w").chunk(0)
  path = tmp_path / "mined.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in found["records"]))
  mistakes = dataclasses.replace(config.mistakes, mined=1.0, mined_path=str(path))
  if not found["records"]:
    return found, None
  ((record, _),) = mixture.transcripts(dataclasses.replace(config, mistakes=mistakes), "train")
  return found, record


@pytest.mark.parametrize(
  ("text", "wrong", "error", "right"),
  [
    (ADDS + "So he earns 15 * 2 = $30.\n#### 30\n", ADDS, "result", MAKES),
    (MAKES + "Then 36 + 20 = 56 are left.\n#### 56\n", "Then 36 + 20 = 56 are left.\n", "result", LEFT),
    (ADDS + "He has 15 * 2 = 31.\n#### 31\n", ADDS, "result", MAKES),  # before the one that is proved wrong
    (MAKES + "Then 36 - 20 = 6.\n#### 6\n", "Then 36 - 20 = 6.\n", "calc", LEFT),
    (MAKES + LEFT + EARNS + "#### 36\n", "#### 36\n", "answer", "#### 32\n"),
  ],
)
def test_the_first_wrong_line_of_a_natural_solution_is_the_mistake(tmp_path, text, wrong, error, right):
  found, record = mined(tmp_path, text)
  assert found["classes"] == {error: 1}
  assert "".join(piece.text for piece in record if piece.role == MISTAKE) == wrong
  assert next(piece.text for piece in record if piece.role == CORRECTION) == right


def test_a_line_is_located_only_where_the_answer_is_known_to_be_wrong(tmp_path):
  for text in (ADDS + "#### 32\n", ADDS):
    found, record = mined(tmp_path, text)
    assert (found["counts"]["wrong"], record) == (0, None)


def test_unverified_lines_before_a_mistake_have_weight_0(tmp_path):
  _, record = mined(tmp_path, SELLS + MAKES + SELLS.replace("some", "many") + "Then 36 - 20 = 6.\n#### 6\n")
  texts = [(piece.text, piece.weight) for piece in record if piece.role == TEXT]
  assert texts[:3] == [(SELLS, 0.0), (MAKES, None), (SELLS.replace("some", "many"), 0.0)]
  assert all(weight is None for _, weight in texts[3:])
  config = datakit.config(data__row_length=999)
  tokenizer = vocabulary.add_markers(datakit.bpe_tokenizer(), config.tokenizer).tokenizer
  example = tokens.tokenize(record, "", tokenizer, config)
  assert (example.weight_T[example.role_T == TEXT] == 0).sum() >= 4


def test_a_wrong_answer_after_an_unverified_line_is_no_record(tmp_path):
  found, record = mined(tmp_path, MAKES + SELLS + "#### 36\n")
  assert record is None
  assert found["left out"] == {miner.UNCONFIRMED: 1}


@pytest.mark.parametrize("reason", ["label", "recompute", "paper"])
def test_the_reason_of_a_wrong_answer_does_not_state_the_right_one(tmp_path, reason):
  _, record = mined(tmp_path, MAKES + LEFT + EARNS + "#### 36\n", reason)
  (said_why,) = (piece.text for piece in record if piece.role == REASON)
  assert "32" not in said_why
  assert [piece.text for piece in record if piece.role == FLAG] == [MARKERS.flag, MARKERS.fix]


def test_problems_to_mine_are_a_share_of_the_file_that_nothing_else_trains_on(tmp_path):
  lines = [datakit.question(number) for number in range(200)]
  some = gsm8k(tmp_path, lines, data__to_mine=0.3, data__num_heldout=20, mine__num_problems=500)
  trained = {content[0].text for content, _ in mixture.transcripts(some, "train")}
  held = {record.content.prompt for _, record in split_records(some, "heldout")}
  to_mine = {problem.prompt for problem in problems.problems_to_mine(tasks.get(some.task), some, seed=0)}
  assert (len(trained) + len(to_mine), len(held)) == (180, 20)
  assert not trained & to_mine
  assert not held & (trained | to_mine)
  assert 30 < len(to_mine) < 80
  again = gsm8k(tmp_path, lines[100:], data__to_mine=0.3, data__num_heldout=0, mine__num_problems=500)
  assert {
    problem.prompt for problem in problems.problems_to_mine(tasks.get(again.task), again, seed=1)
  } <= to_mine | held
  whole = gsm8k(tmp_path, lines, data__num_heldout=20)
  assert {content[0].text for content, _ in mixture.transcripts(whole, "train")} == trained | to_mine


def test_a_share_to_mine_that_leaves_nothing_is_refused(tmp_path):
  some = gsm8k(tmp_path, [datakit.question(1)], data__to_mine=1.0)
  with pytest.raises(InputError, match=r"data\.to_mine=1\.0 leaves none of the 1 records"):
    mixture.transcripts(some, "train")
  with pytest.raises(InputError, match=r"data\.to_mine=0\.5 parts the problems of data\.path"):
    datakit.config(task__name="sudoku", task__min_size=2, task__max_size=3, data__num_records=2, data__to_mine=0.5)

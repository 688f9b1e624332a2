import itertools

import numpy as np
import pytest
from datakit import config, write_lines

from insec_jax.command import InputError
from insec_jax.data import pipeline, vocabulary
from insec_jax.data.packing import Rows
from insec_jax.method.roles import NO_ROLE

ALL = slice(None)


def numbered_rows(num):
  """Rows of length 2 whose tokens are the number of the row."""
  token_BT = np.repeat(np.arange(num, dtype=np.int32), 2).reshape(num, 2)
  return Rows(
    token_BT,
    np.ones_like(token_BT),
    np.tile(np.arange(2, dtype=np.int32), (num, 1)),
    np.ones((num, 2), np.int8),
    np.ones((num, 2), np.float32),
    token_BT + 100,
  )


def read(num_rows, num_batches, *, seed=0, rows_per_step=4, accumulation=1, start_step=0, share=ALL):
  """Row numbers of the batches, [batch, A, B]."""
  found = pipeline.batches(
    numbered_rows(num_rows),
    seed=seed,
    rows_per_step=rows_per_step,
    accumulation=accumulation,
    start_step=start_step,
    share=share,
    negatives=False,
  )
  return np.stack([batch["token_ABT"][..., 0] for batch in itertools.islice(found, num_batches)])


def test_each_epoch_reads_every_row_once_and_batches_run_on_into_the_next_epoch():
  order = read(10, 15).ravel()
  epochs = order.reshape(6, 10)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (6, 1)))
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6


def test_the_order_is_the_one_that_runs_in_progress_rely_on():
  # A new version of grain that shuffles otherwise would silently change every resumed run.
  assert read(10, 3).ravel().tolist() == [1, 2, 4, 5, 9, 7, 8, 6, 0, 3, 9, 6]


def test_another_seed_gives_another_order():
  assert (read(50, 5, seed=1) != read(50, 5, seed=2)).any()


def test_a_run_resumed_at_a_step_reads_what_it_would_have_read():
  np.testing.assert_array_equal(read(10, 4, start_step=7), read(10, 11)[7:])


@pytest.mark.parametrize("shares", [(ALL,), (slice(0, 2), slice(2, 4)), (np.array([0, 3]), np.array([1, 2]))])
def test_shares_of_processes_make_up_the_same_global_batches(shares):
  parts = np.concatenate([read(10, 6, accumulation=2, share=share) for share in shares], axis=2)
  order = np.concatenate([np.arange(4)[share] for share in shares])
  np.testing.assert_array_equal(parts, read(10, 6, accumulation=2)[:, :, order])


def test_accumulation_reads_the_rows_of_as_many_smaller_steps():
  np.testing.assert_array_equal(read(10, 3, accumulation=2).reshape(6, 1, 4), read(10, 6))


@pytest.mark.parametrize("negatives", [False, True])
def test_arrays_of_a_batch_have_the_axes_of_their_names_negatives_only_when_asked(negatives):
  how = {"rows_per_step": 4, "share": slice(1, 3), "negatives": negatives}
  batch = next(pipeline.batches(numbered_rows(3), seed=0, accumulation=2, start_step=0, **how))
  in_order = next(pipeline.in_order(numbered_rows(3), **how))
  assert ("negative_ABT" in batch, "negative_ABT" in in_order) == (negatives, negatives)
  if negatives:
    np.testing.assert_array_equal(batch["negative_ABT"], batch["token_ABT"] + 100)
    np.testing.assert_array_equal(in_order["negative_ABT"][0], [[101, 101], [102, 102]])
  assert {name: (value.shape, value.dtype) for name, value in batch.items() if name != "negative_ABT"} == {
    "token_ABT": ((2, 2, 2), np.int32),
    "segment_ABT": ((2, 2, 2), np.int32),
    "position_ABT": ((2, 2, 2), np.int32),
    "role_ABT": ((2, 2, 2), np.int8),
    "weight_ABT": ((2, 2, 2), np.float32),
  }


def test_held_out_rows_come_once_in_order_and_the_last_batch_is_filled_with_padding():
  found = list(pipeline.in_order(numbered_rows(5), rows_per_step=4, share=ALL, negatives=False))
  np.testing.assert_array_equal(
    np.stack([batch["token_ABT"][0, :, 0] for batch in found]), [[0, 1, 2, 3], [4, 0, 0, 0]]
  )
  np.testing.assert_array_equal(
    np.stack([batch["segment_ABT"][0, :, 0] for batch in found]), [[1, 1, 1, 1], [1, 0, 0, 0]]
  )
  halves = [
    list(pipeline.in_order(numbered_rows(5), rows_per_step=4, share=share, negatives=False))
    for share in (slice(0, 2), slice(2, 4))
  ]
  for whole, left, right in zip(found, *halves, strict=True):
    np.testing.assert_array_equal(np.concatenate([left["role_ABT"], right["role_ABT"]], axis=1), whole["role_ABT"])


def test_no_rows_are_refused():
  with pytest.raises(InputError, match="no row to train on"):
    read(0, 1)


def test_the_receipt_counts_what_is_trained(tmp_path):
  pieces = [
    {"role": "prompt", "text": "ab"},
    {"role": "text", "text": "b"},
    {"role": "mistake", "text": "ab"},
    {"role": "flag", "text": "<err>"},
    {"role": "reason", "text": "a", "weight": -2.0},
    {"role": "flag", "text": "<fix>"},
    {"role": "correction", "text": "ba"},
  ]
  path = write_lines(tmp_path / "r.jsonl", [{"pieces": pieces}, {"pieces": [{"role": "text", "text": "bb"}]}])
  some = config(data__path=path, data__row_length=16)
  data = pipeline.load_data(some, vocabulary.build_tokenizer(("a", "b"), some.tokenizer))
  lines = {line.split()[0]: line.split() for line in data.receipt.splitlines()}
  # In order: text, its end, two flags, |-2| for the reason, correction; then text (its first is no target) and its end.
  total = 1 + 0.5 + 2 + 2 + 2 + 1 + 0.5
  assert lines["prompt"] == ["prompt", "2", f"{2 / 14:.1%}", "0", "0.000", "0.0%"]
  assert lines["text"] == ["text", "5", f"{5 / 14:.1%}", "4", "0.750", f"{3 / total:.1%}"]
  assert lines["mistake"][1:4] == ["2", f"{2 / 14:.1%}", "0"]
  assert lines["reason"] == ["reason", "1", f"{1 / 14:.1%}", "1", "-2.000", f"{2 / total:.1%}"]
  assert lines["correction"][3] == "2"
  assert "trained tokens    9 of 14" in data.receipt
  assert "end of text       2 tokens" in data.receipt
  assert "boundary tokens   0 " in data.receipt
  assert f"longest record    11 of 16 tokens, {path}:1" in data.receipt
  assert f"rows              1 of 16 tokens, {2 / 16:.1%} padding" in data.receipt
  assert len(data.heldout) == 0


def test_the_receipt_counts_negatives_when_they_weigh_something(tmp_path):
  pieces = [("prompt", "ab"), ("mistake", "aa"), ("flag", "<err>"), ("flag", "<fix>"), ("correction", "ab")]
  record = {"pieces": [{"role": role, "text": text} for role, text in pieces]}
  path = write_lines(tmp_path / "r.jsonl", [record, record])
  receipts = {}
  for repeat in (0.0, 0.75):
    some = config(data__path=path, data__row_length=16, loss__repeat=repeat)
    receipts[repeat] = pipeline.load_data(some, vocabulary.build_tokenizer(("a", "b"), some.tokenizer)).receipt
  # Each record: two flags, two tokens of the correction, and an end of weight 0.5.
  line = f"negative tokens   2 where a correction could repeat its mistake, weight 0.75 each: {1.5 / 9:.1%} "
  assert line in receipts[0.75]
  without = [line for line in receipts[0.75].splitlines() if not line.startswith("negative")]
  assert without == receipts[0.0].splitlines()


def test_one_row_a_step_reads_the_rows_of_larger_steps():
  np.testing.assert_array_equal(read(10, 12, rows_per_step=1).ravel(), read(10, 3).ravel())


def test_tokens_of_confidence_are_in_no_held_out_loss_and_in_no_loss_of_training(tmp_path):
  lines = [
    {
      "pieces": [
        {"role": "prompt", "text": f"{k}+1?"},
        {"role": "text", "text": f"{k}+1\n"},
        {"role": "flag", "text": "<|sure_2|>"},
        {"role": "text", "text": f"{k + 1}\n"},
        {"role": "flag", "text": "<|sure_0|>"},
      ]
    }
    for k in range(40)
  ]
  some = config(
    data__path=write_lines(tmp_path / "sure.jsonl", lines),
    data__num_heldout=15,
    tokenizer__confidence=(0.1, 1.0),
    tokenizer__path=str(tmp_path),
    mistakes__source="recorded",
  )
  vocabulary.build_tokenizer([*"0123456789+?\n"], some.tokenizer).save_pretrained(tmp_path)
  tokenizer = vocabulary.open_tokenizer(some).tokenizer
  ids = vocabulary.find_markers(tokenizer, some.tokenizer).confidence_ids
  data = pipeline.load_data(some, tokenizer)
  sure_BT = np.isin(data.heldout.token_BT, ids)
  assert sure_BT.sum() == 30
  assert (data.heldout.role_BT[sure_BT] == NO_ROLE).all()
  assert (data.heldout.role_BT[~sure_BT & (data.heldout.segment_BT > 0)] != NO_ROLE).all()
  sure_BT = np.isin(data.train.token_BT, ids)
  assert sure_BT.sum() == 50
  assert not data.train.weight_BT[sure_BT].any()

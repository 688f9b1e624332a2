"""Batches have few sizes, and as many rows as the memory holds."""

import dataclasses

import numpy as np
from samplerkit import CONFIG

from insec_jax.generation.batching import batches, rows_that_fit


def test_batches_have_few_sizes():
  def sizes(num, batch_size):
    return [len(batch.start_B) for batch in batches([np.array([2, 3, 4])] * num, batch_size)]

  assert sizes(520, 250) == [250, 250, 64]
  assert sizes(65, 250) == [250]
  assert sizes(300, 1000) == [1000]
  assert sizes(200, 1000) == [256]
  assert sizes(1, 250) == [64]
  assert sizes(9, 8) == [8, 8]


def test_rows_are_fewer_the_longer_they_are_and_at_least_one():
  assert rows_that_fit(CONFIG, slots=64, compute="float32") == 256
  large = dataclasses.replace(CONFIG, num_layers=32, num_heads=32, num_kv_heads=8, head_width=128)
  rows = [rows_that_fit(large, slots=slots, compute="bfloat16") for slots in (256, 1024, 4096, 131_072)]
  assert rows == sorted(rows, reverse=True)
  assert rows[0] > rows[2] >= rows[3] == 1
  assert all(row & (row - 1) == 0 for row in rows)

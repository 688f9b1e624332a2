"""Batches have few sizes, and as many rows as the memory holds; the queue fills each device's own rows."""

import dataclasses

import jax
import numpy as np
import pytest
from samplerkit import CONFIG

from insec_jax.config import MeshConfig
from insec_jax.generation.batching import Queue, rows_that_fit, size_for, texts_in_batches
from insec_jax.generation.decoding import NO_PROMPT
from insec_jax.generation.placement import one_device
from insec_jax.model import sharding


def mesh_of(data):
  return sharding.make_mesh(MeshConfig(data=data, fsdp=1, tensor=1), jax.devices()[:data])


def prompts_of(*lengths):
  return [np.full(length, 2, np.int32) for length in lengths]


def test_batches_have_few_sizes():
  sizes = {(num, most): size_for(min(num, most), most, one_device()) for num, most in SIZES}
  assert sizes == SIZES


SIZES = {(520, 250): 250, (65, 250): 250, (300, 1000): 1000, (200, 1000): 256, (1, 250): 64, (9, 8): 8}


def test_a_batch_has_as_many_rows_on_every_device():
  assert [size_for(num, 250, mesh_of(8)) for num in (1, 64, 65)] == [64, 64, 256]
  assert size_for(1, 3, mesh_of(8)) == 8


def test_texts_come_once_each_and_the_shortest_first():
  batches = list(texts_in_batches(prompts_of(40, 3, 100, 5), 2, one_device()))
  assert [batch.index_R.tolist() for batch in batches] == [[1, 3], [0, NO_PROMPT], [2, NO_PROMPT]]
  assert [batch.token_RP.shape for batch in batches] == [(2, 32), (2, 64), (2, 128)]
  assert [batch.start_R.tolist() for batch in batches] == [[29, 27], [24, 63], [28, 127]]


def test_a_pass_reads_fewer_prompts_the_longer_they_are(monkeypatch):
  monkeypatch.setattr("insec_jax.generation.batching.PASS_TOKENS", 128)
  batches = texts_in_batches(prompts_of(*[3] * 8, *[60] * 8), 64, one_device())
  assert [batch.token_RP.shape for batch in batches] == [(4, 32)] * 2 + [(2, 64)] * 4


def test_prompts_are_read_into_free_rows_of_their_device_until_none_waits():
  queue = Queue(prompts_of(*[4] * 20), batch_size=16, mesh=mesh_of(2))
  assert queue.rows == queue.num_of_pass == 16
  batch, row_R = queue.take()
  assert batch.index_R.tolist() == list(range(16))
  assert row_R.tolist() == 2 * list(range(8))
  assert queue.num_of_pass == 2  # one for each device
  assert not queue.free_B.any()
  assert len(queue) == 4
  queue.free_B[[1, 2]] = True  # two rows of the first device
  batch, row_R = queue.take()
  assert batch.index_R.tolist() == [16, NO_PROMPT]
  assert row_R.tolist() == [1, 8]


def test_rows_leave_a_batch_only_when_no_device_holds_too_many():
  queue = Queue(prompts_of(*[4] * 8), batch_size=8, mesh=mesh_of(2))
  while queue:
    queue.take()
  queue.free_B[:] = [True, False, False, True, True, True, True, True]
  assert queue.keep(2) is None
  assert queue.keep(4).tolist() == [1, 2, 0, 1]
  assert queue.free_B.tolist() == [False, False, True, True]


@pytest.mark.parametrize("tensor", [1, 4])
def test_rows_that_fit_count_the_heads_and_the_rows_of_each_device(tensor):
  large = dataclasses.replace(CONFIG, num_layers=32, num_heads=32, num_kv_heads=8, head_width=128)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=tensor), jax.devices()[: 2 * tensor])
  assert rows_that_fit(large, slots=1024, compute="bfloat16", mesh=mesh) == 2 * tensor * 4


def test_rows_are_fewer_the_longer_they_are_and_at_least_one():
  assert rows_that_fit(CONFIG, slots=64, compute="float32", mesh=one_device()) == 256
  large = dataclasses.replace(CONFIG, num_layers=32, num_heads=32, num_kv_heads=8, head_width=128)
  rows = [
    rows_that_fit(large, slots=slots, compute="bfloat16", mesh=one_device()) for slots in (256, 1024, 4096, 131_072)
  ]
  assert rows == sorted(rows, reverse=True)
  assert rows[0] > rows[2] >= rows[3] == 1
  assert all(row & (row - 1) == 0 for row in rows)

"""What export needs of the host."""

import dataclasses
import json
import pathlib

import pytest

from insec_jax.config_types import MATRICES
from insec_jax.model.hf_config import config_from_json
from insec_jax.model.lora import Lora
from insec_jax.sizing.exporting import as_json, details, estimate_export

CONFIGS = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "llama_configs.json").read_text())


@pytest.mark.parametrize(("written", "size"), [(None, 4), ("bfloat16", 2)])
def test_export_holds_three_of_the_largest_tensor_and_writes_every_parameter(written, size):
  published = CONFIGS["Llama-3.1-8B"]
  found = estimate_export(config_from_json(published["config"], "8B"), stored="float32", written=written, part=None)
  assert found.largest == "model.embed_tokens.weight"
  assert found.host_bytes == 3 * 128_256 * 4_096 * 4
  assert (found.read_bytes, found.written_bytes) == (4 * published["parameters"], size * published["parameters"])
  assert as_json(found)["host_bytes"] == found.host_bytes
  assert "at most 3 x the largest tensor, 5.87 GiB" in details(found)


def test_export_of_lora_reads_base_and_adapters_and_holds_the_adapters_whole():
  published = CONFIGS["Llama-3.1-8B"]
  lora = Lora(rank=16, scale=2.0, matrices=MATRICES, markers=(128_254, 128_255))
  found = estimate_export(config_from_json(published["config"], "8B"), stored="bfloat16", written=None, part=lora)
  attention, mlp = 4_096 + 4_096 + 2 * (4_096 + 1_024) + 4_096 + 4_096, 3 * (4_096 + 14_336)
  adapters = 4 * (32 * 16 * (attention + mlp) + 2 * 2 * 4_096)
  assert found.adapter_bytes == adapters
  assert (found.read_bytes, found.written_bytes) == (
    2 * published["parameters"] + adapters,
    2 * published["parameters"],
  )
  assert found.host_bytes == adapters + 3 * 128_256 * 4_096 * 2  # the embedding; a matrix merged in float32 is smaller
  assert "of the base and the checkpoint" in details(found)


def test_a_matrix_that_is_merged_counts_in_float32():
  small_vocabulary = dataclasses.replace(config_from_json(CONFIGS["Llama-3.1-8B"]["config"], "8B"), vocab_size=20_000)
  lora = Lora(rank=1, scale=2.0, matrices=("down",), markers=())
  found = estimate_export(small_vocabulary, stored="bfloat16", written=None, part=lora)
  assert found.largest == "model.layers.0.mlp.down_proj.weight"
  assert found.largest_bytes == 4 * 4_096 * 14_336

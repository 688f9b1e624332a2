"""What export needs of the host."""

import json
import pathlib

import pytest

from insec_jax.model.hf_config import config_from_json
from insec_jax.sizing.exporting import as_json, details, estimate_export

CONFIGS = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "llama_configs.json").read_text())


@pytest.mark.parametrize(("written", "size"), [(None, 4), ("bfloat16", 2)])
def test_export_holds_three_of_the_largest_tensor_and_writes_every_parameter(written, size):
  published = CONFIGS["Llama-3.1-8B"]
  found = estimate_export(config_from_json(published["config"], "8B"), stored="float32", written=written)
  assert found.largest == "model.embed_tokens.weight"
  assert found.host_bytes == 3 * 128_256 * 4_096 * 4
  assert (found.read_bytes, found.written_bytes) == (4 * published["parameters"], size * published["parameters"])
  assert as_json(found)["host_bytes"] == found.host_bytes
  assert "at most 3 x the largest tensor, 5.87 GiB" in details(found)

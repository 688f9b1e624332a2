"""Adapters as PEFT stores them: with nn.Linear's shapes, their product is what is merged here."""

import json

import jax
import numpy as np
import pytest
from gradients import make_params, model_config
from lorakit import LORA, make_trained
from safetensors.numpy import load_file

from insec_jax.config import LoraConfig
from insec_jax.model import adapters, hf, peft

SETTINGS = LoraConfig(rank=3, alpha=2.1)


def written(folder, tied, *, rows=True):
  """The fields and tensors of a folder with the adapters of lorakit."""
  peft.write(folder, make_trained(tied), LORA, SETTINGS, model_config(tied), base="org/base", rows=rows)
  return json.loads((folder / peft.CONFIG).read_text()), load_file(folder / peft.WEIGHTS)


def test_the_product_of_the_factors_in_a_peft_folder_is_what_is_merged_here(tmp_path):
  config = model_config(False)
  fields, tensors = written(tmp_path, False)
  scale = fields["lora_alpha"] / fields["r"]
  assert (scale, fields["use_rslora"]) == (pytest.approx(LORA.scale), False)
  frozen, trained = jax.tree.map(np.asarray, (make_params(False), make_trained(False)))
  merged = adapters.merged(frozen, trained, LORA, np.float32)
  names = set()
  for slot in hf.slots(config):
    module, layer = slot.name.removesuffix(".weight"), ... if slot.layer is None else slot.layer
    part, kind = slot.path.split("/")[-2:] if "/" in slot.path else (None, None)
    if kind not in LORA.matrices:
      continue
    base, whole = frozen["layers"][part][kind], merged["layers"][part][kind]
    change = hf.to_hf(slot.path, whole[layer] - base[layer], config)
    a, b = (f"base_model.model.{module}.lora_{letter}.weight" for letter in "AB")
    assert np.abs(scale * tensors[b] @ tensors[a] - change).max() < 1e-5, slot.name
    assert module.split(".")[-1] in fields["target_modules"]
    names |= {a, b}
  rows = {name for name in tensors if "trainable_tokens_delta" in name}
  assert names | rows == set(tensors)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_of_markers_are_tokens_of_peft_one_table_where_tied(tmp_path, tied):
  fields, tensors = written(tmp_path, tied)
  trained = make_trained(tied)["rows"]
  modules = {"embed": "model.embed_tokens"} | ({} if tied else {"head": "lm_head"})
  expected = {module.split(".")[-1]: list(LORA.markers) for module in modules.values()}
  assert fields["trainable_token_indices"] == expected
  for table, module in modules.items():
    name = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
    assert np.array_equal(tensors[name], trained[table])


def test_a_plain_folder_for_servers_has_no_rows_of_tokens(tmp_path):
  fields, tensors = written(tmp_path, False, rows=False)
  assert "trainable_token_indices" not in fields
  assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B"}

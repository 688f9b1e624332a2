"""A workdir and the folder exported from it open as the same model; anything else is refused."""

import json

import datakit
import jax
import numpy as np
import pytest
from modelkit import STATE_MODEL, abstract, make_state

from insec_jax.command import InputError
from insec_jax.data import tokens
from insec_jax.generation import loading
from insec_jax.method.transcript import Markers
from insec_jax.model import hf_writing
from insec_jax.model.hf_config import config_to_json
from insec_jax.training import layout
from insec_jax.training.checkpoint import Saver


@pytest.fixture
def tokenizer():
  return datakit.bpe_tokenizer()


@pytest.mark.parametrize(
  "task",
  [
    {},
    {
      "task__name": "graph",
      "task__min_size": 1,
      "task__max_size": 3,
      "task__modulus": 10,
      "data__num_records": 10,
      "tokenizer__confidence": (0.1,),
      "tokenizer__confidence_first": (0.5, 1.0),
    },
  ],
)
def test_a_workdir_and_its_hf_folder_open_as_the_same_model(tmp_path, tokenizer, task):
  config = datakit.config(tokenizer__flag="<|spare_0|>", tokenizer__fix="<|spare_1|>", **task)
  tokenizer = tokens.add_markers(tokenizer, config.tokenizer).tokenizer
  workdir, folder = tmp_path / "run", tmp_path / "hf"
  workdir.mkdir()
  (workdir / layout.CONFIG).write_text(config.to_json())
  (workdir / layout.MODEL).write_text(json.dumps(config_to_json(STATE_MODEL)))
  tokenizer.save_pretrained(workdir / layout.TOKENIZER)
  state = make_state(abstract())
  with Saver(workdir, keep=1) as saver:
    saver.save(7, state, config=config, facts={}, totals=[])
  opened = loading.load_model(str(workdir))
  assert opened.markers == Markers("<|spare_0|>", "<|spare_1|>")
  assert tokenizer.convert_ids_to_tokens([opened.flag_id, opened.fix_id]) == ["<|spare_0|>", "<|spare_1|>"]
  assert (opened.unit, opened.template) == ("line", "plain")
  assert (opened.confidence, opened.confidence_first) == (((0.1,), (0.5, 1.0)) if task else ((), ()))
  jax.tree.map(np.testing.assert_array_equal, opened.params, state.params)

  hf_writing.save(folder, opened.params, opened.config, tokenizer=tokenizer)
  plain = loading.load_model(str(folder))
  assert (plain.markers, plain.flag_id, plain.unit) == (None, None, None)  # no run of ours wrote that folder
  jax.tree.map(np.testing.assert_array_equal, plain.params, state.params)
  (folder / loading.MARKERS).write_text(json.dumps(loading.marked_as(config, 7)))
  again = loading.load_model(str(folder))
  assert again[3:] == opened[3:]
  assert (plain.step, opened.step) == (None, 7)


def test_what_is_no_model_is_refused(tmp_path):
  with pytest.raises(InputError, match="no folder"):
    loading.load_model(str(tmp_path / "nowhere"))
  with pytest.raises(InputError, match="holds neither"):
    loading.load_model(str(tmp_path))
  (tmp_path / "config.json").mkdir()
  with pytest.raises(InputError, match=r"config\.json is no file that can be read"):
    loading.load_model(str(tmp_path))
  (tmp_path / layout.MODEL).write_text("{}")
  with pytest.raises(InputError, match="without a checkpoint"):
    loading.load_model(str(tmp_path))


@pytest.mark.parametrize("change", [{"flag": 1}, {"special": "no"}, {"unit": None}, {"step": "7"}, {"confidence": 0.1}])
def test_markers_of_a_folder_that_no_export_writes_are_refused(tmp_path, change):
  marks = {**loading.marked_as(datakit.config(), 7), **change}
  (tmp_path / loading.MARKERS).write_text(json.dumps(marks))
  with pytest.raises(InputError, match=f"{next(iter(change))} is .*export the model again"):
    loading.read_markers(tmp_path)

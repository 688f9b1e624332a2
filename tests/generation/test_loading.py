"""A workdir and its exported folder open as the same model, with the config's markers; anything else is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import datakit
import jax
import numpy as np
import optax
import pytest
from markedkit import NEW, SPARE, SURE, trained, untuned
from modelkit import ROOT, STATE_MODEL, abstract, make_state

from insec_jax.command import InputError
from insec_jax.data import vocabulary
from insec_jax.generation import loading, placement
from insec_jax.generation.loading import compute_dtype, with_markers
from insec_jax.method.transcript import Markers
from insec_jax.model import hf_writing, llama, markings
from insec_jax.model.hf_config import config_to_json
from insec_jax.training import layout, stored
from insec_jax.training.checkpoint import Saver

DTYPES = ("float32", "bfloat16")


@pytest.fixture
def tokenizer():
  return datakit.bpe_tokenizer()


def save_run(workdir, tokenizer, config=None, model=STATE_MODEL):
  """The state of a workdir with a checkpoint of step 7; the tokenizer has the markers of the config."""
  config = config or datakit.config(tokenizer__flag="<|spare_0|>", tokenizer__fix="<|spare_1|>")
  workdir.mkdir(exist_ok=True)
  (workdir / layout.CONFIG).write_text(config.to_json())
  (workdir / layout.MODEL).write_text(json.dumps(config_to_json(model)))
  (workdir / "environment.json").write_text(json.dumps({"commit": "", "packages": {"jax": ""}}))
  tokenizer.save_pretrained(workdir / layout.TOKENIZER)
  state = make_state(abstract(model=model, tx=optax.scale_by_schedule(float)))
  with Saver(workdir, keep=1) as saver:
    saver.save(7, state, config=config, facts={}, totals=[])
    saver.wait()
  return state


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
      "mistakes__rewind": True,
    },
  ],
)
def test_a_workdir_and_its_hf_folder_open_as_the_same_model(tmp_path, tokenizer, task):
  config = datakit.config(tokenizer__flag="<|spare_0|>", tokenizer__fix="<|spare_1|>", **task)
  tokenizer = vocabulary.add_markers(tokenizer, config.tokenizer).tokenizer
  workdir, folder = tmp_path / "run", tmp_path / "hf"
  state = save_run(workdir, tokenizer, config)
  opened = loading.load_model(str(workdir))
  assert opened.markers == Markers("<|spare_0|>", "<|spare_1|>")
  assert tokenizer.convert_ids_to_tokens([opened.flag_id, opened.fix_id]) == ["<|spare_0|>", "<|spare_1|>"]
  assert (opened.unit, opened.template) == ("line", "plain")
  assert (opened.confidence, opened.confidence_first) == (((0.1,), (0.5, 1.0)) if task else ((), ()))
  assert opened.rewind == bool(task)
  assert (loading.kinds_of(opened) is not None) == bool(task)
  unstacked = llama.unstack(state.params, STATE_MODEL)
  jax.tree.map(np.testing.assert_array_equal, opened.params, unstacked)

  hf_writing.save(folder, state.params, opened.config, tokenizer=tokenizer)
  plain = loading.load_model(str(folder))
  assert (plain.markers, plain.flag_id, plain.unit) == (None, None, None)  # no run of ours wrote that folder
  jax.tree.map(np.testing.assert_array_equal, plain.params, unstacked)
  (folder / markings.MARKERS).write_text(json.dumps(markings.marked_as(config, 7)))
  again = loading.load_model(str(folder))
  assert again[3:] == opened[3:]
  assert (plain.step, opened.step) == (None, 7)


@pytest.mark.parametrize(("mesh", "parts"), [("", 1), ("tensor:2", 2), ("data:2,tensor:2", 2), ("data:8", 1)])
def test_each_weight_goes_to_its_parts_of_the_mesh_in_the_dtype_to_compute_in(tmp_path, tokenizer, mesh, parts):
  state = save_run(tmp_path, tokenizer)
  opened = loading.load_model(str(tmp_path), mesh=mesh, compute="bfloat16")
  assert dict(opened.mesh.shape)["tensor"] == parts
  expected = llama.unstack(jax.tree.map(lambda weight: weight.astype("bfloat16"), state.params), STATE_MODEL)
  jax.tree.map(np.testing.assert_array_equal, opened.params, expected)
  for part in ("gate", "down"):
    weight = opened.params["layers"][1]["mlp"][part]
    assert {shard.data.size * parts for shard in weight.addressable_shards} == {weight.size}


# Prints the most MiB that the process held: of a program that opens a workdir, or exports it in a dtype.
PEAK = """
import re, sys
import jax
from insec_jax import command, export
from insec_jax.generation import loading
jax.config.update("jax_num_cpu_devices", 1)
workdir, how = sys.argv[1:3]
if how == "open":
  loading.load_model(workdir, compute="bfloat16")
else:
  sys.argv = ["export", f"--model={workdir}", f"--output={workdir}/hf_{how}", f"--dtype={how}"]
  try:
    command.run(export.main)
  except SystemExit as end:
    assert not end.code, end.code
with open("/proc/self/status") as file:  # ru_maxrss would be that of the parent, where that is more
  print(int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1]) // 1024)
"""


def peak_mib(workdir, how):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", PEAK, str(workdir), how], env=environment, capture_output=True, text=True, check=True
  )
  return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_opening_and_exporting_hold_little_beside_the_weights_to_compute_in(tmp_path, tokenizer):
  model = dataclasses.replace(STATE_MODEL, vocab_size=1 << 17, width=256, num_layers=1)  # of 128 MiB in float32
  save_run(tmp_path / "small", tokenizer)
  save_run(tmp_path / "large", tokenizer, model=model)
  more = {how: peak_mib(tmp_path / "large", how) - peak_mib(tmp_path / "small", how) for how in ("open", *DTYPES)}
  # A weight of 64 MiB on the host and on the device, and what is read at once: float32, encoded and decoded.
  assert more["open"] < 64 + 64 + 64, more
  assert more["bfloat16"] < 64 + 64, more  # no float32 copy
  assert more["float32"] < 128 + 64, more


def test_a_weight_that_is_damaged_while_it_is_laid_out_is_refused(tmp_path, tokenizer, monkeypatch):
  save_run(tmp_path, tokenizer)
  monkeypatch.setattr(stored, "bit_sum", lambda *_: 0)
  with pytest.raises(InputError, match=r"checkpoint 7 of .* is damaged .params/.* is not what was saved"):
    loading.load_model(str(tmp_path))


@pytest.mark.parametrize(
  ("mesh", "message"),
  [
    ("data:3,tensor:3", "needs 9 devices, and this host has 8"),
    ("fsdp:2", "must be data:N, tensor:N or data:N,tensor:N"),
    ("data:2,data:2", "must be data:N"),
    ("sequence:2", "fsdp and sequence are axes of training"),
    ("tensor:8", "the mesh does not divide the model: kv_heads=2 over tensor=8"),
  ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(tmp_path, tokenizer, mesh, message):
  save_run(tmp_path, tokenizer)
  with pytest.raises(InputError, match=message):
    loading.load_model(str(tmp_path), mesh=mesh)


def test_the_least_tensor_that_holds_the_weights_is_chosen():
  size = placement.num_bytes(STATE_MODEL, "float32")

  def chosen(memory, num=4):
    return placement._least_tensor(STATE_MODEL, "float32", num, memory)

  assert [chosen(factor * size) for factor in (2, 0.8)] == [1, 2]
  with pytest.raises(InputError, match=r"over tensor=2 .the most that divides the model on this host's 4 devices"):
    chosen(0.5 * size)


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


@pytest.mark.parametrize(
  "change", [{"flag": 1}, {"special": "no"}, {"unit": None}, {"step": "7"}, {"confidence": 0.1}, {"rewind": 1}]
)
def test_markers_of_a_folder_that_no_export_writes_are_refused(tmp_path, change):
  marks = {**markings.marked_as(datakit.config(), 7), **change}
  (tmp_path / markings.MARKERS).write_text(json.dumps(marks))
  with pytest.raises(InputError, match=f"{next(iter(change))} is .*export the model again"):
    markings.read_markers(tmp_path)


def test_markers_that_rewind_and_are_plain_words_are_refused(tmp_path):
  marks = {**markings.marked_as(datakit.config(), 7), "rewind": True, "special": False}
  (tmp_path / markings.MARKERS).write_text(json.dumps(marks))
  with pytest.raises(InputError, match="rewind is True without special markers"):
    markings.read_markers(tmp_path)


def test_an_untuned_model_gets_markers_that_begin_as_the_mean_of_its_rows():
  before, after = untuned(), trained(NEW)
  assert after.config.vocab_size == 384 > len(after.tokenizer) == after.fix_id + 1 == after.flag_id + 2
  assert (after.markers, after.unit, after.template) == (Markers("<err>", "<fix>"), "line", "plain")
  for name in ("embed", "head"):
    np.testing.assert_array_equal(after.params[name][: len(before.tokenizer)], before.params[name])
    np.testing.assert_allclose(after.params[name][after.flag_id], before.params[name].mean(0), atol=1e-6)


def test_an_untuned_model_reads_with_the_tokenizer_that_the_config_names(tmp_path):
  other = datakit.bpe_tokenizer()
  other.add_tokens(["a token more"])
  other.save_pretrained(tmp_path)
  after = trained(datakit.config(tokenizer__path=str(tmp_path)))
  assert after.flag_id == untuned().config.vocab_size + 1 == trained(NEW).flag_id + 1


def test_markers_that_the_tokenizer_already_has_resize_nothing():
  after = trained(SPARE)
  assert after.params["embed"].shape == untuned().params["embed"].shape
  assert after.tokenizer.convert_ids_to_tokens([after.flag_id, after.fix_id]) == ["<|spare_0|>", "<|spare_1|>"]


def test_markers_of_plain_words_are_no_tokens():
  words = datakit.config(tokenizer__special=False)
  assert (trained(words).flag_id, trained(words).fix_id) == (None, None)
  assert trained(words).config == untuned().config
  assert trained(words).markers == Markers("<err>", "<fix>")


def test_a_model_trained_with_the_same_settings_stays_as_it_is():
  assert with_markers(trained(NEW), NEW, "here").params["embed"].shape == (384, 64)


@pytest.mark.parametrize(
  ("setting", "value"),
  [
    ("tokenizer__flag", "<oops>"),
    ("tokenizer__fix", "<ok>"),
    ("tokenizer__special", False),
    ("mistakes__unit", "sentence"),
    ("data__template", "chat"),
  ],
)
def test_a_model_trained_with_another_setting_is_refused_by_its_name(setting, value):
  name = setting.replace("__", ".")
  values = {"tokenizer__flag": "<err>", "tokenizer__fix": "<fix>", setting: value}
  with pytest.raises(InputError, match=f"runs/a was trained with {name}=.*, and the config says {value!r}"):
    with_markers(trained(NEW), datakit.config(**values), "runs/a")


@pytest.mark.parametrize(
  ("platform", "stored", "needed"),
  [
    ("cpu", "bfloat16", "float32"),
    ("cpu", "float32", "float32"),
    ("gpu", "float32", "float32"),
    ("tpu", "bfloat16", "bfloat16"),
    ("gpu", "float16", "bfloat16"),
  ],
)
def test_accelerators_compute_16_bit_weights_in_bfloat16_and_all_else_is_float32(monkeypatch, platform, stored, needed):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert compute_dtype(jax.numpy.dtype(stored)) == needed


def test_a_model_of_other_edges_of_confidence_is_refused():
  opened = trained(NEW)._replace(confidence=(1.0,))
  with pytest.raises(InputError, match=r"trained with tokenizer.confidence=\(1.0,\), and the config says \(0.5, 5.0\)"):
    with_markers(opened, SURE, "here")
  other = datakit.config(
    tokenizer__flag="<err>",
    tokenizer__fix="<fix>",
    tokenizer__confidence=(0.5, 5.0),
    tokenizer__confidence_first=(1.0,),
  )
  with pytest.raises(InputError, match=r"trained with tokenizer.confidence_first=\(\), and the config says \(1.0,\)"):
    with_markers(trained(NEW)._replace(confidence=(0.5, 5.0)), other, "here")

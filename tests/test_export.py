"""The program export: folders that others read."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import datakit
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from modelkit import run
from tokenizers import AddedToken
from transformers import AutoTokenizer

from insec_jax import export
from insec_jax.generation.loading import load_model
from insec_jax.model import build, hf, hf_config, hf_writing, llama, markings
from insec_jax.training import layout, optimizer, step
from insec_jax.training.checkpoint import Saver

ROOT = pathlib.Path(__file__).parents[1]
LLAMA_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>")


@pytest.fixture(scope="module")
def tokenizer():
  """A tokenizer with spare markers and, like Llama 3.1's, several ends and a token to pad with, but no pad token."""
  made = datakit.bpe_tokenizer(datakit.IM_TEMPLATE)
  made.add_tokens([AddedToken(name, special=True, normalized=False) for name in LLAMA_TOKENS], special_tokens=True)
  made.eos_token = "<|eot_id|>"
  made.pad_token = None
  return made


@pytest.fixture(scope="module")
def model(tokenizer):
  fields = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(tokenizer),
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": tokenizer.bos_token_id,
    "eos_token_id": tokenizer.eos_token_id,
  }
  return hf_config.config_from_json(fields, "here")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tokenizer, model):
  """A workdir as train leaves it, with random weights."""
  folder = tmp_path_factory.mktemp("run")
  config = datakit.config(tokenizer__flag="<|spare_0|>", tokenizer__fix="<|spare_1|>", mistakes__rewind=True)
  params = build.init(model, jax.random.key(0), "float32")
  state = step.new_state(params, optimizer.make(config.optimizer, 7))
  (folder / layout.CONFIG).write_text(config.to_json())
  (folder / layout.MODEL).write_text(json.dumps(hf_config.config_to_json(model)))
  (folder / "environment.json").write_text(json.dumps({"commit": "abc123", "packages": {"jax": jax.__version__}}))
  tokenizer.save_pretrained(folder / layout.TOKENIZER)
  with Saver(folder, keep=1) as saver:
    saver.save(7, state, config=config, facts={}, totals=[])
  return folder


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
  output = tmp_path_factory.mktemp("out") / "hf"
  done = subprocess.run(
    [sys.executable, "-m", "insec_jax.export", f"--model={workdir}", f"--output={output}"],
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  (output.parent / "said.txt").write_text(done.stdout)
  return output


def test_card_and_output_say_that_a_plain_server_does_not_rewind(exported):
  sentence = "a plain server or transformers will not rewind, and what follows a correction then reads its mistake"
  assert sentence in (exported / export.CARD).read_text()
  assert f"mistakes.rewind: {sentence}" in (exported.parent / "said.txt").read_text()
  assert load_model(str(exported)).rewind
  assert "rewind" not in export.card_text(datakit.config(), {"commit": "", "packages": {"jax": ""}}, 7)


@pytest.fixture(scope="module")
def others(workdir, model, tokenizer, tmp_path_factory):
  """(folder, exit code and output of each export there): of an HF folder, in another dtype, over something."""
  folder = tmp_path_factory.mktemp("others")
  generation = {"eos_token_id": [1, 2], "temperature": 0.6}
  hf_writing.save(
    folder / "source",
    build.init(model, jax.random.key(1), "bfloat16"),
    model,
    tokenizer=tokenizer,
    generation=generation,
    card="# mine\n",
    max_shard_bytes=20_000,
  )
  (folder / "full").mkdir()
  (folder / "full" / "precious").write_text("mine")
  lines = {
    "again": ["--model=source", "--output=again"],
    "third": ["--model=again", "--output=third"],
    "bfloat16": [f"--model={workdir}", "--output=bfloat16", "--dtype=bfloat16"],
    "full": [f"--model={workdir}", "--output=full"],
  }
  return folder, dict(zip(lines, run("export", *lines.values(), folder=folder), strict=True))


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


def test_a_workdir_becomes_a_folder_with_weights_config_tokenizer_and_card(workdir, exported, tokenizer):
  opened, again = load_model(str(workdir)), load_model(str(exported))
  jax.tree.map(np.testing.assert_array_equal, again.params, opened.params)
  assert again[4:-1] == opened[4:-1]  # dtype, markers, their ids, unit, template
  assert json.loads((exported / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
  loaded = AutoTokenizer.from_pretrained(exported)
  assert loaded("7 + 5<|spare_0|>").input_ids == tokenizer("7 + 5<|spare_0|>").input_ids
  card = (exported / "README.md").read_text()
  assert "<|spare_0|>" in card
  assert "abc123" in card
  assert str(workdir) not in card


def test_every_end_of_a_llama_3_tokenizer_and_its_pad_are_in_generation_config(exported, tokenizer):
  generation = json.loads((exported / "generation_config.json").read_text())
  text, message, turn, pad = tokenizer.convert_tokens_to_ids(LLAMA_TOKENS)
  assert set(generation["eos_token_id"]) == {text, message, turn, tokenizer.convert_tokens_to_ids("<|eot|>")}
  assert generation["pad_token_id"] == pad
  assert generation["bos_token_id"] == tokenizer.bos_token_id


def test_a_folder_exported_again_keeps_every_byte(others):
  folder, found = others
  code, _, err = found["again"]
  assert code == 0, err
  source, output = folder / "source", folder / "again"
  assert len(list(source.glob("*.safetensors"))) > 1
  before = {
    name: (array.dtype, array.tobytes())
    for file in source.glob("*.safetensors")
    for name, array in safetensors.numpy.load_file(file).items()
  }
  assert {name: (array.dtype, array.tobytes()) for name, array in tensors_of(output).items()} == before
  for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
    assert (output / name).read_bytes() == (source / name).read_bytes(), name
  assert not (output / markings.MARKERS).exists()
  third = folder / "third"
  assert {path.name: path.read_bytes() for path in third.iterdir()} == {
    path.name: path.read_bytes() for path in output.iterdir()
  }


def test_the_tokens_that_end_a_text_are_all_that_changes_in_a_folders_configs(others, tokenizer):
  source, output = (others[0] / name for name in ("source", "again"))
  text, message, turn, _ = tokenizer.convert_tokens_to_ids(LLAMA_TOKENS)
  for name in ("config.json", "generation_config.json"):
    before, after = (json.loads((folder / name).read_text()) for folder in (source, output))
    assert set(after["eos_token_id"]) == {1, 2, text, message, turn, tokenizer.convert_tokens_to_ids("<|eot|>")}
    assert [(key, value) for key, value in after.items() if key in before and key != "eos_token_id"] == [
      (key, value) for key, value in before.items() if key != "eos_token_id"
    ]
    assert after.keys() - before.keys() <= {"bos_token_id"}


def test_the_other_fields_of_a_generation_config_come_along(workdir, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(workdir, folder)
  (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 1, "top_p": 0.9}')
  opened = load_model(str(workdir))
  fields = export.generation_of(folder, export.with_ids(opened.config, opened.tokenizer))
  assert (fields["temperature"], fields["top_p"]) == (0.6, 0.9)
  assert len(fields["eos_token_id"]) == 4


def test_another_dtype_is_written_when_asked_for(exported, others):
  folder, found = others
  code, _, err = found["bfloat16"]
  assert code == 0, err
  got, want = tensors_of(folder / "bfloat16"), tensors_of(exported)
  for name, array in want.items():
    np.testing.assert_array_equal(got[name], array.astype(ml_dtypes.bfloat16))
  assert json.loads((folder / "bfloat16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_nothing_is_written_over(others):
  folder, found = others
  code, out, err = found["full"]
  assert code == 2
  said = out + err
  assert said.startswith("error: ")
  assert len(said.splitlines()) == 1
  assert [path.name for path in (folder / "full").iterdir()] == ["precious"]


@pytest.mark.parity
def test_transformers_gives_the_logits_that_we_give(exported):
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM

  opened = load_model(str(exported))
  params = hf.load(exported, opened.config)
  token_BT = np.random.default_rng(0).integers(0, opened.config.vocab_size, (2, 40)).astype(np.int32)
  position_BT = np.broadcast_to(np.arange(40, dtype=np.int32), (2, 40))
  stream_BTD = llama.Llama(opened.config, "float32", "none").apply(
    {"params": params}, token_BT, position_BT, np.ones((2, 40), np.int32)
  )
  ours_BTV = llama.logits(params, opened.config, stream_BTD)
  theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
  with torch.no_grad():
    theirs_BTV = theirs(torch.tensor(token_BT.astype(np.int64))).logits.numpy()
  np.testing.assert_allclose(ours_BTV, theirs_BTV, atol=2e-4)


@pytest.mark.parametrize(
  ("path", "start"),
  [
    ("org/name@v1", "Trained by insec_jax from `org/name` at commit `c0ffee`:"),
    ("a/hf", "Trained by insec_jax from `hf`:"),
  ],
)
def test_the_card_names_the_model_of_the_hub_and_its_commit(path, start):
  environment = {"commit": "abc", "packages": {"jax": "1"}, "hub": {"org/name@v1": "c0ffee"}}
  config = datakit.config(model__path=path, model__size=None)
  assert start in export.card_text(config, environment, 3)


@pytest.mark.parametrize("form", ["peft", "pair"])
def test_a_format_of_adapters_is_refused_for_a_model_without_adapters(workdir, exported, tmp_path, form):
  words = [[f"--model={model}", f"--output={tmp_path / 'o'}", f"--format={form}"] for model in (workdir, exported)]
  for code, _, said in run("export", *words, folder=tmp_path):
    assert (code, f"error: --format={form} is for" in said) == (2, True), said
  assert not (tmp_path / "o").exists()

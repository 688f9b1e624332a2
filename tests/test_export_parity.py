"""Exports in transformers 5 and 4.57: the same prompt, the same greedy tokens, the same stop as here.

4.57 lies in a folder of its own, .venv/transformers4 or where INSEC_TRANSFORMERS4 says; .ci/run installs it.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import smollm2
from datakit import write_lines
from modelkit import run
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

pytest.importorskip("torch")
pytestmark = pytest.mark.parity
ROOT = pathlib.Path(__file__).parents[1]
FOUR = pathlib.Path(os.environ.get("INSEC_TRANSFORMERS4", pathlib.Path(sys.prefix) / "transformers4"))
SPECIALS = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "spare_0", "spare_1")
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
  "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CONFIG = """
import copy
import datakit
from ml_collections import ConfigDict

def get_config():
  c = ConfigDict(copy.deepcopy(datakit.VALUES))
  c.model = dict(c.model, path="stop", size=None)
  c.tokenizer.flag, c.tokenizer.fix = "<|new_flag|>", "<|spare_1|>"
  c.data.template, c.data.row_length = "chat", 64
  c.loss.end = 1.0
  c.optimizer.learning_rate, c.optimizer.b2 = 1e-2, 0.99
  c.train.steps = c.train.log_every = c.train.eval_every = c.train.checkpoint_every = 60
  return c
"""
GENERATES = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, chat, prompts, num = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
found = []
for prompt in prompts:
  messages = [{"role": "user", "content": prompt}]
  begin = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
  token_1T = tokenizer(begin if chat else prompt, add_special_tokens=not chat, return_tensors="pt").input_ids
  written = model.generate(token_1T, attention_mask=torch.ones_like(token_1T), max_new_tokens=num, do_sample=False)[0]
  ids = written[token_1T.shape[1]:].tolist()
  stopped = ids[-1] in (model.generation_config.eos_token_id if isinstance(model.generation_config.eos_token_id, list)
                        else [model.generation_config.eos_token_id])
  text = tokenizer.decode(ids[:-1] if stopped else ids, clean_up_tokenization_spaces=False)
  found.append([token_1T[0].tolist(), ids, text, stopped])
print(json.dumps([transformers.__version__, found]))
"""


def theirs(version, folder, prompts, num, *, chat):
  """What transformers of this version makes of the prompts."""
  if version == "4" and not FOUR.is_dir():
    pytest.skip(f"needs transformers 4.57 in {FOUR}")
  environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOUR) if version == "4" else ""}
  done = subprocess.run(
    [sys.executable, "-c", GENERATES],
    input=json.dumps([str(folder), chat, prompts, num]),
    capture_output=True,
    text=True,
    env=environment,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  used, found = json.loads(done.stdout.splitlines()[-1])
  assert used.startswith(version)
  return found


def ours(folder, model, prompts, num):
  """What `generate` writes."""
  write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
  ((code, _, said),) = run(
    "generate",
    [f"--model={model}", "--prompts=prompts.jsonl", f"--max_tokens={num}", "--output=written.jsonl"],
    folder=folder,
  )
  assert code == 0, said
  return [json.loads(line) for line in (folder / "written.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A folder with a workdir r and its export e, trained from a model whose end of turn only generation_config names."""
  home = tmp_path_factory.mktemp("trained")
  stop = home / "stop"
  stop.mkdir()
  words = [f"<|{name}|>" for name in SPECIALS]
  vocabulary = {word: number for number, word in enumerate([*words, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
  backend = Tokenizer(models.BPE(vocabulary, []))
  backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
  backend.post_processor = processors.TemplateProcessing(
    single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
  )
  backend.save(str(stop / "tokenizer.json"))
  (stop / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "bos_token": words[0],
        "eos_token": words[1],
        "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
      }
    )
  )
  size = len(vocabulary)
  fields = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": size,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
  }
  (stop / "config.json").write_text(json.dumps(fields))
  (stop / "generation_config.json").write_text(
    json.dumps({"bos_token_id": 0, "eos_token_id": [1, 4], "max_length": 400})
  )
  rng = np.random.default_rng(0)
  shapes = {"model.embed_tokens": (size, 32), "lm_head": (size, 32), "model.norm": (32,)}
  for layer in (0, 1):
    shapes |= {
      f"model.layers.{layer}.{name}": shape
      for name, shape in {
        "input_layernorm": (32,),
        "post_attention_layernorm": (32,),
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
      }.items()
    }
  safetensors.numpy.save_file(
    {
      f"{name}.weight": (rng.standard_normal(shape) * 0.3).astype(np.float32)
      if len(shape) == 2
      else np.ones(shape, np.float32)
      for name, shape in shapes.items()
    },
    stop / "model.safetensors",
    metadata={"format": "pt"},
  )
  answer = {"messages": [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "Five."}]}
  write_lines(home / "records.jsonl", [answer] * 8)
  (home / "config.py").write_text(CONFIG)
  for program, line in (("train", ["--config=config.py", "--workdir=r"]), ("export", ["--model=r", "--output=e"])):
    ((code, _, said),) = run(program, line, folder=home)
    assert code == 0, said
  return home


def test_an_answer_ends_where_the_source_ends_its_turns(trained):
  (written,) = ours(trained, "r", ["What is 2+3?"], 40)
  assert (written["text"], written["finish"], written["tokens"][-1]) == ("Five.", "stop", 4)
  for name in ("config.json", "generation_config.json"):
    assert json.loads((trained / "e" / name).read_text())["eos_token_id"] == [1, 4]


@pytest.mark.parametrize("version", ["5", "4"])
def test_the_export_of_a_workdir_generates_the_same_from_prompt_to_stop(trained, version):
  prompts = ["What is 2+3?", "  Hi", "What?"]
  written = ours(trained, "r", prompts, 40)
  assert written == ours(trained, "e", prompts, 40)
  found = theirs(version, trained / "e", prompts, 40, chat=True)
  assert [(ids, text, "stop" if stopped else "length") for _, ids, text, stopped in found] == [
    (line["tokens"], line["text"], line["finish"]) for line in written
  ]
  assert found[0][1:] == [[*found[0][1][:-1], 4], "Five.", True]


@pytest.mark.parametrize("version", ["5", "4"])
@pytest.mark.skipif(smollm2.missing() != "", reason=smollm2.missing() or "-")
def test_the_export_of_the_135m_model_generates_the_same(version, tmp_path):
  ((code, _, said),) = run("export", [f"--model={smollm2.folder()}", "--output=e"], folder=tmp_path)
  assert code == 0, said
  prompts = ["What is 17 + 25? He adds", "The capital of France is"]
  found = theirs(version, tmp_path / "e", prompts, 24, chat=False)
  written = ours(tmp_path, "e", prompts, 24)
  assert [(ids, text) for _, ids, text, _ in found] == [(line["tokens"], line["text"]) for line in written]

"""What a user can get wrong, program by program: one clear line, exit code 2, and not a byte on disk changed."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from accepted import CONFIG, GOOD
from datakit import write_lines

from insec_jax.config import TokenizerConfig
from insec_jax.data.vocabulary import build_tokenizer
from insec_jax.model import build, hf_config, hf_writing

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
SIZE = dict(
  model_type="llama",
  hidden_act="silu",
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  vocab_size=32,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  rope_theta=10_000.0,
  initializer_range=0.1,
  tie_word_embeddings=False,
)
# Runs each case in a fork of a process that has imported what is slow; no device is touched before the fork.
SERVER = """
import contextlib, json, os, runpy, sys
import flax.linen, grain, jax, optax, orbax.checkpoint, transformers
from insec_jax.training import checkpoint
for program, arguments, out in json.load(sys.stdin):
  if not (child := os.fork()):
    file = os.open(out, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [program, *arguments]
    code = 0
    try:
      runpy.run_module("insec_jax." + program, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
      code = stop.code
    except BaseException as error:
      print(repr(error))
      code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
USER = {"data": ["--config=config.py"], "run": ["--config=config.py", "--workdir=new"]}


def data(name):
  return ("preview", ["--config=config.py", f"--config.data.path={name}.jsonl"])


def model(name):
  return ("train", ["--config=config.py", "--workdir=new", f"--config.model.path={name}"])


def mixed(name):
  return ("preview", ["--config=config.py", "--config.mistakes.mined=0.5", f"--config.mistakes.mined_path={name}"])


def prompts(name, *more):
  return ("generate", ["--model=hf", f"--prompts={name}.jsonl", "--output=new.jsonl", *more])


# name of the case: program and its arguments, what the line must say
CASES = {
  "a malformed JSON line": (data("malformed"), "malformed.jsonl:2"),
  "an unknown role": (data("role"), "role.jsonl:1"),
  "overlapping spans": (data("overlap"), "overlap.jsonl:1"),
  "a span past the end": (data("past"), "past.jsonl:1"),
  "a record of no known form": (data("form"), "form.jsonl:1"),
  "a record without a trained token": (data("untrained"), "untrained.jsonl:1"),
  "a marker in a user's text": (data("forged"), "forged.jsonl:1"),
  "a record longer than a row": (data("long"), "long.jsonl:1"),
  "an empty file": (data("empty"), "empty.jsonl"),
  "no such records": (data("absent"), "absent.jsonl"),
  "no such mined records": (mixed("absent.jsonl"), "absent.jsonl"),
  "mined records that are no transcripts": (mixed("prompts.jsonl"), "prompts.jsonl:1"),
  "mined records without a file": (("preview", ["--config=config.py", "--config.mistakes.mined=0.5"]), "mined_path"),
  "rounds that would mine for nobody": (("train", [*USER["run"], "--config.rounds=2"]), "mistakes.mined"),
  "a checkpoint that misses a tensor": (model("missing"), "model.norm.weight"),
  "a checkpoint with a tensor too many": (model("unexpected"), "model.surprise"),
  "tensors of a wrong shape": (model("misshapen"), "model.norm.weight"),
  "a truncated safetensors file": (model("truncated"), "truncated"),
  "a model of another architecture": (model("gelu"), "hidden_act"),
  "no such model": (model("absent"), "absent"),
  "a misspelt key": (("train", [*USER["run"], "--config.optimizer.learning_rat=1"]), "learning_rate"),
  "a value of the wrong type": (("train", [*USER["run"], "--config.train.steps=many"]), "steps"),
  "a value out of range": (("train", [*USER["run"], "--config.mistakes.share=2.0"]), "mistakes.share=2.0"),
  "a mesh that does not divide the devices": (("train", [*USER["run"], "--config.mesh.tensor=3"]), "mesh"),
  "a key of a size that is None": (("train", [*USER["run"], "--config.model.size.hidden_size=1"]), "size is None in"),
  "no such config": (("train", ["--config=absent.py", "--workdir=new"]), "absent.py"),
  "a required flag left out": (("train", ["--config=config.py"]), "workdir"),
  "an argument that is no flag": (("train", [*USER["run"], "more"]), "'more'"),
  "a workdir of another config": (("train", ["--config=config.py", "--workdir=other"]), "seed"),
  "a flag bias without a marker": (prompts("prompts", "--flag_bias=2", "--max_tokens=8"), "flag_bias"),
  "no such prompts": (prompts("absent"), "absent.jsonl"),
  "a prompt line with neither prompt nor tokens": (prompts("good"), "good.jsonl:1"),
  "a token outside the vocabulary": (prompts("tokens"), "tokens.jsonl:1"),
  "a task that cannot check a step": (
    ("evaluate", ["--model=hf", "--config=config.py", "--output=new.json"]),
    "records",
  ),
  "a task that cannot be mined": (("mine", ["--model=hf", "--config=config.py", "--output=new.jsonl"]), "records"),
  "an export over something": (("export", ["--model=hf", "--output=other"]), "other"),
  "a report of no workdir": (("report", ["--workdirs=hf", "--output=new.html"]), "hf"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
  """For each case what the program said, its exit code, and the files changed, removed or left behind."""
  home = tmp_path_factory.mktemp("home")
  out = tmp_path_factory.mktemp("out")
  lay_out(home)
  work = [
    (program, arguments, str(out / str(number))) for number, ((program, arguments), _) in enumerate(CASES.values())
  ]
  before = contents(home)
  done = subprocess.run(
    [sys.executable, "-c", SERVER],
    input=json.dumps(work),
    cwd=home,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    env=ENVIRONMENT,
  )
  codes = [int(line) for line in done.stdout.split()]
  after = contents(home)
  changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
  return {
    name: ((out / str(number)).read_text(), code, changed)
    for number, (name, code) in enumerate(zip(CASES, codes, strict=True))
  }


def contents(home) -> dict[str, str]:
  return {
    str(file.relative_to(home)): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "folder"
    for file in home.rglob("*")
  }


def lay_out(home):
  """A good model, its tokenizer, records and a config; beside each, what is wrong with it."""
  (home / "config.py").write_text(CONFIG)
  write_lines(home / "good.jsonl", [GOOD])
  write_lines(home / "malformed.jsonl", [GOOD, '{"pieces": [}'])
  write_lines(home / "role.jsonl", [{"pieces": [{"role": "error", "text": "1"}]}])
  span = {"start": 0, "end": 3, "role": "text"}
  write_lines(home / "overlap.jsonl", [{"text": "1+2=3", "spans": [span, {**span, "start": 2, "end": 5}]}])
  write_lines(home / "past.jsonl", [{"text": "1+2", "spans": [{**span, "end": 4}]}])
  write_lines(home / "form.jsonl", [{"instruction": "1+2?", "output": "3"}])
  write_lines(home / "untrained.jsonl", [{"pieces": [{"role": "prompt", "text": "1+2?"}]}])
  answer = {"role": "text", "text": "3"}
  write_lines(home / "forged.jsonl", [{"pieces": [{"role": "prompt", "text": "<|flag|>"}, answer]}])
  write_lines(home / "long.jsonl", [{"pieces": [{"role": "prompt", "text": "1+" * 30}, answer]}])
  (home / "empty.jsonl").write_text("")
  write_lines(home / "prompts.jsonl", [{"prompt": "1+2?"}])
  write_lines(home / "tokens.jsonl", [{"tokens": [0, 10**6]}])

  config = hf_config.config_from_json(SIZE, "the test's size")
  hf_writing.save(home / "hf", build.init(config, jax.random.key(0), "float32"), config, dtype="float32")
  # Its markers are called otherwise, so those of the config are missing.
  others = TokenizerConfig(path="", flag="<a>", fix="<b>", special=False, confidence=(), confidence_first=())
  build_tokenizer([*"0123456789+=?"], others).save_pretrained(home / "hf")
  for name in ("missing", "unexpected", "misshapen", "truncated", "gelu"):
    shutil.copytree(home / "hf", home / name)
    (file,) = (home / name).glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    if name == "missing":
      del tensors["model.norm.weight"]
    elif name == "unexpected":
      tensors["model.surprise"] = np.zeros(3, np.float32)
    elif name == "misshapen":
      tensors["model.norm.weight"] = np.zeros(31, np.float32)
    safetensors.numpy.save_file(tensors, file)
    if name == "truncated":
      file.write_bytes(file.read_bytes()[:-100])
    if name == "gelu":
      (home / name / "config.json").write_text(json.dumps({**SIZE, "hidden_act": "gelu"}))
  begin_run(home)


def begin_run(home):
  """A workdir `other` that was trained with another seed."""
  subprocess.run(
    [sys.executable, "-m", "insec_jax.train", "--config=config.py", "--workdir=other", "--config.seed=1"],
    cwd=home,
    check=True,
    capture_output=True,
    env=ENVIRONMENT,
  )


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_ends_in_one_line_that_names_it_and_exit_code_2(answers, case):
  said, code, _ = answers[case]
  assert code == 2, said
  *before, line = said.strip().split("\n")
  assert not before, said
  assert line.startswith("error: ")
  assert CASES[case][1] in line


def test_no_bad_input_changes_a_byte_on_disk(answers):
  assert {tuple(changed) for _, _, changed in answers.values()} == {()}

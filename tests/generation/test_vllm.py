"""A real vLLM on loopback: texts, mined records and rates are those of the weights here.

Needs a Python with vLLM, in an environment of its own (launch/README.md says how), named by INSEC_VLLM:

  INSEC_VLLM=~/vllm/bin/python python -m pytest -m vllm

It trains the toy for 600 steps. Draws at a temperature are not compared: those of a server are its own.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from modelkit import ROOT

from insec_jax import config_build, config_file
from insec_jax.data import vocabulary
from insec_jax.method import tasks

pytestmark = [
  pytest.mark.vllm,
  pytest.mark.skipif("INSEC_VLLM" not in os.environ, reason="no vLLM: INSEC_VLLM names no Python that has it"),
]
CONFIG, CONFIG_LORA = (str(ROOT / "configs" / name) for name in ("toy.py", "toy_lora.py:rows"))
START_SECONDS = 300
# The chunks of generate are small, and the process kills itself after two of them.
KILLED = """
import os, signal
from insec_jax import command, generate
generate.PROMPTS_PER_CHUNK = 16
append, done = generate.ChunkStore.append, []
def append_then(self, *arguments, **options):
  append(self, *arguments, **options)
  done.append(1)
  if len(done) == int(os.environ.get("KILL_AFTER", 0)):
    os.kill(os.getpid(), signal.SIGKILL)
generate.ChunkStore.append = append_then
command.run(generate.main)
"""
GREEDY_MINE = """
from insec_jax import command, mine
from insec_jax.mining import miner
miner.TEMPERATURE = 0.0
command.run(mine.main)
"""


def program(home, *words: str, code=0, **environment) -> str:
  """What `python WORDS`, run in the folder, writes to stderr."""
  done = subprocess.run(
    [sys.executable, *words],
    cwd=home,
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == code, done.stderr
  return done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a toy that was trained for a short time (run, and exported as hf), and 200 prompts."""
  folder = tmp_path_factory.mktemp("vllm")
  program(folder, "-m", "insec_jax.train", f"--config={CONFIG}", "--workdir=run", "--config.train.steps=600")
  program(folder, "-m", "insec_jax.export", "--model=run", "--output=hf")
  config = config_build.build(config_file.load(CONFIG))
  problems = tasks.problems(tasks.get(config.task), "test", num=200, seed=0)
  (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": problem.prompt}) + "\n" for problem in problems))
  return folder


@pytest.fixture(scope="module")
def server(home):
  """The flag that names a vLLM with the model of the folder."""
  with served(home, "hf", "--served-model-name", "toy") as flag:
    yield flag


@contextlib.contextmanager
def served(home, model, *words: str):
  """A vLLM with the model of a folder in `home`; yields the flag that names it."""
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = unused.getsockname()[1]
  command = [os.environ["INSEC_VLLM"], "-m", "vllm.entrypoints.openai.api_server", "--model", model, *words]
  command += f"--dtype float32 --enforce-eager --host 127.0.0.1 --port {port} --max-model-len 256".split()
  environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NPROC")}
  with (home / "vllm.log").open("wb") as log:
    process = subprocess.Popen(
      command,
      cwd=home,
      env={**environment, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
  try:
    deadline = time.monotonic() + START_SECONDS
    while not answers(port):
      assert process.poll() is None, (home / "vllm.log").read_text()[-3_000:]
      assert time.monotonic() < deadline, (home / "vllm.log").read_text()[-3_000:]
      time.sleep(1)
    yield f"--server=http://127.0.0.1:{port}"
  finally:
    process.terminate()
    process.wait(60)


def answers(port: int) -> bool:
  with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
    return True
  return False


def written(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("bias", ["0", "-inf", "6"])
def test_200_greedy_texts_are_those_of_the_weights_here(home, server, bias):
  words = ["-m", "insec_jax.generate", "--prompts=p.jsonl", "--max_tokens=64", "--logprobs", f"--flag_bias={bias}"]
  program(home, *words, "--model=run", f"--output=here{bias}.jsonl")
  program(home, *words, "--model=hf", server, f"--output=there{bias}.jsonl")
  here, there = written(home / f"here{bias}.jsonl"), written(home / f"there{bias}.jsonl")
  assert len(here) == 200
  for ours, theirs in zip(here, there, strict=True):
    np.testing.assert_allclose(theirs.pop("logprobs"), ours.pop("logprobs"), atol=1e-4)
    assert theirs == ours


def test_killed_it_goes_on_and_draws_do_not_depend_on_what_was_there(home, server):
  words = ["-c", KILLED, "--model=hf", server, "--prompts=p.jsonl", "--max_tokens=32", "--temperature=1"]
  program(home, *words, "--output=killed.jsonl", code=-signal.SIGKILL, KILL_AFTER="2")
  assert not (home / "killed.jsonl").exists()
  assert "2 of 13 chunks were made before" in program(home, *words, "--output=killed.jsonl")
  program(home, *words, "--output=whole.jsonl")
  assert (home / "killed.jsonl").read_bytes() == (home / "whole.jsonl").read_bytes()


def test_the_mined_file_is_that_of_the_weights_here(home, server):
  words = ["-c", GREEDY_MINE, f"--config={CONFIG}", "--config.mine.samples=1", "--config.mine.num_problems=300"]
  program(home, *words, "--model=run", "--output=mined_here.jsonl")
  program(home, *words, "--model=hf", server, "--output=mined_there.jsonl")
  mined = (home / "mined_here.jsonl").read_bytes()
  assert len(mined.splitlines()) > 20
  assert (home / "mined_there.jsonl").read_bytes() == mined


def test_greedy_rates_are_those_of_the_weights_here(home, server):
  words = ["-m", "insec_jax.evaluate", f"--config={CONFIG}"]
  words += ["--config.evaluate.num_problems=60", "--config.evaluate.num_probes=60"]
  program(home, *words, "--model=run", "--output=here.json")
  said = program(home, *words, "--model=hf", server, "--output=there.json")
  assert "the server forces no flags while decoding" in said
  assert "logprob_token_ids" not in said  # it scores flags
  here, there = (json.loads((home / f"{name}.json").read_text()) for name in ("here", "there"))
  assert (here["server"], there["server"]) == (None, "toy")
  greedy = {source: rates for source, rates in there["rates"].items() if "sampled" not in source}
  assert {"injected", "own", "solutions", "solutions, at threshold", "solutions, flags banned"} <= greedy.keys()
  for source, rates in greedy.items():
    assert rates == here["rates"][source], source
  for source in ("injected", "own"):
    for ours, theirs in zip(here["operating"][source], there["operating"][source], strict=True):
      assert theirs == {**ours, "bias": pytest.approx(ours["bias"], abs=1e-3)}


def test_another_tokenizer_and_another_name_are_refused(home, server):
  words = ["-m", "insec_jax.generate", "--prompts=p.jsonl", "--output=bad.jsonl", server]
  other = home / "other"
  program(home, "-m", "insec_jax.export", "--model=run", "--output=other")
  tokenizer = vocabulary.load(str(other))
  tokenizer.add_tokens(["<|other|>"], special_tokens=True)
  tokenizer.save_pretrained(other)
  assert "another tokenizer than --model" in program(home, *words, "--model=other", code=2)
  assert "has no model 'base'; it has toy" in program(home, *words, "--model=hf", "--server_model=base", code=2)


def test_the_pair_of_a_lora_run_writes_the_texts_of_the_run_here(home):
  changes = ("model.path=hf", "train.steps=60", "optimizer.learning_rate=0.01", "optimizer.warmup_steps=10")
  words = [f"--config={CONFIG_LORA}", *(f"--config.{one}" for one in changes)]
  program(home, "-m", "insec_jax.train", *words, "--workdir=lora")
  program(home, "-m", "insec_jax.export", "--model=lora", "--output=pair", "--format=pair")
  words = ["-m", "insec_jax.generate", "--prompts=p.jsonl", "--max_tokens=64"]
  program(home, *words, "--model=lora", "--output=lora_here.jsonl")
  program(home, *words, "--model=hf", "--output=before.jsonl")
  adapter = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", "insec=pair/adapter")
  with served(home, "pair/base", *adapter) as flag:
    program(home, *words, "--model=pair/base", flag, "--server_model=insec", "--output=lora_there.jsonl")
  here, there, before = (written(home / f"{name}.jsonl") for name in ("lora_here", "lora_there", "before"))
  assert sum(ours != theirs for ours, theirs in zip(here, before, strict=True)) > 20  # the adapters matter
  assert here == there

"""Short runs of the program train on sums of three digits, each in a process or a fork of its own."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import forking
import numpy as np
from datakit import write_lines

from insec_jax.config import TokenizerConfig
from insec_jax.data.vocabulary import build_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict

def get_config(path=""):
  c = ConfigDict()
  c.seed = 0
  c.rounds = 0
  c.model = dict(path=path, remat="none", size=None if path else dict(
    model_type="llama", hidden_act="silu", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=64, max_position_embeddings=128, rms_norm_eps=1e-5,
    rope_theta=10_000.0, initializer_range=0.1, tie_word_embeddings=False))
  c.tokenizer = dict(path="tokenizer", flag="<|flag|>", fix="<|fix|>", special=True, confidence=(), confidence_first=())
  c.task = dict(name="records", min_size=0, max_size=0, modulus=0)
  c.data = dict(path="records.jsonl", num_records=0, num_heldout=20, template="plain", marker_text="refuse",
                row_length=64, rows_per_device=8, accumulation=1)
  c.mistakes = dict(source="recorded", share=0.5, max_per_solution=1, classes=(), reason="label",
                    unit="line", mined=0.0, mined_path="")
  c.loss = dict(prompt=0.0, text=1.0, mistake=-0.1, flag=1.0, reason=1.0, correction=2.0, end=0.5, repeat=0.0)
  c.optimizer = dict(learning_rate=1e-2, final_share=0.1, warmup_steps=5, weight_decay=0.01, b1=0.9, b2=0.99, eps=1e-8,
                     clip_norm=1.0)
  c.train = dict(steps=40, log_every=2, eval_every=20, checkpoint_every=5, keep=2)
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.precision = dict(params="float32", compute="float32")
  c.evaluate = dict(num_problems=1, num_probes=1, max_tokens=8, batch_size=1, temperature=1.0,
                    max_false_alarms=0.01, votes=3, redraws=1, max_size=0)
  c.mine = dict(num_problems=2, samples=2, right=1.0)
  return c
"""
# Runs train and sends itself a signal right after a line of metrics, before anything else of that step.
SIGNALLED = """
import os, sys, time
from insec_jax import command, train
from insec_jax.training import metrics
write = metrics.Log.write
def write_then_signal(self, step, values):
  write(self, step, values)
  if step == int(os.environ["SIGNAL_AT"]):
    os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    time.sleep(0.5)  # a thread reads the signal
metrics.Log.write = write_then_signal
command.run(train.main)
"""
# Three rounds, which mine sums over graphs.
GRAPH = (
  CONFIG.replace(
    'c.task = dict(name="records", min_size=0, max_size=0, modulus=0)',
    'c.task = dict(name="graph", min_size=1, max_size=2, modulus=10)',
  )
  .replace('path="tokenizer", flag', 'path="", flag')
  .replace('path="records.jsonl", num_records=0, num_heldout=20', 'path="", num_records=150, num_heldout=10')
  .replace('source="recorded", share=0.5', 'source="injected", share=0.3')
  .replace("mined=0.0", "mined=0.4")
  .replace("c.rounds = 0", "c.rounds = 3")
  .replace(
    "steps=40, log_every=2, eval_every=20, checkpoint_every=5",
    "steps=20, log_every=2, eval_every=10, checkpoint_every=4",
  )
  .replace("max_tokens=8, batch_size=1", "max_tokens=24, batch_size=8")
  .replace("num_problems=2, samples=2, right=1.0", "num_problems=24, samples=2, right=1.0")
)
# Chunks of eight samples, and a signal to itself after so many of them.
MINING = (
  SIGNALLED.split("write = ")[0]
  + """
from insec_jax.files import chunks
from insec_jax.mining import miner
miner.SAMPLES_PER_CHUNK = 8
append, done = chunks.ChunkStore.append, []
def append_then_signal(self, *arguments, **options):
  append(self, *arguments, **options)
  done.append(1)
  if len(done) == int(os.environ.get("SIGNAL_AFTER", 0)):
    os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    time.sleep(0.5)  # a thread reads the signal
chunks.ChunkStore.append = append_then_signal
command.run(train.main)
"""
)
TIMED = ("tokens_per_s", "trained_tokens_per_s", "seconds")  # the clock's, not the model's


def is_timed(key):
  """Whether a key of metrics says what the clock does."""
  return key in TIMED or key.startswith("time/")


def write_home(folder, steps=40):
  """Write a config of so many steps, records, and their tokenizer."""
  (folder / "config.py").write_text(CONFIG.replace("steps=40", f"steps={steps}"))
  markers = TokenizerConfig(path="", flag="<|flag|>", fix="<|fix|>", special=True, confidence=(), confidence_first=())
  build_tokenizer([*"0123456789+= ?\n", "wrong sum"], markers).save_pretrained(folder / "tokenizer")
  write_lines(folder / "records.jsonl", [{"pieces": record} for record in make_records()])


def make_records():
  """Sums of three digits, each step of which may come wrong first."""
  rng = np.random.default_rng(0)
  for _ in range(200):
    a, b, c = (int(digit) for digit in rng.integers(0, 10, 3))
    pieces = [{"role": "prompt", "text": f"{a}+{b}+{c}?\n"}]
    for left, right in ((a, b), ((a + b) % 10, c)):
      total = (left + right) % 10
      if rng.random() < 0.3:
        pieces += [
          {"role": "mistake", "text": f"{left}+{right}={(total + 1 + int(rng.integers(9))) % 10}\n"},
          {"role": "flag", "text": "<|flag|>"},
          {"role": "reason", "text": "wrong sum"},
          {"role": "flag", "text": "<|fix|>"},
          {"role": "correction", "text": f"{left}+{right}={total}\n"},
        ]
      else:
        pieces.append({"role": "text", "text": f"{left}+{right}={total}\n"})
    yield pieces


def train(home, workdir, *changes, arm="", code=0, program=None, devices=1, **variables):
  """What the program said on stderr; it must exit with `code`, or with 1 or 2 if that is None.

  `program` are words for Python in place of the program, which without them and `variables` runs in a fork.
  """
  needed = {
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  given = [
    f"--config={home / 'config.py'}:{arm}",
    f"--workdir={workdir if str(workdir).startswith('gs://') else home / workdir}",
    *(f"--config.{change}" for change in changes),
  ]
  if program or variables:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **needed}
    environment |= {name: str(value) for name, value in variables.items()}
    words = [sys.executable, *(program or ("-m", "insec_jax.train")), *given]
    done = subprocess.run(words, env=environment, cwd=home, capture_output=True, text=True, check=False)
  else:
    done = forking.run("train", *given, folder=home, **needed)
  assert done.returncode in ((1, 2) if code is None else (code,)), done.stderr
  return done.stderr


def train_in_two(home, program, *words, code=0, **variables):
  """What two processes of one run said on stderr; both must exit with `code`."""
  with socket.socket() as one:
    one.bind(("", 0))
    port = one.getsockname()[1]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  environment |= {name: str(value) for name, value in variables.items()}
  words = [f"--config={home / 'config.py'}:", *words, f"--coordinator=localhost:{port}", "--num_processes=2"]
  ran = [
    subprocess.Popen(
      [sys.executable, "-c", program, *words, f"--process_id={index}"],
      env=environment,
      cwd=home,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in (0, 1)
  ]
  said = [one.communicate(timeout=300)[1] for one in ran]
  assert [one.returncode for one in ran] == [code, code], said
  return said


def read_lines(folder):
  """Every line of metrics without what the clock says."""
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [{key: value for key, value in line.items() if not is_timed(key)} for line in lines]

"""Programs in forks of one process that has imported what is slow, and a small workdir of train to try things on.

Every run has a time limit and ends as a Run; several may go on at once.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
import copy
import datakit
from ml_collections import ConfigDict

def get_config(what="graph"):
  values = copy.deepcopy(datakit.VALUES)
  values["model"] = dict(path="", remat="none", size=dict(
    model_type="llama", hidden_act="silu", hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=64, max_position_embeddings=256, rms_norm_eps=1e-5,
    rope_theta=10_000.0, initializer_range=0.3, tie_word_embeddings=False))
  values["task"] = dict(name="graph", min_size=1, max_size=2, modulus=10)
  values["data"] |= dict(path="", num_records=40, num_heldout=8, row_length=128, rows_per_device=2)
  values["mistakes"] |= dict(source="injected")
  values["optimizer"] |= dict(learning_rate=1e-2, warmup_steps=1)
  values["evaluate"] |= dict(num_problems=2, num_probes=2, max_tokens=8, batch_size=8, redraws=1, votes=3)
  values["mine"] = dict(num_problems=4, samples=2, right=1.0)
  values["train"] = dict(steps=6, log_every=1, eval_every=2, checkpoint_every=2, keep=3)
  if what == "rounds":
    values["rounds"] = 2
    values["mistakes"] |= dict(mined=0.4)
  return ConfigDict(values)
"""
# Reads one run a line and forks twice: the inner process is the program, the outer one writes down how it ended.
SERVER = """
import json, os, runpy, signal, sys, traceback
import flax.linen, grain, jax, optax, orbax.checkpoint, tensorboardX, transformers
from insec_jax import refusals
from insec_jax.training import checkpoint
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
  program, arguments, stem, variables = json.loads(line)
  if os.fork():
    continue
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  os.setsid()
  child = os.fork()
  if child:
    with open(stem + ".pid.new", "w") as file:
      file.write(str(child))
    os.rename(stem + ".pid.new", stem + ".pid")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(stem + ".code.new", "w") as file:
      file.write(str(code))
    os.rename(stem + ".code.new", stem + ".code")
    os._exit(0)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for descriptor, stream in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{stem}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
  os.environ.update(variables)
  sys.argv = [program, *arguments]
  refusals.hook_uncaught()  # as `python -m` does
  code = 0
  try:
    if before := variables.get("BEFORE"):
      exec(before)
    runpy.run_module("insec_jax." + program, run_name="__main__", alter_sys=True)
  except SystemExit as stop:
    code = stop.code or 0
  except BaseException:
    traceback.print_exc()
    code = 1
  try:
    sys.stdout.flush()
    sys.stderr.flush()
  finally:
    os._exit(code)
"""
# For the BEFORE of a run of train: a pause after each line of metrics, so that others meet it at work.
SLOW = """
import time
from insec_jax.training import metrics
write = metrics.Log.write
def slow(self, step, values):
  write(self, step, values)
  time.sleep(0.2)
metrics.Log.write = slow
"""
HUNG = -1000  # the exit code of a run past its time limit


@dataclasses.dataclass
class Run:
  """A program that runs or has ended."""

  words: str
  stem: pathlib.Path
  begun: float

  @property
  def pid(self) -> int:
    path = self.stem.with_suffix(".pid")
    while not path.exists():
      time.sleep(0.005)
    return int(path.read_text())

  @property
  def ended(self) -> bool:
    return self.stem.with_suffix(".code").exists()

  @property
  def code(self) -> int:
    return int(self.stem.with_suffix(".code").read_text())

  @property
  def err(self) -> str:
    return self.stem.with_suffix(".err").read_text(errors="backslashreplace")

  def send(self, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid, number)

  def wait(self, seconds: float = 90) -> "Run":
    """Return once it has ended; a run past the limit is killed."""
    while not self.ended:
      if time.monotonic() > self.begun + seconds:
        self.send(signal.SIGKILL)
        while not self.ended:
          time.sleep(0.02)
        self.stem.with_suffix(".code").write_text(str(HUNG))
        break
      time.sleep(0.02)
    return self

  @property
  def is_one_line(self) -> bool:
    """Whether it ended with one line of error and the exit code that goes with it."""
    errors = [line for line in self.err.split("\n") if line.startswith("error: ")]
    return (
      self.code in (1, 2, 3)
      and len(errors) == 1
      and self.err.rstrip("\n").split("\n")[-1] == errors[0]
      and "Traceback" not in self.err
    )

  def __str__(self) -> str:
    return f"{self.words}: exit code {self.code}, {self.err[-600:]!r}"


class Programs:
  """The process that forks, for the time of a module's tests."""

  def __init__(self, home: pathlib.Path):
    self.home, self._number = home, 0
    self._out = home / "runs"
    self._out.mkdir()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(home / "cache")
    environment = {
      **os.environ,
      "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "1",
      "JAX_COMPILATION_CACHE_DIR": cache,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_ENABLE_COMPILATION_CACHE": "1",
    }
    self._server = subprocess.Popen(
      [sys.executable, "-c", SERVER],
      cwd=home,
      env=environment,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    assert self._server.stdout.readline() == "ready\n"

  def start(self, program: str, *arguments: str, **variables: str) -> Run:
    """Begin a run in the folder `home`."""
    self._number += 1
    stem = self._out / str(self._number)
    for stream in ("out", "err"):
      stem.with_suffix(f".{stream}").touch()
    self._server.stdin.write(json.dumps([program, arguments, str(stem), variables]) + "\n")
    self._server.stdin.flush()
    return Run(f"{program} {' '.join(arguments)}", stem, time.monotonic())

  def run(self, program: str, *arguments: str, seconds: float = 90, **variables: str) -> Run:
    """Return the run once it has ended."""
    return self.start(program, *arguments, **variables).wait(seconds)

  def close(self) -> None:
    self._server.stdin.close()
    self._server.wait(30)

  def train(self, workdir: str, *changes: str, arm: str = "") -> Run:
    return self.start("train", *train_words(workdir, *changes, arm=arm))

  def generate(self, model: str, output: str, *more: str) -> Run:
    return self.start(
      "generate",
      f"--model={model}",
      "--prompts=prompts.jsonl",
      f"--output={output}",
      "--max_tokens=6",
      "--logprobs",
      *more,
    )

  def evaluate(self, model: str, output: str, *more: str) -> Run:
    return self.start("evaluate", f"--model={model}", "--config=config.py", f"--output={output}", *more)

  def mine(self, model: str, output: str, *more: str) -> Run:
    return self.start("mine", f"--model={model}", "--config=config.py", f"--output={output}", *more)

  def export(self, model: str, output: str, *more: str) -> Run:
    return self.start("export", f"--model={model}", f"--output={output}", *more)


def train_words(workdir: str, *changes: str, arm: str = "") -> list[str]:
  return [
    f"--config=config.py{arm and ':' + arm}",
    f"--workdir={workdir}",
    *(f"--config.{change}" for change in changes),
  ]


def lay_out(home: pathlib.Path) -> None:
  """Write the config and prompts."""
  (home / "config.py").write_text(CONFIG)
  (home / "prompts.jsonl").write_text('{"tokens": [1, 2, 3]}\n{"tokens": [4, 5]}\n')


TIMED = ("tokens_per_s", "trained_tokens_per_s", "seconds")  # the clock's, not the model's


def is_timed(key):
  """Whether a key of metrics says what the clock does."""
  return key in TIMED or key.startswith("time/")


def lines(workdir: pathlib.Path) -> list[dict]:
  """Every line of metrics without what the clock says."""
  found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{key: value for key, value in line.items() if not is_timed(key)} for line in found]


def results(path: pathlib.Path) -> dict:
  """What evaluate wrote, without the path of the model and what the clock says."""
  found = json.loads(path.read_text())
  return {key: value for key, value in found.items() if key not in ("model", "seconds")}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def litter(folder: pathlib.Path) -> list[str]:
  """Return the partial files and locks below a folder."""
  return [
    str(path)
    for path in folder.rglob("*")
    if path.name.endswith((".partial", ".lock")) or "orbax-checkpoint-tmp" in path.name
  ]


def copy(workdir: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
  shutil.copytree(workdir, to)
  return to


class Tries:
  """What was tried and what went wrong; `check` at the end of a test shows both."""

  def __init__(self):
    self.num, self.wrong = 0, []

  def add(self, name: str, problem: str | None) -> None:
    self.num += 1
    if problem:
      self.wrong.append(f"{name}: {problem}")

  def __str__(self) -> str:
    return "\n".join([f"tried {self.num}, right {self.num - len(self.wrong)}, wrong {len(self.wrong)}", *self.wrong])

  def check(self) -> None:
    print(self)
    assert not self.wrong, str(self)

"""What the tries share: a folder of small inputs, a program run as a user runs it, and how it may end."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 90
LAST = re.compile(r"(error: |SIG[A-Z]+: |SIG[A-Z]+ again: |stopped)")
LEFT = re.compile(r"\.partial$|orbax-checkpoint-tmp|\.lock$")
COMPARED = ("step", "loss", "loss/text", "tokens", "trained_tokens", "grad_norm")
TRAIN = ("train", "--config=config.py:train")
CONFIG = """
import copy
import datakit
from ml_collections import ConfigDict

def get_config(what="train"):
  values = copy.deepcopy(datakit.VALUES)
  values["model"] = dict(path="hf", size=None, remat="none")
  values["task"] = dict(name="graph", min_size=2, max_size=3, modulus=10)
  values["data"] |= dict(path="", num_records=16, row_length=128, num_heldout=2)
  values["mistakes"] |= dict(source="injected")
  values["evaluate"] |= dict(num_problems=2, num_probes=2, max_tokens=8, batch_size=4)
  values["mine"] |= dict(num_problems=4, samples=2)
  values["train"] |= dict(steps=6, log_every=1, eval_every=3, checkpoint_every=2, keep=2)
  if what == "rounds":
    values["rounds"] = 3
    values["mistakes"] |= dict(mined=0.3)
    values["evaluate"] |= dict(max_tokens=24)
    values["mine"] |= dict(num_problems=12)
  return ConfigDict(values)
"""
# One call per program; OUT is a folder of the try.
PROGRAMS = {
  "train": (*TRAIN, "--workdir=OUT/w"),
  "preview": ("preview", "--config=config.py", "--html=OUT/p.html"),
  "generate": ("generate", "--model=trained", "--prompts=prompts.jsonl", "--output=OUT/o.jsonl", "--max_tokens=4"),
  "evaluate": ("evaluate", "--model=trained", "--config=config.py", "--output=OUT/r.json"),
  "mine": ("mine", "--model=trained", "--config=config.py", "--output=OUT/m.jsonl"),
  "export": ("export", "--model=trained", "--output=OUT/e"),
  "report": ("report", "--workdirs=trained", "--output=OUT/r.html"),
  "fit": ("fit", "--config=config.py", "--topology=cpu:1", "--output=OUT/f.json"),
  "sweep": ("sweep", "--config=config.py", "--arms=train", "--seeds=0", "--output=OUT/s"),
}


# Starts programs as forks of a process that has imported what is slow: a second for a try instead of six.
FORKS = """
import json, os, resource, runpy, sys
import flax.linen, grain, jax, optax, tensorboardX, transformers
from orbax.checkpoint import v1
from transformers import PreTrainedTokenizerFast
for line in sys.stdin:
  words, out, limits, environment = json.loads(line)
  if not (child := os.fork()):
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
      os.dup2(os.open(os.path.join(out, name), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(3, 64)
    os.environ.update(environment)
    for name, soft, hard in limits:
      resource.setrlimit(getattr(resource, name), (soft, hard))
    sys.argv, sys.orig_argv = ["-m"], [sys.executable, "-m", "insec_jax." + words[0], *words[1:]]
    import insec_jax
    sys.argv = words
    runpy.run_module("insec_jax." + words[0], run_name="__main__", alter_sys=True)
    sys.exit()
  print(child, flush=True)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_forks: list[subprocess.Popen] = []


@dataclasses.dataclass
class Ending:
  """How a program ended."""

  code: int
  out: str
  err: str

  def check(self, *codes: int) -> None:
    """Assert one of these exit codes, no traceback, and for a code other than 0 one last line that says why."""
    assert self.code in codes, (self.code, self.out[-500:], self.err[-1500:])
    both = self.out + self.err
    for word in ("Traceback", "Exception ignored", "terminate called"):
      assert word not in both, both[-3000:]
    if self.code and self.err:
      lines = self.err.splitlines()
      assert LAST.match(lines[-1]), self.err[-1500:]
      assert sum(bool(LAST.match(line)) for line in lines) == 1, self.err[-1500:]
    assert "is damaged" not in both, both[-1500:]


def environment(home: pathlib.Path, **changes: str | None) -> dict[str, str]:
  """The environment of a try; None takes a variable out."""
  values = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    **changes,
  }
  return {name: value for name, value in values.items() if value is not None}


def words(program: str | tuple[str, ...], out: pathlib.Path) -> list[str]:
  """The command line of a program whose outputs go to `out`."""
  name, *arguments = PROGRAMS[program] if isinstance(program, str) else program
  return [sys.executable, "-u", "-m", f"insec_jax.{name}", *(word.replace("OUT", str(out)) for word in arguments)]


def start(
  home: pathlib.Path,
  program,
  out: pathlib.Path,
  *,
  shell: str = "",
  env=None,
  stdout=subprocess.PIPE,
  stderr=subprocess.PIPE,
  cwd=None,
  stdin=subprocess.DEVNULL,
  more=(),
) -> subprocess.Popen:
  """Start a program in a group of its own; `shell` is what a shell does before it (`ulimit -n 32;`)."""
  line = [*words(program, out), *more]
  if shell:
    line = ["bash", "-c", f'{shell} exec "$@"' if "$@" not in shell else shell, "bash", *line]
  return subprocess.Popen(
    line,
    cwd=cwd or home,
    env=environment(home, **(env or {})),
    stdout=stdout,
    stderr=stderr,
    stdin=stdin,
    start_new_session=True,
  )


def finish(process: subprocess.Popen, timeout: float = TIMEOUT) -> Ending:
  """Wait for the end; a hang fails, and ends what hangs."""
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    out, err = process.communicate()
    raise AssertionError(f"hung for {timeout} s: {(err or b'')[-1500:]}") from None
  return Ending(process.returncode, *((text or b"").decode(errors="replace") for text in (out, err)))


def forked(home: pathlib.Path, program, out: pathlib.Path, limits: tuple = (), **env: str) -> Ending:
  """Run a program to its end as a fork; `limits` are (name of resource, soft, hard)."""
  if not _forks:
    _forks.append(
      subprocess.Popen(
        [sys.executable, "-c", FORKS],
        cwd=home,
        env=environment(home),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
      )
    )
  with tempfile.TemporaryDirectory() as folder:
    name, *arguments = PROGRAMS[program] if isinstance(program, str) else program
    line = [name, *(word.replace("OUT", str(out)) for word in arguments)]
    _forks[0].stdin.write(json.dumps([line, folder, limits, env]) + "\n")
    _forks[0].stdin.flush()
    child = int(_forks[0].stdout.readline())
    hung = threading.Event()
    timer = threading.Timer(TIMEOUT, lambda: (hung.set(), os.kill(child, signal.SIGKILL)))
    timer.start()
    code = int(_forks[0].stdout.readline())
    timer.cancel()
    said = [pathlib.Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr")]
  assert not hung.is_set(), f"hung for {TIMEOUT} s: {said[1][-1500:]}"
  return Ending(code, *said)


def attempt(home: pathlib.Path, program, out: pathlib.Path, **options) -> Ending:
  """Run a program to its end."""
  return finish(start(home, program, out, **options))


def signalled(home: pathlib.Path, program, out: pathlib.Path, delay: float, *numbers: int, **options) -> Ending:
  """Run a program and send its group these signals after `delay` seconds, 50 ms between two."""
  process = start(home, program, out, **options)
  time.sleep(delay)
  for number in numbers:
    if process.poll() is None:
      os.killpg(process.pid, number)
      time.sleep(0.05)
  return finish(process)


def signalled_at(home: pathlib.Path, program, out: pathlib.Path, text: str, *numbers: int, **options) -> Ending:
  """As `signalled`, once the program has printed `text` to stderr."""
  process = start(home, program, out, **options)
  seen = b""
  while text.encode() not in seen and (piece := os.read(process.stderr.fileno(), 4096)):
    seen += piece
  for number in numbers:
    if process.poll() is None:
      os.killpg(process.pid, number)
      time.sleep(0.05)
  ending = finish(process)
  return dataclasses.replace(ending, err=seen.decode(errors="replace") + ending.err)


def left_over(folder: pathlib.Path) -> list[str]:
  """Names of files that are half written, and locks."""
  return [str(path) for path in folder.rglob("*") if LEFT.search(path.name)]


def losses(workdir: pathlib.Path) -> list[dict]:
  """The lines of metrics, without what the clock says."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [{key: line[key] for key in line if not key.endswith(("seconds", "_per_s"))} for line in lines]


def check_goes_on(home: pathlib.Path, out: pathlib.Path, program=PROGRAMS["train"], expected="trained") -> None:
  """Assert that the same command ends well and that its losses are those of a run that was never disturbed."""
  forked(home, program, out).check(0)
  assert losses(out / "w") == losses(home / expected)
  assert not left_over(out)


def copy_trained(home: pathlib.Path, out: pathlib.Path, step: int = 4) -> pathlib.Path:
  """A workdir that has come as far as `step`, of the steps that are there."""
  shutil.copytree(home / "trained", out / "w")
  for path in (out / "w" / "checkpoints").iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return out / "w"

"""Many runs of the programs in forks of one process that has imported what is slow, each with a time limit."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from accepted import CONFIG, GOOD
from datakit import write_lines

from insec_jax.config import TokenizerConfig
from insec_jax.data.vocabulary import build_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
SERVER = """
import json, os, resource, runpy, signal, sys, traceback
import flax.linen, grain, jax, optax, orbax.checkpoint, transformers
from insec_jax.training import checkpoint
cases, folder, seconds = json.load(sys.stdin)
for number, (program, arguments) in enumerate(cases):
  if not (child := os.fork()):
    for descriptor, stream in ((1, "out"), (2, "err")):
      os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_CREAT | os.O_WRONLY), descriptor)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
    sys.argv = [program, *arguments]
    code = 0
    try:
      runpy.run_module("insec_jax." + program, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
      code = stop.code
    except BaseException:
      traceback.print_exc()
      code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Run(NamedTuple):
  """A program, its arguments, and how it ended; -14 is the time limit."""

  program: str
  arguments: list[str]
  code: int
  out: str
  err: str

  @property
  def wrong(self) -> str | None:
    """Return what is wrong with the run; None for exit code 0, or exit code 2 with one line of error."""
    errors = [line for line in self.err.split("\n") if line.startswith("error: ")]
    last = self.err.rstrip("\n").split("\n")[-1]
    if self.code == 0 or (self.code == 2 and errors == [last] and len(last) < 1_000 and "Traceback" not in self.err):
      return None
    return f"{self.program} {' '.join(self.arguments)[-200:]}: exit code {self.code}, {self.err[-1_000:]!r}"


def run(cases: Sequence[tuple[str, list[str]]], home: pathlib.Path, out: pathlib.Path, *, seconds: int) -> list[Run]:
  """Run each case in the folder `home`, one after the other."""
  out.mkdir()
  done = subprocess.run(
    [sys.executable, "-c", SERVER],
    input=json.dumps([cases, str(out), seconds]),
    cwd=home,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    env=ENVIRONMENT,
  )

  def read(number: int, stream: str) -> str:
    return (out / f"{number}.{stream}").read_text(encoding="utf-8", errors="backslashreplace")

  return [
    Run(program, arguments, int(code), read(number, "out"), read(number, "err"))
    for number, ((program, arguments), code) in enumerate(zip(cases, done.stdout.split(), strict=True))
  ]


def report(runs: Sequence[Run]) -> str:
  """Return the number tried and right, and a line for each run that is wrong; also printed."""
  wrong = [line for one in runs if (line := one.wrong)]
  text = "\n".join([f"tried {len(runs)}, right {len(runs) - len(wrong)}, wrong {len(wrong)}", *wrong])
  print(text)
  return text


def lay_out(home: pathlib.Path) -> None:
  """Write a config, its records, and the tokenizer of a model."""
  (home / "config.py").write_text(CONFIG, encoding="utf-8")
  write_lines(home / "good.jsonl", [GOOD] * 3)
  build_tokenizer([*"0123456789+=?"], TokenizerConfig()).save_pretrained(home / "hf")

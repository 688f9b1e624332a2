"""What the tests of programs that share work have in common: a process that kills itself after so many chunks."""

import os
import pathlib
import subprocess
import sys

from modelkit import ROOT

# Small chunks: eight samples, or eight prompts.
PROGRAM = """
import os, signal
from insec_jax import command, {program}
from insec_jax.files import chunks
from insec_jax.mining import miner
miner.SAMPLES_PER_CHUNK = {program}.PROMPTS_PER_CHUNK = 8
append, done = chunks.ChunkStore.append, []
def append_then(self, *arguments, **options):
  append(self, *arguments, **options)
  done.append(1)
  if len(done) == {kill_after}:
    os.kill(os.getpid(), signal.SIGKILL)
chunks.ChunkStore.append = append_then
command.run({program}.main)
"""


def start(
  folder: pathlib.Path, program: str, *arguments: str, kill_after: int = 0, num_devices: int = 1
) -> subprocess.Popen:
  """The running program, in the folder, where it also caches what it compiles; `kill_after` 0: never."""
  environment = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(num_devices),
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM.format(program=program, kill_after=kill_after), *arguments],
    cwd=folder,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def ended(process: subprocess.Popen, code: int = 0, timeout: float = 300) -> tuple[str, str]:
  """(stdout, stderr) of the process, which must end with this exit code."""
  out, err = process.communicate(timeout=timeout)
  assert process.returncode == code, err
  return out, err

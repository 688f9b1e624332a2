"""Programs in forks of one process that has imported what is slow: a start takes a tenth of the time.

A fork has its own folder, environment and streams. No device is touched before the fork.
"""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
SERVER = """
import importlib, json, os, pkgutil, runpy, signal, sys, time, traceback
import flax.linen, grain, jax, optax, orbax.checkpoint, transformers
import insec_jax
from insec_jax import stop_signal
programs = {file[:-3] for file in os.listdir(insec_jax.__path__[0]) if file.endswith(".py")}
programs = {name for name in programs if "command.run(main)" in open(f"{insec_jax.__path__[0]}/{name}.py").read()}
for module in pkgutil.walk_packages(insec_jax.__path__, "insec_jax."):
  if module.name.split(".")[1] not in programs | {"__main__"}:
    importlib.import_module(module.name)

def begin(folder, streams, variables):
  stop_signal.STARTED = time.monotonic()
  os.chdir(folder)
  for descriptor, path in enumerate(streams):
    os.dup2(os.open(path, os.O_CREAT | os.O_RDWR), descriptor)
  os.environ.update(variables)
  for name, value in variables.items():  # which jax has read
    if name.startswith("JAX_"):
      number = value.isdecimal()
      jax.config.update(name.lower(), int(value) if number else value)

for line in sys.stdin:
  program, code, arguments, folder, streams, variables = json.loads(line)
  if not (child := os.fork()):
    status = 1
    try:
      signal.alarm(300)
      begin(folder, streams, variables)
      sys.argv = [program, *arguments]
      sys.stdin = open(0)
      if code:
        exec(compile(code, "code", "exec"), {"__name__": "__main__"})
      else:
        runpy.run_module("insec_jax." + program, run_name="__main__", alter_sys=True)
      status = 0
    except SystemExit as stop:
      status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def _environment() -> dict[str, str]:
  paths = f"{ROOT}:{ROOT / 'tests' / 'support'}"
  return {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


def start(code: str, *, folder: pathlib.Path, given: str, **variables: str) -> subprocess.CompletedProcess:
  """The finished code, in a process of its own that has these environment variables from its start."""
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=folder,
    env=_environment() | variables,
    text=True,
    input=given,
    capture_output=True,
    timeout=300,
    check=False,
  )


@functools.cache
def _server() -> subprocess.Popen:
  process = subprocess.Popen([sys.executable, "-c", SERVER], env=_environment(), stdin=-1, stdout=-1, text=True)

  def end() -> None:
    process.stdin.close()  # it ends with its input
    process.wait(60)

  atexit.register(end)
  return process


def run(
  program: str, *arguments: str, folder: pathlib.Path, code: str = "", given: str = "", **variables: str
) -> subprocess.CompletedProcess:
  """The finished program, run in the folder with these environment variables; `code` instead of it, with this stdin."""
  server = _server()
  with tempfile.TemporaryDirectory() as streams:
    paths = [f"{streams}/{name}" for name in ("in", "out", "err")]
    pathlib.Path(paths[0]).write_text(given, encoding="utf-8")
    words = list(map(str, arguments))
    server.stdin.write(json.dumps([program, code, words, str(folder), paths, variables]) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    out, err = (pathlib.Path(path).read_text(encoding="utf-8", errors="backslashreplace") for path in paths[1:])
  return subprocess.CompletedProcess([program, *words], status, out, err)

"""The programs keep what they compile, in the user's folder unless another or none is named, and say what they read."""

import os
import pathlib
import subprocess
import sys

import pytest

from insec_jax import compile_cache

ROOT = pathlib.Path(__file__).parents[1]
# A program as the real ones are, which compiles one function.
PROGRAM = """
from insec_jax import command
command.begin(__name__)
import jax
import jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
command.run(lambda: jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))) is None)
"""


def run(home, **variables):
  """What the program says on stderr; variables that are None are unset."""
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(home), **variables}
  environment = {name: value for name, value in environment.items() if value is not None}
  done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return done.stderr


def test_a_second_run_reads_what_the_first_has_kept_below_the_home_of_the_user(tmp_path):
  unset = {compile_cache.VARIABLE: None, "XDG_CACHE_HOME": None}
  first, second = run(tmp_path, **unset), run(tmp_path, **unset)
  (folder,) = (tmp_path / ".cache" / "insec_jax").iterdir()
  assert first.startswith(f"compile cache {folder}: 0 programs read, about 0 s saved; ")
  kept = int(first.split()[-4])
  assert kept
  assert second == f"compile cache {folder}: {kept} programs read, about 0 s saved; 0 compiled and kept\n"


def test_an_empty_variable_keeps_nothing_and_a_folder_is_used_as_it_is(tmp_path):
  assert run(tmp_path, **{compile_cache.VARIABLE: ""}) == ""
  assert f"compile cache {tmp_path / 'mine'}: " in run(tmp_path, **{compile_cache.VARIABLE: str(tmp_path / "mine")})
  assert {path.name for path in tmp_path.iterdir()} == {"mine"}


@pytest.mark.parametrize("home", ["/none/here", "relative"])
def test_without_a_home_there_is_no_cache(home, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XDG_CACHE_HOME", home)
  assert compile_cache.default_folder() is None
  assert not any(tmp_path.iterdir())


def test_each_kind_of_cpu_has_its_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folders = set()
  for cpu in ("flags : avx2", "flags : avx512f"):
    monkeypatch.setattr(compile_cache, "_cpu", lambda cpu=cpu: cpu)
    folders.add(compile_cache.default_folder())
  assert len(folders) == 2

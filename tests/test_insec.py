"""The console command: its help is quick, it runs the programs, and the wheel brings it and the configs."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

from insec_jax import stop_signal

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = {"jax", "numpy", "absl", "flax", "transformers", "pydantic"}
CALLED = "import sys; from insec_jax.__main__ import main; code = main(); print(*sys.modules); sys.exit(code)"


def run(*words, cwd=ROOT, **variables):
  """A finished process of this interpreter with the package of this tree."""
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
  return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_help_names_every_program_and_imports_nothing_heavy():
  done = run("-c", CALLED, "--help")
  *text, modules = done.stdout.splitlines()
  assert done.returncode == 0
  programs = {file.stem for file in (ROOT / "insec_jax").glob("*.py") if "command.run(main)" in file.read_text()}
  assert {line.split()[0] for line in text[text.index("Programs:") + 1 :]} == programs
  assert HEAVY & set(modules.split()) == set()


@pytest.mark.parametrize(
  ("words", "seen"), [(["trian"], "did you mean train"), ([], "no program; give one of train, ")]
)
def test_a_word_that_is_no_program_is_one_line(words, seen):
  done = run("-m", "insec_jax", *words)
  assert (done.returncode, done.stdout) == (2, "")
  assert seen in done.stderr
  assert done.stderr.count("\n") == 1


def test_the_command_runs_a_program_with_its_flags_and_says_which_config_it_took(tmp_path):
  done = run("-m", "insec_jax", "preview", "--config=toy:clean", "--config.train.stpes=1", cwd=tmp_path)
  taken, error = done.stderr.splitlines()
  assert taken == f"--config=toy:clean is {ROOT / 'configs' / 'toy.py'}"
  assert error.startswith("error: --config.train.stpes: ")
  assert done.returncode == 2


@pytest.mark.parametrize(
  "words",
  [
    "python -m insec_jax.train --workdir=w",
    "python -X dev -m insec_jax train --workdir=w",
    "/usr/bin/python3 /home/me/.venv/bin/insec train --workdir=w",
  ],
)
def test_a_signal_knows_the_program_however_it_was_started(words, monkeypatch):
  monkeypatch.setattr(sys, "orig_argv", words.split())
  assert stop_signal.program() == "train"


@pytest.mark.slow
def test_the_wheel_alone_trains_a_shipped_config_in_an_empty_folder(tmp_path):
  clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}  # no PYTHONPATH
  source, empty, python = tmp_path / "source", tmp_path / "empty", tmp_path / "venv" / "bin" / "python"
  for folder in ("insec_jax", "configs"):  # pip builds in the folder that it is given
    shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(ROOT / "setup.py", source)
  pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
  build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={tmp_path}", source]
  subprocess.run([sys.executable, *pip, *build], check=True, env=clean)
  subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, env=clean)
  (wheel,) = tmp_path.glob("*.whl")
  subprocess.run([python, *pip, "install", "--no-deps", "--no-index", wheel], check=True, env=clean)
  where = "import sysconfig; print(sysconfig.get_path('purelib'))"
  packages = subprocess.check_output([python, "-c", where], text=True, env=clean).strip()
  # The packages that it needs are those of this environment. An editable install of insec_jax there is not seen.
  (pathlib.Path(packages) / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
  empty.mkdir()
  small = ["--config.data.num_records=64", "--config.data.num_heldout=8", "--config.train.steps=2"]
  small += ["--config.optimizer.warmup_steps=1", "--config.model.size.num_hidden_layers=1"]
  insec = [tmp_path / "venv" / "bin" / "insec", "train", "--config=toy", "--workdir=run", *small]
  done = subprocess.run(insec, cwd=empty, env=clean, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert f"--config=toy is {packages}/insec_jax/configs/toy.py" in done.stderr
  assert (empty / "run" / "checkpoints" / "2").is_dir()

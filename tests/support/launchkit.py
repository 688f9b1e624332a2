"""What tests of the launchers have in common: a clone with one commit, and a home with its environment ready."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
PRETEND = ROOT / "tests" / "launch" / "pretend"
SECRETS = {"HF_TOKEN": "hf_marked_9f3a", "WANDB_API_KEY": "wandb_marked_51cc", "LAB_PASSWORD": "lab_marked_77de"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HF_", "WANDB_"))}


def git(folder, *words):
  names = ("-c", "user.name=test", "-c", "user.email=test@localhost")
  subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True)


def clone(folder: pathlib.Path) -> pathlib.Path:
  """Make a repository of what a launcher sends, as it is in this working tree, with one commit."""
  for name in ("launch", "insec_jax", "configs"):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results", "bench"))
  for name in ("setup.py", ".gitignore"):
    shutil.copy(ROOT / name, folder / name)
  git(folder, "init", "--quiet")
  git(folder, "add", "--all")
  git(folder, "commit", "--quiet", "-m", "the code")
  return folder


def prepare(home: pathlib.Path, code: pathlib.Path, extras: str) -> None:
  """Put an environment into the home that host.sh takes for a complete one: the Python that runs the tests."""
  minor = f"{sys.version_info.major}{sys.version_info.minor}"
  cat = f"cat {shlex.quote(f'{code}/setup.py')} {shlex.quote(f'{code}/launch/constraints-py{minor}.txt')} | cksum"
  number = subprocess.run(["bash", "-c", cat], capture_output=True, text=True, check=True).stdout.split()[0]
  folder = home / "insec_jax" / "venv" / f"py{minor}-{number}-{'-'.join(sorted(extras.split()))}"
  (folder / "bin").mkdir(parents=True)
  script(folder / "bin" / "python", f'exec {shlex.quote(sys.executable)} "$@"')
  (folder / "complete").touch()


def script(path: pathlib.Path, text: str) -> None:
  """Write an executable for bash."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(0o755)


def until(holds, seconds: float = 60):
  """Wait for a true value, and return it."""
  end = time.monotonic() + seconds
  while not (value := holds()):
    assert time.monotonic() < end, "it did not come"
    time.sleep(0.05)
  return value


def leaks(*folders: pathlib.Path, texts: tuple[str, ...] = ()) -> list[str]:
  """Where a secret of SECRETS is: names of files, and "text" for the given ones. Files that only their owner may read
  and that are called environment are what carries secrets, and are left out; archives are looked into.
  """
  marked = re.compile("|".join(SECRETS.values()))
  found = ["text" for text in texts if marked.search(text)]
  for path in (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
    if path.name == "environment" and path.stat().st_mode & 0o077 == 0:
      continue
    content = path.read_bytes()
    if path.name.endswith(".gz"):
      content = subprocess.run(["gzip", "-dc", path], capture_output=True, check=True).stdout
    if marked.search(content.decode(errors="replace")):
      found.append(str(path))
  return found


def commands_of(process: int) -> list[str]:
  """The command lines of all processes whose environment has the variable PRETEND_RUN of this process id."""
  lines = []
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      if f"PRETEND_RUN={process}\0" in (folder / "environ").read_text():
        lines.append((folder / "cmdline").read_text().replace("\0", " "))
    except OSError:  # it has ended
      continue
  return lines


def command_line(process: int) -> str:
  """The command line of a process; empty if it has ended."""
  path = pathlib.Path(f"/proc/{process}/cmdline")
  return path.read_text().replace("\0", " ") if path.exists() else ""

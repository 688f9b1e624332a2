"""Files of a workdir other than checkpoints and metrics: config, environment, tokenizer, receipt."""

import hashlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import time
from typing import Any

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import tokenizer_files, vocabulary
from insec_jax.distributed.processes import Processes
from insec_jax.files import buckets, hub
from insec_jax.files.locks import LOCK
from insec_jax.files.reading import read_json
from insec_jax.files.temporary import partial_of
from insec_jax.files.writing import write_text
from insec_jax.model import hf, hf_config, hf_writing
from insec_jax.training import layout, optimizer
from insec_jax.training.run import Run, choose_attention

SHARED_SECONDS = 60  # time limit for a file on a network drive to appear on another host


PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "transformers",
  "tokenizers",
  "numpy",
  "ml-dtypes",
  "ml-collections",
  "tensorboardX",
)


def started_with(config: Config) -> dict[str, Any]:
  """Return the facts that must be the same on every host and are known before a device is used."""
  commit = _git("rev-parse", "HEAD")
  return {
    "commit": commit,
    "changes since (SHA-256 of git diff)": commit and _digest(_git("diff", "HEAD")),
    "python": platform.python_version(),
    **layout.versions(PACKAGES),
    "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS"),
    **layout.flat(config),
  }


def commit() -> tuple[str | None, str | None]:
  """Return the commit, and the SHA-256 of what was changed in this package since; None outside a git checkout."""
  head = _git("rev-parse", "HEAD")
  return head, head and _digest(_git("diff", "HEAD", "--", str(pathlib.Path(__file__).parents[1])))


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_shared(workdir: pathlib.Path, processes: Processes) -> None:
  """Raise InputError unless every process sees the config that process 0 has written."""
  deadline = time.monotonic() + SHARED_SECONDS
  while not (is_seen := buckets.refresh(workdir / layout.CONFIG)) and time.monotonic() < deadline:
    time.sleep(0.5)
  seen = processes.gather("the look into the workdir", is_seen)
  if blind := [f"process {index} ({name})" for index, name in enumerate(processes.names) if not seen[index]]:
    raise InputError(
      f"{', '.join(blind)} cannot see {workdir / layout.CONFIG}, which process 0 wrote; give a "
      "--workdir in a bucket or on a drive that all hosts share"
    )
  if not processes.is_first:
    buckets.refresh_folder(workdir)


def write_workdir(config: Config, workdir: pathlib.Path, run: Run, mesh: Mesh, processes: Processes) -> None:
  """Write the files that describe the run to its folder; the config first, so that a killed start can be repeated."""
  workdir.mkdir(parents=True, exist_ok=True)
  write_text(workdir / layout.CONFIG, config.to_json() + "\n")
  buckets.publish(workdir / layout.CONFIG)
  here = environment(config, run, mesh, processes)
  path = workdir / "environment.json"
  if run.totals is None:
    model = json.dumps(hf_config.config_to_json(run.config), indent=2)
    write_text(workdir / layout.MODEL, model + "\n")
    write_text(
      workdir / "receipt.txt",
      f"{run.data.receipt.rstrip()}\noptimizer         {optimizer.describe(config.optimizer)}\n",
    )
    if run.data.left_out:
      write_text(workdir / "left_out.jsonl", run.data.left_out.to_json_lines())
    write_tokenizer(config, workdir, run.tokenizer)
    first = {**here, "resumed": []}
  else:
    first = read_json(path, "the environment of a run") if path.exists() else {**here, "resumed": []}
    if not isinstance(first.setdefault("resumed", []), list):
      raise InputError(f"{path}: resumed is no list; bring the file back, or move it away")
    first["resumed"].append({"step": run.first, **here})
  write_text(path, json.dumps(first, indent=2) + "\n")
  buckets.publish(workdir)


def is_empty(workdir: pathlib.Path) -> bool:
  """Return whether the workdir has nothing but the lock of its writer."""
  return not set(buckets.children(workdir)) - {LOCK}


def make_empty(workdir: pathlib.Path) -> None:
  """Remove all that is in the workdir but the lock of its writer."""
  here = {path.name for path in workdir.iterdir()}  # in a bucket, also what is not there yet
  for name in here.union(buckets.children(workdir)) - {LOCK}:
    buckets.remove(workdir / name)


def write_tokenizer(config: Config, workdir: pathlib.Path, tokenizer: PreTrainedTokenizerFast) -> None:
  """Write the source's tokenizer with the markers added, and the source's generation_config.json, for an export."""
  with partial_of(workdir / layout.TOKENIZER) as partial:
    tokenizer_files.save(tokenizer, vocabulary.tokenizer_folder(config), partial)
    shutil.rmtree(workdir / layout.TOKENIZER, ignore_errors=True)  # of a start that was killed
    partial.rename(workdir / layout.TOKENIZER)
  start = hub.model_folder(config.model.path, "model.path", weights=False) if config.model.path else None
  generation = hf.read_generation_config(start) if start else None
  if generation is not None:
    hf_writing.write_json(workdir / hf.GENERATION, generation)


def environment(config: Config, run: Run, mesh: Mesh, processes: Processes) -> dict[str, Any]:
  """Return what the results may depend on beside config and seed; commit is None outside a git checkout."""
  commit = _git("rev-parse", "HEAD")
  device = jax.devices()[0]
  return {
    "commit": commit,
    "diff": None if commit is None else _git("diff", "HEAD"),
    "untracked": None if commit is None else _git("ls-files", "--others", "--exclude-standard"),
    "packages": layout.versions(PACKAGES),
    "hub": hub.commits(),
    "python": platform.python_version(),
    "system": platform.platform(),
    "devices": {
      "platform": device.platform,
      "kind": device.device_kind,
      "count": jax.device_count(),
      "processes": jax.process_count(),
    },
    "hosts": list(processes.names),
    "mesh": dict(mesh.shape),
    "attention": choose_attention(config, run.config, device)[1],
    "optimizer": optimizer.describe(config.optimizer),
  }


def _git(*words: str) -> str | None:
  try:
    done = subprocess.run(
      ["git", "-C", str(pathlib.Path(__file__).parent), *words],
      capture_output=True,
      encoding="utf-8",
      errors="replace",
      check=False,
    )
  except (FileNotFoundError, NotADirectoryError, PermissionError):  # no git in PATH
    return None
  return done.stdout.strip() if done.returncode == 0 else None

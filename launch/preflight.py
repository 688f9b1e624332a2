"""Checks of a host before a run starts on it, and the table of all hosts.

  python launch/preflight.py check [--host NAME] [--fit TOPOLOGY] [--] COMMAND...   one line of JSON a check
  python launch/preflight.py table [--hosts A,B] < LINES                            one table; exit code 2: not ready

COMMAND is that of the run, such as python -m insec_jax.train --config=... --workdir=... A command of another program
gets the checks that need no config. `check` exits with 0 whatever it finds: `table` decides, over the lines of all
hosts. `table` needs nothing but Python 3.8.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from preflight_command import ROOT, NotReadyError, config_words, flag, known_words, program_of, read_config

SIZED = ("train", "evaluate", "mine", "generate")  # programs that fit compiles
FOLDERS_READ = ("model",)  # flags that name a model, a workdir or an HF folder
FILES_READ = ("prompts",)
WRITTEN = ("workdir", "output")
SPARE_GB = 2.0  # of each disk, beside what is known to be written
OK, BAD, UNCHECKED = "ok", "MISSING", "not checked"


@dataclasses.dataclass
class Found:
  """Result of a check on a host; values of `same` checks must be equal on all hosts."""

  check: str
  result: str
  value: str
  same: bool = False


# ------------------------------------------------------------------------------------------------ the table


def table(lines: Sequence[str], hosts: Sequence[str]) -> tuple[str, int]:
  """Return the table of the lines of all hosts, and how many of its rows are not ready.

  Hosts with the same answer share a row. A host of `hosts` without lines is a row of its own. Other lines, such as
  those of ssh, are left out.
  """
  found: dict[str, dict[str, Found]] = {}
  for line in lines:
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
      given = json.loads(line)
      host = given.pop("host")
      found.setdefault(given["check"], {})[host] = Found(**given)
  seen = list(dict.fromkeys([*hosts, *(host for answers in found.values() for host in answers)]))
  rows, num_bad = [("check", "hosts", "result", "found")], 0
  for check, answers in found.items():
    groups: dict[tuple[str, str], list[str]] = {}
    for host in seen:
      if host in answers:
        groups.setdefault((answers[host].result, answers[host].value), []).append(host)
    differ = len({value for _, value in groups}) > 1 and any(answer.same for answer in answers.values())
    for (result, value), members in groups.items():
      shown = BAD if differ else result
      num_bad += shown == BAD
      everyone = f"all {len(seen)}" if members == seen and len(seen) > 1 else ",".join(members)
      rows.append((check, everyone, shown, f"{value}, which differs between hosts" if differ else value))
  for host in seen:
    if not any(host in answers for answers in found.values()):
      rows.append(("answer", host, BAD, "no line of its checks came; look at the messages above"))
      num_bad += 1
  if len(rows) == 1:
    return "error: no line of a check came; look at the messages above", 1
  widths = [max(len(row[column]) for row in rows) for column in range(3)]
  return "\n".join(
    "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip()  # noqa: B905 (Python 3.8)
    for row in rows
  ), num_bad


# ------------------------------------------------------------------------------------------------ the checks


def versions() -> str:
  """Return Python, the packages and a digest of this package's code."""
  import platform

  from insec_jax.training import layout, workdir

  digest = hashlib.sha256()
  for file in sorted((ROOT / "insec_jax").rglob("*.py")):
    digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
  named = layout.versions(workdir.PACKAGES)
  shown = ", ".join(f"{name} {named[name]}" for name in ("jax", "jaxlib", "flax"))
  others = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
  return f"code {digest.hexdigest()[:12]}, Python {platform.python_version()}, {shown}, others {others}"


def devices(platforms: str) -> str:
  """Return the accelerators that this host shows, without opening one; NotReadyError without those asked for."""
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    kinds = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", listed, re.MULTILINE)
    if kinds:
      return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
  chips = len(list(pathlib.Path("/dev").glob("accel[0-9]*"))) or len(list(pathlib.Path("/dev/vfio").glob("[0-9]*")))
  if platforms.startswith(("cuda", "gpu")) or (platforms.startswith("tpu") and not chips):
    raise NotReadyError(f"JAX_PLATFORMS={platforms}, but no such device is here; nvidia-smi -L must list the GPUs")
  return f"{chips} TPU chips" if chips else "no GPU and no TPU"


def model(text: str, name: str) -> str:
  """Return what was found of a model: its files can be read, and it has weights or checkpoints."""
  from insec_jax.files import buckets, hub

  folder = hub.model_folder(text, name, weights=False)
  if hub.is_id(text):
    sizes = hub_bytes(text)
    if not sizes:
      raise NotReadyError(f"{name}={text}: the repository has no model*.safetensors; give one that has")
    return f"{text} of the Hub, weights {sum(sizes) / 1e9:.2f} GB"
  names = buckets.children(folder)
  if not any(child == "checkpoints" or child.endswith(".safetensors") for child in names):
    raise NotReadyError(f"{name}={text} holds neither *.safetensors nor checkpoints; give a model's folder")
  return text


def hub_bytes(text: str, *, missing: bool = False) -> list[int]:
  """Return the sizes of the files with weights of a model of the Hub; with `missing` of those not in the cache."""
  from huggingface_hub import snapshot_download

  from insec_jax.files import hub

  match = hub.REPOSITORY.fullmatch(text)
  assert match is not None, "the caller has asked is_id"
  files = snapshot_download(
    match["repository"], revision=match["revision"], allow_patterns=list(hub.WEIGHTS), dry_run=True
  )
  return [int(file.file_size or 0) for file in files if file.will_download or not missing]


def records(text: str, name: str) -> str:
  """Return how many files of records there are, after a record of each was read."""
  from insec_jax.files import sources

  files = sources.find(text, name)
  for source in files:
    next(iter(sources.read(source, name)))
  return f"{text}: {len(files)} {'file' if len(files) == 1 else 'files'}, the first record of each was read"


def services(log: Any) -> str:
  """Return the services of log.to, which can be used."""
  from insec_jax.training import sinks

  sinks.check(log)
  return ", ".join(log.to)


def writable(text: str, name: str, *, is_folder: bool) -> str:
  """Write a small file where the run will write, and remove it; return what was tried."""
  from insec_jax.files import buckets
  from insec_jax.files.bucket_paths import BucketPath
  from insec_jax.files.reading import local_path

  probe = f"preflight-{socket.gethostname()}-{os.getpid()}"
  path = local_path(text, name)
  if isinstance(path, BucketPath):
    target = local_path(f"{text.rstrip('/')}{'/' if is_folder else '.'}{probe}", name)
    assert isinstance(target, BucketPath), "it begins as the path does"
    buckets.create(target, b"")
    buckets.remove(target)
    buckets.check_metadata(path)
    return f"{text}: an object was written and removed"
  if not path.is_absolute() and (ROOT.parent.name, ROOT.parent.parent.name) == ("code", "insec_jax"):
    raise NotReadyError(
      f"{name}={text} would be beside the code of one commit, where the next one does not look; give a path from / or "
      "~/ on, or gs://BUCKET/NAME"
    )
  folder = (path if is_folder else path.parent).absolute()
  there = next(parent for parent in (folder, *folder.parents) if parent.exists())
  with tempfile.NamedTemporaryFile(prefix=f".{probe}", dir=there):
    return f"{text}: a file was written and removed in {there}; all hosts must share it"


def room(needs: dict[str, float]) -> str:
  """Return the free GB of each disk; NotReadyError where it has less than is needed.

  `needs` gives the GB by the folder into which they are written.
  """
  by_disk: dict[int, tuple[str, float]] = {}
  for given, needed in needs.items():
    folder = pathlib.Path(given).expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    name, sum_needed = by_disk.get(there.stat().st_dev, (given, 0.0))
    by_disk[there.stat().st_dev] = (name if name == given else f"{name} and {given}", sum_needed + needed)
    if not os.access(there, os.W_OK):
      raise NotReadyError(f"{given} cannot be written to; name another folder, or change its permissions")
  said = []
  for name, needed in by_disk.values():
    free = shutil.disk_usage(next(p for p in _up(name.split(" and ")[0]) if p.exists())).free / 1e9
    if free < needed + SPARE_GB:
      raise NotReadyError(
        f"{name}: {free:.1f} GB are free, {needed + SPARE_GB:.1f} GB are needed; free some, or set HF_HOME, "
        "JAX_COMPILATION_CACHE_DIR or TMPDIR to another disk"
      )
    said.append(f"{name} needs {needed + SPARE_GB:.1f} GB")
  return "; ".join(said)


def _up(text: str) -> Iterator[pathlib.Path]:
  folder = pathlib.Path(text).expanduser().absolute()
  yield folder
  yield from folder.parents


def caches(command: Sequence[str], config: Any) -> dict[str, float]:
  """Return the folders that a run fills on each host, with the GB that are known to be written."""
  from huggingface_hub import constants

  from insec_jax import compile_cache
  from insec_jax.files import hub

  needs = {tempfile.gettempdir(): 0.0}
  compiled = os.environ.get(compile_cache.VARIABLE, str(compile_cache.default_folder() or ""))
  if compiled:
    needs[compiled] = needs.get(compiled, 0.0)
  texts = [config.model.path if config else "", *(flag(command, name) or "" for name in FOLDERS_READ)]
  for text in {text for text in texts if text and hub.is_id(text)}:
    needs[constants.HF_HUB_CACHE] = needs.get(constants.HF_HUB_CACHE, 0.0) + sum(hub_bytes(text, missing=True)) / 1e9
  return needs


def fits(command: Sequence[str], program: str, topology: str) -> str:
  """Return the memory that a compiled step of the run needs on the topology; NotReadyError where it does not fit."""
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / "fit.json"
    words = [f"--topology={topology}", f"--output={output}", f"--program={program}", *config_words(command)]
    done = subprocess.run(
      [sys.executable, "-m", "insec_jax.fit", *words],
      env={**os.environ, "PYTHONPATH": f"{ROOT}", "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
      raise NotReadyError(f"fit ended with exit code {done.returncode}: {said}")
    estimates = json.loads(output.read_text(encoding="utf-8"))
  lines = [line.strip() for line in done.stdout.splitlines()]
  memory = next((f"GiB a chip {line.split(None, 3)[-1]}" for line in lines if line.startswith("GiB a chip")), "")
  if any(estimate["fits"] is False for estimate in estimates):
    raise NotReadyError(f"{topology}: {memory}: does not fit; insec fit --topology={topology} says what would help")
  return f"{topology}: {memory}"


# ------------------------------------------------------------------------------------------------ all of them


def attempt(check: str, action: Callable[[], str], *, same: bool = False) -> Found:
  """Return the result of a check; an error is one line."""
  from insec_jax.refusals import machine_refusal, one_line

  try:
    return Found(check, OK, action(), same)
  except Exception as error:
    said = one_line(error) or type(error).__name__
    is_input = isinstance(error, NotReadyError) or type(error).__name__ == "InputError"
    return Found(check, BAD, said if is_input else machine_refusal(error) or f"{type(error).__name__}: {said}"[:300])


def checks(command: Sequence[str], topology: str | None, asked: str) -> Iterator[Found]:
  """Yield the result of each check, as soon as it is known; `asked` is JAX_PLATFORMS of the run."""
  program = program_of(command)
  yield attempt("versions", versions, same=True)
  platforms = [word.partition("=")[2] for word in command if word.startswith("JAX_PLATFORMS=")]
  yield attempt("devices", lambda: devices((platforms or [asked])[-1]), same=True)
  config = None
  if program and config_words(command):

    def build() -> str:
      nonlocal config
      config = read_config(command)
      return flag(command, "config") or ""

    yield attempt("config", build)
  if program or any(word.startswith("insec_jax.") for word in command):
    yield attempt("command", lambda: known_words(command, program))
  else:
    yield Found("command", UNCHECKED, "it is no program of insec_jax")
  read: list[tuple[str, str, Callable[[str, str], str]]] = []
  if config:
    data = config.data
    read += [("model.path", config.model.path, model)]
    read += [("data.path", data.path, records), ("data.heldout_path", data.heldout_path, records)]
    read += [("mistakes.mined_path", config.mistakes.mined_path, records)]
    if config.log.to:
      yield attempt("log.to", lambda: services(config.log))
  if program and program not in ("preview", "report", "sweep", "fit"):
    read += [(f"--{name}", flag(command, name) or "", model) for name in FOLDERS_READ]
    read += [(f"--{name}", flag(command, name) or "", records) for name in FILES_READ]
  for name, text, reader in read:
    if text:
      yield attempt(name.removeprefix("--"), lambda text=text, name=name, reader=reader: reader(text, name))
  for name in WRITTEN if program else ():
    if text := flag(command, name):
      is_folder = name == "workdir" or program in ("export", "sweep")
      yield attempt(name, lambda text=text, name=name, is_folder=is_folder: writable(text, name, is_folder=is_folder))
  yield attempt("disk", lambda: room(caches(command, config)))
  if topology is not None and program in SIZED and config:
    yield attempt("fit", lambda: fits(command, program, topology))


def main(words: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="preflight.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  verbs = parser.add_subparsers(dest="verb", required=True)
  one = verbs.add_parser("check", help="check this host; one line of JSON a check")
  one.add_argument("--host", default=socket.gethostname(), help="name of this host in the table")
  one.add_argument("--fit", metavar="TOPOLOGY", help="also compile a step for these chips, such as v6e:4x4 or h100:8")
  one.add_argument("command", nargs=argparse.REMAINDER, help="the command of the run")
  all_hosts = verbs.add_parser("table", help="the table of the lines on stdin")
  all_hosts.add_argument("--hosts", default="", help="comma-separated hosts that must have answered")
  given = parser.parse_args(words)
  if given.verb == "table":
    shown, num_bad = table(sys.stdin.read().splitlines(), [host for host in given.hosts.split(",") if host])
    print(shown)
    if num_bad:
      print(f"error: the run would not start: {num_bad} of the rows above; correct what they name", file=sys.stderr)
    return 2 if num_bad else 0
  command = given.command[1:] if given.command[:1] == ["--"] else given.command
  if not command:
    parser.error("no command; give that of the run")
  sys.path.insert(0, str(ROOT))
  asked = os.environ.get("JAX_PLATFORMS", "")
  os.environ["JAX_PLATFORMS"] = "cpu"  # no check opens a chip: the run itself may be about to
  for found in checks(command, given.fit, asked):
    print(json.dumps({"host": given.host, **dataclasses.asdict(found)}), flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

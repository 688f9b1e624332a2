"""Layout of a workdir: the names of its files and folders, and checks that they belong to one run.

  config.json          the config                          environment.json   versions, devices, commit
  model.json           the model's config                  receipt.txt        the mask receipt
  tokenizer/           the tokenizer with markers          metrics.jsonl, tb/ the log
  checkpoints/STEP/    see checkpoint.py                   mined/             records or samples of each round
  profile/             a trace of some steps, for xprof   log.json           ids of the run in services

What a run resumes with must be what it began with, except for the keys in FREE.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from insec_jax import config_unread
from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.config_build import build
from insec_jax.config_measures import MOST_CURVE_PROBLEMS
from insec_jax.files import buckets
from insec_jax.files.bucket_paths import BucketPath
from insec_jax.files.reading import open_to_read, read_json
from insec_jax.model import hf, hf_config, llama
from insec_jax.training import metrics, sinks

DAMAGED = "damaged"  # folder of a workdir to which a resumed run moves damaged checkpoints
CONFIG, MODEL, TOKENIZER, CHECKPOINTS = "config.json", "model.json", "tokenizer", "checkpoints"  # of a workdir
COVERED = (MODEL, hf.GENERATION)  # files whose SHA-256 a checkpoint holds, in addition to all of TOKENIZER
EXPLAIN = (metrics.METRICS, "environment.json", "receipt.txt", sinks.IDS)  # of a workdir
PROFILE = "profile"  # folder of a workdir with the trace of some steps
FOLDERS = ("tb", "mined", PROFILE)  # of a workdir
COMPLETE = "commit_success.txt"  # of a checkpoint in a bucket
STEP = re.compile("0|[1-9][0-9]{0,17}")  # the name of a checkpoint
VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint")
# Keys that may change when a run resumes: the result does not depend on them. Rows per step are compared separately.
FREE = (
  "model.remat",
  "optimizer.memory",
  "train.log_every",
  "train.eval_every",
  "train.checkpoint_every",
  "train.keep",
  "train.minutes",
  "train.profile_steps",
  "train.stream_cache",
  "data.cache",
  "log.",
  "data.rows_per_device",
  "data.accumulation",
  "mesh.",
  "evaluate.",
  "mine.",
)
MINING = ("evaluate.max_tokens", "evaluate.batch_size", "mine.")  # not free where a run mines its training data
MINED = ("mine.",)  # not free where the training data was mined before
CURVE = ("evaluate.max_tokens", "evaluate.batch_size", "evaluate.num_problems")  # not free with a learning curve


def versions(packages: Iterable[str] = VERSIONS) -> dict[str, str]:
  """Return the installed version of each package."""
  return {package: importlib.metadata.version(package) for package in packages}


def check_workdir(workdir: pathlib.Path, config: Config):
  """Raise InputError if the folder holds another experiment, or files of a run without its config."""
  if workdir.exists() and not workdir.is_dir():
    raise InputError(f"--workdir={workdir} is a file; give a folder")
  check_kinds(workdir)
  path = workdir / CONFIG
  if not path.is_file():
    known = (MODEL, "metrics.jsonl", TOKENIZER, CHECKPOINTS)
    if taken := [name for name in known if buckets.exists(workdir / name)]:
      raise InputError(
        f"{workdir} holds {taken[0]} but no {CONFIG}, so it is no workdir of a run; give another --workdir"
      )
    return
  try:
    made = build(read_json(path, "the config of a run"))
  except InputError as error:
    raise InputError(
      f"{path} is not the config of a run ({error}); bring it back, or give another --workdir"
    ) from error
  held = MINING if config.rounds else MINED if config.mistakes.mined else ()
  held += CURVE if config.train.curve_points else ()
  if differ := _differ(made, config, held):
    made, given = flat(made), flat(config)
    shown = ", ".join(f"{key}={given[key]!r} (was {made[key]!r})" for key in differ)
    raise InputError(
      f"{workdir} was made from another config: {shown}; give another --workdir, or the values it was made with"
    )


def _differ(was: Config, now: Config, held: Sequence[str]) -> list[str]:
  """Return the keys, free ones left out, on which the work of a run depends and that have another value now.

  A key that nothing reads, then or now, is left out. Of a learning curve the number of problems counts up to the most
  that it has.
  """
  unread = config_unread.unread(was).keys() & config_unread.unread(now).keys()
  before, after = flat(was), flat(now)
  if was.train.curve_points:
    for values in (before, after):
      values["evaluate.num_problems"] = min(values["evaluate.num_problems"], MOST_CURVE_PROBLEMS)
  return [
    key
    for key in before
    if before[key] != after[key] and key not in unread and not is_free(key, held) and not _is_moved(key, now)
  ]


def is_free(key: str, held: Sequence[str]) -> bool:
  """Return whether a value of the config may change while its work goes on; those that begin as one of `held` may not.

  `key` is its name on the command line, without `config.`.
  """
  return key.startswith(FREE) and not key.startswith(tuple(held))


def _is_moved(key: str, config: Config) -> bool:
  """Return whether the key is the folder of frozen weights, which may move: they are compared with those trained on."""
  return key == "model.path" and config.freezes


def is_moved(workdir: pathlib.Path, config: Config) -> bool:
  """Return whether the config names another folder of frozen weights than the workdir's."""
  return build(read_json(workdir / CONFIG, "the config of a run")).model.path != config.model.path


def flat(config: Config) -> dict[str, Any]:
  """Return every value of the config by its name on the command line, without `config.`."""
  values = {}
  for name, value in dataclasses.asdict(config).items():
    values |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
  return values


def steps(workdir: pathlib.Path) -> list[int]:
  """Return the steps of the workdir's checkpoints, oldest first.

  A partly written checkpoint does not count: Orbax gives a checkpoint its name when it is complete, or in a bucket,
  where nothing can be renamed, the object COMPLETE.
  """
  folder = workdir / CHECKPOINTS
  return sorted(int(name) for name in buckets.children(folder) if STEP.fullmatch(name) and _is_complete(folder / name))


def _is_complete(folder: pathlib.Path) -> bool:
  return buckets.exists(folder / COMPLETE) if isinstance(folder, BucketPath) else folder.is_dir()


def check_kinds(workdir: pathlib.Path) -> None:
  """Raise InputError unless each known entry of a workdir is a file or a folder, as it should be."""
  for name in (CONFIG, *COVERED, *EXPLAIN):
    if os.path.lexists(workdir / name):
      open_to_read(workdir / name, f"the file {name} of a workdir").close()
  for name in (CHECKPOINTS, TOKENIZER, DAMAGED, *FOLDERS):
    if os.path.lexists(workdir / name) and not (workdir / name).is_dir():
      raise InputError(
        f"{workdir / name} is no folder, and a workdir has one there; move it away or bring the folder back"
      )
  for name in buckets.children(workdir / CHECKPOINTS):
    if name.isnumeric() and not STEP.fullmatch(name):
      raise InputError(
        f"{workdir / CHECKPOINTS / name} has no name that a checkpoint has, which is its step in digits without a "
        "leading zero; bring its name back, or move it away"
      )
  for path in (workdir / TOKENIZER).rglob("*"):
    if not path.is_dir():
      open_to_read(path, "a file of the tokenizer").close()


def file_digests(workdir: pathlib.Path) -> dict[str, str]:
  """Return the SHA-256 of each file, beside checkpoints and config, that changes the output of the model."""
  files = [workdir / name for name in COVERED if (workdir / name).exists()]
  files += sorted(path for path in (workdir / TOKENIZER).rglob("*") if not path.is_dir())

  def digest(path: pathlib.Path) -> str:
    with open_to_read(path, "a file of the workdir") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()

  return {str(path.relative_to(workdir)): digest(path) for path in files}


def check_files(workdir: pathlib.Path, run: dict):
  """Raise InputError unless files and config of the workdir are those with which this checkpoint was saved."""
  if "files" not in run:  # a checkpoint of an earlier version
    return
  saved, now = run["files"], file_digests(workdir)
  if differ := sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name)):
    what = "was not there" if differ[0] not in saved else "is gone" if differ[0] not in now else "was another"
    raise InputError(
      f"{workdir / differ[0]} {what} when {describe_checkpoint(workdir, run['step'])} was saved; bring back the "
      f"files as they were ({', '.join(differ)})"
    )
  if not (workdir / CONFIG).exists():  # a caller that needs it raises
    return
  made = build(read_json(workdir / CONFIG, "the config of a run"))
  was = build(run["config"])
  if differ := _differ(was, made, ()):
    raise InputError(
      f"{workdir / CONFIG} says {differ[0]}={flat(made)[differ[0]]!r}, and "
      f"{describe_checkpoint(workdir, run['step'])} was saved with {flat(was)[differ[0]]!r}; bring it back as it was"
    )


def describe_checkpoint(workdir: pathlib.Path, step: int) -> str:
  """Return the checkpoint's name in messages."""
  return f"checkpoint {step} of {workdir}"


def read_model(workdir: pathlib.Path) -> llama.LlamaConfig:
  """Return the config of the model that a workdir trains."""
  path = workdir / MODEL
  return hf_config.config_from_json(read_json(path, "the model of a workdir"), f"{path}")

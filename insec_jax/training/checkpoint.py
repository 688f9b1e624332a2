"""Checkpoints of a workdir, and loading of a trained or untrained model for the programs that use one.

A checkpoint holds the parameters, the optimizer state, and as JSON: the step (which is the state of the data), the
running totals of the log, the config, the versions it was written with, a fingerprint of every array, and the SHA-256
of the workdir's other files that change the output of the model. A checkpoint whose content does not match these is
damaged: training resumes from the one before it, and every other program ends and lists the sound steps.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import shutil
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from transformers import PreTrainedTokenizerFast

from insec_jax import stop_signal
from insec_jax.command import DivergedError, InputError, is_refusal
from insec_jax.config import Config, TokenizerConfig
from insec_jax.config_build import build
from insec_jax.data import tokens
from insec_jax.distributed.processes import Processes, alone
from insec_jax.files.locks import LOCK, is_held
from insec_jax.files.reading import local_path, open_to_read, read_json
from insec_jax.method.transcript import Markers
from insec_jax.model import hf, hf_config, llama
from insec_jax.training import metrics
from insec_jax.training.step import TrainState

DAMAGED = "damaged"  # folder of a workdir to which a resumed run moves damaged checkpoints
CONFIG, MODEL, TOKENIZER, CHECKPOINTS = "config.json", "model.json", "tokenizer", "checkpoints"  # of a workdir
MARKERS = "insec.json"  # of an exported folder: its markers, unit and template
COVERED = (MODEL, hf.GENERATION)  # files whose SHA-256 a checkpoint holds, in addition to all of TOKENIZER
EXPLAIN = (metrics.METRICS, "environment.json", "receipt.txt")  # of a workdir
# Types of the fields of MARKERS. Versions before 0.4.0 wrote no step, and 0.2.0 no confidence.
MARKED = {
  "flag": str,
  "fix": str,
  "special": bool,
  "unit": str,
  "template": str,
  "step": int | None,
  "confidence": list | None,
  "confidence_first": list | None,
}
FOLDERS = ("tb", "mined")  # of a workdir
STEP = re.compile("0|[1-9][0-9]{0,17}")  # the name of a checkpoint
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
VANISH_SECONDS = 10  # time limit for a run to remove a checkpoint
VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint")
# Keys that may change when a run resumes: the result does not depend on them. Rows per step are compared separately.
FREE = (
  "model.remat",
  "train.log_every",
  "train.eval_every",
  "train.checkpoint_every",
  "train.keep",
  "data.rows_per_device",
  "data.accumulation",
  "mesh.",
  "evaluate.",
  "mine.",
)
MINING = ("evaluate.max_tokens", "evaluate.batch_size", "mine.")  # not free where a run mines its training data
MINED = ("mine.",)  # not free where the training data was mined before


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
    if taken := [name for name in (MODEL, "metrics.jsonl", TOKENIZER, CHECKPOINTS) if (workdir / name).exists()]:
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
  made, given = flat(made), flat(config)
  held = MINING if config.rounds else MINED if config.mistakes.mined else ()
  differ = [key for key in made if made[key] != given[key] and (not key.startswith(FREE) or key.startswith(held))]
  if differ:
    shown = ", ".join(f"{key}={given[key]!r} (was {made[key]!r})" for key in differ)
    raise InputError(
      f"{workdir} was made from another config: {shown}; give another --workdir, or the values it was made with"
    )


def flat(config: Config) -> dict[str, Any]:
  """Return every value of the config by its name on the command line, without `config.`."""
  values = {}
  for name, value in dataclasses.asdict(config).items():
    values |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
  return values


def steps(workdir: pathlib.Path) -> list[int]:
  """Return the steps of the workdir's checkpoints, oldest first.

  A partly written checkpoint does not count: Orbax gives a checkpoint its name when it is complete.
  """
  folder = workdir / CHECKPOINTS
  return (
    sorted(int(path.name) for path in folder.iterdir() if STEP.fullmatch(path.name) and path.is_dir())
    if folder.is_dir()
    else []
  )


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
  for path in (workdir / CHECKPOINTS).iterdir() if (workdir / CHECKPOINTS).is_dir() else ():
    if path.name.isnumeric() and not STEP.fullmatch(path.name):
      raise InputError(
        f"{path} has no name that a checkpoint has, which is its step in digits without a leading zero; "
        "bring its name back, or move it away"
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


def _check_files(workdir: pathlib.Path, run: dict):
  """Raise InputError unless files and config of the workdir are those with which this checkpoint was saved."""
  if "files" not in run:  # a checkpoint of an earlier version
    return
  saved, now = run["files"], file_digests(workdir)
  if differ := sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name)):
    what = "was not there" if differ[0] not in saved else "is gone" if differ[0] not in now else "was another"
    raise InputError(
      f"{workdir / differ[0]} {what} when {_where(workdir, run['step'])} was saved; bring back the "
      f"files as they were ({', '.join(differ)})"
    )
  if not (workdir / CONFIG).exists():  # a caller that needs it raises
    return
  config = flat(build(read_json(workdir / CONFIG, "the config of a run")))
  was = flat(build(run["config"]))
  if differ := [key for key in was if was[key] != config[key] and not key.startswith(FREE)]:
    raise InputError(
      f"{workdir / CONFIG} says {differ[0]}={config[differ[0]]!r}, and {_where(workdir, run['step'])} "
      f"was saved with {was[differ[0]]!r}; bring it back as it was"
    )


class Saver:
  """Writer of a workdir's checkpoints.

  The newest `keep` checkpoints stay. All processes of a run make the same calls. Partly written checkpoints of a killed
  or failed save are removed.
  """

  def __init__(self, workdir: pathlib.Path, *, keep: int):
    self._folder = workdir / CHECKPOINTS
    self._files = file_digests(workdir)
    newest = ocp.training.preservation_policies.LatestN(keep)
    self._orbax = ocp.training.Checkpointer(
      self._folder.absolute(), cleanup_tmp_directories=True, preservation_policy=newest
    )
    stop_signal.at_end(self._remove_unfinished)

  def save(
    self,
    step: int,
    state: TrainState,
    *,
    config: Config,
    facts: dict[str, Any],
    totals: list,
    log: dict[str, int] | None = None,
  ):
    """Copy the state to the host and start an asynchronous write.

    `facts` must be the same when the run resumes; `totals` is metrics.Meter.to_json(), `log` metrics.Log.state().
    Raises DivergedError when an array is not finite: no run could resume from it.
    """
    arrays = {"params": state.params, "optimizer": state.optimizer}
    if names := not_finite(arrays):
      raise DivergedError(
        f"{names[0]} is not finite after step {step}, which is not saved; lower "
        "optimizer.learning_rate or look at the data, and begin in another --workdir"
      )
    run = {
      "step": step,
      "facts": facts,
      "totals": totals,
      "log": log,
      "config": dataclasses.asdict(config),
      "versions": versions(),
      "files": self._files,
      "arrays": _leaves(arrays),
      "fingerprints": fingerprints(arrays),
    }
    self._orbax.save_checkpointables_async(step, arrays, force=True, custom_metadata={"run": run, "check": _check(run)})

  def wait(self):
    """Wait until every save is complete on disk."""
    self._orbax.wait()

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    # After an error in a run of several processes the save may be waiting for a missing process.
    if kind is None:
      self._orbax.close()
    elif jax.process_count() == 1:
      with contextlib.suppress(Exception):  # the error that ends the run is reported, a second one is not
        self._orbax.close()
      self._remove_unfinished()

  def _remove_unfinished(self) -> None:
    """Remove the partial files of a failed save; Orbax's threads may still be writing them."""
    if jax.process_count() > 1:  # another process may be reading it
      return
    for _ in range(20):
      if not (left := list(self._folder.glob(f"*{UNFINISHED}*"))):
        return
      for path in left:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.05)


class RestoredRun(NamedTuple):
  """State from which a run resumes; `damaged` lists the steps of newer checkpoints that are damaged."""

  state: TrainState
  totals: list
  log: dict[str, int] | None
  step: int
  damaged: list[int]


def restore(
  workdir: pathlib.Path,
  among: Sequence[int],
  abstract: TrainState,
  *,
  facts: Callable[[int], dict[str, Any]],
  advise: Callable[[str, Any], str],
  processes: Processes,
) -> RestoredRun:
  """Return the newest sound checkpoint among these steps, with the shardings of `abstract`.

  `facts` maps a step to its facts. `advise` maps the name of a differing fact and its saved value to a remedy. Raises
  InputError unless tree and facts are exactly those saved, or when no checkpoint is sound.
  """

  def check_facts(run):
    _check_files(workdir, run)
    before, now = run["facts"], facts(run["step"])
    if differ := [
      f"{name} is {now[name]}, was {before[name]}; {advise(name, before[name])}"
      for name in now
      if now[name] != before[name]
    ]:
      raise InputError(f"{_where(workdir, run['step'])} cannot be continued: {', '.join(differ)}")

  expected = {"params": abstract.params, "optimizer": abstract.optimizer}
  step, run, loaded, damaged = _newest_sound(workdir, among, lambda _: expected, check_facts, processes)
  number = jax.make_array_from_callback((), abstract.step.sharding, lambda _: np.asarray(step, abstract.step.dtype))
  state = TrainState(number, loaded["params"], loaded["optimizer"])
  return RestoredRun(state, run["totals"], run.get("log"), step, damaged)


def is_sound(workdir: pathlib.Path, step: int, abstract: TrainState, processes: Processes) -> bool:
  """Return whether this checkpoint holds what was saved; all processes call it together.

  Raises InputError if other files of the workdir, or its metrics up to that step, have changed since.
  """
  expected = {"params": abstract.params, "optimizer": abstract.optimizer}
  reading = _read(workdir, step, lambda _: expected, lambda run: _check_files(workdir, run), processes)
  if reading.problem is None and processes.is_first:
    metrics.check_lines(workdir, step, reading.run.get("log"))
  return reading.problem is None


def load_params(workdir: pathlib.Path, abstract, step: int | None) -> tuple[int, Any]:
  """Return (step, parameters) of the newest checkpoint, or of the one of this step, in the dtype saved.

  Raises InputError, which lists the sound steps, when the checkpoint is damaged. Also raises it when there is no such
  checkpoint, or when other files of the workdir have changed since.
  """

  def expect(run):
    dtype = run["arrays"]["params/embed"].split("[")[0]
    return {"params": jax.tree.map(lambda leaf: leaf.update(dtype=dtype), abstract)}

  def read(number: int) -> Reading:
    return _read(workdir, number, expect, lambda run: _check_files(workdir, run), alone())

  deadline = time.monotonic() + VANISH_SECONDS
  while True:
    saved_steps = steps(workdir)
    if not saved_steps:
      raise InputError(f"{workdir} has no checkpoint any more; bring one back, or train again")
    if step is not None and step not in saved_steps:
      raise InputError(f"{workdir} has no checkpoint of --step={step}; it has {', '.join(map(str, saved_steps))}")
    chosen = saved_steps[-1] if step is None else step
    reading = read(chosen)
    if reading.problem is None:
      return chosen, reading.arrays["params"]
    # A running training removes old checkpoints, possibly this one.
    while _has_checkpoint(workdir, chosen) and time.monotonic() < deadline and is_held(workdir / LOCK):
      time.sleep(0.2)
    if _has_checkpoint(workdir, chosen):
      break
  sound = [number for number in saved_steps if number != chosen and read(number).problem is None]
  remedy = (
    f"sound are the steps {', '.join(map(str, sound))}: give --step={sound[-1]}, or let train go on from there"
    if sound
    else "no other one is sound: bring one back"
  )
  raise InputError(f"{_where(workdir, chosen)} is damaged ({reading.problem}); {remedy}")


def _has_checkpoint(workdir: pathlib.Path, step: int) -> bool:
  return (workdir / CHECKPOINTS / str(step)).is_dir()


def set_aside(workdir: pathlib.Path, damaged: Sequence[int]):
  """Move these checkpoints to the folder DAMAGED of the workdir, so that the run can save those steps again."""
  for step in damaged:
    (workdir / DAMAGED).mkdir(exist_ok=True)
    taken = len(list((workdir / DAMAGED).glob(f"{step}*")))
    (workdir / CHECKPOINTS / str(step)).rename(workdir / DAMAGED / (f"{step}-{taken}" if taken else str(step)))


# Orbax abandons tasks when an array is damaged; asyncio would print a traceback for each in addition to our one line.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class _DamageError(Exception):
  """Error: a checkpoint is not what was saved."""


class Reading(NamedTuple):
  """Result of reading a checkpoint: its JSON and its arrays; or both None and the problem."""

  run: dict | None
  arrays: dict | None
  problem: str | None


def _read(
  workdir, step: int, expect: Callable[[dict], dict], check: Callable[[dict], None], processes: Processes
) -> Reading:
  """Read a checkpoint and compare it with its fingerprints; all processes call it together.

  `expect` maps the checkpoint's JSON to the arrays to read. Each process reads its own shards. Damage found by one
  process is the result on all.
  """
  reading = _attempt(workdir / CHECKPOINTS / str(step), step, expect, check)
  problems = processes.gather(f"the reading of checkpoint {step}", reading.problem)
  if not any(problems):
    # All processes together: the sums run over all shards.
    got, saved = fingerprints(reading.arrays), reading.run["fingerprints"]
    problems = [f"{name} is not what was saved" for name in got if got[name] != saved[name]]
    problems += [f"{name} holds values that are not finite" for name in not_finite(reading.arrays)]
  problem = next(filter(None, problems), None)
  return reading if problem is None else Reading(None, None, problem)


def _newest_sound(workdir, among, expect, check, processes: Processes):
  """Return (step, JSON, arrays, damaged newer steps) of the newest sound checkpoint; print each damaged one."""
  reasons = {}
  for step in sorted(among, reverse=True):
    reading = _read(workdir, step, expect, check, processes)
    if reading.problem is None:
      return step, reading.run, reading.arrays, list(reasons)
    reasons[step] = reading.problem
    if processes.is_first:
      print(f"{_where(workdir, step)} is damaged ({reasons[step]}); it is left out", file=sys.stderr, flush=True)
  listed = "; ".join(f"{step}: {reason}" for step, reason in reasons.items())
  raise InputError(
    f"{workdir} has no sound checkpoint ({listed}); nothing was changed: bring one back, or begin in another --workdir"
  )


def _attempt(folder: pathlib.Path, step: int, expect, check) -> Reading:
  """Read this process's shards of a checkpoint; errors of the machine (disk, memory) are raised, not called damage."""
  here = jax.process_index()
  # Each process reads independently: one that finds its shards damaged would leave the others waiting in a barrier.
  context = ocp.Context()
  context.multiprocessing.primary_host, context.multiprocessing.active_processes = here, {here}
  folder = folder.absolute()  # Orbax requires it
  try:
    _check_regular(folder)
    with context:
      metadata = ocp.checkpointables_metadata(folder)
      run = (metadata.custom_metadata or {}).get("run")
      if run is None or _check(run) != metadata.custom_metadata["check"] or run["step"] != step:
        raise _DamageError("its metadata is not what was saved")
      check(run)
      expected = expect(run)
      saved = {name: shape for name, shape in run["arrays"].items() if name.split("/")[0] in expected}
      compare_trees(f"checkpoint {step} of {folder.parent.parent}", saved=saved, expected=_leaves(expected))
      if {name: shape for name, shape in _leaves(metadata.metadata).items() if name in saved} != saved:
        raise _DamageError("its arrays are not those that were saved")
      # The whole tree in one call: Orbax then loads all of it or nothing.
      return Reading(run, ocp.load_checkpointables(folder, expected), None)
  except (InputError, PermissionError, jax.errors.JaxRuntimeError):  # not the fault of the file
    raise
  except Exception as error:  # Orbax, tensorstore and JSON raise errors of any type for damaged files
    if is_refusal(error):
      raise
    problem = str(error) if isinstance(error, _DamageError) else f"its files cannot be read: {type(error).__name__}"
    return Reading(None, None, problem)


def _check_regular(folder: pathlib.Path) -> None:
  """Raise _DamageError for an entry that is neither a file nor a folder: reading a FIFO would block for ever."""
  for path in folder.rglob("*"):
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
      raise _DamageError(f"{path.relative_to(folder)} is no file")


def _check(run: dict) -> int:
  return zlib.crc32(json.dumps(run, sort_keys=True).encode())


def fingerprints(tree) -> dict[str, int]:
  """Return a checksum of each array that any flipped bit changes, the same for any sharding.

  It is the sum of the bits of all elements, each times its own odd number, modulo 2**32.
  """
  leaves = jax.tree.leaves(tree)
  numbers = jax.device_get(_fingerprint_sums(leaves))
  return dict(zip(_leaves(tree), numbers.tolist(), strict=True))


@jax.jit
def _fingerprint_sums(leaves):
  def fingerprint(leaf):
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
      position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return (bits * (2 * position + 1)).sum(dtype=jnp.uint32)

  return jnp.stack([fingerprint(leaf) for leaf in leaves])


def not_finite(tree) -> list[str]:
  """Return the names of the arrays that hold NaN or infinity; all processes call it together."""
  are_finite = jax.device_get(_are_finite(jax.tree.leaves(tree)))
  return [name for name, is_finite in zip(_leaves(tree), are_finite, strict=True) if not is_finite]


@jax.jit
def _are_finite(leaves):
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def _where(workdir: pathlib.Path, step: int) -> str:
  return f"checkpoint {step} of {workdir}"


def compare_trees(where: str, *, saved: dict[str, str], expected: dict[str, str]):
  """Raise InputError that names the first array that is missing, unexpected or of another shape or dtype."""
  differences = [
    f"{name} {saved.get(name, 'absent')}, needed {expected.get(name, 'absent')}"
    for name in sorted(saved.keys() | expected.keys())
    if saved.get(name) != expected.get(name)
  ]
  if differences:
    raise InputError(
      f"{where} does not hold this model: {len(differences)} arrays differ, first {differences[0]}; "
      "use the config it was trained with, or another workdir"
    )


def _leaves(tree) -> dict[str, str]:
  def word(key):
    # A node is a named field in an optax state and a plain key in the tree that Orbax returns.
    return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))

  return {
    "/".join(map(word, path)): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


class LoadedModel(NamedTuple):
  """Model ready for use; markers, unit and template are None for a folder that no run of ours wrote."""

  config: llama.LlamaConfig
  params: Any
  tokenizer: PreTrainedTokenizerFast
  markers: Markers | None
  flag_id: int | None  # None also where the markers are plain words
  fix_id: int | None
  unit: str | None  # mistakes.unit and data.template of its training
  template: str | None
  confidence: tuple[float, ...] = ()  # tokenizer.confidence and tokenizer.confidence_first of its training
  confidence_first: tuple[float, ...] = ()
  confidence_ids: tuple[int, ...] = ()
  step: int | None = None  # of the checkpoint; None where it is not known


def is_workdir(folder: pathlib.Path) -> bool:
  """Return whether the folder is a run's workdir with a checkpoint; InputError if it holds no model at all."""
  if not folder.is_dir():
    raise InputError(f"no folder {str(folder)!r}; give a workdir of train or an HF folder")
  if (folder / MODEL).is_file():
    if not steps(folder):
      raise InputError(f"{folder} is a workdir without a checkpoint; let train run until it has saved one")
    return True
  if not (folder / hf.CONFIG).is_file():
    if unusable := [name for name in (MODEL, hf.CONFIG) if os.path.lexists(folder / name)]:
      raise InputError(f"{folder / unusable[0]} is no file that can be read; bring the file back")
    raise InputError(f"{folder} holds neither {MODEL} (a workdir) nor {hf.CONFIG} (an HF folder); give one of these")
  return False


def load_model(folder: str, *, step: int | None = None) -> LoadedModel:
  """Load a workdir (its newest checkpoint, or that of `step`) or an HF folder, weights in the dtype stored there."""
  path = local_path(folder, "--model")
  if not is_workdir(path):
    if step is not None:
      raise InputError(f"--step={step} names a checkpoint of a workdir, and {path} is an HF folder; leave it out")
    config = hf.read_config(path)
    tokenizer = tokens.load(str(path))
    params = hf.load(path, config, dtype=None)
    marked = read_markers(path)
    step = None if marked is None else marked.get("step")
  else:
    check_kinds(path)
    config = read_model(path)
    tokenizer = tokens.load(str(path / TOKENIZER))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype, sharding=here),
      llama.shapes(config),
      is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )
    step, params = load_params(path, abstract, step)
    marked = marked_as(build(read_json(path / CONFIG, "the config of a run")), step)
  if marked is None:
    return LoadedModel(config, params, tokenizer, None, None, None, None, None, step=step)
  # Absent in exports of version 0.2.0.
  confidence, confidence_first = (tuple(marked.get(name) or ()) for name in ("confidence", "confidence_first"))
  marker_ids = tokens.find_markers(
    tokenizer,
    TokenizerConfig(
      path="",
      flag=marked["flag"],
      fix=marked["fix"],
      special=marked["special"],
      confidence=confidence,
      confidence_first=confidence_first,
    ),
  )
  return LoadedModel(
    config,
    params,
    tokenizer,
    Markers(marked["flag"], marked["fix"]),
    marker_ids.flag_id,
    marker_ids.fix_id,
    marked["unit"],
    marked["template"],
    confidence,
    confidence_first,
    marker_ids.confidence_ids,
    step,
  )


def read_model(workdir: pathlib.Path) -> llama.LlamaConfig:
  """Return the config of the model that a workdir trains."""
  path = workdir / MODEL
  return hf_config.config_from_json(read_json(path, "the model of a workdir"), str(path))


def marked_as(config: Config, step: int) -> dict[str, Any]:
  """Return the fields of MARKERS, which an exported folder needs beside HF's files, and the exported step."""
  return {
    "step": step,
    "flag": config.tokenizer.flag,
    "fix": config.tokenizer.fix,
    "special": config.tokenizer.special,
    "confidence": config.tokenizer.confidence,
    "confidence_first": config.tokenizer.confidence_first,
    "unit": config.mistakes.unit,
    "template": config.data.template,
  }


def read_markers(folder: pathlib.Path) -> dict[str, Any] | None:
  """Return the fields that `marked_as` wrote; None for a folder that no run of ours wrote."""
  path = folder / MARKERS
  if not path.exists():
    return None
  marked = read_json(path, "the markers of a model")
  for name, kinds in MARKED.items():
    if not isinstance(marked.get(name), kinds):
      raise InputError(f"{path}: {name} is {marked.get(name)!r:.60}, which no export writes; export the model again")
  return marked

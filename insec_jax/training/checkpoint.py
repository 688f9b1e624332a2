"""Checkpoints of a workdir: saved during training, and restored.

A checkpoint holds the trained parameters, the optimizer state, and as JSON: the step (which is the state of the data),
the running totals of the log, the config, the versions it was written with, a fingerprint of every array (with LoRA of
the frozen ones too), and the SHA-256 of the workdir's other files that change the output of the model. A checkpoint
whose content does not match these is damaged: training resumes from the one before it, and every other program ends and
lists the sound steps.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import stat
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from insec_jax import stop_signal
from insec_jax.command import DivergedError, InputError, is_refusal
from insec_jax.config import Config
from insec_jax.distributed.processes import Processes
from insec_jax.files import buckets
from insec_jax.files.bucket_paths import BucketPath
from insec_jax.training import metrics
from insec_jax.training.fingerprints import array_types, compare_trees, fingerprints, not_finite
from insec_jax.training.layout import (
  CHECKPOINTS,
  DAMAGED,
  check_files,
  describe_checkpoint,
  file_digests,
  versions,
)
from insec_jax.training.step import TrainState

CHUNK_BYTES = 1 << 24  # of a stored array that is not stacked
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
VANISH_SECONDS = 10  # time limit for a run to remove a checkpoint


class Saver:
  """Writer of a workdir's checkpoints.

  The newest `keep` checkpoints stay. All processes of a run make the same calls. Partly written checkpoints of a killed
  or failed save are removed.
  """

  def __init__(self, workdir: pathlib.Path, *, keep: int):
    self._folder, self._is_remote = buckets.location(workdir / CHECKPOINTS), isinstance(workdir, BucketPath)
    self._files = file_digests(workdir)
    newest = ocp.training.preservation_policies.LatestN(keep)
    self._orbax = ocp.training.Checkpointer(self._folder, cleanup_tmp_directories=True, preservation_policy=newest)
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
    base: dict[str, Any] | None = None,
  ):
    """Copy the state to the host and start an asynchronous write.

    `facts` must be the same when the run resumes; `totals` is metrics.Meter.to_json(), `log` metrics.Log.state(), and
    `base` frozen.Frozen.origin of a LoRA run.
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
      "arrays": array_types(arrays),
      "fingerprints": fingerprints(arrays),
      **({} if base is None else {"base": base}),
    }
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = _storage
    context.array.saving.use_compression = False  # of float32 weights zstd saves 8 % of the bytes, for half of the time
    with context:
      self._orbax.save_checkpointables_async(
        step, arrays, force=True, custom_metadata={"run": run, "check": _check(run)}
      )

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
    if self._is_remote:  # the next Saver removes it
      return
    for _ in range(20):
      if not (left := list(self._folder.glob(f"*{UNFINISHED}*"))):
        return
      for path in left:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.05)


def _storage(path, array) -> ocp.options.ArrayOptions.Saving.StorageOptions:
  """Return how an array is stored: a stacked weight in a chunk for each layer, others in chunks of CHUNK_BYTES.

  Readers take a layer, or some rows, without the rest.
  """
  options = ocp.options.ArrayOptions.Saving.StorageOptions
  stacked = any(getattr(key, "key", None) == "layers" for key in path)
  large = array.size * array.dtype.itemsize > CHUNK_BYTES
  return options(shard_axes=(0,)) if stacked else options(chunk_byte_size=CHUNK_BYTES if large else None)


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
    check_files(workdir, run)
    before, now = run["facts"], facts(run["step"])
    if differ := [
      f"{name} is {now[name]}, was {before[name]}; {advise(name, before[name])}"
      for name in now
      if now[name] != before[name]
    ]:
      raise InputError(f"{describe_checkpoint(workdir, run['step'])} cannot be continued: {', '.join(differ)}")

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
  reading = _read(workdir, step, lambda _: expected, lambda run: check_files(workdir, run), processes)
  if reading.problem is None and processes.is_first:
    metrics.check_lines(workdir, step, reading.run.get("log"))
  return reading.problem is None


def set_aside(workdir: pathlib.Path, damaged: Sequence[int]):
  """Move these checkpoints to the folder DAMAGED of the workdir, so that the run can save those steps again."""
  for step in damaged:
    taken = len([name for name in buckets.children(workdir / DAMAGED) if name.startswith(f"{step}")])
    aside = workdir / DAMAGED / (f"{step}-{taken}" if taken else str(step))
    buckets.move(workdir / CHECKPOINTS / str(step), aside)


# Orbax abandons tasks when an array is damaged; asyncio would print a traceback for each in addition to our one line.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class DamageError(Exception):
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
      print(
        f"{describe_checkpoint(workdir, step)} is damaged ({reasons[step]}); it is left out",
        file=sys.stderr,
        flush=True,
      )
  listed = "; ".join(f"{step}: {reason}" for step, reason in reasons.items())
  raise InputError(
    f"{workdir} has no sound checkpoint ({listed}); nothing was changed: bring one back, or begin in another --workdir"
  )


def _attempt(folder: pathlib.Path, step: int, expect, check) -> Reading:
  """Read this process's shards of a checkpoint; errors of the machine (disk, memory) are raised, not called damage."""
  try:
    expected = {}

    def types(run):
      expected.update(expect(run))
      return array_types(expected)

    run = open_checkpoint(folder, step, check, types)
    # The whole tree in one call: Orbax then loads all of it or nothing.
    with _alone():
      return Reading(run, ocp.load_checkpointables(buckets.location(folder), expected), None)
  except (InputError, PermissionError, jax.errors.JaxRuntimeError):  # not the fault of the file
    raise
  except Exception as error:  # Orbax, tensorstore and JSON raise errors of any type for damaged files
    if is_refusal(error):
      raise
    return Reading(None, None, str(error if isinstance(error, DamageError) else _unreadable(error)))


def _alone() -> ocp.Context:
  """Return a context in which each process reads by itself.

  One that finds its shards damaged would otherwise leave the others waiting in a barrier.
  """
  here = jax.process_index()
  context = ocp.Context()
  context.multiprocessing.primary_host, context.multiprocessing.active_processes = here, {here}
  return context


def _unreadable(error: Exception) -> DamageError:
  return DamageError(f"its files cannot be read: {type(error).__name__}")


def open_checkpoint(
  folder: pathlib.Path, step: int, check: Callable[[dict], None], types: Callable[[dict], dict[str, str]]
) -> dict:
  """Return the JSON of a checkpoint whose arrays have the names, dtypes and shapes that `types` maps its JSON to.

  `check` raises for JSON that does not fit. Raises DamageError when the checkpoint is not what was saved, and
  InputError when it holds other arrays.
  """
  try:
    _check_regular(folder)
    with _alone():
      metadata = ocp.checkpointables_metadata(buckets.location(folder))
    run = (metadata.custom_metadata or {}).get("run")
    if run is None or _check(run) != metadata.custom_metadata["check"] or run["step"] != step:
      raise DamageError("its metadata is not what was saved")
    check(run)
    expected = types(run)
    rooms = {name.split("/")[0] for name in expected}
    saved = {name: shape for name, shape in run["arrays"].items() if name.split("/")[0] in rooms}
    compare_trees(f"checkpoint {step} of {folder.parent.parent}", saved=saved, expected=expected)
    if {name: shape for name, shape in array_types(metadata.metadata).items() if name in saved} != saved:
      raise DamageError("its arrays are not those that were saved")
    return run
  except (InputError, PermissionError, DamageError):
    raise
  except Exception as error:
    if is_refusal(error):
      raise
    raise _unreadable(error) from None


def _check_regular(folder: pathlib.Path) -> None:
  """Raise DamageError for an entry that is neither a file nor a folder: reading a FIFO would block for ever.

  Nothing for a checkpoint in a bucket, which has no other entries.
  """
  for path in folder.rglob("*"):
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
      raise DamageError(f"{path.relative_to(folder)} is no file")


def _check(run: dict) -> int:
  return zlib.crc32(json.dumps(run, sort_keys=True).encode())

"""Checkpoints of a workdir, and opening a trained or untouched model for the programs that use one.

A checkpoint holds the parameters, the optimizer state, and as JSON: the step (which is the state of the data), the
running totals of the log, the config, the versions it was written with, a fingerprint of every array, and the SHA-256
of the workdir's other files that change what the model says. One that does not give these back is damaged: training
goes on from the one before it, every other program ends and names the steps that are sound.
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

from insec_jax import config as config_lib
from insec_jax import stop_signal
from insec_jax.command import DivergedError, InputError, is_refusal
from insec_jax.config import Config, TokenizerConfig
from insec_jax.data import tokens
from insec_jax.distributed.processes import Processes, alone
from insec_jax.files import LOCK, is_held, local_path, open_to_read, read_json
from insec_jax.method.transcript import Markers
from insec_jax.model import hf, hf_config, llama
from insec_jax.training import metrics
from insec_jax.training.step import TrainState

DAMAGED = "damaged"  # folder of a workdir where damaged checkpoints lie once a run has gone on without them
CONFIG, MODEL, TOKENIZER, CHECKPOINTS = "config.json", "model.json", "tokenizer", "checkpoints"  # of a workdir
MARKERS = "insec.json"  # of an exported folder: how its text is marked
COVERED = (MODEL, hf.GENERATION)  # and all of TOKENIZER: what a checkpoint keeps the SHA-256 of
EXPLAIN = (metrics.METRICS, "environment.json", "receipt.txt")  # of a workdir
# Of MARKERS. Versions before 0.4.0 wrote no step, and 0.2.0 no confidence.
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
VANISH_SECONDS = 10  # in which a checkpoint that a run is removing is gone
VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint")
# What may change when a run goes on: what is learned does not hang on it. Rows per step are compared by themselves.
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
MINING = ("evaluate.max_tokens", "evaluate.batch_size", "mine.")  # these not, where a run mines what it learns from
MINED = ("mine.",)  # nor these where it was mined before


def versions(packages: Iterable[str] = VERSIONS) -> dict[str, str]:
  """Installed version of each package."""
  return {package: importlib.metadata.version(package) for package in packages}


def check_workdir(workdir: pathlib.Path, config: Config):
  """Nothing; InputError if the folder holds another experiment, or files of a run without its config."""
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
    made = config_lib.build(read_json(path, "the config of a run"))
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
  """Every value of the config by its name on the command line, without `config.`."""
  values = {}
  for name, value in dataclasses.asdict(config).items():
    values |= {f"{name}.{key}": of_key for key, of_key in value.items()} if isinstance(value, dict) else {name: value}
  return values


def steps(workdir: pathlib.Path) -> list[int]:
  """The steps that checkpoints of the workdir hold, oldest first; nothing is written.

  What a kill left half written does not count: Orbax gives a checkpoint its name when it is whole.
  """
  folder = workdir / CHECKPOINTS
  return (
    sorted(int(path.name) for path in folder.iterdir() if STEP.fullmatch(path.name) and path.is_dir())
    if folder.is_dir()
    else []
  )


def check_kinds(workdir: pathlib.Path) -> None:
  """Raise InputError unless what a workdir holds beside its checkpoints is files and folders, each in its place."""
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
  """Return the SHA-256 of each file of the workdir, beside checkpoints and config, that changes what the model says."""
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
  if not (workdir / CONFIG).exists():  # whoever needs it says so
    return
  config = flat(config_lib.build(read_json(workdir / CONFIG, "the config of a run")))
  was = flat(config_lib.build(run["config"]))
  if differ := [key for key in was if was[key] != config[key] and not key.startswith(FREE)]:
    raise InputError(
      f"{workdir / CONFIG} says {differ[0]}={config[differ[0]]!r}, and {_where(workdir, run['step'])} "
      f"was saved with {was[differ[0]]!r}; bring it back as it was"
    )


class Saver:
  """Writes the checkpoints of a workdir; the newest `keep` stay, and those of every `keep_every`-th step (0: of none).

  All processes of a run do the same with it. What a killed or failed save left half written is removed.
  """

  def __init__(self, workdir: pathlib.Path, *, keep: int, keep_every: int):
    self._folder = workdir / CHECKPOINTS
    self._files = file_digests(workdir)
    policies = ocp.training.preservation_policies
    stay = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
    self._orbax = ocp.training.Checkpointer(
      self._folder.absolute(), cleanup_tmp_directories=True, preservation_policy=policies.AnyPreservationPolicy(stay)
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
    """Copy the state to the host and begin to write it.

    `facts` must be the same when the run goes on; `totals` is metrics.Meter.to_json(), `log` metrics.Log.state().
    DivergedError when an array is not finite: nothing could go on from it.
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
    """Wait until every save is whole on disk."""
    self._orbax.wait()

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    # After an error of many processes the save may be waiting for one that is gone.
    if kind is None:
      self._orbax.close()
    elif jax.process_count() == 1:
      with contextlib.suppress(Exception):  # the error that ends the run is reported, a second one is not
        self._orbax.close()
      self._remove_unfinished()

  def _remove_unfinished(self) -> None:
    """Remove what a failed save has left; Orbax's threads may still be writing it."""
    if jax.process_count() > 1:  # another process may be reading it
      return
    for _ in range(20):
      if not (left := list(self._folder.glob(f"*{UNFINISHED}*"))):
        return
      for path in left:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.05)


class RestoredRun(NamedTuple):
  """What a run goes on from; `damaged` are the newer checkpoints that could not be."""

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
  """The state after the newest of these steps whose checkpoint is sound, laid out as `abstract` says.

  InputError unless tree and facts (which may hang on the step) are exactly those saved, or when no checkpoint is sound;
  `advise` says for a fact and its saved value what to do when it differs.
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
  """Whether this checkpoint gives back what was saved; all processes ask together.

  InputError where other files of the workdir, or its metrics up to that step, were changed since.
  """
  expected = {"params": abstract.params, "optimizer": abstract.optimizer}
  reading = _read(workdir, step, lambda _: expected, lambda run: _check_files(workdir, run), processes)
  if reading.problem is None and processes.is_first:
    metrics.check_lines(workdir, step, reading.run.get("log"))
  return reading.problem is None


def load_params(workdir: pathlib.Path, abstract, step: int | None) -> tuple[int, Any]:
  """Return (step, parameters) of the newest checkpoint, or of the one of this step, in the dtype saved.

  InputError when it is damaged: it names the steps that are sound. Also when other files of the workdir were changed
  since, or when there is no such checkpoint.
  """

  def expect(run):
    dtype = run["arrays"]["params/embed"].split("[")[0]
    return {"params": jax.tree.map(lambda leaf: leaf.update(dtype=dtype), abstract)}

  def read(number: int) -> Reading:
    return _read(workdir, number, expect, lambda run: _check_files(workdir, run), alone())

  deadline = time.monotonic() + VANISH_SECONDS
  while True:
    found = steps(workdir)
    if not found:
      raise InputError(f"{workdir} has no checkpoint any more; bring one back, or train again")
    if step is not None and step not in found:
      raise InputError(f"{workdir} has no checkpoint of --step={step}; it has {', '.join(map(str, found))}")
    chosen = found[-1] if step is None else step
    reading = read(chosen)
    if reading.problem is None:
      return chosen, reading.arrays["params"]
    # A run that is still training removes old checkpoints, maybe this one.
    while _is_there(workdir, chosen) and time.monotonic() < deadline and is_held(workdir / LOCK):
      time.sleep(0.2)
    if _is_there(workdir, chosen):
      break
  sound = [number for number in found if number != chosen and read(number).problem is None]
  remedy = (
    f"sound are the steps {', '.join(map(str, sound))}: give --step={sound[-1]}, or let train go on from there"
    if sound
    else "no other one is sound: bring one back"
  )
  raise InputError(f"{_where(workdir, chosen)} is damaged ({reading.problem}); {remedy}")


def _is_there(workdir: pathlib.Path, step: int) -> bool:
  return (workdir / CHECKPOINTS / str(step)).is_dir()


def set_aside(workdir: pathlib.Path, damaged: Sequence[int]):
  """Move these checkpoints to another folder of the workdir, so that the run can save those steps again."""
  for step in damaged:
    (workdir / DAMAGED).mkdir(exist_ok=True)
    taken = len(list((workdir / DAMAGED).glob(f"{step}*")))
    (workdir / CHECKPOINTS / str(step)).rename(workdir / DAMAGED / (f"{step}-{taken}" if taken else str(step)))


# Orbax leaves tasks behind when an array is damaged; asyncio would print a traceback of each beside our one line.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class _DamageError(Exception):
  """A checkpoint is not what was saved."""


class Reading(NamedTuple):
  """A checkpoint as read: what was saved beside the arrays, and the arrays; or what is wrong with it, and None."""

  run: dict | None
  arrays: dict | None
  problem: str | None


def _read(
  workdir, step: int, expect: Callable[[dict], dict], check: Callable[[dict], None], processes: Processes
) -> Reading:
  """Read a checkpoint and compare it with its fingerprints, all processes together.

  `expect` gives the arrays to read. A process reads its own shards: what one finds damaged, all leave out.
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
  """(step, what was saved beside the arrays, arrays, newer steps that are damaged); each of these is printed."""
  reasons = {}
  for step in sorted(among, reverse=True):
    reading = _read(workdir, step, expect, check, processes)
    if reading.problem is None:
      return step, reading.run, reading.arrays, list(reasons)
    reasons[step] = reading.problem
    if processes.is_first:
      print(f"{_where(workdir, step)} is damaged ({reasons[step]}); it is left out", file=sys.stderr, flush=True)
  told = "; ".join(f"{step}: {reason}" for step, reason in reasons.items())
  raise InputError(
    f"{workdir} has no sound checkpoint ({told}); nothing was changed: bring one back, or begin in another --workdir"
  )


def _attempt(folder: pathlib.Path, step: int, expect, check) -> Reading:
  """Read this process's shards of a checkpoint. What the machine refuses is raised, never called damage."""
  here = jax.process_index()
  # Each process for itself: one that finds its part damaged would leave the others waiting for it.
  context = ocp.Context()
  context.multiprocessing.primary_host, context.multiprocessing.active_processes = here, {here}
  folder = folder.absolute()  # Orbax reads nothing else
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
      # The whole tree is asked for at once; Orbax then loads all of it or nothing.
      return Reading(run, ocp.load_checkpointables(folder, expected), None)
  except (InputError, PermissionError, jax.errors.JaxRuntimeError):  # not the fault of the file
    raise
  except Exception as error:  # there is no saying what Orbax, tensorstore and JSON raise for damaged files
    if is_refusal(error):
      raise
    problem = str(error) if isinstance(error, _DamageError) else f"its files cannot be read: {type(error).__name__}"
    return Reading(None, None, problem)


def _check_regular(folder: pathlib.Path) -> None:
  """Raise _DamageError for what is neither a file nor a folder: reading a FIFO would wait for ever."""
  for path in folder.rglob("*"):
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
      raise _DamageError(f"{path.relative_to(folder)} is no file")


def _check(run: dict) -> int:
  return zlib.crc32(json.dumps(run, sort_keys=True).encode())


def fingerprints(tree) -> dict[str, int]:
  """A number for each array that any flipped bit changes, wherever its shards lie: a sum of the bits of all elements,
  each times its own odd number, modulo 2**32."""
  leaves = jax.tree.leaves(tree)
  numbers = jax.device_get(_fingerprint_sums(leaves))
  return dict(zip(_leaves(tree), numbers.tolist(), strict=True))


@jax.jit
def _fingerprint_sums(leaves):
  def of_leaf(leaf):
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
      position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return (bits * (2 * position + 1)).sum(dtype=jnp.uint32)

  return jnp.stack([of_leaf(leaf) for leaf in leaves])


def not_finite(tree) -> list[str]:
  """Return the names of the arrays that hold NaN or infinity; all processes ask together."""
  are_finite = jax.device_get(_are_finite(jax.tree.leaves(tree)))
  return [name for name, is_finite in zip(_leaves(tree), are_finite, strict=True) if not is_finite]


@jax.jit
def _are_finite(leaves):
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def _where(workdir: pathlib.Path, step: int) -> str:
  return f"checkpoint {step} of {workdir}"


def compare_trees(where: str, *, saved: dict[str, str], expected: dict[str, str]):
  """Nothing; InputError that names the first array that is missing, unexpected or of another shape or dtype."""
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
    # The same node is a named field in an optax state and a plain key in what Orbax read back.
    return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))

  return {
    "/".join(map(word, path)): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


class LoadedModel(NamedTuple):
  """A model ready for use. Of a folder that no run of ours wrote, all that concerns markers is None."""

  config: llama.LlamaConfig
  params: Any
  tokenizer: PreTrainedTokenizerFast
  markers: Markers | None
  flag_id: int | None  # None as well where the markers are plain words
  fix_id: int | None
  unit: str | None  # mistakes.unit and data.template it was trained with
  template: str | None
  confidence: tuple[float, ...] = ()  # tokenizer.confidence and tokenizer.confidence_first it was trained with
  confidence_first: tuple[float, ...] = ()
  confidence_ids: tuple[int, ...] = ()
  step: int | None = None  # of the checkpoint, where it comes from one


def is_workdir(folder: pathlib.Path) -> bool:
  """Whether the folder is a run's workdir with a checkpoint; InputError if it is no model at all."""
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
  """Open a workdir (its newest checkpoint, or that of `step`) or an HF folder, weights in the dtype stored there."""
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
    marked = marked_as(config_lib.build(read_json(path / CONFIG, "the config of a run")), step)
  if marked is None:
    return LoadedModel(config, params, tokenizer, None, None, None, None, None, step=step)
  # Version 0.2.0 wrote none.
  confidence, confidence_first = (tuple(marked.get(name) or ()) for name in ("confidence", "confidence_first"))
  found = tokens.find_markers(
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
    found.flag_id,
    found.fix_id,
    marked["unit"],
    marked["template"],
    confidence,
    confidence_first,
    found.confidence_ids,
    step,
  )


def read_model(workdir: pathlib.Path) -> llama.LlamaConfig:
  """The config of the model that a workdir trains."""
  path = workdir / MODEL
  return hf_config.config_from_json(read_json(path, "the model of a workdir"), str(path))


def marked_as(config: Config, step: int) -> dict[str, Any]:
  """Return what an exported folder must say of its text beside what HF says, and the step it was exported at."""
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
  """What `marked_as` said, or None for a folder that no run of ours wrote."""
  path = folder / MARKERS
  if not path.exists():
    return None
  marked = read_json(path, "the markers of a model")
  for name, kinds in MARKED.items():
    if not isinstance(marked.get(name), kinds):
      raise InputError(f"{path}: {name} is {marked.get(name)!r:.60}, which no export writes; export the model again")
  return marked

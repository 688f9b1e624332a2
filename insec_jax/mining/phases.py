"""Phases of a run with rounds: what is made with the weights before each part of the steps, and the part's data.

      mining     round_K.jsonl has records (miner.py), mixed with the config's data
      policy     round_K.jsonl has samples with advantages (policy.py), round_K.logps.json the log p of their tokens
      distill    round_K.jsonl has own corrections of own mistakes, and hints (distill.py)

The log p are measured once, before the first step of the round, and read again by a run that resumes.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import corrections, samples
from insec_jax.data.packing import Rows
from insec_jax.data.pipeline import Data
from insec_jax.data.samples import SampledRows
from insec_jax.distributed.processes import Processes
from insec_jax.files import buckets, hub
from insec_jax.files.reading import read_json
from insec_jax.files.writing import write_text
from insec_jax.method.roles import CORRECTION, FLAG, NAMES, NO_NEGATIVE, REASON
from insec_jax.mining import rounds
from insec_jax.model.llama import LlamaConfig
from insec_jax.model.markings import read_markers
from insec_jax.training.fingerprints import fingerprint
from insec_jax.training.run import Phases, Run, first_params, load_data, rows_of

Logps = Callable[[Rows, object], np.ndarray]


def phases_of(config: Config, workdir: pathlib.Path, mesh: Mesh, processes: Processes) -> Phases:
  """Return the phases of a run: one for each round; one without a number if there are no rounds."""

  def mine(number: int, trained, run: Run, logps: Logps | None, *, stopped: Callable[[], bool]) -> str | None:
    del logps
    params = run.all_params(trained)
    return rounds.mine(config, workdir, number, params, run.config, run.tokenizer, processes, stopped=stopped)

  def load(number: int | None, tokenizer: PreTrainedTokenizerFast, model_config: LlamaConfig) -> Data:
    return load_data(rounds.round_config(config, workdir, number), tokenizer, model_config)

  record = functools.partial(rounds.write_receipt, workdir)
  starts, policy = rounds.starts(config), PolicyRounds(config, workdir, mesh, processes)
  if config.policy.is_on:
    return Phases(starts, policy.load, policy.prepare, record, policy.values, policy.first)
  return Phases(starts, load, mine, record, lambda _: {}, policy.first)


class PolicyRounds:
  """Rounds of sampling: texts, for a policy gradient the log p of their tokens, and the rows that a round trains on."""

  def __init__(self, config: Config, workdir: pathlib.Path, mesh: Mesh, processes: Processes):
    self._config, self._workdir, self._mesh, self._processes = config, workdir, mesh, processes
    self._base = functools.cache(functools.partial(load_data, config))  # held-out rows

  def load(self, number: int | None, tokenizer: PreTrainedTokenizerFast, model_config: LlamaConfig) -> Data:
    """Return the data of a round, with the config's held-out rows; for None the config's data."""
    base = self._base(tokenizer, model_config)
    if number is None:
      return base
    rows = self._pack(number, tokenizer)
    if not self._config.policy.distills:
      path = logps_path(self._workdir, number)
      held = read_json(path, "the log p of a round")
      old_BT, reference_BT = (_unpacked(held.get(name), rows, path) for name in ("old", "reference"))
      rows = SampledRows(**vars(rows), old_BT=old_BT, reference_BT=reference_BT)
    return dataclasses.replace(
      base,
      train=rows,
      receipt=self._receipt(number, rows),
      digest=rows.digest(),
      most_token=max(rows.largest("token"), base.heldout.largest("token")),
      most_position=max(rows.largest("position"), base.heldout.largest("position")),
    )

  def prepare(self, number: int, trained, run: Run, logps: Logps | None, *, stopped: Callable[[], bool]) -> str | None:
    """Sample with these trained weights, and measure the log p; return the summary, None if `stopped` returned True."""
    if number == 1:
      self._check_start()
    params = run.all_params(trained)
    text = rounds.mine(
      self._config, self._workdir, number, params, run.config, run.tokenizer, self._processes, stopped=stopped
    )
    if text is None:
      return None
    if not rounds.mined_path(self._workdir, number).stat().st_size:
      none = (
        "no sample has a mistake that the task can correct"
        if self._config.policy.distills
        else "the samples of each problem have equal rewards, so none has an advantage"
      )
      raise InputError(
        f"round {number}: {none}; raise mine.num_problems or mine.samples, or stop here: the checkpoint before this "
        "round is whole"
      )
    if logps is not None:
      self._measure(number, trained, fingerprint(params), run, logps)
    return text

  def values(self, number: int) -> dict[str, float]:
    """Return the values of a round for its lines of metrics.jsonl."""
    held = read_json(rounds.mined_path(self._workdir, number).with_suffix(".json"), "what a round found")
    return rounds.summary_of(self._config, held["found"]).values()

  def _measure(self, number: int, trained, weights: str, run: Run, logps: Logps) -> None:
    """Write the log p of the samples under the trained weights and the reference, unless the file has them."""
    processes, path = self._processes, logps_path(self._workdir, number)
    about = {"weights": weights, "samples": rounds.digest(rounds.mined_path(self._workdir, number))}
    is_there = processes.gather(f"the log p of round {number}", processes.is_first and _is_about(path, about))[0]
    if not is_there:
      packed = self._pack(number, run.tokenizer)
      old_BT = reference_BT = logps(packed, trained)
      if number > 1 and self._config.policy.kl:
        reference_BT = logps(packed, self.first(run))
      if processes.is_first:
        values = {"old": _flat(old_BT, packed), "reference": _flat(reference_BT, packed)}
        write_text(path, json.dumps({**about, **values}) + "\n")
        buckets.publish(path)
    rounds.share(path, f"the file of log p of round {number}", processes)

  def first(self, run: Run):
    """Return the trained parameters before the first step, read or drawn again; InputError if they are others."""
    params = first_params(self._config, run, self._mesh)
    processes, path = self._processes, rounds.mined_path(self._workdir, 1).with_suffix(".json")
    is_sampled = processes.is_first and (bool(run.first) or path.is_file())
    was = read_json(path, "what a round found").get("weights") if is_sampled else None
    was = processes.gather("the weights that sampled first", was)[0]  # a file may be seen late elsewhere
    if was is not None and was != fingerprint(run.all_params(params)):
      key = "policy.teacher" if self._config.policy.distills else "policy.kl"
      raise InputError(
        f"model.path={self._config.model.path!r} has other weights than the run began with, which {key} reads; bring "
        "them back, or begin in another --workdir"
      )
    return params

  def _check_start(self) -> None:
    """Raise InputError unless the starting weights write confidence tokens and rewind exactly as the config says."""
    config, marked = self._config, None
    if config.model.path:
      marked = read_markers(hub.model_folder(config.model.path, "model.path", weights=False))
    was = {
      "tokenizer.confidence": tuple((marked or {}).get("confidence") or ()),
      "tokenizer.confidence_first": tuple((marked or {}).get("confidence_first") or ()),
      "mistakes.rewind": bool((marked or {}).get("rewind")),
    }
    now = (config.tokenizer.confidence, config.tokenizer.confidence_first, config.mistakes.rewind)
    for (name, value), given in zip(was.items(), now, strict=True):
      if value != given:
        raise InputError(
          f"{name}={given!r}, and the weights that policy.method={config.policy.method!r} begins with were trained "
          f"with {value!r}; give that value"
        )

  def _pack(self, number: int, tokenizer: PreTrainedTokenizerFast) -> Rows:
    path = rounds.mined_path(self._workdir, number)
    if not path.is_file():
      raise InputError(f"{path} is gone, and the run was trained on it; bring it back, or begin in another --workdir")
    if self._config.policy.distills:
      return corrections.pack(corrections.read(path), tokenizer, self._config)
    return samples.pack(samples.read(path), tokenizer, self._config)

  def _receipt(self, number: int, rows: Rows) -> str:
    """Return what the round trains on, as a few lines of text."""
    config = self._config
    first_of = {of_round: first for first, of_round in rounds.starts(config).items()}
    num_steps = first_of.get(number + 1, config.train.steps + 1) - first_of[number]
    read = num_steps * rows_of(config, self._mesh) * config.data.accumulation
    num_tokens = int((rows.segment_BT > 0).sum())
    return "\n".join(
      (
        *(_of_corrections(rows, config) if config.policy.distills else _of_samples(rows, num_tokens)),
        f"rows              {len(rows):,} of {config.data.row_length:,} tokens, "
        f"{1 - num_tokens / rows.token_BT.size:.1%} padding",
        f"rows read         {read:,} in the {num_steps:,} steps of the round: each {read / len(rows):.2f} times\n",
      )
    )


def _of_samples(rows: Rows, num_tokens: int) -> tuple[str, ...]:
  """Return the lines of a receipt about samples with advantages."""
  num_trained = int((rows.weight_BT != 0).sum())
  return (
    f"samples           {int(rows.segment_BT.max(1).sum()):,} with an advantage, all others are left out",
    f"trained tokens    {num_trained:,} of {num_tokens:,} ({num_trained / num_tokens:.1%}), weight: the advantage",
  )


def _of_corrections(rows: Rows, config: Config) -> tuple[str, ...]:
  """Return the lines of a receipt about corrections: tokens and weights by role, and flags to avoid."""
  is_trained_BT = rows.weight_BT != 0
  of_roles = (
    f"{name} {int((is_trained_BT & (rows.role_BT == role)).sum()):,} (weight {config.loss.weight_R[role]:g})"
    for role, name in enumerate(NAMES)
    if role in (FLAG, REASON, CORRECTION)
  )
  num_avoided = int((rows.negative_BT != NO_NEGATIVE).sum())
  return (
    f"texts             {int(rows.segment_BT.max(1).sum()):,}, of which those with a mistake have a teacher",
    f"trained tokens    {', '.join(of_roles)}",
    f"flags avoided     {num_avoided:,} right steps (weight {config.policy.no_flag:g})",
  )


def logps_path(workdir: pathlib.Path, number: int) -> pathlib.Path:
  """Return the path of the log p of a round's samples."""
  return rounds.mined_path(workdir, number).with_suffix(".logps.json")


def _is_about(path: pathlib.Path, about: dict[str, str]) -> bool:
  """Return whether the file has the log p of these samples under these weights."""
  try:
    held = read_json(path, "the log p of a round") if path.is_file() else {}
  except InputError:  # damaged: measured again with the same result
    return False
  return all(held.get(name) == value for name, value in about.items())


def _flat(logp_BT: np.ndarray, packed: Rows) -> list[float]:
  """Return the log p of the trained tokens, row after row."""
  return logp_BT[packed.weight_BT != 0].tolist()


def _unpacked(values, packed: Rows, path: pathlib.Path) -> np.ndarray:
  """Return the values that `_flat` wrote, as rows."""
  is_trained_BT = packed.weight_BT != 0
  if not isinstance(values, list) or len(values) != is_trained_BT.sum():
    raise InputError(f"{path} does not fit the samples beside it; bring it back, or begin in another --workdir")
  logp_BT = np.zeros(is_trained_BT.shape, np.float32)
  logp_BT[is_trained_BT] = values
  return logp_BT

"""Rounds: a run that mines its own mistakes before each of its equal parts.

      steps 1 .. 10, rounds=3      1 2 3 | 4 5 6 | 7 8 9 10
      mined before                 1       4       7             DIR/mined/round_1.jsonl, round_2, round_3

A round is a pure function of the config and of the weights with which it begins: cut short it goes on, mined already it
is not mined again, and with other weights (a run resumed on another mesh, from before) it is mined anew.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import tokens
from insec_jax.distributed.processes import Processes
from insec_jax.files import read_json, write_text
from insec_jax.generation.generator import TextGenerator
from insec_jax.method import tasks
from insec_jax.method.transcript import Markers
from insec_jax.mining.chunks import ChunkStore
from insec_jax.mining.miner import Miner, MiningSummary, fingerprint, join, mine_chunks, seed_of
from insec_jax.model.llama import LlamaConfig
from insec_jax.training.checkpoint import LoadedModel

FOLDER = "mined"  # of a workdir
SHARED_SECONDS = 60  # in which a file on a network drive shows on another host


def starts(config: Config) -> dict[int, int]:
  """The number of each round, from 1, by its first step; none without rounds."""
  return {1 + number * config.train.steps // config.rounds: number + 1 for number in range(config.rounds)}


def mined_path(workdir: pathlib.Path, number: int) -> pathlib.Path:
  """Where the records of a round lie; its counts lie beside them as .json, and with the mask receipt as .txt."""
  return workdir / FOLDER / f"round_{number}.jsonl"


def round_config(config: Config, workdir: pathlib.Path, number: int | None) -> Config:
  """The config with the records of this round mixed in, as if it named their file.

  A model that makes no mistake gives no record: that round is trained on the others alone. InputError when there would
  be none of these either, or the file is gone.
  """
  if number is None:
    return config
  path = mined_path(workdir, number)
  if not path.is_file():
    raise InputError(f"{path} is gone, and the run was trained on it; bring it back, or begin in another --workdir")
  if path.stat().st_size:
    mistakes = dataclasses.replace(config.mistakes, mined_path=str(path))
  elif config.mistakes.mined == 1:
    raise InputError(
      f"round {number} found no mistake, and mistakes.mined=1 leaves nothing else to train on; raise "
      "mine.num_problems, or lower mistakes.mined"
    )
  else:
    mistakes = dataclasses.replace(config.mistakes, mined=0.0)
  return dataclasses.replace(config, mistakes=mistakes)


def mine(
  config: Config,
  workdir: pathlib.Path,
  number: int,
  params,
  model_config: LlamaConfig,
  tokenizer: PreTrainedTokenizerFast,
  processes: Processes,
  *,
  stopped: Callable[[], bool],
) -> str | None:
  """What was found, as text; the records of the round are there, for every process of the run, which all call this.

  Each mines its share on its own first device, which must hold the model. None when `stopped` said so.
  """
  path, weights = mined_path(workdir, number), fingerprint(params)
  told = processes.gather(f"the look for round {number}", _told_before(path, weights) if processes.is_first else None)[
    0
  ]
  if told is None:
    miner = _miner(config, number, params, weights, model_config, tokenizer)
    parts = ChunkStore(str(path), miner.header)
    if processes.is_first:
      path.parent.mkdir(exist_ok=True)
      parts.discard_others()
    processes.gather(f"the beginning of round {number}", None)
    if not mine_chunks(miner, parts, process=processes.index, num_processes=processes.num, stopped=stopped):
      return None
    processes.gather(f"the end of mining round {number}", None)
    told = _join(config, number, parts, miner.num_chunks, path, weights) if processes.is_first else None
  told, digest = processes.gather(
    f"the records of round {number}", [told, _digest(path)] if processes.is_first else None
  )[0]
  if not _soon(lambda: path.is_file() and _digest(path) == digest):
    raise RuntimeError(f"{path}, which process 0 wrote, cannot be seen here within {SHARED_SECONDS} s")
  return told


def _told_before(path: pathlib.Path, weights: str) -> str | None:
  """What was found when these weights mined the records that lie there; None when no or others did."""
  summary = path.with_suffix(".json")
  if not path.is_file() or not summary.is_file():
    return None
  try:
    before = read_json(summary, "what a round found")
    same = before["weights"] == weights and before["sha256"] == _digest(path)
    return str(MiningSummary(**before["found"])) if same else None
  except (InputError, KeyError, TypeError, AttributeError):  # damaged: the same weights mine the same records again
    return None


def _join(config: Config, number: int, parts: ChunkStore, num_chunks: int, path: pathlib.Path, weights: str) -> str:
  """What all processes found, as text; records and counts are on disk."""
  seed = seed_of(config.seed, number)
  # On a network drive the last lines of another process may show late.
  if not _soon(lambda: len(parts.read()) == num_chunks):
    raise RuntimeError(f"{parts.folder} lacks chunks that other processes wrote, {SHARED_SECONDS} s after they ended")
  mined = parts.join(num_chunks, lambda chunks: join(chunks, str(path), right=config.mine.right, seed=seed))
  summary = {"round": number, "weights": weights, "sha256": _digest(path), "found": dataclasses.asdict(mined)}
  write_text(path.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")
  return str(mined)


def _miner(
  config: Config, number: int, params, weights: str, model_config: LlamaConfig, tokenizer: PreTrainedTokenizerFast
) -> Miner:
  """A miner with these parameters on the first device of this process."""
  if jax.process_count() > 1:
    params = multihost_utils.process_allgather(params, tiled=True)
  params = jax.device_put(params, jax.local_devices()[0])
  marked = tokens.find_markers(tokenizer, config.tokenizer)
  # Before the first round no token of confidence has been read: the model writes as if it had none.
  confidence, confidence_first, ids = (
    (config.tokenizer.confidence, config.tokenizer.confidence_first, marked.confidence_ids)
    if number > 1
    else ((), (), ())
  )
  opened = LoadedModel(
    model_config,
    params,
    tokenizer,
    Markers(config.tokenizer.flag, config.tokenizer.fix),
    marked.flag_id,
    marked.fix_id,
    config.mistakes.unit,
    config.data.template,
    confidence,
    confidence_first,
    ids,
  )
  return Miner(
    TextGenerator(opened, compute=config.precision.compute),
    tasks.get(config.task),
    config,
    seed=seed_of(config.seed, number),
    weights=weights,
  )


def _digest(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _soon(holds: Callable[[], bool]) -> bool:
  """Whether it holds within SHARED_SECONDS."""
  deadline = time.monotonic() + SHARED_SECONDS
  while not (held := holds()) and time.monotonic() < deadline:
    time.sleep(0.5)
  return held

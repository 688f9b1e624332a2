"""Rounds: a run is split into equal parts; before each its own mistakes are mined, or it samples for a policy.

      steps 1 .. 10, rounds=3      1 2 3 | 4 5 6 | 7 8 9 10
      mined before                 1       4       7             DIR/mined/round_1.jsonl, round_2, round_3

A round is a pure function of the config and of the weights at its start. Interrupted mining resumes, a finished round
is not mined again, and with other weights (a run resumed on another mesh, from an earlier step) it is mined anew.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.distributed.processes import Processes
from insec_jax.files import buckets
from insec_jax.files.chunks import ChunkStore, one_process
from insec_jax.files.reading import read_json
from insec_jax.files.writing import write_text
from insec_jax.generation import loading
from insec_jax.generation.generator import TextGenerator
from insec_jax.method import tasks
from insec_jax.mining import distill
from insec_jax.mining.distill import CorrectionSampler, CorrectionSummary
from insec_jax.mining.miner import Miner, chunk_store, derive_seed, mine_chunks
from insec_jax.mining.policy import PolicySampler, PolicySummary
from insec_jax.mining.policy import join as join_samples
from insec_jax.mining.records import MiningSummary, join
from insec_jax.model.llama import LlamaConfig
from insec_jax.training.fingerprints import fingerprint

FOLDER = "mined"  # of a workdir
SHARED_SECONDS = 60  # until a file on a network drive must be visible on another host


def starts(config: Config) -> dict[int, int]:
  """Return the number of each round, from 1, by its first step; none without rounds."""
  return {1 + number * config.train.steps // config.rounds: number + 1 for number in range(config.rounds)}


def mined_path(workdir: pathlib.Path, number: int) -> pathlib.Path:
  """Return the path of a round's records; its counts have the same name as .json, with the mask receipt as .txt."""
  return workdir / FOLDER / f"round_{number}.jsonl"


def round_config(config: Config, workdir: pathlib.Path, number: int | None) -> Config:
  """Return the config with the records of this round mixed in, as if it named their file.

  A model that makes no mistake gives no record: that round is trained on the other records alone. Raises InputError
  when there are no others either, or the file is missing.
  """
  if number is None:
    return config
  path = mined_path(workdir, number)
  if not path.is_file():
    raise InputError(f"{path} is gone, and the run was trained on it; bring it back, or begin in another --workdir")
  if path.stat().st_size:
    mistakes = dataclasses.replace(config.mistakes, mined_path=f"{path}")
  elif config.mistakes.mined == 1:
    raise InputError(
      f"round {number} found no mistake, and mistakes.mined=1 leaves nothing else to train on; raise "
      "mine.num_problems, or lower mistakes.mined"
    )
  else:
    mistakes = dataclasses.replace(config.mistakes, mined=0.0, view="full")
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
  """Mine the round on all processes of the run, which all call this, and return the summary as text.

  Each process mines its part on its own devices, which must hold the model together. Afterwards every process can read
  the records. None when `stopped` returned True on any process.
  """
  path, weights = mined_path(workdir, number), fingerprint(params)
  summary = processes.gather(
    f"the look for round {number}", _earlier_summary(config, path, weights) if processes.is_first else None
  )[0]
  if summary is None:
    miner = _miner(config, number, params, weights, model_config, tokenizer)
    store = chunk_store(f"{path}", miner)
    if processes.is_first:
      path.parent.mkdir(exist_ok=True)
      store.discard_others()
    processes.gather(f"the beginning of round {number}", None)
    with one_process(f"{path}", processes.index):
      finished = mine_chunks(miner, store, process=processes.index, num_processes=processes.num, stopped=stopped)
    if not all(processes.gather(f"the end of mining round {number}", finished)):
      return None
    summary = _join(config, number, store, miner.num_chunks, path, weights) if processes.is_first else None
  summary = processes.gather(f"the summary of round {number}", summary)[0]
  share(path, f"the records of round {number}", processes)
  return summary


def share(path: pathlib.Path, what: str, processes: Processes) -> None:
  """Wait until every process sees the file as process 0 wrote it; all call this. `what` names it in errors."""
  written = processes.gather(what, digest(path) if processes.is_first else None)[0]
  if not _holds_soon(lambda: (processes.is_first or buckets.refresh(path)) and digest(path) == written):
    raise RuntimeError(f"{path}, which process 0 wrote, cannot be seen here within {SHARED_SECONDS} s")


Summary = MiningSummary | PolicySummary | CorrectionSummary
SUMMARIES: dict[str, type] = {"none": MiningSummary, "gradient": PolicySummary, "distill": CorrectionSummary}
WORKERS: dict[str, type] = {"none": Miner, "gradient": PolicySampler, "distill": CorrectionSampler}


def summary_of(config: Config, found: dict[str, Any]) -> Summary:
  """Return the summary of a round from its JSON; TypeError where it is another object."""
  return SUMMARIES[config.policy.method](**found)


def _earlier_summary(config: Config, path: pathlib.Path, weights: str) -> str | None:
  """Return the summary if these weights mined the existing records; None when other weights did, or none exist."""
  summary = path.with_suffix(".json")
  if not path.is_file() or not summary.is_file():
    return None
  try:
    before = read_json(summary, "what a round found")
    same = before["weights"] == weights and before["sha256"] == digest(path)
    return str(summary_of(config, before["found"])) if same else None
  except (InputError, KeyError, TypeError, AttributeError):  # damaged: mined again with the same result
    return None


def _join(config: Config, number: int, store: ChunkStore, num_chunks: int, path: pathlib.Path, weights: str) -> str:
  """Write the records and counts of all processes and return their summary as text."""
  seed = derive_seed(config.seed, number)
  # On a network drive the last lines of another process may become visible late.
  if not _holds_soon(lambda: len(store.read()) == num_chunks):
    raise RuntimeError(f"{store.folder} lacks chunks that other processes wrote, {SHARED_SECONDS} s after they ended")

  def written(chunks: list[dict[str, Any]]) -> Summary:
    if config.policy.method == "gradient":
      return join_samples(chunks, f"{path}")
    of_method = distill.join if config.policy.distills else join
    return of_method(chunks, f"{path}", right=config.mine.right, seed=seed)

  mined = store.join(num_chunks, written)
  summary = {"round": number, "weights": weights, "sha256": digest(path), "found": dataclasses.asdict(mined)}
  write_text(path.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")
  buckets.publish(path.with_suffix(".json"))
  return str(mined)


def write_receipt(workdir: pathlib.Path, number: int, text: str) -> None:
  """Write the summary and the mask receipt of a round."""
  path = mined_path(workdir, number).with_suffix(".txt")
  write_text(path, text)
  buckets.publish(path)


def _miner(
  config: Config, number: int, params, weights: str, model_config: LlamaConfig, tokenizer: PreTrainedTokenizerFast
) -> Miner | PolicySampler | CorrectionSampler:
  """Return what works in a round, with these parameters in the layout of decoding on the devices of this process."""
  # Before the first round of mining the model was not trained on transcripts; a policy begins with one that was.
  is_marked = number > 1 or config.policy.is_on
  loaded = loading.from_training(params, model_config, tokenizer, config, is_marked=is_marked)
  return WORKERS[config.policy.method](
    TextGenerator(loaded),
    tasks.get(config.task),
    config,
    seed=derive_seed(config.seed, number),
    weights=weights,
  )


def digest(path: pathlib.Path) -> str:
  """Return the SHA-256 of a file."""
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _holds_soon(holds: Callable[[], bool]) -> bool:
  """Return whether it holds within SHARED_SECONDS."""
  deadline = time.monotonic() + SHARED_SECONDS
  while not (held := holds()) and time.monotonic() < deadline:
    time.sleep(0.5)
  return held

"""Start of a run from weights, and resumption from a checkpoint."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import pipeline, template, vocabulary
from insec_jax.distributed.processes import Processes
from insec_jax.files import hub
from insec_jax.model import attention, build, llama, sharding
from insec_jax.training import checkpoint, layout, optimizer
from insec_jax.training import step as step_lib
from insec_jax.training.step import TrainState


class Phases(NamedTuple):
  """Phases of a run, each with its own data; a run that mines nothing is one phase without a number.

  number_of: first step of a phase -> its number.
  config: number of a phase (None: the phase without one) -> config of its data.
  prepare: (number, params, run, stopped) -> text about the data of a phase that is about to begin; None if `stopped()`
    has become true.
  record: (number, text) -> None; stores text and mask receipt of a phase.
  """

  number_of: dict[int, int]
  config: Callable[[int | None], Config]
  prepare: Callable[..., str | None]
  record: Callable[[int, str], None]

  def number_at(self, step: int) -> int | None:
    """Return the number of the phase that contains the step; None where it has no number."""
    return max((number for first, number in self.number_of.items() if first <= step), default=None)


class Run(NamedTuple):
  """Run ready for its next step; `first` steps are done.

  `totals` is metrics.Meter.to_json() and `log` metrics.Log.state() after these steps; both None before the first.
  `data` is that of the last step done; before the first round is mined, the config's data without mined records.
  """

  config: llama.LlamaConfig
  tokenizer: PreTrainedTokenizerFast
  data: pipeline.Data
  state: TrainState
  shardings: TrainState
  first: int
  totals: list | None
  log: dict[str, int] | None = None


def begin(config: Config, mesh: Mesh, processes: Processes) -> Run:
  """Return the run before its first step: weights from model.path, or random ones of model.size, drawn by the seed."""
  tokenizer = vocabulary.open_tokenizer(config).tokenizer
  # All use the date of process 0. It is saved with the tokenizer for resumption, generate and export.
  template.fix_date(tokenizer, processes.gather("the date", template.today() if processes.is_first else None)[0])
  before = build.starting_model(config, tokenizer)
  vocab_size = build.vocabulary_for(len(tokenizer), before.vocab_size)
  model_config = dataclasses.replace(before, vocab_size=vocab_size)
  data = load_data(config, tokenizer, model_config)
  processes.agree("commits of the Hub", hub.commits())
  processes.agree("data", data_fingerprint(config, data, mesh))
  tx = optimizer.make(config.optimizer, config.train.steps)
  shardings = step_lib.shardings_of(step_lib.abstract_state(model_config, config.precision.params, tx, mesh))
  params = build.starting_params(config, before, vocab_size, mesh, shardings.params)
  if config.model.path and vocab_size > before.vocab_size:
    processes.say(
      f"the tokenizer has {len(tokenizer)} tokens, the model {before.vocab_size}: grown to {vocab_size}, a "
      f"multiple of {build.VOCAB_MULTIPLE}; new rows are the mean of the old ones",
    )
  state = jax.jit(lambda params: step_lib.new_state(params, tx), out_shardings=shardings, donate_argnums=0)(params)
  return Run(model_config, tokenizer, data, state, shardings, 0, None)


def resume(
  config: Config, mesh: Mesh, workdir: pathlib.Path, found: list[int], phases: Phases, processes: Processes
) -> tuple[Run, list[int]]:
  """Return (run after the newest sound checkpoint of the steps found, damaged newer steps); model.path is not read."""
  model_config = layout.read_model(workdir)
  tokenizer = vocabulary.load(str(workdir / layout.TOKENIZER))
  tx = optimizer.make(config.optimizer, config.train.steps)
  abstract = step_lib.abstract_state(model_config, config.precision.params, tx, mesh)

  @functools.cache
  def phase_data(number: int | None) -> pipeline.Data:
    return load_data(phases.config(number), tokenizer, model_config)

  def facts(step: int) -> dict[str, Any]:
    return data_fingerprint(config, phase_data(phases.number_at(step)), mesh)

  processes.agree("data", facts(found[-1]))
  state, totals, log, last, damaged = checkpoint.restore(
    workdir,
    found,
    abstract,
    facts=facts,
    processes=processes,
    advise=lambda name, was: (
      same_rows(config, mesh, was) if name == ROWS else "bring it back, or begin in another --workdir"
    ),
  )
  processes.say(f"resuming {workdir} after step {last}")
  data = phase_data(phases.number_at(last))
  return Run(model_config, tokenizer, data, state, step_lib.shardings_of(abstract), last, totals, log), damaged


def is_trained(config: Config, mesh: Mesh, workdir: pathlib.Path, processes: Processes) -> bool:
  """Return whether the checkpoint of the last step is sound."""
  tx = optimizer.make(config.optimizer, config.train.steps)
  abstract = step_lib.abstract_state(layout.read_model(workdir), config.precision.params, tx, mesh)
  return checkpoint.is_sound(workdir, config.train.steps, abstract, processes)


ROWS = "the number of rows a step (data.rows_per_device, data.accumulation, mesh)"


def data_fingerprint(config: Config, data: pipeline.Data, mesh: Mesh) -> dict[str, Any]:
  """Return rows per step and a digest of the rows; a resumed run with others would silently train on other batches."""
  return {
    ROWS: rows_of(config, mesh) * config.data.accumulation,
    "the data (SHA-256 of the rows to train on)": data.digest[:16],
  }


def same_rows(config: Config, mesh: Mesh, rows: int) -> str:
  """Return advice on the values that give this number of rows per step on this mesh."""
  num = rows_of(config, mesh) // config.data.rows_per_device
  if rows % num:
    fit = [size for size in range(1, rows + 1) if rows % size == 0]
    return (
      f"{num} devices along data and fsdp cannot share {rows} rows: use {', '.join(map(str, fit))} (mesh.tensor "
      "takes the others), or begin in another --workdir"
    )
  rows_each = rows // num
  pairs = [f"{size} and {rows_each // size}" for size in range(rows_each, 0, -1) if rows_each % size == 0]
  return f"give data.rows_per_device and data.accumulation {', or '.join(pairs)}"


def rows_of(config: Config, mesh: Mesh) -> int:
  """Return the rows of one micro-batch over all devices; `tensor` does not split the batch."""
  return config.data.rows_per_device * sharding.size_over(mesh, sharding.BATCH)


def load_data(config: Config, tokenizer: PreTrainedTokenizerFast, model_config: llama.LlamaConfig) -> pipeline.Data:
  """Return the rows of the config; InputError if one has a token or a position that the model does not have."""
  data = pipeline.load_data(config, tokenizer)
  if data.most_token >= model_config.vocab_size:
    raise InputError(
      f"the tokenizer gives token {data.most_token}, the model has {model_config.vocab_size}; "
      "use the tokenizer that belongs to the model"
    )
  if data.most_position >= model_config.max_positions:
    raise InputError(
      f"a record has {data.most_position + 1} tokens, the model has {model_config.max_positions} "
      "positions; leave out longer records"
    )
  return data


def choose_attention(config: Config, model_config: llama.LlamaConfig, device) -> tuple[attention.Attention, str]:
  """Return the attention of this run on devices like `device`, and the reason for it."""
  return attention.choose(
    device.platform,
    device_kind=device.device_kind,
    head_width=model_config.head_width,
    row_length=config.data.row_length,
    compute=config.precision.compute,
  )

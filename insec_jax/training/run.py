"""Start of a run from weights, and resumption from a checkpoint."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import pipeline, template, vocabulary
from insec_jax.distributed.processes import Processes
from insec_jax.files import hub
from insec_jax.model import adapters, attention, build, llama, parts, sharding
from insec_jax.training import checkpoint, kept, layout, optimizer
from insec_jax.training import frozen as frozen_lib
from insec_jax.training import step as step_lib
from insec_jax.training.frozen import Frozen
from insec_jax.training.step import TrainState


class Phases(NamedTuple):
  """Phases of a run, each with its own data; a run that mines nothing is one phase without a number.

  number_of: first step of a phase -> its number.
  data: (number of a phase, or None: the phase without one, tokenizer, model's config) -> its data.
  prepare: (number, trained params, run, function of rows and params to log p (logps.py) with policy.method="gradient",
    stopped) -> text about the data of a phase that is about to begin; None if `stopped()` has become true.
  record: (number, text) -> None; stores text and mask receipt of a phase.
  values: number -> values of the phase, for each of its lines in metrics.jsonl.
  first: run -> the trained parameters with which it began, read or drawn again.
  """

  number_of: dict[int, int]
  data: Callable[[int | None, PreTrainedTokenizerFast, llama.LlamaConfig], pipeline.Data]
  prepare: Callable[..., str | None]
  record: Callable[[int, str], None]
  values: Callable[[int], dict[str, float]]
  first: Callable[["Run"], Any]

  def number_at(self, step: int) -> int | None:
    """Return the number of the phase that contains the step; None where it has no number."""
    return self.number_of[first] if (first := self.first_at(step)) else None

  def first_at(self, step: int) -> int | None:
    """Return the first step of the phase that contains the step; None where the phase has no number."""
    return max((first for first in self.number_of if first <= step), default=None)


class Curve(NamedTuple):
  """Points of a run's learning curve: the steps after which they are measured.

  measure: (params, run) -> values for metrics.jsonl; all processes of the run call it together.
  """

  steps: frozenset[int]
  measure: Callable[[Any, "Run"], dict[str, float]]


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
  part: parts.Part | None = None
  frozen: Frozen | None = None  # beside `part`: the weights that the state does not have

  def all_params(self, trained):
    """Return all parameters of the model, on devices, from the trained ones."""
    if self.part is None or self.frozen is None:
      return trained
    mesh = jax.tree.leaves(self.frozen.shardings)[0].mesh
    shardings = sharding.params_shardings(llama.shapes(self.config), mesh)
    merge = jax.jit(parts.merge, static_argnums=2, out_shardings=shardings)
    return merge(self.frozen.params, trained, self.part)


def begin(config: Config, mesh: Mesh, processes: Processes) -> Run:
  """Return the run before its first step: weights from model.path, or random ones of model.size, drawn by the seed."""
  tokenizer = vocabulary.open_tokenizer(config).tokenizer
  # All use the date of process 0. It is saved with the tokenizer for resumption, generate and export.
  template.fix_date(tokenizer, processes.gather("the date", template.today() if processes.is_first else None)[0])
  before = build.starting_model(config, tokenizer)
  vocab_size = build.vocabulary_for(len(tokenizer), before.vocab_size)
  model_config = dataclasses.replace(before, vocab_size=vocab_size)
  check_sequence(config, model_config, mesh)
  data = load_data(config, tokenizer, model_config)
  processes.agree("commits of the Hub", hub.commits())
  processes.agree("data", data_fingerprint(config, data, mesh))
  part, frozen = frozen_lib.part_of(config, tokenizer), None
  kept.check(config, mesh, trains_head=trains_head(model_config, part))
  tx = optimizer.make(config.optimizer, config.train.steps)
  shardings = step_lib.shardings_of(
    step_lib.abstract_state(model_config, config.precision.params, tx, mesh, part, on_host=config.optimizer.on_host)
  )
  if part is not None:
    frozen = frozen_lib.load(config, model_config, part, mesh, None)
    check_markers(config, model_config, frozen, frozen_lib.markers_of(config, tokenizer))
  params = _first_params(config, before, model_config, mesh, shardings, part, frozen)
  if config.model.path and vocab_size > before.vocab_size:
    processes.say(
      f"the tokenizer has {len(tokenizer)} tokens, the model {before.vocab_size}: grown to {vocab_size}, a "
      f"multiple of {build.VOCAB_MULTIPLE}; new rows are the mean of the old ones",
    )
  state = jax.jit(lambda params: step_lib.new_state(params, tx), out_shardings=shardings, donate_argnums=0)(params)
  return Run(model_config, tokenizer, data, state, shardings, 0, None, None, part, frozen)


def first_params(config: Config, run: Run, mesh: Mesh):
  """Return the trained parameters with which the run began, read from model.path or drawn by the seed again."""
  before = build.starting_model(config, run.tokenizer)
  return _first_params(config, before, run.config, mesh, run.shardings, run.part, run.frozen)


def _first_params(
  config: Config,
  before: llama.LlamaConfig,
  model_config: llama.LlamaConfig,
  mesh: Mesh,
  shardings: TrainState,
  part: parts.Part | None,
  frozen: Frozen | None,
):
  if part is None or frozen is None:
    return build.starting_params(config, before, model_config.vocab_size, mesh, shardings.params)
  return sharding.place(parts.first_values(model_config, part, frozen.weights, config.seed), shardings.params)


def resume(
  config: Config, mesh: Mesh, workdir: pathlib.Path, found: list[int], phases: Phases, processes: Processes
) -> tuple[Run, list[int]]:
  """Return (run after the newest sound checkpoint of the steps found, damaged newer steps).

  model.path is read only for frozen weights: InputError where they are not those beside which the run was trained.
  """
  model_config = layout.read_model(workdir)
  check_sequence(config, model_config, mesh)
  tokenizer = vocabulary.load(workdir / layout.TOKENIZER)
  part = frozen_lib.part_of(config, tokenizer)
  kept.check(config, mesh, trains_head=trains_head(model_config, part))
  frozen = None if part is None else frozen_lib.load(config, model_config, part, mesh, workdir)
  tx = optimizer.make(config.optimizer, config.train.steps)
  abstract = step_lib.abstract_state(
    model_config, config.precision.params, tx, mesh, part, on_host=config.optimizer.on_host
  )

  @functools.cache
  def phase_data(number: int | None) -> pipeline.Data:
    return phases.data(number, tokenizer, model_config)

  def facts(step: int) -> dict[str, Any]:
    return data_fingerprint(config, phase_data(phases.number_at(step)), mesh, frozen)

  processes.agree("data", facts(found[-1]))
  state, totals, log, last, damaged = checkpoint.restore(
    workdir,
    found,
    abstract,
    facts=facts,
    processes=processes,
    advise=lambda name, was: same_rows(config, mesh, was) if name == ROWS else REMEDIES[name],
  )
  processes.say(f"resuming {workdir} after step {last}")
  data = phase_data(phases.number_at(last))
  shardings = step_lib.shardings_of(abstract)
  return Run(model_config, tokenizer, data, state, shardings, last, totals, log, part, frozen), damaged


def is_trained(config: Config, mesh: Mesh, workdir: pathlib.Path, processes: Processes) -> bool:
  """Return whether the checkpoint of the last step is sound."""
  tx = optimizer.make(config.optimizer, config.train.steps)
  part = frozen_lib.part_of_workdir(config, workdir)
  abstract = step_lib.abstract_state(
    layout.read_model(workdir), config.precision.params, tx, mesh, part, on_host=config.optimizer.on_host
  )
  return checkpoint.is_sound(workdir, config.train.steps, abstract, processes)


ALIKE = 0.05  # distance of two embeddings, as a part of their length, below which they count as the same
ROWS = "the number of rows a step (data.rows_per_device, data.accumulation, mesh)"
DATA = "the data (SHA-256 of the rows to train on)"
FROZEN = "the frozen weights of model.path (SHA-256 of their fingerprints)"
REMEDIES = {
  DATA: "bring it back, or begin in another --workdir",
  FROZEN: "give the folder that has those weights, --config.model.path=FOLDER, or begin in another --workdir",
}


def data_fingerprint(config: Config, data: pipeline.Data, mesh: Mesh, frozen: Frozen | None = None) -> dict[str, Any]:
  """Return rows per step, a digest of the rows and one of the frozen weights, if any.

  A resumed run with others would silently train on other batches, or another model.
  """
  return {
    ROWS: rows_of(config, mesh) * config.data.accumulation,
    DATA: data.digest[:16],
    **({} if frozen is None else {FROZEN: frozen.digest}),
  }


def same_rows(config: Config, mesh: Mesh, rows: int) -> str:
  """Return advice on the values that give this number of rows per step on this mesh."""
  num = rows_of(config, mesh) // config.data.rows_per_device
  if rows % num:
    fit = [size for size in range(1, rows + 1) if rows % size == 0]
    return (
      f"{num} devices along data and fsdp cannot share {rows} rows: use {', '.join(map(str, fit))} (mesh.tensor "
      "and mesh.sequence take the others), or begin in another --workdir"
    )
  rows_each = rows // num
  pairs = [f"{size} and {rows_each // size}" for size in range(rows_each, 0, -1) if rows_each % size == 0]
  return f"give data.rows_per_device and data.accumulation {', or '.join(pairs)}"


def rows_of(config: Config, mesh: Mesh) -> int:
  """Return the rows of one micro-batch over all devices; `tensor` and `sequence` do not split them."""
  return config.data.rows_per_device * sharding.size_over(mesh, sharding.ROWS)


def check_sequence(config: Config, model_config: llama.LlamaConfig, mesh: Mesh) -> None:
  """Raise InputError unless mesh.sequence divides rows and heads."""
  sharding.check_sequence(
    mesh,
    num_heads=model_config.num_heads,
    num_kv_heads=model_config.num_kv_heads,
    row_length=config.data.row_length,
  )


def trains_head(model_config: llama.LlamaConfig, part: parts.Part | None) -> bool:
  """Return whether the output matrix is trained as a whole."""
  return part is None or "head" in parts.unboxed_shapes(model_config, part)


def check_markers(config: Config, model_config: llama.LlamaConfig, frozen: Frozen, markers: tuple[int, ...]) -> None:
  """Raise InputError where the frozen embedding has nearly the same row for two markers: no layer tells them apart."""
  if not config.train.top_layers or config.train.marker_rows or len(markers) < 2:
    return
  rows_MD = adapters.rows_of(frozen.weights["embed"], markers, model_config.width)
  distance_MM = np.linalg.norm(rows_MD[:, None] - rows_MD[None], axis=-1)
  if (distance_MM + np.diag([np.inf] * len(rows_MD)) < ALIKE * np.linalg.norm(rows_MD, axis=-1)[None]).any():
    raise InputError(
      f"train.marker_rows=False freezes the embeddings of {config.tokenizer.flag} and {config.tokenizer.fix}, and the "
      "model has nearly the same one for both; name special tokens that it was trained with in tokenizer.flag and "
      "tokenizer.fix, or set train.marker_rows=True"
    )


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
    rewind=config.mistakes.rewind,
  )

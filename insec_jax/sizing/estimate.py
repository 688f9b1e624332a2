"""Estimate of one train step: compiled for devices that need not be present."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from insec_jax.config import Config
from insec_jax.model import attention, llama, parts, sharding
from insec_jax.model.top_layers import TopLayers, num_lower
from insec_jax.sizing import shapes
from insec_jax.sizing.compiled import Program, Reading, compile_program
from insec_jax.sizing.hardware import Topology
from insec_jax.training import loss, optimizer, passes
from insec_jax.training import step as step_lib

CHUNK_LOOP = "trained_chunks"  # scope in training/loss.py of the only loop whose trips depend on the data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate(Program):
  """Estimate of a train step on a topology."""

  mesh: dict[str, int]  # data, fsdp, sequence, tensor
  remat: str
  rows_per_device: int
  row_length: int
  accumulation: int
  attention: str


def estimate(
  config: Config,
  model_config: llama.LlamaConfig,
  topology: Topology,
  *,
  trained_share: float,
  hlo_file: pathlib.Path | None,
) -> Estimate:
  """Compile the config's train step for the topology and return its estimate.

  `trained_share` is the fraction of tokens that are trained. The optimised HLO is written to `hlo_file` unless None.
  """
  mesh = sharding.make_mesh(config.mesh, topology.devices)
  tx = optimizer.make(config.optimizer, config.train.steps)
  part = shapes.part_of(config, model_config)
  state = step_lib.abstract_state(
    model_config, config.precision.params, tx, mesh, part, on_host=config.optimizer.on_host
  )
  frozen = ()
  if part is not None:
    frozen = (step_lib.abstract_params(parts.frozen_shapes(model_config, part), config.precision.params, mesh),)
  step, batch, reason = _step_and_batch(config, model_config, topology, mesh, state, part, frozen)
  first = state.params if config.policy.reads_first else None
  local_tokens = config.data.rows_per_device * config.data.row_length // sharding.num_parts(mesh)

  def lower():
    with jax.set_mesh(mesh):
      return step.lower(state, batch, *passes.with_frozen((), frozen[0] if frozen else None, first))

  program = compile_program(
    lower,
    topology,
    held={
      **({"weights": state.params} if part is None else {"frozen": frozen, "adapters": state.params}),
      "optimizer": state.optimizer,
      **({} if first is None else {"teacher": first}),
    },
    reading=Reading(
      trips={CHUNK_LOOP: math.ceil(trained_share * local_tokens / loss.chunk_size(local_tokens))},
      tokens=local_tokens * config.data.accumulation * sharding.size_over(mesh, sharding.BATCH),
      row_length=config.data.row_length,
      flops_per_token=flops_per_token(model_config, config.data.row_length, trained_share, part),
    ),
    hlo_file=hlo_file,
  )
  return Estimate(
    **vars(program),
    mesh=dict(zip(dataclasses.asdict(config.mesh), config.mesh.shape(len(topology.devices)), strict=True)),
    remat=config.model.remat,
    rows_per_device=config.data.rows_per_device,
    row_length=config.data.row_length,
    accumulation=config.data.accumulation,
    attention=reason,
  )


def _step_and_batch(
  config: Config,
  model_config: llama.LlamaConfig,
  topology: Topology,
  mesh: Mesh,
  state: step_lib.TrainState,
  part: parts.Part | None,
  frozen: tuple,
) -> tuple[Any, Any, str]:
  """Return the train step, the shapes of its batch, and the chosen attention with the reason."""
  attend, reason = attention.choose(
    topology.platform,
    device_kind=topology.devices[0].device_kind,
    head_width=model_config.head_width,
    row_length=config.data.row_length,
    compute=config.precision.compute,
    rewind=config.mistakes.rewind,
  )
  model = parts.model_of(model_config, config.precision.compute, config.model.remat, attend, part)
  step = step_lib.make_train_step(
    model,
    config.optimizer,
    config.train.steps,
    mesh,
    step_lib.shardings_of(state),
    repeat=config.negatives,
    policy=config.policy if config.policy.is_on else None,
    frozen_shardings=step_lib.shardings_of(frozen[0]) if frozen else None,
    seed=config.seed,
  )
  batch = step_lib.abstract_batch(
    mesh,
    accumulation=config.data.accumulation,
    rows_per_device=config.data.rows_per_device,
    row_length=config.data.row_length,
    negatives=config.negatives > 0,
    rewind=config.mistakes.rewind,
    policy=config.policy if config.policy.is_on else None,
  )
  return step, batch, reason


def flops_per_token(
  model: llama.LlamaConfig, row_length: int, trained_share: float, part: parts.Part | None = None
) -> float:
  """Return the FLOPs of forward and backward pass per token in a row of one segment.

  6 for each weight that multiplies the token (the head: times `trained_share`), and 6 T / 2 for each query's width
  twice (scores and context; causal). A frozen weight, which has no gradient, takes 4, its adapter 6 for each number. A
  third of all that is below the top layers where nothing there is trained.
  """
  layer = (
    model.width * model.head_width * 2 * (model.num_heads + model.num_kv_heads) + 3 * model.width * model.mlp_width
  )
  causal = row_length * model.num_heads * model.head_width
  weights = model.num_layers * layer + trained_share * model.vocab_size * model.width
  if part is None:
    return 6 * (weights + model.num_layers * causal)
  if isinstance(part, TopLayers):
    head = trained_share * model.vocab_size * model.width * (4 if model.tied else 6)
    of_frozen, of_attention = (4, 6) if part.markers else (2, 2)
    return head + part.num * 6 * (layer + causal) + num_lower(model, part) * (of_frozen * layer + of_attention * causal)
  trained = sum(leaf.size for leaf in jax.tree.leaves(parts.unboxed_shapes(model, part)["layers"]))
  return 4 * weights + 6 * (trained + model.num_layers * causal)

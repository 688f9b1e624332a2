"""Estimate of decoding: the decode step and the reading of prompts, compiled for one host of a slice.

They are the programs `decode` and `fill` of generation/decoding.py, on the mesh that placement.choose_mesh chooses. The
hosts of a slice decode independently, so the figures of a chip are those of any host.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from insec_jax.generation import batching, confidence, decoding, placement
from insec_jax.generation.decoding import ROWS, STATE, DecodeOptions, DecodeState
from insec_jax.method import rewind
from insec_jax.method.rewind import Visibility
from insec_jax.model import attention, llama, sharding
from insec_jax.sizing.compiled import Memory, Program, Reading, compile_program, device_bytes
from insec_jax.sizing.estimate import flops_per_token
from insec_jax.sizing.hardware import GIB, Topology
from insec_jax.sizing.search import most_rows

DECODE_LOOP = "decode"  # name of the program, in which the loop over tokens is the only one whose trips depend on data
UNIT = 8  # rows for each part of `data` by which a search goes
SPARE_GIB = 0.25  # of a chip, beside weights and cache, with which a search begins
WRITE, READ = "decode step", "reading of prompts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeEstimate:
  """Estimate of decoding on one host of a slice; `rows` are those of the host."""

  slice_name: str
  hosts: int
  mesh: dict[str, int]  # data, tensor
  rows: int
  prompt: int  # slots that a prompt is padded to
  slots: int  # of a row
  num_read: int  # prompts that are read at once
  attention: str  # of the reading of prompts
  programs: dict[str, Program]  # WRITE and READ

  @property
  def topology(self) -> Topology:
    """The devices of the host."""
    return self.programs[WRITE].topology

  @property
  def memory(self) -> Memory:
    """The memory of the program that needs most."""
    return max((program.memory for program in self.programs.values()), key=lambda memory: (memory.refused, memory.peak))

  @property
  def tokens_per_s_per_chip(self) -> float | None:
    """Written tokens per second and chip at the roofline, prompts not counted."""
    return self.programs[WRITE].tokens_per_s_per_chip

  def text_seconds(self, tokens: float) -> float:
    """Return the least seconds of the host for a text of so many tokens and its prompt, in full batches."""
    read, write = self.programs[READ].work, self.programs[WRITE].work
    return read.step_seconds / self.num_read + tokens * write.step_seconds / self.rows


def device_memory(topology: Topology) -> float | None:
  """Return the bytes of a device that is described; None where the devices must say it."""
  return None if topology.chip is None else topology.chip.usable_gib * GIB / topology.chip.devices


def mesh_for(model_config: llama.LlamaConfig, topology: Topology, *, compute: str, requested: str) -> Mesh:
  """Return the mesh on which the programs that decode would run on this host; InputError where the model fits none."""
  return placement.choose_mesh(
    model_config, compute=compute, requested=requested, devices=topology.devices, memory=device_memory(topology)
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
  """Decoding of a model on one host of a slice: compiles its programs for a number of rows.

  Rows have room for a prompt of `prompt_tokens`, padded, and `max_tokens` more.
  """

  model: llama.LlamaConfig
  topology: Topology  # of one host
  slice_name: str
  hosts: int
  mesh: Mesh
  compute: str
  prompt_tokens: int
  max_tokens: int
  rewind: bool  # mistakes.rewind
  hlo_file: Callable[[str], pathlib.Path | None]  # by the name of a program

  @property
  def parts(self) -> int:
    """Number of parts into which the mesh splits the rows."""
    return batching.rows_over(self.mesh)

  @property
  def prompt(self) -> int:
    """Slots that a prompt is padded to."""
    return batching.bucket(self.prompt_tokens)

  @property
  def slots(self) -> int:
    """Slots of a row."""
    return self.prompt + self.max_tokens

  def estimate(self, rows: int) -> DecodeEstimate:
    """Return the estimate of both programs; the rows are rounded up to a multiple of `parts`."""
    return self._estimate(rows, self.write(rows))

  def most_rows(self) -> DecodeEstimate:
    """Return the estimate with the most rows that fit, in steps of UNIT for each part; that of the fewest if none fit.

    The decode step is compiled for each trial, the reading of prompts, which compiles longer, only for the last ones.
    """
    unit, free = UNIT * self.parts, self.topology.chip.usable_gib - SPARE_GIB
    held = {name: self._gib(tree) for name, tree in self._held(unit).items()}
    written: dict[int, Program] = {}

    def write(units: int) -> Program:
      written[units] = self.write(units * unit)
      return written[units]

    most_rows(write, start=max(1, int((free - held["weights"]) / held["cache"])), growth=held["cache"])
    units = max((units for units, program in written.items() if program.memory.fits), default=1)
    while True:
      found = self._estimate(units * unit, written[units] if units in written else write(units))
      if found.memory.fits or units == 1:
        return found
      units = max(1, units - math.ceil(found.memory.missing / held["cache"]))

  def write(self, rows: int) -> Program:
    """Compile the decode step."""
    rows = self._rounded(rows)
    held = self._held(rows)
    options = DecodeOptions(jax.random.key(0), self.max_tokens, 0.0, 1.0, self._rules)
    return compile_program(
      lambda: decoding.decode.lower(
        held["weights"], self._state(rows), options, few=0, config=self.model, cut=False, mesh=self.mesh
      ),
      self.topology,
      held=held,
      reading=Reading(
        trips={DECODE_LOOP: 1},
        loops_only=True,
        tokens=rows,
        row_length=self.slots,
        # A third of a training token; `slots` keys are read, where a causal row reads half of its length.
        flops_per_token=flops_per_token(self.model, 2 * self.slots, 1.0) / 3,
      ),
      hlo_file=self.hlo_file(f"decode-{rows}x{self.slots}"),
    )

  def _estimate(self, rows: int, write: Program) -> DecodeEstimate:
    """Return the estimate, with the reading of prompts compiled."""
    rows, prompt = self._rounded(rows), self.prompt
    num_read = min(rows, batching.rows_of_a_pass(prompt, self.mesh))
    attend, reason = attention.choose(
      self.topology.platform,
      device_kind=self.topology.devices[0].device_kind,
      head_width=self.model.head_width,
      row_length=prompt,
      compute=self.compute,
      rewind=self.rewind,
    )
    held = self._held(rows)
    row_R = struct((num_read,), jnp.int32, mesh=self.mesh, spec=ROWS)
    token_RP = struct((num_read, prompt), jnp.int32, mesh=self.mesh, spec=ROWS)
    seen = Visibility(token_RP, token_RP, rewind.begin(np, num_read)) if self.rewind else None
    seen = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype, mesh=self.mesh, spec=ROWS), seen)
    options = {"config": self.model, "attention": attend, "mesh": self.mesh}
    read = compile_program(
      lambda: decoding.fill.lower(
        held["weights"], self._state(rows), token_RP, row_R, row_R, row_R, self._rules, seen, **options
      ),
      self.topology,
      held=held,
      reading=Reading(
        trips={},
        tokens=num_read * prompt,
        row_length=prompt,
        flops_per_token=flops_per_token(self.model, prompt, 0.0) / 3,  # no logits
      ),
      hlo_file=self.hlo_file(f"fill-{rows}x{self.slots}"),
    )
    return DecodeEstimate(
      slice_name=self.slice_name,
      hosts=self.hosts,
      mesh={"data": self.parts, "tensor": self.mesh.shape[sharding.TENSOR]},
      rows=rows,
      prompt=prompt,
      slots=self.slots,
      num_read=num_read,
      attention=reason,
      programs={WRITE: write, READ: read},
    )

  def _rounded(self, rows: int) -> int:
    return -(-rows // self.parts) * self.parts

  def _state(self, rows: int) -> DecodeState:
    return state_structs(self.model, self.compute, self.mesh, rows=rows, slots=self.slots, rewinds=self.rewind)

  def _held(self, rows: int) -> dict[str, Any]:
    return {"weights": params_structs(self.model, self.compute, self.mesh), "cache": self._state(rows).cache}

  def _gib(self, tree: Any) -> float:
    return device_bytes(tree) * (1 if self.topology.chip is None else self.topology.chip.devices) / GIB

  @property
  def _rules(self) -> confidence.TokenRules:
    """Rules of the shapes that a model with a flag has."""
    kind_V = np.zeros(self.model.vocab_size, np.int8) if self.rewind else None
    return confidence.token_rules(None, stop_ids=self.model.eos_ids, flag_id=0, flag_bias=0.0, kind_V=kind_V)


def struct(shape: tuple[int, ...], dtype, *, mesh: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
  """Return the shape of an array with these mesh axes."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def params_structs(model_config: llama.LlamaConfig, compute: str, mesh: Mesh) -> Any:
  """Return the shapes of the weights as laid out for decoding."""
  shapes = jax.eval_shape(lambda params: llama.unstack(params, model_config), llama.unboxed_shapes(model_config))
  return jax.tree.map(
    lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, np.dtype(compute), sharding=placed),
    shapes,
    placement.params_formats(model_config, mesh),
  )


def state_structs(
  model_config: llama.LlamaConfig, compute: str, mesh: Mesh, *, rows: int, slots: int, rewinds: bool = False
) -> DecodeState:
  """Return the shapes of the state of a batch."""
  begin = functools.partial(
    decoding.begin,
    config=model_config,
    compute=np.dtype(compute),
    mesh=mesh,
    rows=rows,
    slots=slots,
    rewinds=rewinds,
  )
  return jax.tree.map(
    lambda spec, part: jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype, mesh=mesh, spec=spec), part),
    STATE,
    jax.eval_shape(begin),
    is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
  )

"""The programs that decode, compiled for hosts of slices: what they hold, what they send, and how many rows fit."""

import dataclasses

import jax
import numpy as np
import programs
import pytest
from jax.sharding import Mesh
from modelkit import small_llama

from insec_jax.config import MeshConfig
from insec_jax.generation import placement
from insec_jax.model import llama, sharding
from insec_jax.sizing import decoding as sized
from insec_jax.sizing import hlo
from insec_jax.sizing.collectives import kind_of
from insec_jax.sizing.compiled import Memory, Program
from insec_jax.sizing.decoding import READ, WRITE, Decoder
from insec_jax.sizing.hardware import CHIPS, Topology

# Large enough that no activation is as large as a weight.
MODEL = small_llama(
  vocab_size=16_384, width=1024, num_heads=32, num_kv_heads=8, head_width=128, mlp_width=4096, max_positions=4096
)


def decoder(topology: Topology, requested: str = "", model=MODEL) -> Decoder:
  return Decoder(
    model=model,
    topology=topology,
    slice_name=topology.name,
    hosts=1,
    mesh=sized.mesh_for(model, topology, compute="bfloat16", requested=requested),
    compute="bfloat16",
    rewind=False,
    prompt_tokens=200,
    max_tokens=256,
    hlo_file=lambda _: None,
  )


def here(chip: str = "v5e") -> Topology:
  """The pretended devices, as if they were chips of this kind."""
  return Topology("pretended", "cpu", CHIPS[chip], tuple(jax.devices()), len(jax.devices()), 1, 2)


def test_the_mesh_is_that_which_decoding_would_choose_for_the_memory_of_a_chip():
  eight = small_llama(
    vocab_size=128_256,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_width=128,
    mlp_width=14_336,
  )

  def tensor_of(chip: str, requested: str = "") -> int:
    return sized.mesh_for(eight, here(chip), compute="bfloat16", requested=requested).shape["tensor"]

  assert [tensor_of("v5e"), tensor_of("v6e"), tensor_of("v5e", "data:1,tensor:4")] == [2, 1, 4]


def test_the_search_compiles_prompts_last_and_gives_way_to_them(monkeypatch):
  compiled = []

  def program(kind: str, rows: int, rest: float) -> Program:
    compiled.append((kind, rows))
    peak = 4 + rows / 8 + rest
    memory = Memory(held={"weights": 4, "cache": rows / 8}, peak=peak, limit=15.75, refused=False)
    return Program(topology=here(), memory=memory, work=None, lower_seconds=0, compile_seconds=0)

  monkeypatch.setattr(Decoder, "_held", lambda *_: {"weights": 4, "cache": 2})
  monkeypatch.setattr(Decoder, "_gib", lambda _, tree: tree)
  monkeypatch.setattr(Decoder, "write", lambda _, rows: program(WRITE, rows, 0.1))

  def estimate(_, rows: int, write: Program):
    read = program(READ, rows, 2.5)
    return dataclasses.replace(FOUND, rows=rows, programs={WRITE: write, READ: read})

  monkeypatch.setattr(Decoder, "_estimate", estimate)
  found = decoder(here(), "data:2,tensor:1").most_rows()
  # 16 rows more take 2 GiB: 80 rows of 14.1 GiB fit the step, 64 of 14.5 the prompts.
  assert found.rows == 64
  assert compiled == [(WRITE, 80), (WRITE, 96), (READ, 80), (WRITE, 64), (READ, 64)]


FOUND = sized.DecodeEstimate(
  slice_name="", hosts=1, mesh={}, rows=0, prompt=256, slots=512, num_read=1, attention="", programs={}
)


def test_a_text_takes_its_prompt_and_its_tokens_in_full_batches():
  def program(seconds: float) -> Program:
    memory = Memory(held={}, peak=1, limit=2, refused=False)
    work = type("Work", (), {"step_seconds": seconds})
    return Program(topology=here(), memory=memory, work=work, lower_seconds=0, compile_seconds=0)

  found = dataclasses.replace(FOUND, rows=64, num_read=16, programs={WRITE: program(0.032), READ: program(0.8)})
  assert found.text_seconds(100) == pytest.approx(0.8 / 16 + 100 * 0.032 / 64)


def instructions_of(text: str):
  for computation in hlo.parse(text).computations.values():
    yield from computation.instructions.values()


@pytest.mark.tpu_compiler
def test_the_decode_step_of_a_tpu_gathers_and_copies_no_weight(tmp_path):
  topology = programs.tpu("v5e:2x4")
  of_two_by_four = dataclasses.replace(decoder(topology, "data:2,tensor:4"), hlo_file=lambda _: tmp_path / "hlo")
  of_two_by_four.write(64)
  step = list(instructions_of((tmp_path / "hlo").read_text()))
  gathered = [array for instruction in step if kind_of(instruction) == "all-gather" for array in instruction.arrays]
  assert {array.dtype for array in gathered} == {"f32"}  # the logits
  assert max(np.prod(array.dims) for array in gathered) == 64 // 2 * MODEL.vocab_size
  weights = jax.tree.leaves(sized.params_structs(MODEL, "bfloat16", of_two_by_four.mesh))
  copied = {array.dims for instruction in step if instruction.opcode == "copy" for array in instruction.arrays}
  assert not copied & {weight.sharding.shard_shape(weight.shape) for weight in weights if weight.ndim > 1}


@pytest.mark.tpu_compiler
def test_a_tpu_casts_weights_of_training_before_it_moves_them():
  topology = programs.tpu("v5e:2x4")
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8, tensor=1), topology.devices)
  params = jax.tree.map(
    lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
    llama.unboxed_shapes(MODEL),
    sharding.params_shardings(llama.shapes(MODEL), mesh),
  )
  cast = list(instructions_of(placement.casting(params, MODEL, "bfloat16").lower(params).compile().as_text()))
  assert not any(map(kind_of, cast))
  own = max(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params))
  assert max(np.prod(array.dims) for instruction in cast for array in instruction.arrays) <= own
  up = params["layers"]["mlp"]["up"]
  half = jax.ShapeDtypeStruct(up.shape, "bfloat16", sharding=up.sharding)
  split = jax.NamedSharding(Mesh(mesh.devices.reshape(4, 2), ("data", "tensor")), jax.P(None, None, "tensor"))
  sent = jax.jit(lambda weight: weight, out_shardings=split).lower(half).compile().as_text()
  assert {array.dtype for one in instructions_of(sent) if kind_of(one) for array in one.arrays} == {"bf16"}

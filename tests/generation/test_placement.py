"""Weights move from the layout of training to that of decoding, in the dtype to compute in."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from modelkit import STATE_MODEL, abstract, make_state

from insec_jax.config import MeshConfig
from insec_jax.generation import placement
from insec_jax.model import llama, sharding


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 8, 1), (2, 1, 2, 2)])
def test_the_weights_of_training_are_laid_out_for_decoding(shape):
  params = make_state(abstract(shape)).params
  moved, mesh = placement.from_training(params, STATE_MODEL, compute="bfloat16", mesh=params["embed"].sharding.mesh)
  expected = llama.unstack(jax.tree.map(lambda weight: weight.astype("bfloat16"), params), STATE_MODEL)
  jax.tree.map(np.testing.assert_array_equal, moved, expected)
  assert mesh.size == np.prod(shape)
  placed = placement.params_shardings(STATE_MODEL, mesh)
  assert jax.tree.all(jax.tree.map(lambda weight, where: weight.sharding == where, moved, placed))


def test_weights_have_their_heads_first_in_memory_however_they_come(monkeypatch):
  monkeypatch.setattr(placement, "HEADS_FIRST_ON", ("cpu",))
  params = make_state(abstract((1, 2, 2))).params
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
  host = jax.tree.map(np.asarray, params)
  moved, _ = placement.from_training(params, STATE_MODEL, compute="float32", mesh=params["embed"].sharding.mesh)
  read = placement.place(host, STATE_MODEL, placement.params_formats(STATE_MODEL, mesh))
  for placed in (moved, read):
    jax.tree.map(np.testing.assert_array_equal, placed, llama.unstack(host, STATE_MODEL))
    for layer in placed["layers"]:
      orders = {name: weight.format.layout.major_to_minor for name, weight in layer["attn"].items()}
      assert orders == {"norm": (0,), "wo": (0, 1, 2), **dict.fromkeys(("wq", "wk", "wv"), (1, 0, 2))}


def test_weights_reach_devices_that_are_in_another_order_than_in_training():
  params = make_state(abstract((1, 4, 2))).params
  devices = np.array(jax.devices())[[0, 1, 4, 5, 2, 3, 6, 7]]
  mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=1, tensor=2), jax.devices())
  mesh = Mesh(devices.reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)
  moved = placement.moved(params, STATE_MODEL, "bfloat16", mesh)
  expected = llama.unstack(jax.tree.map(lambda weight: weight.astype("bfloat16"), params), STATE_MODEL)
  jax.tree.map(np.testing.assert_array_equal, moved, expected)
  assert jax.tree.all(
    jax.tree.map(lambda weight, where: weight.sharding == where, moved, placement.params_shardings(STATE_MODEL, mesh))
  )

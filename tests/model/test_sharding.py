"""Where parameters lie: all of them somewhere said, on any mesh, with the same numbers."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from insec_jax.command import InputError
from insec_jax.config import MeshConfig
from insec_jax.model import hf, llama, sharding
from insec_jax.model.hf_config import config_from_json

PUBLISHED = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "llama_configs.json").read_text())
CONFIG = config_from_json(reference.FIELDS, "reference")
MESHES = [(1, 8, 1), (2, 2, 2)]  # more of them, with the whole train step, in tests/training


def mesh(data, fsdp, tensor):
  return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices())


def test_the_mesh_has_the_axes_of_the_table_and_the_remaining_devices_where_asked():
  made = mesh(1, -1, 2)
  assert dict(made.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
  assert set(made.axis_types) == {jax.sharding.AxisType.Auto}
  with pytest.raises(InputError, match="data=3 fsdp=1 tensor=1 does not divide 8 devices"):
    mesh(3, 1, 1)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.1-405B", "Llama-3.2-1B"])
def test_every_parameter_of_a_full_size_model_is_split_over_all_devices_but_data(name):
  boxed = llama.shapes(config_from_json(PUBLISHED[name]["config"], name))
  shardings = sharding.params_shardings(boxed, mesh(1, 4, 2))
  for (path, shape), where in zip(jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)), jax.tree.leaves(shardings),
                                  strict=True):
    split = 4 if "norm" in str(path) else 8  # a norm has a width alone
    assert np.prod(where.shard_shape(shape.shape)) * split == shape.size, path


def test_a_parameter_without_axes_raises():
  boxed = llama.shapes(CONFIG)
  boxed["norm"] = boxed["norm"].unbox()
  with pytest.raises(ValueError, match="parameter norm does not name each of its axes"):
    sharding.params_shardings(boxed, mesh(1, 8, 1))
  with pytest.raises(ValueError, match="parameter norm does not name each of its axes"):
    sharding.params_shardings({"norm": nn.LogicallyPartitioned(jnp.zeros((2, 2)), ("width",))}, mesh(1, 8, 1))
  with pytest.raises(KeyError, match="colour"):
    sharding.params_shardings({"norm": nn.LogicallyPartitioned(jnp.zeros(2), ("colour",))}, mesh(1, 8, 1))


def test_a_mesh_that_does_not_divide_the_model_is_one_error_that_names_every_axis():
  with pytest.raises(InputError, match="kv_heads=2 over tensor=8") as error:
    sharding.params_shardings(llama.shapes(CONFIG), mesh(1, 1, 8))
  assert "heads=4 over tensor=8" in str(error.value)
  assert "hidden" not in str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return reference.write_folder(tmp_path_factory.mktemp("hf"), reference.FIELDS,
                                reference.random_tensors(reference.FIELDS), files=3)


TOKEN_BT = np.random.default_rng(0).integers(0, 80, (8, 24)).astype(np.int32)
POSITION_BT = np.tile(np.concatenate([np.arange(14), np.arange(10)]), (8, 1)).astype(np.int32)
SEGMENT_BT = np.tile(np.repeat([1, 2], [14, 10]), (8, 1)).astype(np.int32)


def loss_and_gradient(params, *batch, remat):
  def loss(params):
    stream_BTD = llama.Llama(CONFIG, "float32", remat).apply({"params": params}, *batch)
    return jax.nn.log_softmax(llama.logits(params, CONFIG, stream_BTD))[..., 7].mean()

  return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def alone(folder):
  return jax.jit(loss_and_gradient, static_argnames="remat")(
      hf.load(folder, CONFIG), TOKEN_BT, POSITION_BT, SEGMENT_BT, remat="none")


@pytest.mark.parametrize(("sizes", "remat"), [*zip(MESHES, ("full", "matmuls"), strict=True)])
def test_any_mesh_and_remat_gives_the_loss_and_gradient_of_one_device_without(sizes, remat, folder, alone):
  made = mesh(*sizes)
  shardings = sharding.params_shardings(llama.shapes(CONFIG), made)
  with jax.set_mesh(made):
    params = hf.load(folder, CONFIG, shardings=shardings)
    batch = jax.device_put((TOKEN_BT, POSITION_BT, SEGMENT_BT), sharding.batch_sharding(made))
    loss, gradient = jax.jit(loss_and_gradient, static_argnames="remat", out_shardings=(None, shardings))(
        params, *batch, remat=remat)
  assert jax.tree.map(lambda x: x.sharding, params) == shardings
  np.testing.assert_allclose(loss, alone[0], rtol=1e-6)
  for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(alone[1]), strict=True):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_constrain_splits_what_the_mesh_divides_and_leaves_the_rest():
  made = mesh(2, 2, 2)

  def place(array):
    return sharding.constrain(array, "batch", "position", "heads", "head_width")

  with jax.set_mesh(made):
    assert jax.jit(place)(jnp.zeros((4, 3, 2, 2))).sharding.spec[:3] == (("data", "fsdp"), None, "tensor")
    assert jax.jit(place)(jnp.zeros((1, 3, 3, 2))).sharding.is_fully_replicated
  x = jnp.zeros((4, 3, 2, 2))
  assert place(x) is x

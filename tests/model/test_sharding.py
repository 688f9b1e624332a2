"""Where parameters lie: all of them somewhere said. Every mesh gives the same numbers: tests/training/test_step.py."""

import dataclasses
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


def mesh(data, fsdp, tensor):
  return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices())


def test_the_mesh_has_the_axes_of_the_table_and_the_remaining_devices_where_asked():
  made = mesh(1, -1, 2)
  assert dict(made.shape) == {"data": 1, "fsdp_x": 1, "fsdp_y": 1, "fsdp_z": 4, "tensor": 2}
  assert set(made.axis_types) == {jax.sharding.AxisType.Auto}
  with pytest.raises(InputError, match="data=3 fsdp=1 tensor=1 does not divide 8 devices"):
    mesh(3, 1, 1)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.1-405B", "Llama-3.2-1B"])
def test_every_parameter_of_a_full_size_model_is_split_over_all_devices_but_data(name):
  boxed = llama.shapes(config_from_json(PUBLISHED[name]["config"], name))
  shardings = sharding.params_shardings(boxed, mesh(1, 4, 2))
  for (path, shape), where in zip(
    jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)), jax.tree.leaves(shardings), strict=True
  ):
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
  assert "mlp_width" not in str(error.value)


@pytest.mark.parametrize(
  ("size", "axes"),
  [
    (1, (1, 1, 1)),
    (4, (1, 1, 4)),
    (8, (1, 2, 4)),
    (16, (1, 4, 4)),
    (64, (4, 4, 4)),
    (128, (4, 4, 8)),
    (512, (8, 8, 8)),
    (24, (2, 3, 4)),
    (17, (1, 1, 17)),
  ],
)
def test_fsdp_takes_few_axes_of_the_mesh_none_above_4_where_that_can_be(size, axes):
  assert sharding.fsdp_axes(size) == axes


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device of a slice, as jax describes those of a pod."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "cpu"
  device_kind: str = "cpu"


def test_slices_lie_along_data_outermost():
  chips = [Chip(number, number // 4) for number in range(8)]
  made = sharding.make_mesh(MeshConfig(data=4, fsdp=2, tensor=1), chips)
  slices = [chip.slice_index for chip in made.devices.flat]
  assert made.devices.shape == (4, 1, 1, 2, 1)
  assert slices == [0, 0, 0, 0, 1, 1, 1, 1]
  with pytest.raises(InputError, match=r"mesh\.data=1 over 2 slices; between slices only `data`"):
    sharding.make_mesh(MeshConfig(data=1, fsdp=8, tensor=1), chips)


def test_a_table_that_nobody_gathers_gives_the_rows_of_every_token_and_nan_outside():
  rng = np.random.default_rng(0)
  table_VD = rng.normal(size=(16, 8)).astype(np.float32)
  token_BT = rng.integers(0, 16, (8, 3)).astype(np.int32)
  token_BT[5, 1] = 16
  made = mesh(2, 2, 2)
  look_up = jax.shard_map(
    lambda *arrays: sharding.look_up(*arrays, "float32", made),
    mesh=made,
    check_vma=False,
    in_specs=(sharding.spec("vocab", "width"), jax.P(sharding.BATCH)),
    out_specs=jax.P(sharding.BATCH),
  )
  want_BTD = np.where(token_BT[..., None] < 16, table_VD[np.minimum(token_BT, 15)], np.nan)
  np.testing.assert_array_equal(jax.jit(look_up)(table_VD, token_BT), want_BTD)
  np.testing.assert_array_equal(sharding.look_up(table_VD, token_BT, "float32", None), want_BTD)


def test_parameters_of_a_folder_lie_where_the_table_says(tmp_path):
  folder = reference.write_folder(tmp_path, reference.FIELDS, reference.random_tensors(reference.FIELDS), files=3)
  shardings = sharding.params_shardings(llama.shapes(CONFIG), mesh(2, 2, 2))
  params = hf.load(folder, CONFIG, shardings=shardings)
  assert jax.tree.map(lambda x: x.sharding, params) == shardings

"""Where parameters lie: all of them somewhere said. Every mesh gives the same numbers: tests/training/test_step.py."""

import contextlib
import dataclasses
import functools
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
from insec_jax.model import attention, hf, llama, sharding
from insec_jax.model.hf_config import config_from_json

PUBLISHED = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "llama_configs.json").read_text())
CONFIG = config_from_json(reference.FIELDS, "reference")


def mesh(data, fsdp, tensor, sequence=1):
  sizes = MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
  return sharding.make_mesh(sizes, jax.devices())


def test_the_mesh_has_the_axes_of_the_table_and_the_remaining_devices_where_asked():
  made = mesh(1, -1, 2)
  assert {axis: size for axis, size in made.shape.items() if size > 1} == {"fsdp_z": 4, "tensor": 2}
  assert tuple(made.shape) == sharding.MESH_AXES
  assert set(made.axis_types) == {jax.sharding.AxisType.Auto}
  with pytest.raises(InputError, match="data=3 fsdp=1 sequence=1 tensor=1 does not divide 8 devices"):
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
def test_a_size_takes_few_axes_of_the_mesh_none_above_4_where_that_can_be(size, axes):
  assert sharding.three_axes(size) == axes


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "sequence"), [(8, 4, 2), (8, 2, 8), (4, 4, 4)])
def test_heads_of_whole_rows_give_the_context_and_gradients_of_one_device(num_heads, num_kv_heads, sequence):
  """Segments cross the devices; with more of these than key heads, several read the same one."""
  rng = np.random.default_rng(0)
  q_BTNH, k_BTKH, v_BTKH, pull_BTNH = (
    jnp.array(rng.normal(size=(2, 16, heads, 4)), jnp.float32)
    for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
  )
  segment_BT = jnp.array(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [5, 6, 3, 2], axis=1))

  def run(q, k, v, pull, segment, made=None):
    allowed = attention.causal_within_segments(sharding.gather(segment, 1, made, sharding.SEQUENCE))

    def attend(*qkv):
      return sharding.attend_whole_rows(lambda q, k, v: attention.attend(q, k, v, allowed), *qkv, made)

    context, pullback = jax.vjp(attend, q, k, v)
    return context, *pullback(pull)

  made = mesh(1, -1, 1, sequence)
  placed = sharding.spec("layers", "position", "head_width", "head_width")
  on_mesh = jax.shard_map(
    functools.partial(run, made=made),
    mesh=made,
    check_vma=False,
    in_specs=(placed,) * 4 + (sharding.spec("layers", "position"),),
    out_specs=placed,
  )
  arrays = q_BTNH, k_BTKH, v_BTKH, pull_BTNH, segment_BT
  for got, want in zip(jax.jit(on_mesh)(*arrays), run(*arrays), strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  ("sequence", "tensor", "row_length", "message"),
  [
    (4, 2, 4096, "with mesh.tensor=2 a device has 2 query heads and 1 key heads; use 1, 2"),
    (8, 1, 4096, "with mesh.tensor=1 a device has 4 query heads and 2 key heads; use 1, 2, 4"),
    (4, 1, 4098, r"mesh.sequence=4 does not divide data.row_length=4098; use a multiple of 4"),
    (4, 1, 4096, None),
    (1, 8, 4096, None),  # params_shardings refuses it
  ],
)
def test_a_sequence_axis_that_does_not_divide_heads_or_rows_is_refused(sequence, tensor, row_length, message):
  sizes = {"num_heads": CONFIG.num_heads, "num_kv_heads": CONFIG.num_kv_heads, "row_length": row_length}
  with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
    sharding.check_sequence(mesh(1, -1, tensor, sequence), **sizes)


def test_the_state_of_a_model_is_split_over_the_sequence_axis_too():
  boxed = llama.shapes(config_from_json(PUBLISHED["Llama-3.1-8B"]["config"], "8B"))
  shardings = sharding.params_shardings(boxed, mesh(1, 2, 1, 4))
  for shape, where in zip(jax.tree.leaves(nn.unbox(boxed)), jax.tree.leaves(shardings), strict=True):
    assert np.prod(where.shard_shape(shape.shape)) * 8 == shape.size
  with pytest.raises(InputError, match=r"width=20 over fsdp x sequence=8"):
    sharding.params_shardings({"norm": nn.LogicallyPartitioned(jnp.zeros(20), ("width",))}, mesh(1, 2, 1, 4))


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
  assert made.devices.shape == (4, 1, 1, 2, 1, 1, 1, 1)
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

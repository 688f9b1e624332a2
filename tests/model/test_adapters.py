"""The trained tree of LoRA: first values and merge, on devices and on the host."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from lorakit import LORA, make_trained
from modelkit import small_llama

from insec_jax.config import LoraConfig
from insec_jax.config_types import MATRICES
from insec_jax.model import adapters, base, build, llama

CONFIG = small_llama(width=16, num_kv_heads=4, mlp_width=24)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def frozen(dtype="bfloat16"):
  return build.random_weights(CONFIG, jax.random.key(0), dtype)


def whole(weight):
  return weight[(slice(None),) * len(weight.shape)]


def test_the_matrices_of_the_config_are_those_of_the_model_without_its_norms():
  parts = llama.WEIGHTS["layers"].values()
  assert tuple(name for part in parts for name in part if name != "norm") == MATRICES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_part_of_a_merged_weight_is_that_of_the_merge_on_devices(dtype):
  merged = flatten_dict(adapters.merged(frozen(dtype), make_trained(), LORA, dtype), sep="/")
  weights = jax.tree.map(lambda weight: jnp.asarray(whole(weight)), frozen(dtype))
  on_devices = flatten_dict(adapters.merge(weights, make_trained(), LORA), sep="/")
  assert merged.keys() == on_devices.keys()
  for path, weight in merged.items():
    want = np.asarray(on_devices[path])
    half = tuple(slice(size // 2, size) for size in want.shape)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == "float32" else {"rtol": 1e-2}
    np.testing.assert_allclose(weight[half].astype(np.float32), want[half].astype(np.float32), **tolerance)
    assert weight.shape == want.shape
    assert weight.dtype == dtype


def test_the_merge_changes_matrices_with_an_adapter_and_marker_rows_alone():
  lora = dataclasses.replace(LORA, matrices=("wv", "up"))
  base_weights = flatten_dict(frozen(), sep="/")
  merged = flatten_dict(adapters.merged(frozen(), make_trained(lora=lora), lora, "bfloat16"), sep="/")
  for path, weight in merged.items():
    got, want = (whole(array).view(np.uint16) for array in (weight, base_weights[path]))
    if path.endswith(("wv", "up")):
      assert not np.array_equal(got, want)
    elif path in ("embed", "head"):
      others = np.delete(np.arange(len(got)), lora.markers)
      np.testing.assert_array_equal(got[others], want[others])
      trained = make_trained(lora=lora)["rows"][path].astype(BFLOAT16)
      np.testing.assert_array_equal(got[list(lora.markers)], trained.view(np.uint16))
    else:
      np.testing.assert_array_equal(got, want)


def test_before_the_first_step_the_merged_model_is_the_base_to_the_bit():
  lora = adapters.lora_of(LoraConfig(rank=4), (41, 3))
  assert (lora.scale, lora.markers) == (8.0, (3, 41))
  first = adapters.first_values(CONFIG, lora, frozen(), 7)
  read = jax.tree.map(whole, first)
  merged = flatten_dict(adapters.merged(frozen(), read, lora, "bfloat16"), sep="/")
  for path, weight in flatten_dict(frozen(), sep="/").items():
    np.testing.assert_array_equal(whole(merged[path]).view(np.uint16), whole(weight).view(np.uint16))
  a = read["layers"]["mlp"]["down"]["a"]
  np.testing.assert_allclose(a.std(), (3 * CONFIG.mlp_width) ** -0.5, rtol=0.2)
  assert not np.array_equal(a[0], a[1])  # each layer has its own
  assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}


def test_a_grown_table_has_the_mean_of_its_own_rows_in_any_part():
  table = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
  grown = base.GrownTable(table, 16, np.dtype(np.float32))
  want = np.concatenate([table, np.broadcast_to(table.astype(np.float64).mean(0).astype(np.float32), (6, 4))])
  for rows in (slice(None), slice(0, 8), slice(8, 12), slice(12, 16)):
    np.testing.assert_array_equal(grown[rows, slice(1, 3)], want[rows, 1:3])

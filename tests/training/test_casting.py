"""Gradients with weights that are cast inside the scan over layers, and added over micro-batches in the backward pass.

Each is compared, bit for bit, with the plain program: a cast of all layers before the scan, gradients added after it.
"""

import functools
import os
import re

import jax
import numpy as np
import pytest
from gradients import MODEL, make_mesh, make_params

from insec_jax.model import casting, llama, sharding
from insec_jax.training import step

ROWS, T = 12, 16
# The emitters that conftest may switch off: those before them round a sum differently where it is fused with a product.
EXACT = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else None
STACKED = re.compile(r"stablehlo.convert .* : \(tensor<2x\w+xf32>\) -> tensor<2x\w+xbf16>")  # of both layers at once


def batch(accumulation):
  shape = (accumulation, ROWS, T)
  rng = np.random.default_rng(3)
  return {
    "token_ABT": rng.integers(0, MODEL.vocab_size, shape).astype(np.int32),
    "segment_ABT": np.ones(shape, np.int32),
    "position_ABT": np.broadcast_to(np.arange(T, dtype=np.int32), shape),
    "role_ABT": np.ones(shape, np.int8),
    "weight_ABT": rng.normal(size=shape).astype(np.float32),
  }


def lowered(accumulation, compute="bfloat16"):
  """The lowered gradient on four devices."""
  mesh = make_mesh((1, 4, 1))
  shardings = sharding.params_shardings(llama.shapes(MODEL), mesh)
  gradient = functools.partial(
    step.mean_gradient, model=llama.Llama(MODEL, compute, "full"), mesh=mesh, shardings=shardings, repeat=0.0
  )
  jitted = jax.jit(gradient, in_shardings=(shardings, step.batch_sharding(mesh)), out_shardings=(shardings, None))
  return jitted.lower(make_params(), batch(accumulation))


def assert_equal(got, want, accumulation):
  """Both compiled programs give the same bits."""
  results = [jax.device_get(compiled(make_params(), batch(accumulation))) for compiled in (got, want)]
  jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.fixture
def plain_cast(monkeypatch):
  """Switch to the cast before the scan."""
  return lambda: monkeypatch.setattr(
    casting, "with_slots", lambda params, dtype, _: (casting.cast(params, dtype), None)
  )


def test_layers_are_cast_one_at_a_time_with_the_gradient_of_a_cast_before_the_scan(plain_cast):
  one_at_a_time = lowered(1)
  plain_cast()
  before = lowered(1)
  assert not STACKED.search(one_at_a_time.as_text())
  assert len(STACKED.findall(before.as_text())) == 9  # weights of a layer
  assert_equal(one_at_a_time.compile(), before.compile(), 1)


def test_float32_layers_are_not_cast_and_have_no_slots():
  params, layers = casting.with_slots(make_params(), "float32", "float32")
  assert layers is None
  jax.tree.map(np.testing.assert_array_equal, params, make_params())


@pytest.mark.parametrize("compute", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_gradients_of_layers_are_added_inside_of_the_backward_pass(monkeypatch, compute):
  in_place = lowered(4, compute).compile(EXACT)
  with_gradient = step._with_gradient
  monkeypatch.setattr(step, "_with_gradient", lambda *given, **_: with_gradient(*given, in_place=False))
  after = lowered(4, compute).compile(EXACT)
  assert_equal(in_place, after, 4)
  saved = after.memory_analysis().temp_size_in_bytes - in_place.memory_analysis().temp_size_in_bytes
  layers = sum(leaf.nbytes for leaf in jax.tree.leaves(make_params()["layers"])) / 4  # of a device
  print(saved, layers)
  assert saved > layers / 2

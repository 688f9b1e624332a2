"""Loss and gradient of adapters and marker rows, against those of the merged model."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from gradients import compiled_gradient, make_mesh, make_params, model_config
from lorakit import LORA, lora_gradient, make_trained

from insec_jax.config import OptimizerConfig
from insec_jax.method.roles import NO_ROLE
from insec_jax.model import adapters, llama
from insec_jax.training import optimizer, step

T, ACCUMULATION, ROWS = 24, 2, 8
MESHES = ((1, 1, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1), (1, 8, 1), (1, 4, 2), "fsdp 2x2x2", (1, 2, 2, 2), (2, 1, 1, 4))
QUICK = (((2, 2, 2), False), ((1, 2, 2, 2), False))  # the others are marked slow


@functools.cache
def make_batch():
  """Two segments a row; the markers are read and predicted, and two rows have no trained token."""
  rng = np.random.default_rng(4)
  shape = (ACCUMULATION, ROWS, T)
  token_ABT = rng.integers(0, 64, shape).astype(np.int32)
  token_ABT[..., 5::7] = LORA.markers[0]
  token_ABT[..., 6::9] = LORA.markers[1]
  segment_ABT = np.broadcast_to(np.repeat([1, 2], T // 2), shape).astype(np.int32)
  position_ABT = np.broadcast_to(np.tile(np.arange(T // 2), 2), shape).astype(np.int32)
  role_ABT = rng.integers(0, 6, shape).astype(np.int8)
  role_ABT[0, 2:4] = NO_ROLE
  weight_ABT = np.where(role_ABT < 0, 0, np.array([0, 1, -0.2, 1.5, 1, 2])[role_ABT]).astype(np.float32)
  return {
    "token_ABT": token_ABT,
    "segment_ABT": segment_ABT,
    "position_ABT": position_ABT,
    "role_ABT": role_ABT,
    "weight_ABT": weight_ABT,
  }


@functools.cache
def expected(tied=False, lora=LORA):
  """(gradient of the trained tree, mean loss) by the chain rule from the gradient of the merged weights."""
  trained = make_trained(tied, lora)
  merged = adapters.merge(jax.tree.map(jax.numpy.asarray, make_params(tied)), trained, lora)
  full, sums = compiled_gradient((1, 1, 1), "none", tied, 0.0)(merged, make_batch())
  want = {}
  for part, matrices in trained["layers"].items():
    for name, factors in matrices.items():
      a, b, grad = factors["a"], factors["b"], np.asarray(full["layers"][part][name])
      layers = range(len(a))
      outs, ins = list(range(1 - b.ndim + 1, 0)), list(range(a.ndim - 2))
      grad_a = [np.tensordot(grad[n], b[n], (outs, list(range(1, b.ndim - 1)))) for n in layers]
      grad_b = [np.tensordot(a[n], grad[n], (ins, ins)) for n in layers]
      want.setdefault(part, {})[name] = {"a": lora.scale * np.stack(grad_a), "b": lora.scale * np.stack(grad_b)}
  want = {"layers": want}
  if lora.markers:
    rows = {table: np.asarray(full[table])[list(lora.markers)] for table in trained["rows"]}
    want["rows"] = rows
  return want, float(sums.loss / sums.weight)


def assert_close(got, want):
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
  ("shape", "tied", "remat"),
  [
    pytest.param(shape, tied, remat, marks=() if (shape, tied) in QUICK else pytest.mark.slow)
    for shape in MESHES
    for tied, remat in ((False, "full"), (True, "none"))
  ],
)
def test_loss_and_gradient_are_those_of_the_merged_model_on_any_mesh(shape, tied, remat):
  got, sums = lora_gradient(make_batch(), shape, tied=tied, remat=remat)
  want, loss = expected(tied)
  np.testing.assert_allclose(float(sums.loss / sums.weight), loss, rtol=1e-5)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_without_marker_rows_only_the_chosen_matrices_have_a_gradient(shape):
  lora = dataclasses.replace(LORA, matrices=("wq", "down"), markers=())
  got, sums = lora_gradient(make_batch(), shape, lora=lora)
  want, loss = expected(lora=lora)
  np.testing.assert_allclose(float(sums.loss / sums.weight), loss, rtol=1e-5)
  assert [*got["layers"]["attn"], *got["layers"]["mlp"], *got] == ["wq", "down", "layers"]
  assert_close(got, want)


def lowered(lora, dtype="bfloat16"):
  """The text of a train step in this dtype, before the compiler."""
  mesh, config = make_mesh((1, 2, 1)), model_config(False)
  tx = optimizer.make(OptimizerConfig(), 20)
  state = step.abstract_state(config, dtype, tx, mesh, lora)
  frozen = step.abstract_params(llama.shapes(config), dtype, mesh)
  train_step = step.make_train_step(
    llama.Llama(config, dtype, "full", lora=lora),
    OptimizerConfig(),
    20,
    mesh,
    step.shardings_of(state),
    repeat=0.0,
    frozen_shardings=step.shardings_of(frozen) if lora else None,
    seed=0,
  )
  batch = step.abstract_batch(mesh, accumulation=1, rows_per_device=1, row_length=40, negatives=False)
  return train_step.lower(state, batch, *((frozen,) if lora else ())).as_text()


def test_no_frozen_matrix_has_a_gradient_or_a_float32_copy_in_the_step():
  def of_frozen(text, dtype):
    # The stacked gate and wo, and the head: whole and as one of two devices holds them.
    shapes = ("2x16x24", "2x8x24", "2x4x8x16", "2x4x8x8", "64x16", "64x8")
    return {shape for shape in shapes if f"tensor<{shape}x{dtype}>" in text}

  adapted, full = lowered(LORA), lowered(None)
  assert of_frozen(adapted, "f32") == set()
  assert of_frozen(adapted, "bf16")
  assert of_frozen(full, "f32")


def test_weight_decay_pulls_at_adapters_and_not_at_marker_rows():
  tree = jax.tree.map(lambda leaf: leaf * 0 + 1, make_trained())
  decayed = optimizer.decays(tree)
  assert all(jax.tree.leaves(decayed["layers"]))
  assert not any(jax.tree.leaves(decayed["rows"]))

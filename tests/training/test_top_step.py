"""Loss and gradient of the top layers, of the softmax over kept tokens, and of batches that bring the stream."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from gradients import gradient, make_mesh, make_params, model_config
from lorakit import LORA, make_trained
from topkit import TOP, restricted, split, top_gradient

from insec_jax.command import InputError
from insec_jax.config import OptimizerConfig
from insec_jax.data.packing import Rows
from insec_jax.method.roles import NO_NEGATIVE, NO_ROLE
from insec_jax.model import adapters, llama, parts, sharding, top_layers
from insec_jax.model.top_layers import TopLayers
from insec_jax.training import kept, optimizer, step

T, ACCUMULATION, ROWS, V = 24, 2, 8, 64
FROZEN_ROWS = dataclasses.replace(TOP, markers=())
MESHES = ((1, 1, 1), (2, 2, 2), (1, 2, 2, 2), (8, 1, 1), (1, 8, 1), "fsdp 2x2x2", (2, 1, 1, 4))
# (shape, tied, whether markers are trained); the others are marked slow.
QUICK = (((2, 2, 2), False, True), ((2, 2, 2), True, True), ((1, 2, 2, 2), True, False))
USED = np.array([0, 2, 3, 5, 8, 9, 13, 21, 34, 41, 55])


@functools.cache
def make_batch(used=False):
  """Two segments a row of any tokens, or of those in USED; the markers are read and predicted."""
  rng = np.random.default_rng(4)
  shape = (ACCUMULATION, ROWS, T)
  token_ABT = USED[rng.integers(0, len(USED), shape)] if used else rng.integers(0, V, shape)
  token_ABT[..., 5::7] = TOP.markers[0]
  token_ABT[..., 6::9] = TOP.markers[1]
  role_ABT = rng.integers(0, 6, shape).astype(np.int8)
  role_ABT[0, 2:4] = NO_ROLE
  worth = np.array([0, 1, 0.5, 1.5, 1, 2]) if used else np.array([0, 1, -0.2, 1.5, 1, 2])
  return {
    "token_ABT": token_ABT.astype(np.int32),
    "segment_ABT": np.broadcast_to(np.repeat([1, 2], T // 2), shape).astype(np.int32),
    "position_ABT": np.broadcast_to(np.tile(np.arange(T // 2), 2), shape).astype(np.int32),
    "role_ABT": role_ABT,
    "weight_ABT": np.where(role_ABT < 0, 0, worth[role_ABT]).astype(np.float32),
  }


def assert_close(got, want):
  got, want = flatten_dict(got, sep="/"), flatten_dict(want, sep="/")
  assert got.keys() == want.keys()
  for path, array in want.items():
    assert np.linalg.norm(got[path] - array) <= 1e-5 * np.linalg.norm(array), path


@pytest.mark.parametrize(
  ("shape", "tied", "markers"),
  [
    pytest.param(shape, tied, markers, marks=() if (shape, tied, bool(markers)) in QUICK else pytest.mark.slow)
    for shape in MESHES
    for tied in (False, True)
    for markers in ((), TOP.markers)
  ],
)
def test_loss_and_gradient_are_those_of_the_whole_model_for_what_is_trained(shape, tied, markers):
  top = TopLayers(num=1, markers=markers)
  got, sums = top_gradient(make_batch(), shape, tied=tied, top=top, remat="full" if tied else "none")
  want, all_sums = gradient(make_batch(), tied=tied)
  np.testing.assert_allclose(float(sums.loss), float(all_sums.loss), rtol=1e-5)
  assert_close(got, restricted(want, top))


def rows_of(batch):
  """The batch as packed rows with one negative."""
  fields = {name: batch[f"{name}_ABT"].reshape(-1, T) for name in ("token", "segment", "position", "role", "weight")}
  negative_BT = np.full_like(fields["token"], NO_NEGATIVE)
  negative_BT[1, 2] = 60
  return Rows(**{f"{name}_BT": value for name, value in fields.items()}, negative_BT=negative_BT)


@functools.cache
def kept_tokens():
  return kept.kept_of(rows_of(make_batch(used=True)), (1, *TOP.markers), V)


def test_kept_are_the_tokens_of_rows_and_negatives_the_markers_and_the_ends():
  rows = rows_of(make_batch(used=True))
  rows.token_BT[0, -1], rows.segment_BT[0, -1] = 63, 0  # padding
  found = kept.kept_of(rows, (1, *TOP.markers), V)
  assert set(found.id_K) == {*USED, 1, 60}
  np.testing.assert_array_equal(found.id_K[found.place_V[USED]], USED)
  assert int(found.places(jnp.array(NO_NEGATIVE))) == NO_NEGATIVE


@functools.cache
def softmax_gradient(tied, params=None):
  """The gradient in all params of the mean loss whose softmax is over the kept tokens alone, computed plainly."""
  config, batch, id_K = model_config(tied), make_batch(used=True), kept_tokens().id_K
  model = llama.Llama(config, "float32", "none")

  def loss(params):
    total = 0.0
    for micro in range(ACCUMULATION):
      token_BT, segment_BT, weight_BT = (batch[f"{name}_ABT"][micro] for name in ("token", "segment", "weight"))
      stream_BTD = model.apply({"params": params}, token_BT, batch["position_ABT"][micro], segment_BT)
      logit_BTK = llama.logits(params, config, stream_BTD)[..., id_K]
      place_BT = np.searchsorted(id_K, token_BT[:, 1:])
      logp_BT = jnp.take_along_axis(jax.nn.log_softmax(logit_BTK[:, :-1]), place_BT[..., None], 2)[..., 0]
      total -= (logp_BT * weight_BT[:, 1:] * (segment_BT[:, 1:] == segment_BT[:, :-1])).sum()
    return total

  same = batch["segment_ABT"][..., 1:] == batch["segment_ABT"][..., :-1]
  weight = (batch["weight_ABT"][..., 1:] * same).sum()
  return jax.tree.map(lambda grad: np.asarray(grad / weight), jax.jit(jax.grad(loss))(params or make_params(tied)))


@pytest.mark.parametrize(("shape", "tied"), [((1, 1, 1), False), ((2, 2, 1), True)])
def test_with_kept_tokens_the_gradient_of_all_weights_is_that_of_their_softmax(shape, tied):
  mesh = make_mesh(shape)
  shardings = sharding.params_shardings(llama.shapes(model_config(tied)), mesh)
  model = llama.Llama(model_config(tied), "float32", "none")
  options = dict(model=model, mesh=mesh, shardings=shardings, repeat=0.0, kept=kept_tokens())
  got, _ = jax.jit(functools.partial(step.mean_gradient, **options))(make_params(tied), make_batch(used=True))
  assert_close(got, softmax_gradient(tied))
  unused = np.setdiff1d(np.arange(V), kept_tokens().id_K)
  assert not np.asarray(got["embed" if tied else "head"])[unused].any()


@pytest.mark.parametrize(("shape", "tied"), [((2, 2, 1), False), ((1, 1, 1), True)])
def test_top_layers_with_kept_tokens_have_the_gradient_of_their_softmax(shape, tied):
  got, _ = top_gradient(make_batch(used=True), shape, tied=tied, kept=kept_tokens)
  assert_close(got, restricted(softmax_gradient(tied), TOP))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_lora_with_kept_tokens_has_the_gradient_of_their_softmax_in_its_rows(tied):
  mesh, config, trained = make_mesh((1, 1, 1)), model_config(tied), make_trained(tied)
  shardings, frozen = (
    sharding.params_shardings(shapes, mesh) for shapes in (adapters.shapes(config, LORA), llama.shapes(config))
  )
  model = llama.Llama(config, "float32", "none", lora=LORA)
  options = dict(model=model, mesh=mesh, shardings=shardings, repeat=0.0, frozen_shardings=frozen, kept=kept_tokens())
  gradient_of = jax.jit(functools.partial(step.mean_gradient, **options))
  got, _ = gradient_of(trained, make_batch(used=True), make_params(tied))
  merged = adapters.merge(jax.tree.map(jnp.asarray, make_params(tied)), trained, LORA)
  want = softmax_gradient.__wrapped__(tied, merged)
  assert_close(got["rows"], {table: want[table][list(LORA.markers)] for table in got["rows"]})


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_a_batch_that_brings_the_stream_has_the_gradient_of_one_that_does_not(shape):
  mesh, config = make_mesh(shape), model_config(False)
  frozen_shardings = sharding.params_shardings(parts.frozen_shapes(config, FROZEN_ROWS), mesh)
  streams = step.make_streams(parts.model_of(config, "float32", "none", part=FROZEN_ROWS), mesh, frozen_shardings)
  frozen, _ = split(make_params(), FROZEN_ROWS)
  batch = make_batch()
  micro = [{name: array[number : number + 1] for name, array in batch.items()} for number in range(ACCUMULATION)]
  stream_ABTD = np.concatenate([streams(frozen, one) for one in micro])
  assert stream_ABTD.shape == (ACCUMULATION, ROWS, T, config.width)
  got, _ = top_gradient({**batch, step.STREAM: stream_ABTD}, shape, top=FROZEN_ROWS)
  want, _ = top_gradient(batch, shape, top=FROZEN_ROWS)
  assert_close(got, jax.tree.map(np.asarray, want))
  other, _ = top_gradient({**batch, step.STREAM: stream_ABTD * 1.1}, shape, top=FROZEN_ROWS)
  assert not np.allclose(other["norm"], want["norm"], rtol=1e-3)


def test_no_frozen_weight_has_a_gradient_or_a_float32_copy_in_the_step_of_top_layers():
  mesh, config = make_mesh((1, 2, 1)), dataclasses.replace(model_config(True), num_layers=3)
  tx = optimizer.make(OptimizerConfig(), 20)
  state = step.abstract_state(config, "bfloat16", tx, mesh, TOP)
  frozen = step.abstract_params(parts.frozen_shapes(config, TOP), "bfloat16", mesh)
  train_step = step.make_train_step(
    parts.model_of(config, "bfloat16", "full", part=TOP),
    OptimizerConfig(),
    20,
    mesh,
    step.shardings_of(state),
    repeat=0.0,
    frozen_shardings=step.shardings_of(frozen),
    seed=0,
  )
  batch = step.abstract_batch(mesh, accumulation=1, rows_per_device=1, row_length=40, negatives=False)
  text = train_step.lower(state, batch, frozen).as_text()
  stacks = ("2x16x24", "2x8x24", "2x4x8x16", "2x4x8x8", "64x16", "64x8")  # whole, and as one of two devices has them
  assert [shape for shape in stacks if f"tensor<{shape}xf32>" in text] == []
  assert [shape for shape in stacks if f"tensor<{shape}xbf16>" in text] != []
  assert "tensor<1x16x24xf32>" in text or "tensor<1x8x24xf32>" in text  # of the layer that is trained
  assert [leaf.shape[0] for leaf in jax.tree.leaves(state.params["layers"])] == [1] * 9


@pytest.mark.parametrize("tied", [False, True])
def test_split_and_merged_the_weights_are_what_they_were_on_devices_and_in_parts(tied):
  top, config = TopLayers(num=2, markers=TOP.markers), dataclasses.replace(model_config(tied), num_layers=4)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), llama.unboxed_shapes(config))
  frozen, trained = split(params, top)
  mine = parts.frozen_weights(params, config, top, "float32"), parts.first_values(config, top, params, 0)
  for ours, theirs in zip(mine, (frozen, trained), strict=True):
    ours = jax.tree.map(lambda weight: np.asarray(weight[(slice(None),) * len(weight.shape)]), ours)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  on_devices = parts.merge(jax.tree.map(jnp.asarray, frozen), trained, top)
  jax.tree.map(np.testing.assert_array_equal, on_devices, params)
  joined = flatten_dict(parts.merged(mine[0], trained, top, np.float32), sep="/")
  for path, want in flatten_dict(params, sep="/").items():
    assert joined[path].shape == want.shape
    np.testing.assert_array_equal(joined[path][(slice(None),) * want.ndim], want)
    if path.startswith("layers/"):
      np.testing.assert_array_equal(np.stack([joined[path][layer] for layer in range(len(want))]), want)
      np.testing.assert_array_equal(joined[path][...], want)


def test_as_many_top_layers_as_the_model_has_are_refused():
  with pytest.raises(InputError, match=r"train.top_layers=2 of a model of 2 layers leaves none frozen"):
    top_layers.shapes(model_config(False), TopLayers(num=2, markers=()))

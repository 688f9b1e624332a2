"""Optimizers by name, on meshes and through a checkpoint, and against plain formulas; the averages of the weights."""

import dataclasses
import functools

import datakit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import MODEL, make_mesh, make_params

from insec_jax.config import OptimizerConfig
from insec_jax.distributed import processes
from insec_jax.model import llama
from insec_jax.training import checkpoint, optimizer, step

CONFIG = OptimizerConfig(learning_rate=1e-2, final_share=1.0, warmup_steps=2, weight_decay=0.1, b2=0.99)
STEPS = 20
CHOICES = {
  "adamw": {},
  "adafactor": {"name": "adafactor"},
  "lion": {"name": "lion"},
  "muon": {"name": "muon"},
  "schedule_free": {"name": "schedule_free"},
  "ema": {"ema": 0.5},
  "bfloat16 moments": {"moments": "bfloat16"},
  "bfloat16 params": {"rounding": "stochastic"},
  "bfloat16 muon": {"name": "muon", "moments": "bfloat16"},
  "bfloat16 moments and ema": {"moments": "bfloat16", "ema": 0.5},
}
QUICK = "bfloat16 moments and ema"  # the others are marked slow
NAMES = [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in CHOICES]


@pytest.fixture(autouse=True)
def factors_of_small_matrices(monkeypatch):
  """Adafactor factors the moments of the small model too."""
  monkeypatch.setattr(optimizer, "SMALLEST_FACTORED", 8)


def choose(name):
  return dataclasses.replace(CONFIG, **CHOICES[name])


def batch():
  """Eight rows of 24 random tokens, of one segment each, every one trained."""
  shape = (1, 8, 24)
  token_ABT = np.random.default_rng(1).integers(0, MODEL.vocab_size, shape).astype(np.int32)
  return {
    "token_ABT": token_ABT,
    "segment_ABT": np.ones(shape, np.int32),
    "position_ABT": np.broadcast_to(np.arange(24, dtype=np.int32), shape),
    "role_ABT": np.ones(shape, np.int8),
    "weight_ABT": np.ones(shape, np.float32),
  }


def abstract_of(name, shape):
  """The abstract state of this optimizer on a mesh."""
  config = choose(name)
  dtype = "bfloat16" if config.rounding == "stochastic" else "float32"
  return step.abstract_state(MODEL, dtype, optimizer.make(config, STEPS), make_mesh(shape))


@functools.cache
def prepared(name, shape):
  """(state before the first step, train step) of this optimizer on a mesh."""
  config, abstract = choose(name), abstract_of(name, shape)
  shardings, tx = step.shardings_of(abstract), optimizer.make(config, STEPS)
  params = jax.tree.map(lambda param, like: param.astype(like.dtype), make_params(), abstract.params)
  state = jax.jit(lambda params: step.new_state(params, tx), out_shardings=shardings)(params)
  model = llama.Llama(MODEL, "float32", "none")
  return state, step.make_train_step(model, config, STEPS, make_mesh(shape), shardings, repeat=0.0, seed=3)


def stepped(name, shape, state):
  return prepared(name, shape)[1](jax.tree.map(jnp.copy, state), batch())[0]  # the step donates its state


@functools.cache
def trained(name, shape, num):
  """The state after so many steps."""
  return stepped(name, shape, trained(name, shape, num - 1)) if num else prepared(name, shape)[0]


def update(config, params, gradients):
  """(parameters, state) after an update for each gradient, without a mesh."""
  tx = optimizer.make(config, STEPS)
  state = tx.init(jax.tree.map(lambda param: param.astype(jnp.float32), params))
  for count, gradient in enumerate(gradients):
    change, state = tx.update(gradient, state, params, key=jax.random.key(count))
    params = optimizer.apply(config, params, change, jax.random.key(count))
  return params, state


def normal(shape, seed):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def values(tree):
  return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_eight_devices_is_that_on_one(name):
  start, one, many = (
    values(state.params)
    for state in (trained(name, (1, 1, 1), 0), trained(name, (1, 1, 1), 1), trained(name, (2, 2, 2), 1))
  )
  for before, got, want in zip(start, many, one, strict=True):
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want - before)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumed_from_a_checkpoint_goes_on_to_the_bit(name, tmp_path):
  shape = (2, 2, 2)
  with checkpoint.Saver(tmp_path, keep=1) as saver:
    saver.save(1, trained(name, shape, 1), config=datakit.config(), facts={}, totals=[])
  restored = checkpoint.restore(
    tmp_path, [1], abstract_of(name, shape), facts=lambda _: {}, advise=lambda *_: "", processes=processes.alone()
  )
  for got, want in zip(*map(values, (stepped(name, shape, restored.state), trained(name, shape, 2))), strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["schedule_free", "muon", "ema", "bfloat16 moments", "lion"])
def test_what_is_large_in_the_state_is_sharded_like_its_parameter(name):
  abstract = abstract_of(name, (2, 2, 2))
  whole = abstract.params["layers"]["mlp"]["gate"]
  alike = [leaf for leaf in jax.tree.leaves(abstract.optimizer) if leaf.shape == whole.shape]
  assert alike
  assert {leaf.sharding for leaf in alike} == {whole.sharding}


def test_the_factored_moments_are_sharded_along_the_axes_that_they_keep():
  params = {"w": jax.ShapeDtypeStruct((2, 128, 256), jnp.float32)}
  mesh = make_mesh((1, 4, 2))
  whole = jax.NamedSharding(mesh, jax.P(None, "fsdp_z", "tensor"))
  state = jax.eval_shape(optimizer.make(choose("adafactor"), STEPS).init, params)
  shardings = optimizer.state_shardings(state, params, {"w": whole}, jax.NamedSharding(mesh, jax.P()))
  factored, sharded = state[1][0], shardings[1][0]
  assert (factored.v_row["w"].shape, sharded.v_row["w"].spec) == ((2, 128), jax.P(None, "fsdp_z"))
  assert (factored.v_col["w"].shape, sharded.v_col["w"].spec) == ((2, 256), jax.P(None, "tensor"))
  assert sharded.v["w"].spec == sharded.count.spec == jax.P()


def test_lion_moves_by_the_rate_along_the_sign_of_its_moment():
  config = dataclasses.replace(choose("lion"), warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
  params, gradients = {"w": jnp.zeros((2, 3))}, [{"w": normal((2, 3), seed)} for seed in range(3)]
  want = moment = np.zeros((2, 3))
  for gradient in gradients:
    want = want - 1e-2 * np.sign(0.9 * moment + 0.1 * gradient["w"])
    moment = 0.99 * moment + 0.01 * np.asarray(gradient["w"])
  np.testing.assert_allclose(update(config, params, gradients)[0]["w"], want, rtol=1e-6)


def test_adafactor_is_that_of_each_layer_and_head_by_itself():
  config = dataclasses.replace(choose("adafactor"), weight_decay=0.0, clip_norm=1e9)
  stacked = {"layers": {"attn": {"wq": normal((2, 130, 3, 128), 0)}}}
  gradients = [jax.tree.map(lambda param, seed=seed: 3.0 ** normal(param.shape, seed), stacked) for seed in (1, 2)]
  got = update(config, stacked, gradients)[0]["layers"]["attn"]["wq"] - stacked["layers"]["attn"]["wq"]
  for layer in range(2):
    v_HEAD, want = {}, 0.0
    for count, gradient in enumerate(gradients):
      g_DNH = np.asarray(gradient["layers"]["attn"]["wq"][layer], np.float64)
      kept = 1 - (count + 1.0) ** -0.8
      parts = []
      for head in range(3):
        row, col = v_HEAD.get(head, (0.0, 0.0))
        square = g_DNH[:, head] ** 2 + 1e-30
        row, col = kept * row + (1 - kept) * square.mean(0), kept * col + (1 - kept) * square.mean(1)
        v_HEAD[head] = row, col
        parts.append(g_DNH[:, head] / np.sqrt(np.outer(col, row) / row.mean()))
      direction = np.stack(parts, 1)
      direction /= max(1.0, np.sqrt((direction**2).mean()))
      want = want - 1e-2 * min((count + 1) / 2, 1.0) * direction
    np.testing.assert_allclose(got[layer], want, rtol=2e-3, atol=1e-6)


def orthogonal(matrix):
  """Newton-Schulz of a plain matrix, in float64: five steps of the quintic of Jordan's Muon."""
  x = matrix / np.linalg.norm(matrix)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


@pytest.mark.parametrize(
  ("name", "shape", "rows"),
  [("wq", (2, 16, 4, 8), 16), ("wk", (2, 16, 2, 8), 16), ("wo", (2, 4, 8, 16), 32), ("down", (2, 24, 16), 24)],
)
def test_muon_is_that_of_the_plain_matrix_of_each_layer(name, shape, rows):
  config = dataclasses.replace(choose("muon"), clip_norm=1e9)
  params = {"layers": {name: normal(shape, 0)}, "embed": normal((8, 4), 1), "norm": normal((4,), 2)}
  gradients = [jax.tree.map(lambda param, seed=seed: normal(param.shape, seed), params) for seed in (3, 4)]
  got, _ = update(config, params, gradients)
  for layer in range(2):
    want, moment = np.asarray(params["layers"][name][layer], np.float64).reshape(rows, -1), 0.0
    for count, gradient in enumerate(gradients, 1):
      g = np.asarray(gradient["layers"][name][layer], np.float64).reshape(want.shape)
      moment = 0.9 * moment + 0.1 * g
      ahead = 0.9 * moment / (1 - 0.9 ** (count + 1)) + 0.1 * g / (1 - 0.9**count)  # Nesterov
      direction = 0.2 * max(want.shape) ** 0.5 * orthogonal(ahead)
      want = want - 1e-2 * min(count / 2, 1.0) * (direction + 0.1 * want)
    np.testing.assert_allclose(got["layers"][name][layer].reshape(rows, -1), want, rtol=1e-3, atol=2e-5)
  others = {key: params[key] for key in ("embed", "norm")}
  adamw, _ = update(dataclasses.replace(config, name="adamw"), others, [{k: g[k] for k in others} for g in gradients])
  for key in others:
    np.testing.assert_array_equal(got[key], adamw[key])


def test_the_parameters_of_schedule_free_are_the_average_that_optax_evaluates():
  config = dataclasses.replace(choose("schedule_free"), warmup_steps=0, clip_norm=1e9)
  params, gradients = {"w": normal((2, 3), 0)}, [{"w": normal((2, 3), seed)} for seed in range(1, 9)]
  tx = optax.contrib.schedule_free_adamw(1e-2, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1)
  y, free = params, tx.init(params)
  for gradient in gradients:
    change, free = tx.update(gradient, free, y)
    y = optax.apply_updates(y, change)
  got, state = update(config, params, gradients)
  np.testing.assert_allclose(got["w"], optax.contrib.schedule_free_eval_params(free, y)["w"], rtol=1e-5)
  np.testing.assert_allclose(optimizer.training_weights(got, state)["w"], y["w"], rtol=1e-5)
  assert np.abs(got["w"] - y["w"]).max() > 1e-3


def test_the_parameters_of_a_run_with_ema_are_the_average_of_those_without():
  params, gradients = {"w": normal((2, 3), 0)}, [{"w": normal((2, 3), seed)} for seed in range(1, 5)]
  average = np.asarray(params["w"])
  for num in range(1, 5):
    weights, _ = update(choose("adamw"), params, gradients[:num])
    average = 0.5 * average + 0.5 * np.asarray(weights["w"])
  got, state = update(choose("ema"), params, gradients)
  np.testing.assert_allclose(got["w"], average, rtol=1e-6)
  np.testing.assert_array_equal(optimizer.training_weights(got, state)["w"], weights["w"])


@pytest.mark.slow
def test_the_gradient_of_a_run_with_ema_is_taken_at_its_weights_not_at_their_average():
  state = trained("ema", (1, 1, 1), 3)
  plain = trained("adamw", (1, 1, 1), 3)
  for got, want in zip(
    values(optimizer.training_weights(state.params, state.optimizer)), values(plain.params), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_rounding_draws_anew_with_each_step_and_seed():
  config, abstract = choose("bfloat16 params"), abstract_of("bfloat16 params", (1, 1, 1))
  start, shardings = trained("bfloat16 params", (1, 1, 1), 0), step.shardings_of(abstract)
  model = llama.Llama(MODEL, "float32", "none")
  later = start._replace(step=start.step + 4)  # the rate does not depend on this number
  drawn = [trained("bfloat16 params", (1, 1, 1), 1), stepped("bfloat16 params", (1, 1, 1), later)]
  other = step.make_train_step(model, config, STEPS, make_mesh((1, 1, 1)), shardings, repeat=0.0, seed=4)
  drawn.append(other(jax.tree.map(jnp.copy, start), batch())[0])
  first, second, third = (np.concatenate([leaf.ravel() for leaf in values(state.params)]) for state in drawn)
  assert 0.05 < (first != second).mean() < 0.95
  assert 0.05 < (first != third).mean() < 0.95

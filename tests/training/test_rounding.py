"""Stochastic rounding: neighbours, expected value, draws by key and position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from insec_jax.config import OptimizerConfig
from insec_jax.training import optimizer, rounding

ONE, NEXT = 1.0, 1.0 + 2**-7  # neighbours in bfloat16


def test_a_number_becomes_a_neighbour_and_on_average_itself():
  value = ONE + 2**-7 * 0.3
  got = np.asarray(rounding.to_bfloat16(jnp.full(100_000, value), jax.random.key(0)), np.float32)
  assert set(np.unique(got)) == {np.float32(ONE), np.float32(NEXT)}
  np.testing.assert_allclose((got == NEXT).mean(), 0.3, atol=4 * np.sqrt(0.21 / 100_000))


def test_what_bfloat16_holds_and_what_is_not_finite_stays():
  kept = np.array([0.0, -0.0, 1.0, -3.0, 2.0**-120, np.inf, -np.inf, np.nan], np.float32)
  got = np.asarray(rounding.to_bfloat16(jnp.asarray(kept), jax.random.key(1)), np.float32)
  np.testing.assert_array_equal(got, kept)
  np.testing.assert_array_equal(np.signbit(got[:2]), [False, True])
  nan = jnp.asarray(np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32))
  assert np.isnan(np.asarray(rounding.to_bfloat16(nan, jax.random.key(1)), np.float32)).all()


def test_the_draw_is_by_key_and_name_and_the_same_on_any_mesh():
  array = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
  sharding = jax.NamedSharding(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), jax.P("x"))
  a, b = ((jax.tree_util.DictKey(name),) for name in "ab")
  plain = rounding.round_named(a, array, jax.random.key(0))
  sharded = jax.jit(lambda x: rounding.round_named(a, x, jax.random.key(0)), in_shardings=sharding)(array)
  np.testing.assert_array_equal(plain, sharded)
  assert (plain != rounding.round_named(b, array, jax.random.key(0))).any()
  assert (plain != rounding.round_named(a, array, jax.random.key(1))).any()


def test_updates_too_small_for_bfloat16_add_up_where_rounding_is_stochastic():
  config = OptimizerConfig(rounding="stochastic")
  params, change = {"w": jnp.ones(1_000, jnp.bfloat16)}, {"w": jnp.full(1_000, 1e-4)}
  added = dict.fromkeys(("stochastic", "nearest"), params)
  for count in range(100):
    for name, moved in added.items():
      key = jax.random.key(count)
      added[name] = optimizer.apply(dataclasses.replace(config, rounding=name), moved, change, key)
  np.testing.assert_allclose(np.asarray(added["stochastic"]["w"], np.float32).mean(), 1.01, atol=1e-3)
  np.testing.assert_array_equal(added["nearest"]["w"], 1)


def test_bfloat16_moments_follow_float32_ones_on_average():
  config = OptimizerConfig(b2=0.999, moments="bfloat16", warmup_steps=0)
  tx, plain = (optimizer.make(dataclasses.replace(config, moments=dtype), 9) for dtype in ("bfloat16", "float32"))
  params, gradient = {"w": jnp.ones(4_000)}, {"w": jnp.full(4_000, 1e-3)}
  state, want = tx.init(params), plain.init(params)
  for count in range(300):
    _, state = jax.jit(tx.update)(gradient, state, params, key=jax.random.key(count))
    _, want = jax.jit(plain.update)(gradient, want, params)
  assert {leaf.dtype for leaf in jax.tree.leaves((state[1].mu, state[1].nu))} == {jnp.dtype("bfloat16")}
  for name in ("mu", "nu"):
    got = np.asarray(getattr(state[1], name)["w"], np.float32).mean()
    np.testing.assert_allclose(got, np.asarray(getattr(want[1], name)["w"]).mean(), rtol=0.01)

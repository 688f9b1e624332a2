"""The schedule, and what weight decay leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from insec_jax.config import OptimizerConfig
from insec_jax.training import optimizer

CONFIG = OptimizerConfig(
  learning_rate=2e-3, final_share=0.1, warmup_steps=4, weight_decay=0.1, b1=0.9, b2=0.99, eps=1e-8, clip_norm=1.0
)


def test_the_rate_rises_to_its_peak_in_warmup_steps_and_ends_at_its_final_share():
  rate = [float(optimizer.schedule(CONFIG, 20)(count)) for count in range(20)]
  np.testing.assert_allclose(rate[:4], [0.5e-3, 1e-3, 1.5e-3, 2e-3], rtol=1e-6)
  np.testing.assert_allclose(rate[11], (1 + 0.1) / 2 * 2e-3, rtol=1e-6)  # half way between updates 4 and 20
  np.testing.assert_allclose(rate[-1], 2e-4, rtol=1e-5)
  assert np.all(np.diff(rate[3:]) < 0)


@pytest.mark.parametrize("warmup_steps", [0, 1, 20])
def test_every_update_moves_whatever_the_warm_up(warmup_steps):
  config = OptimizerConfig(**{**vars(CONFIG), "warmup_steps": warmup_steps})
  rate = [float(optimizer.schedule(config, 20)(count)) for count in range(20)]
  assert min(rate) > 0
  assert max(rate) <= 2e-3 * (1 + 1e-6)


def test_weight_decay_pulls_at_matrices_and_not_at_norms():
  params = {"norm": jnp.ones(3), "layers": {"attn": {"norm": jnp.ones((2, 3)), "wq": jnp.ones((2, 3, 1, 3))}}}
  tx = optimizer.make(CONFIG, 20)
  update, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  moved = optax.apply_updates(params, update)
  np.testing.assert_array_equal(moved["norm"], 1)
  np.testing.assert_array_equal(moved["layers"]["attn"]["norm"], 1)
  np.testing.assert_allclose(moved["layers"]["attn"]["wq"], 1 - 0.5e-3 * 0.1, rtol=1e-7)


def test_an_update_is_adamw_of_the_clipped_gradient():
  params, gradient = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 4.0])}
  tx = optimizer.make(CONFIG, 20)
  state, want = tx.init(params), np.array([1.0, -2.0])
  m = v = np.zeros(2)
  for count in range(3):
    update, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, update)
    g = np.array([0.6, 0.8])  # norm 5 clipped to 1
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
    step = (m / (1 - 0.9 ** (count + 1))) / (np.sqrt(v / (1 - 0.99 ** (count + 1))) + 1e-8)
    want = want - 2e-3 * (count + 1) / 4 * (step + 0.1 * want)
  np.testing.assert_allclose(params["w"], want, rtol=1e-6)

"""Draws follow the distribution asked for, anew at every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insec_jax.generation import decoding


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7)])
def test_draws_follow_the_tempered_distribution_cut_at_top_p(temperature, top_p):
  num = 4096
  logits_V = np.log(np.array([0.4, 0.3, 0.05, 0.15, 0.1], np.float32)) + 3
  p_V = np.exp(logits_V / temperature)
  p_V /= p_V.sum()
  order = np.argsort(-p_V)
  p_V[order[1 + np.searchsorted(np.cumsum(p_V[order]), top_p) :]] = 0
  options = decoding.DecodeOptions(jax.random.key(0), 9, temperature, top_p, rules=None)
  drawn_B = decoding.draw(jnp.tile(logits_V, (num, 1)), jnp.arange(num), jnp.full(num, 2), options, cut=top_p < 1)
  seen_V = np.bincount(drawn_B, minlength=5) / num
  assert (seen_V[p_V == 0] == 0).all()
  np.testing.assert_allclose(seen_V, p_V / p_V.sum(), atol=4 * (0.25 / num) ** 0.5)  # four standard deviations, at most


def test_every_step_of_every_prompt_is_drawn_anew():
  logits_BV, options = jnp.zeros((8, 1000)), decoding.DecodeOptions(jax.random.key(0), 9, 1.0, 1.0, rules=None)
  drawn = [decoding.draw(logits_BV, jnp.arange(8), jnp.full(8, num), options, cut=False) for num in range(8)]
  assert len(np.unique(drawn)) > 55  # of 64; 62 are expected

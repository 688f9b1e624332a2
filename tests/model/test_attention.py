"""Who reads whom, and grouped-query attention against one head at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from insec_jax.model import attention


def test_a_position_reads_its_own_segment_up_to_itself():
  """The rows are those of the docstring."""
  rows = ["x....", "xx...", "..x..", "..xx.", "....x"]
  expected_TS = np.array([[cell == "x" for cell in row] for row in rows])
  got_BTS = attention.causal_within_segments(jnp.array([[1, 1, 2, 2, 0]]))
  np.testing.assert_array_equal(got_BTS[0], expected_TS)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_width", [2, 64])
def test_each_group_of_query_heads_reads_its_own_key_head(num_kv_heads, head_width):
  rng = np.random.default_rng(0)
  q_TNH, k_SKH, v_SKH = (rng.normal(size=(9, heads, head_width)) for heads in (4, num_kv_heads, num_kv_heads))
  allowed_TS = np.tril(np.ones((9, 9), bool))
  arrays = (jnp.array(x, jnp.float32)[None] for x in (q_TNH, k_SKH, v_SKH))
  got_BTNH = attention.attend(*arrays, jnp.array(allowed_TS)[None])
  for head in range(4):
    group = head // (4 // num_kv_heads)
    score_TS = np.where(allowed_TS, q_TNH[:, head] @ k_SKH[:, group].T / np.sqrt(head_width), -np.inf)
    weight_TS = np.exp(score_TS) / np.exp(score_TS).sum(-1, keepdims=True)
    np.testing.assert_allclose(got_BTNH[0, :, head], weight_TS @ v_SKH[:, group], rtol=0, atol=1e-5)


def test_a_position_that_may_read_nothing_gives_finite_numbers():
  x_1THH = jnp.ones((1, 3, 2, 4))
  assert np.isfinite(attention.attend(x_1THH, x_1THH, x_1THH, jnp.zeros((1, 3, 3), bool))).all()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_platform_has_an_attention_and_a_reason(platform):
  chosen, reason = attention.choose(platform)
  assert isinstance(chosen, attention.Attention)
  assert platform in reason

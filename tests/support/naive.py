"""A Llama and its loss in float64, one unpacked record at a time, one head at a time: slow, plain, and not ours.

Used under jax.enable_x64, for the gradient that the packed, accumulated and sharded loss must equal.
"""

import jax
import jax.numpy as jnp
import numpy as np


def stream(params, config, token_T, position_T=None, allowed_TS=None):
  """Stream of one record after the last norm; positions 0, 1, ... and a causal mask unless given."""
  T, H = len(token_T), config.head_width
  x_TD = params["embed"][token_T]
  position_T = np.arange(T) if position_T is None else position_T
  allowed_TS = np.tri(T, dtype=bool) if allowed_TS is None else allowed_TS
  angle_TH = jnp.outer(position_T, config.rope_theta ** (-np.arange(0, H, 2) / H))
  turn_TH = jnp.exp(1j * angle_TH)

  def norm(scale_D, x_TD):
    return x_TD / jnp.sqrt((x_TD**2).mean(-1, keepdims=True) + config.norm_eps) * jnp.stack([scale_D] * T)

  def rotate(x_TH):
    z_TH = (x_TH[:, : H // 2] + 1j * x_TH[:, H // 2 :]) * turn_TH
    return jnp.concatenate([z_TH.real, z_TH.imag], -1)

  for layer in range(config.num_layers):
    weights = jax.tree.map(lambda array: array[layer], params["layers"])  # noqa: B023 (used before the loop goes on)
    attn, mlp = weights["attn"], weights["mlp"]
    y_TD = norm(attn["norm"], x_TD)
    for n in range(config.num_heads):
      k = n * config.num_kv_heads // config.num_heads
      score_TS = rotate(y_TD @ attn["wq"][:, n]) @ rotate(y_TD @ attn["wk"][:, k]).T / np.sqrt(H)
      weight_TS = jnp.where(allowed_TS, jnp.exp(score_TS - score_TS.max()), 0.0)
      x_TD = x_TD + weight_TS / weight_TS.sum(-1, keepdims=True) @ (y_TD @ attn["wv"][:, k]) @ attn["wo"][n]
    y_TD = norm(mlp["norm"], x_TD)
    gate_TF = y_TD @ mlp["gate"]
    x_TD = x_TD + (gate_TF / (1 + jnp.exp(-gate_TF)) * (y_TD @ mlp["up"])) @ mlp["down"]
  return norm(params["norm"], x_TD)


def record_cost(params, config, token_T, weight_T, negative_T, repeat, position_T=None, allowed_TS=None):
  """(weighted cost, sum of |weight|) of one record: likelihood for w > 0, unlikelihood for w < 0 and negatives >= 0."""
  head_VD = params["embed"] if config.tied else params["head"]
  p_TV = jax.nn.softmax(stream(params, config, token_T, position_T, allowed_TS) @ head_VD.T)
  cost = size = 0.0
  for t in range(len(token_T) - 1):
    p, w = p_TV[t, token_T[t + 1]], weight_T[t + 1]
    cost += jnp.where(w >= 0, w * -jnp.log(p), -w * -jnp.log(jnp.maximum(1 - p, 1e-5)))
    size += jnp.abs(w)
    negative = negative_T[t + 1]
    cost += jnp.where(negative >= 0, repeat * -jnp.log(jnp.maximum(1 - p_TV[t, negative], 1e-5)), 0.0)
    size += jnp.where(negative >= 0, repeat, 0.0)
  return cost, size


of_one = jax.jit(jax.value_and_grad(record_cost, has_aux=True), static_argnums=1)  # compiled once a length


def total_cost(params, config, records, repeat=0.0):
  """(gradient, cost, size) summed over records, each alone.

  A record is (token_T, weight_T[, negative_T[, position_T, allowed_TS]]).
  """
  with jax.enable_x64(True):
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), params)
    cost, size, gradient = 0.0, 0.0, jax.tree.map(np.zeros_like, params)
    for token_T, weight_T, *rest in records:
      negative_T, *seen = rest or (np.full(len(token_T), -1),)
      (of_record, size_of_record), part = of_one(
        params, config, token_T, np.asarray(weight_T, np.float64), negative_T, repeat, *seen
      )
      cost, size = cost + float(of_record), size + float(size_of_record)
      gradient = jax.tree.map(lambda a, b: a + np.asarray(b), gradient, part)
  return gradient, cost, size

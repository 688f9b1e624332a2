"""Sampled groups of a small random model, and their policy gradient written out in float64."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
from gradients import MODEL, make_params

from insec_jax.config import PolicyConfig
from insec_jax.data.packing import fill
from insec_jax.data.samples import SampledRows
from insec_jax.data.tokens import Example
from insec_jax.method.roles import NO_NEGATIVE, PROMPT, TEXT

T = 24
START = 3  # tokens of a prompt
POLICY = PolicyConfig(method="gradient", temperature=0.8, clip=0.2, kl=0.3, flag_price=0.25)
# Of two groups, each (right, flags) of a sample; the rewards of the second are 1, 0 and 0.75.
GROUPS = (((1, 0), (0, 1), (1, 2), (0, 0)), ((1, 0), (0, 0), (1, 1)))
RATIOS = (0.5, 0.9, 1.1, 1.6)  # to the weights that sampled: below, inside and above the clip of 0.2


def naive_advantages():
  """The advantage of each sample: reward minus the group's mean, over its standard deviation."""
  of_samples = []
  for group in GROUPS:
    rewards = [right - 0.25 * flags for right, flags in group]
    mean = sum(rewards) / len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    of_samples += [(reward - mean) / deviation for reward in rewards]
  return of_samples


def logps(params, token_T, temperature):
  """Log p of each token after the first, [T - 1], at this temperature."""
  logit_TV = naive.stream(params, MODEL, token_T) @ params["head"].T / temperature
  return jax.nn.log_softmax(logit_TV[:-1])[np.arange(len(token_T) - 1), token_T[1:]]


def float64(params):
  return jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), params)


@functools.cache
def make_samples():
  """(token_T, log p under the weights that sampled, log p under the reference) of each sample, 0 in the prompt."""
  rng, made = np.random.default_rng(3), []
  with jax.enable_x64(True):
    params = float64(make_params())
    for number in range(sum(map(len, GROUPS))):
      token_T = rng.integers(0, MODEL.vocab_size, START + 5 + number % 2)
      logp_T = np.r_[0.0, np.asarray(jax.jit(logps, static_argnums=2)(params, token_T, POLICY.temperature))]
      ratio_T = np.array(RATIOS)[(np.arange(len(token_T)) + number) % len(RATIOS)]
      reference_T = logp_T + rng.normal(size=len(token_T)) * 0.5
      is_prompt_T = np.arange(len(token_T)) < START
      made.append((token_T, *(np.where(is_prompt_T, 0, x_T) for x_T in (logp_T - np.log(ratio_T), reference_T))))
  return made


def rows_of(advantage_N, made=None):
  """The samples as packed rows, with these advantages; `made` are others than those of make_samples."""
  made = make_samples() if made is None else made
  examples = [
    Example(
      token_T,
      np.where(np.arange(len(token_T)) < START, PROMPT, TEXT).astype(np.int8),
      np.where(np.arange(len(token_T)) < START, 0, advantage).astype(np.float32),
      np.full(len(token_T), NO_NEGATIVE, np.int32),
      "here",
      0,
      0,
    )
    for (token_T, _, _), advantage in zip(made, advantage_N, strict=True)
  ]
  lengths = [len(example.token_T) for example in examples]
  packed = fill(lengths, examples, T, lambda _, shape, value, dtype: np.full(shape, value, dtype))
  old_BT, reference_BT = (np.zeros(packed.token_BT.shape, np.float32) for _ in range(2))
  place = {tuple(token_T.tolist()): (old_T, reference_T) for token_T, old_T, reference_T in made}
  for row, segment_T in enumerate(packed.segment_BT):
    for segment in range(1, segment_T.max() + 1):
      is_own_T = segment_T == segment
      old_BT[row, is_own_T], reference_BT[row, is_own_T] = place[tuple(packed.token_BT[row, is_own_T].tolist())]
  return SampledRows(**vars(packed), old_BT=old_BT, reference_BT=reference_BT)


def token_cost(logp, old, reference, advantage, policy):
  """What one token costs, and the two parts of it: whether it is clipped, and the KL."""
  ratio = jnp.exp(logp - old)
  surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - policy.clip, 1 + policy.clip) * advantage)
  kl = jnp.exp(reference - logp) - (reference - logp) - 1
  return -surrogate + policy.kl * kl, jnp.abs(ratio - 1) > policy.clip, kl


def sample_cost(params, token_T, old_T, reference_T, advantage):
  """(cost, (number outside the clip, KL)) of one sample, summed over its sampled tokens."""
  logp_T = logps(params, token_T, POLICY.temperature)
  costs = [token_cost(logp_T[t - 1], old_T[t], reference_T[t], advantage, POLICY) for t in range(START, len(token_T))]
  cost, clipped, kl = (sum(column) for column in zip(*costs, strict=True))
  return cost, (clipped, kl)


of_one = jax.jit(jax.value_and_grad(sample_cost, has_aux=True))  # compiled once a length


@functools.cache
def naive_gradient():
  """(gradient, loss, fraction outside the clip, mean KL) over all sampled tokens, float64, one token at a time."""
  with jax.enable_x64(True):
    params = float64(make_params())
    gradient, totals, num = jax.tree.map(np.zeros_like, params), np.zeros(3), 0
    for sample, advantage in zip(make_samples(), naive_advantages(), strict=True):
      (cost, (clipped, kl)), part = of_one(params, *sample, advantage)
      gradient = jax.tree.map(lambda a, b: a + np.asarray(b), gradient, part)
      totals, num = totals + np.array([cost, clipped, kl], np.float64), num + len(sample[0]) - START
    return jax.tree.map(lambda array: np.asarray(array) / num, gradient), *(totals / num).tolist()

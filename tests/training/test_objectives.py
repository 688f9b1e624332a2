"""Each objective is one config value, and the loss of real transcripts is what it says, in float64."""

import functools

import datakit
import gradients
import jax
import naive
import numpy as np
import pytest

from insec_jax.data import pipeline, vocabulary
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT

TASK = {
  "task__name": "graph",
  "task__min_size": 2,
  "task__max_size": 2,
  "task__modulus": 10,
  "mistakes__source": "injected",
  "mistakes__share": 1.0,
  "data__num_records": 6,
  "data__row_length": 96,
}
# What a token costs of which the model says p, and its weight: of a mistake, and of a repeated one where it begins.
OBJECTIVES = {
  "masked": ({"loss__mistake": 0.0}, lambda _: (0, 0), lambda _: (0, 0)),
  "unmasked": ({"loss__mistake": 1.0}, lambda p: (-np.log(p), 1), lambda _: (0, 0)),
  "unlikelihood": ({"loss__mistake": -0.5}, lambda p: (-0.5 * np.log(1 - p), 0.5), lambda _: (0, 0)),
  "anti-parrot": ({"loss__repeat": 0.75}, lambda _: (0, 0), lambda p: (-0.75 * np.log(1 - p), 0.75)),
  "no reason": ({"mistakes__reason": "none"}, lambda _: (0, 0), lambda _: (0, 0)),
  "recomputing reason": ({"mistakes__reason": "recompute"}, lambda _: (0, 0), lambda _: (0, 0)),
}


@functools.cache
def probabilities(token_T):
  """Float64 [T, V]: what the model of test_step says at each place of a record, given what stands before; not at 0."""
  with jax.enable_x64(True):
    params = jax.tree.map(np.float64, gradients.make_params())
    logit_TV = np.asarray(naive.stream(params, gradients.MODEL, np.array(token_T)) @ params["head"].T)
  p_TV = np.exp(logit_TV - logit_TV.max(-1, keepdims=True))
  return np.roll(p_TV / p_TV.sum(-1, keepdims=True), 1, axis=0)


def expected(example, of_mistake, of_negative):
  """(cost, weight) of a record, read off its runs of roles: a symbol is a token, so places can be compared."""
  token_T, role_T = example.token_T.tolist(), example.role_T.tolist()
  p_TV = probabilities(tuple(token_T))
  cost = weight = 0.0
  mistake = start = None
  for t in range(1, len(token_T)):
    p = p_TV[t, token_T[t]]
    parts = [{PROMPT: (0, 0), MISTAKE: of_mistake(p)}.get(role_T[t], (-np.log(p), 1))]
    if t == len(token_T) - 1:
      parts = [(-0.5 * np.log(p), 0.5)]  # the end of text
    begins = role_T[t] != role_T[t - 1]
    if role_T[t] == MISTAKE:
      mistake = [*([] if begins else mistake), token_T[t]]
    if role_T[t] == CORRECTION:
      start = t if begins else start
      if token_T[start:t] == mistake[: t - start] and token_T[t] != mistake[t - start]:
        parts.append(of_negative(p_TV[t, mistake[t - start]]))
    cost, weight = cost + sum(part[0] for part in parts), weight + sum(part[1] for part in parts)
  return cost, weight


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=() if name in ("masked", "anti-parrot") else pytest.mark.slow) for name in OBJECTIVES],
)
def test_one_config_value_makes_the_objective(name):
  change, of_mistake, of_negative = OBJECTIVES[name]
  config = datakit.config(**TASK, **change)
  assert len(change) == 1
  tokenizer = vocabulary.open_tokenizer(config).tokenizer
  examples = pipeline.first_examples(config, tokenizer, 10**6)
  rows = pipeline.load_data(config, tokenizer).train
  batch = next(pipeline.in_order(rows, rows_per_step=len(rows), share=slice(None), negatives=config.loss.negatives))
  _, sums = gradients.gradient(batch, repeat=config.loss.repeat)
  want = np.sum([expected(example, of_mistake, of_negative) for example in examples], axis=0)
  np.testing.assert_allclose((sums.loss, sums.weight), want, rtol=1e-5)
  counted = {role for role in (PROMPT, TEXT, MISTAKE, FLAG, REASON, CORRECTION) if sums.count_R[role]}
  assert (MISTAKE in counted) == (config.loss.mistake != 0)
  assert (REASON in counted) == (config.mistakes.reason != "none")
  assert {TEXT, FLAG, CORRECTION} <= counted
  if config.loss.repeat:
    corrections = sum(
      int(((example.role_T[1:] == CORRECTION) & (example.role_T[:-1] == FLAG)).sum()) for example in examples
    )
    assert sums.negatives.count == corrections > 0

"""Corrections of a small random model beside a teacher that reads a hint, and their divergence in float64."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
from gradients import MODEL, make_params

from insec_jax.config import PolicyConfig
from insec_jax.data.corrections import HintedRows
from insec_jax.method.roles import NO_NEGATIVE, NO_ROLE

T = 28
POLICY = PolicyConfig(method="distill", teacher="current", temperature=0.8, forward=0.25, contrast=0.5, no_flag=0.7)
FLAG = 3  # the token to avoid
PLACES = ((0, 9), (1, 11), (0, 11), (2, 11), (3, 9))  # row of each sample, and its tokens
ROLES = (0, 1, 1, 2, 3, 4, 3, 5, 5, 5)  # of the first tokens of each sample, the rest are corrections


def make_samples():
  """(tokens, hints right and wrong, weights, places of negatives) of each sample; the prompt has two tokens."""
  rng, made = np.random.default_rng(5), []
  for number, (_, num) in enumerate(PLACES):
    token_T = rng.integers(4, MODEL.vocab_size, num)
    hints = {"right": rng.integers(4, MODEL.vocab_size, 2 + (num > 9)), "wrong": rng.integers(4, MODEL.vocab_size, 1)}
    weight_T = np.where(np.arange(num) >= 4, rng.choice([0.5, 1.0, 2.0], num), 0).astype(np.float32)
    if number == 4:  # a right text
      hints, weight_T = {}, np.zeros(num, np.float32)
    made.append((token_T, hints, weight_T, (2, 3)))
  return made


def told(token_T, hint):
  """What the teacher reads: the hint after the two tokens of the prompt."""
  return jnp.concatenate([token_T[:2], hint, token_T[2:]])


def rows():
  """The samples as rows of the student and of the teacher."""
  zeros = {name: np.zeros((4, T), np.int32) for name in ("token", "segment", "position")}
  student = {name: array.copy() for name, array in zeros.items()}
  student |= {"role": np.full((4, T), NO_ROLE, np.int8), "weight": np.zeros((4, T), np.float32)}
  student["negative"] = np.full((4, T), NO_NEGATIVE, np.int32)
  hinted = {
    f"{hint}_{name}": x.copy() for hint in ("right", "wrong") for name, x in (zeros | {"place": zeros["token"]}).items()
  }
  used, teacher_used = np.zeros(4, int), {hint: np.zeros(4, int) for hint in ("right", "wrong")}
  for (row, num), (token_T, hints, weight_T, negatives) in zip(PLACES, make_samples(), strict=True):
    here, segment = slice(used[row], used[row] + num), student["segment"][row].max() + 1
    values = {"token": token_T, "segment": segment, "position": np.arange(num), "weight": weight_T}
    for name, value in (values | {"role": np.r_[ROLES, 5, 5][:num]}).items():
      student[name][row, here] = value
    student["negative"][row, here.start + np.array(negatives)] = FLAG
    for hint, hint_T in hints.items():
      start, long_T = teacher_used[hint][row], told(token_T, hint_T)
      for name, value in {"token": long_T, "segment": segment, "position": np.arange(len(long_T))}.items():
        hinted[f"{hint}_{name}"][row, start : start + len(long_T)] = value
      hinted[f"{hint}_place"][row, here] = start + len(hint_T) + np.arange(num)
      teacher_used[hint][row] += len(long_T)
    used[row] += num
  return HintedRows(**{f"{name}_BT": array for name, array in student.items()}, hinted=hinted)


def logits(params, token_T, temperature):
  return naive.stream(params, MODEL, token_T) @ params["head"].T / temperature


def sample_cost(params, teacher, token_T, hints, weight_T, negatives, policy):
  """(cost, divergence of each token) of a sample; the teacher has the parameters `teacher`, which are constant."""
  logp_TV = jax.nn.log_softmax(logits(params, token_T, policy.temperature))
  cost, divergences = 0.0, {}
  for place in negatives:
    cost -= policy.no_flag * jnp.log(1 - jnp.exp(logp_TV[place - 1, FLAG]))
  if hints:
    of_hint = {
      hint: logits(teacher, told(token_T, hint_T), policy.temperature)[len(hint_T) :] for hint, hint_T in hints.items()
    }
    logit_TV = (1 + policy.contrast) * of_hint["right"] - policy.contrast * of_hint["wrong"]
    logq_TV = jax.nn.log_softmax(jax.lax.stop_gradient(logit_TV))
    for place in range(4, len(token_T)):
      p, q, gap = jnp.exp(logp_TV[place - 1]), jnp.exp(logq_TV[place - 1]), logp_TV[place - 1] - logq_TV[place - 1]
      divergences[place] = (1 - policy.forward) * (p * gap).sum() - policy.forward * (q * gap).sum()
      cost += weight_T[place] * divergences[place]
  return cost, divergences


# Compiled once for samples of the same lengths.
of_one = jax.jit(jax.value_and_grad(sample_cost, has_aux=True), static_argnames=("negatives", "policy"))


def other_params():
  """The weights that a run began with."""
  return jax.tree.map(lambda array: array * 1.1 + 0.01, make_params())


@functools.cache
def naive_gradient(policy, *, start=False):
  """(gradient, loss, sum of |weight|, divergence by role) over all samples, in float64."""
  with jax.enable_x64(True):
    params, first = (
      jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), tree) for tree in (make_params(), other_params())
    )
    gradient, loss, weight, of_role = jax.tree.map(np.zeros_like, params), 0.0, 0.0, np.zeros(6)
    for token_T, hints, weight_T, negatives in make_samples():
      (cost, divergences), part = of_one(
        params, first if start else params, token_T, hints, weight_T, negatives=negatives, policy=policy
      )
      gradient = jax.tree.map(lambda a, b: a + np.asarray(b), gradient, part)
      loss, weight = loss + float(cost), weight + float(weight_T.sum()) + policy.no_flag * len(negatives)
      for place, value in divergences.items():
        of_role[(*ROLES, 5, 5)[place]] += float(value)
    return jax.tree.map(lambda array: np.asarray(array) / weight, gradient), loss / weight, weight, of_role

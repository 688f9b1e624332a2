"""A linear probe: logistic regression of wrong against right steps on the hidden state at the end of each.

It tells what the model knows and does not say: the flag and the score of a step are read from its output, the hidden
state is the residual stream before the output matrix, at the last token before the place of a flag.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from insec_jax.evaluation import statistics
from insec_jax.evaluation.probing import Prober, SolveResults
from insec_jax.evaluation.steps import Step
from insec_jax.method.tasks import Problem

STRENGTHS = (0.3, 3.0, 30.0, 300.0, 3000.0)  # of L2, on the sum over steps; the best of two halves is taken


class LinearProbe(NamedTuple):
  """Weights of standardised states; the score of a step is higher where it is more likely wrong."""

  mean_D: np.ndarray
  scale_D: np.ndarray
  weight_D: np.ndarray
  strength: float

  def scores(self, state_ND: np.ndarray) -> np.ndarray:
    """Return the score of each state."""
    return ((state_ND - self.mean_D[None]) / self.scale_D[None]) @ self.weight_D


class ProbedSteps(NamedTuple):
  """First tries of solutions that are right or wrong, with the hidden state of each."""

  steps: list[Step]
  state_ND: np.ndarray

  @property
  def wrong_N(self) -> np.ndarray:
    return np.array([step.kind == "wrong" for step in self.steps], bool)


def read(prober: Prober, problems: Sequence[Problem], solved: SolveResults) -> ProbedSteps:
  """Return the steps of the solutions up to the first wrong one of each, with their hidden states; one more pass."""
  by_solution: dict[int, list[Step]] = {}
  for step in solved.own.steps:
    if step.kind in ("right", "wrong"):
      by_solution.setdefault(step.solution, []).append(step)
  texts, places = [], []
  for number, steps in by_solution.items():
    prompt_T = prober.encode(problems[number].prompt)
    text_T = solved.written[number].generation.tokens[: steps[-1].end]
    texts.append(np.concatenate([prompt_T, text_T]).astype(np.int32))
    places.append([len(prompt_T) + step.end - 1 for step in steps])
  streams = prober.writer.sampler.streams(texts, places, batch_size=prober.limits["batch_size"]) if texts else []
  steps = [step for steps in by_solution.values() for step in steps]
  return ProbedSteps(steps, np.concatenate([np.zeros((0, prober.writer.sampler.config.width)), *streams]))


def fit(probed: ProbedSteps) -> LinearProbe | None:
  """Return the probe of these steps; None where all are right, or all wrong.

  The strength of L2 is the one with the highest AUROC over two halves of the solutions, each scored by the other's fit.
  """
  wrong_N, state_ND = probed.wrong_N, probed.state_ND
  if wrong_N.all() or not wrong_N.any():
    return None
  half_N = np.array([step.solution % 2 for step in probed.steps], bool)

  def quality(strength: float) -> float:
    found = []
    for held_N in (half_N, ~half_N):
      if wrong_N[held_N].all() or not wrong_N[held_N].any() or wrong_N[~held_N].all() or not wrong_N[~held_N].any():
        return 0.5
      score_M = _fit(state_ND[~held_N], wrong_N[~held_N], strength).scores(state_ND[held_N])
      found.append(statistics.auroc(score_M[wrong_N[held_N]], score_M[~wrong_N[held_N]]))
    return sum(found) / len(found)

  return _fit(state_ND, wrong_N, max(STRENGTHS, key=quality))


def _fit(state_ND: np.ndarray, wrong_N: np.ndarray, strength: float) -> LinearProbe:
  """Return the minimum of the summed logistic loss plus `strength` / 2 times the squared weights."""
  mean_D, scale_D = state_ND.mean(0), state_ND.std(0) + 1e-6
  x_ND = (state_ND - mean_D[None]) / scale_D[None]
  sign_N = np.where(wrong_N, 1.0, -1.0)

  def loss(weight_E: np.ndarray) -> tuple[float, np.ndarray]:
    weight_D, bias = weight_E[:-1], weight_E[-1]
    margin_N = sign_N * (x_ND @ weight_D + bias)
    slope_N = -sign_N * special.expit(-margin_N)
    value = np.logaddexp(0.0, -margin_N).sum() + strength / 2 * weight_D @ weight_D
    return float(value), np.append(x_ND.T @ slope_N + strength * weight_D, slope_N.sum())

  found = optimize.minimize(loss, np.zeros(x_ND.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500})
  return LinearProbe(mean_D, scale_D, found.x[:-1], strength)

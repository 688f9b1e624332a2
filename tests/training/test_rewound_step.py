"""The gradient of rows in which mistakes are hidden, against float64 with an explicit mask."""

import jax
import naive
import numpy as np
import pytest
from gradients import MODEL, gradient, make_params

from insec_jax.method.rewind import NEVER
from insec_jax.method.roles import NO_ROLE, TEXT

T = 24
# Of a record with two mistakes, the second corrected twice: (first, stop, first later token that does not read these).
HIDDEN = ((2, 5, 6), (8, 11, 12), (11, 13, 14))
POSITIONS = (0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 5, 6, 5, 6, 7)
LENGTHS = (7, 5, 16)  # of the other records


def records():
  """(token_T, weight_T, negative_T, position_T, allowed_TS) of each record, the one with mistakes first."""
  rng = np.random.default_rng(3)
  made = []
  for length in (len(POSITIONS), *LENGTHS):
    token_T, weight_T = rng.integers(0, MODEL.vocab_size, length), rng.choice([0.0, 1.0, 2.0, -0.5], length)
    made.append([token_T, weight_T, np.full(length, -1), np.arange(length), np.tri(length, dtype=bool)])
  made[0][3] = np.array(POSITIONS)
  for first, stop, until in HIDDEN:
    made[0][4][until:, first:stop] = False
  return made


def batch_of(made):
  """Two rows: the record with mistakes and two others, of which one is in front; the last one alone."""
  batch = {f"{name}_ABT": np.zeros((1, 2, T + 4), np.int32) for name in ("token", "segment", "position")}
  batch["role_ABT"] = np.full((1, 2, T + 4), NO_ROLE, np.int8)
  batch["weight_ABT"] = np.zeros((1, 2, T + 4), np.float32)
  batch["until_ABT"] = np.full((1, 2, T + 4), NEVER, np.int32)
  for number, row, start in ((1, 0, 0), (0, 0, 7), (2, 0, 23), (3, 1, 0)):
    token_T, weight_T, _, position_T, _ = made[number]
    part = (0, row, slice(start, start + len(token_T)))
    batch["segment_ABT"][part] = batch["segment_ABT"][0, row].max() + 1
    batch["token_ABT"][part], batch["position_ABT"][part], batch["weight_ABT"][part] = token_T, position_T, weight_T
    batch["role_ABT"][part] = TEXT
    if number == 0:
      for first, stop, until in HIDDEN:
        batch["until_ABT"][0, row, start + first : start + stop] = start + until
  return batch


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2, 2)])
def test_the_gradient_of_two_mistakes_is_the_float64_sum_with_an_explicit_mask(shape):
  made = records()
  want, cost, size = naive.total_cost(make_params(), MODEL, made)
  got, sums = gradient(batch_of(made), shape)
  np.testing.assert_allclose(float(sums.loss) / float(sums.weight), cost / size, rtol=1e-5)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(a - b / size) <= 1e-5 * np.linalg.norm(b / size), jax.tree_util.keystr(path)


def test_what_is_hidden_counts():
  batch = batch_of(records())
  _, hidden = gradient(batch)
  _, seen = gradient({**batch, "until_ABT": np.full_like(batch["until_ABT"], NEVER)})
  assert abs(float(hidden.loss) - float(seen.loss)) > 1e-3 * abs(float(hidden.loss))

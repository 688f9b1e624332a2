"""The masked loss against float64 NumPy, one token at a time."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import axes_mesh

from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, NO_NEGATIVE, NO_ROLE, NUM_ROLES, PROMPT, TEXT
from insec_jax.model import sharding
from insec_jax.training import loss, scores
from insec_jax.training.vocabulary_plan import split_fsdp

B, T, D, V = 8, 24, 16, 40


def make_rows(seed=0, V=V):
  """Random rows of two or three segments and some padding, with weights of every sign, as the arrays of loss_sums."""
  rng = np.random.default_rng(seed)
  segment_BT = np.zeros((B, T), np.int32)
  for row in range(B):
    ends = np.sort(rng.choice(np.arange(3, T - 1), 2, replace=False))
    segment_BT[row, : ends[0]], segment_BT[row, ends[0] : ends[1]] = 1, 2
    segment_BT[row, ends[1] :] = 3 if row % 2 else 0
  role_BT = np.where(segment_BT > 0, rng.integers(0, NUM_ROLES, (B, T)), NO_ROLE).astype(np.int8)
  weight_BT = np.array([0.0, 1.0, -0.5, 2.0, 0.25, -1.0, 0.0], np.float32)[role_BT]
  return {
    "head_VD": rng.normal(size=(V, D)).astype(np.float32),
    "stream_BTD": rng.normal(size=(B, T, D)).astype(np.float32),
    "token_BT": rng.integers(0, V, (B, T)).astype(np.int32),
    "segment_BT": segment_BT,
    "role_BT": role_BT,
    "weight_BT": weight_BT,
  }


def with_negatives(rows, seed=2):
  """The same rows with a negative at a quarter of the tokens: one of the four likeliest others."""
  rng = np.random.default_rng(seed)
  logit_BTV = np.roll(rows["stream_BTD"] @ rows["head_VD"].T, 1, axis=1)  # of what stands at T, not of what follows
  np.put_along_axis(logit_BTV, rows["token_BT"][..., None], -np.inf, -1)
  likely_BT4 = np.argsort(logit_BTV)[..., -4:]
  negative_BT = np.take_along_axis(likely_BT4, rng.integers(0, 4, (B, T, 1)), -1)[..., 0]
  has_one_BT = (rng.random((B, T)) < 0.25) & (rows["segment_BT"] > 0)
  return rows | {"negative_BT": np.where(has_one_BT, negative_BT, NO_NEGATIVE).astype(np.int32)}


def naive(head_VD, stream_BTD, token_BT, segment_BT, role_BT, weight_BT, negative_BT=None, repeat=0.0):
  """(sums, gradient of the head, gradient of the stream), float64, token by token."""
  head_VD, stream_BTD = head_VD.astype(np.float64), stream_BTD.astype(np.float64)
  sums = scores.Sums(0.0, 0.0, np.zeros(NUM_ROLES), np.zeros(NUM_ROLES), np.zeros(NUM_ROLES))
  total = weight = negative_cost = negative_p = num_negatives = 0.0
  head_grad_VD, stream_grad_BTD = np.zeros_like(head_VD), np.zeros_like(stream_BTD)
  for b in range(token_BT.shape[0]):
    for t in range(token_BT.shape[1] - 1):
      w, target, role = float(weight_BT[b, t + 1]), token_BT[b, t + 1], role_BT[b, t + 1]
      negative = NO_NEGATIVE if negative_BT is None else negative_BT[b, t + 1]
      if (w == 0 and negative < 0) or segment_BT[b, t] == 0 or segment_BT[b, t] != segment_BT[b, t + 1]:
        continue
      logit_V = head_VD @ stream_BTD[b, t]
      p_V = np.exp(logit_V - logit_V.max())
      p_V /= p_V.sum()
      p = p_V[target]
      hot_V = (np.arange(len(p_V)) == target).astype(np.float64)
      if w > 0:
        total += w * -np.log(p)
        slope_V = w * (p_V - hot_V)
      else:
        total += -w * -np.log(max(1 - p, 1e-5))
        slope_V = -w * p / (1 - p) * (hot_V - p_V) if 1 - p > 1e-5 else np.zeros_like(p_V)
      weight += abs(w)
      if w:
        sums.nll_R[role] -= np.log(p)
        sums.correct_R[role] += p_V.argmax() == target
        sums.count_R[role] += 1
      if negative >= 0:
        q = p_V[negative]
        num_negatives, negative_p, negative_cost = (
          num_negatives + 1,
          negative_p + q,
          negative_cost - np.log(max(1 - q, 1e-5)),
        )
        total, weight = total + repeat * -np.log(max(1 - q, 1e-5)), weight + repeat
        if 1 - q > 1e-5:
          slope_V = slope_V + repeat * q / (1 - q) * ((np.arange(len(p_V)) == negative) - p_V)
      head_grad_VD += slope_V[:, None] * stream_BTD[b, t][None]
      stream_grad_BTD[b, t] = slope_V @ head_VD
  negatives = None if negative_BT is None else scores.Negatives(negative_cost, negative_p, num_negatives)
  return sums._replace(loss=total, weight=weight, negatives=negatives), head_grad_VD, stream_grad_BTD


def ours(rows, **options):
  """(sums, gradient of the head, gradient of the stream) of loss_sums."""

  def f(head_VD, stream_BTD, rows):
    sums = loss.loss_sums(head_VD, stream_BTD, *rows, **options)
    return sums.loss, sums

  head_VD, stream_BTD, *rest = rows.values()
  gradients, sums = jax.jit(jax.grad(f, (0, 1), has_aux=True))(head_VD, stream_BTD, rest)
  return sums, *gradients


def ours_on(mesh, rows, **options):
  """The same, on every device of the mesh: its part of the head, its rows."""

  def local(*arrays):
    sums, *gradients = ours(dict(zip(rows, arrays, strict=True)), mesh=mesh, **options)
    return jax.lax.psum(sums, sharding.BATCH), jax.lax.psum(gradients[0], "data"), gradients[1]

  head, row = sharding.spec("vocab", "width"), sharding.spec("batch", "position")
  run = jax.shard_map(
    local, mesh=mesh, in_specs=(head, *[row] * (len(rows) - 1)), out_specs=(jax.P(), head, row), check_vma=False
  )
  return jax.jit(run)(*rows.values())


def assert_close(got, want, rtol=1e-5):
  """Each array is within rtol of the other, measured by its largest entry."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=rtol * np.abs(b).max())


def test_a_position_predicts_the_next_token_of_its_own_segment():
  target_BT, role_BT, weight_BT, negative_BT, _ = loss.shift(
    jnp.array([[10, 11, 12, 13, 14, 9]]),
    jnp.array([[1, 1, 1, 2, 2, 0]]),
    jnp.array([[0, 1, 2, 0, 3, -1]]),
    jnp.array([[0.0, 1, 2, 0, 4, 0]]),
    jnp.array([[5, 6, -1, 7, 8, -1]]),
  )
  trained = np.array([[1, 1, 0, 1, 0, 0]], bool)
  np.testing.assert_array_equal(target_BT[trained], [11, 12, 14])
  np.testing.assert_array_equal(role_BT, [[1, 2, -1, 3, -1, -1]])
  np.testing.assert_array_equal(weight_BT, [[1, 2, 0, 4, 0, 0]])
  np.testing.assert_array_equal(negative_BT, [[6, -1, -1, 8, -1, -1]])


def test_a_row_that_is_full_does_not_wrap_round_to_its_first_token():
  ones_BT = jnp.ones((1, 4), int)
  _, role_BT, weight_BT, negative_BT, _ = loss.shift(ones_BT, ones_BT, ones_BT, jnp.ones((1, 4)), ones_BT)
  np.testing.assert_array_equal(role_BT, [[1, 1, 1, -1]])
  np.testing.assert_array_equal(weight_BT, [[1, 1, 1, 0]])
  np.testing.assert_array_equal(negative_BT, [[1, 1, 1, -1]])


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_sums_and_gradients_equal_float64_whatever_the_chunk(chunk):
  rows = make_rows()
  assert_close(ours(rows, chunk=chunk), naive(**rows))


@pytest.mark.parametrize("V", [40, 320, 3200])
@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 8},
    {"fsdp_z": 8},
    {"fsdp_y": 2, "fsdp_z": 4},
    {"fsdp_x": 2, "fsdp_y": 2, "fsdp_z": 2},
    {"data": 2, "fsdp_z": 2, "tensor": 2},
    {"fsdp_z": 2, "tensor": 4},
    {"sequence_z": 8},
    {"fsdp_z": 2, "sequence_y": 2, "sequence_z": 2},
    {"data": 2, "sequence_z": 2, "tensor": 2},
  ],
)
def test_sums_and_gradients_equal_float64_on_every_mesh(sizes, V):
  rows = make_rows(1, V)
  rows["segment_BT"][0] = 0  # one device has nothing to do while the others work
  rows["role_BT"][0], rows["weight_BT"][0] = NO_ROLE, 0
  rows["segment_BT"][1] = 1  # its last token predicts nothing, above all not its first one
  mesh = axes_mesh(**sizes)
  assert_close(ours_on(mesh, rows, chunk=5), naive(**rows))


@pytest.mark.parametrize(
  ("V", "meet", "largest"),
  [(40, (), 40 * D), (320, ("fsdp_z",), 320 // 4 * D), (3200, ("fsdp_y", "fsdp_z"), 8 * 5 * D)],
)
def test_along_each_axis_the_smaller_of_head_and_trained_tokens_is_gathered(V, meet, largest):
  rows = make_rows(1, V)
  mesh = axes_mesh(fsdp_y=2, fsdp_z=4)
  assert split_fsdp(mesh, num_tokens=T, num_rows=V, itemsize=4)[0] == meet
  lowered = jax.jit(lambda *arrays: ours_on(mesh, dict(zip(rows, arrays, strict=True)), chunk=5)).lower(*rows.values())
  gathered = re.findall(r"all_gather.*?-> tensor<([0-9x]+)x", lowered.as_text())
  assert max(math.prod(map(int, shape.split("x"))) for shape in gathered) == largest


def test_tokens_of_weight_0_have_exactly_zero_gradient_and_are_counted_nowhere():
  rows = make_rows()
  sums, _, stream_grad_BTD = ours(rows, chunk=16)
  _, _, weight_BT, *_ = loss.shift(*(rows[name] for name in ("token_BT", "segment_BT", "role_BT", "weight_BT")))
  reached_BT = np.abs(stream_grad_BTD).sum(-1) > 0
  np.testing.assert_array_equal(reached_BT, weight_BT != 0)
  assert sums.count_R[PROMPT] == 0
  assert sums.count_R.sum() == (weight_BT != 0).sum()
  assert np.all(np.asarray(sums.count_R)[[TEXT, MISTAKE, FLAG, CORRECTION]] > 0)


def test_a_negative_weight_is_unlikelihood_flat_where_clamped():
  # One token of logit x against one of logit 0; the token unwanted has p = sigmoid(x).
  @jax.jit
  @jax.value_and_grad
  def cost(x, weight):
    return loss.loss_sums(
      jnp.array([[1.0], [0.0]]),
      jnp.full((1, 2, 1), x),
      jnp.zeros((1, 2), int),
      jnp.ones((1, 2), int),
      jnp.full((1, 2), MISTAKE),
      jnp.full((1, 2), weight),
    ).loss

  for x, weight in [(0.3, -0.5), (-4.0, -2.0), (11.0, -1.0), (11.6, -1.0), (30.0, -1.0)]:
    p = 1 / (1 + np.exp(-np.float64(x)))
    clamped = 1 - p <= 1e-5
    assert clamped == (x > 11.5)
    value, slope = cost(x, weight)
    np.testing.assert_allclose(value, abs(weight) * -np.log(max(1 - p, 1e-5)), rtol=1e-5)
    # d/dx of -log(1 - sigmoid(x)) is sigmoid(x).
    np.testing.assert_allclose(slope, 0.0 if clamped else abs(weight) * p, rtol=1e-5)


@pytest.mark.parametrize("chunk", [7, None])
def test_negatives_add_unlikelihood_at_any_token_weight_and_are_in_no_role(chunk):
  rows = with_negatives(make_rows())
  only_negatives_BT = (rows["negative_BT"] >= 0) & (rows["weight_BT"] == 0)
  assert only_negatives_BT[:, 1:].any()
  got = ours(rows, chunk=chunk, repeat=0.75)
  assert_close(got, naive(**rows, repeat=0.75))
  np.testing.assert_array_equal(got[0].count_R, ours(make_rows())[0].count_R)


@pytest.mark.parametrize("V", [40, 320])
@pytest.mark.parametrize(
  "sizes",
  [
    {"fsdp_y": 2, "fsdp_z": 4},
    {"fsdp_x": 2, "fsdp_y": 2, "fsdp_z": 2},
    {"data": 2, "fsdp_z": 2, "tensor": 2},
    {"fsdp_z": 2, "tensor": 4},
    {"sequence_y": 2, "sequence_z": 2, "tensor": 2},
  ],
)
def test_negatives_are_found_wherever_the_vocabulary_is_split(sizes, V):
  rows = with_negatives(make_rows(1, V))
  mesh = axes_mesh(**sizes)
  assert_close(ours_on(mesh, rows, chunk=5, repeat=0.75), naive(**rows, repeat=0.75))


def test_a_negative_that_is_almost_certain_costs_what_is_clamped_and_has_no_slope():
  def cost(x):
    return loss.loss_sums(
      jnp.array([[1.0], [0.0]]),
      jnp.full((1, 2, 1), x),
      jnp.ones((1, 2), int),
      jnp.ones((1, 2), int),
      jnp.full((1, 2), CORRECTION),
      jnp.zeros((1, 2)),
      jnp.zeros((1, 2), int),
      repeat=2.0,
    ).loss

  for x in (0.3, -4.0, 11.0, 11.6, 30.0):
    p = 1 / (1 + np.exp(-np.float64(x)))
    value, slope = jax.jit(jax.value_and_grad(cost))(x)
    np.testing.assert_allclose(value, 2 * -np.log(max(1 - p, 1e-5)), rtol=1e-5)
    np.testing.assert_allclose(slope, 2 * p if 1 - p > 1e-5 else 0.0, rtol=1e-5)


def test_negatives_of_weight_0_are_summed_up_and_change_nothing_else():
  rows = with_negatives(make_rows())
  got, without = ours(rows), ours(make_rows())
  assert got[0].negatives.count == (loss.shift(*list(rows.values())[2:])[3] >= 0).sum() > 0
  assert without[0].negatives is None
  assert_close((got[0]._replace(negatives=None), *got[1:]), without, rtol=2e-6)


def test_nothing_to_train_gives_loss_0_and_finite_gradients():
  rows = make_rows()
  rows["weight_BT"][:] = 0
  sums, head_grad_VD, stream_grad_BTD = ours(rows)
  assert all(np.all(np.asarray(total) == 0) for total in sums[:5])
  assert np.all(head_grad_VD == 0)
  assert np.all(stream_grad_BTD == 0)


def test_halves_of_a_batch_sum_to_the_whole():
  rows = make_rows()
  whole_sums, whole_head_VD, whole_stream_BTD = ours(rows)
  halves = [
    ours({name: array if name == "head_VD" else array[part] for name, array in rows.items()})
    for part in (slice(0, 3), slice(3, B))
  ]
  sums, head_VD = jax.tree.map(jnp.add, *(half[:2] for half in halves))
  assert_close((sums, head_VD), (whole_sums, whole_head_VD), rtol=2e-6)
  np.testing.assert_array_equal(np.concatenate([half[2] for half in halves]), whole_stream_BTD)


def test_sums_without_gradient_are_the_same_sums():
  rows = with_negatives(make_rows())
  jax.tree.map(np.testing.assert_array_equal, ours(rows)[0], jax.jit(loss.loss_sums)(**rows))


def test_bfloat16_streams_keep_float32_sums_and_a_float32_gradient_of_the_head():
  rows = make_rows()
  rows["stream_BTD"] = rows["stream_BTD"].astype(jnp.bfloat16)
  sums, head_grad_VD, stream_grad_BTD = ours(rows)
  assert {sums.loss.dtype, head_grad_VD.dtype} == {jnp.dtype("float32")}
  assert stream_grad_BTD.dtype == jnp.bfloat16
  rows["head_VD"] = rows["head_VD"].astype(jnp.bfloat16)
  want_sums, want_head_VD, _ = naive(**rows)
  assert_close(sums, want_sums, rtol=1e-4)
  assert_close(head_grad_VD, want_head_VD, rtol=2e-2)


def test_logits_of_all_tokens_never_exist_at_once():
  M, vocabulary = 4096, 5000
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((vocabulary, 8), jnp.float32),
      ((1, M, 8), jnp.float32),
      ((1, M), jnp.int32),
      ((1, M), jnp.int32),
      ((1, M), jnp.int8),
      ((1, M), jnp.float32),
    )
  ]
  gradient = jax.grad(lambda head_VD, *rows: loss.loss_sums(head_VD, *rows).loss)
  temporary = jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
  assert temporary < M * vocabulary * 4 / 2

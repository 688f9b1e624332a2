"""One training step on eight pretended devices, against a naive float64 sum over unpacked records."""

import functools
import types

import jax
import jax.numpy as jnp
import naive
import numpy as np
import optax
import pytest
from gradients import MODEL, compiled_gradient, gradient, make_mesh, make_params, model_config

from insec_jax.config import OptimizerConfig
from insec_jax.method.roles import NO_ROLE, NUM_ROLES, PROMPT
from insec_jax.model import llama, memory, sharding
from insec_jax.training import optimizer, step

T = 24
# Data, fsdp, tensor, sequence; the last has fsdp over three axes of the mesh, as 128 and more devices do.
SEQUENCES = ((2, 1, 1, 4), (1, 2, 2, 2), (1, 2, 1, 4))
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4), *SEQUENCES, "fsdp 2x2x2")
SETTINGS = ((1, 16, "none", True), (4, 8, "full", False))  # accumulation, rows, remat, tied
QUICK = (  # the others are marked slow
  ((1, 1, 1), SETTINGS[0]),
  ((2, 2, 2), SETTINGS[1]),
  ((1, 2, 2, 2), SETTINGS[1]),
  ("fsdp 2x2x2", SETTINGS[1]),
)
OPTIMIZER = OptimizerConfig(
  learning_rate=1e-2, final_share=0.1, warmup_steps=2, weight_decay=0.1, b1=0.9, b2=0.99, eps=1e-8, clip_norm=1.0
)
STEPS = 20
WEIGHT_R = np.array([0.0, 1.0, -0.5, 2.0, 0.25, 1.5], np.float32)


def make_records(num=20, weight_R=WEIGHT_R):
  """Records of 4, 7 or 11 tokens: (token_T, role_T, weight_T)."""
  rng = np.random.default_rng(1)
  records = []
  for _ in range(num):
    length = int(rng.choice((4, 7, 11)))
    role_T = rng.integers(0, NUM_ROLES, length)
    records.append((rng.integers(0, MODEL.vocab_size, length), role_T, weight_R[role_T]))
  return records


def with_negatives(records):
  """The records, each with negative_T: another token where one in three of them is, the first included."""
  rng = np.random.default_rng(2)
  return [
    (token_T, role_T, weight_T, np.where(rng.random(len(token_T)) < 0.3, (token_T + 1) % MODEL.vocab_size, -1))
    for token_T, role_T, weight_T in records
  ]


def pack(records, accumulation, rows):
  """A batch that holds the records, each in the first row with room; the last rows of padding."""
  num = accumulation * rows
  batch = {f"{name}_ABT": np.zeros((num, T), np.int32) for name in ("token", "segment", "position")}
  batch |= {"role_ABT": np.full((num, T), NO_ROLE, np.int8), "weight_ABT": np.zeros((num, T), np.float32)}
  if len(records[0]) == 4:
    batch["negative_ABT"] = np.full((num, T), -1, np.int32)
  used = [0] * num
  for token_T, role_T, weight_T, *rest in records:
    row = next(row for row in range(num) if used[row] + len(token_T) <= T)
    part = (row, slice(used[row], used[row] + len(token_T)))
    batch["segment_ABT"][part] = batch["segment_ABT"][row].max() + 1
    batch["token_ABT"][part], batch["role_ABT"][part], batch["weight_ABT"][part] = token_T, role_T, weight_T
    batch["position_ABT"][part] = np.arange(len(token_T))
    if rest:
      batch["negative_ABT"][part] = rest[0]
    used[row] += len(token_T)
  return {name: array.reshape(accumulation, rows, T) for name, array in batch.items()}


@functools.cache
def compiled_step(shape, dtype, compute):
  mesh = make_mesh(shape)
  tx = optimizer.make(OPTIMIZER, STEPS)
  params = jax.tree.map(lambda param: param.astype(dtype), make_params())
  shardings = step.shardings_of(step.abstract_state(MODEL, dtype, tx, mesh))
  make = jax.jit(lambda params: step.new_state(params, tx), out_shardings=shardings)
  train_step = step.make_train_step(
    llama.Llama(MODEL, compute, "none"), OPTIMIZER, STEPS, mesh, shardings, repeat=0.0, seed=0
  )
  return params, make, train_step


def run_steps(batches, shape, *, dtype="float32", compute="float32"):
  """(state, list of StepMetrics) after one step for each batch."""
  params, make, train_step = compiled_step(shape, dtype, compute)
  state, metrics = make(params), []
  for batch in batches:
    state, step_metrics = train_step(state, batch)
    metrics.append(jax.device_get(step_metrics))
  return state, metrics


def assert_close(got, want):
  """Each array is within 1e-5 of the other in norm."""
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)


@functools.cache
def naive_gradient(tied=False):
  """(gradient, loss) of the mean over all records, float64."""
  records = [(token_T, weight_T) for token_T, _, weight_T in make_records()]
  gradient, cost, size = naive.total_cost(make_params(tied), model_config(tied), records)
  return jax.tree.map(lambda array: array / size, gradient), cost / size


@pytest.mark.parametrize(
  ("shape", "accumulation", "rows", "remat", "tied"),
  [
    pytest.param(shape, *setting, marks=() if (shape, setting) in QUICK else pytest.mark.slow)
    for shape in ((1, 1, 1), *MESHES)
    for setting in SETTINGS
  ],
)
def test_gradient_packed_accumulated_and_sharded_is_the_float64_sum_over_records(
  shape, accumulation, rows, remat, tied
):
  want, want_loss = naive_gradient(tied)
  got, sums = gradient(pack(make_records(), accumulation, rows), shape, remat=remat, tied=tied)
  np.testing.assert_allclose(float(sums.loss) / float(sums.weight), want_loss, rtol=1e-5)
  assert_close(got, want)


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow), (1, 2, 1, 4)])
def test_the_sharded_gradient_with_negatives_is_the_float64_sum_over_records(shape):
  records, repeat = with_negatives(make_records()), 0.75
  masked = [
    w == 0 and negative >= 0
    for _, _, weight_T, negative_T in records
    for w, negative in zip(weight_T[1:], negative_T[1:], strict=True)
  ]
  assert any(masked)
  want, cost, size = naive.total_cost(make_params(), MODEL, [record[::2] + record[3:] for record in records], repeat)
  got, sums = gradient(pack(records, 4, 8), shape, repeat=repeat)
  np.testing.assert_allclose(float(sums.loss) / float(sums.weight), cost / size, rtol=1e-5)
  assert sums.negatives.count == sum((negative_T[1:] >= 0).sum() for *_, negative_T in records)
  assert_close(got, jax.tree.map(lambda array: array / size, want))


def test_a_batch_with_negatives_and_a_step_without_are_refused_and_the_reverse():
  with pytest.raises(ValueError, match="exactly when repeat is not 0"):
    gradient(pack(with_negatives(make_records()), 2, 8))
  with pytest.raises(ValueError, match="exactly when repeat is not 0"):
    gradient(pack(make_records(), 2, 8), repeat=0.5)


def test_without_negatives_no_array_of_them_reaches_the_device():
  sizes = {"accumulation": 1, "rows_per_device": 2, "row_length": T}
  without, with_them = (
    step.abstract_batch(make_mesh((1, 1, 1)), **sizes, negatives=negatives) for negatives in (False, True)
  )
  assert set(with_them) - set(without) == {"negative_ABT"}
  assert len(without) == 5


@pytest.mark.parametrize(
  ("shape", "remat"),
  [
    pytest.param(shape, remat, marks=() if (shape, remat) == ((1, 4, 2), "full") else pytest.mark.slow)
    for shape in ((1, 4, 2), (1, 2, 2, 2))
    for remat in memory.REMAT
  ],
)
def test_what_the_backward_pass_keeps_does_not_change_the_gradient(shape, remat):
  got, _ = gradient(pack(make_records(), 2, 8), shape, remat=remat)
  assert_close(got, naive_gradient()[0])


def test_a_micro_batch_without_a_trained_token_changes_nothing():
  batch = pack(make_records(), 2, 8)
  empty = {name: np.concatenate([array, np.zeros_like(array[:1])]) for name, array in batch.items()}
  empty["role_ABT"][-1] = NO_ROLE
  masked = {name: np.concatenate([array, array[:1]]) for name, array in batch.items()}
  masked["weight_ABT"][-1] = 0  # real text, every role of it masked
  with_empty, _ = gradient(empty)
  assert_close(with_empty, naive_gradient()[0])
  jax.tree.map(np.testing.assert_array_equal, with_empty, gradient(masked)[0])


def test_no_trained_token_at_all_gives_loss_0_gradient_0_and_a_finite_step():
  batch = pack(make_records(weight_R=np.zeros(NUM_ROLES, np.float32)), 2, 8)
  got, sums = gradient(batch)
  assert float(sums.loss) == 0
  assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(got))
  state, metrics = run_steps([batch], (1, 1, 1))
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state, metrics)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_after_a_loss_that_is_not_finite_the_state_stays_as_it_was_before(shape):
  good = pack(make_records(), 1, 8)
  bad = {**good, "weight_ABT": np.full_like(good["weight_ABT"], np.nan)}
  want, _ = run_steps([good, good], shape)
  got, metrics = run_steps([good, good, bad, good], shape)
  assert [bool(np.isfinite(step_metrics.sums.loss)) for step_metrics in metrics] == [True, True, False, True]
  assert int(got.step) == -3  # two updates, and none after them
  jax.tree.map(np.testing.assert_array_equal, got[1:], want[1:])


def test_tokens_that_only_masked_roles_hold_get_exactly_zero_gradient_in_the_head():
  records = make_records()
  masked = MODEL.vocab_size - 1  # a token that every record shows last, in a masked role: it is only ever a target
  records = [
    (np.append(token_T % masked, masked), np.append(role_T, PROMPT), np.append(weight_T, 0))
    for token_T, role_T, weight_T in records
  ]
  with_masked, sums = gradient(pack(records, 2, 8))
  changed = [(np.append(token_T[:-1], 3), role_T, weight_T) for token_T, role_T, weight_T in records]
  without, _ = gradient(pack(changed, 2, 8))
  assert float(sums.count_R[PROMPT]) == 0
  jax.tree.map(np.testing.assert_array_equal, with_masked, without)


def test_role_sums_and_trained_tokens_are_those_of_the_records():
  records = make_records()
  _, metrics = run_steps([pack(records, 2, 8)], (2, 2, 2))
  role_N = np.concatenate([role_T[1:] for _, role_T, _ in records])
  weight_N = np.concatenate([weight_T[1:] for _, _, weight_T in records])
  np.testing.assert_array_equal(metrics[0].sums.count_R, np.bincount(role_N[weight_N != 0], minlength=NUM_ROLES))
  np.testing.assert_allclose(metrics[0].sums.weight, np.abs(weight_N).sum(), rtol=1e-6)
  assert metrics[0].tokens == sum(len(token_T) for token_T, _, _ in records)


def test_every_mesh_trains_alike():
  batch = pack(make_records(), 2, 8)
  losses = [
    [float(m.sums.loss / m.sums.weight) for m in run_steps([batch] * 6, shape)[1]] for shape in ((1, 1, 1), (2, 2, 2))
  ]
  assert losses[0][-1] < losses[0][0] - 0.3
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_processes_of_cpus_exchange_and_add_gradients_instead_of_a_reduce_scatter(monkeypatch):
  batch, shape = pack(make_records(), 1, 16), (1, 2, 2, 2)
  want = gradient(batch, shape, remat="full")
  monkeypatch.setattr(sharding, "uses_gloo", lambda _: True)
  compiled = compiled_gradient.__wrapped__(shape, "full", False, 0.0).lower(make_params(), batch).compile()
  assert "all-to-all" in compiled.as_text()
  assert "reduce-scatter" not in compiled.as_text()
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, compiled(make_params(), batch), want)


@pytest.mark.parametrize(("platform", "width", "laid_out"), [("tpu", 64, 2), ("tpu", 128, 0), ("cpu", 64, 0)])
def test_a_narrow_gradient_of_the_vocabulary_is_laid_out_as_a_tpu_holds_it(platform, width, laid_out):
  mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
  gradient = {name: jnp.zeros((256, width)) for name in ("embed", "head", "layers")}
  program = jax.make_jaxpr(lambda gradient: step._laid_out(gradient, mesh))(gradient)
  layouts = [str(e.params["layout"]) for e in program.eqns if e.primitive.name == "layout_constraint"]
  assert len(layouts) == laid_out
  assert all("major_to_minor=(1, 0)" in layout for layout in layouts)


def test_the_step_donates_its_state_and_leaves_it_where_it_lies():
  params, make, train_step = compiled_step((2, 2, 2), "float32", "float32")
  given = make(params)
  state, _ = train_step(given, pack(make_records(), 2, 8))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
  wq, head = state.params["layers"]["attn"]["wq"], state.params["head"]
  moment = next(part for part in state.optimizer if isinstance(part, optax.ScaleByAdamState))
  assert wq.sharding.spec == jax.P(None, sharding.FSDP, "tensor", None)
  assert moment.mu["layers"]["attn"]["wq"].sharding == wq.sharding
  assert moment.nu["head"].sharding == head.sharding
  assert int(state.step) == 1


def test_moments_stay_float32_beside_bfloat16_parameters():
  state, metrics = run_steps([pack(make_records(), 2, 8)] * 3, (1, 1, 1), dtype="bfloat16", compute="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
  moments = next(part for part in state.optimizer if isinstance(part, optax.ScaleByAdamState))
  assert {leaf.dtype for leaf in jax.tree.leaves((moments.mu, moments.nu))} == {jnp.dtype("float32")}
  assert np.isfinite([m.sums.loss for m in metrics]).all()


@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 2, 1, 4)])
def test_heldout_sums_count_every_token_of_every_role_once(shape):
  records = make_records()
  batch = pack(records, 1, 16)
  mesh = make_mesh(shape)
  shardings = step.TrainState(None, sharding.params_shardings(llama.shapes(MODEL), mesh), None)
  sums = step.make_heldout_sums(llama.Llama(MODEL, "float32", "none"), mesh, shardings)(make_params(), batch)
  role_N = np.concatenate([role_T[1:] for _, role_T, _ in records])
  np.testing.assert_array_equal(sums.count_R, np.bincount(role_N, minlength=NUM_ROLES))
  _, want, _ = naive.total_cost(make_params(), MODEL, [(token_T, np.ones(len(token_T))) for token_T, _, _ in records])
  np.testing.assert_allclose(sums.nll_R.sum(), want, rtol=1e-5)
  np.testing.assert_allclose(sums.loss, want, rtol=1e-5)

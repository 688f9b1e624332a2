"""Who reads whom, and every way to compute attention against float64 in NumPy, one head at a time.

Kernels run interpreted on CPU. On a GPU or TPU, INSEC_TEST_PLATFORM=cuda (or tpu) pytest -m device runs them there.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.extend.core import jaxprs_in_params
from reference import context, context_gradients

from insec_jax.model import attention, attention_tpu, llama
from insec_jax.model.hf_config import config_from_json

T = 256
WAYS = {
  "xla": attention.XLA,
  "tpu": attention.kernel("tpu", 128, interpret=True),
  "blocks": attention.BLOCKS,
}
LEAN = ["tpu", "blocks"]  # keep no T x T scores
# A segment within a block, one over the border of two, one that ends in the second, padding.
PACKED = np.repeat([1, 2, 3, 0], [70, 110, 40, 36])
TOLERANCE = 1e-5


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
  np.testing.assert_allclose(got_BTNH[0], context(q_TNH, k_SKH, v_SKH, np.ones(9)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_query_reads_a_cache_as_it_would_among_others(num_kv_heads, dtype):
  rng = np.random.default_rng(0)
  q_BTNH = jnp.array(rng.normal(size=(3, 1, 4, 8)), dtype)
  k_BKHS, v_BKSH = (jnp.array(rng.normal(size=(3, num_kv_heads, *shape)), dtype) for shape in ((8, 9), (9, 8)))
  allowed_BTS = jnp.array(rng.random((3, 1, 9)) < 0.6)
  got_BTNH = attention.attend_transposed(q_BTNH, k_BKHS, v_BKSH, allowed_BTS)
  expected_BTNH = attention.attend(q_BTNH, k_BKHS.transpose(0, 3, 1, 2), v_BKSH.swapaxes(1, 2), allowed_BTS)
  assert got_BTNH.dtype == expected_BTNH.dtype == dtype
  tolerance = TOLERANCE if dtype == "float32" else 0.02
  np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got_BTNH, expected_BTNH)), rtol=0, atol=tolerance)
  by_cache_BTNH = attention.attend_cached(q_BTNH, k_BKHS.swapaxes(2, 3), v_BKSH, allowed_BTS)
  np.testing.assert_allclose(
    *(np.asarray(x, np.float32) for x in (by_cache_BTNH, expected_BTNH)), rtol=0, atol=tolerance
  )


def test_a_position_that_may_read_nothing_gives_finite_numbers():
  x_1THH = jnp.ones((1, 3, 2, 4))
  assert np.isfinite(attention.attend(x_1THH, x_1THH, x_1THH, jnp.zeros((1, 3, 3), bool))).all()


def draw(N=4, K=2, H=64, B=1, T=T):
  """q, k, v and a gradient of the context, float32."""
  rng = np.random.default_rng(0)
  return tuple(rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N))


@functools.partial(jax.jit, static_argnums=0)
def run(way, arrays, segment_BT):
  """(context, gradients of q, k, v)."""
  q_BTNH, k_BTKH, v_BTKH, d_context_BTNH = arrays
  where = way.prepare(segment_BT)
  context_BTNH, pullback = jax.vjp(lambda q, k, v: way.attend(q, k, v, where), q_BTNH, k_BTKH, v_BTKH)
  return context_BTNH, *pullback(d_context_BTNH)


def check(way, arrays, segment_BT, tolerance):
  """Assert that context and gradients are the reference's, row by row, to `tolerance` of the largest number."""
  got = run(way, arrays, jnp.array(segment_BT))
  for row, segment_T in enumerate(segment_BT):
    q_TNH, k_TKH, v_TKH, d_context_TNH = (np.asarray(x[row], np.float64) for x in arrays)
    expected = (
      context(q_TNH, k_TKH, v_TKH, segment_T),
      *context_gradients(q_TNH, k_TKH, v_TKH, segment_T, d_context_TNH),
    )
    for ours, theirs in zip(got, expected, strict=True):
      assert ours.dtype == arrays[0].dtype
      scale = np.abs(theirs).max()
      np.testing.assert_allclose(np.asarray(ours[row], np.float64) / scale, theirs / scale, rtol=0, atol=tolerance)


def test_the_gradients_of_the_reference_are_the_slopes_of_its_context():
  q_TNH, k_TKH, v_TKH, d_context_TNH = (x[0].astype(np.float64) for x in draw(N=4, K=2, H=8, T=12))
  segment_T = np.repeat([1, 2, 0], [5, 4, 3])
  arrays = [q_TNH, k_TKH, v_TKH]
  gradients = context_gradients(*arrays, segment_T, d_context_TNH)
  for number, gradient in enumerate(gradients):
    direction = np.random.default_rng(number).normal(size=gradient.shape)
    higher, lower = (
      (
        d_context_TNH
        * context(
          *(x + sign * 1e-6 * direction * (at == number) if at == number else x for at, x in enumerate(arrays)),
          segment_T,
        )
      ).sum()
      for sign in (1, -1)
    )
    np.testing.assert_allclose((higher - lower) / 2e-6, (gradient * direction).sum(), rtol=1e-6)


@pytest.mark.parametrize(("head_width", "num_kv_heads"), [(64, 2), (64, 32), (128, 1), (128, 8)])
@pytest.mark.parametrize("way", LEAN)
def test_context_and_gradients_of_a_packed_row_equal_the_float64_reference(way, head_width, num_kv_heads):
  arrays = draw(N=max(4, num_kv_heads), K=num_kv_heads, H=head_width)
  check(WAYS[way], arrays, PACKED[None], TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_segments_need_no_order_and_rows_no_likeness(way):
  """The first row holds segment 7 twice, apart, padding first; the second is one segment."""
  shuffled, whole = np.repeat([0, 7, 2, 7], [60, 30, 100, 66]), np.ones(T, int)
  check(WAYS[way], draw(B=2), np.stack([shuffled, whole]), TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_as_near_as_its_own_rounding(way):
  """One unit of a bfloat16 is 2^-8 of it; plain XLA is held to the same."""
  arrays = tuple(jnp.array(x, jnp.bfloat16) for x in draw())
  check(WAYS[way], arrays, PACKED[None], 2**-7)


@pytest.mark.parametrize("way", WAYS)
def test_a_packed_row_gives_what_each_segment_gives_alone(way):
  arrays = draw()
  packed = run(WAYS[way], arrays, jnp.array(PACKED)[None])
  for segment in (1, 2, 3):
    inside = np.equal(PACKED, segment)
    alone_arrays = tuple(np.concatenate((x[:, inside], x[:, ~inside]), 1) for x in arrays)
    alone = run(WAYS[way], alone_arrays, jnp.array(np.where(np.arange(T) < inside.sum(), 1, 0))[None])
    for of_packed, of_alone in zip(packed, alone, strict=True):
      np.testing.assert_allclose(of_packed[:, inside], of_alone[:, : inside.sum()], rtol=0, atol=TOLERANCE)


FIELDS = reference.FIELDS | {"num_hidden_layers": 1, "head_dim": 64, "hidden_size": 32, "intermediate_size": 32}


@pytest.mark.parametrize("way", LEAN)
def test_logits_and_weight_gradients_of_a_packed_row_are_those_of_its_records(way):
  """Records of 70, 110 and 40 tokens, packed into one row and each in a row of its own."""
  config = config_from_json(FIELDS, "packed")
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda shape: jnp.array(rng.normal(0, 0.2, shape.shape), jnp.float32), nn.unbox(llama.shapes(config))
  )
  model = llama.Llama(config, "float32", "none", WAYS[way])
  token_1T = rng.integers(0, config.vocab_size, (1, T))
  pull_TV = rng.normal(size=(T, config.vocab_size)).astype(np.float32) * (PACKED > 0)[:, None]

  @jax.jit
  def logits_and_gradients(token_1T, position_1T, segment_1T, pull_TV):
    def logits_TV(params):
      return llama.logits(params, config, model.apply({"params": params}, token_1T, position_1T, segment_1T))[0]

    logits, pullback = jax.vjp(logits_TV, params)
    return logits, pullback(pull_TV)[0]

  position_T = np.arange(T) - np.searchsorted(PACKED[:-36], PACKED)
  packed_TV, packed = logits_and_gradients(token_1T, position_T[None], jnp.array(PACKED)[None], pull_TV)
  summed = jax.tree.map(jnp.zeros_like, params)
  for segment in (1, 2, 3):
    inside = np.equal(PACKED, segment)
    first = np.argsort(~inside, stable=True)  # the record, then what is left, as padding
    alone = (np.arange(T) < inside.sum()).astype(np.int32)
    alone_TV, gradients = logits_and_gradients(
      token_1T[:, first], np.arange(T)[None], jnp.array(alone)[None], pull_TV[first] * alone[:, None]
    )
    np.testing.assert_allclose(packed_TV[inside], alone_TV[: inside.sum()], rtol=0, atol=10 * TOLERANCE)
    summed = jax.tree.map(jnp.add, summed, gradients)
  for of_packed, of_alone in zip(jax.tree.leaves(packed), jax.tree.leaves(summed), strict=True):
    scale = np.abs(of_alone).max()
    np.testing.assert_allclose(of_packed / scale, of_alone / scale, rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize("way", LEAN)
def test_rows_and_heads_may_lie_on_different_devices(way):
  """In a manual shard_map, as the train step has it; float sums may differ in their last bit."""
  arrays, segment_BT = draw(B=2), jnp.array(np.stack([PACKED, np.ones(T, int)]))
  mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  rows, heads = jax.P("rows"), jax.P("rows", None, "heads")
  split = jax.jit(
    jax.shard_map(
      functools.partial(run, WAYS[way]),
      mesh=mesh,
      in_specs=((heads,) * 4, rows),
      out_specs=(heads,) * 4,
      check_vma=False,
    )
  )
  for on_four, on_one in zip(split(arrays, segment_BT), run(WAYS[way], arrays, segment_BT), strict=True):
    np.testing.assert_allclose(on_four, on_one, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("changed", [1, 2, 0])
@pytest.mark.parametrize("way", WAYS)
def test_what_one_segment_holds_changes_not_a_bit_of_another(way, changed):
  """Padding, segment 0, too."""
  segment_1T = jnp.array(PACKED)[None]
  inside = np.equal(PACKED, changed)
  before, after = draw(), tuple(x.copy() for x in draw())
  for x in after:
    x[:, inside] = 3 - x[:, inside]
  for old, new in zip(run(WAYS[way], before, segment_1T), run(WAYS[way], after, segment_1T), strict=True):
    np.testing.assert_array_equal(old[:, ~inside], new[:, ~inside])
    assert (old[:, inside] != new[:, inside]).any()
    assert np.isfinite(new).all()


@pytest.mark.parametrize("way", ["tpu"])
def test_a_block_of_other_segments_is_not_visited(way):
  """nan in it would reach whoever multiplies it, by a weight of 0 too."""
  segment_T = np.repeat([1, 2, 0], [128, 180, 76])
  q_BTNH, k_BTKH, v_BTKH, d_context_BTNH = draw(N=1, K=1, T=384)
  for x in (q_BTNH, k_BTKH, v_BTKH, d_context_BTNH):
    x[:, :128] = np.nan
  for got in run(WAYS[way], (q_BTNH, k_BTKH, v_BTKH, d_context_BTNH), jnp.array(segment_T)[None]):
    assert np.isfinite(got[:, 128:]).all()
    assert np.isnan(got[:, :128]).all()


def test_a_row_too_long_for_the_fused_backward_has_the_same_gradients(monkeypatch):
  """With a kernel of its own for dq; it visits no block of other segments either, as nan there shows."""
  monkeypatch.setattr(attention_tpu, "MOST_PARTIAL", 0)
  way = attention.Attention(
    functools.partial(attention_tpu.prepare, block=128),
    functools.partial(attention_tpu.attend, block=128, interpret=True),
  )
  traced = jax.make_jaxpr(functools.partial(run, way))(draw(), jnp.array(PACKED)[None])
  kernels = {e.params["name"] for e in equations(traced.jaxpr) if e.primitive.name == "pallas_call"}
  assert any("dq" in kernel for kernel in kernels)
  check(way, draw(), PACKED[None], TOLERANCE)
  arrays = draw(N=1, K=1, T=384)
  for x in arrays:
    x[:, :128] = np.nan
  for got in run(way, arrays, jnp.array(np.repeat([1, 2, 0], [128, 180, 76]))[None]):
    assert np.isfinite(got[:, 128:]).all()


def test_the_blocks_of_the_causal_mask_are_those_of_splash():
  ours, theirs = attention_tpu.Causal((12, 12)), attention_tpu.masks.CausalMask((12, 12))
  for size in (1, 3, 4):
    for index in np.ndindex(12 // size, 12 // size):
      block = tuple(slice(at * size, (at + 1) * size) for at in index)
      np.testing.assert_array_equal(ours[block], theirs[block])


def test_the_fused_backward_is_for_rows_of_few_blocks_only():
  def fused(T, N):
    return attention_tpu.is_fused(jax.ShapeDtypeStruct((1, T, N, 128), jnp.bfloat16), 1024)

  assert [fused(T, 32) for T in (4096, 8192, 16_384)] == [True, True, False]  # 8B: 0.5 GiB a row of 8,192
  assert [fused(T, 4) for T in (16_384, 32_768, 131_072)] == [True, True, False]  # an eighth of its heads


def test_blocks_needed_are_those_that_share_a_segment():
  """The rows are those of the docstring; then padding amid the row, where more may be needed but never less."""
  expected_IJ = np.array([[cell == "x" for cell in row] for row in ["x...", "xx..", ".xx.", "...x"]])
  segment_BT = jnp.array([[1, 1, 1, 2, 2, 2, 3, 0], [0, 1, 1, 2, 0, 2, 1, 1]])
  needed_BIJ = attention_tpu.needed_blocks(segment_BT, 2)
  np.testing.assert_array_equal(needed_BIJ[0], expected_IJ)
  read_BTS = np.asarray(attention.causal_within_segments(segment_BT))
  assert (needed_BIJ >= read_BTS.reshape(2, 4, 2, 4, 2).any((2, 4))).all()


def equations(jaxpr):
  """Every equation of a jaxpr, those of inner ones too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def test_the_forward_kernel_runs_once_where_the_backward_pass_keeps_the_context():
  def runs(*names):
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))
    def attend(q, k, v):
      return WAYS["tpu"].attend(q, k, v, WAYS["tpu"].prepare(jnp.array(PACKED)[None]))

    traced = jax.make_jaxpr(jax.grad(lambda *arrays: attend(*arrays).sum(), (0, 1, 2)))(*draw()[:3])
    return [
      equation.params["name"].startswith("splash_mha_fwd")
      for equation in equations(traced.jaxpr)
      if equation.primitive.name == "pallas_call"
    ].count(True)

  assert runs() == 2
  assert runs("context") == 1


def test_attention_in_blocks_holds_no_scores_of_the_whole_row():
  arrays = tuple(jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32) for _ in range(3))

  def largest(way):
    def loss(q, k, v):
      return way.attend(q, k, v, way.prepare(jnp.ones((1, 2048), jnp.int32))).sum()

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*arrays)
    return max(array.aval.size for equation in equations(traced.jaxpr) for array in equation.outvars)

  assert largest(attention.XLA) == 4 * 2048 * 2048
  assert largest(attention.BLOCKS) == 4 * 128 * 2048


KNOWN = dict(device_kind="TPU v5p", head_width=128, row_length=4096, compute="bfloat16")


def test_a_tpu_gets_splash_attention_in_the_largest_blocks_that_divide_the_row():
  for row_length, block in ((4096, 1024), (8192, 1024), (1536, 512), (768, 256), (640, 128)):
    chosen, reason = attention.choose("tpu", **KNOWN | {"row_length": row_length})
    assert chosen is attention.kernel("tpu", block)
    assert f"blocks of {block}" in reason


@pytest.mark.parametrize(
  ("platform", "changed", "reason"),
  [
    ("cpu", {}, "no kernel for it"),
    ("tpu", {"device_kind": "TPU v3"}, "'TPU v3'"),
    ("tpu", {"head_width": 96}, "heads of 64 and 128, not 96"),
    ("tpu", {"row_length": 1000}, "data.row_length=1000 is no multiple of the kernel's 128"),
    ("tpu", {"compute": "float32"}, "float32"),
    ("gpu", {"device_kind": "NVIDIA H100 80GB HBM3"}, "no kernel for it"),
  ],
)
def test_what_no_kernel_is_known_to_do_is_done_in_blocks_and_the_reason_is_given(platform, changed, reason):
  chosen, said = attention.choose(platform, **KNOWN | changed)
  assert chosen is attention.BLOCKS
  assert f"attention in blocks of queries on {platform}" in said
  assert reason in said
  short, said = attention.choose(platform, **KNOWN | changed | {"row_length": 200})
  assert short is attention.XLA
  assert f"plain XLA attention on {platform}" in said


@pytest.mark.parametrize("T", [1, 127, 300, pytest.param(128 * 32 + 1, marks=pytest.mark.slow)])
def test_blocks_of_a_row_of_any_length_give_what_plain_attention_gives(T):
  rng = np.random.default_rng(T)
  q, k, v = (jnp.array(rng.normal(size=(1, T, heads, 4)), jnp.float32) for heads in (2, 1, 1))
  segment_BT = jnp.array(np.sort(rng.integers(1, 4, (1, T))))
  got = attention.BLOCKS.attend(q, k, v, attention.BLOCKS.prepare(segment_BT))
  expected = attention.attend(q, k, v, attention.causal_within_segments(segment_BT))
  np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture
def topology(monkeypatch):
  """A function from a slice's name to the first of its devices; skips where no TPU compiler is installed."""
  pytest.importorskip("libtpu")
  from jax.experimental import topologies

  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a compiler needs no TPU to itself
  return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_tpu_compiler_takes_splash_attention(topology, name, head_width):
  """Two rows of two of the largest blocks, forward and backward; it finds what overflows VMEM."""
  device = topology(name)
  chosen, _ = attention.choose("tpu", **KNOWN | dict(device_kind=device.device_kind, head_width=head_width))
  assert chosen is attention.kernel("tpu", 1024)
  here = jax.sharding.SingleDeviceSharding(device)
  arrays = tuple(
    jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=here) for x in draw(N=8, K=2, H=head_width, B=2, T=2048)
  )
  compiled = run.lower(chosen, arrays, jax.ShapeDtypeStruct((2, 2048), jnp.int32, sharding=here)).compile()
  text = compiled.as_text()
  assert "splash_mha_fwd_segmented" in text
  assert "splash_mha_dkv_segmented" in text


@pytest.mark.device
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 32])
@pytest.mark.parametrize("head_width", [64, 128])
def test_the_attention_that_is_chosen_is_right_on_this_device(head_width, num_kv_heads):
  if jax.default_backend() == "cpu":
    pytest.skip("no accelerator; set INSEC_TEST_PLATFORM to cuda or tpu")
  way = attention.kernel("tpu", 128) if jax.default_backend() == "tpu" else attention.BLOCKS
  arrays = tuple(jnp.array(x, jnp.bfloat16) for x in draw(N=32, K=num_kv_heads, H=head_width, B=2))
  check(way, arrays, np.stack([PACKED, np.ones(T, int)]), 2**-7)

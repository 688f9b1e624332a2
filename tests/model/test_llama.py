"""The decoder against the NumPy reference, and the properties that training and decoding lean on."""

import dataclasses
import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.extend.core import jaxprs_in_params

from insec_jax.command import InputError
from insec_jax.generation.decoding import make_cache
from insec_jax.model import hf, llama, rope
from insec_jax.model.attention import XLA
from insec_jax.model.hf_config import config_from_json, config_to_json

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIG = config_from_json(reference.FIELDS, "reference")
T = 48  # past original_max_position_embeddings, 32
BLOCK, MODEL = 1e-5, 1e-4  # tolerances; never loosened without a written reason

# Changes of reference.FIELDS, one a line; "llama3" at 3.1's and 3.2's own numbers is past the knee by positions.
VARIANTS = {
  "as is": {},
  "one kv head": {"num_key_value_heads": 1},
  "kv heads = heads": {"num_key_value_heads": 4},
  "head width = width / heads": {"head_dim": 16},
  "tied": {"tie_word_embeddings": True},
  "default rope": {"rope_scaling": None},
  "3.1": {
    "rope_theta": 500000.0,
    "rope_scaling": reference.FIELDS["rope_scaling"] | {"factor": 8.0, "original_max_position_embeddings": 8192},
  },
  "3.2": {
    "rope_theta": 500000.0,
    "rope_scaling": reference.FIELDS["rope_scaling"] | {"factor": 32.0, "original_max_position_embeddings": 8192},
  },
  "knee in sight": {
    "rope_scaling": reference.FIELDS["rope_scaling"] | {"factor": 32.0, "original_max_position_embeddings": 16}
  },
  "other eps and theta": {"rms_norm_eps": 1e-3, "rope_theta": 700.0},
  "three layers, odd sizes": {"num_hidden_layers": 3, "vocab_size": 51, "intermediate_size": 37, "hidden_size": 60},
}


def tokens(batch=1, seed=0, vocab_size=51):
  return np.random.default_rng(seed).integers(0, vocab_size, (batch, T)).astype(np.int32)


def positions(token_BT):
  return jnp.broadcast_to(jnp.arange(token_BT.shape[1])[None], token_BT.shape)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
  folder = reference.write_folder(
    tmp_path_factory.mktemp("hf"), reference.FIELDS, reference.random_tensors(reference.FIELDS)
  )
  return hf.load(folder, CONFIG)


@functools.partial(jax.jit, static_argnames=("config", "compute", "remat"))
def forward(params, token_BT, position_BT=None, segment_BT=None, *, config=CONFIG, compute="float32", remat="none"):
  """Logits of the full pass, jitted; one segment from position 0 unless told otherwise."""
  position_BT = positions(token_BT) if position_BT is None else position_BT
  segment_BT = jnp.ones_like(token_BT) if segment_BT is None else segment_BT
  model = llama.Llama(config, compute, remat)
  return llama.logits(params, config, model.apply({"params": params}, token_BT, position_BT, segment_BT))


def draw(config):
  """Params drawn with the config's deviation; build.init would compile anew for each config."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda shape: jnp.array(rng.normal(0, config.init_std, shape.shape), jnp.float32), nn.unbox(llama.shapes(config))
  )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_float64_reference(variant, tmp_path):
  fields = reference.FIELDS | VARIANTS[variant]
  tensors = reference.random_tensors(fields)
  config = config_from_json(fields, variant)
  token_1T = tokens()
  got_TV = forward(hf.load(reference.write_folder(tmp_path, fields, tensors), config), token_1T, config=config)[0]
  np.testing.assert_allclose(got_TV, reference.logits(fields, tensors, token_1T[0]), rtol=0, atol=MODEL)


def test_logits_equal_those_that_transformers_gave():
  """tests/golden/tiny_llama holds a model, 48 tokens and transformers' logits; tests/model/test_parity.py writes it."""
  config = hf.read_config(GOLDEN / "tiny_llama")
  stored = np.load(GOLDEN / "tiny_llama" / "logits.npz")
  got_TV = forward(hf.load(GOLDEN / "tiny_llama", config), stored["token_1T"], config=config)[0]
  np.testing.assert_allclose(got_TV, stored["logits_1TV"][0], rtol=0, atol=MODEL)
  np.testing.assert_array_equal(got_TV.argmax(-1), stored["logits_1TV"][0].argmax(-1))


@functools.cache
def blocks():
  """Name -> (ours, the reference's), of the first layer of a random model on a random stream."""
  tensors = reference.random_tensors(reference.FIELDS)
  stream_TD = np.random.default_rng(1).normal(size=(T, CONFIG.width)).astype(np.float32)
  weights = {
    part: {
      path.split("/")[2]: hf.to_ours(path, tensors[name.format(0)], CONFIG)
      for path, (name, _) in hf.NAMES.items()
      if path.startswith(f"layers/{part}")
    }
    for part in ("attn", "mlp")
  }
  position_T, segment_T = np.arange(T), np.ones(T, int)
  turn = rope.angles(CONFIG, position_T[None])
  where = XLA.prepare(jnp.array(segment_T)[None])

  def read(q, k, v):
    return XLA.attend(q, k, v, where)

  def normed(kind):
    return reference.rms_norm(stream_TD, tensors[f"model.layers.0.{kind}_layernorm.weight"], CONFIG.norm_eps)

  head_TNH = np.random.default_rng(2).normal(size=(1, T, 3, CONFIG.head_width)).astype(np.float32)
  frequency = reference.frequencies(reference.FIELDS)
  stream_1TD = jnp.array(stream_TD)[None]
  return {
    "rms_norm": (llama.rms_norm(weights["attn"]["norm"], stream_1TD, CONFIG.norm_eps)[0], normed("input")),
    "rope": (
      rope.rotate(head_TNH, turn)[0],
      np.stack([reference.rotate(head_TNH[0, :, n], position_T, frequency) for n in range(3)], 1),
    ),
    "attention": (
      llama.attn(weights["attn"], CONFIG, stream_1TD, turn, read)[0],
      reference.attention(
        reference.FIELDS, tensors, "model.layers.0.self_attn", normed("input"), position_T, segment_T
      ),
    ),
    "mlp": (
      llama.mlp(weights["mlp"], CONFIG, stream_1TD)[0],
      reference.mlp(tensors, "model.layers.0.mlp", normed("post_attention")),
    ),
    "layer": (
      llama.block(weights, CONFIG, stream_1TD, turn, read)[0],
      reference.layer(reference.FIELDS, tensors, 0, stream_TD, position_T, segment_T),
    ),
  }


@pytest.mark.parametrize("name", ["rms_norm", "rope", "attention", "mlp", "layer"])
def test_each_block_equals_the_float64_reference(name):
  ours, theirs = blocks()[name]
  scale = np.abs(theirs).max()
  np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, rtol=0, atol=BLOCK)


def test_the_norm_is_scaled_after_the_cast_to_bfloat16():
  x_BTD = jnp.array(np.random.default_rng(0).normal(size=(1, 4, 64)), jnp.bfloat16)
  scale_D = jnp.array(np.random.default_rng(1).normal(size=64), jnp.float32)
  x32 = np.asarray(x_BTD, np.float32)
  normed = jnp.array(x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-5)).astype(jnp.bfloat16)
  expected = scale_D.astype(jnp.bfloat16)[None, None] * normed
  early = (jnp.array(normed, jnp.float32) * scale_D[None, None]).astype(jnp.bfloat16)
  got = llama.rms_norm(scale_D, x_BTD, 1e-5)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, expected)
  assert (got != early).any()  # the other order is told apart


OTHER = {
  "vocab_size": 64,
  "width": 72,
  "num_layers": 3,
  "num_heads": 8,
  "num_kv_heads": 4,
  "head_width": 16,
  "mlp_width": 100,
  "norm_eps": 1e-4,
  "rope_theta": 500.0,
  "rope_scaling": None,
  "tied": True,
  "init_std": 0.3,
  "max_positions": 512,
  "bos_id": 9,
  "eos_ids": (9,),
  "pad_id": 9,
  "stored_dtype": "bfloat16",
  "source": json.dumps(reference.FIELDS | {"transformers_version": "4.43.0"}),
}
NO_ARITHMETIC = ("max_positions", "bos_id", "eos_ids", "pad_id", "stored_dtype", "source")


def program(config):
  """The whole model as jax sees it, constants included: two models of one program and one set of weights are one."""
  weights = nn.unbox(llama.shapes(config))
  return jax.jit(forward.__wrapped__, static_argnames="config").lower(weights, tokens(), config=config).as_text()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(llama.LlamaConfig)])
def test_every_field_of_the_model_config_changes_the_logits_or_only_config_json(field):
  changed = dataclasses.replace(CONFIG, **{field: OTHER[field]})
  assert config_to_json(changed) != config_to_json(CONFIG)
  if field in NO_ARITHMETIC:
    assert program(changed) == program(CONFIG)
  else:
    assert not np.array_equal(forward(draw(CONFIG), tokens()), forward(draw(changed), tokens(), config=changed))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(rope.RopeScaling)])
def test_every_field_of_the_rope_scaling_changes_the_logits(field):
  scaling = dataclasses.replace(CONFIG.rope_scaling, **{field: 2 * getattr(CONFIG.rope_scaling, field)})
  changed = dataclasses.replace(CONFIG, rope_scaling=scaling)
  assert not np.array_equal(forward(draw(CONFIG), tokens()), forward(draw(changed), tokens(), config=changed))


def test_later_tokens_do_not_move_earlier_logits(params):
  before, after = tokens(), tokens()
  after[0, 30:] = (after[0, 30:] + 1) % 51
  np.testing.assert_array_equal(forward(params, before)[0, :30], forward(params, after)[0, :30])
  assert (forward(params, before)[0, 30:] != forward(params, after)[0, 30:]).any()


def test_a_packed_row_equals_its_parts_alone(params):
  token_1T = tokens()
  segment_1T = np.repeat([1, 2, 0], [20, 20, 8])[None].astype(np.int32)
  position_1T = np.concatenate([np.arange(n) for n in (20, 20, 8)])[None].astype(np.int32)
  packed_TV = forward(params, token_1T, position_1T, segment_1T)[0]
  for start, stop in ((0, 20), (20, 40)):
    alone_TV = forward(params, token_1T[:, start:stop])[0]
    np.testing.assert_allclose(packed_TV[start:stop], alone_TV, rtol=0, atol=BLOCK)
  np.testing.assert_allclose(
    packed_TV,
    reference.logits(
      reference.FIELDS, reference.random_tensors(reference.FIELDS), token_1T[0], position_1T[0], segment_1T[0]
    ),
    rtol=0,
    atol=MODEL,
  )
  assert np.isfinite(packed_TV).all()


def test_gradients_do_not_cross_segments(params):
  segment_1T = np.repeat([1, 2], [20, 28])[None].astype(np.int32)

  @jax.jit
  @jax.grad
  def gradient(params, token_1T):
    return (forward(params, token_1T, segment_BT=segment_1T)[:, :20] ** 2).mean()

  one, other = tokens(), tokens()
  other[0, 20:] = tokens(seed=5)[0, 20:]
  for got, expected in zip(*(jax.tree.leaves(gradient(params, token_1T)) for token_1T in (one, other)), strict=True):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [1, 16, T])
def test_decoding_with_a_cache_equals_one_full_pass(params, width):
  """Three rows whose text starts at slots 0, 5 and 40, read `width` tokens at a time; weights stacked or not."""
  token_BT, start_B = tokens(batch=3), np.array([0, 5, 40], np.int32)
  cache = make_cache(CONFIG, 3, T + 3, "float32")
  step = jax.jit(functools.partial(llama.forward_cached, CONFIG))
  weights = params if width == T else llama.unstack(params, CONFIG)
  for slot in range(0, T, width):
    stream_BTD, cache = step(weights, token_BT[:, slot : slot + width], start_B, slot, cache)
    for row, start in enumerate(start_B):
      got_TV = llama.logits(params, CONFIG, stream_BTD)[row]
      if slot >= start:
        expected_TV = forward(params, token_BT[row : row + 1, start:])[0, slot - start : slot - start + width]
        np.testing.assert_allclose(got_TV, expected_TV, rtol=0, atol=2 * BLOCK)
      assert np.isfinite(got_TV).all()


def test_each_remat_keeps_what_it_names_and_no_more(params):
  """Counts what the forward scan hands to the backward one beyond the weights."""

  def stacked(remat):
    pullback = jax.eval_shape(lambda params: jax.vjp(lambda p: forward(p, tokens(), remat=remat), params)[1], params)
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    return sum(
      leaf.size
      for leaf in jax.tree.leaves(pullback)
      if leaf.shape[:1] == (CONFIG.num_layers,) and leaf.shape not in weights
    )

  L, D, F, N, K, H = (CONFIG.size(letter) for letter in "LDFNKH")
  assert stacked("full") == stacked("offload") == L * T * D
  assert stacked("attention") == L * T * (D + D + N * H + 2 * K * H + N * H)
  assert stacked("matmuls") == L * T * (D + D + N * H + 2 * K * H + N * H + 2 * F)
  assert stacked("none") > stacked("matmuls")


def test_an_unknown_remat_is_refused():
  with pytest.raises(InputError, match=r"model.remat='some'; must be one of 'none', 'matmuls', 'attention', 'full'"):
    llama.Llama(CONFIG, "float32", "some")


def test_a_token_outside_the_vocabulary_makes_its_row_nan(params):
  token_BT = tokens(batch=2)
  token_BT[0, 10] = CONFIG.vocab_size
  wrong_TV, right_TV = forward(params, token_BT)
  assert np.isnan(wrong_TV).all()
  assert np.isfinite(right_TV).all()


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bfloat16_has_float32_norms_softmax_and_rope_and_no_silent_promotion(params, stored):
  params = jax.tree.map(lambda weight: weight.astype(stored), params)
  with jax.numpy_dtype_promotion("strict"):
    traced = forward.trace(params, tokens(), compute="bfloat16")
  assert traced.out_info.dtype == jnp.float32
  dtypes = {name: set() for name in ("dot_general", "exp", "rsqrt", "cos", "sin", "logistic")}
  for equation in equations(traced.jaxpr.jaxpr):
    if equation.primitive.name in dtypes:
      dtypes[equation.primitive.name] |= {variable.aval.dtype.name for variable in equation.invars}
  float32, bfloat16 = {"float32"}, {"bfloat16"}
  assert dtypes == {
    "dot_general": bfloat16,
    "exp": float32,
    "rsqrt": float32,
    "cos": float32,
    "sin": float32,
    "logistic": bfloat16,
  }
  if stored == "float32":
    got, exact = forward(params, tokens(), compute="bfloat16"), forward(params, tokens())
    assert np.abs(got - exact).mean() < 0.05 * np.abs(exact).mean()


def equations(jaxpr):
  """Every equation of a jaxpr, those of inner ones too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def test_angles_are_exact_far_from_the_start():
  cos, sin = rope.angles(CONFIG, jnp.array([[257, 131_071]]))
  angle = np.outer([257, 131_071], reference.frequencies(reference.FIELDS))
  np.testing.assert_allclose(cos[0, :, 0], np.cos(angle), atol=2e-2)
  np.testing.assert_allclose(np.hypot(cos, sin), 1, atol=1e-6)


PUBLISHED = json.loads((GOLDEN / "llama_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_published_number_of_parameters(name):
  config = config_from_json(PUBLISHED[name]["config"], name)
  shapes = jax.tree.leaves(llama.shapes(config))
  assert sum(shape.size for shape in shapes) == PUBLISHED[name]["parameters"]

"""Live parity with transformers in torch, float32: each block, random models of every shape, the real 135M model.

pytest -m parity tests/model/test_parity.py        needs pip install .[parity]
python tests/model/test_parity.py                  rewrites tests/golden/tiny_llama
"""

import copy
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

import reference
import smollm2

from insec_jax.model import build, hf, hf_writing, llama, rope
from insec_jax.model.attention import XLA
from insec_jax.model.hf_config import config_from_json

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tiny_llama"
BLOCK, MODEL, REAL = 1e-5, 1e-4, 2e-4

SCALING_31 = reference.FIELDS["rope_scaling"] | {"factor": 8.0, "original_max_position_embeddings": 8192}
SCALING_32 = SCALING_31 | {"factor": 32.0}
PUBLISHED = {"max_position_embeddings": 131_072, "rope_theta": 500000.0, "head_dim": 64}
VARIANTS = {
  "as the golden one": {},
  "one kv head": {"num_key_value_heads": 1},
  "two kv heads of eight": {"num_attention_heads": 8, "head_dim": 8},
  "four kv heads of eight": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
  "kv heads = heads": {"num_key_value_heads": 4},
  "head_dim = width / heads": {"head_dim": 16},
  "tied": {"tie_word_embeddings": True},
  "default rope": {"rope_scaling": None},
  "3.1's rope": PUBLISHED | {"rope_scaling": SCALING_31},
  "3.2's rope": PUBLISHED | {"rope_scaling": SCALING_32},
  "knee close": {"rope_scaling": SCALING_32 | {"original_max_position_embeddings": 16}},
  "other eps": {"rms_norm_eps": 1e-3},
  "other theta": {"rope_theta": 700.0},
  "other sizes": {"vocab_size": 51, "hidden_size": 60, "intermediate_size": 37, "num_hidden_layers": 3},
}


@functools.partial(jax.jit, static_argnames="config")
def ours(params, token_BT, position_BT, *, config):
  stream_BTD = llama.Llama(config, "float32", "none").apply(
    {"params": params}, token_BT, position_BT, jnp.ones_like(token_BT)
  )
  return llama.logits(params, config, stream_BTD)


def theirs(model, token_BT, position_BT):
  with torch.no_grad():
    return model(torch.tensor(token_BT).long(), position_ids=torch.tensor(position_BT).long()).logits.numpy()


def llama_config(fields):
  return transformers.LlamaConfig(**copy.deepcopy(fields))  # it writes into the rope_scaling it is given


def hf_model(fields, folder):
  """A transformers model of these fields with random weights, saved to `folder` by transformers itself."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(llama_config(fields)).eval()
  for name, weight in model.named_parameters():
    if "norm" in name:
      torch.nn.init.normal_(weight, 1.0, 0.3)
  model.save_pretrained(folder)
  return model


def both_logits(model, folder, start):
  """(ours, theirs) for 2 x 96 tokens whose positions begin at `start`."""
  config = hf.read_config(folder)
  token_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 96)).astype(np.int32)
  position_BT = np.broadcast_to(start + np.arange(96), (2, 96)).astype(np.int32)
  return ours(hf.load(folder, config), token_BT, position_BT, config=config), theirs(model, token_BT, position_BT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_random_model_saved_by_transformers_gives_its_logits(variant, tmp_path):
  got, expected = both_logits(hf_model(reference.FIELDS | VARIANTS[variant], tmp_path), tmp_path, 0)
  np.testing.assert_allclose(got, expected, rtol=0, atol=MODEL)
  assert np.abs(expected).max() > 1


@pytest.mark.parametrize("variant", ["as the golden one", "3.1's rope", "3.2's rope"])
def test_logits_far_past_the_original_context_are_theirs_when_the_frequencies_are(variant, tmp_path, monkeypatch):
  """The frequencies are lent: at position 10,000 float32 turns their last bit, which torch's own pow leaves open, into
  3e-3 of a logit, and transformers' float32 logits are themselves 3e-3 from a float64 computation."""
  model = hf_model(reference.FIELDS | VARIANTS[variant], tmp_path)
  monkeypatch.setattr(rope, "frequencies", lambda _: model.model.rotary_emb.inv_freq.numpy())
  jax.clear_caches()
  got, expected = both_logits(model, tmp_path, 10_000)
  jax.clear_caches()
  np.testing.assert_allclose(got, expected, rtol=0, atol=MODEL)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rope_frequencies_equal_those_of_transformers_to_the_last_bits(variant):
  fields = reference.FIELDS | VARIANTS[variant]
  rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(llama_config(fields))
  np.testing.assert_array_max_ulp(rope.frequencies(config_from_json(fields, variant)), rotary.inv_freq.numpy(), 4)


@pytest.mark.parametrize("name", ["rms_norm", "rope", "attention", "mlp", "layer"])
def test_each_block_equals_that_of_transformers(name, tmp_path):
  model = hf_model(reference.FIELDS, tmp_path).model
  config = hf.read_config(tmp_path)
  weights = jax.tree.map(lambda stacked: stacked[1], hf.load(tmp_path, config)["layers"])
  T = 48
  stream_BTD = np.random.default_rng(0).normal(size=(2, T, config.width)).astype(np.float32)
  position_BT = np.broadcast_to(np.arange(T), (2, T))
  turn = rope.angles(config, jnp.array(position_BT))
  where = XLA.prepare(jnp.ones((2, T), jnp.int32))

  def read(q, k, v):
    return XLA.attend(q, k, v, where)

  stream, layer = torch.tensor(stream_BTD), model.layers[1]
  angles = model.rotary_emb(stream, torch.tensor(position_BT))
  mask = torch.where(torch.ones(T, T, dtype=torch.bool).tril(), 0.0, -torch.inf)[None, None]
  with torch.no_grad():
    normed, normed_after = layer.input_layernorm(stream), layer.post_attention_layernorm(stream)
    if name == "rms_norm":
      pair = llama.rms_norm(weights["attn"]["norm"], stream_BTD, config.norm_eps), normed
    elif name == "rope":
      q_BTNH = np.random.default_rng(1).normal(size=(2, T, 3, config.head_width)).astype(np.float32)
      heads_first = torch.tensor(q_BTNH).transpose(1, 2)
      turned, _ = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(heads_first, heads_first, *angles)
      pair = rope.rotate(q_BTNH, turn), turned.transpose(1, 2)
    elif name == "attention":
      pair = (
        llama.attn(weights["attn"], config, stream_BTD, turn, read),
        layer.self_attn(normed, position_embeddings=angles, attention_mask=mask)[0],
      )
    elif name == "mlp":
      pair = llama.mlp(weights["mlp"], config, stream_BTD), layer.mlp(normed_after)
    else:
      pair = (
        llama.block(weights, config, stream_BTD, turn, read),
        layer(stream, position_embeddings=angles, attention_mask=mask),
      )
  got, expected = pair[0], pair[1].numpy()
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got / scale, expected / scale, rtol=0, atol=BLOCK)


def test_the_golden_logits_are_those_of_transformers_today():
  model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32).eval()
  stored = np.load(GOLDEN / "logits.npz")
  token_1T = stored["token_1T"]
  got = theirs(model, token_1T, np.arange(token_1T.shape[1])[None])
  np.testing.assert_allclose(got, stored["logits_1TV"], rtol=0, atol=BLOCK)


@pytest.fixture(scope="module")
def real():
  if why := smollm2.missing():
    pytest.skip(why)
  return smollm2.folder()


PROBLEMS = [
  "{a} has {n} apples and buys {m} more. How many apples does {a} have now?\n{a} starts with {n} apples.\n"
  "{n} + {m} = {sum}, so there are {sum} apples.\n#### {sum}\n\n",
  "A train goes {n} miles in an hour. How far does it go in {m} hours?\nIn one hour it goes {n} miles.\n{n} * {m} = "
  "{product}, so it goes {product} miles.\n#### {product}\n\n",
]


def real_tokens(folder, length=512):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  text = "".join(
    PROBLEMS[i % 2].format(a=("Ann", "Bob", "Carol")[i % 3], n=n, m=m, sum=n + m, product=n * m)
    for i, (n, m) in enumerate((7 + 5 * i, 3 + i) for i in range(20))
  )
  return np.array(tokenizer(text).input_ids[:length], np.int32)[None]


def test_the_real_model_gives_transformers_logits_over_512_positions(real):
  token_1T = real_tokens(real)
  assert token_1T.shape == (1, 512)
  position_1T = np.arange(512, dtype=np.int32)[None]
  config = hf.read_config(real)
  model = transformers.AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32).eval()
  expected = theirs(model, token_1T, position_1T)
  got = np.asarray(ours(hf.load(real, config), token_1T, position_1T, config=config))
  print("largest difference of logits", np.abs(got - expected).max())
  assert np.abs(got - expected).max() <= REAL
  np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))


def test_what_save_writes_opens_in_transformers_with_the_same_weights_and_tokenizer(real, tmp_path):
  config = hf.read_config(real)
  tokenizer = transformers.AutoTokenizer.from_pretrained(real)
  hf_writing.save(tmp_path / "out", hf.stored(real, config), config, max_shard_bytes=10**8, tokenizer=tokenizer)
  model, again = (
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for folder in (real, tmp_path / "out")
  )
  theirs_then, theirs_now = model.state_dict(), again.state_dict()
  assert theirs_then.keys() == theirs_now.keys()
  assert all(torch.equal(theirs_then[name], theirs_now[name]) for name in theirs_then)
  then, now = model.config.to_dict(), again.config.to_dict()
  assert {key: value for key, value in then.items() if key != "_name_or_path"} == {
    key: value for key, value in now.items() if key != "_name_or_path"
  }
  assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("17 + 25 = 42") == tokenizer("17 + 25 = 42")
  assert again.generation_config.eos_token_id == 2


def test_a_random_model_of_ours_opens_in_transformers_and_gives_our_logits(tmp_path):
  config = config_from_json(reference.FIELDS | {"rope_scaling": SCALING_32}, "fields")
  params = build.init(config, jax.random.key(0), "float32")
  hf_writing.save(tmp_path / "out", params, config)
  token_1T = np.random.default_rng(0).integers(0, config.vocab_size, (1, 96)).astype(np.int32)
  position_1T = np.arange(96, dtype=np.int32)[None]
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
  np.testing.assert_allclose(
    ours(params, token_1T, position_1T, config=config), theirs(model, token_1T, position_1T), rtol=0, atol=MODEL
  )
  assert model.generation_config.eos_token_id == list(config.eos_ids)


def write_golden():
  """Makes tests/golden/tiny_llama anew: bfloat16 weights, 48 tokens, transformers' float32 logits."""
  hf_model(reference.FIELDS, GOLDEN).to(torch.bfloat16).save_pretrained(GOLDEN)
  # LoadedModel anew: .to(bfloat16) has rounded the rotary frequencies of the model above.
  model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32).eval()
  token_1T = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 48)).astype(np.int32)
  logits_1TV = theirs(model, token_1T, np.arange(48)[None])
  np.savez(GOLDEN / "logits.npz", token_1T=token_1T, logits_1TV=logits_1TV)


if __name__ == "__main__":
  write_golden()

"""Texts do not depend on the mesh, on the rows of the batch, or on which prompts were in a row before."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samplerkit import CONFIG, FLAG, laid_out, same, some_prompts

from insec_jax.command import InputError
from insec_jax.config import MeshConfig
from insec_jax.generation import decoding, placement
from insec_jax.generation.confidence import ConfidenceTrigger
from insec_jax.generation.sampler import Sampler
from insec_jax.model import build, sharding

EVEN = dataclasses.replace(CONFIG, vocab_size=64)
PARAMS = build.init(EVEN, jax.random.key(0), "float32")
PROMPTS = some_prompts((33, 1, 50, 5, 31, 32, 70, 8, 9, 40, 3, 3, 12, 64, 20))
SETTINGS = {"max_tokens": 24, "stop_ids": [1, 2, 3, 4], "flag_id": FLAG}
OPTIONS = {
  "greedy": {},
  "drawn": {"temperature": 1.0, "seed": 3},
  "cut": {"temperature": 0.8, "top_p": 0.9, "seed": 3, "flag_bias": 1.5},
  "banned": {"flag_bias": -np.inf},
  "confidence": {
    "temperature": 1.0,
    "watch": ConfidenceTrigger((9, 12, 15, 20), 8, 4.0, edges=(1.0, 3.0), confidence_ids=(55, 56, 57)),
  },
}


def mesh_of(data, tensor):
  return sharding.make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), jax.devices()[: data * tensor])


def model_on(data=1, tensor=1, config=EVEN, params=PARAMS):
  mesh = mesh_of(data, tensor)
  return Sampler(config, laid_out(params, config, mesh), compute="float32", mesh=mesh)


def texts(data=1, tensor=1, *, batch_size=16, prompts=PROMPTS, **options):
  return model_on(data, tensor).generate(prompts, batch_size=batch_size, **SETTINGS, **options)


def all_same(found, expected):
  for a, b in zip(found, expected, strict=True):
    same(a, b)
    np.testing.assert_allclose(a.flag_logprobs, b.flag_logprobs, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(a.margins, b.margins, atol=1e-4)


@pytest.fixture(scope="module")
def alone():
  """The text of each prompt, decoded alone on one device, by the name of the options."""
  return {name: [texts(prompts=PROMPTS[:1], **options)[0]] + texts(**options)[1:] for name, options in OPTIONS.items()}


def test_the_order_of_the_weights_in_memory_changes_no_text(alone, monkeypatch):
  monkeypatch.setattr(placement, "HEADS_FIRST_ON", ("cpu",))
  mesh = mesh_of(2, 2)
  params = placement.place(jax.tree.map(np.asarray, PARAMS), EVEN, placement.params_formats(EVEN, mesh))
  assert params["layers"][0]["attn"]["wq"].format.layout.major_to_minor == (1, 0, 2)
  model = Sampler(EVEN, params, compute="float32", mesh=mesh)
  all_same(model.generate(PROMPTS, batch_size=16, **SETTINGS), alone["greedy"])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (4, 2)])
def test_a_text_does_not_depend_on_the_mesh(alone, name, data, tensor):
  all_same(texts(data, tensor, **OPTIONS[name]), alone[name])


# Divides over eight devices. Weights of 0.3 would give log p that the order of sums moves by up to 1.7e-5.
EIGHT = dataclasses.replace(EVEN, num_heads=8, num_kv_heads=8, head_width=4, init_std=0.1)
LONG = some_prompts(np.random.default_rng(2).integers(1, 100, 64))


@functools.cache
def long_texts(name, data=1, tensor=1):
  """64 texts of 64 tokens, unless the model ends them."""
  model = model_on(data, tensor, EIGHT, build.init(EIGHT, jax.random.key(0), "float32"))
  return model.generate(LONG, max_tokens=64, stop_ids=[1], flag_id=FLAG, batch_size=32, **OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy", "drawn"])
@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_64_texts_of_64_tokens_are_the_same_on_every_mesh_of_eight_devices(name, data, tensor):
  all_same(long_texts(name, data, tensor), long_texts(name))


@pytest.mark.parametrize(
  "name", ["cut", *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS if name != "cut")]
)
def test_a_row_that_is_filled_again_writes_the_same_text(alone, name):
  all_same(texts(2, 2, batch_size=4, **OPTIONS[name]), alone[name])


@pytest.mark.slow
def test_prompts_of_longer_buckets_join_a_batch_that_is_being_decoded(alone, monkeypatch):
  grown = []
  resize = decoding.resize
  monkeypatch.setattr(decoding, "resize", lambda *args, **rest: grown.append(rest["slots"]) or resize(*args, **rest))
  all_same(texts(batch_size=3), alone["greedy"])
  assert grown == [64 + 24, 128 + 24]


def test_the_cache_and_the_weights_lie_on_all_devices_in_equal_parts():
  model = model_on(4, 2)
  for path, weight in jax.tree_util.tree_flatten_with_path(model.params)[0]:
    name = jax.tree_util.keystr(path)
    parts = 1 if "norm" in name else 2
    assert {shard.data.size * parts for shard in weight.addressable_shards} == {weight.size}, name
  state = decoding.begin(config=EVEN, compute="float32", mesh=model.mesh, rows=8, slots=32)
  for layer in state.cache:
    for array, shape in zip(layer, ((2, 1, EVEN.head_width, 32), (2, 1, 32, EVEN.head_width)), strict=True):
      assert {shard.data.shape for shard in array.addressable_shards} == {shape}


def test_long_texts_do_not_idle_the_rows_beside_them(monkeypatch):
  lengths = np.random.default_rng(0).gamma(3.3, 18, 1_319).clip(8, 250).astype(int)  # as the answers of GSM8K

  def until_the_length_is_reached(*args, **_):
    index_B, num_B = args[1:3]
    return jnp.where(num_B + 1 >= jnp.array(lengths)[index_B], 1, 5).astype(jnp.int32)

  monkeypatch.setattr(decoding, "draw", until_the_length_is_reached)
  config = dataclasses.replace(EVEN, num_layers=1, max_positions=512)  # nothing compiled before is met again
  model = model_on(config=config, params=build.init(config, jax.random.key(0), "float32"))
  texts = model.generate(some_prompts([4] * len(lengths)), max_tokens=256, stop_ids=[1], batch_size=64)
  assert [len(text.tokens) for text in texts] == lengths.tolist()
  assert model.num_tokens == lengths.sum()
  assert model.num_tokens / model.row_steps >= 0.9


def test_a_mesh_that_does_not_divide_the_model_is_refused():
  with pytest.raises(InputError, match="the mesh does not divide the model: kv_heads=2 over tensor=4"):
    model_on(1, 4)

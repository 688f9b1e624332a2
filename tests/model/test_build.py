"""Models before the first step of a run: random weights, and rows added for new tokens."""

import dataclasses
import json

import datakit
import jax
import numpy as np
import pytest
import reference

from insec_jax.command import InputError
from insec_jax.config import MeshConfig
from insec_jax.model import build, hf, hf_writing, llama, markings, sharding
from insec_jax.model.hf_config import config_from_json

FIELDS = reference.FIELDS
CONFIG = config_from_json(FIELDS, "reference")
TENSORS = reference.random_tensors(FIELDS)


def test_added_tokens_get_the_mean_of_the_old_rows_and_the_old_logits_stay(tmp_path):
  params = hf.load(reference.write_folder(tmp_path, FIELDS, TENSORS), CONFIG)
  grown, config = build.grow_vocabulary(params, CONFIG, 128)
  assert config == dataclasses.replace(CONFIG, vocab_size=128)
  for ours, name in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
    np.testing.assert_array_equal(grown[ours][:80], TENSORS[name])
    np.testing.assert_allclose(grown[ours][80:], np.tile(TENSORS[name].mean(0), (48, 1)), rtol=0, atol=1e-6)
  hf_writing.save(tmp_path / "out", grown, config)
  assert hf.read_config(tmp_path / "out").vocab_size == 128


@pytest.mark.parametrize("size", [127, 0, 64])
def test_a_vocabulary_grows_to_a_multiple_of_128_and_never_shrinks(size):
  with pytest.raises(InputError, match=f"from 80 to {size} tokens; the new size must be a multiple of 128"):
    build.grow_vocabulary({}, CONFIG, size)


def test_random_weights_have_the_configs_deviation_and_are_the_same_on_any_mesh():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
  shardings = sharding.params_shardings(llama.shapes(CONFIG), mesh)
  with jax.set_mesh(mesh):
    spread = build.init(CONFIG, jax.random.key(0), "float32", shardings=shardings)
  one = build.init(CONFIG, jax.random.key(0), "float32")
  for (path, weight), other, where in zip(
    jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(spread), jax.tree.leaves(shardings), strict=True
  ):
    assert other.sharding == where
    np.testing.assert_array_equal(weight, other)
    if "norm" in str(path):
      np.testing.assert_array_equal(weight, 1)
    else:
      np.testing.assert_allclose(np.std(weight), CONFIG.init_std, rtol=0.05)
  layers = one["layers"]["attn"]["wq"]
  assert not np.array_equal(layers[0], layers[1])
  with pytest.raises(InputError, match="has no initializer_range"):
    build.init(dataclasses.replace(CONFIG, init_std=None), jax.random.key(0), "float32")


def test_a_size_takes_the_vocabulary_of_the_tokenizer_or_a_larger_one_of_its_own():
  size = {name: value for name, value in FIELDS.items() if name not in ("architectures", "vocab_size")}
  assert build.model_of_size(size, 90).vocab_size == 90
  assert build.model_of_size(size | {"vocab_size": None}, 90).vocab_size == 90
  assert build.model_of_size(size | {"vocab_size": 100}, 90).vocab_size == 100
  assert build.model_of_size(size | {"vocab_size": 80}, None).vocab_size == 80
  with pytest.raises(InputError, match=r"model\.size\.vocab_size=80 is below the 90 tokens"):
    build.model_of_size(size | {"vocab_size": 80}, 90)


@pytest.mark.parametrize("marked", [True, False, None])
def test_a_model_trained_with_rewind_is_not_trained_on_without_it(tmp_path, marked):
  reference.write_folder(tmp_path, FIELDS, TENSORS)
  rewinds, plain = (
    datakit.config(model__path=str(tmp_path), model__size=None, mistakes__rewind=on) for on in (True, False)
  )
  if marked is not None:
    marks = dataclasses.replace(rewinds, mistakes=dataclasses.replace(rewinds.mistakes, rewind=marked))
    (tmp_path / markings.MARKERS).write_text(json.dumps(markings.marked_as(marks, 7)))
  markings.check_rewind(tmp_path, rewinds)
  if not marked:
    markings.check_rewind(tmp_path, plain)
    return
  with pytest.raises(
    InputError, match=r"was trained with mistakes.rewind=True, .*; give --config.mistakes.rewind=True"
  ):
    build.starting_model(plain, None)

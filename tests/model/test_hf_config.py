"""config.json: every field is used, fixed, known not to matter, or refused by name."""

import dataclasses
import json
import pathlib
import re

import pytest
import reference

from insec_jax.command import InputError
from insec_jax.model.hf_config import FIXED, IRRELEVANT, config_from_json, config_to_json, readable_by_all
from insec_jax.model.rope import RopeScaling

PUBLISHED = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "llama_configs.json").read_text())
FIELDS = reference.FIELDS


def without(*keys, **changes):
  return {key: value for key, value in FIELDS.items() if key not in keys} | changes


def new_dialect(fields):
  """The same fields as transformers 5 writes them."""
  rope = {"rope_theta": fields["rope_theta"], **(fields["rope_scaling"] or {"rope_type": "default"})}
  kept = {key: value for key, value in fields.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
  return kept | {"rope_parameters": rope, "dtype": fields["torch_dtype"]}


def arithmetic(config):
  return {key: value for key, value in vars(config).items() if key != "source"}


def test_3_1_8b_is_read_as_published():
  config = config_from_json(PUBLISHED["Llama-3.1-8B-Instruct"]["config"], "8B")
  assert (config.width, config.mlp_width, config.num_layers, config.head_width) == (4096, 14336, 32, 128)
  assert (config.num_heads, config.num_kv_heads, config.vocab_size, config.tied) == (32, 8, 128_256, False)
  assert (config.norm_eps, config.rope_theta, config.max_positions) == (1e-5, 500_000.0, 131_072)
  assert config.rope_scaling == RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
  )
  assert (config.bos_id, config.eos_ids, config.pad_id) == (128_000, (128_001, 128_008, 128_009), None)
  assert config.stored_dtype == "bfloat16"


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_dialects_mean_the_same_model(name):
  fields = PUBLISHED[name]["config"]
  old, new = config_from_json(fields, "old"), config_from_json(new_dialect(fields), "new")
  assert arithmetic(old) == arithmetic(new)


def test_a_file_in_both_dialects_must_say_the_same_twice():
  both = FIELDS | {"rope_parameters": new_dialect(FIELDS)["rope_parameters"]}
  assert arithmetic(config_from_json(both, "both")) == arithmetic(config_from_json(FIELDS, "old"))
  with pytest.raises(InputError, match="contradict each other"):
    config_from_json(both | {"rope_scaling": FIELDS["rope_scaling"] | {"factor": 4.0}}, "both")
  with pytest.raises(InputError, match=r"rope_theta is given as 10000.0 and 20000.0"):
    config_from_json(both | {"rope_theta": 20000.0}, "both")


@pytest.mark.parametrize(
  "fields",
  [
    FIELDS,
    new_dialect(FIELDS),
    without(rope_scaling=None),
    without("head_dim"),
    without("torch_dtype", eos_token_id=5),
  ],
  ids=["old", "new", "default rope", "no head_dim", "no dtype"],
)
def test_what_was_read_is_written_field_by_field_in_its_order(fields):
  written = config_to_json(config_from_json(fields, "read"))
  assert json.dumps(written) == json.dumps(fields)


@pytest.mark.parametrize("fields", [FIELDS, new_dialect(FIELDS)], ids=["old", "new"])
def test_only_what_changed_since_is_written_anew(fields):
  config = config_from_json(fields, "read")
  grown = dataclasses.replace(config, vocab_size=128, eos_ids=(4,), stored_dtype="bfloat16")
  dtype_key = "dtype" if "dtype" in fields else "torch_dtype"
  assert config_to_json(grown) == fields | {"vocab_size": 128, "eos_token_id": 4, dtype_key: "bfloat16"}
  turned = dataclasses.replace(config, rope_theta=700.0, rope_scaling=None)
  assert arithmetic(config_from_json(config_to_json(turned), "again")) == arithmetic(turned)
  assert "rope_parameters" not in config_to_json(turned)


def test_a_config_without_a_source_is_written_so_that_every_reader_understands_it():
  config = dataclasses.replace(config_from_json(FIELDS, "read"), source="")
  written = config_to_json(config)
  assert {"rope_theta", "rope_scaling", "torch_dtype", "architectures", "model_type"} <= set(written)
  assert arithmetic(config_from_json(written, "again")) == arithmetic(config)


REFUSED = {
  "attention_bias": True,
  "mlp_bias": True,
  "hidden_act": "gelu",
  "model_type": "mistral",
  "sliding_window": 4096,
  "architectures": ["LlamaForSequenceClassification"],
  "attention_dropout": 0.1,
  "partial_rotary_factor": 0.5,
  "rope_interleaved": True,
  "use_sliding_window": True,
  "quantization_config": {"bits": 4},
  "is_encoder_decoder": True,
  "add_cross_attention": True,
  "cross_attention_hidden_size": 64,
  "tie_encoder_decoder": True,
  "pruned_heads": {"0": [1]},
  "chunk_size_feed_forward": 4,
  "num_experts": 8,
  "layer_types": ["sliding_attention"],
  "attn_logit_softcapping": 30.0,
  "qk_norm": True,
}


@pytest.mark.parametrize("key", REFUSED)
def test_other_arithmetic_is_refused_by_name(key):
  message = f"somewhere: {key}={REFUSED[key]!r}: this model does not compute that"
  with pytest.raises(InputError, match=re.escape(message)):
    config_from_json(FIELDS | {key: REFUSED[key]}, "somewhere")


def test_every_fixed_field_has_a_refused_value_tested():
  assert set(FIXED) <= set(REFUSED)


def test_all_refused_fields_are_named_at_once():
  with pytest.raises(InputError, match=r"attention_bias=True, num_experts=8"):
    config_from_json(FIELDS | {"attention_bias": True, "num_experts": 8}, "somewhere")


@pytest.mark.parametrize("key", sorted(IRRELEVANT))
def test_a_field_known_not_to_matter_changes_nothing(key):
  assert arithmetic(config_from_json(FIELDS | {key: "anything"}, "x")) == arithmetic(config_from_json(FIELDS, "x"))


OPTIONAL = {
  "architectures",
  "attention_bias",
  "attention_dropout",
  "bos_token_id",
  "eos_token_id",
  "head_dim",
  "initializer_range",
  "mlp_bias",
  "rope_scaling",
  "torch_dtype",
  "use_cache",
}


@pytest.mark.parametrize("key", FIELDS)
def test_a_needed_field_has_no_default(key):
  if key in OPTIONAL:
    config_from_json(without(key), "x")
  else:
    with pytest.raises(InputError, match=f"x.*{key}"):
      config_from_json(without(key), "x")


BAD = {
  "vocab_size": [0, -1, 1.5, True, "80", None],
  "rms_norm_eps": [0, float("inf"), "1e-5"],
  "rope_theta": [0.0, None],
  "tie_word_embeddings": [None, "true", 1],
  "torch_dtype": ["float64", "auto"],
  "head_dim": [0, 23],
  "num_key_value_heads": [3],
  "eos_token_id": ["</s>", [1, None]],
  "bos_token_id": [[1, 2], 1.0],
  "initializer_range": [0, -0.02],
  "rope_scaling": [
    {"rope_type": "yarn", "factor": 2.0},
    {"factor": 2.0},
    8.0,
    {"rope_type": "llama3", "factor": 8.0},
    FIELDS["rope_scaling"] | {"beta_fast": 32},
    FIELDS["rope_scaling"] | {"high_freq_factor": 1.0},
    FIELDS["rope_scaling"] | {"factor": 0},
    FIELDS["rope_scaling"] | {"type": "linear"},
  ],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_value_is_one_line_that_names_the_field(key, value):
  with pytest.raises(InputError) as error:
    config_from_json(FIELDS | {key: value}, "x")
  assert key.removeprefix("torch_") in str(error.value)
  assert "\n" not in str(error.value)


def test_head_dim_may_follow_from_the_width_only_when_it_divides():
  assert config_from_json(without("head_dim"), "x").head_width == 16
  with pytest.raises(InputError, match="hidden_size=66 is no multiple of num_attention_heads=4; give head_dim"):
    config_from_json(without("head_dim", hidden_size=66), "x")


def test_a_file_of_the_newer_dialect_is_exported_in_both():
  fields = new_dialect(FIELDS)
  config = config_from_json(fields, "newer")
  written = readable_by_all(config_to_json(config), config)
  assert {key: written[key] for key in fields} == fields
  old = {key: value for key, value in written.items() if key != "rope_parameters"}
  for again in (config_from_json(written, "both"), config_from_json(old, "older")):
    assert (again.rope_theta, again.rope_scaling) == (config.rope_theta, config.rope_scaling)
  assert readable_by_all(FIELDS, config) == FIELDS


@pytest.mark.parametrize(
  "changes",
  [
    {"num_hidden_layers": 10**9},
    {"vocab_size": 10**12},
    {"hidden_size": 10**12},
    {"num_attention_heads": 10**12},
    {"num_hidden_layers": 10_001},
    {"hidden_size": 2**30, "intermediate_size": 2**30},
  ],
  ids=str,
)
def test_sizes_that_no_model_has_are_refused_by_their_number(changes):
  with pytest.raises(InputError, match=r"here(: .* at most 2,147,483,647| describes .* can be meant)"):
    config_from_json(FIELDS | changes, "here")


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_a_token_id_outside_the_vocabulary_is_refused(key):
  with pytest.raises(InputError, match=rf"here: {key} names token 80, and ids go from 0 to 79"):
    config_from_json(FIELDS | {key: 80}, "here")


@pytest.mark.parametrize("key", FIELDS)
@pytest.mark.parametrize(
  "value",
  [[], {}, [[]], {"a": {}}, "", True, -1, 1e300, 10**400, "x" * 10_000, [1] * 10_000],
  ids=lambda value: repr(value)[:20],
)
def test_no_value_of_any_field_raises_anything_but_one_short_line(key, value):
  said = ""
  try:
    config_from_json(FIELDS | {key: value}, "here")
  except InputError as error:
    said = str(error)
  assert len(said) < 400

"""config.json of a Llama, read and written: every field is used, fixed, known to be irrelevant, or refused by name.

Two dialects are read: transformers 5 writes `rope_parameters` and `dtype`, older files have `rope_theta`,
`rope_scaling` and `torch_dtype`. A config without a source is written in the older one, which both versions read:
transformers 4 silently ignores `rope_parameters` and uses theta 10,000.
"""

import json
from typing import Any

from insec_jax.command import InputError
from insec_jax.model.llama import LlamaConfig
from insec_jax.model.rope import RopeScaling
from insec_jax.model.safetensors_io import some_of

DTYPES = ("float32", "bfloat16", "float16")

# LlamaConfig's field -> the key of config.json.
KEYS = {
  "vocab_size": "vocab_size",
  "width": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "mlp_width": "intermediate_size",
  "norm_eps": "rms_norm_eps",
  "tied": "tie_word_embeddings",
  "max_positions": "max_position_embeddings",
}
OPTIONAL = {
  "head_width": "head_dim",
  "init_std": "initializer_range",
  "bos_id": "bos_token_id",
  "eos_ids": "eos_token_id",
  "pad_id": "pad_token_id",
}
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
STORED_DTYPE = ("dtype", "torch_dtype")
SCALING = {
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "original_max_positions": "original_max_position_embeddings",
}

# Fields that change the arithmetic unless absent or equal to one of these values, which all mean the same.
FIXED = {
  "model_type": ("llama",),
  "architectures": (["LlamaForCausalLM"], None),
  "hidden_act": ("silu",),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "attention_dropout": (0, None),
  "partial_rotary_factor": (1, None),
  "rope_interleaved": (False,),
  "sliding_window": (None,),
  "use_sliding_window": (False, None),
  "quantization_config": (None,),
  "is_encoder_decoder": (False,),
  "add_cross_attention": (False,),
  "cross_attention_hidden_size": (None,),
  "tie_encoder_decoder": (False,),
  "pruned_heads": ({}, None),
  "chunk_size_feed_forward": (0,),
}
NEEDED = ("model_type", "hidden_act")  # fields of FIXED that must be present

# Limits beyond which a config must be a mistake.
MOST_LAYERS, MOST_PARAMS, MOST_SIZE = 10_000, 10**13, 2**31 - 1
MOST_NAMED = 5  # fields listed in one error

# Fields that no weight and no logit depends on.
IRRELEVANT = frozenset(
  (
    # how transformers runs the model
    "use_cache",
    "pretraining_tp",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "torchscript",
    "use_bfloat16",
    "tf_legacy_loss",
    "is_decoder",
    "_attn_implementation_autoset",
    "attn_implementation",
    # where the file comes from
    "transformers_version",
    "_name_or_path",
    "_model_name_or_path",
    "name_or_path",
    "_commit_hash",
    "_from_model_config",
    "is_llama_config",
    "transformers.js_config",
    "unsloth_version",
    "unsloth_fixed",
    # other tasks than the next token, and ids that belong to the tokenizer
    "finetuning_task",
    "id2label",
    "label2id",
    "problem_type",
    "task_specific_params",
    "tokenizer_class",
    "prefix",
    "sep_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    # sampling settings, now in generation_config.json
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "num_return_sequences",
    "output_scores",
    "return_dict_in_generate",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
  )
)
KNOWN = {*KEYS.values(), *OPTIONAL.values(), *ROPE, *STORED_DTYPE, *FIXED, *IRRELEVANT}


def config_from_json(fields: dict[str, Any], where: str) -> LlamaConfig:
  """Return the model that the fields of a config.json describe; `where` names the file in errors.

  Only these may be absent: head_dim (then hidden_size / num_attention_heads, as in HF), initializer_range, token ids,
  dtype, and fields that a plain Llama lacks. Raises InputError for a field that is missing, wrong or not understood.
  """
  if refused := [
    f"{key:.60}={value!r:.60}"
    for key, value in fields.items()
    if key not in KNOWN or (key in FIXED and not _equals_any(value, FIXED[key]))
  ]:
    raise InputError(
      f"{where}: {some_of(refused, MOST_NAMED)}: this model does not compute that; only plain Llama 3 "
      "architectures can be used"
    )
  if missing := [key for key in (*NEEDED, *KEYS.values()) if key not in fields]:
    raise InputError(f"{where} misses {', '.join(missing)}; give every field of an HF Llama config.json")
  tied = fields["tie_word_embeddings"]
  if not isinstance(tied, bool):
    raise InputError(f"{where}: tie_word_embeddings={tied!r:.60}; must be true or false")
  values = {field: _number(fields, key, where, int) for field, key in KEYS.items() if field not in ("tied", "norm_eps")}
  theta, scaling = _rope(fields, where)
  no_init = _present(fields, "initializer_range") is None
  vocab_size = values["vocab_size"]
  config = LlamaConfig(
    **values,
    tied=tied,
    norm_eps=_number(fields, "rms_norm_eps", where, float, above=1e-12, most=0.1),
    head_width=_head_width(fields, values, where),
    rope_theta=theta,
    rope_scaling=scaling,
    init_std=None if no_init else _number(fields, "initializer_range", where, float, most=10),
    bos_id=_token_id(fields, "bos_token_id", where, vocab_size),
    pad_id=_token_id(fields, "pad_token_id", where, vocab_size),
    eos_ids=token_ids(fields, "eos_token_id", where, vocab_size),
    stored_dtype=_stored_dtype(fields, where),
    source=json.dumps(fields),
  )
  _check_size(config, where)
  return config


def _check_size(config: LlamaConfig, where: str) -> None:
  """Raise InputError for a model beyond the limits above, before anything is allocated or enumerated."""
  attention = 2 * config.width * config.head_width * (config.num_heads + config.num_kv_heads)
  layer = attention + 3 * config.width * config.mlp_width + 2 * config.width
  num_params = config.num_layers * layer + (2 - config.tied) * config.vocab_size * config.width + config.width
  if config.num_layers > MOST_LAYERS or num_params > MOST_PARAMS:
    raise InputError(
      f"{where} describes {config.num_layers:,} layers with {num_params:,} parameters; at most "
      f"{MOST_LAYERS:,} and {MOST_PARAMS:,} can be meant: correct its sizes"
    )


def _equals_any(value, allowed: tuple) -> bool:
  """Return whether the value is one of these; a bool does not equal a number."""
  return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed)


def config_to_json(config: LlamaConfig) -> dict[str, Any]:
  """Return the fields of config.json: those that were read, in their order, with later changes applied."""
  if not config.source:
    return _new_fields(config)
  fields = json.loads(config.source)
  before = config_from_json(fields, "the config.json read before")
  for field, key in (KEYS | OPTIONAL).items():
    if getattr(config, field) != getattr(before, field):
      fields[key] = _written(config, field)
  if (config.rope_theta, config.rope_scaling) != (before.rope_theta, before.rope_scaling):
    fields = {key: value for key, value in fields.items() if key not in ROPE} | _rope_fields(config)
  if config.stored_dtype != before.stored_dtype:
    keys = [key for key in STORED_DTYPE if key in fields] or ["torch_dtype"]
    fields |= dict.fromkeys(keys, config.stored_dtype)
  return fields


def readable_by_all(fields: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
  """Return the fields of config.json with the rotary base in the older dialect too, where only the newer one has it.

  transformers 4 silently ignores `rope_parameters`.
  """
  return fields if "rope_theta" in fields else fields | _rope_fields(config)


def _new_fields(config: LlamaConfig) -> dict[str, Any]:
  fields = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
  }
  fields |= {
    key: _written(config, field) for field, key in (KEYS | OPTIONAL).items() if _written(config, field) is not None
  }
  return fields | _rope_fields(config) | ({} if config.stored_dtype is None else {"torch_dtype": config.stored_dtype})


def _written(config: LlamaConfig, field: str):
  value = getattr(config, field)
  if field != "eos_ids":
    return value
  return value[0] if len(value) == 1 else list(value) or None


def _rope_fields(config: LlamaConfig) -> dict[str, Any]:
  scaling = config.rope_scaling
  return {
    "rope_theta": config.rope_theta,
    "rope_scaling": None
    if scaling is None
    else {"rope_type": "llama3", **{key: getattr(scaling, field) for field, key in SCALING.items()}},
  }


def _present(fields: dict[str, Any], key: str):
  """Return the value; None when absent, for fields where null has the same meaning."""
  return fields.get(key)


def _number(fields: dict[str, Any], key: str, where: str, kind: type, *, above: float = 0, most: float = MOST_SIZE):
  """Return the field as `kind`; InputError unless it is a number of that kind, above `above` and at most `most`."""
  value = fields[key]
  if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float) or not above < value <= most:
    noun = "whole number" if kind is int else "number"
    raise InputError(f"{where}: {key}={value!r:.60}; must be a {noun} above {above:g} and at most {most:,}")
  return kind(value)


def token_ids(fields: dict[str, Any], key: str, where: str, vocab_size: int) -> tuple[int, ...]:
  """Return the ids of a field that is null, one id or a list of ids; InputError for anything else."""
  value = _present(fields, key)
  ids = [] if value is None else value if isinstance(value, list) else [value]
  if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
    raise InputError(f"{where}: {key}={value!r:.60}; must be a token id, a list of them, or null")
  if outside := [number for number in ids if not 0 <= number < vocab_size]:
    raise InputError(f"{where}: {key} names token {outside[0]!r:.30}, and ids go from 0 to {vocab_size - 1}")
  return tuple(dict.fromkeys(ids))


def _token_id(fields: dict[str, Any], key: str, where: str, vocab_size: int) -> int | None:
  if _present(fields, key) == -1 and key == "pad_token_id":
    return None  # as the first Llama wrote that there is none
  ids = token_ids(fields, key, where, vocab_size)
  if len(ids) > 1:
    raise InputError(f"{where}: {key}={list(ids)!r:.60}; must be one token id, or null")
  return ids[0] if ids else None


def _head_width(fields: dict[str, Any], values: dict[str, int], where: str) -> int:
  if _present(fields, "head_dim") is not None:
    return _number(fields, "head_dim", where, int)
  if values["width"] % values["num_heads"]:
    raise InputError(
      f"{where}: hidden_size={values['width']} is no multiple of "
      f"num_attention_heads={values['num_heads']}; give head_dim"
    )
  return values["width"] // values["num_heads"]


def _stored_dtype(fields: dict[str, Any], where: str) -> str | None:
  given = [fields[key] for key in STORED_DTYPE if _present(fields, key) is not None]
  if any(value != given[0] or value not in DTYPES for value in given):
    raise InputError(
      f"{where}: dtype {' and '.join(f'{value!r:.60}' for value in given)}; must be one of {', '.join(DTYPES)}"
    )
  return given[0] if given else None


def _rope(fields: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
  """Return (theta, scaling) from either dialect; InputError if both are present and differ."""
  readings = []
  if _present(fields, "rope_parameters") is not None:
    readings.append(_rope_entry(fields["rope_parameters"], fields, f"{where}: rope_parameters"))
  if _present(fields, "rope_scaling") is not None or not readings:
    scaling = _present(fields, "rope_scaling")
    readings.append(
      _rope_entry({"rope_type": "default"} if scaling is None else scaling, fields, f"{where}: rope_scaling")
    )
  if len(set(readings)) > 1:
    raise InputError(f"{where}: rope_parameters and rope_scaling contradict each other; keep one")
  return readings[0]


def _rope_entry(entry: dict[str, Any], fields: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
  if not isinstance(entry, dict):
    raise InputError(f"{where}={entry!r:.60}; must be an object with rope_type")
  thetas = [holder["rope_theta"] for holder in (entry, fields) if "rope_theta" in holder]
  if not thetas or thetas[0] != thetas[-1]:
    seen = f"is given as {' and '.join(f'{theta!r:.60}' for theta in thetas)}" if thetas else "is missing"
    raise InputError(f"{where}: rope_theta {seen}; write once the base of the rotary positions, such as 500000.0")
  # In float32 the angles of a larger base are not finite.
  theta = _number({"rope_theta": thetas[0]}, "rope_theta", where, float, above=10, most=1e11)
  kinds = [entry[key] for key in ("rope_type", "type") if key in entry]  # "type" before transformers 4.45
  if not kinds or any(kind not in ("default", "llama3") or kind != kinds[0] for kind in kinds):
    raise InputError(
      f"{where}: rope_type {' and '.join(f'{kind!r:.60}' for kind in kinds) or 'is missing'}; "
      "'default' and 'llama3' are understood"
    )
  kind = kinds[0]
  needed = set(SCALING.values()) if kind == "llama3" else set()
  given = set(entry) - {"rope_type", "type", "rope_theta"}
  if given != needed:
    raise InputError(
      f"{where}: rope_type {kind!r} takes {', '.join(sorted(needed)) or 'no other field'}, "
      f"got {', '.join(sorted(given))[:200] or 'none'}"
    )
  if kind == "default":
    return theta, None
  scaling = RopeScaling(
    **{
      field: _number(entry, key, where, int if field == "original_max_positions" else float)
      for field, key in SCALING.items()
    }
  )
  if scaling.factor < 1:
    raise InputError(f"{where}: factor={scaling.factor}; must be at least 1")
  if scaling.high_freq_factor <= scaling.low_freq_factor:
    raise InputError(
      f"{where}: high_freq_factor={scaling.high_freq_factor} must be above low_freq_factor={scaling.low_freq_factor}"
    )
  return theta, scaling

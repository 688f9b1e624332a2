"""Damaged HF folders: each is refused in one line with exit code 2, or gives the numbers of the undamaged folder.

  pytest -m faults tests/faults/test_hf_folders.py          python tests/faults/test_hf_folders.py prints the table

The numbers are the model's config as far as logits depend on it, every weight, the tokens of a prompt with both
templates, the text of these tokens, and the tokens that end a text. A template that is damaged may be refused by those
who use it alone. Values that a sound folder could have as well (another rope_theta, a token less) are no damage that a
program can see, and are not tried.
"""

import copy
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

pytestmark = pytest.mark.faults
ROOT = pathlib.Path(__file__).parents[2]
SECONDS, SERVERS = 20, 2  # of CPU time; ten times as many by the clock
FIELDS = {
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "eos_token_id": 1,
  "hidden_act": "silu",
  "hidden_size": 32,
  "initializer_range": 0.02,
  "intermediate_size": 64,
  "max_position_embeddings": 512,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
  "num_key_value_heads": 2,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "rope_theta": 500000.0,
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
  "use_cache": True,
  "vocab_size": 384,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 128,
}
SPECIALS = [
  f"<|{name}|>"
  for name in (
    "begin_of_text",
    "end_of_text",
    "start_header_id",
    "end_header_id",
    "eot_id",
    "eom_id",
    "finetune_right_pad_id",
  )
]
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
  "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
WRONG = {
  "a word": "x",
  "an empty word": "",
  "a list": [],
  "an object": {},
  "a truth value": True,
  "minus one": -1,
  "1e300": 1e300,
  "1e12": 10**12,
  "1.5": 1.5,
  "nested": [[{}]],
  "10^400": 10**400,
  "many": ["x"] * 10_000,
}

# Runs each case in a fork of a process that has imported what is slow; no device is touched before the fork.
SERVER = """
import gc, hashlib, json, os, resource, signal, sys, time
import jax, flax.linen, optax, orbax.checkpoint, transformers
import numpy as np
from insec_jax import command
from insec_jax.generation.loading import load_model
from insec_jax.generation.generator import TextGenerator
SECONDS = %d

def numbers(folder):
  opened = load_model(folder)
  writer = TextGenerator(opened)
  config = {name: repr(value) for name, value in vars(opened.config).items()
            if name not in ("source", "stored_dtype", "eos_ids", "bos_id", "pad_id", "init_std")}
  digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(opened.params))).hexdigest()
  plain = writer.encode("What is 2+3?").tolist()
  writer.template = "chat"
  try:
    chat = writer.encode("What is 2+3?").tolist()
  except command.InputError as error:
    chat = "refused: " + str(error)[:300]
  return [config, digest, writer.stop_ids, plain, writer.decode(plain), chat]

gc.freeze()
for folder, out in json.load(sys.stdin):
  start = time.time()
  if not (child := os.fork()):
    file = os.open(out, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 2)
    sys.argv = ["numbers"]
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    os.dup2(os.open(out + ".json", os.O_CREAT | os.O_WRONLY), 1)
    try:
      command.run(lambda: print(json.dumps(numbers(folder))))
    except SystemExit as stop:
      sys.stdout.flush()
      os._exit(stop.code)  # without taking apart all that was imported
  ended = 0
  while not ended and time.time() < start + 10 * SECONDS:
    time.sleep(0.01)
    ended, status = os.waitpid(child, os.WNOHANG)
  if not ended:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
  print(json.dumps([os.waitstatus_to_exitcode(status) if ended else "hang", time.time() - start]), flush=True)
"""


def write_json(path, value):
  path.write_text(json.dumps(value), encoding="utf-8")


def lay_out(folder):
  """Write the undamaged folder."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)

  def normal(*shape):
    return (rng.standard_normal(shape) * 0.3).astype(np.float32)

  width, hidden, vocab = FIELDS["hidden_size"], FIELDS["intermediate_size"], FIELDS["vocab_size"]
  tensors = {
    "model.embed_tokens.weight": normal(vocab, width),
    "model.norm.weight": np.ones(width, np.float32),
    "lm_head.weight": normal(vocab, width),
  }
  for layer in range(FIELDS["num_hidden_layers"]):
    begin = f"model.layers.{layer}."
    for name in ("input_layernorm", "post_attention_layernorm"):
      tensors[f"{begin}{name}.weight"] = np.ones(width, np.float32)
    for name, shape in dict(q=(width, width), k=(width // 2, width), v=(width // 2, width), o=(width, width)).items():
      tensors[f"{begin}self_attn.{name}_proj.weight"] = normal(*shape)
    for name, shape in dict(gate=(hidden, width), up=(hidden, width), down=(width, hidden)).items():
      tensors[f"{begin}mlp.{name}_proj.weight"] = normal(*shape)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  write_json(folder / "config.json", FIELDS)
  write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [1, 4, 5], "temperature": 0.6})
  vocabulary = {word: number for number, word in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
  backend = Tokenizer(models.BPE(vocabulary, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
  backend.post_processor = processors.TemplateProcessing(
    single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
  )
  backend.save(str(folder / "tokenizer.json"))
  added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
  write_json(
    folder / "tokenizer_config.json",
    {
      "added_tokens_decoder": {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
      },
      "bos_token": "<|begin_of_text|>",
      "eos_token": "<|eot_id|>",
      "chat_template": TEMPLATE,
      "clean_up_tokenization_spaces": True,
      "model_max_length": 512,
      "tokenizer_class": "PreTrainedTokenizerFast",
    },
  )
  write_json(folder / "special_tokens_map.json", {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})


def changed(file, *path, value=None, drop=False):
  """A damage: the value at a path of a JSON file is another, or gone."""

  def damage(folder):
    fields = json.loads((folder / file).read_text())
    place = fields
    for key in path[:-1]:
      place = place[key]
    if drop:
      del place[path[-1]]
    else:
      place[path[-1]] = copy.deepcopy(value)
    write_json(folder / file, fields)

  return damage


def replaced(file, content):
  """A damage: other bytes, which may be made from those there."""

  def damage(folder):
    before = (folder / file).read_bytes()
    (folder / file).write_bytes(content(before) if callable(content) else content)

  return damage


def other_kind(file, kind):
  """A damage: something else than a file."""

  def damage(folder):
    path = folder / file
    path.unlink(missing_ok=True)
    if kind == "FIFO":
      os.mkfifo(path)
    elif kind == "folder":
      path.mkdir()
    elif kind != "missing":
      path.symlink_to(kind)

  return damage


def header(change):
  """A damage: safetensors with another header, which `change` makes of the old one and the data."""

  def damage(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    made = change(json.loads(content[8 : 8 + length]))
    text = made if isinstance(made, bytes) else json.dumps(made).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

  return damage


def tensors(change):
  """A damage: other tensors in a sound file."""

  def damage(folder):
    path = folder / "model.safetensors"
    loaded = {name: np.array(tensor) for name, tensor in safetensors.numpy.load_file(path).items()}
    change(loaded)
    safetensors.numpy.save_file(loaded, path, metadata={"format": "pt"})

  return damage


def with_index(change):
  """A damage: weights in two files with an index, which `change` alters."""

  def damage(folder):
    loaded = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(loaded)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, of_file in files.items():
      safetensors.numpy.save_file({name: loaded[name] for name in of_file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, of_file in files.items() for name in of_file}}
    made = change(index, folder)
    write_json(folder / "model.safetensors.index.json", index if made is None else made)

  return damage


def of_any_file(file, *, needed):
  """What can happen to any JSON file; one that is not needed may be missing."""
  yield "empty", replaced(file, b"")
  for name, content in {
    "a brace": b"{",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "a word": b'"x"',
    "NaN": b'{"x": NaN}',
    "deep": b'{"x": ' + b"[" * 100_000,
    "UTF-16": '{"x": 1}'.encode("utf-16"),
    "Latin-1": b'{"x": "\xe9"}',
    "zeros": bytes(1000),
    "a key twice": b'{"x": 1, "x": 2}',
    "4,301 digits": b'{"x": ' + b"1" * 4301 + b"}",
    "1e400": b'{"x": 1e400}',
  }.items():
    yield name, replaced(file, content)
  for part in (0.1, 0.5, 0.99):
    yield f"cut at {part}", replaced(file, lambda content, part=part: content[: int(len(content) * part)])
  for kind in ("FIFO", "folder", "/dev/zero", "/nowhere", *["missing"] * needed):
    yield kind, other_kind(file, kind)


def config_damages():
  for key in FIELDS:
    for name, value in WRONG.items():
      if (key, name) not in (("num_hidden_layers", "a truth value"),):
        yield f"{key}: {name}", changed("config.json", key, value=value)
  for key, values in {
    "num_hidden_layers": (1, 3, 10**9),
    "vocab_size": (1, 383, 385),
    "hidden_size": (16, 33, 64),
    "num_attention_heads": (1, 2, 3, 8),
    "num_key_value_heads": (1, 3, 4, 8),
    "eos_token_id": (384, 10**9),
    "intermediate_size": (63, 128),
    "head_dim": (0, 7, 16, "8", None),
    "rope_theta": (0, -1.0, 0.5),
    "quantization_config": ({"bits": 4},),
    "model_type": ("mistral", "llama4"),
    "unknown": (1,),
  }.items():
    for value in values:
      yield f"{key}: {value}", changed("config.json", key, value=value)
  for key in ("rope_type", *LLAMA3):
    yield (
      f"rope_scaling without {key}",
      changed("config.json", "rope_scaling", value={name: LLAMA3[name] for name in LLAMA3 if name != key}),
    )
    for value in ("x", [], {}, True, -1, None, 10**12):
      yield f"rope_scaling.{key}: {value}", changed("config.json", "rope_scaling", value=LLAMA3 | {key: value})
  yield "rope_scaling: yarn", changed("config.json", "rope_scaling", value={"rope_type": "yarn", "factor": 4.0})
  yield "rope_scaling: two types", changed("config.json", "rope_scaling", value=LLAMA3 | {"type": "default"})
  yield (
    "rope_parameters: another",
    changed("config.json", "rope_parameters", value={"rope_type": "default", "rope_theta": 1.0}),
  )
  yield (
    "10,000 unknown keys",
    changed("config.json", "x", value={})
    if False
    else replaced(
      "config.json", lambda content: json.dumps(json.loads(content) | {f"key{n}": n for n in range(10_000)}).encode()
    ),
  )
  yield from of_any_file("config.json", needed=True)


def generation_damages():
  for name, value in (
    WRONG | {"384": 384, "out of range in a list": [1, 4, 5, 10**9], "null in a list": [1, None]}
  ).items():
    yield f"eos_token_id: {name}", changed("generation_config.json", "eos_token_id", value=value)
  yield from of_any_file("generation_config.json", needed=False)


def weight_damages(names):
  def entry(name, **changes):
    return header(lambda fields: fields | {name: fields[name] | changes})

  embed, query = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
  for part in (0, 4, 8, 9, 100, 1000, 5000, -1, -100):
    yield f"cut at {part}", replaced("model.safetensors", lambda content, part=part: content[:part])
  yield "more bytes", replaced("model.safetensors", lambda content: content + b"\0")
  for size in (10**8, 2**63, 2**64 - 1, 10**6):
    yield (
      f"a header of {size}",
      replaced("model.safetensors", lambda content, size=size: size.to_bytes(8, "little") + content[8:]),
    )
  for name, text in {
    "deep": b"[" * 100_000,
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "NaN": b'{"x": NaN}',
    "empty": b"",
    "an empty object": b"{}",
    "zeros": bytes(100),
  }.items():
    yield f"header {name}", header(lambda _, text=text: text)
  for shape in (
    [-384, -32],
    [384.0, 32],
    [True, 12288],
    ["384", 32],
    "384",
    None,
    {},
    [384, 32, 10**30, 0],
    [10**30],
    [32, 384],
    [12288],
    [[384, 32]],
    [1] * 70,
    [384, 32, 1],
    [],
    [0, 10**12],
  ):
    yield f"shape {str(shape)[:30]}", entry(embed, shape=shape)
  for offsets in (
    [-1, 1],
    [0, -1],
    [0, 10**18],
    [10**18, 0],
    [0.0, 1.0],
    ["0", "1"],
    [],
    [0],
    [0, 1, 2],
    None,
    {},
    [False, True],
    [0, 0],
  ):
    yield f"offsets {offsets}", entry(query, data_offsets=offsets)
  for dtype in ("I32", "F64", "BOOL", "F8_E4M3", "F16", "BF16", "f32", 5, None, [], {}):
    yield f"dtype {dtype}", entry(query, dtype=dtype)
  yield "entry of nothing", header(lambda fields: fields | {query: {}})
  yield "entry null", header(lambda fields: fields | {query: None})
  yield "another key", entry(query, more=1)
  yield (
    "100,000 names",
    header(
      lambda fields: fields | {f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
    ),
  )
  for name in names:
    yield f"without {name}", tensors(lambda loaded, name=name: loaded.pop(name))
    yield f"{name} renamed", tensors(lambda loaded, name=name: loaded.update({name + "x": loaded.pop(name)}))
    yield (
      f"{name} larger",
      tensors(lambda loaded, name=name: loaded.update({name: np.concatenate([loaded[name], loaded[name][:1]])})),
    )
    for value in (np.nan, np.inf):

      def spoil(loaded, name=name, value=value):
        loaded[name].flat[loaded[name].size // 2] = value

      yield f"{name} holds {value}", tensors(spoil)
  yield "float64", tensors(lambda loaded: loaded.update({query: loaded[query].astype(np.float64)}))
  yield "two dtypes", tensors(lambda loaded: loaded.update({query: loaded[query].astype(np.float16)}))
  for kind in ("FIFO", "folder", "/dev/zero", "/nowhere", "missing"):
    yield kind, other_kind("model.safetensors", kind)


def index_damages():
  first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

  def named(file):
    def change(index, _):
      index["weight_map"]["lm_head.weight"] = file

    return change

  for file in (
    "../model.safetensors",
    "/etc/passwd",
    "../../etc/passwd",
    "..",
    ".",
    "",
    "x" * 5000,
    "a/b.safetensors",
    5,
    None,
    [],
    {},
    second + "\0",
    "\ud800.safetensors",
    "config.json",
    "nowhere.safetensors",
  ):
    yield f"names {str(file)[:30]!r}", with_index(named(file))
  for value in ({}, [], None, "x", 5, {"x": {}}):
    yield f"weight_map {value}", with_index(lambda index, _, value=value: index.update(weight_map=value))
  yield "no weight_map", with_index(lambda index, _: index.pop("weight_map") and None)
  yield "a list", with_index(lambda index, _: [index])
  yield "one name more", with_index(lambda index, _: index["weight_map"].update(x=first))
  yield "one name less", with_index(lambda index, _: index["weight_map"].pop("lm_head.weight") and None)
  yield (
    "100,000 names",
    with_index(lambda index, _: index["weight_map"].update({f"x{n}": first for n in range(100_000)})),
  )
  yield (
    "100,000 files",
    with_index(lambda index, _: index["weight_map"].update({f"x{n}": f"{n}.safetensors" for n in range(100_000)})),
  )
  for kind in ("FIFO", "folder", "missing", "/dev/zero"):
    yield f"a file is {kind}", with_index(lambda _, folder, kind=kind: other_kind(first, kind)(folder))
  yield "both", with_index(lambda _, folder: shutil.copyfile(folder / first, folder / "model.safetensors") and None)
  yield "a file twice", with_index(lambda _, folder: shutil.copyfile(folder / first, folder / second) and None)


def tokenizer_damages():
  file = "tokenizer.json"
  for key in (
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
  ):
    for name, value in (WRONG | {"an unknown type": {"type": "Nope"}}).items():
      if (key, name) not in (("added_tokens", "a list"),):  # as sound as a tokenizer without special tokens
        yield f"{key}: {name}", changed(file, key, value=value)
  for key in ("id", "content", "special", "lstrip", "rstrip", "normalized", "single_word"):
    for name, value in WRONG.items():
      if (key, name) not in [
        (flag, "a truth value") for flag in ("special", "lstrip", "rstrip", "normalized", "single_word")
      ] + [("content", "a word")]:
        yield f"added token's {key}: {name}", changed(file, "added_tokens", 4, key, value=value)
    yield f"added token without {key}", changed(file, "added_tokens", 4, key, drop=True)
  yield "an added token's other id", changed(file, "added_tokens", 4, "id", value=300)
  yield "an id twice", changed(file, "added_tokens", 4, "id", value=3)
  for key in ("type", "vocab", "merges", "dropout", "unk_token", "byte_fallback", "fuse_unk"):
    for name, value in WRONG.items():
      if (key, name) not in (
        ("merges", "a list"),
        ("byte_fallback", "a truth value"),
        ("fuse_unk", "a truth value"),
        ("dropout", "minus one"),
        ("unk_token", "a word"),
        ("unk_token", "an empty word"),
      ):
        yield f"model.{key}: {name}", changed(file, "model", key, value=value)
  for value in (-1, 1.5, "5", None, 10**10, 5, True):
    yield f"an id of the vocabulary: {value}", changed(file, "model", "vocab", "A", value=value)
  yield "merges of unknown tokens", changed(file, "model", "merges", value=[["xyz", "abc"]])
  yield "merges of three", changed(file, "model", "merges", value=["a b c"])
  yield (
    "a truncation",
    changed(file, "truncation", value={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}),
  )
  yield (
    "a truncation with a stride",
    changed(file, "truncation", value={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}),
  )
  yield (
    "a padding",
    changed(
      file,
      "padding",
      value={
        "strategy": {"Fixed": 100},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|begin_of_text|>",
      },
    ),
  )
  yield (
    "a padding of 10^12",
    changed(
      file,
      "padding",
      value={
        "strategy": {"Fixed": 10**12},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|begin_of_text|>",
      },
    ),
  )
  yield (
    "a broken pattern",
    changed(
      file, "pre_tokenizer", value={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
  )
  yield "a damaged charsmap", changed(file, "normalizer", value={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
  yield (
    "a template of unknown tokens",
    changed(
      file,
      "post_processor",
      value={
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
      },
    ),
  )
  yield from of_any_file(file, needed=True)
  for flip in range(0, 3000, 150):
    yield f"a brace at {flip}", replaced(file, lambda content, flip=flip: content[:flip] + b"}" + content[flip:])


def settings_damages():
  file = "tokenizer_config.json"
  for name, value in WRONG.items():
    for key in (
      "eos_token",
      "bos_token",
      "chat_template",
      "added_tokens_decoder",
      "model_max_length",
      "padding_side",
      "extra_special_tokens",
      "additional_special_tokens",
      "tokenizer_class",
      "clean_up_tokenization_spaces",
      "add_bos_token",
    ):
      if (key, name) not in (
        ("chat_template", "an empty word"),
        ("additional_special_tokens", "a word"),
        ("add_bos_token", "a truth value"),
      ):
        yield f"{key}: {name}", changed(file, key, value=value)
    yield f"eos_token.content: {name}", changed(file, "eos_token", value={"content": value, "__type": "AddedToken"})
  yield "eos_token: a stranger", changed(file, "eos_token", value="<|nonsense|>")
  yield (
    "added_tokens_decoder: another id",
    changed(file, "added_tokens_decoder", "300", value={"content": "<|eot_id|>"}),
  )
  yield "added_tokens_decoder: no id", changed(file, "added_tokens_decoder", "x", value={"content": "<|eot_id|>"})
  for number, template in enumerate(
    (
      "{% for i in range(10**12) %}x{% endfor %}",
      "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
      "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
      "{{ 10**10**8 }}",
      "{{ 'x' * 10**10 }}",
      "{{ (10**7)**(10**7) }}",
      "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
      "{% for",
      "{{ undefined.thing }}",
      "{{ messages[5].content }}",
      "{{ ''.__class__.__mro__ }}",
      "{{ 1 / 0 }}",
      "{{ messages | nope }}",
      "{{ raise_exception('no') }}",
      "{% include 'x' %}",
      "{{ messages + 1 }}",
      "\ud800",
      "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
      "{{ '%1000000000d' % 1 }}",
      "constant",
      "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}",
      "{{ range(99999) | list | map('string') | join | length * 0 }}",
      [{"name": "default"}],
      [{"template": "x"}],
      [5],
      [{"name": 5, "template": 6}],
      {"default": 5},
      [{"name": "other", "template": "x"}],
    )
  ):
    yield f"chat_template {number}", changed(file, "chat_template", value=template)
  yield from of_any_file(file, needed=False)
  for other in ("special_tokens_map.json", "added_tokens.json"):
    for name, value in WRONG.items():
      yield f"{other} {name}", replaced_or_new(other, json.dumps({"eos_token": value}).encode())
    for name, damage in of_any_file(other, needed=False):
      yield (
        f"{other} {name}",
        after(replaced_or_new(other, b'{"<|eot_id|>": 4}' if other.startswith("added") else b"{}"), damage),
      )
  for kind in ("FIFO", "folder", "/dev/zero", "/nowhere"):
    yield f"chat_template.jinja is {kind}", other_kind("chat_template.jinja", kind)
  yield "chat_template.jinja is Latin-1", replaced_or_new("chat_template.jinja", b"\xe9")


def replaced_or_new(file, content):
  return lambda folder: (folder / file).write_bytes(content)


def after(first, second):
  def damage(folder):
    first(folder)
    second(folder)

  return damage


def damages():
  """Name -> damage, all of them."""
  names = [
    f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("mlp.up_proj.weight", "self_attn.v_proj.weight")
  ] + ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"]
  kinds = {
    "config.json": config_damages(),
    "generation_config.json": generation_damages(),
    "weights": weight_damages(names),
    "index": index_damages(),
    "tokenizer.json": tokenizer_damages(),
    "tokenizer_config.json and others": settings_damages(),
  }
  return {(kind, name): damage for kind, some in kinds.items() for name, damage in some}


def outcomes(home):
  """(kind, name) -> (outcome, seconds, what it said) of every damage; "refused", "same", or what is wrong."""
  lay_out(home / "sound")
  cases = [(home / "sound", home / "said-sound")]
  made = damages()
  for number, damage in enumerate(made.values()):
    folder = home / str(number)
    shutil.copytree(home / "sound", folder)
    damage(folder)
    cases.append((folder, home / f"said-{number}"))
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NPROC": "2",
  }
  servers = []
  for first in range(SERVERS):
    with open(home / f"cases-{first}", "w+") as file:
      json.dump([[str(folder), str(said)] for folder, said in cases[first::SERVERS]], file)
      file.seek(0)
      servers.append(
        subprocess.Popen(
          [sys.executable, "-c", SERVER % SECONDS],
          stdin=file,
          stdout=subprocess.PIPE,
          stderr=subprocess.DEVNULL,
          text=True,
          env=environment,
        )
      )
  lines = {}
  for first, server in enumerate(servers):
    lines |= dict(zip(range(first, len(cases), SERVERS), server.communicate()[0].splitlines(), strict=True))
  found = []
  for (_, said), line in zip(cases, (lines[number] for number in range(len(cases))), strict=True):
    code, seconds = json.loads(line)
    text = pathlib.Path(f"{said}.json").read_text()
    found.append((code, seconds, said.read_text(), json.loads(text) if text and code == 0 else None))
  code, _, said, sound = found.pop(0)
  assert code == 0, said
  assert isinstance(sound[-1], list), sound
  return {
    key: (_outcome(code, said, numbers, sound), seconds, said if numbers is None else str(numbers))
    for key, (code, seconds, said, numbers) in zip(made, found, strict=True)
  }


def _outcome(code, said, numbers, sound):
  if code == 2 and len(said.splitlines()) == 1 and said.startswith("error: ") and len(said) < 4000:
    return "refused"
  if code != 0:
    return "hang" if code in ("hang", -9, -24) else "traceback" if "Traceback" in said else f"exit {code}"
  if said:
    return "more said"
  chat_is_right = numbers[-1] == sound[-1] or str(numbers[-1]).startswith("refused: ")
  return "same" if numbers[:-1] == sound[:-1] and chat_is_right else "silently wrong"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  return outcomes(tmp_path_factory.mktemp("folders"))


def test_a_damaged_folder_is_refused_in_one_line_or_gives_the_same_numbers(found):
  assert len(found) > 360
  assert {key: outcome for key, outcome in found.items() if outcome[0] not in ("refused", "same")} == {}


if __name__ == "__main__":
  import collections
  import tempfile

  with tempfile.TemporaryDirectory() as scratch:
    result = outcomes(pathlib.Path(scratch) / "folders")
  for kind in dict.fromkeys(kind for kind, _ in result):
    select_kind = [outcome[0] for key, outcome in result.items() if key[0] == kind]
    print(f"{kind}: {len(select_kind)} tried, {dict(collections.Counter(select_kind))}")
  print(f"slowest {max(outcome[1] for outcome in result.values()):.1f} s")
  for key, outcome in result.items():
    if outcome[0] not in ("refused", "same"):
      print(key, outcome[0], f"{outcome[1]:.1f} s", outcome[2][-300:].replace("\n", " | "))

"""Hugging Face folders in and out: the same bytes, the right errors, bounded memory, only the bytes needed."""

import dataclasses
import hashlib
import json
import os
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from flax.traverse_util import flatten_dict

from insec_jax.command import InputError
from insec_jax.config import MeshConfig
from insec_jax.model import hf, hf_writing, llama, sharding
from insec_jax.model.hf_config import config_from_json
from insec_jax.model.safetensors_io import open_tensors

FIELDS = reference.FIELDS
CONFIG = config_from_json(FIELDS, "reference")
TENSORS = reference.random_tensors(FIELDS)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
Q = "model.layers.0.self_attn.q_proj.weight"


def random_bits(dtype, fields=FIELDS):
  """HF tensors of random bit patterns that are finite, subnormal numbers among them."""
  rng = np.random.default_rng(0)
  size = np.dtype(DTYPES[dtype]).itemsize
  tensors = {
    name: np.frombuffer(bytearray(rng.bytes(size * int(np.prod(shape)))), DTYPES[dtype]).reshape(shape)
    for name, shape in reference.shapes(fields).items()
  }
  with np.errstate(invalid="ignore"):
    return {name: np.where(np.isfinite(tensor), tensor, DTYPES[dtype](1)) for name, tensor in tensors.items()}


def digests(folder):
  """Name -> (dtype, shape, sha256 of the bytes), of every tensor in the folder's files."""
  result = {}
  for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
    for name, tensor in open_tensors(path).items():
      assert name not in result
      result[name] = (tensor.dtype.name, tensor.shape, hashlib.sha256(tensor.tobytes()).hexdigest())
  return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("files", [1, 3])
def test_loading_and_saving_gives_the_same_bytes_per_tensor(dtype, tied, files, tmp_path):
  fields = FIELDS | {"tie_word_embeddings": tied, "torch_dtype": dtype}
  source = reference.write_folder(tmp_path / "in", fields, random_bits(dtype, fields), files=files)
  config = hf.read_config(source)
  for number, params in enumerate((hf.load(source, config), hf.stored(source, config))):
    out = tmp_path / f"out{number}"
    hf_writing.save(out, params, config, max_shard_bytes=10**9 if files == 1 else 20_000)
    assert digests(out) == digests(source)
    assert json.loads((out / "config.json").read_text()) == fields
    assert (out / "model.safetensors").exists() == (files == 1)


def test_loading_on_a_mesh_and_saving_gives_the_same_bytes_per_tensor(tmp_path):
  source = reference.write_folder(tmp_path / "in", FIELDS | {"torch_dtype": "bfloat16"}, random_bits("bfloat16"))
  config = hf.read_config(source)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
  shardings = sharding.params_shardings(llama.shapes(config), mesh)
  hf_writing.save(tmp_path / "out", hf.load(source, config, shardings=shardings), config)
  assert digests(tmp_path / "out") == digests(source)


def test_what_is_saved_is_what_the_safetensors_library_reads(tmp_path):
  numpy_reader = pytest.importorskip("safetensors.numpy")
  params = hf.load(reference.write_folder(tmp_path / "in", FIELDS, TENSORS), CONFIG)
  hf_writing.save(tmp_path / "out", params, CONFIG, max_shard_bytes=40_000)
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
  seen = {}
  for file in sorted(set(index["weight_map"].values())):
    tensors = numpy_reader.load_file(tmp_path / "out" / file)
    assert {index["weight_map"][name] for name in tensors} == {file}
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 40_000
    seen |= tensors
  assert seen.keys() == TENSORS.keys()
  for name, tensor in TENSORS.items():
    np.testing.assert_array_equal(seen[name], tensor)


def test_what_the_safetensors_library_writes_is_read(tmp_path):
  numpy_writer = pytest.importorskip("safetensors.numpy")
  source = reference.write_folder(tmp_path, FIELDS, TENSORS)
  expected = digests(source)
  numpy_writer.save_file(TENSORS, source / "model.safetensors", metadata={"format": "pt"})
  assert digests(source) == expected
  hf.load(source, CONFIG)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_saving_in_another_dtype_rounds_once_and_says_so(dtype, tmp_path):
  params = hf.load(reference.write_folder(tmp_path / "in", FIELDS, TENSORS), CONFIG)
  hf_writing.save(tmp_path / "out", params, CONFIG, dtype=dtype)
  saved = open_tensors(tmp_path / "out" / "model.safetensors")
  for name, tensor in TENSORS.items():
    np.testing.assert_array_equal(saved[name], tensor.astype(DTYPES[dtype]))
  assert hf.read_config(tmp_path / "out") == dataclasses.replace(
    CONFIG, stored_dtype=dtype, source=json.dumps(FIELDS | {"torch_dtype": dtype})
  )
  again = hf.load(tmp_path / "out", CONFIG, dtype="float32")
  assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(np.float32)}


def broken(tmp_path, change, files=1):
  tensors = dict(TENSORS)
  change(tensors)
  return reference.write_folder(tmp_path, FIELDS, tensors, files)


def test_missing_unexpected_and_misshapen_tensors_are_one_error_that_lists_them_all(tmp_path):
  def change(tensors):
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = TENSORS[Q]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
    tensors[Q] = np.zeros((64, 96), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)  # old files have it

  with pytest.raises(InputError) as error:
    hf.load(broken(tmp_path, change), CONFIG)
  listed = str(error.value).split(": ", 1)[1].split("; ")
  assert listed[:-1] == [
    "missing model.layers.1.mlp.up_proj.weight",
    "missing model.norm.weight",
    "unexpected model.layers.0.self_attn.q_proj.bias",
    "unexpected model.layers.2.mlp.up_proj.weight",
    f"misshapen {Q} [64, 96] instead of [96, 64]",
  ]
  assert "take a complete checkpoint" in listed[-1]


def test_an_untied_model_needs_its_output_matrix(tmp_path):
  with pytest.raises(InputError, match=r"missing lm_head.weight"):
    hf.load(broken(tmp_path, lambda tensors: tensors.pop("lm_head.weight")), CONFIG)


def test_a_tensor_in_two_files_is_refused(tmp_path):
  source = reference.write_folder(tmp_path, FIELDS, TENSORS, files=2)
  second = source / "model-00002-of-00002.safetensors"
  reference.write_file(
    second,
    {
      **{name: np.array(one) for name, one in open_tensors(second).items()},
      "lm_head.weight": TENSORS["lm_head.weight"],
    },
  )
  with pytest.raises(InputError, match=r"lm_head.weight twice, the second time in model-00002-of-00002.safetensors"):
    hf.load(source, CONFIG)


def test_a_tensor_named_twice_in_one_header_is_refused(tmp_path):
  source = reference.write_folder(tmp_path, FIELDS, TENSORS)
  data = (source / "model.safetensors").read_bytes()
  (source / "model.safetensors").write_bytes(data.replace(b"model.layers.1.mlp.up_proj", b"model.layers.0.mlp.up_proj"))
  with pytest.raises(InputError, match=r"the key 'model.layers.0.mlp.up_proj.weight' is given twice"):
    hf.load(source, CONFIG)


def test_bytes_used_by_two_tensors_are_refused(tmp_path):
  source = reference.write_folder(tmp_path, FIELDS, TENSORS)
  path = source / "model.safetensors"
  data = path.read_bytes()
  length = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + length])
  one, other = (header[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
  other["data_offsets"] = one["data_offsets"]
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
  with pytest.raises(InputError, match="tensors overlap or leave a gap"):
    hf.load(source, CONFIG)


def test_layers_of_several_dtypes_need_a_dtype_to_be_loaded_as(tmp_path):
  source = broken(tmp_path, lambda tensors: tensors.update({Q: TENSORS[Q].astype(np.float16)}))
  with pytest.raises(InputError, match=r"self_attn.q_proj.weight in several dtypes \(float16, float32\)"):
    hf.load(source, CONFIG)
  assert hf.load(source, CONFIG, dtype="float32")["layers"]["attn"]["wq"].dtype == jnp.float32


@pytest.mark.parametrize("kept", [0, 4, 100, 3000, -1])
def test_a_file_cut_short_is_one_line_that_names_it(kept, tmp_path):
  path = reference.write_folder(tmp_path, FIELDS, TENSORS) / "model.safetensors"
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(InputError, match=r"model\.safetensors.*(cut short|fetch it again)") as error:
    hf.load(tmp_path, CONFIG)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "header",
  [
    b"[]",
    b"{",
    b'{"x": 1}',
    b'{"x": NaN}',
    b"[" * 10_000,
    b'{"x": {"dtype": "F32", "shape": [2]}}',
    b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
  ],
)
def test_a_damaged_header_is_one_line_that_names_the_file(header, tmp_path):
  reference.write_folder(tmp_path, FIELDS, {})
  (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
  with pytest.raises(InputError, match=r"model\.safetensors: (its header|the bytes of x)"):
    hf.load(tmp_path, CONFIG)


@pytest.mark.parametrize(
  "entry",
  [
    {"shape": [-1], "data_offsets": [0, 4]},
    {"shape": [True], "data_offsets": [0, 4]},
    {"shape": [1.0], "data_offsets": [0, 4]},
    {"shape": [0, 10**30], "data_offsets": [0, 0]},
    {"shape": [1] * 1000, "data_offsets": [0, 4]},
    {"shape": [1], "data_offsets": [-4, 0]},
    {"shape": [1], "data_offsets": [4, 0]},
    {"shape": [1], "data_offsets": [0, True]},
    {"shape": [1], "data_offsets": [0, 4], "more": 1},
    {"shape": [1], "data_offsets": [0, 4], "dtype": ["F32"]},
  ],
)
def test_a_header_with_an_entry_that_no_file_can_have_is_refused(entry, tmp_path):
  reference.write_folder(tmp_path, FIELDS, {})
  header = json.dumps({"x": {"dtype": "F32"} | entry}).encode()
  (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
  with pytest.raises(InputError, match=r"of x, which is no tensor of this file"):
    open_tensors(tmp_path / "model.safetensors")


def test_a_file_that_is_cut_short_is_called_so(tmp_path):
  reference.write_folder(tmp_path, FIELDS, {})
  header = json.dumps({"x": {"dtype": "F32", "shape": [250], "data_offsets": [0, 1000]}}).encode()
  (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
  with pytest.raises(
    InputError, match=r"x ends at byte 1,000 of the data, and the whole file has \d+ bytes; it is cut"
  ):
    hf.load(tmp_path, hf.read_config(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_finite_is_named_with_its_place(value, dtype, tmp_path):
  def change(tensors):
    for name, tensor in tensors.items():
      tensors[name] = tensor.astype(DTYPES[dtype])
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

  source = broken(tmp_path / "in", change)
  place = r"^model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity at \[3, 5\]"
  with pytest.raises(InputError, match=place):
    hf.load(source, CONFIG)
  with pytest.raises(InputError, match=place):
    hf_writing.save(tmp_path / "out", hf.stored(source, CONFIG), CONFIG)
  assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_weight_too_large_for_the_dtype_asked_for_is_refused(tmp_path):
  source = broken(tmp_path / "in", lambda tensors: tensors.update({Q: TENSORS[Q] * 1e9}))
  with pytest.raises(InputError, match=rf"{Q} holds values that float16 cannot hold"):
    hf.load(source, CONFIG, dtype="float16")
  with pytest.raises(InputError, match=rf"{Q} as float16 holds NaN or infinity"):
    hf_writing.save(tmp_path / "out", hf.stored(source, CONFIG), CONFIG, dtype="float16")


def test_more_layers_than_the_files_can_hold_are_refused_unlisted(tmp_path):
  source = reference.write_folder(tmp_path, FIELDS, TENSORS)
  with pytest.raises(InputError, match=r"num_hidden_layers=1000000000, but the weights hold only 21 tensors"):
    hf.stored(source, dataclasses.replace(CONFIG, num_layers=10**9))


@pytest.mark.parametrize(
  "file", ["../model.safetensors", "/etc/passwd", "..", "", "x\0.safetensors", "\ud800", "model.bin"]
)
def test_an_index_names_files_of_its_own_folder_alone(file, tmp_path):
  source = reference.write_folder(tmp_path, FIELDS, TENSORS, files=2)
  path = source / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  index["weight_map"][Q] = file
  path.write_text(json.dumps(index))
  with pytest.raises(InputError, match=r"which is no \.safetensors file of this folder"):
    hf.load(source, CONFIG)


def test_a_fifo_in_place_of_a_file_is_refused_at_once(tmp_path):
  source = reference.write_folder(tmp_path, FIELDS, TENSORS)
  for name in ("model.safetensors", "config.json"):
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(InputError, match=rf"{name} is a FIFO, needed is a file"):
      hf.load(source, hf.read_config(source) if name == "config.json" else CONFIG)


def test_two_exports_to_one_folder_cannot_collide(tmp_path):
  params = hf.stored(reference.write_folder(tmp_path / "in", FIELDS, TENSORS), CONFIG)

  class Second:
    def save_pretrained(self, _):
      with pytest.raises(InputError, match=r"out is being written by process [0-9]+ on "):
        hf_writing.save(tmp_path / "out", params, CONFIG)

  hf_writing.save(tmp_path / "out", params, CONFIG, tokenizer=Second())
  assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
  assert digests(tmp_path / "out") == digests(tmp_path / "in")


def test_the_tokens_that_end_a_text_are_those_of_both_configs(tmp_path):
  source = reference.write_folder(tmp_path, FIELDS, TENSORS)
  (source / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
  assert hf.read_config(source).eos_ids == (2, 3, 7)
  for wrong in ("80", "-1", "true", '"2"', "[[2]]", "1.0"):
    (source / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id"):
      hf.read_config(source)


def test_quantized_weights_are_refused_by_name_and_dtype(tmp_path):
  reference.write_folder(tmp_path, FIELDS, {})
  header = b'{"model.norm.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}'
  (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
  with pytest.raises(InputError, match=r"model\.norm\.weight F8_E4M3: only F32, F16, BF16 weights can be read"):
    hf.load(tmp_path, CONFIG)


def test_a_folder_without_weights_or_config_is_one_line(tmp_path):
  with pytest.raises(InputError, match=r"cannot read .*config\.json \(No such file"):
    hf.read_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(InputError, match=r"config\.json: not JSON"):
    hf.read_config(tmp_path)
  with pytest.raises(InputError, match=r"has neither of model\.safetensors and model\.safetensors\.index\.json"):
    hf.load(tmp_path, CONFIG)


def test_an_index_must_be_true(tmp_path):
  source = reference.write_folder(tmp_path, FIELDS, TENSORS, files=2)
  path = source / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  places = index["weight_map"]
  places[Q] = next(file for file in places.values() if file != places[Q])
  path.write_text(json.dumps(index))
  with pytest.raises(InputError, match=rf"{Q} in model-0000.-of-00002.safetensors but not so in"):
    hf.load(source, CONFIG)
  index["weight_map"] = places | {"extra": places[Q]}
  path.write_text(json.dumps(index))
  with pytest.raises(InputError, match=r"extra in model.safetensors.index.json but in no file"):
    hf.load(source, CONFIG)
  (source / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(InputError, match=r"names model-00002-of-00002.safetensors, which is not there"):
    hf.load(source, CONFIG)


def test_an_output_matrix_of_a_tied_model_is_named_if_it_is_the_embedding_or_refused(tmp_path, caplog):
  fields = FIELDS | {"tie_word_embeddings": True}
  config = config_from_json(fields, "tied")
  same = TENSORS | {"lm_head.weight": TENSORS["model.embed_tokens.weight"]}
  source = reference.write_folder(tmp_path / "same", fields, same)
  assert "head" not in hf.load(source, config)
  assert "lm_head.weight repeats model.embed_tokens.weight" in caplog.text
  with pytest.raises(InputError, match=r"unexpected lm_head.weight, which differs from model.embed_tokens.weight"):
    hf.load(reference.write_folder(tmp_path / "other", fields, TENSORS), config)


def test_each_process_reads_the_bytes_of_its_own_shards_and_no_others(tmp_path, monkeypatch):
  """Counts what is indexed while one weight after another is placed on 2 x 2 x 2 devices."""
  read = {}
  original = hf.LazyWeight.__getitem__

  def counting(self, index):
    result = original(self, index)
    read.setdefault(id(self), []).append((self, result.size))
    return result

  monkeypatch.setattr(hf.LazyWeight, "__getitem__", counting)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
  shardings = sharding.params_shardings(llama.shapes(CONFIG), mesh)
  hf.load(reference.write_folder(tmp_path, FIELDS, TENSORS), CONFIG, shardings=shardings)
  assert len(read) == len(jax.tree.leaves(shardings))
  for calls in read.values():
    weight = calls[0][0]
    assert sum(size for _, size in calls) == np.prod(weight.shape)  # once, although each shard lies on two devices
    assert len(calls) in (2, 4)  # a norm is split by width alone


def test_reading_a_part_touches_that_part_of_the_file_alone(tmp_path):
  weight = hf.stored(reference.write_folder(tmp_path, FIELDS, TENSORS), CONFIG)["layers"]["attn"]["wq"]
  assert all(isinstance(_mapped(part), np.memmap) for part in weight.tensors)
  part = weight[slice(1, 2), slice(16, 32), slice(2, 4), slice(None)]
  expected = TENSORS["model.layers.1.self_attn.q_proj.weight"].reshape(4, 24, 64)[2:4, :, 16:32].transpose(2, 0, 1)
  np.testing.assert_array_equal(part[0], expected)
  assert part.base is None  # a copy: the device may keep it, the file stays read-only


def _mapped(view):
  while not isinstance(view, np.memmap):
    view = view.base
  return view


def test_host_memory_stays_at_two_tensors_when_saving_and_two_weights_when_loading(tmp_path):
  fields = FIELDS | {"num_hidden_layers": 6, "intermediate_size": 2048, "vocab_size": 1000}
  config = config_from_json(fields, "larger")
  source = reference.write_folder(tmp_path / "in", fields, reference.random_tensors(fields))
  tensor, weight, everything = 2048 * 64 * 4, 6 * 2048 * 64 * 4, 6 * 3 * 2048 * 64 * 4

  def peak(work):
    tracemalloc.start()
    work()
    result = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result

  # A lock and the look for NaN come on top, some KB.
  assert tensor <= peak(lambda: hf_writing.save(tmp_path / "out", hf.stored(source, config), config)) < 2.4 * tensor
  weights = flatten_dict(hf.stored(source, config), sep="/")
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  # As hf.load, but each weight is let go: on CPU the device's memory is the host's. jax frees the last one late.
  def load():
    for leaf in weights.values():
      sharding._place(leaf, one).delete()

  assert weight <= peak(load) < 2.1 * weight < everything


def test_save_writes_nothing_over_and_leaves_no_half_folder(tmp_path):
  params = hf.stored(reference.write_folder(tmp_path / "in", FIELDS, TENSORS), CONFIG)
  with pytest.raises(InputError, match="is there already and not empty"):
    hf_writing.save(tmp_path / "in", params, CONFIG)

  class Unwilling:
    def save_pretrained(self, folder):
      raise OSError(f"disk full, {folder}")

  with pytest.raises(OSError, match="disk full"):
    hf_writing.save(tmp_path / "out", params, CONFIG, tokenizer=Unwilling())
  assert not (tmp_path / "out").exists()
  (tmp_path / "out").mkdir()  # empty is as good as new
  hf_writing.save(tmp_path / "out", params, CONFIG)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_save_writes_token_ids_card_and_tokenizer(tmp_path):
  class Tokenizer:
    def save_pretrained(self, folder):
      (pathlib.Path(folder) / "tokenizer.json").write_text("{}")

  params = hf.stored(reference.write_folder(tmp_path / "in", FIELDS, TENSORS), CONFIG)
  hf_writing.save(tmp_path / "out", params, CONFIG, tokenizer=Tokenizer(), card="# A card\n")
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
  ]
  assert hf.read_generation_config(tmp_path / "out") == {"bos_token_id": 1, "eos_token_id": [2, 3]}
  assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"
  hf_writing.save(tmp_path / "again", params, CONFIG, generation={"temperature": 0.6, "eos_token_id": 3})
  assert hf.read_generation_config(tmp_path / "again") == {"temperature": 0.6, "eos_token_id": 3}
  assert hf.read_generation_config(tmp_path / "in") is None

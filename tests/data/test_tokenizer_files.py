"""The files of a tokenizer on their way from a source to a workdir and an export."""

import json
import os

import pytest
from datakit import bpe_tokenizer, config
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.data import tokenizer_files, vocabulary

OTHERS = {
  "special_tokens_map.json": '{"bos_token":  "<|bos|>"}',
  "tokenizer.model": "sentencepiece",
  "merges.txt": "a b",
  "chat_template.jinja": "{{ 1 }}",
  "additional_chat_templates/tool_use.jinja": "{{ 2 }}",
  "chat_templates/rag.jinja": "{{ 3 }}",
  "added_tokens.json": '{"<|eot|>": 5}',
  "vocab.json": "{}",
}
SETTINGS = {
  "tokenizer_class": "PreTrainedTokenizerFast",
  "bos_token": "<|bos|>",
  "eos_token": "<|eos|>",
  "kept": [1, {"a": 2}],
  "chat_template": [{"name": "default", "template": "{{ 1 }}"}],
  "added_tokens_decoder": {"2": {"content": "<|eos|>"}},
}


@pytest.fixture
def source(tmp_path):
  """A folder with every file that a tokenizer can have, and some that it cannot."""
  folder = tmp_path / "source"
  bpe_tokenizer().save_pretrained(folder)
  for name, text in OTHERS.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
  (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
  (folder / "config.json").write_text("{}")
  return folder


def files_of(folder):
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tokenizer_that_gets_no_token_keeps_every_byte_of_every_file(source, tmp_path):
  marked = vocabulary.add_markers(
    vocabulary.load(str(source)), config(tokenizer__flag="<|spare_0|>", tokenizer__fix="<|spare_1|>").tokenizer
  )
  tokenizer_files.save(marked.tokenizer, source, tmp_path / "out")
  before = files_of(source)
  del before["config.json"]
  assert files_of(tmp_path / "out") == before


def test_added_markers_are_all_that_changes_in_the_files(source, tmp_path):
  marked = vocabulary.add_markers(vocabulary.load(str(source)), config().tokenizer)
  tokenizer_files.save(marked.tokenizer, source, tmp_path / "out")
  before, after = files_of(source), files_of(tmp_path / "out")
  changed = {name for name in after if after[name] != before[name]}
  assert changed == {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"}
  old, new = (json.loads(files["tokenizer.json"]) for files in (before, after))
  assert new["added_tokens"][:-2] == old.pop("added_tokens")
  assert [token["content"] for token in new.pop("added_tokens")[-2:]] == ["<err>", "<fix>"]
  assert list(new.items()) == list(old.items())
  settings = json.loads(after["tokenizer_config.json"])
  assert {settings["added_tokens_decoder"].pop(str(number))["content"] for number in marked[1:3]} == {"<err>", "<fix>"}
  assert list(settings.items()) == list(SETTINGS.items())
  assert json.loads(after["added_tokens.json"]) == {"<|eot|>": 5, "<err>": marked.flag_id, "<fix>": marked.fix_id}
  again = vocabulary.find_markers(vocabulary.load(str(tmp_path / "out")), config().tokenizer)
  assert again[1:3] == marked[1:3]


def test_what_transformers_4_cannot_read_is_what_it_can(tmp_path):
  tokenizer = bpe_tokenizer()
  tokenizer.add_special_tokens({"extra_special_tokens": ["<|spare_0|>"]})
  tokenizer.save_pretrained(tmp_path / "five")
  PreTrainedTokenizerFast.from_pretrained(tmp_path / "five").save_pretrained(tmp_path / "six")
  before = json.loads((tmp_path / "six" / "tokenizer_config.json").read_text())
  assert before["tokenizer_class"] == "TokenizersBackend"
  assert before["is_local"]
  tokenizer_files.copy(tmp_path / "six", tmp_path / "out")
  after = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
  assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert not {"is_local", "local_files_only", "extra_special_tokens"} & after.keys()
  assert after["additional_special_tokens"] == ["<|spare_0|>"]


def changed(folder, name, **fields):
  path = folder / name
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_token_with_two_ids_is_refused(source):
  changed(source, "tokenizer_config.json", added_tokens_decoder={"3": {"content": "<|eos|>"}})
  with pytest.raises(
    InputError, match=r"tokenizer_config\.json gives '<\|eos\|>' the id 3, tokenizer\.json gives it 2"
  ):
    vocabulary.load(str(source))
  added = json.loads((source / "tokenizer.json").read_text())["added_tokens"]
  changed(source, "tokenizer_config.json", added_tokens_decoder={})
  changed(source, "tokenizer.json", added_tokens=[{**added[0], "id": 1}, *added[1:]])
  with pytest.raises(InputError, match="two added tokens have one id"):
    vocabulary.load(str(source))


@pytest.mark.parametrize(
  "fields",
  [
    {"model": 5},
    {"model": {"type": "BPE"}},
    {"added_tokens": [5]},
    {"pre_tokenizer": "x"},
    {"post_processor": {"type": "Nope"}},
    {"added_tokens": [{"id": True, "content": "x"}]},
  ],
)
def test_a_damaged_tokenizer_is_one_line(fields, source):
  changed(source, "tokenizer.json", **fields)
  with pytest.raises(InputError) as error:
    vocabulary.load(str(source))
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 500


@pytest.mark.parametrize(
  "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
)
def test_a_fifo_in_place_of_a_tokenizers_file_is_refused(name, source):
  (source / name).unlink()
  os.mkfifo(source / name)
  with pytest.raises(InputError, match=rf"{name} is a FIFO"):
    vocabulary.load(str(source))


@pytest.mark.parametrize("name", ["a", "<|stranger|>"])
def test_a_text_cannot_end_with_a_token_that_is_not_special(name, source):
  changed(source, "tokenizer_config.json", eos_token=name)
  with pytest.raises(InputError, match="is none of the tokens that"):
    vocabulary.load(str(source))


def test_a_panic_of_the_library_is_one_line_and_nothing_else_is_said(source, capfd):
  changed(source, "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
  with pytest.raises(InputError, match="cannot be opened"):
    vocabulary.load(str(source))
  assert capfd.readouterr().err == ""


def test_an_added_token_that_the_vocabulary_calls_otherwise_is_refused(source):
  fields = json.loads((source / "tokenizer.json").read_text())
  fields["model"]["vocab"]["<|head}|>"] = fields["model"]["vocab"].pop("<|head|>")
  (source / "tokenizer.json").write_text(json.dumps(fields))
  with pytest.raises(InputError, match=r"says that '<\|head\|>' is token 3, it becomes [0-9]+"):
    vocabulary.load(str(source))

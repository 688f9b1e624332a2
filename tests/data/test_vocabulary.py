"""Tokenizers are read as their files say or built from symbols, and the markers become special tokens."""

import re

import numpy as np
import pytest
from datakit import bpe_tokenizer, config
from tokenizers import AddedToken, pre_tokenizers

from insec_jax.command import InputError
from insec_jax.data import tokens, vocabulary
from insec_jax.files import hub
from insec_jax.files.bucket_paths import spool

SPARE = {"tokenizer__flag": "<|spare_0|>", "tokenizer__fix": "<|spare_1|>"}


def test_a_built_tokenizer_has_one_token_a_symbol_and_gives_every_text_back(tmp_path):
  symbols = ("a", "ab", "10", "1", "0", " ", "\n", "<", "#", "-", ".", "wrong value")
  built = vocabulary.build_tokenizer(symbols, config().tokenizer)
  built.save_pretrained(tmp_path)
  text = "ab a10.\n<err>#-wrong value1<fix>< "
  for tokenizer in (built, vocabulary.load(str(tmp_path))):
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
      "ab",
      " ",
      "a",
      "10",
      ".",
      "\n",
      "<err>",
      "#",
      "-",
      "wrong value",
      "1",
      "<fix>",
      "<",
      " ",
    ]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(symbols) + 5
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")


def test_a_built_tokenizer_takes_plain_word_markers_as_symbols():
  some = config(tokenizer__special=False)
  tokenizer = vocabulary.build_tokenizer(("a", "b"), some.tokenizer)
  assert tokenizer.convert_ids_to_tokens(tokenizer("a<err>b<fix>").input_ids) == ["a", "<err>", "b", "<fix>"]
  assert vocabulary.find_markers(tokenizer, some.tokenizer).flag_id is None


def test_special_tokens_that_exist_become_markers_and_nothing_is_added():
  marked = vocabulary.add_markers(bpe_tokenizer(), config(**SPARE).tokenizer)
  assert marked[1:] == (6, 7, ())
  assert len(marked.tokenizer) == len(bpe_tokenizer())


def test_markers_that_are_new_are_added_as_special_tokens(tmp_path):
  before = len(bpe_tokenizer())
  marked = vocabulary.add_markers(bpe_tokenizer(), config().tokenizer)
  assert marked[1:] == (before, before + 1, ())
  marked.tokenizer.save_pretrained(tmp_path)
  again = vocabulary.find_markers(vocabulary.load(str(tmp_path)), config().tokenizer)
  assert again[1:] == (before, before + 1, ())


def test_an_added_word_that_is_not_special_becomes_special():
  tokenizer = bpe_tokenizer()
  tokenizer.add_tokens([AddedToken("<err>", special=False)])
  before = len(tokenizer)
  marked = vocabulary.add_markers(tokenizer, config().tokenizer)
  assert len(tokenizer) == before + 1
  assert (tokens.encode_prompt("<err>", tokenizer, "plain") != marked.flag_id).all()


def test_a_tokenizer_is_read_as_its_file_says(tmp_path):
  # A class name such as GPT2Tokenizer makes AutoTokenizer rebuild the tokenizer without its digit splitter.
  tokenizer = bpe_tokenizer()
  tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  tokenizer.save_pretrained(tmp_path)
  settings = tmp_path / "tokenizer_config.json"
  settings.write_text(re.sub('"tokenizer_class": "[^"]*"', '"tokenizer_class": "GPT2Tokenizer"', settings.read_text()))
  text = "He adds 12 and 30."
  assert vocabulary.load(str(tmp_path))(text).input_ids == tokenizer(text).input_ids


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"has no tokenizer\.json"):
    vocabulary.load(str(tmp_path))
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(InputError, match="not JSON"):
    vocabulary.load(str(tmp_path))


DAMAGED = {
  "tokenizer.json": (b"{", b"{}", b"\xff", b'{"added_tokens": [], "model": {"vocab": {}}}', b'{"added_tokens": [{}]}'),
  "tokenizer_config.json": (b"[]",),
  "chat_template.jinja": (b"\xff",),
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in DAMAGED for content in DAMAGED[name]])
def test_errors_of_a_tokenizer_in_a_bucket_name_the_bucket_and_no_local_copy(tmp_path, bucket, name, content):
  bpe_tokenizer().save_pretrained(tmp_path)
  (tmp_path / name).write_bytes(content)
  bucket.upload(tmp_path, "hf")
  for folder in (f"{bucket.url}/hf", hub.model_folder(f"{bucket.url}/hf", "--model", weights=False)):
    with pytest.raises(InputError, match=rf"{bucket.url}/hf") as error:
      vocabulary.load(folder)
    assert str(spool()) not in str(error.value)


def test_what_a_tokenizer_file_says_of_cutting_and_padding_does_not_count(tmp_path):
  tokenizer = bpe_tokenizer()
  before = tokens.encode_prompt("12 + 30", tokenizer, "plain")
  tokenizer.backend_tokenizer.enable_truncation(2)
  tokenizer.backend_tokenizer.enable_padding(length=100)
  tokenizer.save_pretrained(tmp_path)
  np.testing.assert_array_equal(tokens.encode_prompt("12 + 30", vocabulary.load(str(tmp_path)), "plain"), before)


def test_words_of_the_paper_need_a_tokenizer_that_can_write_them(tmp_path):
  toy = dict(
    task__name="multiplication",
    task__min_size=3,
    task__max_size=3,
    data__num_records=1,
    mistakes__reason="paper",
    mistakes__source="injected",
  )
  with pytest.raises(InputError, match=r"^mistakes\.reason='paper' writes 'Found an .*no tokens; use 'none', 'label'"):
    vocabulary.open_tokenizer(config(**toy))
  bpe_tokenizer().save_pretrained(tmp_path)
  vocabulary.open_tokenizer(config(**toy, tokenizer__path=str(tmp_path)))


def test_the_tokenizer_comes_from_its_folder_or_the_model_or_the_task(tmp_path):
  bpe_tokenizer().save_pretrained(tmp_path)
  for changes in ({"tokenizer__path": str(tmp_path)}, {"model__path": str(tmp_path), "model__size": None}):
    assert vocabulary.open_tokenizer(config(**SPARE, **changes))[1:] == (6, 7, ())
  sums = config(task__name="multiplication", task__min_size=2, task__max_size=3, data__num_records=1)
  assert vocabulary.open_tokenizer(sums).flag_id is not None
  with pytest.raises(InputError, match=r"no symbols to build a tokenizer from; give tokenizer\.path"):
    vocabulary.open_tokenizer(config())

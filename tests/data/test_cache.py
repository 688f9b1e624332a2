"""Rows in files: the same as in memory, made once for all processes, and read without the records."""

import dataclasses
import errno
import gc
import itertools
import os
import shutil
import threading
import tracemalloc

import numpy as np
import pytest
from datakit import bpe_tokenizer, config, gsm8k, pieces, question

from insec_jax.command import InputError, machine_refusal
from insec_jax.data import cache, mixture, pipeline, vocabulary
from insec_jax.data.receipt import Data
from insec_jax.data.storage import Disk

LINES = [question(number) for number in range(40)] + [pieces(("prompt", "long?"), ("text", "9 " * 300))]
OLD = 10**18  # ns: a time long ago


def cached(folder, **changes):
  """A config whose records are in r.jsonl of the folder, last changed long ago, with a cache beside it."""
  given = {"data__num_heldout": 8, "data__too_long": "drop", "data__row_length": 128}
  made = gsm8k(folder, LINES, **given | {"data__cache": str(folder / "cache")} | changes)
  os.utime(folder / "r.jsonl", ns=(OLD, OLD))
  return made


def in_memory(some):
  return dataclasses.replace(some, data=dataclasses.replace(some.data, cache=""))


def tokenizer(some):
  return vocabulary.add_markers(bpe_tokenizer(), some.tokenizer).tokenizer


def load(some):
  return pipeline.load_data(some, tokenizer(some))


def assert_same(data: Data, other: Data):
  for split in ("train", "heldout"):
    ours, theirs = getattr(data, split).fields(), getattr(other, split).fields()
    for name, one in ours.items():
      two = theirs[name]
      assert one.dtype == two.dtype
      np.testing.assert_array_equal(one, two)
    assert ours.keys() == theirs.keys()
  for name in ("receipt", "left_out", "digest", "most_token", "most_position"):
    assert getattr(data, name) == getattr(other, name), name


@pytest.mark.parametrize("rewind", [False, True])
def test_rows_and_batches_from_the_cache_are_those_in_memory_to_the_bit(tmp_path, rewind):
  some = cached(tmp_path, mistakes__rewind=rewind, mistakes__share=1.0)
  here, made, again = load(in_memory(some)), load(some), load(some)
  assert isinstance(again.train.token_BT, np.memmap)
  assert ("until" in here.train.fields()) == rewind
  assert len(here.heldout) > 0
  assert len(here.left_out.train + here.left_out.heldout) == 1
  assert_same(made, here)
  assert_same(again, here)
  options = dict(seed=1, rows_per_step=2, accumulation=2, start_step=3, share=slice(None), negatives=True)
  both = zip(pipeline.batches(here.train, **options), pipeline.batches(again.train, **options), strict=False)
  for one, two in itertools.islice(both, 5):
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)


def test_the_second_start_reads_no_record(tmp_path):
  some = cached(tmp_path)
  made = load(some)
  path = tmp_path / "r.jsonl"
  path.write_bytes(b"\0" * path.stat().st_size)
  os.utime(path, ns=(OLD, OLD))
  assert_same(load(some), made)
  os.utime(path, ns=(OLD, OLD + 1))
  with pytest.raises(InputError, match="not JSON"):
    load(some)


def test_a_file_that_has_just_been_written_is_read_again(tmp_path):
  some = cached(tmp_path)
  path = tmp_path / "r.jsonl"
  path.touch()
  load(some)
  kept = path.stat()
  path.write_bytes(b"\0" * kept.st_size)
  os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
  with pytest.raises(InputError, match="not JSON"):
    load(some)


CHANGES = {
  "seed": 1,
  "data__row_length": 130,
  "data__num_heldout": 9,
  "data__too_long": "refuse",
  "mistakes__share": 0.4,
  "mistakes__rewind": True,
  "loss__mistake": 1.0,
  "tokenizer__flag": "<|spare_0|>",
  "task__name": "records",
}


def test_rows_have_a_name_of_their_own_for_all_that_they_depend_on(tmp_path):
  some = cached(tmp_path)
  name = cache.key(some, tokenizer(some))
  others = {change: cached(tmp_path, **{change: value}) for change, value in CHANGES.items()}
  names = {change: cache.key(other, tokenizer(other)) for change, other in others.items()}
  same = cached(tmp_path, data__rows_per_device=4, train__steps=9, data__cache=str(tmp_path / "cache"))
  assert cache.key(same, tokenizer(same)) == name
  dated = tokenizer(some)
  dated.chat_template = "{{ 1 }}"
  names["chat template"] = cache.key(some, dated)
  (tmp_path / "r.jsonl").write_text((tmp_path / "r.jsonl").read_text().replace("What is 3 ", "What is 4 "))
  names["content"] = cache.key(some, tokenizer(some))
  assert len({name, *names.values()}) == 1 + len(names)


def test_who_comes_while_rows_are_made_waits_for_them(tmp_path, monkeypatch):
  monkeypatch.setattr(cache, "POLL_SECONDS", 0.02)
  monkeypatch.setattr(cache.locks, "GRACE_SECONDS", 0)
  some = cached(tmp_path)
  began, go, data = threading.Event(), threading.Event(), []

  def make(storage):
    began.set()
    assert go.wait(30)
    return pipeline._make_data(some, tokenizer(some), storage)

  def never(_):
    raise AssertionError("made twice")

  threads = [threading.Thread(target=lambda: data.append(cache.shared(some, tokenizer(some), make)))]
  threads[0].start()
  assert began.wait(30)
  threads.append(threading.Thread(target=lambda: data.append(cache.shared(some, tokenizer(some), never))))
  threads[1].start()
  threads[1].join(0.3)
  assert (data, threads[1].is_alive()) == ([], True)
  go.set()
  for thread in threads:
    thread.join(30)
  assert_same(*data)


def test_rows_whose_making_fails_are_not_there(tmp_path):
  some = cached(tmp_path)

  def fail(storage):
    storage.array("train", "token", (2, 2), 0, np.int32)
    raise OSError(28, "No space left on device")

  with pytest.raises(OSError, match="No space"):
    cache.shared(some, tokenizer(some), fail)
  assert [path.name for path in (tmp_path / "cache").iterdir()] == ["files"]
  assert len(load(some).train) > 0


def damage(name, content):
  """A change of a file of the rows: bytes in place of it, or of those from the place that `content` gives."""

  def change(folder):
    path = folder / name
    if content is None:
      path.unlink()
    else:
      path.write_bytes(content(path.read_bytes()))

  return change


DAMAGES = {
  "gone": (damage("train_role.npy", None), r"FileNotFoundError: .*train_role.npy"),
  "cut": (damage("train_role.npy", lambda was: was[:-7]), r"train_role.npy has [0-9,]+ bytes, [0-9,]+ were written"),
  # One id for another, both valid.
  "changed": (
    damage("train_token.npy", lambda was: was[:-4] + was[200:204]),
    "train_token.npy has another content than",
  ),
  "no JSON": (damage("data.json", lambda was: was[:-9]), r"data.json: not JSON at column [0-9]+ \("),
  "empty": (damage("data.json", lambda _: b""), "data.json: not JSON at column 1"),
  "other JSON": (damage("data.json", lambda _: b"{}"), "KeyError: 'files'"),
  "a list": (damage("data.json", lambda _: b"[]"), r"data.json holds \[\]; needed"),
  "no UTF-8": (damage("data.json", lambda _: b"\xff"), "data.json: byte 0 is not UTF-8"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_named_and_may_be_deleted(tmp_path, name):
  change, said = DAMAGES[name]
  some = cached(tmp_path)
  load(some)
  [folder] = (tmp_path / "cache").glob("rows-*")
  change(folder)
  with pytest.raises(InputError, match=rf"^data.cache: {folder} is damaged \(.*{said.partition('; ')[0]}") as error:
    load(some)
  assert str(error.value).endswith("); delete it, it is made anew")
  shutil.rmtree(folder)
  assert_same(load(some), load(in_memory(some)))


def test_a_damaged_note_on_a_file_of_records_is_named_too(tmp_path):
  some = cached(tmp_path)
  load(some)
  [note] = (tmp_path / "cache" / "files").iterdir()
  note.write_text("{")
  with pytest.raises(InputError, match=rf"^data.cache: {note} is damaged \(.*not JSON .*delete it, it is made anew$"):
    load(some)


def test_files_are_read_at_a_start_only_if_their_time_has_changed(tmp_path, monkeypatch):
  some = cached(tmp_path)
  made = load(some)
  hashed = []
  digest = cache.hashlib.file_digest
  monkeypatch.setattr(cache.hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
  assert_same(load(some), made)
  assert hashed == []
  [folder] = (tmp_path / "cache").glob("rows-*")
  os.utime(folder / "train_role.npy", (1, 1))
  assert_same(load(some), made)
  assert hashed == [str(folder / "train_role.npy")]


@pytest.mark.parametrize("place", ["posix_fallocate", "fsync"])
def test_a_full_disk_is_named_with_the_folder_of_the_cache_and_leaves_nothing(tmp_path, monkeypatch, place):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  some = cached(tmp_path)
  cache.key(some, tokenizer(some))
  with monkeypatch.context() as patched:
    patched.setattr(os, place, full)
    with pytest.raises(OSError, match="No space") as error:
      load(some)
  said = machine_refusal(error.value)
  assert said.startswith(f"No space left on device for the rows of data.cache: {tmp_path}/cache; free some room")
  assert [path.name for path in (tmp_path / "cache").iterdir()] == ["files"]
  assert len(load(some).train) > 0


def test_texts_of_records_are_not_in_memory_while_a_cache_is_made(tmp_path):
  names = ["".join(letters) for letters in itertools.islice(itertools.product("abcde", repeat=5), 100)]
  lines = [{"question": f"{name} {'word ' * 2_000}", "answer": f"She paid {name}.\nHe left."} for name in names]
  some = gsm8k(tmp_path, lines, task__name="records", mistakes__classes=("sentence",), data__num_heldout=2)
  tracemalloc.start()
  try:
    with Disk(tmp_path).records() as kept:
      contents = mixture.transcripts(some, "train", kept=kept)
      gc.collect()
      now, peak = tracemalloc.get_traced_memory()
      assert (len(contents), list(contents[90:])) == (98, list(mixture.transcripts(some, "train"))[90:])
  finally:
    tracemalloc.stop()
  assert now < 300_000 < 1_000_000 < (tmp_path / "r.jsonl").stat().st_size
  assert peak < 900_000


def test_an_array_on_a_disk_has_its_room_before_it_is_written_to(tmp_path):
  array = Disk(tmp_path).array("train", "token", (64, 4096), 0, np.int32)
  status = (tmp_path / "train_token.npy").stat()
  assert status.st_blocks * 512 >= status.st_size > array.nbytes


def test_generated_problems_are_not_put_into_the_cache(tmp_path):
  sizes = {"task__name": "multiplication", "task__min_size": 3, "task__max_size": 5, "data__num_records": 3}
  some = config(data__path="", mistakes__source="injected", data__cache=str(tmp_path / "cache"), **sizes)
  pipeline.load_data(some, vocabulary.open_tokenizer(some).tokenizer)
  assert not (tmp_path / "cache").exists()
  said = "is not used: it keeps rows of records, and task.name='multiplication' makes its problems at each start"
  assert cache.unused(some) == f"data.cache={tmp_path}/cache {said}"
  assert cache.unused(in_memory(some)) == cache.unused(cached(tmp_path)) == ""

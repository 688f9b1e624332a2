"""Work in chunks goes on after a kill, is never mixed with other work, and is joined once."""

import os
import threading

import pytest

from insec_jax.command import InputError
from insec_jax.files.chunks import ChunkStore, one_process

HEADER = {"the weights": "ab", "classes": ("early",)}


@pytest.fixture
def output(tmp_path):
  return str(tmp_path / "out.jsonl")


def test_chunks_of_all_processes_come_back_in_order_and_the_folder_goes(output):
  parts = ChunkStore(output, HEADER)
  for chunk, process in ((2, 0), (0, 0), (1, 1)):
    assert parts.join(3, list) is None
    parts.append(chunk, f"of {chunk}", process=process)
  assert ChunkStore(output, HEADER).join(3, list) == ["of 0", "of 1", "of 2"]
  assert not parts.folder.exists()
  assert parts.join(3, list) is None


def test_a_line_that_a_kill_cut_short_is_done_again(output):
  parts = ChunkStore(output, HEADER)
  parts.append(0, "whole", process=0)
  parts.append(2, "cut", process=0)
  file = parts.folder / "0.jsonl"
  file.write_bytes(file.read_bytes()[:-4])
  assert parts.read() == {0: "whole"}
  parts.append(2, "again", process=0)
  assert parts.read() == {0: "whole", 2: "again"}


def test_a_part_whose_header_a_kill_cut_short_counts_for_nothing(output):
  parts = ChunkStore(output, HEADER)
  parts.folder.mkdir()
  (parts.folder / "0.jsonl").write_bytes(b'{"the weig')
  assert parts.read() == {}
  parts.append(1, "x", process=0)
  assert parts.read() == {1: "x"}


def test_a_follower_is_given_each_chunk_once_and_reads_only_what_is_new(output, monkeypatch):
  parts = ChunkStore(output, HEADER)
  finished = ChunkStore(output, HEADER).follow()
  assert finished() == {}
  parts.append(0, "a", process=0)
  parts.append(1, "b", process=1)
  assert finished() == {0: "a", 1: "b"}
  read = []
  parse = ChunkStore._parse
  monkeypatch.setattr(ChunkStore, "_parse", lambda self, line, where: read.append(where) or parse(self, line, where))
  assert finished() == {}
  parts.append(2, "c", process=0)
  with open(parts.folder / "1.jsonl", "ab") as file:
    file.write(b'{"chunk": 3')  # being written
  assert finished() == {2: "c"}
  assert [where.rsplit("/", 1)[1] for where in read] == ["0.jsonl:3"]
  parts.append(3, "d", process=1)
  assert finished() == {3: "d"}


def test_parts_of_other_work_are_refused_and_named_or_discarded_when_asked(output):
  ChunkStore(output, HEADER).append(0, "x", process=3)
  other = ChunkStore(output, {**HEADER, "the weights": "cd"})
  with pytest.raises(InputError, match=r"3\.jsonl was begun with the weights='ab', now it is 'cd'"):
    other.read()
  ChunkStore(output, HEADER).discard_others()
  assert ChunkStore(output, HEADER).read() == {0: "x"}
  other.discard_others()
  assert other.read() == {}


def test_parts_begun_with_keys_that_no_longer_count_go_on_whatever_their_value(output):
  ChunkStore(output, {"a": 1, "data.cache": "x"}).append(0, "zero", process=0)
  assert ChunkStore(output, {"a": 1}, is_free=lambda name: name == "data.cache").read() == {0: "zero"}
  with pytest.raises(InputError, match=r"was begun with data\.cache='x', now it is None"):
    ChunkStore(output, {"a": 1}).read()
  with pytest.raises(InputError, match="was begun with a=1, now it is 2"):
    ChunkStore(output, {"a": 2}, is_free=lambda _: True).read()


def test_of_two_that_end_together_one_joins(output):
  parts = ChunkStore(output, HEADER)
  parts.append(0, "x", process=0)
  inside, found = threading.Event(), []

  def slowly(chunks):
    inside.set()
    second.start()
    second.join(0.3)  # it waits
    assert second.is_alive()
    return chunks

  second = threading.Thread(target=lambda: found.append(ChunkStore(output, HEADER).join(1, list)))
  assert parts.join(1, slowly) == ["x"]
  second.join()
  assert inside.is_set()
  assert found == [None]
  assert not os.path.exists(parts.folder)


@pytest.mark.parametrize(
  ("old", "new"),
  [
    (b'"whole"', b'"whale"'),
    (b'"value"', b'"valve"'),
    (b'{"chunk"', b'{"chunk'),
    (b"whole", b"\xff\xfe"),
    (b'{"chunk": 0', b'{"chunk": 5'),
    (b'"whole"', b"NaN"),
    (b'{"the weights"', b'[{"the weights"'),
  ],
)
def test_damage_in_a_part_is_one_line_with_its_place_and_a_remedy(output, old, new):
  parts = ChunkStore(output, HEADER)
  parts.append(0, "whole", process=0)
  file = parts.folder / "0.jsonl"
  assert old in file.read_bytes()
  file.write_bytes(file.read_bytes().replace(old, new))
  with pytest.raises(InputError, match=r"0\.jsonl:[12]") as error:
    parts.read()
  assert str(error.value).endswith(f"; remove {parts.folder}, and it is done again")
  assert "\n" not in str(error.value)
  parts.discard_others()
  assert parts.read() == {}


def test_a_process_id_has_one_process_at_a_time(output):
  with (
    one_process(output, 0),
    one_process(output, 1),
    pytest.raises(InputError, match=r"0\.jsonl is being written by process"),
    one_process(output, 0),
  ):
    pass
  with one_process(output, 0):
    pass


def test_chunks_of_processes_that_share_a_bucket_come_back_and_the_objects_go(bucket):
  output = f"{bucket.url}/out.jsonl"
  with one_process(output, 0):
    parts = ChunkStore(output, HEADER)
    for chunk, process in ((2, 0), (0, 0), (1, 1)):
      assert parts.join(3, list) is None
      parts.append(chunk, f"of {chunk}", process=process)
    assert bucket.names("out.jsonl.parts/") == [f"out.jsonl.parts/{name}.jsonl" for name in ("0.0", "0.2", "1.1")]
    with pytest.raises(InputError, match=f"{bucket.url}/out.jsonl.parts/0.0.jsonl was begun with the weights='ab'"):
      ChunkStore(output, {"the weights": "cd", "classes": ["early"]}).read()
    assert ChunkStore(output, HEADER).join(3, list) == ["of 0", "of 1", "of 2"]
    assert bucket.names("out") == []
    assert parts.read() == {}
    assert parts.join(3, list) is None


def test_a_follower_of_a_bucket_is_given_each_chunk_once(bucket):
  parts = ChunkStore(f"{bucket.url}/out.jsonl", HEADER)
  finished = parts.follow()
  parts.append(0, "a", process=0)
  assert finished() == {0: "a"}
  assert finished() == {}
  parts.append(1, "b", process=1)
  (parts.folder / "1.1.jsonl").unlink()  # as where another host wrote it
  assert finished() == {1: "b"}

"""Files are whole or not there, and replace nothing that they should not."""

import json
import os
import pathlib

import pytest

from insec_jax.command import InputError
from insec_jax.files import writing


def test_a_file_appears_whole_or_leaves_what_was_there(tmp_path):
  path = tmp_path / "o.json"
  with writing.written_whole(str(path)) as file:
    file.write("[1, ")
    assert not path.exists()
    file.write("2]")
  assert json.loads(path.read_text()) == [1, 2]

  def fail():
    with writing.written_whole(str(path)) as file:
      file.write("[3")
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  assert json.loads(path.read_text()) == [1, 2]
  assert sorted(os.listdir(tmp_path)) == ["o.json"]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  for text, reason in (
    (tmp_path / "none" / "o", "no folder"),
    (tmp_path, "is a folder"),
    (tmp_path / "fifo", "is a FIFO"),
    (f"{tmp_path}/o/", "is a folder"),
  ):
    with pytest.raises(InputError, match=reason), writing.written_whole(str(text)):
      pytest.fail("the work began")
  assert sorted(os.listdir(tmp_path)) == ["fifo"]


def test_a_device_is_written_to_and_not_replaced():
  before = os.stat("/dev/null")
  with writing.written_whole("/dev/null") as file:
    file.write("nothing")
  assert os.stat("/dev/null").st_rdev == before.st_rdev


def test_a_link_is_followed_and_the_mode_of_the_file_stays(tmp_path):
  (tmp_path / "target").write_text("old")
  (tmp_path / "target").chmod(0o640)
  (tmp_path / "link").symlink_to("target")
  with writing.written_whole(str(tmp_path / "link")) as file:
    file.write("new")
  assert (tmp_path / "link").is_symlink()
  assert (tmp_path / "target").read_text() == "new"
  assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640


def test_partial_files_of_other_names_are_left_alone(tmp_path):
  for name in (".o.bak.1-0123abcd.partial", ".o.1-0123abcd.partial", "o.partial"):
    (tmp_path / name).write_text("of another")
  with writing.written_whole(str(tmp_path / "o")) as file:
    file.write("1")
  assert sorted(os.listdir(tmp_path)) == [".o.bak.1-0123abcd.partial", "o", "o.partial"]


def test_the_writer_of_a_folder_leaves_what_another_writes_into_it(tmp_path):
  results = tmp_path / "results.json"
  with writing.written_whole(str(results)) as file:  # evaluate, while train begins in the same workdir
    file.write("1")
    (tmp_path / ".config.json.1-0123abcd.partial").write_text("of a run that was killed")
    with writing.folder_writer(tmp_path, "--workdir"):
      assert not (tmp_path / ".config.json.1-0123abcd.partial").exists()
  assert results.read_text() == "1"


def test_an_output_never_replaces_an_input_and_the_root_is_no_folder_of_a_run(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_text("{}\n")
  (tmp_path / "link").symlink_to(path)
  for output in (path, tmp_path / "link"):
    with pytest.raises(InputError, match="is a file that the program reads"):
      writing.check_output(str(output), "--output", ["", str(tmp_path / "none"), str(path)])
  assert writing.check_output(str(path), "--output", [str(tmp_path / "none")]) == path
  with (
    pytest.raises(InputError, match="root of the file system"),
    writing.folder_writer(pathlib.Path("/"), "--workdir"),
  ):
    pass

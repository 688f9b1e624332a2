"""Paths and files of a user are read, or refused with file and line."""

import gzip
import os
import pathlib

import pytest

from insec_jax.command import InputError
from insec_jax.files import reading


@pytest.mark.parametrize(
  "text", ["", "gs://bucket", "hf://x", "s3://x/y", "a\0b", "~nobody-of-that-name/o", "\udcff", "x" * 5000]
)
def test_a_path_that_cannot_be_is_refused_by_its_flag(text):
  with pytest.raises(InputError, match=r"^--workdir"):
    reading.local_path(text, "--workdir")


def test_a_tilde_is_the_home_folder(monkeypatch):
  monkeypatch.setenv("HOME", "/home/somebody")
  assert reading.local_path("~/r", "--workdir") == pathlib.Path("/home/somebody/r")


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    (b'{"a": NaN}', "NaN"),
    (b'{"a": -Infinity}', "Infinity"),
    (b'{"a": 1, "a": 2}', "given twice"),
    (b"[" * 10**5, "deep"),
    (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
    (b'{"a": "\xff"}', "byte 7"),
    (b"{", "column 2"),
    (b"\xef\xbb\xbf{}", "BOM"),
    (b"", "column 1"),
  ],
)
def test_what_is_no_strict_json_is_refused_with_its_place(text, reason):
  with pytest.raises(InputError, match=reason) as error:
    reading.parse_json(text, "f:3")
  assert str(error.value).startswith("f:3: ")
  assert "\n" not in str(error.value)


def test_compressed_json_lines_are_read_and_a_damaged_file_is_refused(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
  assert list(reading.read_json_lines(path, "data.path")) == [({"a": 1}, f"{path}:1"), ({"a": 2}, f"{path}:2")]
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(InputError, match="damaged"):
    list(reading.read_json_lines(path, "data.path"))


def test_what_is_no_regular_file_is_not_read(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  for path, reason in (
    (tmp_path / "fifo", "a FIFO"),
    (tmp_path, "a folder"),
    ("/dev/zero", "a device"),
    (tmp_path / "none", "No such file"),
  ):
    with pytest.raises(InputError, match=reason):
      reading.open_to_read(path, "data.path")


def test_a_byte_order_mark_is_read_over_and_gzip_data_under_another_name_is_named(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n{"a": 2}\n')
  assert [values for values, _ in reading.read_json_lines(path, "records")] == [{"a": 1}, {"a": 2}]
  path.write_bytes(gzip.compress(b"{}\n"))
  with pytest.raises(InputError, match=r"p\.jsonl is compressed by gzip; give it a name that ends in \.gz"):
    list(reading.read_json_lines(path, "records"))
  again = tmp_path / "q.jsonl.gz"
  again.write_bytes(gzip.compress(path.read_bytes()))
  with pytest.raises(InputError, match="gzip twice"):
    list(reading.read_json_lines(again, "records"))

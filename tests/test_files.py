"""Files are whole or not there, have one writer, and say with file and line what is wrong in them."""

import errno
import fcntl
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from insec_jax import files
from insec_jax.command import InputError

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
# Holds the folder argv[1] for argv[2] seconds and then writes the file argv[3] whole.
WRITER = """
import pathlib, sys, time
from insec_jax import command, files

def main():
  _, folder, seconds, output = sys.argv
  with files.folder_writer(pathlib.Path(folder), "--workdir"), files.written_whole(output) as file:
    print("holds", flush=True)
    time.sleep(float(seconds))
    file.write("written")

command._parse_flags = lambda: None
command.run(main)
"""


@pytest.fixture
def begin(tmp_path):
  running = []

  def begin(seconds, folder="w", output="o.txt"):
    process = subprocess.Popen(
      [sys.executable, "-c", WRITER, folder, str(seconds), output],
      cwd=tmp_path,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=ENVIRONMENT,
    )
    running.append(process)
    return process

  yield begin
  for process in running:
    process.kill()
    process.communicate()


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_leaves_what_was_there(tmp_path):
  path = tmp_path / "o.json"
  with files.written_whole(str(path)) as file:
    file.write("[1, ")
    assert not path.exists()
    file.write("2]")
  assert json.loads(path.read_text()) == [1, 2]

  def fail():
    with files.written_whole(str(path)) as file:
      file.write("[3")
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  assert json.loads(path.read_text()) == [1, 2]
  assert names(tmp_path) == ["o.json"]


def test_a_second_writer_is_told_process_host_and_time_and_disturbs_nothing(begin, tmp_path):
  first = begin(5)
  assert first.stdout.readline() == "holds\n"
  for second in [begin(0, "w", "other.txt"), begin(0, "v", "o.txt")]:
    _, said = second.communicate(timeout=20)
    assert second.returncode == 2
    assert f"is being written by process {first.pid} on {os.uname().nodename} since 20" in said
    assert said.count("\n") == 1
  assert first.wait(20) == 0
  assert names(tmp_path) == ["o.txt"]
  assert (tmp_path / "o.txt").read_text() == "written"


def test_a_killed_writer_leaves_no_lock_and_its_partial_file_is_removed(begin, tmp_path):
  first = begin(60)
  assert first.stdout.readline() == "holds\n"
  os.kill(first.pid, signal.SIGKILL)
  first.wait()
  assert names(tmp_path) != ["o.txt"]
  start = time.monotonic()
  second = begin(0)
  assert second.communicate(timeout=20)[1] == ""
  assert time.monotonic() - start < 5
  assert names(tmp_path) == ["o.txt", "w"]
  assert names(tmp_path / "w") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_writer_with_one_line_and_leaves_nothing(begin, tmp_path, number):
  process = begin(60)
  assert process.stdout.readline() == "holds\n"
  process.send_signal(number)
  assert process.communicate(timeout=20)[1] == f"{number.name}: ended before it was done\n"
  assert process.returncode == 128 + number
  assert names(tmp_path) == []


@pytest.fixture
def other_host(tmp_path, monkeypatch):
  """A lock file of a process of another host, whose file locks are not seen here."""
  monkeypatch.setattr(files, "SILENCE_SECONDS", 1.5)
  monkeypatch.setattr(files, "GRACE_SECONDS", 0)
  holder = files._Holder.here()
  holder.fields |= {"host": "elsewhere", "boot": "another", "process": 17}
  lock = tmp_path / ".o.lock"
  lock.write_bytes(holder.line(0))
  return lock, holder


def test_a_writer_of_another_host_is_heard_by_its_sign_of_life(other_host, monkeypatch):
  lock, holder = other_host
  beats = iter(range(1, 1000))
  sleep = time.sleep
  monkeypatch.setattr(time, "sleep", lambda _: (sleep(0.01), lock.write_bytes(holder.line(next(beats)))))
  with pytest.raises(InputError, match="process 17 on elsewhere since"), files.one_writer(lock, "o", "--output"):
    pytest.fail("two writers")


def test_a_silent_writer_of_another_host_is_followed_by_the_next(other_host, capsys):
  lock, _ = other_host
  with files.one_writer(lock, "o", "--output"):
    assert files._Holder.read(lock).fields["process"] == os.getpid()
  assert not lock.exists()
  assert "waiting 1.5 s for a sign of life" in capsys.readouterr().err


def test_a_drive_without_file_locks_still_has_one_writer(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOTSUP, "not supported")

  monkeypatch.setattr(fcntl, "flock", refuse)
  monkeypatch.setattr(files, "BEAT_SECONDS", 0.1)
  monkeypatch.setattr(files, "SILENCE_SECONDS", 1)
  monkeypatch.setattr(files, "GRACE_SECONDS", 0)
  lock = tmp_path / ".o.lock"
  with (
    files.one_writer(lock, "o", "--output"),
    pytest.raises(InputError, match=f"process {os.getpid()} on"),
    files.one_writer(lock, "o", "--output"),
  ):
    pytest.fail("two writers")
  with files.one_writer(lock, "o", "--output"):
    pass


@pytest.mark.parametrize(
  "text", ["", "gs://bucket/o", "hf://x", "s3://x/y", "a\0b", "~nobody-of-that-name/o", "\udcff", "x" * 5000]
)
def test_a_path_that_cannot_be_is_refused_by_its_flag(text):
  with pytest.raises(InputError, match=r"^--workdir"):
    files.local_path(text, "--workdir")


def test_a_tilde_is_the_home_folder(monkeypatch):
  monkeypatch.setenv("HOME", "/home/somebody")
  assert files.local_path("~/r", "--workdir") == pathlib.Path("/home/somebody/r")


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  for text, reason in (
    (tmp_path / "none" / "o", "no folder"),
    (tmp_path, "is a folder"),
    (tmp_path / "fifo", "is a FIFO"),
    (f"{tmp_path}/o/", "is a folder"),
  ):
    with pytest.raises(InputError, match=reason), files.written_whole(str(text)):
      pytest.fail("the work began")
  assert names(tmp_path) == ["fifo"]


def test_a_device_is_written_to_and_not_replaced():
  before = os.stat("/dev/null")
  with files.written_whole("/dev/null") as file:
    file.write("nothing")
  assert os.stat("/dev/null").st_rdev == before.st_rdev


def test_a_link_is_followed_and_the_mode_of_the_file_stays(tmp_path):
  (tmp_path / "target").write_text("old")
  (tmp_path / "target").chmod(0o640)
  (tmp_path / "link").symlink_to("target")
  with files.written_whole(str(tmp_path / "link")) as file:
    file.write("new")
  assert (tmp_path / "link").is_symlink()
  assert (tmp_path / "target").read_text() == "new"
  assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640


def test_partial_files_of_other_names_are_left_alone(tmp_path):
  for name in (".o.bak.1-0123abcd.partial", ".o.1-0123abcd.partial", "o.partial"):
    (tmp_path / name).write_text("of another")
  with files.written_whole(str(tmp_path / "o")) as file:
    file.write("1")
  assert names(tmp_path) == [".o.bak.1-0123abcd.partial", "o", "o.partial"]


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
    files.parse_json(text, "f:3")
  assert str(error.value).startswith("f:3: ")
  assert "\n" not in str(error.value)


def test_compressed_json_lines_are_read_and_a_damaged_file_is_refused(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
  assert list(files.read_json_lines(path, "data.path")) == [({"a": 1}, f"{path}:1"), ({"a": 2}, f"{path}:2")]
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(InputError, match="damaged"):
    list(files.read_json_lines(path, "data.path"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_stands_in_place_of_a_lock_is_named_and_not_opened(tmp_path, make):
  make(tmp_path / ".lock")
  with pytest.raises(InputError, match="needed is a file for a lock"), files.folder_writer(tmp_path, "--workdir"):
    pass
  assert not files.is_held(tmp_path / ".lock")


def test_what_is_no_regular_file_is_not_read(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  for path, reason in (
    (tmp_path / "fifo", "a FIFO"),
    (tmp_path, "a folder"),
    ("/dev/zero", "a device"),
    (tmp_path / "none", "No such file"),
  ):
    with pytest.raises(InputError, match=reason):
      files.open_to_read(path, "data.path")


def test_the_writer_of_a_folder_leaves_what_another_writes_into_it(tmp_path):
  results = tmp_path / "results.json"
  with files.written_whole(str(results)) as file:  # evaluate, while train begins in the same workdir
    file.write("1")
    (tmp_path / ".config.json.1-0123abcd.partial").write_text("of a run that was killed")
    with files.folder_writer(tmp_path, "--workdir"):
      assert not (tmp_path / ".config.json.1-0123abcd.partial").exists()
  assert results.read_text() == "1"


def test_an_output_never_replaces_an_input_and_the_root_is_no_folder_of_a_run(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_text("{}\n")
  (tmp_path / "link").symlink_to(path)
  for output in (path, tmp_path / "link"):
    with pytest.raises(InputError, match="is a file that the program reads"):
      files.check_output(str(output), "--output", ["", str(tmp_path / "none"), str(path)])
  assert files.check_output(str(path), "--output", [str(tmp_path / "none")]) == path
  with pytest.raises(InputError, match="root of the file system"), files.folder_writer(pathlib.Path("/"), "--workdir"):
    pass


def test_a_byte_order_mark_is_read_over_and_gzip_data_under_another_name_is_named(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n{"a": 2}\n')
  assert [values for values, _ in files.read_json_lines(path, "records")] == [{"a": 1}, {"a": 2}]
  path.write_bytes(gzip.compress(b"{}\n"))
  with pytest.raises(InputError, match=r"p\.jsonl is compressed by gzip; give it a name that ends in \.gz"):
    list(files.read_json_lines(path, "records"))
  again = tmp_path / "q.jsonl.gz"
  again.write_bytes(gzip.compress(path.read_bytes()))
  with pytest.raises(InputError, match="gzip twice"):
    list(files.read_json_lines(again, "records"))


def test_a_lock_that_was_just_made_is_removed_when_the_process_ends(tmp_path):
  code = f"""
import pathlib, threading, time
from insec_jax import files, stop_signal
here = files._Holder.here
def slow():  # the process is ended while the lock file has no content yet
  threading.Thread(target=stop_signal.end, args=(7,)).start()
  time.sleep(1)
  return here()
files._Holder.here = slow
with files.one_writer(pathlib.Path({str(tmp_path)!r}) / ".lock", "a", "--output"):
  time.sleep(20)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=20, check=False)
  assert done.returncode == 7
  assert not list(tmp_path.iterdir())

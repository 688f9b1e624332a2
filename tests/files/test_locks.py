"""A file or a folder has one writer; a second one is answered with a line about the first."""

import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from insec_jax.command import InputError
from insec_jax.files import locks, writing

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
# Holds the folder argv[1] for argv[2] seconds and then writes the file argv[3] whole.
WRITER = """
import pathlib, sys, time
from insec_jax import command
from insec_jax.files.writing import folder_writer, written_whole

def main():
  _, folder, seconds, output = sys.argv
  with folder_writer(pathlib.Path(folder), "--workdir"), written_whole(output) as file:
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


def test_a_second_writer_is_told_process_host_and_time_and_disturbs_nothing(begin, tmp_path):
  first = begin(5)
  assert first.stdout.readline() == "holds\n"
  for second in [begin(0, "w", "other.txt"), begin(0, "v", "o.txt")]:
    _, said = second.communicate(timeout=20)
    assert second.returncode == 2
    assert f"is being written by process {first.pid} on {os.uname().nodename} since 20" in said
    assert said.count("\n") == 1
  assert first.wait(20) == 0
  assert sorted(os.listdir(tmp_path)) == ["o.txt"]
  assert (tmp_path / "o.txt").read_text() == "written"


def test_a_killed_writer_leaves_no_lock_and_its_partial_file_is_removed(begin, tmp_path):
  first = begin(60)
  assert first.stdout.readline() == "holds\n"
  os.kill(first.pid, signal.SIGKILL)
  first.wait()
  assert sorted(os.listdir(tmp_path)) != ["o.txt"]
  start = time.monotonic()
  second = begin(0)
  assert second.communicate(timeout=20)[1] == ""
  assert time.monotonic() - start < 5
  assert sorted(os.listdir(tmp_path)) == ["o.txt", "w"]
  assert sorted(os.listdir(tmp_path / "w")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_writer_with_one_line_and_leaves_nothing(begin, tmp_path, number):
  process = begin(60)
  assert process.stdout.readline() == "holds\n"
  process.send_signal(number)
  assert process.communicate(timeout=20)[1] == f"{number.name}: ended before it was done\n"
  assert process.returncode == 128 + number
  assert sorted(os.listdir(tmp_path)) == []


@pytest.fixture
def other_host(tmp_path, monkeypatch):
  """A lock file of a process of another host, whose file locks are not seen here."""
  monkeypatch.setattr(locks, "SILENCE_SECONDS", 1.5)
  monkeypatch.setattr(locks, "GRACE_SECONDS", 0)
  holder = locks.Holder.here()
  holder.fields |= {"host": "elsewhere", "boot": "another", "process": 17}
  lock = tmp_path / ".o.lock"
  lock.write_bytes(holder.line(0))
  return lock, holder


def test_a_writer_of_another_host_is_heard_by_its_sign_of_life(other_host, monkeypatch):
  lock, holder = other_host
  beats = iter(range(1, 1000))
  sleep = time.sleep
  monkeypatch.setattr(time, "sleep", lambda _: (sleep(0.01), lock.write_bytes(holder.line(next(beats)))))
  with pytest.raises(InputError, match="process 17 on elsewhere since"), locks.one_writer(lock, "o", "--output"):
    pytest.fail("two writers")


def test_a_silent_writer_of_another_host_is_followed_by_the_next(other_host, capsys):
  lock, _ = other_host
  with locks.one_writer(lock, "o", "--output"):
    assert locks.Holder.read(lock).fields["process"] == os.getpid()
  assert not lock.exists()
  assert "waiting 1.5 s for a sign of life" in capsys.readouterr().err


def test_a_drive_without_file_locks_still_has_one_writer(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOTSUP, "not supported")

  monkeypatch.setattr(fcntl, "flock", refuse)
  monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
  monkeypatch.setattr(locks, "SILENCE_SECONDS", 1)
  monkeypatch.setattr(locks, "GRACE_SECONDS", 0)
  lock = tmp_path / ".o.lock"
  with (
    locks.one_writer(lock, "o", "--output"),
    pytest.raises(InputError, match=f"process {os.getpid()} on"),
    locks.one_writer(lock, "o", "--output"),
  ):
    pytest.fail("two writers")
  with locks.one_writer(lock, "o", "--output"):
    pass


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_stands_in_place_of_a_lock_is_named_and_not_opened(tmp_path, make):
  make(tmp_path / ".lock")
  with pytest.raises(InputError, match="needed is a file for a lock"), writing.folder_writer(tmp_path, "--workdir"):
    pass
  assert not locks.is_held(tmp_path / ".lock")


def test_a_lock_that_was_just_made_is_removed_when_the_process_ends(tmp_path):
  code = f"""
import pathlib, threading, time
from insec_jax import stop_signal
from insec_jax.files import locks
here = locks.Holder.here
def slow():  # the process is ended while the lock file has no content yet
  threading.Thread(target=stop_signal.end, args=(7,)).start()
  time.sleep(1)
  return here()
locks.Holder.here = slow
with locks.one_writer(pathlib.Path({str(tmp_path)!r}) / ".lock", "a", "--output"):
  time.sleep(20)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=20, check=False)
  assert done.returncode == 7
  assert not list(tmp_path.iterdir())

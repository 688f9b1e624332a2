"""SIGINT, SIGTERM and SIGHUP at every moment of every program: one line, a documented code, nothing lost."""

import signal

import pytest
import tries
from tries import check_goes_on, left_over, signalled, signalled_at

pytestmark = pytest.mark.faults
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
RESUMED = ("train", "sweep")
# Seconds: while Python starts, while it imports, while it reads data, compiles, works.
MOMENTS = (0.15, 0.4, 0.7, 1.0, 1.4, 1.8, 2.2, 2.6, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
OTHERS = (0.3, 1.2, 2.4, 4.0, 6.0)


@pytest.mark.parametrize("number", [INT, TERM, HUP], ids=("INT", "TERM", "HUP"))
@pytest.mark.parametrize("delay", MOMENTS)
def test_a_signal_at_any_moment_of_train_ends_with_42_and_the_run_goes_on(home, tmp_path, delay, number):
  if number == HUP and MOMENTS.index(delay) % 3:
    pytest.skip("SIGHUP is tried at every third moment")
  signalled(home, "train", tmp_path, delay, number).check(0, 42)
  assert not left_over(tmp_path)
  if MOMENTS.index(delay) % 3 == 1:
    check_goes_on(home, tmp_path)


@pytest.mark.parametrize("delay", OTHERS)
@pytest.mark.parametrize("program", [name for name in tries.PROGRAMS if name not in ("train", "fit")])
def test_a_signal_ends_every_other_program_with_one_line(home, tmp_path, program, delay):
  number = (INT, TERM, HUP)[OTHERS.index(delay) % 3]
  signalled(home, program, tmp_path, delay, number).check(0, 42 if program in RESUMED else 128 + number)
  assert not left_over(tmp_path)


@pytest.mark.parametrize("text", ["step 1/6", "step 2/6", "step 4/6", "train step compiled", "parameters;"])
@pytest.mark.parametrize("number", [INT, TERM], ids=("INT", "TERM"))
def test_a_signal_in_the_loop_is_saved_and_loses_nothing(home, tmp_path, text, number):
  signalled_at(home, "train", tmp_path, text, number).check(0, 42)
  assert not left_over(tmp_path)
  if number == TERM:
    check_goes_on(home, tmp_path)


@pytest.mark.parametrize("text", ["mine round_1", "round 1 of 3", "step 2/6", "round 2 of 3"])
def test_a_signal_in_a_round_of_mining_is_42_and_the_run_goes_on(home, tmp_path, text):
  program = ("train", "--config=config.py:rounds", "--workdir=OUT/w")
  signalled_at(home, program, tmp_path, text, TERM).check(0, 42)
  tries.attempt(home, program, tmp_path).check(0)
  assert not left_over(tmp_path)


@pytest.mark.parametrize("delay", [0.15, 0.3, 0.5, 0.8, 1.5, 2.5, 4.0, 6.0])
def test_ctrl_c_twice_at_any_moment_of_train_ends_at_once_with_42(home, tmp_path, delay):
  signalled(home, "train", tmp_path, delay, INT, INT).check(0, 42)
  assert not left_over(tmp_path)


@pytest.mark.parametrize("delay", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("program", ["generate", "sweep", "preview"])
def test_ctrl_c_three_times_ends_other_programs_with_one_line(home, tmp_path, program, delay):
  signalled(home, program, tmp_path, delay, INT, INT, INT).check(0, 42 if program == "sweep" else 130)
  assert not left_over(tmp_path)


def test_a_signal_while_nobody_reads_stdout_ends_the_program(home, tmp_path):
  import os
  import subprocess

  read, write = os.pipe()
  os.set_blocking(write, False)
  try:
    while True:
      os.write(write, b"x" * 4096)
  except BlockingIOError:
    os.set_blocking(write, True)
  process = tries.start(home, "preview", tmp_path, stdout=write, stderr=subprocess.PIPE)
  os.close(write)
  import time

  time.sleep(10)
  process.terminate()
  ending = tries.finish(process, 30)
  os.close(read)
  ending.check(143)

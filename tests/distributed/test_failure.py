"""Whose fault an end is; whole runs are in test_processes.py."""

from insec_jax.command import FAILED, WRONG_INPUT
from insec_jax.distributed.failure import ExitStatus, FailureDetector

NAMES = ("a", "b", "c")


def judge_all(detector, *times, beats=lambda time: [time] * 3, failed=lambda _: {}):
  """The first status at these times, with its time."""
  for now in times:
    if status := detector.diagnose(dict(enumerate(beats(now))), failed(now), now):
      return now, status
  return None


def test_a_silent_process_is_gone_after_30_seconds_or_soon_once_another_has_failed():
  time, status = judge_all(FailureDetector(NAMES), *range(99), beats=lambda time: [time, min(time, 9), time])
  assert (time, status.code) == (40, FAILED)
  assert status.line.startswith("missing: process 1 (b), no sign of life for 31 s; start the same command again")
  time, status = judge_all(
    FailureDetector(NAMES),
    *range(99),
    beats=lambda time: [time, min(time, 9), time],
    failed=lambda time: {2: (FAILED, "Gloo: closed")} if time > 10 else {},
  )
  assert time == 15
  assert status.line.startswith("missing: process 1 (b)")


def test_a_failure_while_all_live_is_the_fault_of_the_first_that_failed():
  def failed(time):
    return {index: (FAILED, f"ValueError: {index}") for index in (0, 2) if time > (20 if index == 0 else 10)}

  assert judge_all(FailureDetector(NAMES), *range(99), failed=failed) == (
    18,
    ExitStatus(FAILED, "process 2 (c): ValueError: 2"),
  )


def test_what_all_find_wrong_is_said_once_without_a_name():
  failed = dict.fromkeys(range(3), (WRONG_INPUT, "bad"))
  assert judge_all(FailureDetector(NAMES), 1, failed=lambda _: failed) == (1, ExitStatus(WRONG_INPUT, "bad"))
  assert judge_all(FailureDetector(NAMES), *range(9), failed=lambda _: {1: failed[1]})[1].line == "process 1 (b): bad"

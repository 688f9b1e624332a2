"""Stages are small Python programs here."""

import os
import signal
import sys
import threading
import time

import pytest

from insec_jax import stages, stop_signal
from insec_jax.command import InputError
from insec_jax.stages import ChildPrograms, Stage, run_stages, shares_of_cores, stop_on_signal


def stage(folder, name, code, *, after=(), done=lambda: False):
  return Stage(name, (sys.executable, "-c", code), folder / f"{name}.log", done, after)


def test_a_stage_waits_for_those_it_comes_after(tmp_path):
  said = tmp_path / "said"
  write = f"open({str(said)!r}, 'a').write"
  stages = [
    stage(tmp_path, "second", f"{write}('2')", after=("first",)),
    stage(tmp_path, "first", f"import time; time.sleep(.3); {write}('1')"),
  ]
  outcomes = run_stages(stages, [None, None], ChildPrograms())
  assert outcomes == {"first": "done", "second": "done"}
  assert said.read_text() == "12"


def test_a_failed_stage_is_named_with_its_exit_code_and_last_lines_and_others_go_on(tmp_path, capfd):
  outcomes = run_stages(
    [
      stage(tmp_path, "bad", "print('\\n'.join(map(str, range(90, 120)))); raise SystemExit(3)"),
      stage(tmp_path, "needs it", "", after=("bad",)),
      stage(tmp_path, "needs that", "", after=("needs it",)),
      stage(tmp_path, "other", ""),
    ],
    [None],
    ChildPrograms(),
  )
  assert outcomes == {"bad": "failed", "needs it": "left out", "needs that": "left out", "other": "done"}
  said = capfd.readouterr().err
  assert f"bad ended with exit code 3; the last lines of {tmp_path / 'bad.log'}:\n  112\n" in said
  assert said.endswith("  119\n")
  assert "111" not in said


def test_what_is_done_is_not_run_again_and_what_cannot_go_on_fails_with_one_line(tmp_path, capfd):
  def refused():
    raise InputError("another experiment")

  outcomes = run_stages(
    [stage(tmp_path, "was", "raise SystemExit(1)", done=lambda: True), stage(tmp_path, "is other", "", done=refused)],
    [None],
    ChildPrograms(),
  )
  assert outcomes == {"was": "done before", "is other": "failed"}
  assert capfd.readouterr().err == "is other: another experiment\n"
  assert not list(tmp_path.glob("*.log"))


def test_two_stages_run_side_by_side(tmp_path):
  meets = (
    "import os, sys, time\nopen({0!r}, 'w').close()\nend = time.time() + 60\n"
    "while not os.path.exists({1!r}):\n  assert time.time() < end\n  time.sleep(.01)"
  )
  one, two = str(tmp_path / "one"), str(tmp_path / "two")
  stages = [stage(tmp_path, "1", meets.format(one, two)), stage(tmp_path, "2", meets.format(two, one))]
  assert run_stages(stages, [None, None], ChildPrograms()) == {"1": "done", "2": "done"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be held to cores here")
def test_each_job_has_cores_of_its_own(tmp_path):
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < 2:
    pytest.skip("one core")
  shares = shares_of_cores(2)
  assert sorted(core for share in shares for core in share) == cores
  say = "import os, time; print(sorted(os.sched_getaffinity(0))); time.sleep(1)"
  run_stages([stage(tmp_path, name, say) for name in ("1", "2")], shares, ChildPrograms())
  said = {(tmp_path / f"{name}.log").read_text() for name in ("1", "2")}
  assert said == {f"{sorted(share)}\n" for share in shares}
  assert sorted(os.sched_getaffinity(0)) == cores
  with pytest.raises(InputError, match="is more than the"):
    shares_of_cores(len(cores) + 1)


def test_sigterm_reaches_what_runs_and_nothing_is_begun_after_it(tmp_path):
  long = "import time; print('here', flush=True); time.sleep(600)"
  with stop_on_signal() as stopping:

    def interrupt():
      while not (tmp_path / "long.log").exists() or not (tmp_path / "long.log").read_text():
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    stages = [stage(tmp_path, "long", long), stage(tmp_path, "next", "", after=("long",)), stage(tmp_path, "other", "")]
    outcomes = run_stages(stages, [None], stopping)
  assert outcomes == dict.fromkeys(("long", "next", "other"), "stopped")
  assert not (tmp_path / "other.log").exists()


def test_a_session_ends_with_sigterm_to_its_programs_and_later_stages_are_not_begun(tmp_path, monkeypatch):
  monkeypatch.setattr(stages, "LAST_SECONDS", 0)
  monkeypatch.setattr(stop_signal, "STARTED", time.monotonic() - 600)
  begun = f"import os; open({str(tmp_path / 'began')!r}, 'w').write(os.environ['{stop_signal.SESSION_BEGAN}'])"
  hangs = stage(tmp_path, "hangs", f"{begun}; import time; time.sleep(60)")
  with stop_on_signal(10 + 1 / 60) as stopping:
    outcomes = run_stages([hangs, stage(tmp_path, "next", "")], [None], stopping)
  assert outcomes == {"hangs": "stopped", "next": "stopped"}
  assert (tmp_path / "began").read_text() == str(stop_signal.STARTED)


def test_a_program_for_which_no_time_is_left_stops_a_sweep_with_a_limit_only(tmp_path):
  full = stage(tmp_path, "full", "raise SystemExit(42)")
  for minutes, outcomes in ((10, {"full": "stopped", "next": "stopped"}), (0, {"full": "failed", "next": "done"})):
    with stop_on_signal(minutes) as stopping:
      assert run_stages([full, stage(tmp_path, "next", "")], [None], stopping) == outcomes

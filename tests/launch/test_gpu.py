"""launch/gpu.sh on a pretended box (pretend/ssh.py), with a stand-in for the run, and a real run."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import launchkit
import numpy as np
import pytest
from launchkit import until
from training_runs import read_lines, write_home

# Counts its sessions, and ends with the given exit code, or waits to be stopped.
RUN = """
import os, pathlib, signal, sys, time
def save(*_):
  print("saved", flush=True)
  os._exit(42)
signal.signal(signal.SIGTERM, save)
mine = pathlib.Path.home() / "sessions"
mine.write_text((mine.read_text() if mine.exists() else "") + "1")
print("session", len(mine.read_text()), os.environ.get("JAX_PLATFORMS"), flush=True)
for line in range(int(sys.argv[2:] and sys.argv[2] or 0)):
  print("line", line, flush=True)
  time.sleep(0.02)
if sys.argv[1] == "wait":
  time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


class Box:
  """A laptop with a clone of the repository, and a box that ssh reaches."""

  def __init__(self, folder, repository, extras):
    self.repository, self.state, self.home = repository, folder / "ssh", folder / "ssh" / "hosts" / "box"
    self.home.mkdir(parents=True)
    self.here = folder / "laptop"
    self.here.mkdir()
    launchkit.prepare(self.home, repository, extras)
    ssh = f'exec {shlex.quote(sys.executable)} {shlex.quote(f"{launchkit.PRETEND}/ssh.py")} "$@"'
    launchkit.script(folder / "bin" / "ssh", ssh)
    (self.home / "run.py").write_text(RUN)
    self.extras, self.faults = extras, 0
    self.environment = {
      **launchkit.ENVIRONMENT,
      "HOME": str(self.here),
      "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
      "PRETEND_SSH": str(self.state),
      "PRETEND_RUN": str(os.getpid()),
      "INSEC_POLL_SECONDS": "0.2",
      "BOX": "box",
    }

  def gpu(self, *words, code=0, **variables):
    """The finished launcher; it must exit with this code."""
    done = subprocess.run(
      ["bash", self.repository / "launch" / "gpu.sh", *words],
      env=self.environment | variables,
      cwd=self.here,
      capture_output=True,
      text=True,
      timeout=240,
      check=False,
    )
    assert code in (None, done.returncode), done.stdout + done.stderr
    return done

  def run(self, *plan, options=(), code=0, **variables):
    words = ["run", f"--extras={self.extras}", "--no-check", *options, "python", f"{self.home}/run.py", *plan]
    return self.gpu(*words, code=code, **variables)

  def fault(self, match, **fault):
    self.faults += 1
    (self.state / f"fault.{self.faults}").write_text(json.dumps({"match": match, **fault}))

  def status(self, code=0):
    return json.loads(self.gpu("status", code=code).stdout)

  def is_lost(self):
    """Whether the launcher calls the job lost, as soon as its processes have ended."""
    return "the job run was lost" in self.gpu("status", code=None).stderr

  def log(self):
    path = self.home / "insec_jax" / "jobs" / "run" / "log"
    return path.read_text() if path.exists() else ""

  def end(self):
    path = self.home / "insec_jax" / "jobs" / "run" / "pid"
    if path.exists() and "run.py" in launchkit.command_line(int(path.read_text())):
      os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  return launchkit.clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def box(tmp_path, repository):
  made = Box(tmp_path, repository, "cuda gcs data")
  yield made
  made.end()


def test_only_the_first_connection_may_ask_the_user(box):
  first, *calls = box.run("0").stderr.split("+ ssh ")[1:]
  assert first.splitlines()[0].endswith(" box true")
  limited = [call for call in calls if re.search(r"host\.sh (has|start|status)", call)]
  assert len(limited) == 2
  assert [call for call in limited if "BatchMode=yes" not in call] == []


def test_one_word_is_a_line_of_the_shell_of_the_box_and_several_are_words(box):
  assert box.gpu("ssh", 'echo "$HOME"').stdout == f"{box.home}\n"
  assert box.gpu("ssh", "echo", "$HOME").stdout == "$HOME\n"


@pytest.mark.parametrize(
  "words", [("bash", "-c", 'echo "it\'s"\n exit 7'), ("false", "--workdir"), ("false", "--workdir=~a/b")]
)
def test_the_status_of_any_command_is_one_line_of_json(box, words):
  box.gpu("run", "--extras=cuda gcs data", "--no-check", "--wait", *words, code=None)
  assert json.loads(box.gpu("status", code=None).stdout)["state"] == "ended"


def test_variables_of_the_user_with_the_names_of_ours_change_nothing(box):
  for name in ("code", "answers"):
    (box.here / "own" / name).mkdir(parents=True)
  theirs = {
    "SCRATCH": str(box.here / "own"),
    "DRY_RUN": "0",
    "QUIET": "1",
    "DIRTY": "1",
    "AT_ONCE": "0",
    "NOTES": "notes",
  }
  assert "session 1" in box.run("0", options=["--wait"], **theirs).stdout
  assert sorted(path.name for path in (box.here / "own").iterdir()) == ["answers", "code"]


@pytest.mark.processes
def test_a_run_is_detached_seen_and_stopped_and_the_same_command_goes_on(box):
  box.run("wait")
  until(lambda: "session 1 cuda" in box.log())
  assert box.status()["state"] == "running"
  assert "ended with exit code 42" in box.gpu("stop").stdout
  assert "saved" in box.gpu("logs", code=42).stdout
  assert box.status(code=42)["code"] == 42
  assert "session 2 cuda" in box.run("0", options=["--wait"]).stdout


@pytest.mark.processes
def test_a_connection_that_breaks_at_each_place_changes_nothing_but_the_time(box):
  for match in ("host.sh has", "host.sh unpack", "host.sh setup", "host.sh start"):
    box.fault(match, **({"stdin": 100} if match != "host.sh setup" else {"refuse": True}))
  box.fault("host.sh number", stdout=400)
  box.fault("host.sh status", refuse=True)
  done = box.run("3", "100", options=["--wait"], code=3)
  assert list(box.state.glob("fault.*")) == []
  assert [line for line in done.stdout.splitlines() if line.startswith("line ")] == [f"line {k}" for k in range(100)]
  assert (box.home / "sessions").read_text() == "1"


def test_a_box_that_is_off_is_one_line_and_its_job_is_not_called_lost(box):
  box.fault("host.sh", refuse=True)
  error = [line for line in box.gpu("status", code=1).stderr.splitlines() if line.startswith("error: ")]
  assert error == ["error: no answer from box; is it on, and does ssh box work? A job there goes on meanwhile"]


@pytest.mark.processes
def test_a_box_that_was_restarted_has_lost_its_job_and_says_how_to_go_on(box):
  box.run("wait")
  until(lambda: "session 1" in box.log())
  group = os.getpgid(int((box.home / "insec_jax" / "jobs" / "run" / "pid").read_text()))
  os.killpg(group, signal.SIGKILL)
  until(box.is_lost)
  box.gpu("status", code=1)
  box.run("0", options=["--wait"])


@pytest.mark.processes
def test_what_is_fetched_arrives_whole_or_not_at_all(box):
  (box.home / "runs").mkdir()
  (box.home / "runs" / "big").write_bytes(os.urandom(1 << 20))
  box.fault("tar -C", stdout=300_000)
  assert "did not arrive whole" in box.gpu("fetch", "~/runs", code=1).stderr
  assert [path.name for path in box.here.iterdir() if "runs" in path.name] == []
  assert box.gpu("fetch", "~/runs").stdout == "./runs\n"
  assert (box.here / "runs" / "big").read_bytes() == (box.home / "runs" / "big").read_bytes()
  assert "./runs is there already" in box.gpu("fetch", "~/runs", code=2).stderr
  assert "there is no " in box.gpu("fetch", "~/none", code=2).stderr


@pytest.mark.parametrize(
  ("words", "said"),
  [
    ([], "A run on one GPU box"),
    (["run"], "give the command, such as"),
    (["run", "--host=-oProxyCommand=x", "x"], "--host=-oProxyCommand=x: give USER@ADDRESS"),
    (["run", "--port=ssh", "x"], "--port=ssh: give a whole number"),
    (["run", "--identity=none", "x"], "--identity=none: there is no such file"),
    (["run", "--fast=1", "x"], "run has no option --fast"),
    (["status", "--secret=A"], "status has no option --secret"),
    (["run", "--wait=no", "x"], "--wait takes no value"),
    (["run", "--host=user@box:8922", "x"], "--host=user@box:8922: give the port as --port=8922"),
    (["run", "--job=a/b", "x"], "--job=a/b"),
    (["run", "--secret=A=b", "x"], "--secret takes the name of an environment variable, not its value"),
    (["status"], "nothing was run on box yet"),
    (["stop", "now"], "stop takes no command, but got now"),
    (["fetch"], "give what to fetch"),
    (["fetch", "~/runs", "none"], "none is no folder here"),
  ],
)
def test_wrong_input_is_one_line(box, words, said):
  lines = box.gpu(*words, code=2).stderr.splitlines()
  error = [line for line in lines if line.startswith("error: ")] if words else lines[:1]
  assert len(error) == 1
  assert said in error[0]


def test_a_dry_run_shows_the_commands_and_connects_to_nothing(box):
  said = box.run("0", options=["--dry-run"]).stderr
  assert "host.sh start run" in said
  assert "started" not in said
  assert not (box.state / "calls").exists()


def test_no_secret_is_in_a_call_a_log_an_archive_or_a_command_line(box):
  box.run("wait", options=["--secret", "LAB_PASSWORD"], **launchkit.SECRETS)
  until(lambda: "session 1" in box.log())
  commands = "\n".join(launchkit.commands_of(os.getpid()))
  assert "run.py" in commands
  (process,) = (box.home / "insec_jax" / "jobs").rglob("pid")
  with open(f"/proc/{process.read_text().strip()}/environ") as environment:
    assert launchkit.SECRETS.items() <= dict(one.partition("=")[::2] for one in environment.read().split("\0")).items()
  assert launchkit.leaks(box.here, box.state, texts=(commands,)) == []


@pytest.mark.processes
def test_a_run_cut_off_killed_and_fetched_has_the_losses_of_an_undisturbed_one(tmp_path, repository):
  box = Box(tmp_path, repository, "gcs data")
  write_home(box.home, 40)
  words = ["python", "-m", "insec_jax.train", f"--config={box.home}/config.py:", "--config.train.checkpoint_every=5"]
  words += [f"--config.data.path={box.home}/records.jsonl", f"--config.tokenizer.path={box.home}/tokenizer"]
  options = ["--extras=gcs data", "--secret=LAB_PASSWORD"]
  variables = {"JAX_NUM_CPU_DEVICES": "1", **launchkit.SECRETS}
  checked = box.gpu("run", *options, "--wait", *words, "--workdir=~/whole", **variables)
  assert ["workdir", "box", "ok"] in [line.split()[:3] for line in checked.stderr.splitlines()]
  box.gpu("run", *options, *words, "--workdir=~/hurt", **variables)
  until(lambda: list((box.home / "hurt").glob("checkpoints/5")), 90)
  job = box.home / "insec_jax" / "jobs" / "run"
  os.killpg(os.getpgid(int((job / "pid").read_text())), signal.SIGKILL)
  until(box.is_lost)
  box.fault("host.sh number", stdout=300)
  box.gpu("run", *options, "--wait", *words, "--workdir=~/hurt", **variables)
  for name in ("whole", "hurt"):
    box.gpu("fetch", f"~/{name}")
  whole, hurt = (read_lines(box.here / name) for name in ("whole", "hurt"))
  assert [line["step"] for line in hurt] == [line["step"] for line in whole]
  for one, other in zip(whole, hurt, strict=True):
    np.testing.assert_array_equal(list(one.values()), list(other.values()))
  assert launchkit.leaks(box.here, box.state) == []

"""A pretended Google Cloud for launch/tpu.sh: a state that tests read and disturb, hosts whose processes are real."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PRETEND = ROOT / "tests" / "launch" / "pretend"
SCRIPTS = ("tpu.sh", "tpu_slice.sh", "keep_alive.sh", "remote.sh", "host.sh")
# In place of Python on the hosts: makes no environment and installs nothing, but says so.
HOST_PYTHON = """#!/bin/bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit ;;
  "-m pip") echo "$@" >> "$HOME/pip.calls"; exit ;;
esac
exec {python} "$@"
"""
NAME, ZONE, TYPE = "mine", "us-east5-a", "v6e-16"
STEPS = 12  # of the stand-in for train
CREATE = (f"--type={TYPE}", "--spot")
KEEP = ("--keep-alive", *CREATE, "--no-check", "--then-delete")


@dataclasses.dataclass(frozen=True)
class Cloud:
  """The pretended cloud in a folder, and a checkout whose launcher runs against it."""

  folder: pathlib.Path
  checkout: pathlib.Path
  environment: dict[str, str]

  @contextlib.contextmanager
  def changed(self) -> Iterator[dict]:
    """Yield the state for a change."""
    with open(self.folder / "lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      state = self.read()
      yield state
      (self.folder / "state.json").write_text(json.dumps(state))

  def read(self) -> dict:
    return json.loads((self.folder / "state.json").read_text())

  def calls(self, pattern: str) -> list[str]:
    """The command lines of gcloud so far that match."""
    return [line for line in self.read()["calls"] if re.search(pattern, line)]

  def misbehave(self, match: str, do: str, *, times: int = 1, **more: str | int) -> None:
    """The next `times` calls that match fail with `stderr`, hang, or break off; see pretend/gcloud."""
    with self.changed() as state:
      state["faults"].append({"match": match, "do": do, "times": times, **more})

  def start(self, verb: str, *words: str, **variables: str) -> subprocess.Popen:
    """The running launcher, in the zone and with the name of these tests."""
    place = [] if verb.startswith("-") else [f"--name={NAME}", f"--zone={ZONE}"]
    return subprocess.Popen(
      [self.checkout / "launch" / "tpu.sh", verb, *place, *words],
      env={**self.environment, **variables},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def tpu(self, verb: str, *words: str, code: int | None = 0, timeout: float = 60, **variables: str) -> str:
    """Everything that the launcher printed; it must end with this exit code."""
    process = self.start(verb, *words, **variables)
    try:
      out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      out, err = process.communicate()
      raise AssertionError(f"no end after {timeout} s\n{out}{err}") from None
    assert code is None or process.returncode == code, f"exit code {process.returncode}\n{out}{err}"
    return out + err

  def hosts(self) -> list[pathlib.Path]:
    """The homes of the hosts that are there, in order."""
    nodes = self.read()["nodes"]
    return [self.folder / "hosts" / worker for name in sorted(nodes) for worker in nodes[name]["workers"]]

  def preempt(self, node: str = NAME, number: int = signal.SIGKILL, seen: str = "node, request") -> None:
    """Take the node away: its processes get the signal, then SIGKILL; `seen` says where the cloud shows it."""
    for worker in self.read()["nodes"][node]["workers"]:
      kill(self.folder / "hosts" / worker, number)
    if number != signal.SIGKILL:
      time.sleep(1)
    with self.changed() as state:
      if "node" in seen:
        state["nodes"][node]["state"] = "PREEMPTED"
      if "request" in seen:
        state["queued"][re.sub(r"-\d+$", "", node)].update(state="SUSPENDED", initiator="SERVICE", path=[])
    for worker in self.read()["nodes"][node]["workers"]:
      kill(self.folder / "hosts" / worker, signal.SIGKILL)

  def end(self) -> None:
    """Kill launchers and hosts."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
      with contextlib.suppress(OSError):
        if f"PRETEND={self.folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
          os.kill(int(process.name), signal.SIGKILL)
    for home in (self.folder / "hosts").glob("*"):
      kill(home, signal.SIGKILL)

  def nothing_costs_money(self) -> bool:
    """Whether no node and no request is left, and each node that was ever made has ended."""
    state = self.read()
    begun = [one[0] for one in state["bill"] if one[-1] == "begun"]
    ended = [one[0] for one in state["bill"] if one[-1] == "ended"]
    return not state["nodes"] and not state["queued"] and sorted(begun) == sorted(ended)


def kill(home: pathlib.Path, number: int) -> None:
  """Send the signal to all processes of a host."""
  for process in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      if f"HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
        os.kill(int(process.name), number)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
  """Wait for the condition; AssertionError if it does not come true."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "it did not come true"
    time.sleep(0.05)


def small_checkout(folder: pathlib.Path) -> pathlib.Path:
  """A git repository with the launcher and almost nothing else, committed."""
  (folder / "launch").mkdir(parents=True)
  for name in (*SCRIPTS, "preflight.py", "preflight_command.py"):
    if (ROOT / "launch" / name).exists():
      shutil.copy(ROOT / "launch" / name, folder / "launch")
  (folder / "setup.py").write_text("# requirements\n")
  (folder / ".gitignore").write_text("__pycache__\n")
  minor = "{}{}".format(*sys.version_info[:2])
  (folder / "launch" / f"constraints-py{minor}.txt").write_text("")
  commit(folder)
  return folder


def commit(folder: pathlib.Path) -> None:
  """Commit all files of the folder."""
  who = ("-c", "user.name=test", "-c", "user.email=test@example.com")
  for words in (("init", "--quiet"), ("add", "--all"), (*who, "commit", "--quiet", "--message=all")):
    subprocess.run(["git", "-C", folder, *words], check=True)


def make_cloud(folder: pathlib.Path, checkout: pathlib.Path, *, workers: int = 2, **environment: str) -> Cloud:
  """A cloud without slices, whose nodes have so many hosts with this environment."""
  (folder / "hostbin").mkdir(parents=True)
  python = folder / "hostbin" / f"python3.{sys.version_info[1]}"
  python.write_text(HOST_PYTHON.format(python=sys.executable))
  python.chmod(0o755)
  for name in ("python3.11", "python3.12", "python3"):
    if not (folder / "hostbin" / name).exists():
      (folder / "hostbin" / name).symlink_to(python.name)
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    port = one.getsockname()[1]
  state = {"queued": {}, "nodes": {}, "calls": [], "faults": [], "paths": [], "bill": [], "made": 0, "workers": workers}
  (folder / "state.json").write_text(json.dumps({**state, "environment": environment, "port": port}))
  (folder / "home").mkdir()
  here = {
    "PATH": f"{PRETEND}:/usr/local/bin:/usr/bin:/bin",
    "HOME": str(folder / "home"),
    "PRETEND": str(folder),
    "INSEC_POLL_SECONDS": "0.1",
  }
  return Cloud(folder, checkout, here)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
  """A committed checkout of the launcher."""
  return small_checkout(tmp_path_factory.mktemp("checkout") / "code")


@pytest.fixture
def cloud(tmp_path, checkout) -> Iterator[Cloud]:
  """A cloud without slices, whose hosts know their rank; launchers and hosts are killed at the end of the test."""
  made = make_cloud(tmp_path / "cloud", checkout, RANK="{rank}")
  (made.folder / "home" / ".ssh").mkdir()
  (made.folder / "home" / ".ssh" / "google_compute_engine").touch()
  yield made
  made.end()


def trainer(workdir: pathlib.Path, steps: int = STEPS, pause: str = "") -> list[str]:
  """The command of a job that adds numbers, and stops once at a place such as "step 7" until `go` is there."""
  workdir.mkdir(exist_ok=True)
  if pause:
    (workdir / "pause").write_text(pause)
  return ["python3", str(PRETEND / "trainer.py"), str(workdir), str(steps)]


def losses(workdir: pathlib.Path) -> list[int]:
  """The losses of such a job."""
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def undisturbed() -> list[int]:
  """The losses of such a job that nothing interrupts."""
  total, expected = 0, []
  for step in range(STEPS):
    total = (total * 31 + step) % 1009
    expected.append(total)
  return expected


def ended(process: subprocess.Popen, code: int = 0, timeout: float = 60) -> str:
  """What a launcher printed to stderr; it must end with this exit code."""
  try:
    said = process.communicate(timeout=timeout)[1]
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"no end\n{process.communicate()[1]}") from None
  assert process.returncode == code, said
  return said


def ends_as_undisturbed(cloud: Cloud, workdir: pathlib.Path, *, pause: str, **how: str | int) -> str:
  """What the watcher of a job printed whose slice is preempted at this place."""
  watcher = cloud.start("run", *KEEP, *trainer(workdir, pause=pause))
  until((workdir / "paused").exists)
  cloud.preempt(**how)
  (workdir / "go").touch()
  said = ended(watcher)
  assert losses(workdir) == undisturbed()
  assert cloud.nothing_costs_money()
  return said

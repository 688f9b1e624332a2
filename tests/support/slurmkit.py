"""A login node of a pretended Slurm (tests/launch/pretend/slurm.py), with its home and its state."""

import json
import os
import shlex
import subprocess
import sys

import launchkit
from launchkit import until

EXTRAS = "cuda gcs data"
# Each session does one of the steps; a stop saves. `plan` has the exit code of each session, `wait` is for a stop.
RUN = """
import os, pathlib, signal, sys, time
home = pathlib.Path.home()
mine = home / ("sessions." + os.environ.get("SLURM_PROCID", "none"))
done = len(mine.read_text().split()) if mine.exists() else 0
def save(*_):
  print("saved", flush=True)
  os._exit(42)
signal.signal(signal.SIGTERM, save)
print("session", done + 1, "of", os.environ["SLURM_NTASKS"], "port", os.environ["JAX_COORDINATOR_PORT"], flush=True)
mine.write_text(mine.read_text() + " 1" if done else "1")
what = sys.argv[1:][min(done, len(sys.argv) - 2)]
assert os.environ["INSEC_RUN_TOKEN"], "no token"
if "/" in what:  # of each process
  what = what.split("/")[int(os.environ["SLURM_PROCID"])]
if what == "wait":
  time.sleep(60)
if what == "kill":
  os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(what))
"""


class Cluster:
  """A login node with its home, and a clone of the repository."""

  def __init__(self, folder, code):
    self.folder, self.code, self.home, self.state = folder, code, folder / "home", folder / "slurm"
    (self.state / "jobs").mkdir(parents=True)
    self.home.mkdir()
    launchkit.prepare(self.home, code, EXTRAS)
    tool = f"exec {shlex.quote(sys.executable)} {shlex.quote(f'{launchkit.PRETEND}/slurm.py')}"
    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
      launchkit.script(folder / "bin" / name, f'{tool} {name} "$@"')
    (self.home / "run.py").write_text(RUN)
    self.environment = {
      **launchkit.ENVIRONMENT,
      "HOME": str(self.home),
      "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
      "PRETEND_SLURM": str(self.state),
      "PRETEND_MINUTE": "2",  # seconds
      "PRETEND_RUN": str(os.getpid()),
      "INSEC_POLL_SECONDS": "0.2",
    }

  def slurm(self, *words, code=0, **variables):
    """The finished launcher; it must exit with this code."""
    done = subprocess.run(
      ["bash", self.code / "launch" / "slurm.sh", *words],
      env=self.environment | variables,
      cwd=self.folder,
      capture_output=True,
      text=True,
      timeout=240,
      check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done

  def run(self, *plan, options=(), code=0, **variables):
    words = ["run", "--gpus=1", "--no-check", *options, "python", f"{self.home}/run.py", *plan]
    return self.slurm(*words, code=code, **variables)

  def ask(self, what, value="", job="4000"):
    (self.state / "jobs" / job / what).write_text(value)

  def status(self, job="run"):
    environment = self.environment
    words = ["bash", self.code / "launch" / "slurm.sh", "status", f"--job={job}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) | {"exit": done.returncode}

  def log(self):
    path = self.home / "insec_jax" / "slurm" / "run" / "log"
    return path.read_text() if path.exists() else ""

  def calls(self, tool):
    lines = (self.state / "calls").read_text().splitlines() if (self.state / "calls").exists() else []
    return [words[1:] for words in map(json.loads, lines) if words[0] == tool]

  def sessions(self, process=0):
    return len((self.home / f"sessions.{process}").read_text().split())

  def end(self):
    for path in (self.state / "jobs").glob("*.json"):
      if json.loads(path.read_text())["state"] in ("RUNNING", "PENDING"):
        self.ask("cancel", job=path.stem)
        until(lambda path=path: json.loads(path.read_text())["state"] not in ("RUNNING", "PENDING"))

"""What is logged reaches every place once, whenever the run was stopped or the place was named."""

import dataclasses
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from training_runs import ROOT, SIGNALLED, read_lines, train, write_home

from insec_jax import config_file
from insec_jax.command import InputError
from insec_jax.config import LogConfig
from insec_jax.config_build import build
from insec_jax.training import metrics, sinks


class Service:
  """A service that keeps what each run got: shown[run] is a list of (step, key, value)."""

  shown: dict[str, list] = {}

  def __init__(self, _, project, run, config):
    self.sent, self._got = sinks.NONE_SENT, self.shown.setdefault(f"{project}/{run}", [])
    assert config["seed"] == 0

  def write(self, step, values):
    self._got += [(step, key, value) for key, value in values.items()]

  def text(self, name, text, step):
    self._got.append((step, name, text))

  page = text

  def close(self):
    self._got.append("closed")


@pytest.fixture
def service(monkeypatch):
  """The service in place of trackio."""
  monkeypatch.setattr(Service, "shown", {})
  monkeypatch.setattr(sinks, "SERVICES", {"trackio": Service})
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
  monkeypatch.setattr(sinks, "_import", lambda _: None)
  return Service


@pytest.fixture
def run(tmp_path):
  """(workdir, config) of a run that logs to trackio and has written no line yet."""
  given = build(config_file.load(config_file.find("toy"), "clean"))
  given = dataclasses.replace(given, seed=0, log=LogConfig(to=("trackio",), project="sums"))
  (tmp_path / "config.json").write_text(given.to_json())
  (tmp_path / "receipt.txt").write_text("the receipt\n")
  return tmp_path, given


def log_steps(run, steps, *, last):
  """Log the steps as a process does that goes on after step `last`."""
  workdir, given = run
  sent = metrics.last_line(workdir).get("step", sinks.NONE_SENT)
  log = metrics.Log(workdir, last)
  for sink in sinks.open_sinks(given, workdir, last=last, sent=sent):
    log.show_in(sink)
  for step in steps:
    log.write(step, {"x": step / 2})
  log.close()


RECEIPT = (0, "receipt", "the receipt\n")


def test_a_resumed_run_continues_its_own_and_lines_that_it_repeats_are_shown_once(run, service):
  log_steps(run, (0, 2, 4, 6), last=sinks.NONE_SENT)  # killed, its newest checkpoint is of step 3
  log_steps(run, (4, 6, 8), last=3)
  ((name, shown),) = service.shown.items()
  assert name == f"sums/{json.loads((run[0] / sinks.IDS).read_text())['trackio']['id']}"
  assert shown == [RECEIPT, *((step, "x", step / 2) for step in (0, 2, 4, 6)), "closed", (8, "x", 4.0), "closed"]


def test_a_place_that_is_named_later_gets_the_lines_before(run, service):
  workdir, given = run
  log_steps((workdir, dataclasses.replace(given, log=LogConfig(to=()))), (0, 2, 4), last=sinks.NONE_SENT)
  assert not service.shown
  log_steps(run, (4, 6), last=2)  # step 4 is done again
  (shown,) = service.shown.values()
  assert shown == [RECEIPT, *((step, "x", step / 2) for step in (0, 2, 4, 6)), "closed"]


def test_what_is_published_later_is_in_the_run_of_the_workdir(run, service):
  log_steps(run, (0, 2), last=sinks.NONE_SENT)
  sinks.publish(run[0], "results", text="a table")
  sinks.publish(run[0], "report", page="<p>")
  (shown,) = service.shown.values()
  assert shown[-4:] == [(2, "results", "a table"), "closed", (2, "report", "<p>"), "closed"]


def test_a_service_that_is_not_installed_is_one_line_for_train_and_a_note_for_others(run, monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(InputError, match=r"log.to has trackio, .*pip install 'insec_jax\[trackio\]'"):
    sinks.check(run[1].log)
  sinks.check(LogConfig())
  sinks.publish(run[0], "results", text="a table")
  assert capsys.readouterr().err.startswith(f"results of {run[0]} is not sent: log.to has trackio, which is not")
  assert not (run[0] / sinks.IDS).exists()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sinks")
  write_home(folder)
  return folder


def test_a_service_that_cannot_be_imported_is_refused_in_one_line(monkeypatch):
  def fail(_):
    raise ImportError("its native part\nis missing")

  monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
  monkeypatch.setattr(sinks, "_import", fail)
  with pytest.raises(InputError, match=r"log.to has wandb, which cannot be imported \(its native part is missing\)"):
    sinks.check(LogConfig(to=("wandb",)))


WITHOUT_WANDB = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "wandb" else find(name, *more)
from insec_jax import command, train
command.run(train.main)
"""


@pytest.mark.processes
def test_train_refuses_a_service_that_is_not_installed_before_it_writes_anything(home):
  said = train(home, "none", "log.to=('wandb',)", code=2, program=("-c", WITHOUT_WANDB))
  assert said.startswith("error: log.to has wandb, which is not installed; pip install ")
  assert said.count("\n") == 1
  assert not (home / "none").exists()


@pytest.mark.processes
def test_wandb_and_trackio_have_every_line_once_though_the_run_was_killed(home):
  pytest.importorskip("wandb")
  pytest.importorskip("trackio")
  offline = {"WANDB_MODE": "offline", "TRACKIO_DIR": home / "trackio"}
  change = "log.to=('tensorboard', 'wandb', 'trackio')"
  train(home, "run", change, program=("-c", SIGNALLED), code=-9, SIGNAL=9, SIGNAL_AT=14, **offline)
  said = train(home, "run", change, **offline)
  assert "Traceback" not in said
  ids = json.loads((home / "run" / sinks.IDS).read_text())
  # Wandb: a folder for each process, of one run.
  runs = [path.name.split("-", 3)[3] for path in (home / "run" / "wandb").glob("offline-run-*")]
  assert runs == [ids["wandb"]["id"]] * 2
  # Trackio: its data base.
  (file,) = (home / "trackio").glob("*.db")
  with sqlite3.connect(file) as base:
    rows = base.execute("SELECT step, metrics FROM metrics WHERE run_name = ?", [ids["trackio"]["id"]]).fetchall()
  losses = [(step, json.loads(text)["loss"]) for step, text in sorted(rows) if "loss" in json.loads(text)]
  lines = [(line["step"], line["loss"]) for line in read_lines(home / "run") if "loss" in line]
  assert len(losses) >= 15
  assert set(losses) <= set(lines)
  assert len(losses) == len(set(losses))
  # What the killed process had not sent is lost there, if anything; the rest is there.
  assert {step for step, _ in losses} >= {step for step, _ in lines if step > 14}
  page = home / "page.html"
  environment = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in offline.items()}}
  done = subprocess.run(
    [sys.executable, "-m", "insec_jax.report", f"--workdirs={home / 'run'}", f"--output={page}"],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stdout) == (0, f"{page} shows run\n")
  assert f"report of {home / 'run'} is in wandb\n" in done.stderr
  assert f"report of {home / 'run'} is in trackio\n" in done.stderr

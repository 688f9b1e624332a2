"""launch/tpu.sh against a pretended cloud whose hosts are real processes."""

import re
import shlex
import sys

import pytest
from cloudkit import (
  CREATE,
  NAME,
  ROOT,
  Cloud,
  commit,
  ends_as_undisturbed,
  losses,
  small_checkout,
  trainer,
  undisturbed,
  until,
)


def test_create_asks_once_and_delete_leaves_nothing(cloud):
  said = cloud.tpu("create", *CREATE)
  assert re.search(r"^\+ gcloud compute tpus queued-resources create mine .*--spot --node-id=mine", said, re.MULTILINE)
  assert "the slice mine is WAITING_FOR_RESOURCES" in said
  cloud.tpu("create", *CREATE)
  assert len(cloud.calls("queued-resources create")) == 1
  assert "is a v6e-16, not a v6e-8" in cloud.tpu("create", "--type=v6e-8", code=2)
  assert cloud.tpu("list").startswith("queued-resources  mine  ACTIVE  v6e-16\ntpu-vm  mine  READY  v6e-16\n")
  cloud.tpu("delete")
  assert cloud.nothing_costs_money()
  cloud.tpu("delete")
  assert len(cloud.calls("queued-resources delete")) == 1


@pytest.mark.processes
def test_a_job_goes_on_without_the_laptop_and_its_exit_code_is_seen(cloud, tmp_path):
  cloud.tpu("create", *CREATE)
  workdir = tmp_path / "run"
  command = trainer(workdir, pause="step 9")
  said = cloud.tpu("run", "--no-check", *command)
  assert re.search(r"^mine/1  ready: commit \w{12}, Python 3\.\d+\.\d+, \d s$", said, re.MULTILINE)
  until((workdir / "paused").exists)
  said = cloud.tpu("status")
  assert "running on 2, ended on 0" in said
  assert re.search(r"^log +step 9 loss \d+$", said, re.MULTILINE)
  assert "run is running already" in cloud.tpu("run", "--no-check", *command)
  assert "stop it, or give another name" in cloud.tpu("run", "--no-check", *trainer(workdir, 13), code=2)
  assert "is running" not in cloud.tpu("stop")
  assert "ended on 2" in cloud.tpu("status", code=42)
  assert len(cloud.calls("host.sh unpack")) == 2, "the code is sent once to each host"
  cloud.tpu("run", "--no-check", "--wait", *command)
  assert losses(workdir) == undisturbed()


def test_a_preempted_slice_is_asked_for_again_and_the_run_goes_on(cloud, tmp_path):
  ends_as_undisturbed(cloud, tmp_path / "run", pause="step 7", seen="node")
  assert len(cloud.calls("queued-resources create")) == 2


def test_a_name_with_a_word_of_an_error_is_a_name(cloud):
  cloud.tpu("create", *CREATE, "--name=quota-stockout")
  cloud.tpu("delete", "--name=quota-stockout")
  assert cloud.nothing_costs_money()


TRAIN = ("python", "-m", "insec_jax.train", "--config=configs/toy.py")


def test_wrong_words_are_refused_with_one_line(cloud):
  for verb, words, shown in (
    ("create", (), "give the type of the slice, such as --type=v6e-16"),
    ("create", ("--type=v7-9",), "give its runtime version as well"),
    ("create", (*CREATE, "--slices=0"), "--slices=0: give at least 1"),
    ("create", (*CREATE, "--job=a"), "create has no option --job"),
    ("create", (*CREATE, "--spot=yes"), "--spot takes no value"),
    ("create", (*CREATE, "--create-flag=--labels=team=x"), "launch/tpu.sh sets --labels itself"),
    ("create", ("--type=v5e-8",), "the cloud calls it v5litepod-8"),
    ("status", ("--bogus",), "status has no option --bogus"),
    ("run", ("--keep-alive", *CREATE, *TRAIN, "--workdir=/mnt/run"), "--workdir=/mnt/run is on the slice"),
    ("run", ("--keep-alive", *CREATE, *TRAIN, "--workdir", "runs/a"), "--workdir=runs/a is on the slice"),
    ("create", (*CREATE, "--name=Mine"), "--name=Mine: small letters"),
    ("run", (), "give the command to run"),
    ("run", ("--spot", "true"), "need --keep-alive"),
    ("run", ("--secret=MORE", "true"), "--secret MORE: this variable is not set here"),
    ("run", ("true",), "there is no slice mine in us-east5-a"),
    ("status", (), "there is no slice mine in us-east5-a"),
    ("stop", ("now",), "stop takes no command, but got now"),
  ):
    said = cloud.tpu(verb, *words, code=2).splitlines()
    assert [line for line in said if not line.startswith("+ ")] == [said[-1]]
    assert shown in said[-1]
  assert cloud.nothing_costs_money()


def test_the_commands_of_the_documentation_are_accepted(cloud):
  text = (ROOT / "launch" / "README.md").read_text() + (ROOT / "README.md").read_text()
  found = re.findall(r"^launch/tpu\.sh ((?:[^\n]*\\\n)*[^\n]*)", text, re.MULTILINE)
  assert len(found) >= 6
  for line in found:
    verb, *words = shlex.split(line, comments=True)
    cloud.tpu(verb, "--dry-run", *(word for word in words if word != "\n"))
  assert cloud.read()["calls"] == []


# Finds that the run does not fit, without a compiler.
COMPILER = """#!/bin/bash
case "$*" in
  *" check "*) echo '{{"host": "here", "check": "fit", "result": "MISSING", "value": "{found}", "same": false}}' ;;
  *" table "*) exec {python} -E "$@" ;;
esac
"""


def test_a_slice_into_which_the_run_does_not_fit_is_not_asked_for(cloud, tmp_path):
  code = small_checkout(tmp_path / "code")
  (code / ".venv" / "bin").mkdir(parents=True)
  python = code / ".venv" / "bin" / "python"
  python.write_text(COMPILER.format(found="needs 40 GiB of 31", python=sys.executable))
  python.chmod(0o755)
  (code / ".git" / "info" / "exclude").write_text(".venv\n")
  cloud = Cloud(cloud.folder, code, cloud.environment)
  command = ("python", "-m", "insec_jax.train", "--config=x.py")
  for verb in (("create", *CREATE), ("run", "--keep-alive", *CREATE)):
    said = cloud.tpu(*verb, *command, code=2)
    assert "needs 40 GiB of 31" in said
    assert said.splitlines()[-1] == "error: no slice was asked for: the run would not start, see above"
  assert cloud.read()["calls"] == []


def test_a_dry_run_shows_the_commands_and_runs_none(cloud):
  for verb, words, shown in (
    ("create", CREATE, "+ gcloud compute tpus queued-resources create mine --accelerator-type=v6e-16"),
    ("run", ("true",), "start run"),
    ("run", ("--keep-alive", *CREATE, "true"), "queued-resources create mine"),
    ("status", (), "host.sh status run"),
    ("stop", (), "host.sh stop run 600"),
    ("delete", (), "+ gcloud compute tpus queued-resources delete mine --async --force"),
  ):
    assert shown in cloud.tpu(verb, "--dry-run", *words, PATH="/usr/bin:/bin")
  assert cloud.read()["calls"] == []


@pytest.mark.processes
def test_changes_that_are_not_committed_are_refused_or_sent_under_their_own_name(cloud, tmp_path):
  code = small_checkout(tmp_path / "code")
  cloud = Cloud(cloud.folder, code, cloud.environment)
  cloud.tpu("create", *CREATE)
  (code / "new.txt").write_text("new")
  (code / "setup.py").write_text("# changed\n")
  assert "2 files are not committed, such as" in cloud.tpu("run", "--no-check", "true", code=2)
  command = ["bash", "-c", "cat new.txt; git diff HEAD --stat; git log --oneline | wc -l"]
  said = cloud.tpu("run", "--no-check", "--dirty", "--wait", *command)
  assert re.search(r"ready: commit \w{12}-dirty-\w{12},", said)
  assert re.search(r"^mine/0  new setup\.py \| 2 \+-$", said, re.MULTILINE)
  commit(code)
  assert re.search(r"ready: commit \w{12}, ", cloud.tpu("run", "--no-check", "--wait", "--job=b", "true"))


def test_nothing_is_deleted_that_create_did_not_make(cloud):
  cloud.tpu("create", *CREATE)
  with cloud.changed() as state:
    state["queued"][NAME]["labels"] = {"insec-jax": "mine2", "x": "insec-jax"}
    state["nodes"]["other"] = {**state["nodes"][NAME], "labels": {}}
  assert "was not made by this program" in cloud.tpu("delete", code=2)
  assert "was not made by this program" in cloud.tpu("create", *CREATE, code=2)
  with cloud.changed() as state:
    state["queued"][NAME]["labels"] = {"a": "b", "insec-jax": NAME}
  cloud.tpu("delete")
  state = cloud.read()
  assert list(state["nodes"]) == ["other"]
  assert not state["queued"]
  assert not cloud.calls("delete other")

"""launch/tpu.sh when the cloud, a host, a connection or the laptop fails: losses of an undisturbed run, or one line."""

import os
import re
import signal

import pytest
from cloudkit import CREATE, KEEP, NAME, TYPE, ended, ends_as_undisturbed, losses, trainer, undisturbed, until

pytestmark = pytest.mark.processes
QUOTA = "Quota limit 'TPUV6EPreemptiblePerProjectPerRegionForTPUAPI' has been exceeded. Limit: 0 in region us-east5."


@pytest.mark.parametrize(
  ("place", "how"),
  [
    ("step 2", {}),
    ("save 8", {"seen": "request"}),
    ("step 10", {"seen": "node"}),
    ("step 6", {"number": signal.SIGTERM}),
  ],
  ids=["before the first checkpoint", "during a save", "between saves", "with a signal"],
)
def test_a_run_ends_as_an_undisturbed_one_wherever_its_slice_is_preempted(cloud, tmp_path, place, how):
  said = ends_as_undisturbed(cloud, tmp_path / "run", pause=place, **how)
  assert "try 1 of 20" in said
  assert "try 3 of 20" not in said  # a second one where the job ends by the signal before the cloud says why


@pytest.mark.parametrize(
  ("text", "code", "advice"),
  [
    (QUOTA, 2, "iam-admin/quotas"),
    ('"message": "There is no more capacity in the zone "us-east5-a"; you can try in another zone"', 1, "--keep-alive"),
    ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/p/locations/z'", 2, "TPU Admin"),
    ("PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled", 2, "services enable"),
    ("The required property [project] is not currently set: Failed to find attribute [project]", 2, "--project=..."),
    ("You do not currently have an active account selected.", 2, "gcloud auth login"),
    ("INVALID_ARGUMENT: Accelerator type v6e-16 is not available in zone us-east5-a", 2, "accelerator-types list"),
    ("Unable to resolve host tpu.googleapis.com", 1, "connection of this machine"),
  ],
)
def test_a_refusal_is_one_line_with_the_next_thing_to_do(cloud, text, code, advice):
  cloud.misbehave("queued-resources create", "fail", times=100, stderr=f"ERROR: (gcloud.compute.tpus) {text}")
  said = cloud.tpu("create", *CREATE, code=code)
  errors = [line for line in said.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1
  assert advice in errors[0]
  assert text[:20] in errors[0]
  assert cloud.nothing_costs_money()


def test_a_request_whose_answer_was_lost_is_not_made_twice(cloud):
  cloud.misbehave("queued-resources create", "lose the answer", stderr="ERROR: Connection aborted.")
  cloud.tpu("create", *CREATE)
  assert len(cloud.calls("queued-resources create")) == 1
  cloud.tpu("delete")
  assert cloud.nothing_costs_money()


def test_a_refused_quota_ends_the_watching_at_once_but_not_after_a_preemption(cloud, tmp_path):
  cloud.misbehave("queued-resources create", "fail", stderr=QUOTA)
  said = cloud.tpu("run", *KEEP, *trainer(tmp_path / "run"), code=2)
  assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
  watcher = cloud.start("run", *KEEP, *trainer(tmp_path / "run", pause="step 5"))
  until((tmp_path / "run" / "paused").exists)
  cloud.misbehave("queued-resources create", "fail", times=2, stderr=QUOTA)
  cloud.preempt()
  (tmp_path / "run" / "go").touch()
  assert "try 3 of 20" in ended(watcher)
  assert losses(tmp_path / "run") == undisturbed()
  assert cloud.nothing_costs_money()


def test_a_request_that_fails_after_waiting_leaves_nothing_and_is_made_again(cloud, tmp_path):
  failing = [*["WAITING_FOR_RESOURCES"] * 4, "FAILED: There is no more capacity in the zone"]
  with cloud.changed() as state:
    state["paths"] = [failing, failing]
  said = cloud.tpu("create", *CREATE, code=1)
  assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
  assert "no more capacity" in said
  assert cloud.nothing_costs_money()
  assert "try 1 of 20" in cloud.tpu("run", *KEEP, *trainer(tmp_path / "run"))
  assert losses(tmp_path / "run") == undisturbed()
  assert cloud.nothing_costs_money()


def test_a_request_that_is_not_granted_in_time_is_withdrawn(cloud):
  for words in (("create", *CREATE, "--hours=2"), ("run", *KEEP, "--hours=2", "true")):
    (cloud.folder / "clock").write_text("0")
    with cloud.changed() as state:
      state["paths"] = [["WAITING_FOR_RESOURCES"] * 1000]
    waiting = cloud.start(*words)
    until(lambda: cloud.read()["queued"].get(NAME, {}).get("state") == "WAITING_FOR_RESOURCES")
    (cloud.folder / "clock").write_text("7300")
    assert "not granted in time" in ended(waiting, 1)
    assert cloud.nothing_costs_money()
  assert all("--valid-until-duration=7200s" in line for line in cloud.calls("queued-resources create"))


def test_a_host_that_never_answers_is_named_and_a_watcher_replaces_the_slice(cloud, tmp_path):
  cloud.tpu("create", *CREATE)
  cloud.misbehave("ssh mine --worker=1", "hang", times=3)
  said = cloud.tpu("run", "--no-check", *trainer(tmp_path / "run"), code=1, INSEC_ANSWER_SECONDS="2")
  assert said.splitlines()[-1].startswith("error: the environment is not ready on mine/1;")
  cloud.misbehave("ssh mine --worker=1", "hang", times=4)
  said = cloud.tpu("run", *KEEP, *trainer(tmp_path / "run"), INSEC_ANSWER_SECONDS="2")
  assert "no environment on mine/1; try 1 of 20" in said
  assert len(cloud.calls("queued-resources create")) == 2
  assert losses(tmp_path / "run") == undisturbed()
  assert cloud.nothing_costs_money()


def test_a_host_that_is_silent_while_the_run_goes_on_is_left_alone(cloud, tmp_path):
  patience = {"INSEC_ANSWER_SECONDS": "1", "INSEC_GRACE_SECONDS": "1"}
  watcher = cloud.start("run", *KEEP, *trainer(tmp_path / "run", pause="step 5"), **patience)
  until((tmp_path / "run" / "paused").exists)
  cloud.misbehave("ssh mine --worker=1.*status", "hang", times=3)
  until(lambda: not cloud.read()["faults"][-1]["times"])
  (tmp_path / "run" / "go").touch()
  said = ended(watcher)
  assert "running on 1 of 2 hosts, no answer from mine/1" in said
  assert len(cloud.calls("host.sh start")) == 2
  assert len(cloud.calls("queued-resources create")) == 1
  assert losses(tmp_path / "run") == undisturbed()


def test_a_job_that_is_killed_on_one_host_is_started_again_on_all(cloud, tmp_path):
  watcher = cloud.start("run", *KEEP, *trainer(tmp_path / "run", pause="step 6"), INSEC_GRACE_SECONDS="1")
  until((tmp_path / "run" / "paused").exists)
  os.kill(int((cloud.hosts()[1] / "insec_jax/jobs/run/pid").read_text()), signal.SIGKILL)
  said = ended(watcher)
  assert "it has ended on 1 of 2 hosts only; try 1 of 20" in said
  assert losses(tmp_path / "run") == undisturbed()
  assert len(cloud.calls("queued-resources create")) == 1
  assert cloud.nothing_costs_money()


@pytest.mark.parametrize(
  ("match", "more"),
  [("host.sh unpack", {"bytes": 1000}), ("host.sh start", {"bytes": 10}), ("host.sh has", {"bytes": 100})],
)
def test_a_connection_that_breaks_half_way_is_made_again(cloud, tmp_path, match, more):
  cloud.tpu("create", *CREATE)
  cloud.misbehave(match, "cut stdin", **more)
  said = cloud.tpu("run", "--no-check", "--wait", *trainer(tmp_path / "run"))
  assert "no success (exit code" in said
  assert losses(tmp_path / "run") == undisturbed()
  for home in cloud.hosts():
    assert (home / "insec_jax/jobs/run/log").read_text().count(" commit ") == 1, "started once"


def test_logs_go_on_where_the_connection_broke(cloud, tmp_path):
  cloud.tpu("create", *CREATE)
  cloud.tpu("run", "--no-check", *trainer(tmp_path / "run", pause="step 8"))
  until((tmp_path / "run" / "paused").exists)
  cloud.misbehave("--worker=0.*host.sh number", "cut stdout", lines=3)
  cloud.misbehave("--worker=1.*host.sh number", "cut stdout", lines=1, **{"for good": 1})
  logs = cloud.start("logs")
  until(lambda: len(cloud.calls("--worker=1.*host.sh number")) == 2)
  (tmp_path / "run" / "go").touch()
  said = ended(logs)
  assert re.findall(r"^mine/0  step (\d+) ", said, re.MULTILINE) == [str(step + 1) for step in range(12)]
  assert "the connection broke; going on at line 2" in said


@pytest.mark.parametrize("do", ["lose the answer", "nodes only", "fail"])
def test_a_deletion_that_is_interrupted_is_finished(cloud, do):
  cloud.tpu("create", *CREATE)
  cloud.misbehave("queued-resources delete", do, stderr="ERROR: Connection aborted.")
  cloud.tpu("delete")
  assert cloud.nothing_costs_money()


def test_a_deletion_that_the_laptop_did_not_survive_is_finished_by_the_next(cloud):
  cloud.tpu("create", *CREATE, "--slices=2")
  cloud.misbehave("queued-resources delete", "nodes only", stderr="")
  deleting = cloud.start("delete")
  until(lambda: cloud.calls("queued-resources delete"))
  os.killpg(deleting.pid, signal.SIGKILL)
  with cloud.changed() as state:  # the request is gone and one of its nodes is left
    state["nodes"]["mine-1"] = {"state": "READY", "labels": {"insec-jax": NAME}, "type": TYPE, "workers": []}
    state["bill"].append(["mine-1", "begun"])
    state["queued"].pop(NAME, None)
  cloud.tpu("delete")
  assert cloud.nothing_costs_money()


def test_the_same_command_goes_on_watching_after_the_laptop_died(cloud, tmp_path):
  command = ("run", *KEEP, *trainer(tmp_path / "run", pause="step 7"))
  watcher = cloud.start(*command)
  until((tmp_path / "run" / "paused").exists)
  until(lambda: cloud.calls("status run"))
  assert "watches mine already" in cloud.tpu(*command, code=2)
  os.killpg(watcher.pid, signal.SIGKILL)
  watcher = cloud.start(*command)
  until(lambda: len(cloud.calls("host.sh start")) == 4 and "status run" in cloud.read()["calls"][-1])
  (tmp_path / "run" / "go").touch()
  assert "is running already" in ended(watcher)
  assert losses(tmp_path / "run") == undisturbed()
  assert len(cloud.calls("queued-resources create")) == 1
  assert cloud.nothing_costs_money()


def test_a_slice_that_was_preempted_while_nobody_watched_is_replaced(cloud, tmp_path):
  command = ("run", *KEEP, *trainer(tmp_path / "run", pause="step 7"))
  watcher = cloud.start(*command)
  until((tmp_path / "run" / "paused").exists)
  os.killpg(watcher.pid, signal.SIGKILL)
  cloud.preempt()
  (tmp_path / "run" / "go").touch()
  cloud.tpu(*command)
  assert losses(tmp_path / "run") == undisturbed()
  assert cloud.nothing_costs_money()


def test_a_job_that_ended_while_nobody_watched_is_not_done_again(cloud, tmp_path):
  cloud.tpu("create", *CREATE)
  cloud.tpu("run", "--no-check", "--wait", *trainer(tmp_path / "run"))
  said = cloud.tpu("run", *KEEP, *trainer(tmp_path / "run"))
  assert said.count("has ended already with exit code 0") == 2
  assert cloud.nothing_costs_money()


def test_stop_and_delete_end_the_watching(cloud, tmp_path):
  keep = KEEP[:-1]  # without --then-delete
  watcher = cloud.start("run", *keep, *trainer(tmp_path / "run", pause="step 5"))
  until((tmp_path / "run" / "paused").exists)
  cloud.tpu("stop")
  assert "was stopped by launch/tpu.sh stop" in ended(watcher, 42)
  assert len(cloud.calls("host.sh start")) == 2
  watcher = cloud.start("run", *keep, *trainer(tmp_path / "again", pause="step 5"))
  until((tmp_path / "again" / "paused").exists)
  cloud.tpu("delete")
  assert "not watched any more" in ended(watcher, 130)
  assert len(cloud.calls("queued-resources create")) == 1
  assert cloud.nothing_costs_money()


@pytest.mark.parametrize("do", ["lose the answer", "nodes only", ""], ids=["DELETING", "SUSPENDED by a user", "ABSENT"])
def test_a_deletion_on_another_machine_ends_the_watching(cloud, tmp_path, do):
  watcher = cloud.start("run", *KEEP, *trainer(tmp_path / "run", pause="step 5"))
  until((tmp_path / "run" / "paused").exists)
  if do:
    cloud.misbehave("queued-resources delete", do, stderr="ERROR: Connection aborted.")
  deleting = cloud.start("delete", HOME=str(tmp_path), INSEC_POLL_SECONDS="1")
  assert "somebody deletes the slice mine" in ended(watcher, 1)
  ended(deleting)
  assert len(cloud.calls("queued-resources create")) == 1
  assert cloud.nothing_costs_money()


@pytest.mark.parametrize(("code", "tries"), [(2, 0), (3, 0), (1, 2), (42, 2)])
def test_exit_codes_2_and_3_end_the_watching_and_others_start_again(cloud, code, tries):
  said = cloud.tpu("run", *KEEP, "--tries=2", "bash", "-c", f"exit {code}", code=code if not tries else 1)
  assert len(cloud.calls("host.sh start")) == 2 * (tries + 1), said
  assert cloud.nothing_costs_money()


def test_the_end_of_the_budget_stops_the_job_with_its_state_saved(cloud, tmp_path):
  watcher = cloud.start("run", *KEEP, "--hours=3", *trainer(tmp_path / "run", pause="step 6"))
  until((tmp_path / "run" / "paused").exists)
  until(lambda: cloud.calls("status run"))
  (cloud.folder / "clock").write_text("11000")
  assert "the budget of 3 hours is over" in ended(watcher, 42)
  assert (tmp_path / "run" / "state").read_text().startswith("[6, ")
  assert cloud.nothing_costs_money()


def test_several_slices_are_one_run_and_are_replaced_together(cloud, tmp_path):
  watcher = cloud.start("run", *KEEP, "--slices=2", *trainer(tmp_path / "run", pause="step 7"))
  until((tmp_path / "run" / "paused").exists)
  assert len(cloud.hosts()) == 4
  cloud.preempt("mine-1")
  (tmp_path / "run" / "go").touch()
  assert re.search(r"^mine-1/1  started run", ended(watcher), re.MULTILINE)
  assert "--node-count=2 --node-prefix=mine" in cloud.calls("queued-resources create")[1]
  assert losses(tmp_path / "run") == undisturbed()
  assert cloud.nothing_costs_money()

"""launch/slurm.sh on a pretended Slurm (pretend/slurm.py), with a stand-in for the run."""

import concurrent.futures
import os
import shlex
import sys
import time

import launchkit
import pytest
from launchkit import until
from slurmkit import Cluster


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  return launchkit.clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def cluster(tmp_path, repository):
  made = Cluster(tmp_path, repository)
  yield made
  made.end()


@pytest.mark.processes
def test_a_job_runs_a_process_for_each_gpu_and_its_exit_code_is_handed_on(cluster):
  done = cluster.run("3", options=["--nodes", "2", "--gpus", "2", "--wait"], code=3)
  assert "queued as Slurm job 4000" in done.stderr
  for process in range(4):
    assert f"{process}: session 1 of 4 port 14000" in done.stdout
  status = cluster.status()
  assert (status["state"], status["code"], status["exit"], status["restarts"]) == ("ended", 3, 3, 0)
  (words,) = cluster.calls("sbatch")
  asked = ["--nodes=2", "--ntasks-per-node=2", "--signal=B:TERM@300", "--requeue", "--gpus-per-node=2"]
  assert [word for word in words if word in asked] == asked


@pytest.mark.processes
@pytest.mark.parametrize(
  ("plan", "sessions", "code"),
  [
    (["wait", "0"], 2, 0),  # the time limit
    (["42", "0"], 2, 0),
    (["1", "kill", "0"], 3, 0),
    (["1", "1", "0"], 2, 1),  # --tries
    (["42", "42", "42", "42", "0"], 4, 42),  # --restarts
    (["2"], 1, 2),
  ],
)
def test_a_session_that_saved_or_failed_is_followed_by_another_and_no_other_one(cluster, plan, sessions, code):
  tries = ["--tries", "3" if "kill" in plan else "2", "--restarts", "3"]
  limit = ["--time", "2", "--grace", "2"]  # 4 s with pretended minutes of 2 s
  done = cluster.run(*plan, options=[*tries, *limit, "--wait"], code=code)
  assert cluster.sessions() == sessions
  assert ("0: saved" in done.stdout) == ("wait" in plan)
  assert len(cluster.calls("sbatch")) == 1


@pytest.mark.processes
@pytest.mark.parametrize(
  ("plan", "sessions", "code"),
  [
    (["1/2", "0"], 2, 0),  # process 1 saw that the other one was lost
    (["kill/2", "0"], 2, 0),
    (["2/2", "0"], 1, 2),
    (["1/3", "0"], 1, 3),
    (["42/1", "42/1", "0"], 2, 1),  # --tries
    (["0/42", "0"], 2, 0),
  ],
)
def test_processes_that_end_differently_are_one_failure_not_wrong_input(cluster, plan, sessions, code):
  cluster.run(*plan, options=["--nodes", "2", "--tries", "2", "--wait"], code=code)
  assert cluster.sessions() == sessions


@pytest.mark.processes
@pytest.mark.parametrize(
  ("ask", "value", "said"), [("preempt", "30", "0: saved"), ("preempt", "0", "session 2"), ("lose", "", "session 2")]
)
def test_a_preempted_job_or_one_that_lost_a_node_goes_on(cluster, ask, value, said):
  cluster.run("wait", "0", options=["--nodes", "2"])
  until(lambda: cluster.log().count("session 1 of 2") == 2)
  assert cluster.status()["state"] == "running"
  cluster.ask(ask, value)
  done = cluster.slurm("logs")
  assert said in done.stdout
  assert (cluster.sessions(0), cluster.sessions(1)) == (2, 2)


@pytest.mark.processes
def test_stop_lets_the_run_save_and_nothing_follows(cluster):
  cluster.run("wait", "0")
  until(lambda: "session 1" in cluster.log())
  assert "ended with exit code 42" in cluster.slurm("stop").stdout
  assert "0: saved" in cluster.log()
  assert (cluster.sessions(), cluster.status()["exit"]) == (1, 42)
  cluster.run("0", options=["--wait"])  # the same command goes on
  assert cluster.sessions() == 2


@pytest.mark.processes
def test_a_job_that_waits_for_nodes_is_cancelled_by_stop(cluster):
  (cluster.state / "hold").touch()
  cluster.run("0")
  assert cluster.status()["state"] == "pending"
  assert "the job run is PENDING as Slurm job 4000; stop it" in cluster.run("0", code=2).stderr
  assert "cancelled; no exit code" in cluster.slurm("stop").stdout
  assert not (cluster.home / "sessions.0").exists()


@pytest.mark.processes
def test_a_job_that_is_gone_without_an_exit_code_is_lost_and_says_how_to_go_on(cluster):
  cluster.run("wait", "0")
  until(lambda: "session 1" in cluster.log())
  cluster.ask("cancel")
  assert "the same run command goes on" in cluster.slurm("logs", code=1).stderr
  assert (cluster.status()["state"], cluster.status()["exit"]) == ("lost", 1)


@pytest.mark.processes
def test_a_cluster_that_queues_no_job_again_ends_it_with_one_line(cluster):
  (cluster.state / "norequeue").touch()
  done = cluster.run("42", "0", options=["--wait"], code=1)
  assert "exit code 1: Slurm does not queue it again; the same run command goes on" in done.stdout
  cluster.run("42", "0", options=["--wait"])
  assert cluster.sessions() == 2


@pytest.mark.processes
def test_a_controller_that_does_not_answer_is_one_line_and_no_lost_job(cluster):
  cluster.run("wait", "0")
  (cluster.state / "down").touch()
  said = cluster.slurm("status", code=1).stderr
  assert said.startswith("error: squeue does not answer: ")
  assert said.count("\n") == 1
  (cluster.state / "down").unlink()
  assert cluster.status()["state"] in ("pending", "running")


@pytest.mark.processes
def test_logs_and_stop_outlast_a_controller_that_does_not_answer(cluster):
  cluster.run("wait", "0")
  until(lambda: "session 1" in cluster.log())
  (cluster.state / "down").touch()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    logs = pool.submit(cluster.slurm, "logs", code=42)
    stop = pool.submit(cluster.slurm, "stop")
    time.sleep(2)
    (cluster.state / "down").unlink()
  for done in (logs.result(), stop.result()):
    assert "squeue does not answer" in done.stderr
    assert "trying again" in done.stderr


@pytest.mark.processes
def test_what_is_missing_on_a_node_ends_the_job_before_it_starts(cluster):
  launchkit.script(
    cluster.home / "insec_jax" / "venv" / next((cluster.home / "insec_jax" / "venv").iterdir()).name / "bin" / "python",
    'if [ "${2:-}" = check ]; then printf \'{"host": "%s", "check": "disk", "result": "%s", "value": "v"}\\n\' "$4" '
    '"$([ "$4" = node1 ] && echo MISSING || echo ok)"; else exec ' + f'{shlex.quote(sys.executable)} "$@"; fi',
  )
  done = cluster.slurm("run", "--nodes=2", "--wait", "python", f"{cluster.home}/run.py", "0", code=2)
  assert ["disk", "node1", "MISSING", "v"] in [line.split() for line in done.stdout.splitlines()]
  assert not (cluster.home / "sessions.0").exists()
  assert ["disk", "login", "ok", "v"] in [line.split() for line in done.stderr.splitlines()]


@pytest.mark.parametrize(
  ("words", "said"),
  [
    ([], "Runs a command on the GPU nodes"),
    (["run"], "give the command, such as"),
    (["run", "--job=a/b", "x"], "--job=a/b: give a name"),
    (["run", "--fast", "1", "x"], "there is no option --fast"),
    (["run", "--nodes=0", "x"], "--nodes=0: give at least 1"),
    (["run", "--gpus", "two", "x"], "--gpus=two: give a whole number"),
    (["run", "--time=1 day", "x"], "--time=1 day: give MINUTES"),
    (["run", "--time=5", "--grace=300", "x"], "--grace=300 is not shorter than --time=5"),
    (["run", "--nodes"], "--nodes needs a value"),
    (["run", "--wait=no", "x"], "--wait takes no value"),
    (["run", "--sbatch=--array=0-3", "--no-check", "x"], "--sbatch=--array=0-3: the processes of an array"),
    (["run", "--nodes=", "x"], "--nodes is empty"),
    (["run", "--secret=A=b", "x"], "--secret takes the name"),
    (["run", "--sbatch=--partition=none", "--no-check", "x"], "sbatch: error: invalid partition"),
    (["status", "--job=none"], "there is no job none"),
    (["logs"], "there is no job run"),
    (["stop", "now"], "stop takes no command, but got now"),
  ],
)
def test_wrong_input_is_one_line_and_queues_nothing(cluster, words, said):
  lines = cluster.slurm(*words, code=2).stderr.splitlines()
  error = [line for line in lines if line.startswith("error: ")] if words else lines[:1]
  assert len(error) == 1
  assert said in error[0]
  assert list((cluster.state / "jobs").glob("*.json")) == []


def test_a_dry_run_prints_the_command_and_queues_nothing(cluster):
  said = cluster.run("0", options=["--dry-run"]).stderr
  assert "+ sbatch --parsable --job-name=insec-run" in said
  assert cluster.calls("sbatch") == []
  assert not (cluster.home / "insec_jax" / "slurm").exists()


def test_no_secret_is_in_a_call_a_log_an_archive_or_what_slurm_keeps(cluster):
  cluster.run("wait", "0", options=["--secret", "LAB_PASSWORD"], **launchkit.SECRETS)
  until(lambda: "session 1" in cluster.log())
  commands = "\n".join(launchkit.commands_of(os.getpid()))
  assert "run.py" in commands
  (environment,) = (cluster.home / "insec_jax" / "slurm").rglob("environment")
  assert all(f"{name}={value}" in environment.read_text().split("\0") for name, value in launchkit.SECRETS.items())
  assert launchkit.leaks(cluster.home, cluster.state, texts=(commands,)) == []
  manager = cluster.state / "jobs" / "4000" / "caller"
  assert not any(name in manager.read_text() for name in launchkit.SECRETS)

"""launch/tpu.sh with marked secrets: none is where others could read it. gpu.sh and slurm.sh: in their own tests."""

import json
import os

import cloudkit
import launchkit
import pytest
from launchkit import until

RUN = "import os, time; print('begun', sorted(set(os.environ) & set(%r)), flush=True); time.sleep(60)"


@pytest.mark.processes
def test_no_secret_is_in_a_call_a_log_an_archive_or_a_command_line(tmp_path):
  cloud = cloudkit.make_cloud(
    tmp_path / "cloud", cloudkit.small_checkout(tmp_path / "checkout"), PRETEND_RUN=str(os.getpid())
  )
  cloud.tpu("create", f"--type={cloudkit.TYPE}")
  command = ["python3", "-c", RUN % list(launchkit.SECRETS)]
  cloud.tpu("run", "--secret=LAB_PASSWORD", "--no-check", *command, **launchkit.SECRETS)
  for home in cloud.hosts():
    log = home / "insec_jax" / "jobs" / "run" / "log"
    until(lambda log=log: f"begun {sorted(launchkit.SECRETS)}" in log.read_text())
  commands = "\n".join(launchkit.commands_of(os.getpid()))
  assert "time.sleep(60)" in commands
  calls = json.dumps(cloud.read())
  assert "host.sh start run" in calls
  cloud.tpu("stop", "--grace=5")
  assert launchkit.leaks(tmp_path, texts=(commands, calls)) == []

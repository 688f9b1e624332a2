"""A pretended Slurm: sbatch, srun, squeue, scancel and scontrol, with real processes as nodes.

The folder PRETEND_SLURM holds all state: `calls` (one JSON list a call), `jobs/ID.json`, and in `jobs/ID/` what was
asked of a job that runs (files requeue, cancel, preempt, lose) and the process ids of its tasks. A job's manager is a
process of its own, started by sbatch; it starts the batch script, and starts it again after a requeue. With the file
`down` no controller answers, with `hold` no node is free, with `norequeue` no job may be queued again. Nodes are called
localhost, node1, node2, ...

As the real ones: sbatch gives the batch script the environment of its caller; --signal=B:... reaches the batch shell
only; scancel --signal reaches the tasks only, with --batch the batch shell only; SIGTERM to srun kills its tasks; a
preemption sends SIGTERM to the tasks and ends the job after its grace; a lost node ends the whole job.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

STATE = pathlib.Path(os.environ["PRETEND_SLURM"])
BEAT = 0.05


def record(words):
  with open(STATE / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\n")


def read(job):
  return json.loads((STATE / "jobs" / f"{job}.json").read_text())


def write(job, **changes):
  path = STATE / "jobs" / f"{job}.json"
  kept = json.loads(path.read_text()) if path.exists() else {}
  partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
  partial.write_text(json.dumps(kept | changes))
  partial.rename(path)


def refuse(tool, said, code=1):
  print(f"{tool}: error: {said}", file=sys.stderr)
  sys.exit(code)


def answers(tool):
  if (STATE / "down").exists():
    refuse(tool, "Unable to contact slurm controller (connect failure)")


def seconds(text):
  days, _, rest = text.rpartition("-")
  parts = [int(part) for part in rest.split(":")]
  parts = [*parts, 0] if len(parts) == 1 else parts
  total = 0
  for part in parts:
    total = total * 60 + part
  return int(days or 0) * 86_400 + total


def sbatch(words):
  answers("sbatch")
  parser = argparse.ArgumentParser(prog="sbatch", allow_abbrev=False)
  for name in ("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "time", "signal", "output"):
    parser.add_argument(f"--{name}")
  for name in ("open-mode", "chdir", "partition", "account"):
    parser.add_argument(f"--{name}")
  parser.add_argument("--parsable", action="store_true")
  parser.add_argument("--requeue", action="store_true")
  parser.add_argument("script")
  parser.add_argument("arguments", nargs="*")
  try:
    given = vars(parser.parse_args(words))
  except SystemExit:
    sys.exit(1)
  if given["partition"] == "none":
    refuse("sbatch", "invalid partition specified: none")
  job = 4000 + len(list((STATE / "jobs").glob("*.json")))
  (STATE / "jobs" / str(job)).mkdir(parents=True)
  content = pathlib.Path(given["script"]).read_text()
  (STATE / "jobs" / str(job) / "caller").write_text(json.dumps(dict(os.environ)))  # Slurm keeps it until the job ends
  write(job, state="PENDING", reason="Resources", restarts=0, content=content, **given)
  out = open(os.devnull, "r+")  # noqa: SIM115
  subprocess.Popen(
    [sys.executable, __file__, "manage", str(job)], stdin=out, stdout=out, stderr=out, start_new_session=True
  )
  print(f"{job};cluster")


def node_names(number):
  return ["localhost", *(f"node{index}" for index in range(1, number))]


def manage(words):
  """Run the sessions of a job until one is the last."""
  job = words[0]
  while (STATE / "hold").exists():  # no node is free
    if (STATE / "jobs" / job / "cancel").exists():
      return write(job, state="CANCELLED", reason="None")
    time.sleep(BEAT)
  while session(job):
    write(job, state="PENDING", reason="BeginTime", restarts=read(job)["restarts"] + 1)
    time.sleep(4 * BEAT)


def session(job):
  """Run the batch script once; return whether it was requeued."""
  given, asked = read(job), STATE / "jobs" / job
  script = asked / "slurm_script"
  script.write_text(given["content"])
  nodes, tasks = int(given["nodes"] or 1), int(given["ntasks_per_node"] or 1)
  environment = {
    **os.environ,
    "SLURM_JOB_ID": job,
    "SLURM_JOB_NODELIST": ",".join(node_names(nodes)),
    "SLURM_JOB_NUM_NODES": str(nodes),
    "SLURM_NTASKS": str(nodes * tasks),
    "SLURM_NTASKS_PER_NODE": str(tasks),
    "SLURM_CPUS_PER_TASK": given["cpus_per_task"] or "1",
    "SLURM_RESTART_COUNT": str(given["restarts"]),
  }
  if given["gpus_per_node"]:
    environment["SLURM_GPUS_PER_NODE"] = given["gpus_per_node"]
  if not given["restarts"]:
    environment.pop("SLURM_RESTART_COUNT")  # as the real one
  with open(given["output"], "a") as log:
    batch = subprocess.Popen(
      ["bash", script, *given["arguments"]],
      cwd=given["chdir"],
      env=environment,
      stdout=log,
      stderr=log,
      start_new_session=True,
    )
  (asked / "batch").write_text(str(batch.pid))
  write(job, state="RUNNING", reason="None")
  number, _, before = given["signal"].removeprefix("B:").partition("@")
  end = time.monotonic() + seconds(given["time"]) * float(os.environ.get("PRETEND_MINUTE", 60)) / 60
  warn, code, requeued, why = end - int(before or 60), None, False, ""
  while (code := batch.poll()) is None and not requeued and why not in ("cancel", "end"):
    time.sleep(BEAT)
    if warn and time.monotonic() > warn:
      signal_to([batch.pid] if given["signal"].startswith("B:") else tasks_of(job), getattr(signal, f"SIG{number}"))
      warn = None
    if time.monotonic() > end:
      requeued, why = why == "preempt", "end" if why != "preempt" else why
    for name in ("requeue", "cancel", "preempt", "lose"):
      if not (asked / name).exists():
        continue
      value = (asked / name).read_text()
      (asked / name).unlink()
      if name in ("requeue", "lose"):
        requeued = given["requeue"]
        why = name if requeued else "end"
      elif name == "cancel":
        why = "cancel"
      else:
        why, end = "preempt", time.monotonic() + float(value)
        signal_to(tasks_of(job), signal.SIGTERM)
  signal_to(tasks_of(job), signal.SIGKILL)
  if code is None:
    signal_to([-batch.pid], signal.SIGKILL)
    code = batch.wait()
  for path in asked.glob("task.*"):
    path.unlink()
  if not requeued:
    state = {"cancel": "CANCELLED", "end": "TIMEOUT"}.get(why, "COMPLETED" if not code else "FAILED")
    write(job, state=state, reason="None", code=code)
  return requeued


def tasks_of(job):
  return [-int(path.read_text()) for path in (STATE / "jobs" / str(job)).glob("task.*") if path.read_text()]


def signal_to(processes, number):
  for process in processes:
    with contextlib.suppress(ProcessLookupError):
      os.kill(process, number) if process > 0 else os.killpg(-process, number)


def srun(words):
  parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
  for name in ("ntasks", "ntasks-per-node", "cpus-per-task", "wait", "kill-on-bad-exit", "export"):
    parser.add_argument(f"--{name}")
  parser.add_argument("--label", action="store_true")
  parser.add_argument("command", nargs=argparse.REMAINDER)
  given = parser.parse_args(words)
  assert given.export == "ALL", "some sites hand no variable to the tasks by default"
  job, nodes = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_JOB_NUM_NODES"])
  number = int(given.ntasks or os.environ["SLURM_NTASKS"])
  per_node = number // nodes
  processes, readers = [], []

  def killed(*_):
    signal_to([-process.pid for process in processes], signal.SIGKILL)

  signal.signal(signal.SIGTERM, killed)
  for index in range(number):
    node = node_names(nodes)[index // per_node]
    environment = {
      **os.environ,
      "SLURM_PROCID": str(index),
      "SLURM_LOCALID": str(index % per_node),
      "SLURM_NODEID": str(index // per_node),
      "SLURM_NTASKS": str(number),
      "SLURMD_NODENAME": node,
      "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
      "SLURM_STEP_NUM_NODES": str(nodes),
    }
    one = (
      subprocess.Popen(
        given.command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
      )
      if given.label
      else subprocess.Popen(given.command, env=environment, start_new_session=True)
    )
    (STATE / "jobs" / job / f"task.{os.getpid()}.{index}").write_text(str(one.pid))
    processes.append(one)
    if given.label:
      readers.append(threading.Thread(target=label, args=(index, one.stdout)))
      readers[-1].start()
  codes = [one.wait() for one in processes]
  for reader in readers:
    reader.join()
  for index in range(number):
    (STATE / "jobs" / job / f"task.{os.getpid()}.{index}").unlink(missing_ok=True)
  sys.exit(max(code if code >= 0 else 128 - code for code in codes))


def label(index, lines):
  for line in lines:
    sys.stdout.write(f"{index}: {line}")
    sys.stdout.flush()


def squeue(words):
  answers("squeue")
  form = next(word.partition("=")[2] for word in words if word.startswith("--format"))
  for path in sorted((STATE / "jobs").glob("*.json")):
    job = json.loads(path.read_text())
    nodes = ",".join(node_names(int(job["nodes"] or 1))) if job["state"] == "RUNNING" else ""
    values = {"%i": path.stem, "%T": job["state"], "%r": job["reason"], "%N": nodes}
    print(re.sub("%[iTrN]", lambda match, values=values: values[match[0]], form))


def scancel(words):
  answers("scancel")
  job = words[-1]
  number = next((word.partition("=")[2] for word in words if word.startswith("--signal")), None)
  if number is None:
    (STATE / "jobs" / job / "cancel").write_text("")
    return
  if read(job)["state"] != "RUNNING":
    refuse("scancel", f"Kill job error on job id {job}: Job is pending execution")
  batch = [int((STATE / "jobs" / job / "batch").read_text())]
  signal_to(batch if "--batch" in words else tasks_of(job), getattr(signal, f"SIG{number}"))


def scontrol(words):
  if words[:2] == ["show", "hostnames"]:
    print("\n".join(words[2].split(",")))
    return
  answers("scontrol")
  if (STATE / "norequeue").exists() or not read(words[1])["requeue"]:
    refuse("scontrol", "Requested operation is presently disabled")
  (STATE / "jobs" / words[1] / "requeue").write_text("")


if __name__ == "__main__":
  tool = sys.argv[1]
  if tool != "manage":
    record(sys.argv[1:])
  {"sbatch": sbatch, "srun": srun, "squeue": squeue, "scancel": scancel, "scontrol": scontrol, "manage": manage}[tool](
    sys.argv[2:]
  )

"""A stand-in for train on the pretended hosts: trainer.py WORKDIR STEPS.

The first process adds numbers, one line of metrics a step, and saves after every fourth step, in two parts; it resumes
from what was saved whole. The others end as it ends. SIGTERM saves and ends with 42. The file WORKDIR/pause holds the
place where it stops until WORKDIR/go is there: `step N`, or `save N` between the two parts.
"""

import json
import os
import pathlib
import signal
import sys
import time

WORKDIR, STEPS = pathlib.Path(sys.argv[1]), int(sys.argv[2])
END = WORKDIR / f"end.{os.environ['INSEC_RUN_TOKEN']}"  # of this start
stopped = []


def pause(place):
  """Stop here if the test wants it, once."""
  wanted = WORKDIR / "pause"
  if wanted.exists() and wanted.read_text() == place:
    wanted.rename(WORKDIR / "paused")
    while not (WORKDIR / "go").exists() and not stopped:
      time.sleep(0.02)


def save(step, total):
  """Save in two parts: the second one makes it valid."""
  (WORKDIR / "state.part").write_text(json.dumps([step, total]))
  pause(f"save {step}")
  (WORKDIR / "state.part").rename(WORKDIR / "state")


def first():
  """Train; return the exit code."""
  state = WORKDIR / "state"
  step, total = json.loads(state.read_text()) if state.exists() else (0, 0)
  metrics = WORKDIR / "metrics.jsonl"
  lines = metrics.read_text().splitlines()[:step] if metrics.exists() else []
  print(f"resuming after step {step}", flush=True)
  while step < STEPS:
    step, total = step + 1, (total * 31 + step) % 1009
    lines.append(json.dumps({"step": step, "loss": total}))
    metrics.write_text("\n".join(lines) + "\n")
    print(f"step {step} loss {total}", flush=True)
    pause(f"step {step}")
    if step % 4 == 0 or stopped:
      save(step, total)
    if stopped:
      return 42
    time.sleep(0.02)
  return 0


def main():
  signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
  WORKDIR.mkdir(parents=True, exist_ok=True)
  if os.environ["RANK"] == "0":
    code = first()
    END.write_text(str(code))
    return code
  while not END.exists() or not END.read_text():
    time.sleep(0.02)
  return int(END.read_text())


if __name__ == "__main__":
  sys.exit(main())

"""A pretended ssh: the shell command runs here, with the folder hosts/HOST of PRETEND_SSH as its home.

`calls` has one JSON list a call. Each file `fault.N` is a fault of one call, the oldest first: a JSON object with
`match` (a pattern of the command) and one of `refuse` (no connection), `stdin` or `stdout` (the connection breaks after
so many bytes). A command whose connection breaks goes on alone, as under a real sshd, until it writes.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

STATE = pathlib.Path(os.environ["PRETEND_SSH"])


def parse(words):
  """Return host and command."""
  while words and words[0].startswith("-"):
    words = words[2:]
  return words[0], " ".join(words[1:])


def fault_of(command):
  for path in sorted(STATE.glob("fault.*")):
    fault = json.loads(path.read_text())
    if re.search(fault["match"], command):
      path.unlink()
      return fault
  return {}


def lost():
  print("Connection to box closed by remote host.", file=sys.stderr, flush=True)
  os._exit(255)


def copy(source, target, limit):
  """Copy until the end; the connection is lost after `limit` bytes."""
  left = limit
  while data := os.read(source, 65_536 if left is None else max(1, min(left, 65_536))):
    if left is not None:
      left -= len(data)
    try:
      os.write(target, data)
    except BrokenPipeError:
      return
    if left is not None and left <= 0:
      time.sleep(0.2)
      lost()


def main():
  with open(STATE / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\n")
  host, command = parse(sys.argv[1:])
  home = STATE / "hosts" / host
  fault = fault_of(command)
  if "refuse" in fault or not home.is_dir():
    print(f"ssh: connect to host {host} port 22: Connection timed out", file=sys.stderr)
    sys.exit(255)
  kept = {
    name: os.environ[name] for name in ("PATH", "LANG", "PRETEND_RUN", "JAX_NUM_CPU_DEVICES") if name in os.environ
  }
  process = subprocess.Popen(
    ["bash", "-c", command], env={**kept, "HOME": str(home)}, cwd=home, stdin=-1, stdout=-1, start_new_session=True
  )

  def send():
    copy(0, process.stdin.fileno(), fault.get("stdin"))
    process.stdin.close()

  threading.Thread(target=send, daemon=True).start()
  copy(process.stdout.fileno(), 1, fault.get("stdout"))
  os._exit(process.wait())


if __name__ == "__main__":
  main()

"""Before JAX starts, the processes of a run meet: all are there, and agree on all that decides the numbers.

Plain TCP to process 0, at the port that JAX uses afterwards. JAX itself aborts when somebody is missing, with a stack
trace and without a name, and two versions of it need not understand each other.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from insec_jax.command import InputError

PORT = 8476  # Cloud TPU networks leave it open; JAX's own default, 8482, is closed there
GREETING_SECONDS = 5


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a process stands among those of its run, and where it finds process 0."""

  host: str
  port: int
  num: int
  index: int
  local_devices: list[int] | None  # None: all that the process sees


def find_place(coordinator: str | None, num: int | None, index: int | None, *, seconds: int) -> Place | None:
  """The place that the flags give, or else the cluster (Cloud TPU, GKE, Slurm, Open MPI); None for a process alone."""
  given = {"--coordinator": coordinator, "--num_processes": num, "--process_id": index}
  if missing := [flag for flag, value in given.items() if value is None]:
    if len(missing) < len(given):
      have = ", ".join(flag for flag in given if flag not in missing)
      raise InputError(f"{have} without {', '.join(missing)}; give all three, or none of them: for a process alone, or "
                       "on a cluster that tells")
    return _place_in_cluster(seconds)
  if num < 1 or not 0 <= index < num:
    raise InputError(f"--process_id={index} of --num_processes={num}; ids run from 0 to one less than the number")
  host, _, port = coordinator.partition(":")
  if not host or (port and not port.isdecimal()):
    raise InputError(f"--coordinator={coordinator!r}; give HOST or HOST:PORT of process 0")
  return None if num == 1 else Place(host, int(port or PORT), num, index, None)


def _place_in_cluster(seconds: int) -> Place | None:
  os.environ.setdefault("JAX_COORDINATOR_PORT", str(PORT))
  address, num, index, local_devices = _jax_clusters().auto_detect_unset_distributed_params(
    None, None, None, None, None, seconds)
  if address is None or num == 1:
    return None
  host, port = address.rsplit(":", 1)
  return Place(host, int(port), num, index, None if local_devices is None else list(local_devices))


def _jax_clusters():
  """What JAX asks for its place in a cluster. Not public: a lone process must know before it asks to join."""
  from jax._src import clusters
  return clusters.ClusterEnv


def meet(place: Place, facts: dict[str, Any], *, seconds: float) -> tuple[str, ...]:
  """The host name of every process; InputError, the same on all that came, if one is missing or has other facts."""
  hello = {"index": place.index, "num": place.num, "name": socket.gethostname(), "facts": facts}
  answer = _receive(place, hello, seconds) if place.index == 0 else _greet(place, hello, seconds)
  if answer["problem"]:
    raise InputError(answer["problem"])
  return tuple(answer["names"])


def _receive(place: Place, hello: dict, seconds: float) -> dict:
  """What process 0 answers to everybody once all have come, or time is up."""
  deadline = time.monotonic() + seconds
  hellos, lines = {0: hello}, {}
  problem = None
  family, dualstack = (socket.AF_INET6, True) if socket.has_dualstack_ipv6() else (socket.AF_INET, False)
  try:
    server = socket.create_server(("", place.port), family=family, dualstack_ipv6=dualstack, backlog=place.num)
  except OSError as error:
    raise InputError(f"port {place.port} cannot be opened here ({error}); another run may still be ending: wait "
                     "for it, or give --coordinator=HOST:PORT with a free port") from error
  with server:
    while len(hellos) < place.num and problem is None:
      server.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        line, _ = server.accept()
      except TimeoutError:
        problem = _nobody_came(place, hellos, seconds)
        break
      came = _read_line(line, GREETING_SECONDS)
      if came is None or "index" not in came:  # a stranger, or a client of a run that has ended
        line.close()
        continue
      index, name = came["index"], came["name"]
      if came["num"] != place.num or not 0 < index < place.num:
        problem = (f"process {index} ({name}) was told of {came['num']} processes, process 0 ({hello['name']}) of "
                   f"{place.num}; give all the same --num_processes")
      elif index in hellos and not _has_left(lines[index]):
        problem = f"two processes, on {hellos[index]['name']} and {name}, have --process_id={index}; give each its own"
      lines[-1 if problem else index] = line
      hellos[index] = came
  # The port is closed by now: whoever has the answer comes again at once, and must find nobody here but JAX.
  names = [hellos[index]["name"] for index in sorted(hellos)]
  if problem is None:
    problem = disagreement([hellos[index]["facts"] for index in range(place.num)], names)
  answer = {"problem": problem, "names": names}
  for line in lines.values():
    with line, contextlib.suppress(OSError):  # whoever left will be missed later
      line.sendall(json.dumps(answer).encode() + b"\n")
  return answer


def _greet(place: Place, hello: dict, seconds: float) -> dict:
  """The answer of process 0, which may start later."""
  deadline = time.monotonic() + seconds
  while True:
    try:
      with socket.create_connection((place.host, place.port), timeout=GREETING_SECONDS) as line:
        line.sendall(json.dumps(hello).encode() + b"\n")
        # Process 0 may have started its clock last: it is the one to say who is missing.
        answer = _read_line(line, seconds + GREETING_SECONDS)
        if answer is not None and "problem" in answer:
          return answer
    except OSError as error:
      reason = error
    else:
      reason = "closed without an answer"
    if time.monotonic() > deadline:
      raise InputError(f"process 0 is missing: process {place.index} ({hello['name']}) waited {seconds:g} s for it at "
                       f"{place.host}:{place.port} ({reason}); start it there, and let that port through")
    time.sleep(0.2)


def _read_line(line: socket.socket, seconds: float) -> dict | None:
  """The JSON object that comes as one line; None if anything else comes, or nothing."""
  line.settimeout(seconds)
  try:
    with line.makefile("rb") as file:
      said = json.loads(file.readline(2**20))
  except (OSError, ValueError):
    return None
  return said if isinstance(said, dict) else None


def _has_left(line: socket.socket) -> bool:
  line.settimeout(0.001)
  try:
    return not line.recv(1, socket.MSG_PEEK)
  except TimeoutError:
    return False
  except OSError:
    return True


def _nobody_came(place: Place, hellos: dict[int, dict], seconds: float) -> str:
  missing = [index for index in range(place.num) if index not in hellos]
  came = ", ".join(f"{index} ({hellos[index]['name']})" for index in sorted(hellos))
  word = "process" if len(missing) == 1 else "processes"
  return (f"missing: {word} {', '.join(map(str, missing))} of {place.num}; waited {seconds:g} s at "
          f"{hellos[0]['name']}:{place.port}, came: {came}; start the same command on every host")


def disagreement(facts: Sequence[dict[str, Any]], names: Sequence[str]) -> str | None:
  """One line on who differs from most of the others, and in what; None if all processes have the same facts.

  Where no value has a majority, that of process 0 counts.
  """
  told = []
  for key in dict.fromkeys(key for of_one in facts for key in of_one):
    values = [json.dumps(of_one.get(key)) for of_one in facts]
    common = max(Counter(values), key=lambda value: (values.count(value), value == values[0]))
    told += [f"process {index} ({names[index]}) has {key} {value}, the others {common}"
             for index, value in enumerate(values) if value != common]
  if not told:
    return None
  more = f", and {len(told) - 3} more" if len(told) > 3 else ""
  return f"the processes differ: {'; '.join(told[:3])}{more}; start the same code with the same command on every host"

"""Rendezvous of the processes of a run before JAX starts: all are present and agree on code, config and versions.

Plain TCP to process 0, at the port that JAX uses afterwards. When a process is missing, JAX itself aborts with a stack
trace that does not name it, and two versions of JAX may be incompatible.
"""

import dataclasses
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from insec_jax.command import InputError
from insec_jax.distributed import coordinator, handshake
from insec_jax.distributed.handshake import Answer, Greeting, printable


@dataclasses.dataclass(frozen=True)
class ProcessSpec:
  """Index of a process, number of processes, and address of process 0."""

  host: str
  port: int
  num: int
  index: int
  local_devices: list[int] | None  # None: all that are visible to the process


def detect_processes(address: str | None, num: int | None, index: int | None, *, seconds: int) -> ProcessSpec | None:
  """Return process id, count and coordinator from the flags or the cluster; None for a single process.

  Clusters are Cloud TPU, GKE, Slurm and Open MPI. `seconds` limits the wait for the cluster's answer. Raises InputError
  for an incomplete set of flags, an id out of range, or an address that is not valid.
  """
  given = {"--coordinator": address, "--num_processes": num, "--process_id": index}
  if missing := [flag for flag, value in given.items() if value is None]:
    if len(missing) < len(given):
      have = ", ".join(flag for flag in given if flag not in missing)
      raise InputError(
        f"{have} without {', '.join(missing)}; give all three, or none of them: for a process alone, or "
        "on a cluster that tells"
      )
    return _detect_in_cluster(seconds)
  if not 1 <= num <= handshake.MAX_PROCESSES or not 0 <= index < num:
    raise InputError(
      f"--process_id={index} of --num_processes={num}; ids run from 0 to one less than the number, "
      f"which is at most {handshake.MAX_PROCESSES}"
    )
  host, port = coordinator.parse_address(address, "--coordinator")
  if host in coordinator.ANY_ADDRESS:
    raise InputError(
      f"--coordinator={address} means every address of a machine; give the one of process 0 to which "
      "the other hosts connect"
    )
  return None if num == 1 else ProcessSpec(host, port, num, index, None)


def _detect_in_cluster(seconds: int) -> ProcessSpec | None:
  os.environ.setdefault("JAX_COORDINATOR_PORT", str(coordinator.PORT))
  address, num, index, local_devices = _jax_clusters().auto_detect_unset_distributed_params(
    None, None, None, None, None, seconds
  )
  if address is None or num == 1:
    return None
  host, _, port = address.rpartition(":")  # some clusters give an IPv6 address without brackets
  host, port = coordinator.parse_address(
    f"[{host}]:{port}" if ":" in host and "[" not in host else address,
    "the coordinator of the cluster (its port: JAX_COORDINATOR_PORT)",
  )
  return ProcessSpec(host, port, num, index, None if local_devices is None else list(local_devices))


def _jax_clusters():
  """Return JAX's cluster detection.

  It is not public, but a single process must be recognised before jax.distributed.initialize is called.
  """
  from jax._src import clusters

  return clusters.ClusterEnv


def rendezvous(spec: ProcessSpec, facts: dict[str, Any], *, seconds: float) -> tuple[str, ...]:
  """Return the host name of every process, made printable.

  Raises InputError, the same on every process present, if a process is missing or has other facts.
  """
  key = handshake.run_key()
  greeting = Greeting(
    spec.index,
    spec.num,
    printable(socket.gethostname() or "unnamed", handshake.MAX_NAME),
    {name: handshake.fact_text(value) for name, value in facts.items()},
  )
  answer = (_receive if spec.index == 0 else _join)(spec, greeting, key, seconds)
  if answer.problem is not None:
    raise InputError(answer.problem)
  return answer.names


def _receive(spec: ProcessSpec, greeting: Greeting, key: bytes, seconds: float) -> Answer:
  """Return the answer of process 0, sent to all processes once all have arrived or the time is up."""
  server = coordinator.Server(spec.host, spec.port, greeting, key, seconds=seconds)
  problem = server.wait()
  names = [arrived.name for arrived in server.greetings()]
  if problem is None:
    problem = _difference([arrived.facts for arrived in server.greetings()], names)
  if problem is not None:
    problem, names = printable(problem, handshake.MAX_PROBLEM), []
  server.answer({"problem": problem, "names": names})
  if problem is None and server.ignored:
    print(coordinator.ignored_text(server.ignored), file=sys.stderr, flush=True)
  return Answer(problem, tuple(names))


def _join(spec: ProcessSpec, greeting: Greeting, key: bytes, seconds: float) -> Answer:
  """Connect to process 0, which may start later, and return its answer; InputError if it does not start in time."""
  deadline = time.monotonic() + seconds
  while True:
    try:
      with socket.create_connection((spec.host, spec.port), timeout=coordinator.GREETING_SECONDS) as line:
        return _exchange(line, greeting, key, seconds)
    except OSError as error:
      reason = error
    if time.monotonic() > deadline:
      at = coordinator.join_address(spec.host, spec.port)
      raise InputError(
        f"process 0 is missing: process {spec.index} ({greeting.name}) waited {seconds:g} s for it at "
        f"{at} ({reason}); start it there, and let that port through"
      )
    time.sleep(0.2)


def _exchange(line: socket.socket, greeting: Greeting, key: bytes, seconds: float) -> Answer:
  """Greet over the connection and return the answer; ConnectionError if the peer is not process 0 of this run."""
  lines = _Lines(line)
  nonce = handshake.read_challenge(lines.read(coordinator.GREETING_SECONDS, 100))
  if nonce is None:
    raise ConnectionError("another program, or another version of this one, answers there")
  message = handshake.write_greeting(greeting, key=key, context=nonce)
  line.settimeout(coordinator.GREETING_SECONDS)
  line.sendall(message)
  seal = {"key": key, "context": message[: handshake.MAC_LENGTH]}
  if handshake.read_message("welcome", lines.read(coordinator.GREETING_SECONDS, 1000), **seal) is None:
    raise ConnectionError(f"what answers there is not of this run: it does not know its {handshake.TOKEN}")
  # Longer than process 0 waits, which may have started later: its answer names the missing processes.
  most = handshake.MAX_MESSAGE_BYTES + 2 * handshake.MAX_NAME * greeting.num
  answer = handshake.read_answer(lines.read(seconds + coordinator.GREETING_SECONDS, most), greeting.num, **seal)
  if answer is None:
    raise ConnectionError("what answers there is no process 0 of this version")
  return answer


class _Lines:
  """Reader of the lines of a connection; the time limit holds for a whole line."""

  def __init__(self, line: socket.socket):
    self._line, self._buffer = line, bytearray()

  def read(self, seconds: float, most: int) -> bytes:
    """Return the next line without its newline; OSError unless it ends within `seconds` and about `most` bytes."""
    deadline = time.monotonic() + seconds
    while (end := self._buffer.find(b"\n")) < 0:
      left = deadline - time.monotonic()
      if left <= 0:
        raise TimeoutError("no answer in time")
      self._line.settimeout(left)
      data = self._line.recv(2**16)
      if not data:
        raise ConnectionError(f"closed without an answer; an {handshake.TOKEN} must be the same on every host")
      self._buffer += data
      if len(self._buffer) > most:
        raise ConnectionError("what answers there is another program")
    next_line = bytes(self._buffer[:end])
    del self._buffer[: end + 1]
    return next_line


def disagreement(facts: Sequence[dict[str, Any]], names: Sequence[str]) -> str | None:
  """Return one line that names the processes whose facts differ from the majority; None if all facts are equal.

  The value of process 0 breaks ties.
  """
  return _difference([{key: handshake.fact_text(value) for key, value in own.items()} for own in facts], names)


def _difference(facts: Sequence[dict[str, str]], names: Sequence[str]) -> str | None:
  """Return the result of `disagreement` for values that are JSON texts."""
  differences = []
  for key in dict.fromkeys(key for own in facts for key in own):
    values = [own.get(key, "null") for own in facts]
    count = Counter(values)
    common = max(count, key=lambda value: (count[value], value == values[0]))
    shown = {value: printable(value, handshake.MAX_VALUE) for value in count}
    differences += [
      f"process {index} ({names[index]}) has {printable(key, handshake.MAX_KEY)} {shown[value]}, the "
      f"others {shown[common]}"
      for index, value in enumerate(values)
      if value != common
    ]
  if not differences:
    return None
  more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
  return (
    f"the processes differ: {'; '.join(differences[:3])}{more}; start the same code with the same command on every host"
  )

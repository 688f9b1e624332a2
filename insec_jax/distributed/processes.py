"""Processes of one run: collective values, a common end after a failure, and a common last step after SIGTERM.

After the rendezvous (rendezvous.py) each process writes a heartbeat every second to the key-value store of JAX's
runtime, which works even while the devices wait for each other. Process 0 ends the run on all processes when one is
silent or has failed. SIGTERM to any process stops all after the same step (`Processes.stops`). A single process skips
all of this.
"""

import contextlib
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from insec_jax import command, stop_signal
from insec_jax.command import InputError
from insec_jax.distributed import coordinator
from insec_jax.distributed.failure import (
  AGAIN,
  SILENCE_AFTER_FAILURE,
  SILENCE_SECONDS,
  ExitStatus,
  FailureDetector,
  missing_processes,
)
from insec_jax.distributed.relay import Relay
from insec_jax.distributed.rendezvous import ProcessSpec, disagreement, rendezvous

BEAT_SECONDS = 1
JOIN_SECONDS = 60  # for processes that have just finished the rendezvous
PATIENCE_SECONDS = 3600  # for live processes: one host may read weights far slower than another


def _jax_client():
  """Return the client of the runtime's key-value store. It is not public; Orbax uses it as well."""
  from jax._src import distributed

  return distributed.global_state.client


def alone() -> "Processes":
  """Return the `Processes` of a run of one process."""
  return Processes(0, (socket.gethostname(),))


@contextlib.contextmanager
def joined(spec: ProcessSpec | None, facts: dict[str, Any], *, seconds: int) -> Iterator["Processes"]:
  """Yield the processes of the run after the rendezvous, an agreement on `facts` and the start of jax.distributed.

  The block must contain every use of a device. With several processes, an exception in any of them ends all of them
  with one line and the same exit code.
  """
  if spec is None:
    yield alone()
    return
  processes = Processes(spec.index, rendezvous(spec, facts, seconds=seconds))
  with stop_signal.deferred(processes.request_stop):
    processes.join(spec)
    try:
      yield processes
    except BaseException as error:  # any kind: the other processes must not wait for this one
      processes.fail(error)
    processes.leave()


class Processes:
  """Processes of a run; each calls `gather` and `agree` in the same order."""

  def __init__(self, index: int, names: tuple[str, ...]):
    self.index, self.names = index, names
    self._rounds = 0
    self._over = threading.Event()
    self._ending = threading.Lock()  # held by the thread that ends the process
    self._error: BaseException | None = None
    self._failure: ExitStatus | None = None
    self._last_response = time.monotonic()  # time at which the store last responded
    self._stop_requested = threading.Event()  # set by SIGTERM to this process
    self._choosing_last_step = threading.Lock()  # held while the processes exchange their current steps
    self._step, self._last_step = 0, None  # the current step of this process; the step after which all stop

  @property
  def num(self) -> int:
    return len(self.names)

  @property
  def is_first(self) -> bool:
    """Whether this is process 0, which writes files and messages for all."""
    return self.index == 0

  def say(self, text: str) -> None:
    """Print to stderr on process 0 only."""
    if self.is_first:
      print(text, file=sys.stderr, flush=True)

  def gather(self, what: str, value: Any) -> list:
    """Return the values of all processes, ordered by process; a value is anything that JSON can hold.

    `what` names the value in errors. RuntimeError if a process does not call within PATIENCE_SECONDS, or calls with
    another `what`.
    """
    if self.num == 1:
      return [value]
    self._rounds += 1
    folder = f"insec/round/{self._rounds}"
    self._client.key_value_set(f"{folder}/of/{self.index}", json.dumps([what, value]))
    deadline = time.monotonic() + PATIENCE_SECONDS
    if self.is_first:
      while len(values := self._read(f"{folder}/of/")) < self.num:
        if time.monotonic() > deadline:
          missing = ", ".join(self._name(index) for index in range(self.num) if index not in values)
          raise RuntimeError(f"{missing} did not come to {what!r} within {PATIENCE_SECONDS} s")
        time.sleep(0.02)
      self._client.key_value_set(f"{folder}/all", json.dumps([values[index] for index in range(self.num)]))
    gathered = json.loads(self._client.blocking_key_value_get(f"{folder}/all", 1000 * (PATIENCE_SECONDS + 10)))
    if any(name != what for name, _ in gathered):
      raise RuntimeError(f"processes came to different rounds: {gathered}")
    return [value for _, value in gathered]

  def agree(self, what: str, facts: dict[str, Any]) -> None:
    """Raise InputError on every process unless the facts of all processes are equal."""
    if problem := disagreement(self.gather(what, facts), self.names):
      raise InputError(problem)

  def stops(self, step: int) -> bool:
    """Return whether the run stops after this step because of a SIGTERM; true on all processes after the same step.

    Each of several processes calls it after every step. It may block while they choose the last step.
    """
    with self._choosing_last_step:
      self._step = step
    return step == self._last_step

  def request_stop(self) -> None:
    """Ask all processes to stop after the same step."""
    self._stop_requested.set()

  def join(self, spec: ProcessSpec) -> None:
    """Start jax.distributed, the heartbeat, failure detection and the handling of SIGTERM."""
    # JAX's preemption service waits for messages with the GIL held, which blocks the threads of Relay.
    jax.config.update("jax_enable_preemption_service", False)
    bind, address = coordinator.jax_addresses(spec.host, spec.port)
    if not self.is_first:
      relay = Relay(spec.host, spec.port, self._lost_process_0)
      address = f"127.0.0.1:{relay.port}"
    # JAX would abort the process at its own, later time limit.
    late = threading.Timer(
      JOIN_SECONDS,
      self._end,
      [
        ExitStatus(
          command.FAILED,
          (
            f"all met, but not all joined the JAX runtime of {self._name(0)} at {spec.host}:{spec.port} in "
            f"{JOIN_SECONDS} s; {AGAIN}"
          ),
        )
      ],
    )
    late.daemon = True
    late.start()
    # Without a bind address JAX's coordinator, which has no authentication, listens on every interface.
    jax.distributed.initialize(
      address,
      spec.num,
      spec.index,
      local_device_ids=spec.local_devices,
      coordinator_bind_address=bind,
      cluster_detection_method="deactivate",
      initialization_timeout=JOIN_SECONDS + 10,
      shutdown_timeout_seconds=60,
    )
    late.cancel()
    if not self.is_first:
      relay.holds = True
    self._client = _jax_client()
    self._last_response = time.monotonic()
    for thread in (self._watch, self._guard, self._announce_stop, self._choose_last_step):
      threading.Thread(target=thread, daemon=True, name=thread.__name__).start()

  def leave(self) -> None:
    """Wait for all processes to arrive here, and shut the runtime down."""
    if self.is_first:
      self._publish_stop("over")  # or `_choose_last_step` would wait for ever
    self.gather("the end", None)
    self._over.set()
    jax.distributed.shutdown()

  def fail(self, error: BaseException) -> None:
    """Report the error of this process and wait for the end of all processes; never returns."""
    self._error = error
    codes = {InputError: command.WRONG_INPUT, command.DivergedError: command.DIVERGED}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), command.FAILED)
    if code == command.FAILED:
      line = command.machine_refusal(error) or f"{type(error).__name__}: {error}".splitlines()[0]
    else:
      line = " ".join(str(error).split())
    self._failure = ExitStatus(code, line)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # `_guard` ends this process if process 0 is missing
      self._client.key_value_set(f"insec/failed/{self.index}", json.dumps(self._failure))
    threading.Event().wait()

  def _name(self, index: int) -> str:
    return f"process {index} ({self.names[index]})"

  def _read(self, folder: str) -> dict[int, Any]:
    """Return the value that each process has put into a folder of the store."""
    return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in self._client.key_value_dir_get(folder)}

  def _watch(self) -> None:
    """Write this process's heartbeat and read the exit status, which process 0 writes."""
    detector = FailureDetector(self.names)
    for beat in range(2**62):
      if self._over.wait(BEAT_SECONDS):
        return
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # `_guard` ends this process when it happens too often
        self._client.key_value_set(f"insec/beat/{self.index}", str(beat), allow_overwrite=True)
        if self.is_first and (
          status := detector.diagnose(self._read("insec/beat/"), self._read("insec/failed/"), time.monotonic())
        ):
          self._client.key_value_set("insec/status/0", json.dumps(status))
        statuses = self._read("insec/status/")
        self._last_response = time.monotonic()
        if statuses:
          self._acknowledge()
          self._end(ExitStatus(*statuses[0]))

  def _publish_stop(self, why: str) -> None:
    """Publish the reason to stop, which `_choose_last_step` of every process reads; the first reason counts."""
    try:
      self._client.key_value_set("insec/stop", why)
    except jax.errors.JaxRuntimeError as error:
      if "ALREADY_EXISTS" not in str(error):
        raise

  def _announce_stop(self) -> None:
    """Publish a SIGTERM to this process."""
    self._stop_requested.wait()
    self._publish_stop("SIGTERM")

  def _choose_last_step(self) -> None:
    """Set the last step after a SIGTERM to any process: one more than the largest current step of all processes."""
    reason = ""
    while not reason and not self._over.wait(BEAT_SECONDS):
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # a time-out; `_guard` ends it if the store is missing
        reason = self._client.blocking_key_value_get("insec/stop", 1000 * PATIENCE_SECONDS)
    if reason != "SIGTERM":
      return
    with self._choosing_last_step, contextlib.suppress(jax.errors.JaxRuntimeError):  # as above
      self._client.key_value_set(f"insec/step/{self.index}", str(self._step))
      self._last_step = 1 + max(
        int(self._client.blocking_key_value_get(f"insec/step/{index}", 1000 * PATIENCE_SECONDS))
        for index in range(self.num)
      )

  def _acknowledge(self) -> None:
    """Record that this process has read the status; on process 0, also wait until all others have.

    The store ends with process 0.
    """
    deadline = time.monotonic() + SILENCE_AFTER_FAILURE
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f"insec/read/{self.index}", "1")
      while self.is_first and len(self._read("insec/read/")) < self.num and time.monotonic() < deadline:
        time.sleep(0.1)

  def _guard(self) -> None:
    """End this process when the store has not responded for SILENCE_SECONDS."""
    while not self._over.wait(BEAT_SECONDS):
      if (silence := time.monotonic() - self._last_response) > SILENCE_SECONDS:
        self._end(missing_processes([0], silence, self.names))

  def _lost_process_0(self) -> None:
    """End this process, unless the run has just ended on all processes."""
    time.sleep(2 * BEAT_SECONDS)
    if not self._over.is_set():
      self._end(missing_processes([0], time.monotonic() - self._last_response, self.names))

  def _end(self, status: ExitStatus) -> None:
    """End this process with the status; never returns."""
    self._ending.acquire()  # a second thread waits here for the end
    if self._failure is not None and self._failure.code == command.FAILED and self._failure.line in status.line:
      traceback.print_exception(self._error)
    stop_signal.end(status.code, f"error: {status.line}")

"""Many processes, one run: none trains unless all agree, and none waits for one that is gone.

After rendezvous.py each process gives a sign of life every second through the key-value store of JAX's runtime, which
works even while the devices wait for each other. Process 0 ends the run for all when one is silent, or has failed.
SIGTERM to any process stops all after the same step (`Processes.stops`). A process alone does none of this.
"""

import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from insec_jax import command, stop_signal
from insec_jax.command import InputError
from insec_jax.distributed import coordinator
from insec_jax.distributed.coordinator import GREETING_SECONDS
from insec_jax.distributed.rendezvous import ProcessSpec, disagreement, rendezvous

BEAT_SECONDS = 1
# A process is gone after so much silence: a garbage collection or a slow disk must not end a run. When another one has
# failed already, which is what a collective does whose other end is gone, the question is only whose fault it was.
SILENCE_SECONDS, SILENCE_AFTER_FAILURE = 30, 5
MAX_RELAYED = 16  # connections of JAX's client to process 0; it has one, and tries again while process 0 is not there
JOIN_SECONDS = 60  # for processes that have just met
PATIENCE_SECONDS = 3600  # for processes that are alive: one host may read weights far slower than another
AGAIN = "start the same command again on every host: the run goes on from its last checkpoint"


def _jax_client():
  """The client of the runtime's key-value store. Not public either; Orbax uses it as well."""
  from jax._src import distributed

  return distributed.global_state.client


class Relay:
  """A way to process 0. Once `holds`, it stays open at this end after the other has closed, and calls `on_loss`.

  JAX's client aborts its process, with a stack trace and without a name, as soon as its connection closes. Before it
  has joined, it tries again by itself. Connections of other processes of this machine are closed at once: they would
  end the run when they close.
  """

  def __init__(self, host: str, port: int, on_loss: Callable[[], None]):
    self._target, self._on_loss = (host, port), on_loss
    self.holds = False
    self._free = threading.Semaphore(MAX_RELAYED)
    self._server = socket.create_server(("127.0.0.1", 0))
    self.port = self._server.getsockname()[1]
    self._start(self._accept)

  def _start(self, function, *arguments):
    threading.Thread(target=function, args=arguments, daemon=True, name="relay").start()

  def _accept(self):
    while True:
      try:
        near, address = self._server.accept()
      except OSError:  # the other end has gone, or descriptors are scarce: the next one may succeed
        time.sleep(0.1)
        continue
      if is_foreign(address[1], self.port) or not self._free.acquire(blocking=False):
        near.close()
        continue
      try:
        self._start(self._connect, near)
      except RuntimeError:  # no more threads; JAX's client tries again
        near.close()
        self._free.release()

  def _connect(self, near: socket.socket):
    try:
      self._relay(near)
    except (OSError, RuntimeError):
      _close(near)
    finally:
      self._free.release()

  def _relay(self, near: socket.socket):
    while True:  # process 0 opens its port again right after the rendezvous
      try:
        far = socket.create_connection(self._target, timeout=GREETING_SECONDS)
        break
      except OSError:
        time.sleep(0.1)
    far.settimeout(None)
    for one in (near, far):
      one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self._start(self._send, near, far)
    with contextlib.suppress(OSError):
      while data := far.recv(2**16):
        near.sendall(data)
    _close(far)
    if self.holds:
      self._on_loss()
    else:
      _close(near)

  def _send(self, near: socket.socket, far: socket.socket):
    with contextlib.suppress(OSError):
      while data := near.recv(2**16):
        with contextlib.suppress(OSError):  # what cannot be sent any more is lost with process 0
          far.sendall(data)
    _close(far)


def is_foreign(near_port: int, far_port: int) -> bool:
  """Return whether the near end of a TCP connection within this machine is known to belong to another process.

  Linux lists every connection with the inode of its socket; where it does not, nothing is known.
  """
  ends = [f"{port:04X}" for port in (near_port, far_port)]
  try:
    rows = [
      row.split()
      for table in ("tcp", "tcp6")
      for row in pathlib.Path("/proc/self/net", table).read_text(encoding="ascii").splitlines()[1:]
    ]
    inodes = {f"socket:[{row[9]}]" for row in rows if [end.rpartition(":")[2] for end in row[1:3]] == ends}
    own = {_link(file) for file in os.scandir("/proc/self/fd")}
  except (OSError, ValueError, IndexError):
    return False
  return bool(inodes) and not inodes & own


def _link(file: os.DirEntry) -> str:
  try:
    return os.readlink(file)
  except OSError:  # closed since
    return ""


def _close(line: socket.socket):
  """Close the line, also for a thread that reads from it."""
  with contextlib.suppress(OSError):
    line.shutdown(socket.SHUT_RDWR)
  line.close()


class ExitStatus(NamedTuple):
  """How a run of several ends before its time: exit code and last line, the same for every process."""

  code: int
  line: str


def alone() -> "Processes":
  """A run of one process."""
  return Processes(0, (socket.gethostname(),))


@contextlib.contextmanager
def joined(place: ProcessSpec | None, facts: dict[str, Any], *, seconds: int) -> Iterator["Processes"]:
  """The processes of the run, met, agreed on `facts` and joined; must surround all that uses a device.

  An exception in any of several processes ends all of them: with one line and the same exit code, never later.
  """
  if place is None:
    yield alone()
    return
  processes = Processes(place.index, rendezvous(place, facts, seconds=seconds))
  with stop_signal.deferred(processes.ask_to_stop):
    processes.join(place)
    try:
      yield processes
    except BaseException as error:  # whatever it is, the others must not wait for this process
      processes.fail(error)
    processes.leave()


class Processes:
  """All processes of a run; each calls `gather` and `agree` in the same order."""

  def __init__(self, index: int, names: tuple[str, ...]):
    self.index, self.names = index, names
    self._rounds = 0
    self._over = threading.Event()
    self._ending = threading.Lock()  # whoever holds it ends the process
    self._error: BaseException | None = None
    self._failure: ExitStatus | None = None
    self._heard = time.monotonic()  # when the store last answered
    self._told = threading.Event()  # that this process has got SIGTERM
    self._counting = threading.Lock()  # held while all tell each other the step to which they have come
    self._step, self._last = 0, None  # to which this process has come; after which all stop

  @property
  def num(self) -> int:
    return len(self.names)

  @property
  def is_first(self) -> bool:
    """Whether this is process 0, which writes and speaks for all."""
    return self.index == 0

  def say(self, text: str) -> None:
    """Print to stderr on process 0 only."""
    if self.is_first:
      print(text, file=sys.stderr, flush=True)

  def gather(self, what: str, value: Any) -> list:
    """The value, any JSON, that each process gave, by process; `what` is said when one does not come to it."""
    if self.num == 1:
      return [value]
    self._rounds += 1
    folder = f"insec/round/{self._rounds}"
    self._client.key_value_set(f"{folder}/of/{self.index}", json.dumps([what, value]))
    deadline = time.monotonic() + PATIENCE_SECONDS
    if self.is_first:
      while len(came := self._read(f"{folder}/of/")) < self.num:
        if time.monotonic() > deadline:
          missing = ", ".join(self._name(index) for index in range(self.num) if index not in came)
          raise RuntimeError(f"{missing} did not come to {what!r} within {PATIENCE_SECONDS} s")
        time.sleep(0.02)
      self._client.key_value_set(f"{folder}/all", json.dumps([came[index] for index in range(self.num)]))
    told = json.loads(self._client.blocking_key_value_get(f"{folder}/all", 1000 * (PATIENCE_SECONDS + 10)))
    if any(name != what for name, _ in told):
      raise RuntimeError(f"processes came to different rounds: {told}")
    return [value for _, value in told]

  def agree(self, what: str, facts: dict[str, Any]) -> None:
    """Nothing; InputError on every process if the facts of one differ."""
    if problem := disagreement(self.gather(what, facts), self.names):
      raise InputError(problem)

  def stops(self, step: int) -> bool:
    """Whether the run stops after this step because SIGTERM came to a process: true on all after the same one.

    For a run of several, whose processes call it after every step; may wait while they agree.
    """
    with self._counting:
      self._step = step
    return step == self._last

  def ask_to_stop(self) -> None:
    """Make all processes stop after the same step."""
    self._told.set()

  def join(self, place: ProcessSpec) -> None:
    """Nothing; jax.distributed runs, this process watches and is watched, and SIGTERM asks all to stop."""
    # JAX's own way to stop together waits for messages while no thread of Python may run, those of Relay included.
    jax.config.update("jax_enable_preemption_service", False)
    bind, address = coordinator.jax_addresses(place.host, place.port)
    if not self.is_first:
      relay = Relay(place.host, place.port, self._lost_process_0)
      address = f"127.0.0.1:{relay.port}"
    # When the time is up JAX aborts the process.
    late = threading.Timer(
      JOIN_SECONDS,
      self._end,
      [
        ExitStatus(
          command.FAILED,
          (
            f"all met, but not all joined the JAX runtime of {self._name(0)} at {place.host}:{place.port} in "
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
      place.num,
      place.index,
      local_device_ids=place.local_devices,
      coordinator_bind_address=bind,
      cluster_detection_method="deactivate",
      initialization_timeout=JOIN_SECONDS + 10,
      shutdown_timeout_seconds=60,
    )
    late.cancel()
    if not self.is_first:
      relay.holds = True
    self._client = _jax_client()
    self._heard = time.monotonic()
    for thread in (self._watch, self._guard, self._announce_stop, self._choose_last_step):
      threading.Thread(target=thread, daemon=True, name=thread.__name__).start()

  def leave(self) -> None:
    """Nothing; all processes have come here, and the runtime is gone."""
    if self.is_first:
      self._call_off("over")  # or `_choose_last_step` would wait for ever
    self.gather("the end", None)
    self._over.set()
    jax.distributed.shutdown()

  def fail(self, error: BaseException) -> None:
    """Never returns: all processes of the run end, this one too, once it is judged whose fault it was."""
    self._error = error
    codes = {InputError: command.WRONG_INPUT, command.DivergedError: command.DIVERGED}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), command.FAILED)
    if code == command.FAILED:
      line = command.machine_refusal(error) or f"{type(error).__name__}: {error}".splitlines()[0]
    else:
      line = " ".join(str(error).split())
    self._failure = ExitStatus(code, line)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # without process 0 there is nobody to tell
      self._client.key_value_set(f"insec/failed/{self.index}", json.dumps(self._failure))
    threading.Event().wait()

  def _name(self, index: int) -> str:
    return f"process {index} ({self.names[index]})"

  def _read(self, folder: str) -> dict[int, Any]:
    """What each process has put into a folder of the store."""
    return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in self._client.key_value_dir_get(folder)}

  def _watch(self) -> None:
    """Gives this process's sign of life and looks for a status, which process 0 makes."""
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
        told = self._read("insec/status/")
        self._heard = time.monotonic()
        if told:
          self._acknowledge()
          self._end(ExitStatus(*told[0]))

  def _call_off(self, why: str) -> None:
    """Tells all, `_choose_last_step` of each process, why there are no more steps; the first one to say so is heard."""
    try:
      self._client.key_value_set("insec/stop", why)
    except jax.errors.JaxRuntimeError as error:
      if "ALREADY_EXISTS" not in str(error):
        raise

  def _announce_stop(self) -> None:
    """Tells all of this process's SIGTERM."""
    self._told.wait()
    self._call_off("SIGTERM")

  def _choose_last_step(self) -> None:
    """Sets the last step once a process was told to stop: the one after the furthest to which any process has come."""
    told = ""
    while not told and not self._over.wait(BEAT_SECONDS):
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody for so long; `_guard` ends it if the store is gone
        told = self._client.blocking_key_value_get("insec/stop", 1000 * PATIENCE_SECONDS)
    if told != "SIGTERM":
      return
    with self._counting, contextlib.suppress(jax.errors.JaxRuntimeError):  # as above
      self._client.key_value_set(f"insec/step/{self.index}", str(self._step))
      self._last = 1 + max(
        int(self._client.blocking_key_value_get(f"insec/step/{index}", 1000 * PATIENCE_SECONDS))
        for index in range(self.num)
      )

  def _acknowledge(self) -> None:
    """Nothing; process 0 knows that this process has read the status, and if this is process 0, it has waited: what
    the others read goes with it."""
    deadline = time.monotonic() + SILENCE_AFTER_FAILURE
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f"insec/read/{self.index}", "1")
      while self.is_first and len(self._read("insec/read/")) < self.num and time.monotonic() < deadline:
        time.sleep(0.1)

  def _guard(self) -> None:
    """Ends this process when the store has not answered for too long."""
    while not self._over.wait(BEAT_SECONDS):
      if (silence := time.monotonic() - self._heard) > SILENCE_SECONDS:
        self._end(missing_processes([0], silence, self.names))

  def _lost_process_0(self) -> None:
    """Ends this process, unless all end in order: then the status has just been read."""
    time.sleep(2 * BEAT_SECONDS)
    if not self._over.is_set():
      self._end(missing_processes([0], time.monotonic() - self._heard, self.names))

  def _end(self, status: ExitStatus) -> None:
    """Never returns."""
    self._ending.acquire()  # whoever comes second waits for the end
    if self._failure is not None and self._failure.code == command.FAILED and self._failure.line in status.line:
      traceback.print_exception(self._error)
    stop_signal.end(status.code, f"error: {status.line}")


class FailureDetector:
  """What process 0 knows of all processes, and its judgement."""

  def __init__(self, names: Sequence[str]):
    self._names = names
    self._beats: dict[int, tuple[Any, float]] = {}  # the last sign of life, and when it was new
    self._failed: dict[int, tuple[ExitStatus, float]] = {}  # in the order in which they were seen

  def diagnose(self, beats: dict[int, Any], failed: dict[int, Sequence], now: float) -> ExitStatus | None:
    """How the run ends, or None while nothing is wrong or it isn't known yet whose fault it is."""
    for index in range(len(self._names)):
      beat = beats.get(index)
      if index not in self._beats or self._beats[index][0] != beat:
        self._beats[index] = beat, now
    for index, of_one in failed.items():
      self._failed.setdefault(index, (ExitStatus(*of_one), now))
    limit = SILENCE_AFTER_FAILURE if self._failed else SILENCE_SECONDS
    silence = {index: now - since for index, (_, since) in self._beats.items()}
    if silent := [index for index in silence if silence[index] > limit]:
      return missing_processes(silent, max(silence.values()), self._names)
    if not self._failed:
      return None
    index, (first, since) = next(iter(self._failed.items()))
    all_failed = len(self._failed) == len(self._names)
    if all_failed and len({status for status, _ in self._failed.values()}) == 1:
      return first
    # Another one may be about to say the same, or to fall silent.
    if not all_failed and now - since < (1 if first.code != command.FAILED else 2) + SILENCE_AFTER_FAILURE:
      return None
    return first._replace(line=f"process {index} ({self._names[index]}): {first.line}")


def missing_processes(silent: Sequence[int], seconds: float, names: Sequence[str]) -> ExitStatus:
  """The end of a run that has lost these processes."""
  who = ", ".join(f"process {index} ({names[index]})" for index in silent)
  return ExitStatus(command.FAILED, f"missing: {who}, no sign of life for {seconds:.0f} s; {AGAIN}")

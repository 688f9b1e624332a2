"""Failure detection: which end of the run the heartbeats and reports of its processes call for."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from insec_jax import command

# Seconds without a heartbeat after which a process counts as missing: a garbage collection or a slow disk must not end
# a run. After a failure, such as that of a collective whose peer is missing, only the cause remains to be found.
SILENCE_SECONDS, SILENCE_AFTER_FAILURE = 30, 5
AGAIN = "start the same command again on every host: the run goes on from its last checkpoint"


class ExitStatus(NamedTuple):
  """Early end of a run of several processes: exit code and last line, the same for every process."""

  code: int
  line: str


class FailureDetector:
  """Heartbeats and failures of all processes as process 0 has seen them."""

  def __init__(self, names: Sequence[str]):
    self._names = names
    self._beats: dict[int, tuple[Any, float]] = {}  # the last heartbeat, and the time at which it was new
    self._failed: dict[int, tuple[ExitStatus, float]] = {}  # in the order of detection

  def diagnose(self, beats: dict[int, Any], failed: dict[int, Sequence], now: float) -> ExitStatus | None:
    """Return the exit status of the run; None while no process has failed, or the cause is not yet known."""
    for index in range(len(self._names)):
      beat = beats.get(index)
      if index not in self._beats or self._beats[index][0] != beat:
        self._beats[index] = beat, now
    for index, status in failed.items():
      self._failed.setdefault(index, (ExitStatus(*status), now))
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
    # Another process may be about to report the same failure, or to fall silent.
    if not all_failed and now - since < (1 if first.code != command.FAILED else 2) + SILENCE_AFTER_FAILURE:
      return None
    return first._replace(line=f"process {index} ({self._names[index]}): {first.line}")


def missing_processes(silent: Sequence[int], seconds: float, names: Sequence[str]) -> ExitStatus:
  """Return the exit status of a run in which these processes have been silent for so many seconds."""
  who = ", ".join(f"process {index} ({names[index]})" for index in silent)
  return ExitStatus(command.FAILED, f"missing: {who}, no sign of life for {seconds:.0f} s; {AGAIN}")

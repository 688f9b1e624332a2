"""Time ledger of a run: the seconds of each of its parts. They sum to the time that its sessions took.

  compile   XLA compilation, whichever part needed it
  data      rows came late: the devices had nothing to do
  step      training steps
  heldout   held-out losses
  curve     points of the learning curve
  save      checkpoints, as far as the loop waits for them
  mining    rounds: mining, and loading of the round's records
  lost      steps that a killed run had logged after its last checkpoint, and that were done again
  other     imports, reading of weights and data, and everything else

Of a killed session the time after its last line of metrics is not known. Only the host's clock is read: no device is
waited for.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

import jax

from insec_jax import stop_signal

PARTS = ("compile", "data", "step", "heldout", "curve", "save", "mining", "lost", "other")
PREFIX = "time/"  # of the keys in metrics.jsonl
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event after each compilation, or reading from its cache


class Ledger:
  """Stopwatch that is always in one part. `saved` are the seconds of earlier sessions, as `to_json` returned them."""

  def __init__(self, saved: dict[str, float] | None = None):
    self.seconds = dict.fromkeys(PARTS, 0.0) | (saved or {})
    self._before = sum(self.seconds.values())
    self._part, self._since = "other", stop_signal.STARTED
    self._thread = threading.get_ident()
    jax.monitoring.register_event_duration_secs_listener(self._compiled)

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Count the time of the block to this part, without that of parts inside it."""
    before = self._part
    self._switch(name)
    try:
      yield
    finally:
      self._switch(before)

  def move(self, seconds: float, name: str) -> None:
    """Count so many of the seconds of the current part to another one."""
    self.seconds[self._part] -= seconds
    self.seconds[name] += seconds

  def lose(self, last: dict[str, float]) -> None:
    """Count as lost what the run did between the saved seconds and `last`, its newest line of metrics."""
    self.seconds["lost"] += max(0.0, total(last) - self._before)

  def line(self) -> dict[str, float]:
    """Return the seconds of each part since the start of the run, as in metrics.jsonl."""
    self._switch(self._part)
    return {PREFIX + name: round(seconds, 3) for name, seconds in self.seconds.items()}

  def to_json(self) -> dict[str, float]:
    """Return the seconds of each part, for a later session."""
    self._switch(self._part)
    return dict(self.seconds)

  def _switch(self, name: str) -> None:
    now = time.monotonic()
    self.seconds[self._part] += now - self._since
    self._part, self._since = name, now

  def _compiled(self, event: str, seconds: float, **_) -> None:
    if event == COMPILED and threading.get_ident() == self._thread:
      self.move(seconds, "compile")


def total(line: dict[str, float]) -> float:
  """Return the sum over all parts in a line of metrics; 0 for a line without them."""
  return sum(value for key, value in line.items() if key.startswith(PREFIX))


def table(line: dict[str, float]) -> str:
  """Return seconds and share of each part of a line of metrics, the parts without time left out."""
  whole = total(line)
  rows = [(name, line[PREFIX + name]) for name in PARTS if round(line[PREFIX + name], 1)]
  return "\n".join(
    ["time       seconds   share"]
    + [f"{name:8}{seconds:>10,.1f}{seconds / whole:>8.1%}" for name, seconds in [*rows, ("all", whole)]]
  )

"""Time limit of a session (train.minutes): a run stops early enough that its state is saved when the limit is reached.

After each step it is estimated whether another one still fits, with the held-out losses and saves until its state is
saved. The longest ones of this session count; before the first, a save is estimated from its bytes, and a held-out loss
from its batches.
"""

import math
import time

from insec_jax import stop_signal
from insec_jax.command import InputError
from insec_jax.training import metrics
from insec_jax.training.ledger import Ledger

MARGIN_SECONDS = 5.0  # for the end of the program
AGREEMENT_SECONDS = 5.0  # for several processes to choose the step after which all stop
AGREEMENT_STEPS = 3  # that they take meanwhile
SLOWEST_WRITE = 100e6  # bytes a second of a save whose time is not known yet
LONGER = 1.2  # a save or a chunk may take so much longer than the longest before


class NoTimeError(InputError):
  """Error: not one step fits into the session."""


class TimeLimit:
  """End of the session, after `minutes` (0: never); the loop sets `knows_save` when it has waited for a save.

  `compile_seconds` is the time that the train step took to compile, `num_batches` the number of a held-out loss.
  """

  def __init__(
    self,
    minutes: float,
    ledger: Ledger,
    *,
    save_bytes: int,
    compile_seconds: float,
    num_batches: int,
    num_processes: int,
  ):
    self.minutes = minutes
    self.reached = self.knows_save = False
    self._end = stop_signal.session_began() + 60 * minutes if minutes else math.inf
    self._ledger, self._several = ledger, num_processes > 1
    self._num_batches, self._compile_seconds = num_batches, compile_seconds
    self._longest = {"step": 0.0, "heldout": 0.0, "curve": 0.0, "save": 0.0, "chunk": 0.0}
    self._save_estimate = save_bytes / SLOWEST_WRITE
    self._before = ledger.to_json()
    self._needed = 0.0  # seconds from the last look at the clock to the end of what was asked for
    self._chunk_began: float | None = None

  @property
  def is_set(self) -> bool:
    return math.isfinite(self._end)

  def allows_step(self, *, heldouts: int, saves: int, points: int = 0) -> bool:
    """Return whether another step fits, with so many held-out losses, saves and points until its state is saved.

    Called after each step, before its own held-out loss, point of the learning curve and save, which are among them if
    they are due. The time of a session's first point is not known, and counts as none.
    """
    if not self.is_set:
      return True
    self._observe()
    step = self._longest["step"]
    # Steps that were dispatched before end first.
    needed = (1 + metrics.STEPS_AHEAD + self._several * AGREEMENT_STEPS) * step + self._several * AGREEMENT_SECONDS
    needed += heldouts * (self._longest["heldout"] or self._num_batches * step + self._compile_seconds)
    needed += points * LONGER * self._longest["curve"]
    needed += saves * LONGER * (self._longest["save"] or self._save_estimate)
    return self._fits(needed)

  def allows_chunk(self) -> bool:
    """Return whether another chunk of mining fits; called before each. There is nothing to save: a chunk is a file."""
    if not self.is_set:
      return True
    now = time.monotonic()
    if self._chunk_began is not None:
      self._longest["chunk"] = max(self._longest["chunk"], now - self._chunk_began)
    self._chunk_began = now
    return self._fits(LONGER * self._longest["chunk"])

  def enough(self) -> float:
    """Return the minutes, in tenths, in which what was asked for last would have fitted, with some room for a step."""
    seconds = LONGER * (time.monotonic() - stop_signal.session_began() + self._needed + MARGIN_SECONDS)
    return math.ceil(seconds / 6) / 10

  def _fits(self, seconds: float) -> bool:
    self._needed = seconds
    self.reached = time.monotonic() + seconds + MARGIN_SECONDS > self._end
    return not self.reached

  def _observe(self) -> None:
    """Time what the run has done since the last call: one step at most, and what followed it."""
    now = self._ledger.to_json()
    passed = {name: now[name] - self._before[name] for name in now}
    took = {"step": passed["step"] + passed["data"], **{name: passed[name] for name in ("heldout", "curve", "save")}}
    self._longest |= {name: max(self._longest[name], seconds) for name, seconds in took.items()}
    self._before = now

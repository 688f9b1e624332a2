"""Progress of long loops: a bar on a terminal, plain lines elsewhere."""

import sys
import time

import tqdm

QUIET_SECONDS = 5.0  # between two plain lines


class Progress:
  """Progress of a loop: a bar with speed and time left on a terminal, else a line every `quiet` seconds.

  `done` of `total` units are done at the start. With `last` the last unit always prints a line.
  """

  def __init__(
    self, label: str, total: int, *, unit: str, done: int = 0, quiet: float = QUIET_SECONDS, last: bool = False
  ):
    self._label, self._total, self._unit, self._quiet = label, total, unit, quiet
    self._done, self._last = done, last
    self.restart()
    self._last_line = self._start
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True)

  def restart(self) -> None:
    """Restart the estimate of the time left."""
    self._first, self._start = self._done, time.monotonic()

  def update(self, done: int, note: str = "") -> None:
    """Show that `done` units are done; `note` is shown beside them."""
    self._done = done
    now = time.monotonic()
    if self._bar is not None:
      if note:
        self._bar.set_postfix_str(note)
      self._bar.update(done - self._bar.n)
    elif (self._last and done == self._total) or now - self._last_line > self._quiet:
      self._last_line = now
      self.say(", ".join(filter(None, (f"{self._label}: {done:,}/{self._total:,} {self._unit}s", note, self.left()))))

  def note(self, text: str) -> None:
    """Show a text beside the bar; do nothing without a bar."""
    if self._bar is not None:
      self._bar.set_postfix_str(text)

  @property
  def is_bar(self) -> bool:
    return self._bar is not None

  def left(self) -> str:
    """Return the time left at the mean speed so far, such as "3:07 left"; empty before the first unit is done."""
    if self._done == self._first:
      return ""
    seconds = round((time.monotonic() - self._start) / (self._done - self._first) * (self._total - self._done))
    return f"{seconds // 60}:{seconds % 60:02d} left"

  def say(self, text: str) -> None:
    """Print a line to stderr, above the bar if there is one."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Close the bar."""
    if self._bar is not None:
      self._bar.close()

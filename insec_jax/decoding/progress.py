"""How far a long decode is: a bar with tokens/s and time left, or plain lines when nobody watches a terminal."""

import sys
import time

import tqdm

QUIET = 5.0  # seconds between two plain lines


class Progress:
  """Called with (prompts done, tokens written) as often as the sampler likes; the last call ends it."""

  def __init__(self, label: str, total: int):
    self._label = label
    self._total = total
    self._start = self._said = time.perf_counter()
    self._bar = tqdm.tqdm(total=total, desc=label, unit="prompt", dynamic_ncols=True) if sys.stderr.isatty() else None

  def __call__(self, done: int, tokens: int) -> None:
    now = time.perf_counter()
    per_second = tokens / (now - self._start)
    if self._bar is not None:
      self._bar.set_postfix_str(f"{per_second:,.0f} tokens/s")
      self._bar.update(done - self._bar.n)
      if done == self._total:
        self._bar.close()
    elif done == self._total or now - self._said > QUIET:
      left = round((now - self._start) / done * (self._total - done))
      print(f"{self._label}: {done}/{self._total} prompts, {per_second:,.0f} tokens/s, "
            f"{left // 60}:{left % 60:02d} left", file=sys.stderr, flush=True)
      self._said = now

"""Profile of some training steps (train.profile_steps), written by jax.profiler for xprof."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from insec_jax.training.ledger import Ledger


class Profile:
  """Trace of the steps from the first to the last of `steps`, both included; empty `steps`: none.

  The devices finish the steps before the first and the last one, so that the trace has these steps and no others.
  Other steps wait for nothing. A run that ends inside the steps writes the trace of those that it did.
  """

  def __init__(self, steps: tuple[int, ...], folder: pathlib.Path, ledger: Ledger):
    self._first, self._last = steps or (1, 0)
    self._folder, self._ledger = folder, ledger
    self._running = False

  @contextlib.contextmanager
  def step(self, number: int, before: Any) -> Iterator[None]:
    """Trace the block, which dispatches this step, if it is one of them; `before` is the state that it changes."""
    if not self._first <= number <= self._last:
      yield
      return
    if not self._running:
      with self._ledger.part("other"):
        jax.block_until_ready(before)
        jax.profiler.start_trace(self._folder)
      self._running = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def after(self, number: int, state: Any) -> str:
    """Write the trace after the last of the steps, and return a line about it; empty after other steps."""
    if not self._running or number < self._last:
      return ""
    with self._ledger.part("other"):
      jax.block_until_ready(state)
      self.close()
    return f"steps {self._first} to {self._last} are profiled: xprof {self._folder}"

  def close(self) -> None:
    """Write what is traced so far."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

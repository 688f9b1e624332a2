"""Seconds of the parts of a run: they are disjoint, sum to the time that passed, and go on in the next session."""

import jax
import jax.numpy as jnp
import pytest

from insec_jax import stop_signal
from insec_jax.training import ledger
from insec_jax.training.ledger import Ledger, total


@pytest.fixture
def clock(monkeypatch):
  """The time, which the test sets; the program began at 100."""
  now = [100.0]
  monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(stop_signal, "STARTED", 100.0)
  return now


def test_parts_inside_one_another_are_counted_once_and_sum_to_the_time(clock):
  clock[0] = 107.0  # imports
  times = Ledger()
  with times.part("step"):
    clock[0] = 110.0
    with times.part("heldout"):
      clock[0] = 114.0
      times.move(1.0, "compile")
    clock[0] = 120.0
    times.move(2.0, "data")
  clock[0] = 121.0
  line = times.line()
  seconds = {"other": 8, "step": 7, "heldout": 3, "compile": 1, "data": 2, "save": 0, "mining": 0, "lost": 0}
  seconds["curve"] = 0
  assert line == {f"time/{name}": float(second) for name, second in seconds.items()}
  assert total({**line, "loss": 3.0}) == 21.0


def test_a_resumed_run_goes_on_from_the_checkpoint_and_what_it_does_again_is_lost(clock):
  times = Ledger()
  with times.part("step"):
    clock[0] = 130.0
    saved = times.to_json()
    clock[0] = 142.0  # killed after this line
    last = times.line()
  clock[0] = 103.0  # another process
  again = Ledger(saved)
  with again.part("compile"):
    clock[0] = 104.0
  again.lose(last)
  line = again.line()
  assert (line["time/step"], line["time/lost"], line["time/other"], line["time/compile"]) == (30.0, 12.0, 3.0, 1.0)
  again.lose({})  # no line that could be read
  assert again.line() == line


def test_a_compilation_is_not_time_of_the_part_that_needed_it():
  times = Ledger()
  with times.part("heldout"):
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((7, 7))))
  line = times.line()
  assert line["time/compile"] > 0
  assert line["time/heldout"] > 0


def test_the_table_has_seconds_and_shares_of_the_parts_that_took_time():
  assert ledger.table({f"time/{name}": 0.0 for name in ledger.PARTS} | {"time/step": 75.0, "time/save": 25.04}) == (
    "time       seconds   share\nstep          75.0   75.0%\nsave          25.0   25.0%\nall          100.0  100.0%"
  )

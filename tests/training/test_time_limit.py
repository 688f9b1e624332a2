"""A run with a time limit has saved when the limit is reached, and does not stop long before."""

import pytest

from insec_jax import stop_signal
from insec_jax.training import ledger, metrics, time_limit
from insec_jax.training.ledger import Ledger
from insec_jax.training.time_limit import TimeLimit

MINUTES, LIMIT = 10, 600.0


@pytest.fixture
def clock(monkeypatch):
  """The time, which the test sets; the program began at 0."""
  now = [0.0]
  monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(stop_signal, "STARTED", 0.0)
  monkeypatch.delenv(stop_signal.SESSION_BEGAN, raising=False)
  return now


def limit_of(times, *, save_bytes=1, num_processes=1, minutes=MINUTES):
  return TimeLimit(
    minutes, times, save_bytes=save_bytes, compile_seconds=20.0, num_batches=3, num_processes=num_processes
  )


def saved_at(clock, *, step, heldout, save, every, save_every, start=60.0, save_bytes=1):
  """The time at which a run has stopped and saved; steps that were dispatched before end first."""
  times = Ledger()
  clock[0] = start
  limit = limit_of(times, save_bytes=save_bytes)
  number, stopping = 0, False
  with times.part("step"):
    while not stopping:
      number += 1
      clock[0] += step
      measures, saves = number % every == 0, number % save_every == 0
      stopping = not limit.allows_step(heldouts=measures + ((number + 1) % every == 0), saves=saves + 1)
      if stopping or measures or saves:
        clock[0] += metrics.STEPS_AHEAD * step
      if measures:
        with times.part("heldout"):
          clock[0] += heldout
      if saves or stopping:
        with times.part("save"):
          clock[0] += save
  assert limit.reached
  return clock[0]


@pytest.mark.parametrize("step", [0.1, 3.0, 40.0])
@pytest.mark.parametrize(("heldout", "every"), [(30.0, 2), (100.0, 7), (0.0, 1_000)])
@pytest.mark.parametrize("save", [2.0, 60.0])
def test_the_state_is_saved_before_the_limit_and_no_step_more_would_have_fitted(clock, step, heldout, every, save):
  end = saved_at(clock, step=step, heldout=heldout, save=save, every=every, save_every=3)
  most = (metrics.STEPS_AHEAD + 4) * step + 2 * heldout + 2 * 1.2 * save + time_limit.MARGIN_SECONDS
  assert LIMIT - most <= end <= LIMIT


def test_before_the_first_save_its_time_is_taken_from_its_bytes(clock):
  size = 100 * time_limit.SLOWEST_WRITE
  end = saved_at(clock, step=1.0, heldout=0.0, save=100.0, every=1_000, save_every=1_000, save_bytes=size)
  assert LIMIT - 30 <= end <= LIMIT


def test_several_processes_stop_earlier_by_the_steps_in_which_they_agree(clock):
  limits = [limit_of(Ledger(), num_processes=num) for num in (1, 2)]
  clock[0] = LIMIT - time_limit.MARGIN_SECONDS - 1
  assert [limit.allows_step(heldouts=0, saves=0) for limit in limits] == [True, False]


def test_the_session_of_a_sweep_is_that_of_its_programs(clock, monkeypatch):
  monkeypatch.setenv(stop_signal.SESSION_BEGAN, "-550.0")
  limit = limit_of(Ledger())
  assert limit.allows_step(heldouts=0, saves=1)
  clock[0] = 51.0
  assert not limit.allows_step(heldouts=0, saves=1)


@pytest.mark.parametrize(("start", "save"), [(700.0, 0.0), (100.0, 600.0), (596.0, 0.0)])
def test_the_minutes_that_are_said_to_be_enough_have_room_for_a_step(clock, start, save):
  clock[0], save_bytes = start, int(save * time_limit.SLOWEST_WRITE)
  limit = limit_of(Ledger(), save_bytes=save_bytes)
  assert not limit.allows_step(heldouts=0, saves=1)
  enough = limit.enough()
  assert start / 60 < enough < 1.5 * (start + save + 60) / 60
  assert enough == round(enough, 1)
  again = limit_of(Ledger(), save_bytes=save_bytes, minutes=enough)
  assert again.allows_step(heldouts=0, saves=1)


def test_mining_stops_before_a_chunk_that_would_not_fit(clock):
  limit, begun = limit_of(Ledger()), []
  while limit.allows_chunk():
    begun.append(clock[0])
    clock[0] += 70.0
  assert begun == [0, 70, 140, 210, 280, 350, 420, 490]
  assert limit.reached


def test_a_point_of_the_learning_curve_that_would_not_fit_stops_the_run_before(clock):
  times = Ledger()
  limit = limit_of(times)
  with times.part("curve"):
    clock[0] += 200.0
  assert limit.allows_step(heldouts=0, saves=0, points=1)
  assert not limit.allows_step(heldouts=0, saves=0, points=2)


def test_without_a_limit_nothing_is_timed_and_everything_fits(clock):
  limit = TimeLimit(0.0, Ledger(), save_bytes=1, compile_seconds=0.0, num_batches=0, num_processes=1)
  clock[0] = 1e9
  assert not limit.is_set
  assert limit.allows_step(heldouts=2, saves=2)
  assert limit.allows_chunk()

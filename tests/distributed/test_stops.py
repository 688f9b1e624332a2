"""Processes of a run stop after the same step; whole runs are in test_processes.py."""

import threading
import time

import jax
import pytest

from insec_jax.distributed import processes

NAMES = ("a", "b", "c")


class Store:
  """A key-value store as JAX's, whose answers take a while."""

  def __init__(self, seconds):
    self.seconds, self.values, self.changed = seconds, {}, threading.Condition()

  def key_value_set(self, key, value):
    time.sleep(self.seconds)
    with self.changed:
      if key in self.values:
        raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
      self.values[key] = value
      self.changed.notify_all()

  def blocking_key_value_get(self, key, milliseconds):
    time.sleep(self.seconds)
    with self.changed:
      if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
      return self.values[key]


def stopped_at(monkeypatch, *, after, published=None, store_seconds=0.02, most=150):
  """The step after which each of three processes stopped, `most` for one that went on; they run at their own speeds.

  The second is told to stop by its `after`-th step. `published`: as process 0 does it at the end, before all begin.
  """
  monkeypatch.setattr(processes, "BEAT_SECONDS", 0.001)
  store, members, found = Store(store_seconds), [processes.Processes(index, NAMES) for index in range(3)], {}
  for one in members:
    one._client = store
    for part in (one._announce_stop, one._choose_last_step):
      threading.Thread(target=part, daemon=True).start()
  if published:
    members[0]._publish_stop(published)

  def run(one):
    for step in range(1, most + 1):
      time.sleep(0.003 * (1 + one.index))
      if one.index == 1 and step == after:
        one._stop_requested.set()
      found[one.index] = step
      if one.stops(step):
        return

  threads = [threading.Thread(target=run, args=(one,)) for one in members]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
  return [found[index] for index in range(3)]


def test_all_stop_after_one_step_that_none_has_passed_however_slow_the_store_is(monkeypatch):
  for seconds in (0.0, 0.02, 0.1):
    first, *others = stopped_at(monkeypatch, after=5, store_seconds=seconds)
    assert others == [first, first]
    assert 5 < first < 100


def test_nobody_stops_when_nobody_is_stop_requested_or_when_the_run_was_over_before(monkeypatch):
  assert stopped_at(monkeypatch, after=None, most=20) == [20, 20, 20]
  assert stopped_at(monkeypatch, after=5, published="over", most=40) == [40, 40, 40]


def test_a_store_that_refuses_a_stop_is_an_error_unless_an_earlier_one_is_there(monkeypatch):
  one = processes.Processes(0, NAMES)
  one._client = Store(0)
  one._publish_stop("SIGTERM")
  one._publish_stop("over")
  assert one._client.values == {"insec/stop": "SIGTERM"}

  def fail(*_):
    raise jax.errors.JaxRuntimeError("UNAVAILABLE")

  monkeypatch.setattr(one._client, "key_value_set", fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
    one._publish_stop("SIGTERM")

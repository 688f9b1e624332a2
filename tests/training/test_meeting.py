"""How processes of a run find each other, agree, and judge whose fault an end is; whole runs are in test_hosts.py."""

import contextlib
import dataclasses
import socket
import threading
import time

import jax
import pytest
from jax._src.lib import _jax

from insec_jax.command import FAILED, WRONG_INPUT, InputError
from insec_jax.training import hosts, meeting
from insec_jax.training.hosts import Court, Relay, Verdict
from insec_jax.training.meeting import Place, disagreement, find_place, meet

CLUSTER = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-6]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
           "SLURM_LOCALID": "0"}
NAMES = ("a", "b", "c")


@pytest.fixture
def no_cluster(monkeypatch):
  for name in (*CLUSTER, "JAX_COORDINATOR_PORT", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST",
               "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_cluster")
def test_a_machine_alone_joins_nobody():
  assert find_place(None, None, None, seconds=1) is None
  assert find_place("somewhere", 1, 0, seconds=1) is None


@pytest.mark.usefixtures("no_cluster")
def test_a_cluster_tells_the_place_and_the_port_is_ours(monkeypatch):
  for name, value in CLUSTER.items():
    monkeypatch.setenv(name, value)
  assert find_place(None, None, None, seconds=1) == Place("node3", 8476, 4, 2, [0])
  monkeypatch.setenv("SLURM_NTASKS", "1")
  assert find_place(None, None, None, seconds=1) is None


def test_flags_tell_the_place():
  assert find_place("host", 4, 3, seconds=1) == Place("host", 8476, 4, 3, None)
  assert find_place("host:99", 4, 0, seconds=1) == Place("host", 99, 4, 0, None)


@pytest.mark.parametrize(("given", "words"), [
  (("host", None, None), "--coordinator without --num_processes, --process_id"), (("host", 2, 2), "ids run from 0"),
  (("host:port", 2, 0), "HOST or HOST:PORT"), ((None, 2, 0), "without --coordinator")])
def test_flags_that_tell_no_place_are_refused(given, words):
  with pytest.raises(InputError, match=words):
    find_place(*given, seconds=1)


def test_what_differs_is_named_with_its_process_and_the_majority_is_right():
  facts = [{"jax": "1", "seed": 0}, {"jax": "2", "seed": 0}, {"jax": "2", "seed": 0}]
  assert disagreement(facts, NAMES).startswith('the processes differ: process 0 (a) has jax "1", the others "2"; start')
  assert disagreement(facts[:2], NAMES).startswith('the processes differ: process 1 (b) has jax "2", the others "1";')
  assert disagreement([{"jax": "1"}, {}], NAMES).startswith("the processes differ: process 1 (b) has jax null")
  assert disagreement([{"a": 1, "b": [None]}] * 3, NAMES) is None


def free_port():
  with socket.socket() as one:
    one.bind(("", 0))
    return one.getsockname()[1]


def meet_all(places, facts=None, seconds=2):
  """What `meet` gave in each place, all at once: names, or the error's text."""
  found = [None] * len(places)

  def meet_one(number):
    try:
      found[number] = meet(places[number], (facts or [{}] * len(places))[number], seconds=seconds)
    except InputError as error:
      found[number] = str(error)

  threads = [threading.Thread(target=meet_one, args=[number]) for number in range(len(places))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return found


@pytest.fixture
def places():
  port = free_port()
  return [Place("localhost", port, 3, index, None) for index in range(3)]


def test_all_come_and_know_each_other_though_strangers_knock(places):
  def knock():
    for hello in (b"PRI * HTTP/2.0\r\n\r\n", b"{}\n", b""):
      with contextlib.suppress(OSError), socket.create_connection(("localhost", places[0].port), timeout=2) as line:
        line.sendall(hello)

  stranger = threading.Timer(0.3, knock)
  stranger.start()
  late = threading.Timer(0.6, lambda: found.append(meet(places[2], {}, seconds=5)))
  found = []
  late.start()
  met = meet_all(places[:2], seconds=5)
  late.join()
  assert met + found == [(socket.gethostname(),) * 3] * 3


def test_all_that_came_hear_who_is_missing_or_differs_or_came_twice(places):
  found = meet_all([places[0], places[2]], seconds=0.5)
  assert found[0] == found[1]
  assert found[0].startswith("missing: process 1 of 3; waited 0.5 s")
  found = meet_all(places, [{"x": 1}, {"x": 1}, {"x": 2}])
  assert len(set(found)) == 1
  assert "process 2" in found[0]
  found = meet_all([places[0], places[1], places[1]])
  assert all("have --process_id=1" in one for one in found)
  found = meet_all([places[0], dataclasses.replace(places[1], num=2)])
  assert all("was told of 2 processes" in one for one in found)
  assert "process 0 is missing" in meet_all(places[1:2], seconds=0.2)[0]


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


def stopped_at(monkeypatch, *, after, called_off=None, store_seconds=0.02, most=150):
  """The step after which each of three processes stopped, `most` for one that went on; they run at their own speeds.

  The second is told to stop by its `after`-th step. `called_off`: as process 0 does it at the end, before all begin.
  """
  monkeypatch.setattr(hosts, "BEAT_SECONDS", 0.001)
  store, team, found = Store(store_seconds), [hosts.Hosts(index, NAMES) for index in range(3)], {}
  for one in team:
    one._client = store
    for part in (one._tell, one._settle):
      threading.Thread(target=part, daemon=True).start()
  if called_off:
    team[0]._call_off(called_off)

  def run(one):
    for step in range(1, most + 1):
      time.sleep(0.003 * (1 + one.index))
      if one.index == 1 and step == after:
        one._told.set()
      found[one.index] = step
      if one.stops(step):
        return

  threads = [threading.Thread(target=run, args=(one,)) for one in team]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
  return [found[index] for index in range(3)]


def test_all_stop_after_the_same_step_which_none_has_passed_however_slow_the_store_is(monkeypatch):
  for seconds in (0.0, 0.02, 0.1):
    first, *others = stopped_at(monkeypatch, after=5, store_seconds=seconds)
    assert others == [first, first]
    assert 5 < first < 100


def test_nobody_stops_when_nobody_is_told_or_when_the_run_was_over_before(monkeypatch):
  assert stopped_at(monkeypatch, after=None, most=20) == [20, 20, 20]
  assert stopped_at(monkeypatch, after=5, called_off="over", most=40) == [40, 40, 40]


def test_a_store_that_refuses_a_stop_for_another_reason_than_an_earlier_one_is_an_error(monkeypatch):
  one = hosts.Hosts(0, NAMES)
  one._client = Store(0)
  one._call_off("SIGTERM")
  one._call_off("over")
  assert one._client.values == {"insec/stop": "SIGTERM"}

  def gone(*_):
    raise jax.errors.JaxRuntimeError("UNAVAILABLE")

  monkeypatch.setattr(one._client, "key_value_set", gone)
  with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
    one._call_off("SIGTERM")


def judge_all(court, *times, beats=lambda time: [time] * 3, failed=lambda _: {}):
  """The first verdict at these times, with its time."""
  for now in times:
    if verdict := court.judge(dict(enumerate(beats(now))), failed(now), now):
      return now, verdict
  return None


def test_a_silent_process_is_gone_after_30_seconds_or_soon_once_another_has_failed():
  time, verdict = judge_all(Court(NAMES), *range(99), beats=lambda time: [time, min(time, 9), time])
  assert (time, verdict.code) == (40, FAILED)
  assert verdict.line.startswith("missing: process 1 (b), no sign of life for 31 s; start the same command again")
  time, verdict = judge_all(
    Court(NAMES), *range(99), beats=lambda time: [time, min(time, 9), time],
    failed=lambda time: {2: (FAILED, "Gloo: closed")} if time > 10 else {})
  assert time == 15
  assert verdict.line.startswith("missing: process 1 (b)")


def test_a_failure_while_all_live_is_the_fault_of_the_first_that_failed():
  def failed(time):
    return {index: (FAILED, f"ValueError: {index}") for index in (0, 2) if time > (20 if index == 0 else 10)}
  assert judge_all(Court(NAMES), *range(99), failed=failed) == (
    18, Verdict(FAILED, "process 2 (c): ValueError: 2"))


def test_what_all_find_wrong_is_said_once_without_a_name():
  failed = dict.fromkeys(range(3), (WRONG_INPUT, "bad"))
  assert judge_all(Court(NAMES), 1, failed=lambda _: failed) == (1, Verdict(WRONG_INPUT, "bad"))
  assert judge_all(Court(NAMES), *range(9), failed=lambda _: {1: failed[1]})[1].line == "process 1 (b): bad"


def test_the_way_to_process_0_stays_open_at_this_end_when_the_other_closes():
  lost = threading.Event()
  with socket.create_server(("127.0.0.1", 0)) as server:
    relay = Relay("127.0.0.1", server.getsockname()[1], lost.set)
    relay.holds = True
    near = socket.create_connection(("127.0.0.1", relay.port))
    near.sendall(b"to")
    far, _ = server.accept()
    assert far.recv(2) == b"to"
    far.sendall(b"fro")
    assert near.recv(3) == b"fro"
    far.close()
    assert lost.wait(5)
    for _ in range(9):
      near.sendall(b"nobody hears this")
    near.settimeout(0.2)
    with pytest.raises(TimeoutError):
      near.recv(1)
    near.close()


def test_before_it_holds_the_way_closes_at_both_ends():
  lost = threading.Event()
  with socket.create_server(("127.0.0.1", 0)) as server:
    relay = Relay("127.0.0.1", server.getsockname()[1], lost.set)
    near = socket.create_connection(("127.0.0.1", relay.port), timeout=5)
    server.accept()[0].close()
    assert near.recv(1) == b""
    near.close()
  assert not lost.is_set()


def test_what_is_not_public_in_jax_is_there():
  assert hosts._jax_client() is None
  assert callable(meeting._jax_clusters().auto_detect_unset_distributed_params)
  for name in ("key_value_set", "key_value_dir_get", "blocking_key_value_get"):
    assert hasattr(_jax.DistributedRuntimeClient, name)

"""How processes of a run find each other and agree; whole runs are in test_processes.py."""

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import selectors
import socket
import struct
import threading
import time

import pytest
from jax._src.lib import _jax

from insec_jax.command import InputError
from insec_jax.distributed import coordinator, handshake, processes, rendezvous
from insec_jax.distributed.rendezvous import ProcessSpec, detect_processes, disagreement

CLUSTER = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[3-6]",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
}
NAMES = ("a", "b", "c")


@pytest.fixture
def no_cluster(monkeypatch):
  for name in (
    *CLUSTER,
    "JAX_COORDINATOR_PORT",
    "OMPI_COMM_WORLD_SIZE",
    "KUBERNETES_SERVICE_HOST",
    "TPU_WORKER_HOSTNAMES",
  ):
    monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_cluster")
def test_a_machine_alone_joins_nobody():
  assert detect_processes(None, None, None, seconds=1) is None
  assert detect_processes("somewhere", 1, 0, seconds=1) is None


@pytest.mark.usefixtures("no_cluster")
def test_a_cluster_tells_the_place_and_the_port_is_ours(monkeypatch):
  for name, value in CLUSTER.items():
    monkeypatch.setenv(name, value)
  assert detect_processes(None, None, None, seconds=1) == ProcessSpec("node3", 8476, 4, 2, [0])
  monkeypatch.setenv("SLURM_NTASKS", "1")
  assert detect_processes(None, None, None, seconds=1) is None


def test_flags_tell_the_place():
  assert detect_processes("host", 4, 3, seconds=1) == ProcessSpec("host", 8476, 4, 3, None)
  assert detect_processes("host:99", 4, 0, seconds=1) == ProcessSpec("host", 99, 4, 0, None)


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (("host", None, None), "--coordinator without --num_processes, --process_id"),
    (("host", 2, 2), "ids run from 0"),
    (("host:port", 2, 0), "HOST or HOST:PORT"),
    ((None, 2, 0), "without --coordinator"),
  ],
)
def test_flags_that_tell_no_place_are_refused(given, words):
  with pytest.raises(InputError, match=words):
    detect_processes(*given, seconds=1)


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
      found[number] = rendezvous.rendezvous(places[number], (facts or [{}] * len(places))[number], seconds=seconds)
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
  return [ProcessSpec("localhost", port, 3, index, None) for index in range(3)]


def test_all_come_and_know_each_other_though_strangers_knock(places):
  def knock():
    for hello in (b"PRI * HTTP/2.0\r\n\r\n", b"{}\n", b""):
      with contextlib.suppress(OSError), socket.create_connection(("localhost", places[0].port), timeout=2) as line:
        line.sendall(hello)

  stranger = threading.Timer(0.3, knock)
  stranger.start()
  late = threading.Timer(0.6, lambda: found.append(rendezvous.rendezvous(places[2], {}, seconds=5)))
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


GREETING = {"index": 1, "num": 3, "name": "stranger", "facts": {}, "nonce": "0" * 32}
RAW = "\x1b[31mRED\x07\r\n"


def connect(port):
  """A stranger's connection, as soon as process 0 listens."""
  for _ in range(500):
    with contextlib.suppress(OSError):
      return socket.create_connection(("127.0.0.1", port), timeout=5)
    time.sleep(0.005)
  raise AssertionError("process 0 does not listen")


def nonce_of(line):
  return handshake.read_challenge(line.makefile("rb").readline().strip())


def seal(payload, context, key=None, kind="greeting"):
  """A line whose MAC is right, whatever its payload."""
  key = handshake.run_key() if key is None else key
  return handshake._mac(kind, payload, key, context) + b" " + payload + b"\n"


def says(data):
  """A stranger that sends these bytes, and keeps its connection open."""

  def attempt(port):
    line = connect(port)
    with contextlib.suppress(OSError):
      line.sendall(data)
    return [line]

  return attempt


def greets(change=None, payload=None, **options):
  """A stranger that speaks the protocol and makes the MAC of its greeting as a process of the run would."""

  def attempt(port):
    line = connect(port)
    said = json.dumps({**GREETING, **(change or {})}).encode() if payload is None else payload
    line.sendall(seal(said, nonce_of(line), **options))
    return [line]

  return attempt


def lacks(field):
  return greets(payload=json.dumps({key: value for key, value in GREETING.items() if key != field}).encode())


def half_open(port):
  line = connect(port)
  line.shutdown(socket.SHUT_WR)
  return [line]


def reset(port):
  line = connect(port)
  line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
  line.close()
  return []


def closes(port):
  connect(port).close()
  return []


def crowd(data):
  def attempt(port):
    lines = [connect(port) for _ in range(400)]
    for line in lines:
      with contextlib.suppress(OSError):
        line.sendall(data)
    return lines

  return attempt


def drip(pause):
  def attempt(port):
    line = connect(port)

    def send():
      with contextlib.suppress(OSError):
        while True:
          line.sendall(b"a")
          time.sleep(pause)

    threading.Thread(target=send, daemon=True).start()
    return [line]

  return attempt


def replay(port):
  """What was right on one connection, sent on another."""
  lines = [connect(port), connect(port)]
  first, _ = map(nonce_of, lines)
  lines[1].sendall(seal(json.dumps(GREETING).encode(), first))
  return lines


def greets_twice(port):
  line = connect(port)
  line.sendall(seal(json.dumps(GREETING).encode(), nonce_of(line)) * 2)
  return [line]


def greets_slowly(port):
  """A greeting that is right but for its last byte, which never comes."""
  line = connect(port)
  line.sendall(seal(json.dumps(GREETING).encode(), nonce_of(line))[:-1])
  return [line]


def text_of(value):
  """JSON as it stands, where json.dumps would not write it."""
  return greets(payload=json.dumps({**GREETING, "index": "HERE"}).replace('"HERE"', value).encode())


# Bytes that are no greeting; too many, too slow or too few of them; greetings without and with a right MAC.
STRANGERS = {
  "nothing": says(b""),
  "empty line": says(b"\n"),
  "many empty lines": says(b"\n" * 1000),
  "zero bytes": says(b"\0" * 99),
  "HTTP": says(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
  "HTTP/2": says(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
  "TLS": says(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\x5a" * 512),
  "SSH": says(b"SSH-2.0-OpenSSH_9.6\r\n"),
  "SMB": says(b"\0\0\0\x85\xffSMBr\0\0\0\0"),
  "random bytes": says(random.Random(0).randbytes(5000)),
  "ANSI escapes": says(RAW.encode() * 9),
  "invalid UTF-8": says(b"\xff\xfe\xc3\x28\n"),
  "UTF-16": says("{}\n".encode("utf-16")),
  "empty object": says(b"{}\n"),
  "a list": says(b"[]\n"),
  "a number": says(b"7\n"),
  "null": says(b"null\n"),
  "the old greeting": says(b'{"index": 1, "num": 3, "name": "x", "facts": {}}\n'),
  "the old greeting without num": says(b'{"index": 1}\n'),
  "the old greeting with a text": says(b'{"index": "1"}\n'),
  "deep nesting": says(b"[" * 100_000 + b"\n"),
  "5,000 digits": says(b'{"index": ' + b"9" * 5000 + b"}\n"),
  "NaN alone": says(b"NaN\n"),
  "huge line": says(b"a" * 2**21),
  "huge line of JSON": says(b'{"a": "' + b"a" * 2**21),
  "silent crowd": crowd(b""),
  "crowd with a line each": crowd(b"{}\n"),
  "crowd without an end": crowd(b"x" * 999),
  "drip": drip(0.05),
  "fast drip": drip(0.001),
  "half open": half_open,
  "reset": reset,
  "closes": closes,
  "greets slowly": greets_slowly,
  "greets twice": greets_twice,
  "replay": replay,
  "another key": greets(key=b"another"),
  "another kind": greets(kind="answer"),
  "the welcome": greets(kind="welcome"),
  "no MAC": says(json.dumps(GREETING).encode() + b"\n"),
  "a MAC of zeros": says(b"0" * 64 + b" " + json.dumps(GREETING).encode() + b"\n"),
  "a MAC that is no ASCII": says(b"\xff" * 64 + b" {}\n"),
  "the challenge back": says(handshake.write_challenge(b"0" * 32)),
  "another version": says(b"insec-rendezvous/9 " + b"0" * 32 + b"\n"),
  "sealed: empty": greets(payload=b""),
  "sealed: list": greets(payload=b"[]"),
  "sealed: null": greets(payload=b"null"),
  "sealed: deep list": greets(payload=b"[" * 100_000),
  "sealed: deep object": greets(payload=b'{"a":' * 30_000),
  "sealed: invalid UTF-8": greets(payload=b'{"index": "\xff"}'),
  "sealed: UTF-16": greets(payload="{}".encode("utf-16")),
  "sealed: escapes": greets(payload=RAW.encode()),
  "sealed: two objects": greets(payload=b"{}{}"),
  **{f"without {field}": lacks(field) for field in GREETING},
  "with one more": greets({"more": 1}),
  **{
    f"index {value[:9]}": text_of(value)
    for value in (
      "true",
      "null",
      "1.0",
      "1e0",
      '"1"',
      "[1]",
      "{}",
      "-1",
      "1e999",
      "NaN",
      "Infinity",
      "65536",
      "9" * 4000,
      "9" * 5000,
    )
  },
  **{f"num {value!r:.9}": greets({"num": value}) for value in (True, None, 3.0, "3", [3], {}, 0, -3, 10**12, 10**4000)},
  **{f"name {value!r:.9}": greets({"name": value}) for value in (1, None, "", [], {"a": 1}, "a" * 256, "\ud800", True)},
  **{
    f"facts {value!r:.20}": greets({"facts": value})
    for value in (
      None,
      [],
      "",
      1,
      {"a": 1},
      {"a": None},
      {"a": {"a": {}}},
      {"": "1"},
      {"a": ""},
      {"a": "a" * 301},
      {"a" * 201: "1"},
      {"\ud800": "1"},
      {"a": "\udfff"},
      {"a": ["1"]},
    )
  },
  **{f"nonce {value!r:.9}": greets({"nonce": value}) for value in (None, 0, "", "0" * 33)},
}


def meet_beside(places, attempt, seconds=20):
  """What the processes got and how long it took them once a stranger was there before all but process 0."""
  found = []
  first = threading.Thread(target=lambda: found.extend(meet_all(places[:1], seconds=seconds)))
  first.start()
  lines = attempt(places[0].port)
  began = time.monotonic()
  found.extend(meet_all(places[1:], seconds=seconds))
  first.join()
  spent = time.monotonic() - began
  for line in lines:
    line.close()
  return found, spent


@pytest.mark.parametrize("stranger", STRANGERS)
def test_processes_meet_at_once_whatever_a_stranger_does(places, stranger, capfd):
  places = [dataclasses.replace(place, host="127.0.0.1") for place in places]
  found, spent = meet_beside(places, STRANGERS[stranger])
  assert found == [(socket.gethostname(),) * 3] * 3
  assert spent < coordinator.GREETING_SECONDS - 1
  out, err = capfd.readouterr()
  assert out == ""
  assert re.fullmatch(r"(ignored \d+ connections? that (was|were) no process of this run .*\n)?", err)


def test_a_stranger_is_closed_when_its_time_is_up_however_it_spends_it(places, monkeypatch):
  monkeypatch.setattr(coordinator, "GREETING_SECONDS", 0.3)
  meeting_of_0 = threading.Thread(target=meet_all, args=[places[:1]], kwargs={"seconds": 1.5})
  meeting_of_0.start()
  for attempt in (says(b""), drip(0.05), greets_slowly):
    (line,) = attempt(places[0].port)
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
      while line.recv(1000):
        pass
    assert 0.1 < time.monotonic() - began < 0.6
  meeting_of_0.join()


def test_a_stranger_that_sends_more_than_a_greeting_holds_is_closed_at_once(places):
  meeting_of_0 = threading.Thread(target=meet_all, args=[places[:1]], kwargs={"seconds": 1})
  meeting_of_0.start()
  (line,) = says(b"x" * (handshake.MAX_MESSAGE_BYTES + 1))(places[0].port)
  line.settimeout(0.5)
  with contextlib.suppress(ConnectionResetError):
    while line.recv(1000):
      pass
  meeting_of_0.join()


def test_of_too_many_connections_the_oldest_goes_and_a_process_stays(places, monkeypatch):
  monkeypatch.setattr(coordinator, "MAX_STRANGERS", 5)
  found = []
  two = [
    threading.Thread(target=lambda index=index: found.append(rendezvous.rendezvous(places[index], {}, seconds=20)))
    for index in (0, 1)
  ]
  for thread in two:
    thread.start()
  time.sleep(0.4)  # process 1 has greeted
  lines = [connect(places[0].port) for _ in range(30)]
  time.sleep(0.2)
  is_open = []
  for line in lines:
    line.setblocking(False)
    with contextlib.suppress(OSError):
      line.recv(1000)  # the challenge
    try:
      is_open.append(bool(line.recv(1)))
    except BlockingIOError:
      is_open.append(True)
    except OSError:
      is_open.append(False)
  assert is_open == [False] * 22 + [True] * 8  # MAX_STRANGERS and one for each process
  found.append(rendezvous.rendezvous(places[2], {}, seconds=20))
  for thread in two:
    thread.join()
  assert found == [(socket.gethostname(),) * 3] * 3


def test_a_crowd_from_one_host_does_not_displace_a_connection_from_another():
  server = coordinator.Server("127.0.0.1", free_port(), handshake.Greeting(0, 2, "a", {}), b"", seconds=1)
  peers = [coordinator._Peer(socket.socket(), host, 0, b"", bytearray()) for host in ("a", "b", "b", "c")]
  for peer in peers:
    server._unknown[peer] = None
    server._selector.register(peer.line, selectors.EVENT_READ, peer)
  assert server._make_room()
  assert [peer.host for peer in server._unknown] == ["a", "b", "c"]
  assert peers[1] not in server._unknown
  server.answer({})


def test_the_port_survives_a_lack_of_descriptors(places):
  places = [dataclasses.replace(place, host="127.0.0.1") for place in places]
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  held = []

  def attempt(port):
    lines = [connect(port) for _ in range(20)]
    assert all(map(nonce_of, lines))
    while True:
      try:
        held.append(os.dup(0))
      except OSError:
        break
    for descriptor in held[-2:]:  # for the other processes' own ends
      os.close(descriptor)
    del held[-2:]
    return lines

  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    found, spent = meet_beside(places, attempt)
  finally:
    for descriptor in held:
      os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  assert found == [(socket.gethostname(),) * 3] * 3
  assert spent < coordinator.GREETING_SECONDS - 1  # not only when the strangers' time is up


def test_with_a_token_only_those_who_have_it_are_processes_of_the_run(places, monkeypatch):
  without = handshake.run_key()
  monkeypatch.setenv(handshake.TOKEN, "secret")
  for attempt in (greets(key=without), greets({"num": 7}, key=without), greets({"index": 0}, key=without)):
    assert meet_beside(places, attempt)[0] == [(socket.gethostname(),) * 3] * 3
  assert handshake.run_key() != without
  found = meet_beside(places[:2], greets(key=without), seconds=0.5)[0]
  assert all("missing: process 2 of 3" in one and "ignored 1 connection that was no process" in one for one in found)
  monkeypatch.setenv(handshake.TOKEN, "")
  with pytest.raises(InputError, match="INSEC_RUN_TOKEN is empty"):
    rendezvous.rendezvous(places[0], {}, seconds=1)


def test_the_token_and_what_derives_from_it_never_travel(places, monkeypatch):
  monkeypatch.setenv(handshake.TOKEN, "secret")
  sent = []
  send = socket.socket.sendall
  monkeypatch.setattr(socket.socket, "sendall", lambda line, data: (sent.append(bytes(data)), send(line, data)))
  assert meet_all(places) == [(socket.gethostname(),) * 3] * 3
  assert len(sent) == 2
  assert not any(
    secret in data for data in sent for secret in (b"secret", handshake.run_key(), handshake.run_key().hex().encode())
  )


def test_what_processes_say_of_themselves_is_printable_in_every_message(places, monkeypatch):
  raw = f"a{RAW}\u202eb\x7f\x9b31m"
  shown = handshake.printable(raw, 99)
  assert re.fullmatch("[ -~]+", shown)
  assert len(handshake.printable("\u202e" * 300, 255)) == 255
  assert re.fullmatch("[ -~]+", disagreement([{raw: raw}, {raw: 1}], [shown] * 2))
  for change in ({"num": 7}, {"index": 0}):  # as a host that speaks the protocol on purpose may do without a token
    found, _ = meet_beside(places[:1], greets({**change, "name": raw}))
    assert re.fullmatch("[ -~]+", found[0])
    assert shown in found[0]
  line = handshake.write_greeting(handshake.Greeting(1, 2, raw, {}), key=b"", context=b"")[:-1]
  assert handshake.read_greeting(line, key=b"", context=b"").name == shown
  monkeypatch.setattr(socket, "gethostname", lambda: raw)
  assert meet_all(places) == [(shown,) * 3] * 3
  for found in (
    meet_all([places[0], places[1], places[1]]),
    meet_all(places, [{raw: raw}, {raw: 1}, {}]),
    meet_all([places[0], dataclasses.replace(places[1], num=2)]),
    meet_all(places[:2], seconds=0.3),
  ):
    assert all(isinstance(one, str) and re.fullmatch("[ -~]+", one) and len(one) < 3000 for one in found)


def test_a_long_value_that_differs_is_cut_and_told_by_its_digest():
  problem = disagreement([{"x": "a" * 9000}, {"x": "a" * 8999 + "b"}], NAMES)
  assert len(problem) < 1000
  assert problem.count("SHA-256") == 2
  assert disagreement([{"x": "a" * 9000}] * 2, NAMES) is None


def answers(*lines, then=None):
  """What a stranger at the port of process 0 says to each that connects, nonces and greetings aside."""

  def serve(line):
    for data in lines:
      line.sendall(data)
    if then:
      then(line)

  return serve


def squat(then):
  """A stranger that knows all but the token, up to its last line."""

  def serve(line):
    nonce = b"0" * 32
    line.sendall(handshake.write_challenge(nonce))
    said = line.makefile("rb").readline()
    then(line, said[:64])

  return serve


def squat_with(payload):
  return squat(lambda line, mac: line.sendall(seal(b"{}", mac, kind="welcome") + seal(payload, mac, kind="answer")))


@pytest.mark.parametrize(
  "serve",
  [
    answers(b""),
    answers(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    answers(b"\n"),
    answers(b"x" * 2**20),
    answers(b"\xff\n"),
    answers(b"insec-rendezvous/1\n"),
    answers(b'{"problem": null, "names": ["a"]}\n'),
    answers(RAW.encode()),
    squat(lambda line, _: line.sendall(b"{}\n")),
    squat(lambda line, _: line.sendall(b"x" * 5000)),
    squat(lambda line, mac: line.sendall(seal(b"{}", mac, b"another", "welcome"))),
    *(
      squat_with(payload)
      for payload in (
        b"",
        b"[]",
        b"{}",
        b"[" * 99_999,
        b'{"problem": 1, "names": []}',
        b'{"problem": null, "names": null}',
        b'{"problem": null, "names": ["a"]}',
        b'{"problem": null, "names": ["a", "b", 3]}',
        b'{"problem": "", "names": []}',
        b'{"problem": null, "names": ["a", "b", ""]}',
        b'{"problem": NaN, "names": []}',
        b'{"problem": "\\ud800", "names": []}',
        json.dumps({"problem": "a" * 10_001, "names": []}).encode(),
        b'{"problem": null, "names": ["a", "b", "c"], "x": 1}',
      )
    ),
  ],
)
def test_what_a_stranger_at_the_port_of_process_0_says_is_no_answer(places, serve, capfd):
  with socket.create_server(("127.0.0.1", places[0].port)) as server:

    def serve_all():
      with contextlib.suppress(OSError):
        while True:
          line, _ = server.accept()
          with line, contextlib.suppress(OSError):
            serve(line)

    threading.Thread(target=serve_all, daemon=True).start()
    (found,) = meet_all([dataclasses.replace(places[1], host="127.0.0.1")], seconds=0.05)
    server.shutdown(socket.SHUT_RDWR)
  assert found.startswith("process 0 is missing: process 1 (")
  assert re.fullmatch("[ -~]+", found)
  assert capfd.readouterr() == ("", "")


def test_a_silent_stranger_at_the_port_of_process_0_holds_nobody_for_long(places, monkeypatch):
  monkeypatch.setattr(coordinator, "GREETING_SECONDS", 0.2)
  for sends in (b"", b"insec"):
    with socket.create_server(("127.0.0.1", places[0].port)) as server:
      threading.Thread(target=lambda: server.accept()[0].sendall(sends), daemon=True).start()  # noqa: B023
      began = time.monotonic()
      assert "process 0 is missing" in meet_all([dataclasses.replace(places[1], host="127.0.0.1")], seconds=0.1)[0]
      assert time.monotonic() - began < 2


def test_a_message_that_is_right_on_one_connection_is_wrong_on_every_other():
  greeting = handshake.Greeting(1, 2, "a", {"x": "1"})
  line = handshake.write_greeting(greeting, key=b"k", context=b"one")[:-1]
  assert handshake.read_greeting(line, key=b"k", context=b"one") == greeting
  assert handshake.read_greeting(line, key=b"k", context=b"two") is None
  assert handshake.read_greeting(line, key=b"j", context=b"one") is None
  assert line != handshake.write_greeting(greeting, key=b"k", context=b"one")[:-1]  # answers to it differ as well


def test_a_process_that_left_may_come_again_and_one_that_stays_away_is_missing(places):
  def come_and_go(port):
    line = connect(port)
    line.sendall(seal(json.dumps(GREETING).encode(), nonce_of(line)))
    assert handshake.read_message("welcome", b"", key=b"", context=b"") is None
    line.close()
    return []

  assert meet_beside(places, come_and_go)[0] == [(socket.gethostname(),) * 3] * 3
  found = meet_beside([places[0], places[2]], come_and_go, seconds=0.5)[0]
  assert all(one.startswith("missing: process 1 of 3") for one in found)


def test_a_process_whose_greeting_and_end_are_read_at_once_is_missing(places):
  found = []
  greeting = handshake.Greeting(0, 2, "a", {})
  server = coordinator.Server("localhost", places[0].port, greeting, handshake.run_key(), seconds=0.3)
  with connect(places[0].port) as line:
    waiting = threading.Thread(target=lambda: found.append(server.wait()))
    # Process 0 begins to read when the greeting and the end of the connection have both arrived.
    server._selector.select(1)
    for listener in server._listeners:
      with contextlib.suppress(OSError):
        server._accept(listener)
    line.sendall(seal(json.dumps(GREETING | {"num": 2}).encode(), nonce_of(line)))
  waiting.start()
  waiting.join()
  server.answer({"problem": None, "names": []})
  assert server.ignored == 0
  assert found[0].startswith("missing: process 1 of 2")


@pytest.mark.parametrize(
  ("text", "host", "port"),
  [
    ("host", "host", 8476),
    ("host:1", "host", 1),
    ("10.0.0.1:65535", "10.0.0.1", 65535),
    ("[::1]", "::1", 8476),
    ("[::1]:8477", "::1", 8477),
    ("[FD00::0:2]:80", "fd00::2", 80),
    ("a-b.c_d:22", "a-b.c_d", 22),
  ],
)
def test_an_address_is_host_and_port_with_ipv6_in_brackets(text, host, port):
  assert coordinator.parse_address(text, "--coordinator") == (host, port)
  assert coordinator.parse_address(coordinator.join_address(host, port), "") == (host, port)


@pytest.mark.parametrize(
  "text",
  [
    "",
    ":",
    ":80",
    "host:",
    "host:0",
    "host:65536",
    "host:-1",
    "host:1.5",
    "host:99999999",
    "host:８４７６",
    "::1",
    "::1:8476",
    "[::1",
    "::1]",
    "[::1]8476",
    "[host]:80",
    "[10.0.0.1]:80",
    "[::g]",
    "a b",
    "a/b",
    "http://a:80",
    "a:80:90",
    "a..b",
    "a" * 64 + ".b",
    "a\x1b[31m",
    "user@a",
    "a:80\n",
    "0.0.0.0",
    "[::]:80",
  ],
)
def test_what_is_no_address_is_refused_in_one_printable_line(text):
  with pytest.raises(InputError, match=r"^--coordinator=[ -~]+$"):
    detect_processes(text, 2, 0, seconds=1)


def listening(host, port):
  sockets = coordinator.listen(host, port, seconds=0.3)
  names = [one.getsockname()[:2] for one in sockets]
  for one in sockets:
    one.close()
  return names


def resolve_to(monkeypatch, *ips):
  monkeypatch.setattr(
    socket,
    "getaddrinfo",
    lambda _, port, **options: (
      options
      and [(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ips]
    ),
  )


def test_process_0_listens_at_the_addresses_of_the_coordinator_and_no_other(monkeypatch, capfd):
  port = free_port()
  assert {ip for ip, _ in listening("localhost", port)} <= {"127.0.0.1", "::1"}
  assert listening("127.0.0.2", port) == [("127.0.0.2", port)]
  assert capfd.readouterr().err == ""
  resolve_to(monkeypatch, "127.0.0.1", "192.0.2.77", "127.0.0.3", "127.0.0.1")  # 192.0.2.0/24 is for examples
  assert listening("name", port) == [("127.0.0.1", port), ("127.0.0.3", port)]
  assert capfd.readouterr().err == ""
  resolve_to(monkeypatch, "127.0.1.1")
  assert listening("name", port) == [("127.0.1.1", port)]
  assert "127.0.1.1 only, which is what name means on this machine: no other host" in capfd.readouterr().err


def test_an_address_of_another_machine_is_refused_with_what_to_do(monkeypatch):
  with pytest.raises(InputError, match=r"192.0.2.77:80 .* is no address of its machine; give .*JAX_COORDINATOR_BIND"):
    listening("192.0.2.77", 80)
  with pytest.raises(InputError, match="cannot be resolved on its machine"):
    listening("no-such-name.invalid", 80)
  monkeypatch.setenv(coordinator.BIND_ADDRESS, "127.0.0.4:99")
  assert listening("192.0.2.77", 80) == [("127.0.0.4", 99)]
  assert coordinator.jax_addresses("192.0.2.77", 80) == ("127.0.0.4:99", "127.0.0.4:99")
  monkeypatch.setenv(coordinator.BIND_ADDRESS, "0.0.0.0:99")
  assert coordinator.jax_addresses("192.0.2.77", 80) == ("0.0.0.0:99", "localhost:99")
  monkeypatch.setenv(coordinator.BIND_ADDRESS, "nonsense:")
  with pytest.raises(InputError, match=r"^JAX_COORDINATOR_BIND_ADDRESS='nonsense:'; give"):
    listening("192.0.2.77", 80)


def test_a_port_in_use_is_refused_with_what_to_do(places):
  with socket.create_server(("127.0.0.1", places[0].port)):
    assert "cannot be opened at 127.0.0.1" in meet_all(places[:1])[0]


def test_what_is_not_public_in_jax_is_there():
  assert processes._jax_client() is None
  assert callable(rendezvous._jax_clusters().auto_detect_unset_distributed_params)
  for name in ("key_value_set", "key_value_dir_get", "blocking_key_value_get"):
    assert hasattr(_jax.DistributedRuntimeClient, name)

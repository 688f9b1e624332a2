"""The relay to process 0 outlives its far end, and no other process of the machine gets through."""

import contextlib
import socket
import subprocess
import sys
import threading

import pytest

from insec_jax.distributed.relay import MAX_RELAYED, Relay


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


def test_the_way_to_process_0_is_closed_to_other_processes_of_the_machine():
  lost = threading.Event()
  with socket.create_server(("127.0.0.1", 0)) as server:
    server.settimeout(5)
    relay = Relay("127.0.0.1", server.getsockname()[1], lost.set)
    relay.holds = True
    script = f"import socket; print(socket.create_connection(('127.0.0.1', {relay.port}), timeout=5).recv(9))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "b''\n"
    near = socket.create_connection(("127.0.0.1", relay.port))
    far, _ = server.accept()  # the first that comes
    near.sendall(b"to")
    assert far.recv(2) == b"to"
    assert not lost.is_set()
    near.close()
    far.close()


def test_the_way_to_process_0_stays_open_after_connections_that_fail(monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as server:
    server.settimeout(5)
    failures = [OSError(24, "Too many open files"), ConnectionAbortedError()]
    real = socket.socket.accept
    monkeypatch.setattr(
      socket.socket,
      "accept",
      lambda line: (
        (_ for _ in ()).throw(failures.pop())
        if (failures and threading.current_thread().name == "relay")
        else real(line)
      ),
    )
    relay = Relay("127.0.0.1", server.getsockname()[1], lambda: None)
    with socket.create_connection(("127.0.0.1", relay.port)) as near:
      far, _ = server.accept()
      far.sendall(b"fro")
      assert near.recv(3) == b"fro"
      far.close()
    assert not failures
    lines = [socket.create_connection(("127.0.0.1", relay.port)) for _ in range(MAX_RELAYED + 5)]
    accepted = []
    server.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
      while True:
        accepted.append(server.accept()[0])
    assert MAX_RELAYED - 1 <= len(accepted) <= MAX_RELAYED
    for line in (*lines, *accepted):
      line.close()

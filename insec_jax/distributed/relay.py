"""Relay of the connection between JAX's client in a process and process 0."""

import contextlib
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable

from insec_jax.distributed.coordinator import GREETING_SECONDS

MAX_RELAYED = 16  # connections of JAX's client to process 0; it has one, and retries until process 0 listens


class Relay:
  """TCP relay between JAX's client in this process and process 0.

  Once `holds` is set and the far end closes, the near end stays open and `on_loss` is called. JAX's client would abort
  its process, with a stack trace that names no process, as soon as its connection closes; before it has joined, it
  retries by itself. Connections of other processes of this machine are closed at once: the end of such a connection
  would end the run.
  """

  def __init__(self, host: str, port: int, on_loss: Callable[[], None]):
    self._target, self._on_loss = (host, port), on_loss
    self.holds = False
    self._free = threading.Semaphore(MAX_RELAYED)
    self._server = socket.create_server(("127.0.0.1", 0))
    self.port = self._server.getsockname()[1]
    self._start(self._accept)

  def _start(self, function, *arguments):
    threading.Thread(target=function, args=arguments, daemon=True, name="relay").start()

  def _accept(self):
    while True:
      try:
        near, address = self._server.accept()
      except OSError:  # the peer has closed, or descriptors are scarce: the next connection may succeed
        time.sleep(0.1)
        continue
      if is_foreign(address[1], self.port) or not self._free.acquire(blocking=False):
        near.close()
        continue
      try:
        self._start(self._connect, near)
      except RuntimeError:  # no more threads; JAX's client tries again
        near.close()
        self._free.release()

  def _connect(self, near: socket.socket):
    try:
      self._relay(near)
    except (OSError, RuntimeError):
      _close(near)
    finally:
      self._free.release()

  def _relay(self, near: socket.socket):
    while True:  # process 0 opens its port again right after the rendezvous
      try:
        far = socket.create_connection(self._target, timeout=GREETING_SECONDS)
        break
      except OSError:
        time.sleep(0.1)
    far.settimeout(None)
    for connection in (near, far):
      connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self._start(self._send, near, far)
    with contextlib.suppress(OSError):
      while data := far.recv(2**16):
        near.sendall(data)
    _close(far)
    if self.holds:
      self._on_loss()
    else:
      _close(near)

  def _send(self, near: socket.socket, far: socket.socket):
    with contextlib.suppress(OSError):
      while data := near.recv(2**16):
        with contextlib.suppress(OSError):  # process 0 is missing; `_relay` reports it
          far.sendall(data)
    _close(far)


def is_foreign(near_port: int, far_port: int) -> bool:
  """Return whether the near end of a TCP connection within this machine is known to belong to another process.

  Linux lists every connection with the inode of its socket. Where no such list exists, the result is False.
  """
  ends = [f"{port:04X}" for port in (near_port, far_port)]
  try:
    rows = [
      row.split()
      for table in ("tcp", "tcp6")
      for row in pathlib.Path("/proc/self/net", table).read_text(encoding="ascii").splitlines()[1:]
    ]
    inodes = {f"socket:[{row[9]}]" for row in rows if [end.rpartition(":")[2] for end in row[1:3]] == ends}
    own = {_link(file) for file in os.scandir("/proc/self/fd")}
  except (OSError, ValueError, IndexError):
    return False
  return bool(inodes) and not inodes & own


def _link(file: os.DirEntry) -> str:
  try:
    return os.readlink(file)
  except OSError:  # closed since
    return ""


def _close(line: socket.socket):
  """Close the socket; a thread that reads from it is woken."""
  with contextlib.suppress(OSError):
    line.shutdown(socket.SHUT_RDWR)
  line.close()

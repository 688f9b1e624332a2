"""Listening side of the rendezvous: the addresses of process 0, and the server for all connections to them.

Any host of the network may connect. A connection that does not send the greeting of a process of this run
(handshake.py) is closed and counted. Such connections are limited in number, bytes and time, and delay no process.
"""

import collections
import contextlib
import dataclasses
import errno
import ipaddress
import os
import re
import selectors
import socket
import sys
import time
from typing import Any

from insec_jax.command import InputError
from insec_jax.distributed import handshake
from insec_jax.distributed.handshake import Greeting, printable

PORT = 8476  # Cloud TPU networks leave it open; JAX's own default, 8482, is closed there
GREETING_SECONDS = 5
RESOLVE_SECONDS = 30  # a cluster that starts a run may take this long to publish the names of its machines
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's own variable
MAX_STRANGERS = 256  # open connections without a greeting, in addition to one for each process
MAX_LISTED = 20  # processes named in a message
ACCEPTS_A_TURN = 32  # fewer than MAX_STRANGERS: a process must be able to greet before its connection is the oldest
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL}  # raised by bind for an address of another machine
ANY_ADDRESS = {"0.0.0.0", "::"}


def parse_address(text: str, source: str) -> tuple[str, int]:
  """Return host (an IPv6 address without its brackets) and port of `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`."""
  match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]+))(?::([0-9]{1,5}))?", text)
  try:
    if match and 1 <= (port := int(match[3] or PORT)) <= 65535:
      if match[1]:
        return str(ipaddress.IPv6Address(match[1])), port
      match[2].encode("idna")  # as socket does; raises for a label that is empty or too long
      return match[2], port
  except ValueError:
    pass
  raise InputError(
    f"{source}={printable(text, 300)!r}; give HOST or HOST:PORT of process 0, an IPv6 address in "
    "brackets, a port from 1 to 65535"
  )


def join_address(host: str, port: int) -> str:
  """Return the text that `parse_address` reads."""
  return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind_address(host: str, port: int) -> tuple[str, int]:
  """Return host and port at which process 0 listens: those of the coordinator unless BIND_ADDRESS is set."""
  if (given := os.environ.get(BIND_ADDRESS)) is None:
    return host, port
  return parse_address(given, BIND_ADDRESS)


def jax_addresses(host: str, port: int) -> tuple[str, str]:
  """Return the address that JAX's coordinator binds and the one to which process 0 connects; both HOST:PORT."""
  host, port = bind_address(host, port)
  # For a host name gRPC binds every address that the name has on this machine, as `listen` does.
  return join_address(host, port), join_address("localhost" if host in ANY_ADDRESS else host, port)


def listen(host: str, port: int, *, seconds: float) -> list[socket.socket]:
  """Return sockets that listen on those of the coordinator's addresses that belong to this machine.

  Raises InputError if none does, or if the host name cannot be resolved within `seconds`, RESOLVE_SECONDS at most.
  """
  host, port = bind_address(host, port)
  addresses = _resolve(host, port, min(seconds, RESOLVE_SECONDS))
  ips = [address[0] for _, address in addresses]
  with contextlib.ExitStack() as stack:
    listeners = [
      stack.enter_context(listener)
      for family, address in addresses
      if (listener := _listen_at(family, address)) is not None
    ]
    if not listeners:
      raise InputError(
        f"{join_address(host, port)} ({', '.join(ips)}), where process 0 should listen, is no address "
        "of its machine; give --coordinator=HOST:PORT of the machine on which process 0 runs or, if "
        f"that address is forwarded to it, set {BIND_ADDRESS} there to the ADDRESS:PORT at which "
        "connections arrive"
      )
    stack.pop_all()
  if all(_is_loopback(ip) for ip in ips) and host != "localhost" and not _is_loopback(host):
    print(
      f"process 0 listens at {', '.join(ips)} only, which is what {host} means on this machine: no other host can "
      f"connect; if there are others, set {BIND_ADDRESS} to an ADDRESS:PORT of this machine that they can reach",
      file=sys.stderr,
      flush=True,
    )
  return listeners


def _resolve(host: str, port: int, seconds: float) -> list[tuple[int, tuple]]:
  """Return family and socket address of each address to which the host name resolves on this machine."""
  deadline = time.monotonic() + seconds
  while True:
    try:
      address_infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
      return list(dict.fromkeys((family, address) for family, _, _, _, address in address_infos))
    except socket.gaierror as error:
      if time.monotonic() > deadline:
        raise InputError(
          f"{host}, where process 0 should listen, cannot be resolved on its machine ({error}); give "
          "--coordinator=HOST:PORT with a name or an address that every host knows"
        ) from error
    time.sleep(0.2)


def _listen_at(family: int, address: tuple) -> socket.socket | None:
  """Return a socket that listens at the address; None if the address is not one of this machine."""
  try:
    with contextlib.ExitStack() as stack:
      listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
      listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
      listener.bind(address)
      listener.listen(4096)  # the kernel lowers it to its own limit
      listener.setblocking(False)
      stack.pop_all()
      return listener
  except OSError as error:
    if error.errno in NOT_HERE:
      return None
    raise InputError(
      f"port {address[1]} cannot be opened at {address[0]} ({error}); another run may still be ending: "
      "wait for it, or give --coordinator=HOST:PORT with a free port"
    ) from error


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


@dataclasses.dataclass(eq=False)
class _Peer:
  """A connection to process 0.

  `greeting` is None until the peer has proved to be a process of the run. `context` is the nonce of the challenge
  before the greeting, and the MAC of the greeting after it.
  """

  line: socket.socket
  host: str
  deadline: float
  context: bytes
  buffer: bytearray
  greeting: Greeting | None = None


class Server:
  """Server of the rendezvous on process 0: one thread, all connections non-blocking.

  A connection has GREETING_SECONDS for its greeting. When too many are open, the oldest connection of the host with
  the most connections is closed. A connection with a greeting is never closed.
  """

  def __init__(self, host: str, port: int, greeting: Greeting, key: bytes, *, seconds: float):
    self._seconds, self._deadline = seconds, time.monotonic() + seconds
    self._at, self._num, self._greeting, self._key = (host, port), greeting.num, greeting, key
    self._most = MAX_STRANGERS + self._num
    self._unknown: dict[_Peer, None] = {}  # in the order of arrival
    self._known: dict[int, _Peer] = {}
    self._refused: list[_Peer] = []  # their greetings are authentic and contradict the run
    self.ignored = 0
    self._listeners = listen(host, port, seconds=seconds)
    self._selector = selectors.DefaultSelector()
    for listener in self._listeners:
      self._selector.register(listener, selectors.EVENT_READ)

  def wait(self) -> str | None:
    """Return None once all processes have greeted, or one line about the problem: a conflict, or missing processes."""
    while not self._all_present():
      now = time.monotonic()
      if now >= self._deadline:
        return self._missing()
      while (oldest := next(iter(self._unknown), None)) and oldest.deadline <= now:
        self._ignore(oldest)
      until = min(self._deadline, oldest.deadline) if oldest else self._deadline
      for key, _ in self._selector.select(min(until - now, 1)):
        if key.data is None:
          self._accept(key.fileobj)
        elif key.data.greeting is not None:
          self._leave(key.data)
        elif key.data in self._unknown and (problem := self._read(key.data)):
          return problem
    return None

  def _all_present(self) -> bool:
    """Return True if every process has greeted and has an open connection; forget those that have closed theirs."""
    if len(self._known) < self._num - 1:
      return False
    for peer in list(self._known.values()):
      if _has_left(peer.line):
        self._leave(peer)
    return len(self._known) == self._num - 1

  def greetings(self) -> list[Greeting]:
    """Return the greetings received so far, that of process 0 included, ordered by process."""
    return [self._greeting, *(self._known[index].greeting for index in sorted(self._known))]

  def answer(self, content: dict[str, Any]) -> None:
    """Send the answer to all processes that have greeted, within GREETING_SECONDS, and close all connections."""
    deadline = time.monotonic() + GREETING_SECONDS
    # A process connects to JAX at this port as soon as it has the answer, so the port must be free by then.
    for listener in self._listeners:
      self._selector.unregister(listener)
      listener.close()
    for peer in list(self._unknown):
      self._ignore(peer)
    unsent = {}
    for peer in (*self._known.values(), *self._refused):
      unsent[peer] = handshake.write_message("answer", content, key=self._key, context=peer.context)
      self._selector.modify(peer.line, selectors.EVENT_WRITE, peer)
    while unsent and (left := deadline - time.monotonic()) > 0:
      for key, _ in self._selector.select(left):
        peer = key.data
        try:
          unsent[peer] = unsent[peer][peer.line.send(unsent[peer]) :]
        except BlockingIOError:
          continue
        except OSError:  # a process that has exited is detected later
          unsent[peer] = b""
        if not unsent[peer]:
          del unsent[peer]
          self._close(peer)
    for peer in unsent:
      self._close(peer)
    self._selector.close()

  def _accept(self, listener: socket.socket) -> None:
    for _ in range(ACCEPTS_A_TURN):
      try:
        line, address = listener.accept()
      except BlockingIOError:
        return
      except OSError as error:
        if error.errno in OUT_OF_RESOURCES and not self._make_room():
          time.sleep(0.05)  # the resource is held by other programs
        return
      line.setblocking(False)
      peer = _Peer(line, address[0], time.monotonic() + GREETING_SECONDS, handshake.make_nonce(), bytearray())
      self._unknown[peer] = None
      self._selector.register(line, selectors.EVENT_READ, peer)
      try:
        line.send(handshake.write_challenge(peer.context))  # fits into any empty buffer
      except OSError:
        self._ignore(peer)
      if len(self._unknown) > self._most:
        self._make_room()

  def _make_room(self) -> bool:
    """Close one connection without a greeting and return True; return False if there is none.

    It is the oldest of the host with the most such connections, so a host that opens many displaces only its own.
    """
    if not self._unknown:
      return False
    crowd, _ = collections.Counter(peer.host for peer in self._unknown).most_common(1)[0]
    self._ignore(next(peer for peer in self._unknown if peer.host == crowd))
    return True

  def _ignore(self, peer: _Peer) -> None:
    self.ignored += 1
    self._unknown.pop(peer, None)
    self._close(peer)

  def _close(self, peer: _Peer) -> None:
    self._selector.unregister(peer.line)
    peer.line.close()

  def _leave(self, peer: _Peer) -> None:
    """Forget a process whose connection is readable after its greeting: it has closed it, and may connect again.

    A process of the run sends nothing after its greeting.
    """
    if self._known.get(peer.greeting.index) is peer:
      del self._known[peer.greeting.index]
      self._close(peer)

  def _read(self, peer: _Peer) -> str | None:
    """Read from a connection without a greeting; return the problem if its greeting contradicts the run, else None."""
    try:
      data = peer.line.recv(2**16)
    except BlockingIOError:
      return None
    except OSError:
      data = b""
    peer.buffer += data
    if not data or len(peer.buffer) > handshake.MAX_MESSAGE_BYTES:
      self._ignore(peer)
      return None
    if b"\n" not in data:
      return None
    line, _, more = bytes(peer.buffer).partition(b"\n")
    greeting = None if more else handshake.read_greeting(line, key=self._key, context=peer.context)
    if greeting is None:
      self._ignore(peer)
      return None
    context = line[: handshake.MAC_LENGTH]
    try:
      peer.line.send(handshake.write_message("welcome", {}, key=self._key, context=context))
    except OSError:
      self._ignore(peer)
      return None
    del self._unknown[peer]
    peer.greeting, peer.context, peer.buffer = greeting, context, bytearray()
    if problem := self._conflict(greeting):
      self._refused.append(peer)
    else:
      self._known[greeting.index] = peer
    return problem

  def _conflict(self, greeting: Greeting) -> str | None:
    """Return the problem with a new greeting, or None.

    An earlier process of the same index is forgotten if it has closed its connection.
    """
    if greeting.num != self._num or greeting.index >= self._num:
      return (
        f"process {greeting.index} ({greeting.name}) was told of {greeting.num} processes, process 0 "
        f"({self._greeting.name}) of {self._num}; give all the same --num_processes"
      )
    first = self._known.get(greeting.index)
    if first is not None and _has_left(first.line):
      self._leave(first)
    elif first is not None or greeting.index == 0:
      names = f"{first.greeting.name if first else self._greeting.name} and {greeting.name}"
      return f"two processes, on {names}, have --process_id={greeting.index}; give each its own"
    return None

  def _missing(self) -> str:
    missing = [index for index in range(1, self._num) if index not in self._known]
    word = "process" if len(missing) == 1 else "processes"
    arrived = [f"{greeting.index} ({greeting.name})" for greeting in self.greetings()]
    ignored = f"; {ignored_text(count)}" if (count := self.ignored + len(self._unknown)) else ""
    return (
      f"missing: {word} {_listed(list(map(str, missing)))} of {self._num}; waited {self._seconds:g} s at "
      f"{join_address(*bind_address(*self._at))}, came: {_listed(arrived)}; start the same command on every host"
      f"{ignored}"
    )


def ignored_text(count: int) -> str:
  """Return the message about `count` connections that did not belong to the run."""
  which = "1 connection that was" if count == 1 else f"{count} connections that were"
  return (
    f"ignored {which} no process of this run (another program, another version of this one, or another "
    f"{handshake.TOKEN})"
  )


def _listed(texts: list[str]) -> str:
  more = f" and {len(texts) - MAX_LISTED} more" if len(texts) > MAX_LISTED else ""
  return ", ".join(texts[:MAX_LISTED]) + more


def _has_left(line: socket.socket) -> bool:
  try:
    return not line.recv(1, socket.MSG_PEEK)
  except BlockingIOError:
    return False
  except OSError:
    return True

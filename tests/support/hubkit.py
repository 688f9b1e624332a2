"""A hub on loopback: answers what huggingface_hub asks for models and data sets, and counts it."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator

ROUTE = re.compile(r"/(?P<api>api/)?(?P<kind>models/|datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?P<rest>/.*)?")


@dataclasses.dataclass
class Repository:
  """Files by path; `gated` repositories need the token."""

  files: dict[str, bytes]
  gated: bool = False

  def __post_init__(self):
    self.hashes = {path: hashlib.sha1(content).hexdigest() for path, content in self.files.items()}
    self.commit = hashlib.sha1(repr(sorted(self.hashes.items())).encode()).hexdigest()


@dataclasses.dataclass
class Hub:
  """Repositories by "models/org/name" or "datasets/org/name", and by revision."""

  url: str = ""
  repositories: dict[str, dict[str, Repository]] = dataclasses.field(default_factory=dict)
  token: str = "hf_good"
  gets: list[str] = dataclasses.field(default_factory=list)  # "path" or "path bytes=N-" of every download
  cut_after: int = 0  # bytes of a file after which the connection is dropped, once for each file
  cut: set[str] = dataclasses.field(default_factory=set)

  def add(self, name: str, files: dict[str, bytes], revision: str = "main", *, gated: bool = False) -> str:
    """Add a revision of a repository, and return its commit."""
    made = Repository(files, gated)
    self.repositories.setdefault(name, {}).update({revision: made, made.commit: made})
    return made.commit

  def variables(self, cache) -> dict[str, str]:
    """Environment variables of a program that uses this hub, with a cache of its own."""
    return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers of the hub that is the attribute `hub` of the server."""

  protocol_version = "HTTP/1.1"

  def log_message(self, *_) -> None:
    pass

  def do_HEAD(self) -> None:
    self.answer()

  def do_GET(self) -> None:
    self.answer()

  def answer(self) -> None:
    hub, match = self.server.hub, ROUTE.fullmatch(self.path.partition("?")[0])
    kind = "models/" if not match["kind"] else match["kind"]
    revisions, rest = hub.repositories.get(kind + match["name"]), (match["rest"] or "").split("/")
    if revisions is None:
      return self.refuse(401 if hub.token not in self.headers.get("Authorization", "") else 404, "RepoNotFound")
    revision = rest[2].replace("%2F", "/") if len(rest) > 2 else "main"
    if revision not in revisions:
      return self.refuse(404, "RevisionNotFound")
    found = revisions[revision]
    if match["api"] and rest[1:2] == ["tree"]:
      return self.send(json.dumps([self.entry(path, found) for path in found.files]).encode())
    if match["api"]:
      listed = [{"rfilename": path} for path in found.files]
      return self.send(json.dumps({"id": match["name"], "sha": found.commit, "siblings": listed}).encode())
    if found.gated and hub.token not in self.headers.get("Authorization", ""):
      return self.refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
    path = "/".join(rest[3:])
    if path not in found.files:
      return self.refuse(404, "EntryNotFound")
    return self.send_file(path, found)

  def entry(self, path: str, found: Repository) -> dict:
    return {"type": "file", "path": path, "size": len(found.files[path]), "oid": found.hashes[path]}

  def refuse(self, status: int, code: str) -> None:
    self.send(b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})

  def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
    self.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **(headers or {})}.items():
      self.send_header(name, str(value))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(content)

  def send_file(self, path: str, found: Repository) -> None:
    hub, content = self.server.hub, found.files[path]
    headers = {
      "ETag": f'"{found.hashes[path]}"',
      "X-Repo-Commit": found.commit,
      "Accept-Ranges": "bytes",
    }
    if self.command == "HEAD":
      self.send(content, headers=headers)
      return
    asked = self.headers.get("Range", "")
    hub.gets.append(f"{path} {asked}".strip())
    start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
    if start:
      headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    if hub.cut_after and path not in hub.cut and len(content) > hub.cut_after:
      hub.cut.add(path)
      self.send_response(200)
      for name, value in {"Content-Length": len(content), **headers}.items():
        self.send_header(name, str(value))
      self.end_headers()
      self.wfile.write(content[: hub.cut_after])
      self.wfile.flush()
      self.close_connection = True
      return
    self.send(content[start:], 206 if start else 200, headers)


@contextlib.contextmanager
def running() -> Iterator[Hub]:
  """Run a hub without repositories inside the block."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield server.hub
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def files_of(folder) -> dict[str, bytes]:
  """The files of a folder, by path."""
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

"""Record of the process that holds a lock or a lease, as it is written there."""

import json
import os
import pathlib
import secrets
import socket
from datetime import UTC, datetime
from typing import Any


class HeldError(Exception):
  """Error: another process holds the lock; the message gives process, host and start."""


class Holder:
  """Process that holds a lock, as recorded in the lock file."""

  WIDTH = 400  # of the line, so that each heartbeat overwrites the one before

  def __init__(self, fields: dict[str, Any]):
    self.fields = fields

  @classmethod
  def here(cls) -> "Holder":
    since = datetime.now(UTC).isoformat(" ", "seconds")
    return cls(
      {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": since,
        "boot": boot(),
        "token": secrets.token_hex(8),
      }
    )

  @classmethod
  def read(cls, lock: pathlib.Path) -> "Holder | None":
    try:
      return cls.parse(lock.read_bytes())
    except OSError:  # absent
      return None

  @classmethod
  def parse(cls, content: bytes) -> "Holder | None":
    try:
      fields = json.loads(content)
      return cls(fields) if {"process", "host", "since", "boot", "token"} <= fields.keys() else None
    except (ValueError, AttributeError):  # just being written
      return None

  def line(self, beat: int) -> bytes:
    return json.dumps({**self.fields, "beat": beat}).ljust(self.WIDTH).encode()

  def __str__(self) -> str:
    return "process {process} on {host} since {since}".format(**self.fields)


def boot() -> str:
  """Return an id of the running system; processes of one system share file locks."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
  except OSError:
    return socket.gethostname()

"""Messages of the rendezvous: their format, their authentication and the validation of what they hold.

    process I                               process 0
      connect                          ->
                                       <-   insec-rendezvous/1 NONCE    a fresh nonce for each connection
      MAC {index, num, name, facts}    ->                               greeting
                                       <-   MAC {}                      welcome, at once
                                       <-   MAC {problem, names}        answer, when all processes have come

Each message is one line. A MAC is an HMAC-SHA256 under the key of the run. It covers the nonce or, for messages of
process 0, the MAC of the greeting, which holds a nonce of the other process: a message recorded on one connection is
invalid on every other. The token itself is never sent. Nothing is encrypted.
"""

import dataclasses
import hashlib
import hmac
import json
import os
import re
import secrets
from typing import Any

from insec_jax.command import InputError

TOKEN = "INSEC_RUN_TOKEN"
PROTOCOL = b"insec-rendezvous/1"
MAX_MESSAGE_BYTES = 2**18  # a greeting has about 10 kB
MAX_PROCESSES = 2**16
MAX_NAME, MAX_KEY, MAX_VALUE, MAX_PROBLEM = 255, 200, 300, 10_000  # letters
MAC_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Greeting:
  """Message of a process to process 0: its index, the number of processes, its host name, its facts as JSON texts."""

  index: int
  num: int
  name: str
  facts: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Answer:
  """Message of process 0 to all processes: the problem that ends the run, or else the host name of each process."""

  problem: str | None
  names: tuple[str, ...]


def run_key() -> bytes:
  """Return the key of the run, derived from the environment variable INSEC_RUN_TOKEN.

  Without the variable the key is public. Raises InputError if it is empty.
  """
  token = os.environ.get(TOKEN)
  if token == "":
    raise InputError(f"{TOKEN} is empty; set the same random text on every host, or unset it")
  return hmac.digest(os.fsencode(token or ""), PROTOCOL, "sha256")


def printable(text: str, limit: int) -> str:
  """Return the text as one line of at most `limit` printable ASCII letters: others are escaped, the end is cut off."""
  escaped = "".join(letter if " " <= letter <= "~" else ascii(letter)[1:-1] for letter in text[: limit + 1])
  return escaped if len(escaped) <= limit else f"{escaped[: limit - 3]}..."


def fact_text(value: Any) -> str:
  """Return the JSON of a value; for a long one its beginning and a SHA-256 digest."""
  text = json.dumps(value)
  if len(text) <= MAX_VALUE:
    return text
  return f"{text[: MAX_VALUE - 50]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"


def make_nonce() -> bytes:
  """Return 32 random hexadecimal digits."""
  return secrets.token_hex(16).encode()


def write_challenge(nonce: bytes) -> bytes:
  """Return the line that process 0 sends on every new connection."""
  return PROTOCOL + b" " + nonce + b"\n"


def read_challenge(line: bytes) -> bytes | None:
  """Return the nonce of a challenge, given without its newline; None if the line is no challenge."""
  match = re.fullmatch(re.escape(PROTOCOL) + rb" ([0-9a-f]{32})", line)
  return match and match[1]


def write_message(kind: str, content: dict[str, Any], *, key: bytes, context: bytes) -> bytes:
  """Return the line of a message: MAC, space, JSON, newline."""
  payload = json.dumps(content).encode()
  return _mac(kind, payload, key, context) + b" " + payload + b"\n"


def read_message(kind: str, line: bytes, *, key: bytes, context: bytes) -> dict[str, Any] | None:
  """Return the content of a message, given without its newline; None unless its MAC is right and it is an object."""
  mac, _, payload = line.partition(b" ")
  if not hmac.compare_digest(mac, _mac(kind, payload, key, context)):
    return None
  try:
    content = json.loads(payload.decode(), parse_constant=_refuse)
  except (ValueError, RecursionError):  # ValueError: no UTF-8, no JSON, an integer of too many digits
    return None
  return content if isinstance(content, dict) else None


def _mac(kind: str, payload: bytes, key: bytes, context: bytes) -> bytes:
  return hmac.new(key, b" ".join((PROTOCOL, kind.encode(), context, payload)), "sha256").hexdigest().encode()


def _refuse(constant: str):
  raise ValueError(f"{constant} is no JSON")


def write_greeting(greeting: Greeting, *, key: bytes, context: bytes) -> bytes:
  """Return the line of a greeting, with a fresh nonce."""
  line = write_message(
    "greeting", {**dataclasses.asdict(greeting), "nonce": make_nonce().decode()}, key=key, context=context
  )
  assert len(line) <= MAX_MESSAGE_BYTES, f"a greeting of {len(line)} bytes"
  return line


def read_greeting(line: bytes, *, key: bytes, context: bytes) -> Greeting | None:
  """Return the greeting, its name made printable; None unless MAC and type and bounds of each field are right."""
  content = read_message("greeting", line, key=key, context=context)
  if content is None or content.keys() != {"index", "num", "name", "facts", "nonce"}:
    return None
  index, num, name, facts = (content[field] for field in ("index", "num", "name", "facts"))
  counts = type(index) is int and type(num) is int and 0 <= index < MAX_PROCESSES and 1 <= num <= MAX_PROCESSES
  if not (counts and _is_text(name, 1, MAX_NAME) and _is_text(content["nonce"], 32, 32) and isinstance(facts, dict)):
    return None
  if not all(_is_text(key, 1, MAX_KEY) and _is_text(value, 1, MAX_VALUE) for key, value in facts.items()):
    return None
  return Greeting(index, num, printable(name, MAX_NAME), facts)


def read_answer(line: bytes, num: int, *, key: bytes, context: bytes) -> Answer | None:
  """Return the answer in a run of `num` processes, its texts made printable; None unless it is valid."""
  content = read_message("answer", line, key=key, context=context)
  if content is None or content.keys() != {"problem", "names"}:
    return None
  problem, names = content["problem"], content["names"]
  if _is_text(problem, 1, MAX_PROBLEM):
    return Answer(printable(problem, MAX_PROBLEM), ())
  if problem is not None or not isinstance(names, list) or len(names) != num:
    return None
  if not all(_is_text(name, 1, MAX_NAME) for name in names):
    return None
  return Answer(None, tuple(printable(name, MAX_NAME) for name in names))


def _is_text(value: Any, least: int, most: int) -> bool:
  """Return whether the value is a string of `least` to `most` letters without lone surrogates."""
  return (
    isinstance(value, str)
    and least <= len(value) <= most
    and not any("\ud800" <= letter <= "\udfff" for letter in value)
  )

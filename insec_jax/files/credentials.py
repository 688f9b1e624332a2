"""Credentials for buckets: whether any are to be found here, decided in about a second.

gcsfs looks for them in files and then asks the metadata server that machines of Google Cloud have. Elsewhere it asks in
vain for half a minute, and then makes requests without credentials, which only public buckets answer.
"""

import contextlib
import http.client
import os
import pathlib
import sys
import threading
from collections.abc import Iterator

from insec_jax.command import InputError

KEY_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
EMULATOR = "STORAGE_EMULATOR_HOST"
HINT = f"run gcloud auth application-default login, or set {KEY_FILE}"
SERVER, SERVER_VARIABLE = "169.254.169.254", "GCE_METADATA_IP"
SERVER_SECONDS = 1.0  # the server is on the machine: it answers in milliseconds
FLAVOR = "Metadata-Flavor"
PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")  # begins with Google on its machines
PATIENCE_SECONDS = 1.5


def method() -> str | None:
  """Return how gcsfs is to log in: "anon" where it would find no credentials, None where it is to look for them.

  Raises InputError where the environment names a file that is not there.
  """
  if file := os.environ.get(KEY_FILE):
    if not os.path.isfile(file):
      raise InputError(f"{KEY_FILE}={file:.200} is not there; set it to a file of credentials, or unset it")
    return None
  if os.environ.get(EMULATOR) not in (None, "", "default"):
    return "anon"
  return None if any(map(os.path.isfile, _files())) or _has_server() else "anon"


def _files() -> list[pathlib.Path]:
  """Return where gcloud and gcsfs keep credentials."""
  home = pathlib.Path.home()
  gcloud = pathlib.Path(os.environ.get("CLOUDSDK_CONFIG") or home / ".config" / "gcloud")
  return [gcloud / "application_default_credentials.json", home / ".gcs_tokens"]


def _has_server() -> bool:
  """Return whether this machine has the metadata server of Google Cloud; other clouds have one at the same address."""
  if os.environ.get("NO_GCE_CHECK") == "true":
    return False
  with contextlib.suppress(OSError):
    if PRODUCT.read_text(encoding="utf-8").startswith("Google"):
      return True
  connection = http.client.HTTPConnection(os.environ.get(SERVER_VARIABLE) or SERVER, timeout=SERVER_SECONDS)
  with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
    connection.request("GET", "/", headers={FLAVOR: "Google"})
    return connection.getresponse().headers.get(FLAVOR) == "Google"
  return False


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
  """Print a line on stderr if the block takes longer than PATIENCE_SECONDS."""

  def say() -> None:
    print(f"waiting for {what}", file=sys.stderr, flush=True)

  timer = threading.Timer(PATIENCE_SECONDS, say)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()

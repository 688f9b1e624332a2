"""Credentials for buckets are found, or known to be missing, at once: gcsfs alone would search for half a minute."""

import contextlib
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from insec_jax.command import InputError
from insec_jax.files import credentials

VARIABLES = (credentials.KEY_FILE, credentials.EMULATOR, "CLOUDSDK_CONFIG", "NO_GCE_CHECK")


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A machine without credentials, of no cloud."""
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setattr(credentials, "PRODUCT", tmp_path / "product_name")
  monkeypatch.setattr(credentials, "SERVER_SECONDS", 0.2)
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    monkeypatch.setenv(credentials.SERVER_VARIABLE, f"127.0.0.1:{silent.getsockname()[1]}")
    yield tmp_path


@contextlib.contextmanager
def metadata_server(headers):
  """A server at its address that answers with these headers."""

  class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
      self.send_response(200)
      for name, value in headers.items():
        self.send_header(name, value)
      self.end_headers()

    def log_message(self, *_):
      pass

  with HTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_where_there_are_none_the_search_ends_in_a_moment(home):  # noqa: ARG001
  start = time.monotonic()
  assert credentials.method() == "anon"
  assert time.monotonic() - start < 1


@pytest.mark.parametrize(("headers", "method"), [({"Metadata-Flavor": "Google"}, None), ({"Server": "EC2ws"}, "anon")])
def test_a_metadata_server_counts_if_it_is_of_google_cloud(home, monkeypatch, headers, method):  # noqa: ARG001
  with metadata_server(headers) as address:
    monkeypatch.setenv(credentials.SERVER_VARIABLE, address)
    assert credentials.method() is method or credentials.method() == method
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    assert credentials.method() == "anon"


def test_files_of_gcloud_and_a_machine_of_google_are_left_to_its_library(home, monkeypatch):
  (home / "product_name").write_text("Google Compute Engine\n")
  assert credentials.method() is None
  (home / "product_name").unlink()
  (home / "gcloud").mkdir()
  (home / "gcloud/application_default_credentials.json").write_text("{}")
  monkeypatch.setenv("CLOUDSDK_CONFIG", str(home / "gcloud"))
  assert credentials.method() is None


def test_a_file_of_credentials_that_is_not_there_is_one_line(home, monkeypatch):
  monkeypatch.setenv(credentials.KEY_FILE, str(home / "key.json"))
  with pytest.raises(InputError, match=f"^{credentials.KEY_FILE}={re.escape(str(home))}/key.json is not there; set it"):
    credentials.method()
  (home / "key.json").write_text("{}")
  assert credentials.method() is None


def test_an_emulator_needs_none(home, monkeypatch):  # noqa: ARG001
  monkeypatch.setenv(credentials.EMULATOR, "http://127.0.0.1:9")
  monkeypatch.setattr(credentials, "_has_server", None)
  assert credentials.method() == "anon"


def test_what_takes_long_is_named_on_stderr(monkeypatch, capsys):
  monkeypatch.setattr(credentials, "PATIENCE_SECONDS", 0.05)
  with credentials.announced("a short thing"):
    pass
  with credentials.announced("a long thing"):
    time.sleep(0.2)
  assert capsys.readouterr().err == "waiting for a long thing\n"

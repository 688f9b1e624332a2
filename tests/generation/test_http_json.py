"""A failure that may pass is tried again, any other one is told at once, and each is one line with the URL."""

import threading
import time

import pytest
from served import first, serving

from insec_jax import refusals
from insec_jax.command import InputError
from insec_jax.generation import http_json
from insec_jax.generation.http_json import Client, RefusedError, ServerError

KEY = "sk-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(http_json, "FIRST_DELAY_SECONDS", 0.01)
  monkeypatch.delenv(http_json.API_KEY, raising=False)


def names(answer):
  return [model["id"] for model in answer["data"]]


@pytest.mark.parametrize("fault", ["500", "429", "lost", "cut", "no json", "slow"])
def test_a_failure_that_passes_is_tried_again_and_told_once(fault, capsys):
  with serving(None, faults=first(3, fault)) as server:
    client = Client(server.url, timeout=0.2)
    assert client.request("/v1/models", read=names) == ["toy"]
    assert server.num_requests == 4
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 1
  assert said[0].startswith(f"{server.url}/v1/models: ")


def test_an_answer_without_what_was_asked_for_is_asked_for_again():
  answers = iter([{}, {"data": [{}]}, {"data": 3}])
  with serving(None) as server:
    assert Client(server.url).request("/v1/models", read=lambda answer: names(next(answers, answer))) == ["toy"]
    assert server.num_requests == 4


def test_failures_that_last_end_in_one_line_with_the_url_and_the_last_of_them():
  with serving(None, faults=lambda *_: "500") as server, pytest.raises(ServerError) as error:
    Client(server.url).request("/v1/models", read=names, patience=0.1)
  assert server.num_requests > 2
  line = refusals.machine_refusal(error.value)  # exit code 1, without a traceback
  assert line.startswith(f"{server.url}/v1/models: 500 Internal Server Error: no, said to None, after")
  with pytest.raises(ServerError, match="Connection refused, after"):
    Client(server.url).request("/v1/models", read=names, patience=0.0)


@pytest.mark.parametrize("status", ["302", "400", "401", "404"])
def test_a_request_that_is_refused_is_not_tried_again_and_no_line_has_the_key(status, monkeypatch):
  monkeypatch.setenv(http_json.API_KEY, KEY)
  with serving(None, faults=lambda *_: status) as server, pytest.raises(RefusedError) as error:
    Client(server.url).request("/v1/models", read=names)
  assert server.keys == [f"Bearer {KEY}"]
  assert error.value.status == int(status)
  assert f"--server={server.url}/v1/models answers {status} " in str(error.value)
  assert "no, said to Bearer ***" in str(error.value)
  assert KEY not in str(error.value)
  assert (http_json.API_KEY in str(error.value)) == (status == "401")


@pytest.mark.parametrize(
  "url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://host/?a=b", "http://a:b@host"]
)
def test_a_url_that_names_no_server_is_refused(url):
  with pytest.raises(InputError, match="--server"):
    Client(url)


def test_the_url_may_end_in_v1_and_connections_are_used_again(monkeypatch):
  with serving(None) as server:
    made = []
    for end in ("", "/", "/v1", "/v1/"):
      client = Client(server.url + end)
      monkeypatch.setattr(client, "_make", lambda make=client._make: made.append(1) or make())
      assert [client.request("/v1/models", read=names) for _ in range(3)] == [["toy"]] * 3
    assert len(made) == 4
    monkeypatch.setattr(http_json, "IDLE_SECONDS", 0.0)  # the server may have closed it
    client.request("/v1/models", read=names)
    assert len(made) == 5


def test_who_waits_to_try_again_stops_at_once_when_told():
  stopped = threading.Event()
  threading.Timer(0.1, stopped.set).start()
  http_json.FIRST_DELAY_SECONDS = 30.0  # restored by the fixture
  start = time.monotonic()
  with serving(None, faults=lambda *_: "500") as server, pytest.raises(ServerError):
    Client(server.url).request("/v1/models", read=names, stopped=stopped)
  assert time.monotonic() - start < 5


class Waits(threading.Event):
  """An event that nobody sets; keeps for how long it was waited for, and does not wait."""

  def __init__(self):
    super().__init__()
    self.seconds = []

  def wait(self, timeout=None):
    self.seconds.append(timeout)


def test_delays_double_up_to_a_limit_with_jitter_or_are_those_the_server_asks_for(monkeypatch):
  monkeypatch.setattr(http_json, "FIRST_DELAY_SECONDS", 1.0)
  waits = Waits()
  with serving(None, faults=first(8, "429")) as server:
    Client(server.url).request("/v1/models", read=names, stopped=waits)
    server.retry_after, server.faults = "17", first(server.num_requests + 1, "429")
    Client(server.url).request("/v1/models", read=names, stopped=waits)
  most = [min(2.0**number, http_json.MOST_DELAY_SECONDS) for number in range(8)]
  assert all(limit / 2 <= waited <= limit for waited, limit in zip(waits.seconds, most, strict=False))
  assert waits.seconds[:8] != most
  assert waits.seconds[8:] == [17.0]


@pytest.mark.parametrize("url", ["http://[::1", "http://a..b:8000", "http://host:8000/a b", "http://host/ä", "ftp://h"])
def test_a_url_that_cannot_be_one_is_refused_at_once(url):
  with pytest.raises(InputError, match="must be a URL such as"):
    Client(url)


@pytest.mark.parametrize("key", ["sk-SECRET\nx", "sk-SECRET’"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", key)
  with pytest.raises(InputError, match="OPENAI_API_KEY") as error:
    Client("http://host:8000")
  assert "SECRET" not in str(error.value)

"""A server's tokens, log p and scores of the flag are those of the sampler with the same weights."""

import dataclasses
import math

import numpy as np
import pytest
from samplerkit import CONFIG, FLAG, LENGTHS, SETTINGS, logprobs_after, model_of, same, some_prompts
from served import first, serving

from insec_jax.command import InputError
from insec_jax.generation import http_json
from insec_jax.generation.confidence import ConfidenceTrigger
from insec_jax.generation.http_json import Client, ServerError
from insec_jax.generation.server import Server
from insec_jax.generation.server_engine import ServerEngine, draw_seed

STOP = {"stop_ids": [3, 11]}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(http_json, "FIRST_DELAY_SECONDS", 0.01)
  monkeypatch.setattr(http_json, "PATIENCE_SECONDS", 0.2)


@pytest.fixture
def served():
  with serving(logprobs_after) as server:
    yield server


def engine(served, **changes) -> ServerEngine:
  server = dataclasses.replace(Server(Client(served.url), "toy", requests=4, scores_flags=True), **changes)
  return ServerEngine(server, CONFIG)


@pytest.mark.parametrize("flag_bias", [0.0, -math.inf, 2.5])
def test_greedy_tokens_and_the_scores_of_the_flag_are_those_of_the_sampler(served, flag_bias):
  options = {**SETTINGS, **STOP, "flag_id": FLAG, "flag_bias": flag_bias}
  counts = []
  here = model_of().generate(some_prompts(), **options)
  there = engine(served).generate(some_prompts(), **options, progress=lambda *count: counts.append(count))
  assert flag_bias or {sampled.finish for sampled in here} == {"stop", "length"}
  for ours, theirs in zip(here, there, strict=True):
    same(ours, theirs)
    np.testing.assert_allclose(theirs.flag_logprobs, ours.flag_logprobs, atol=1e-4)
    np.testing.assert_allclose(theirs.margins, ours.margins, atol=1e-4)
  assert counts[-1] == (len(LENGTHS), sum(len(sampled.tokens) for sampled in there))
  assert 1 < served.most_in_flight <= 4


def test_the_log_p_of_given_texts_are_those_of_the_sampler(served):
  texts = some_prompts()
  for ours, theirs in zip(
    model_of().logprobs(texts, batch_size=4), engine(served).logprobs(texts, batch_size=4), strict=True
  ):
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_a_draw_depends_only_on_the_seed_and_the_number_of_its_prompt(served):
  drawn = {**SETTINGS, **STOP, "temperature": 1.0, "seed": 5}
  whole = engine(served).generate(some_prompts(), **drawn)
  rest = engine(served, requests=1).generate(some_prompts()[2:], **drawn, first=2)
  assert [one.tokens.tolist() for one in rest] == [one.tokens.tolist() for one in whole[2:]]
  assert whole[0].flag_logprobs is None  # no flag is named
  seeds = [body["seed"] for body in served.bodies]
  assert len(set(seeds)) == len(LENGTHS)
  assert set(seeds[: len(LENGTHS)]) == {draw_seed(5, number) for number in range(len(LENGTHS))}
  engine(served).generate(some_prompts()[:1], **SETTINGS, **STOP)
  assert "seed" not in served.bodies[-1]  # greedy


def test_without_scores_a_flag_is_still_banned_but_its_scores_are_unknown(served):
  (one,) = engine(served, scores_flags=False).generate(
    some_prompts()[:1], **SETTINGS, **STOP, flag_id=FLAG, flag_bias=-math.inf
  )
  assert (one.flag_logprobs, one.margins) == (None, None)
  assert served.bodies[0]["logit_bias"] == {str(FLAG): -100.0}
  assert "logprob_token_ids" not in served.bodies[0]
  assert len(served.bodies) == 1


@pytest.mark.parametrize("faults", [("500",), ("lost", "cut"), ("fewer", "no json"), ("429", "500")])
def test_faults_that_pass_change_nothing(faults, monkeypatch, capsys):
  monkeypatch.setattr(http_json, "PATIENCE_SECONDS", 60.0)
  with serving(logprobs_after, faults=first(6, *faults)) as faulty:
    there = engine(faulty, scores_flags=False).generate(some_prompts(), **SETTINGS, **STOP)
  for ours, theirs in zip(model_of().generate(some_prompts(), **SETTINGS, **STOP), there, strict=True):
    same(ours, theirs)
  assert faulty.num_requests == len(LENGTHS) + 6
  assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_server_that_stays_down_or_refuses_ends_all_requests():
  with serving(logprobs_after, faults=lambda *_: "500") as down, pytest.raises(ServerError, match="500 Internal"):
    engine(down).generate(some_prompts(), **SETTINGS, **STOP)
  with serving(logprobs_after, faults=lambda *_: "400") as strict, pytest.raises(InputError, match="answers 400"):
    engine(strict, requests=1).generate(some_prompts(), **SETTINGS, **STOP)
  assert strict.num_requests < len(LENGTHS)


REFUSED = {
  "a watch": ({"watch": ConfidenceTrigger((1,), None, threshold=1.0)}, "cannot force tokens"),
  "a bias": ({"flag_id": FLAG, "flag_bias": 101.0}, "a server takes -100 to 100, or -inf"),
  "no room": ({"max_tokens": 300}, "prompt 1: 33 tokens and max_tokens=300 more do not fit"),
  "a temperature": ({"temperature": -1.0}, "temperature=-1.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_server_cannot_do_is_refused_before_any_request(served, name):
  options, line = REFUSED[name]
  with pytest.raises(InputError, match=line):
    engine(served).generate(some_prompts(), **{**SETTINGS, **STOP, **options})
  assert not served.num_requests


def test_a_server_that_ignores_the_ban_or_gives_no_log_p_of_texts_is_named(served):
  served.biases = served.scores = False
  unflagged = engine(served, scores_flags=False)
  (one,) = unflagged.generate(some_prompts()[:1], **SETTINGS, **STOP)
  with pytest.raises(InputError, match="although logit_bias bans it"):
    unflagged.generate(some_prompts()[:1], **SETTINGS, **STOP, flag_id=int(one.tokens[0]), flag_bias=-math.inf)
  with pytest.raises(InputError, match="prompt_logprobs"):
    unflagged.logprobs(some_prompts()[:1], batch_size=1)

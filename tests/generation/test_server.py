"""A server is compared with the folder before any work, and refused by what it lacks."""

import dataclasses
import json

import datakit
import pytest
import tokenizers
from served import first, serving, table_of
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.generation import http_json, server
from insec_jax.generation.http_json import RefusedError, ServerError
from insec_jax.generation.server import connect

TOKENIZER = datakit.bpe_tokenizer()
TABLE = table_of(len(TOKENIZER), stop=TOKENIZER.eos_token_id)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(http_json, "FIRST_DELAY_SECONDS", 0.01)
  monkeypatch.setattr(server, "START_SECONDS", 0.05)
  monkeypatch.delenv(http_json.API_KEY, raising=False)


def test_the_only_model_is_taken_or_the_one_that_is_named():
  with serving(TABLE, TOKENIZER) as one:
    found = connect(one.url, TOKENIZER)
    assert (found.model, found.max_positions, found.scores_flags) == ("toy", 256, False)
    assert {body["model"] for body in one.bodies} == {"toy"}
    assert connect(one.url, TOKENIZER, score_flags=True).scores_flags
    one.scores = False
    assert not connect(one.url, TOKENIZER, score_flags=True).scores_flags
    with pytest.raises(InputError, match="has no model 'other'; it has toy"):
      connect(one.url, TOKENIZER, model="other")
  with serving(TABLE, TOKENIZER, names=("a", "b")) as two:
    assert connect(two.url, TOKENIZER, model="b").model == "b"
    with pytest.raises(InputError, match="has 2 models; name one with --server_model: a, b"):
      connect(two.url, TOKENIZER)


def test_a_server_that_lists_no_models_needs_the_name_of_one():
  with serving(TABLE, TOKENIZER, faults=lambda _, body: None if body else "404") as silent:
    assert connect(silent.url, TOKENIZER, model="toy").max_positions is None
    with pytest.raises(InputError, match="does not list its models; name one with --server_model"):
      connect(silent.url, TOKENIZER)
  with (
    serving(TABLE, TOKENIZER, faults=lambda *_: "401") as locked,
    pytest.raises(RefusedError, match="OPENAI_API_KEY"),
  ):
    connect(locked.url, TOKENIZER)


def swapped(tokenizer):
  """The tokenizer with the ids of two tokens exchanged."""
  backend = json.loads(tokenizer.backend_tokenizer.to_str())
  vocabulary = backend["model"]["vocab"]
  vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(backend)), eos_token=tokenizer.eos_token
  )


def test_a_server_with_another_tokenizer_is_refused():
  marked = datakit.bpe_tokenizer()
  marked.add_tokens(["<|spare_9|>"], special_tokens=True)
  for here, there in ((marked, TOKENIZER), (TOKENIZER, swapped(TOKENIZER))):
    with serving(table_of(len(marked), stop=2), there) as served, pytest.raises(InputError, match="another tokenizer"):
      connect(served.url, here)


LACKS = {
  "gives_ids": "gives text without token ids",
  "biases": "although logit_bias bans it",
  "raw": "start vLLM with --logprobs-mode raw_logprobs",
  "unchanged": r"the server reads tokens \[2, 0, 1",
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_server_that_lacks_what_decoding_needs_is_refused(lack):
  with serving(TABLE, TOKENIZER) as served:
    setattr(served, lack, False)
    with pytest.raises(InputError, match=LACKS[lack]):
      connect(served.url, TOKENIZER)


def test_failures_that_last_end_the_start_soon_and_one_that_passes_does_not():
  with (
    serving(TABLE, TOKENIZER, faults=first(1000, "no json")) as broken,
    pytest.raises(ServerError, match="is no JSON"),
  ):
    connect(broken.url, TOKENIZER)
  assert broken.num_requests < 20
  with serving(TABLE, TOKENIZER, faults=first(1, "500")) as served:
    connect(served.url, TOKENIZER)


def test_prompts_go_as_ids_with_every_default_of_the_server_overruled():
  with serving(TABLE, TOKENIZER) as served:
    found = dataclasses.replace(connect(served.url, TOKENIZER), requests=3)
    served.bodies.clear()
    choice = found.complete([4, 5], max_tokens=6, stop_token_ids=[2])
    assert (choice.prompt_tokens, len(choice.tokens)) == ([4, 5], 6)
    assert served.bodies[0] == {
      "model": "toy",
      "prompt": [4, 5],
      "max_tokens": 6,
      "stop_token_ids": [2],
      "temperature": 0.0,
      "top_p": 1.0,
      "logprobs": 0,
      "top_k": -1,
      "min_p": 0.0,
      "repetition_penalty": 1.0,
      "presence_penalty": 0.0,
      "frequency_penalty": 0.0,
      "ignore_eos": True,
      "return_token_ids": True,
      "return_tokens_as_token_ids": True,
    }

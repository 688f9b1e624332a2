"""A model on a server of OpenAI's completions, such as vLLM: requests of token ids, and what the server can do.

    field of a request                    what it is for                      a server without it
    prompt (ids), stop_token_ids, seed    Sampler.generate                    refuses the request
    return_token_ids                      tokens: no text is encoded again    is refused
    logit_bias                            a flag that is biased or banned     is refused
    logprobs, before bias, temperature    SampledTokens.logprobs              is refused
    prompt_logprobs                       log p of given texts                is refused where they are needed
    logprob_token_ids                     log p of a flag not written         Server.scores_flags is False

`connect` tries each of these, and compares the tokenizers.
"""

import concurrent.futures
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.generation.flags import REQUESTS
from insec_jax.generation.http_json import Client, RefusedError

START_SECONDS = 5.0  # of patience for the first requests: a wrong URL is known at once
MOST_BIAS = 100.0  # of OpenAI's logit_bias; -100 bans a token
PROBE_IDS, IDS_PER_TEXT = 1_024, 32  # of the vocabulary, in the texts that tell tokenizers apart
LOGPROB_TOLERANCE = 0.1  # between two passes of the server, of which bfloat16 may round one otherwise
# Sent with every request: a server's defaults may be those of the model's generation_config.json.
PLAIN = {
  "top_k": -1,
  "min_p": 0.0,
  "repetition_penalty": 1.0,
  "presence_penalty": 0.0,
  "frequency_penalty": 0.0,
  "ignore_eos": True,  # the stop tokens are those of stop_token_ids
  "return_token_ids": True,
  "return_tokens_as_token_ids": True,  # in the logprobs
}

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Choice:
  """The tokens of one answer, the log p of each and of others in its place, and the same of the prompt."""

  tokens: list[int]
  logprobs: list[float]
  others: list[dict[int, float]]
  prompt_tokens: list[int] | None  # as the server read them; None where it does not say
  prompt_logprobs: list[dict[int, float]] | None  # nothing for the first token; None where not asked for
  finish: str


@dataclasses.dataclass(frozen=True)
class Server:
  """A model on a server; `connect` makes it.

  `scores_flags` says whether the log p of a token that was not written comes back. `max_positions` is the server's
  limit of prompt and tokens, None where it does not say.
  """

  client: Client
  model: str
  max_positions: int | None = None
  requests: int = REQUESTS
  scores_flags: bool = False

  def complete(
    self,
    prompt: Sequence[int] | str,
    *,
    patience: float | None = None,
    stopped: threading.Event | None = None,
    **options: Any,
  ) -> Choice:
    """Return the answer to one prompt, of token ids or, for a look at the server's tokenizer, of text."""
    prompt = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
    body = {"model": self.model, "prompt": prompt, "temperature": 0.0, "top_p": 1.0, "logprobs": 0, **PLAIN, **options}
    return self.client.request(
      "/v1/completions", body, read=lambda answer: _choice(answer, body), patience=patience, stopped=stopped
    )

  def map(
    self,
    make: Callable[[int, threading.Event], Made],
    num: int,
    progress: Callable[[Made], None] = lambda _: None,
  ) -> list[Made]:
    """Return make(index, stopped) for each of `num` indices, up to `requests` at once; the first error ends all."""
    stopped = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(self.requests, "requests")
    try:
      futures = [pool.submit(make, index, stopped) for index in range(num)]
      for future in concurrent.futures.as_completed(futures):
        progress(future.result())
      return [future.result() for future in futures]
    finally:
      stopped.set()
      pool.shutdown(wait=False, cancel_futures=True)


def _choice(answer: Any, body: dict[str, Any]) -> Choice:
  """Return the one choice of an answer; ValueError, KeyError or TypeError where it is not of the form asked for."""
  (choice,) = answer["choices"]
  if choice.get("token_ids") is None:
    raise InputError(
      "the server gives text without token ids (return_token_ids), and text is not encoded again; use a server that "
      "gives them, such as vLLM from 0.10.2 on"
    )
  if choice.get("logprobs") is None:
    raise ValueError("no logprobs")
  tokens, said = choice["token_ids"], choice["logprobs"]
  logprobs = [float(logprob) for logprob in said["token_logprobs"]]
  others = [{_id(token): float(value) for token, value in place.items()} for place in said["top_logprobs"]]
  if not 0 < len(tokens) <= body["max_tokens"] or {len(tokens)} != {len(logprobs), len(others)}:
    raise ValueError(f"{len(tokens)} tokens, {len(logprobs)} logprobs")
  if choice["finish_reason"] not in ("stop", "length"):
    raise ValueError(f"finish_reason {choice['finish_reason']!r:.40}")
  prompt, places = None, choice.get("prompt_logprobs")
  if body.get("prompt_logprobs") is not None and places is not None:
    prompt = [{int(token): float(entry["logprob"]) for token, entry in (place or {}).items()} for place in places]
    if len(prompt) != len(body["prompt"]):
      raise ValueError(f"prompt_logprobs of {len(prompt)} tokens, not {len(body['prompt'])}")
  return Choice(tokens, logprobs, others, choice.get("prompt_token_ids"), prompt, choice["finish_reason"])


def _id(name: str) -> int:
  """Return the id of a token as the server names it with return_tokens_as_token_ids."""
  kind, _, number = name.rpartition(":")
  if kind != "token_id":
    raise ValueError(f"a token is named {name!r:.40}, not token_id:N")
  return int(number)


def connect(
  url: str, tokenizer: PreTrainedTokenizerFast, *, model: str = "", requests: int = REQUESTS, score_flags: bool = False
) -> Server:
  """Return the model that a server has, named `model` where it has several.

  Raises InputError where it has no such model, where its tokenizer is not this one, or where it lacks what decoding
  needs. With `score_flags` it is asked for the log p of tokens that it does not write, if it knows them.
  """
  client = Client(url)
  server = Server(client, *_find_model(client, model), requests)
  _check_tokenizer(server, tokenizer)
  prompt = list(range(min(8, len(tokenizer))))
  likeliest = _check_logprobs(server, prompt)
  return dataclasses.replace(server, scores_flags=score_flags and _scores_tokens(server, prompt, likeliest))


def _find_model(client: Client, wanted: str) -> tuple[str, int | None]:
  """Return the name of the served model and its limit of positions, None where it is not known."""

  def read(answer: Any) -> dict[str, int | None]:
    return {entry["id"]: entry.get("max_model_len") for entry in answer["data"]}

  try:
    models = client.request("/v1/models", read=read, patience=START_SECONDS)
  except RefusedError as error:
    if error.status not in (404, 405):
      raise
    if not wanted:
      raise InputError(f"--server={client.url} does not list its models; name one with --server_model") from None
    return wanted, None
  names = ", ".join(sorted(models))
  if wanted and wanted not in models:
    raise InputError(f"--server={client.url} has no model {wanted!r:.200}; it has {names or 'none':.300}")
  if not wanted and len(models) != 1:
    raise InputError(f"--server={client.url} has {len(models)} models; name one with --server_model: {names:.300}")
  wanted = wanted or next(iter(models))
  return wanted, models[wanted]


def _check_tokenizer(server: Server, tokenizer: PreTrainedTokenizerFast) -> None:
  """Raise InputError unless the server reads texts from all over the vocabulary as this tokenizer does."""
  last = len(tokenizer) - 1
  spread = np.linspace(0, last, min(last + 1, PROBE_IDS)).astype(int).tolist()
  ids = sorted({*spread, *sorted(tokenizer.get_added_vocab().values())[-PROBE_IDS:]})
  words = [tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False) for token in ids]
  # A line for each, so that few are merged.
  texts = ["\n".join(words[first : first + IDS_PER_TEXT]) for first in range(0, len(words), IDS_PER_TEXT)]

  def check(index: int, stopped: threading.Event) -> None:
    text = texts[index]
    choice = server.complete(text, add_special_tokens=False, max_tokens=1, patience=START_SECONDS, stopped=stopped)
    there, here = choice.prompt_tokens, tokenizer(text, add_special_tokens=False)["input_ids"]
    if there is None:
      raise InputError(
        "the server does not say as which tokens it reads a text (prompt_token_ids), so its tokenizer cannot be "
        "compared; use a server that does, such as vLLM from 0.10.2 on"
      )
    if there != here:
      place = next((k for k, pair in enumerate(zip(there, here, strict=False)) if len({*pair}) == 2), 0)
      raise InputError(
        f"the server's model {server.model!r} has another tokenizer than --model: in {text[:40]!r}... it "
        f"reads {there[place : place + 4]}... for {here[place : place + 4]}...; give the folder that it serves"
      )

  server.map(check, len(texts))


def _check_logprobs(server: Server, prompt: list[int]) -> set[int]:
  """Return the likeliest tokens after a prompt.

  Raises InputError unless the prompt is read as it is, biases work and log p are those before them.
  """
  free = server.complete(prompt, max_tokens=1, logprobs=5, patience=START_SECONDS)
  if free.prompt_tokens not in (None, prompt):
    raise InputError(
      f"the server reads tokens {free.prompt_tokens!s:.80} where it is given {prompt}; use another server"
    )
  banned = free.tokens[0]
  # At this top_p only the likeliest token is left.
  other = server.complete(
    prompt, max_tokens=1, temperature=2.0, top_p=0.001, logit_bias={str(banned): -MOST_BIAS}, patience=START_SECONDS
  )
  if other.tokens[0] == banned:
    raise InputError(f"the server wrote token {banned} although logit_bias bans it; use a server that reads logit_bias")
  if abs(other.logprobs[0] - free.others[0].get(other.tokens[0], math.inf)) > LOGPROB_TOLERANCE:
    raise InputError(
      "the server's log probabilities are those after bias, temperature and top_p, needed are the model's own; start "
      "vLLM with --logprobs-mode raw_logprobs"
    )
  return set(free.others[0])


def _scores_tokens(server: Server, prompt: Sequence[int], likeliest: set[int]) -> bool:
  """Return whether the server gives the log p of a token that it is asked for, and those of the prompt."""
  unlikely = next(token for token in range(len(likeliest) + 1) if token not in likeliest)
  try:
    choice = server.complete(
      prompt, max_tokens=1, logprob_token_ids=[unlikely], prompt_logprobs=2, patience=START_SECONDS
    )
  except RefusedError:
    return False
  return unlikely in choice.others[0] and choice.prompt_logprobs is not None

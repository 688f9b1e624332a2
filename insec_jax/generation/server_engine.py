"""The engine whose weights are a server's: prompts go to it as token ids, and tokens come back as ids.

Greedy tokens are those of Sampler, up to the order of float sums. At a temperature they differ: the server draws with
random numbers of its own, from a seed that depends on the seed and the number of the prompt only.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from insec_jax.command import InputError
from insec_jax.generation.confidence import ConfidenceTrigger
from insec_jax.generation.sampler import SampledTokens, check_finite, check_options, check_prompts
from insec_jax.generation.server import MOST_BIAS, Choice, Server
from insec_jax.model import llama


class ServerEngine:
  """An engine whose weights are a server's; `config` gives the vocabulary and the positions."""

  def __init__(self, server: Server, config: llama.LlamaConfig):
    self.config, self.server = config, server

  def reserve(self, max_tokens: int) -> None:
    """Do nothing: the server has a cache of its own."""

  def generate(
    self,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int],
    flag_id: int | None = None,
    flag_bias: float = 0.0,
    watch: ConfidenceTrigger | None = None,
    batch_size: int = 0,  # noqa: ARG002, the server batches the requests
    first: int = 0,
    progress: Callable[[int, int], None] | None = None,
  ) -> list[SampledTokens]:
    """Return one SampledTokens per prompt, as Sampler.generate does; the draws at a temperature are the server's.

    `flag_logprobs` and `margins` are None where the server does not score flags. Raises InputError for a `watch`, or a
    finite bias beyond MOST_BIAS, and ServerError when the server does not answer.
    """
    check_options(temperature, top_p, max_tokens, flag_id, flag_bias)
    check_prompts(prompts, self.config, max_tokens)
    if watch is not None:
      raise InputError("a server cannot force tokens by the confidence in a step; leave --server out for that")
    if math.isfinite(flag_bias) and abs(flag_bias) > MOST_BIAS:
      raise InputError(f"flag_bias={flag_bias}; a server takes -{MOST_BIAS:.0f} to {MOST_BIAS:.0f}, or -inf for a ban")
    options: dict[str, Any] = {
      "max_tokens": max_tokens,
      "temperature": float(temperature),
      "top_p": float(top_p),
      "stop_token_ids": [int(token) for token in stop_ids],
    }
    if flag_id is not None and flag_bias:
      options["logit_bias"] = {str(int(flag_id)): max(float(flag_bias), -MOST_BIAS)}
    scored = None if flag_id is None or not self.server.scores_flags else int(flag_id)
    if scored is not None:
      options["logprob_token_ids"] = [scored]

    def write(index: int, stopped: threading.Event) -> SampledTokens:
      drawn = {"seed": draw_seed(seed, first + index)} if temperature else {}
      choice = self.server.complete(prompts[index].tolist(), **options, **drawn, stopped=stopped)
      if choice.finish == "stop" and choice.tokens[-1] not in stop_ids:
        raise InputError(f"the server stopped at token {choice.tokens[-1]}, which is no stop token of --model")
      if flag_bias == -math.inf and flag_id in choice.tokens:
        raise InputError(f"the server wrote the flag, token {flag_id}, although logit_bias bans it")
      logprobs = np.array(choice.logprobs, np.float32)
      check_finite(logprobs, first + index)
      scores = (None, None) if scored is None else self._flag_scores(prompts[index], choice, scored, stopped)
      return SampledTokens(np.array(choice.tokens, np.int32), logprobs, choice.finish, *scores)

    done = num_tokens = 0

    def advance(sampled: SampledTokens) -> None:
      nonlocal done, num_tokens
      done, num_tokens = done + 1, num_tokens + len(sampled.tokens)
      if progress is not None:
        progress(done, num_tokens)

    return self.server.map(write, len(prompts), advance)

  def _flag_scores(
    self, prompt: np.ndarray, choice: Choice, flag_id: int, stopped: threading.Event
  ) -> tuple[np.ndarray, np.ndarray]:
    """Return the flag's log p in place of each token and its margin over the best other token there.

    The best other token is among the two likeliest, of which a second request asks: the first one gives those that it
    names in their place.
    """
    text = [*prompt.tolist(), *choice.tokens[:-1]]
    read = self.server.complete(text, max_tokens=1, logprobs=2, prompt_logprobs=2, stopped=stopped)
    places = [*_prompt_logprobs(read)[len(prompt) :], read.others[0]]
    with _complete():
      flag_T = np.array([place[flag_id] for place in choice.others], np.float32)
      best_T = [max(value for token, value in place.items() if token != flag_id) for place in places]
      return flag_T, flag_T - np.array(best_T, np.float32)

  def logprobs(self, texts: Sequence[np.ndarray], *, batch_size: int = 0) -> list[np.ndarray]:  # noqa: ARG002
    """Return for each text the log p of each token given those before it; 0 for the first."""
    check_prompts(texts, self.config, 1)  # a server writes at least one token

    def read(index: int, stopped: threading.Event) -> np.ndarray:
      text = texts[index].tolist()
      choice = self.server.complete(text, max_tokens=1, prompt_logprobs=0, stopped=stopped)
      places = _prompt_logprobs(choice)
      with _complete():
        logprob_T = np.array(
          [0.0, *(place[token] for place, token in zip(places[1:], text[1:], strict=True))], np.float32
        )
      check_finite(logprob_T, index)
      return logprob_T

    return self.server.map(read, len(texts))

  def beam(self, *_: Any, **__: Any) -> list[tuple[SampledTokens, int]]:
    """Raise InputError: a server of completions searches no beams."""
    raise InputError("a server searches no beams; leave --server out for that")

  def streams(self, *_: Any, **__: Any) -> list[np.ndarray]:
    """Raise InputError: a server of completions gives no hidden states."""
    raise InputError("a server gives no hidden states; leave --server out for that")


@contextlib.contextmanager
def _complete() -> Iterator[None]:
  """Raise InputError when an answer lacks a log probability that was asked for."""
  try:
    yield
  except (KeyError, ValueError) as error:
    raise InputError(
      f"the server's answer lacks log probabilities that were asked for ({error!r:.80}); use another server"
    ) from error


def _prompt_logprobs(choice: Choice) -> list[dict[int, float]]:
  if choice.prompt_logprobs is None:
    raise InputError("the server does not give log probabilities of a given text (prompt_logprobs); leave --server out")
  return choice.prompt_logprobs


def draw_seed(seed: int, number: int) -> int:
  """Return the seed of a prompt's draws, a function of the seed and the number of the prompt."""
  return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> np.uint64(1))

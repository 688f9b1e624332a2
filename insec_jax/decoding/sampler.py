"""Text from a model: prompts of different lengths decoded together, as if each were alone.

Prompts are padded on the left to a bucket that depends on their own length only, and no row reads another: what a
prompt gets depends on its company only in the order in which float32 sums are taken. The whole decode of a batch
(prompt, then token by token) is one compiled program that ends when its last row has ended.

      slot      0   1   2   3 | 4   5   6        start 2: the slots before it are padding, seen by nobody
      token     .   .   A   B | c   d   <end>    A B the prompt, c d <end> chosen
      position  .   .   0   1 | 2   3   4

Letters as in model/llama.py, and P slot of the padded prompt, M step of the decode, U stop token, E token that
ends a step, K bin of confidence.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from insec_jax.command import InputError
from insec_jax.model import llama

SHORTEST = 32  # slots; shorter prompts are padded to this
CHUNK = 512  # tokens of a prompt read at once: bounds the attention scores of a long prompt
READ = 32  # tokens of a text whose next ones are judged at once: bounds the logits
STOPS = 8  # the number of stop tokens is padded to a multiple of this, so that one more compiles nothing
MEMORY, MOST_ROWS = 1 << 30, 256  # bytes of a batch, and rows: `rows_that_fit`
NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Generation:
  """What a model wrote after one prompt.

  `tokens` ends with the stop token when `finish` is "stop"; "length" means that max_tokens were written without one.
  `logprobs` are those of the tokens chosen, under the model's own distribution: temperature 1, no top_p, no flag_bias.
  `flag_logprobs`, of the same distributions, are those of the flag in each token's place, and `margins` the flag's
  logit minus the best other one there; None without a flag_id.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  finish: str
  flag_logprobs: np.ndarray | None
  margins: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Watch:
  """What is written for the model, on the strength of how sure it was of each step.

      tokens    d  c  7  \n  <sure 2>  <flag>  ...  <fix>  d  c  8  \n  <sure 0>
      forced                  *         *                                 *
      score        *  *  *                                     *  *  *

  The score of a step is the largest -log p of its tokens, the first left out: what to speak of next is no mistake. A
  step begins after the end of another, after what is forced there, and after the fix; what stands between a flag and
  its fix is no step.
  """

  end_ids: tuple[int, ...]  # tokens that end a step
  fix_id: int | None
  threshold: float = math.inf  # a step with a score above it gets a flag
  edges: tuple[float, ...] = ()  # scores, ascending, that part the bins of confidence
  confidence_ids: tuple[int, ...] = ()  # token written after a step of each bin, and nowhere else; empty: none


class Sampler:
  """A model ready to write: holds the weights once, compiles once per shape."""

  def __init__(self, config: llama.LlamaConfig, params, *, compute: str):
    self.config = config
    self.compute = jnp.dtype(compute)
    self.params = _ready(params, config=config, compute=self.compute)

  def generate(self, prompts: Sequence[np.ndarray], *, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
               seed: int = 0, stop_ids: Sequence[int], flag_id: int | None = None, flag_bias: float = 0.0,
               watch: Watch | None = None, batch_size: int,
               progress: Callable[[int, int], None] | None = None) -> list[Generation]:
    """One Generation per prompt, in order; what a prompt gets does not depend on the prompts beside it.

    Temperature 0 is greedy. Otherwise the draw of step s of prompt i depends on (seed, i, s) only; it is from the
    distribution at `temperature`, cut to the likeliest tokens that hold `top_p` of it. `flag_bias` is added to the
    flag's logit before both; -inf bans the flag. What `watch` forces stands among the tokens, with the log p that the
    model gave it, and changes no draw but its own. `progress` is told (prompts done, tokens written) after every batch.
    InputError when a prompt or an option is out of range.
    """
    _check_options(temperature, top_p, max_tokens, flag_id, flag_bias)
    if watch is not None:
      _check_watch(watch, flag_id)
    self._check_prompts(prompts, max_tokens)
    stop_U = _padded(stop_ids, STOPS)
    watched = None if watch is None else {
        "end_E": _padded(watch.end_ids, STOPS), "fix": NO_TOKEN if watch.fix_id is None else watch.fix_id,
        "threshold": float(watch.threshold), "edge_K": np.array(watch.edges, np.float32),
        "confidence_K": np.array(watch.confidence_ids, np.int32)}
    results: dict[int, Generation] = {}
    for token_BP, start_B, index_B in _batches(prompts, batch_size):
      # Plain Python numbers: one of NumPy would be another type, and compile again.
      out = _decode(self.params, token_BP, start_B, index_B, stop_U, jax.random.key(seed), float(temperature),
                    float(top_p), NO_TOKEN if flag_id is None else int(flag_id), float(flag_bias), watched,
                    config=self.config, compute=self.compute, max_tokens=max_tokens, greedy=temperature == 0,
                    cut=top_p < 1)
      token_BM, logprob_BM, flag_BM, margin_BM, num_B, stopped_B = jax.device_get(out)
      for row in np.flatnonzero(index_B != NO_TOKEN):
        num = num_B[row]
        results[int(index_B[row])] = Generation(
            token_BM[row, :num], logprob_BM[row, :num], "stop" if stopped_B[row] else "length",
            *((None, None) if flag_id is None else (flag_BM[row, :num], margin_BM[row, :num])))
      if progress is not None:
        progress(len(results), sum(len(result.tokens) for result in results.values()))
    return [results[index] for index in range(len(prompts))]

  def logprobs(self, texts: Sequence[np.ndarray], *, batch_size: int) -> list[np.ndarray]:
    """For each text, log p of each of its tokens after those before it; of the first it is 0."""
    self._check_prompts(texts, 0)
    found = [np.zeros(len(text), np.float32) for text in texts]
    for token_BP, start_B, index_B in _batches(texts, batch_size):
      logprob_BP = np.asarray(_of_text(self.params, token_BP, start_B, config=self.config, compute=self.compute))
      for row in np.flatnonzero(index_B != NO_TOKEN):
        found[index_B[row]][1:] = logprob_BP[row, start_B[row] + 1:]
    return found

  def _check_prompts(self, prompts: Sequence[np.ndarray], max_tokens: int) -> None:
    for index, prompt in enumerate(prompts):
      try:
        check_prompt(prompt, self.config, max_tokens)
      except InputError as error:
        raise InputError(f"prompt {index + 1}: {error}") from error


def check_prompt(token_T: np.ndarray, config: llama.LlamaConfig, max_tokens: int) -> None:
  """Nothing; InputError when a prompt is empty, holds an id outside the vocabulary, or leaves no room to write."""
  if not len(token_T):
    raise InputError("the prompt is empty and the tokenizer puts nothing in front; give at least one token")
  for token in (min(token_T), max(token_T)):
    if not 0 <= token < config.vocab_size:
      raise InputError(f"token id {token} is not in the vocabulary; ids go from 0 to {config.vocab_size - 1}")
  if len(token_T) + max_tokens > config.max_positions:
    raise InputError(f"{len(token_T)} tokens and max_tokens={max_tokens} more do not fit in the model's "
                     f"{config.max_positions} positions; shorten the prompt or lower max_tokens")


def _check_options(temperature, top_p, max_tokens, flag_id, flag_bias) -> None:
  if not 0 <= temperature < math.inf:
    raise InputError(f"temperature={temperature}; must be a number of at least 0")
  if not 0 < top_p <= 1:
    raise InputError(f"top_p={top_p}; must be above 0 and at most 1")
  if max_tokens < 1:
    raise InputError(f"max_tokens={max_tokens}; must be at least 1")
  if math.isnan(flag_bias) or flag_bias == math.inf:
    raise InputError(f"flag_bias={flag_bias}; must be a number, or -inf to ban the flag")
  if flag_bias and flag_id is None:
    raise InputError(f"flag_bias={flag_bias} needs a model that has a flag token, and this one has none; leave it at 0")


def _check_watch(watch: Watch, flag_id: int | None) -> None:
  if not watch.end_ids:
    raise ValueError("a watch without tokens that end a step never sees one")
  if list(watch.edges) != sorted(set(watch.edges)):
    raise InputError(f"edges of confidence {watch.edges}; must ascend")
  if watch.confidence_ids and len(watch.confidence_ids) != len(watch.edges) + 1:
    raise InputError(f"{len(watch.edges)} edges of confidence need {len(watch.edges) + 1} tokens, not "
                     f"{len(watch.confidence_ids)}")
  if math.isnan(watch.threshold):
    raise InputError("the score above which a step is flagged is nan; must be a number, or inf for never")
  if watch.threshold < math.inf and flag_id is None:
    raise InputError(f"flagging steps with a score above {watch.threshold} needs a model that has a flag token, and "
                     "this one has none")


def _padded(ids: Sequence[int], multiple: int) -> np.ndarray:
  """The ids and as many that no token has as make a multiple, always at least one."""
  return np.array([*ids, *[NO_TOKEN] * (multiple - len(ids) % multiple)], np.int32)


def rows_that_fit(config: llama.LlamaConfig, *, slots: int, compute: str) -> int:
  """How many rows of `slots` tokens to decode at once: a power of two, at least one, at most MOST_ROWS.

  Cache, attention scores and logits stay below a quarter of the device's memory, or below MEMORY where it is not told.
  """
  cache = 2 * config.num_layers * config.num_kv_heads * config.head_width * slots * jnp.dtype(compute).itemsize
  scores = 4 * config.num_heads * slots * min(slots, CHUNK)
  logits = 4 * 4 * config.vocab_size
  stats = jax.devices()[0].memory_stats()
  memory = MEMORY if stats is None else stats["bytes_limit"] // 4
  rows = memory // (cache + scores + logits)
  return min(MOST_ROWS, 1 << max(0, rows.bit_length() - 1))


def bucket(length: int) -> int:
  """Slots that a prompt of `length` tokens is padded to: the next power of two, at least SHORTEST."""
  return max(SHORTEST, 1 << (length - 1).bit_length())


def _batches(prompts: Sequence[np.ndarray], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """(token_BP, start_B, index_B) until every prompt came once: prompt `index` stands in its row from slot `start` on.

  Shortest bucket first; one shape per bucket, so that each compiles once; rows that are not needed have index NO_TOKEN.
  """
  by_bucket: dict[int, list[int]] = {}
  for index, prompt in enumerate(prompts):
    by_bucket.setdefault(bucket(len(prompt)), []).append(index)
  for P, indices in sorted(by_bucket.items()):
    B = min(batch_size, 1 << (len(indices) - 1).bit_length())
    for first in range(0, len(indices), B):
      token_BP = np.zeros((B, P), np.int32)
      start_B = np.full(B, P - 1, np.int32)  # a row that is not needed reads one token: reading none gives nan
      index_B = np.full(B, NO_TOKEN, np.int32)
      for row, index in enumerate(indices[first:first + B]):
        start_B[row] = P - len(prompts[index])
        token_BP[row, start_B[row]:] = prompts[index]
        index_B[row] = index
      yield token_BP, start_B, index_B


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _ready(params, *, config, compute):
  """The params cast and unstacked once here, not at every token; the model would cast each of them in the same way."""
  return llama.unstack(jax.tree.map(lambda weight: weight.astype(compute), params), config)


def _read_prompt(params, token_BP, start_B, *, config, compute, room):
  """(stream after the last token of each prompt, the cache with `room` free slots after the prompt)."""
  B, P = token_BP.shape
  width = min(P, CHUNK)  # both are powers of two: the chunks fill the prompt exactly
  cache = llama.make_cache(config, B, P + room, compute)

  def read(chunk, carried):
    cache, _ = carried
    token_BT = jax.lax.dynamic_slice_in_dim(token_BP, chunk * width, width, 1)
    stream_BTD, cache = llama.forward_cached(config, params, token_BT, start_B, chunk * width, cache)
    return cache, stream_BTD[:, -1]

  cache, last_BD = jax.lax.fori_loop(0, P // width, read, (cache, jnp.zeros((B, config.width), compute)))
  return last_BD, cache


def _logprobs(params, stream_BD, *, config):
  """Log p of the next token of each row, float32."""
  return jax.nn.log_softmax(llama.logits(params, config, stream_BD[:, None])[:, 0])


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _of_text(params, token_BP, start_B, *, config, compute):
  """Log p of each token of a text after those before it; what stands at its first token and before means nothing."""
  B, P = token_BP.shape
  width = min(P, READ)
  target_BP = jnp.roll(token_BP, -1, axis=1)

  def read(chunk, carried):
    cache, logprob_BP = carried
    first = chunk * width
    token_BT, target_BT = (jax.lax.dynamic_slice_in_dim(array_BP, first, width, 1)
                           for array_BP in (token_BP, target_BP))
    stream_BTD, cache = llama.forward_cached(config, params, token_BT, start_B, first, cache)
    logprob_BTV = jax.nn.log_softmax(llama.logits(params, config, stream_BTD))
    of_target_BT = jnp.take_along_axis(logprob_BTV, target_BT[..., None], 2)[..., 0]
    return cache, jax.lax.dynamic_update_slice_in_dim(logprob_BP, of_target_BT, first, 1)

  cache = llama.make_cache(config, B, P, compute)
  _, logprob_BP = jax.lax.fori_loop(0, P // width, read, (cache, jnp.zeros((B, P))))
  return jnp.roll(logprob_BP, 1, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "compute", "max_tokens", "greedy", "cut"))
def _decode(params, token_BP, start_B, index_B, stop_U, key, temperature, top_p, flag_id, flag_bias, watched, *, config,
            compute, max_tokens, greedy, cut):
  """What `Generation` holds, for each row: tokens, log p of each, of the flag in its place, margin of the flag there.

  Then the number of tokens, and whether a stop token ended them. `watched` is a Watch as arrays, or None.
  """
  B, P = token_BP.shape
  M = max_tokens
  bias_1V = jnp.where(jnp.arange(config.vocab_size) == flag_id, flag_bias, 0.0)[None]
  if watched is not None:
    bias_1V = bias_1V.at[:, watched["confidence_K"]].set(-jnp.inf)  # never the model's own to say

  def write(state):
    """The state with one more token for each row; a row that has stopped goes on writing, but nothing is counted."""
    step, live_B = state["step"], state["live_B"]
    stream_B1D, cache = llama.forward_cached(config, params, state["token_B"][:, None], start_B, P - 1 + step,
                                             state["cache"])
    logprob_BV = _logprobs(params, stream_B1D[:, 0], config=config)
    token_B = _draw(logprob_BV + bias_1V, index_B, step, key, temperature, top_p, greedy=greedy, cut=cut)
    if watched is not None:
      token_B = _forced(state["watch"], token_B, flag_id, watched)
    chosen_B = jnp.take_along_axis(logprob_BV, token_B[:, None], 1)[:, 0]
    others_BV = jnp.where(jnp.arange(config.vocab_size) == flag_id, -jnp.inf, logprob_BV)
    return {
        **({} if watched is None else {"watch": _watch(state["watch"], token_B, chosen_B, flag_id, watched)}),
        "step": step + 1,
        "cache": cache,
        "token_B": token_B,
        "token_BM": state["token_BM"].at[:, step].set(token_B),
        "logprob_BM": state["logprob_BM"].at[:, step].set(chosen_B),
        "flag_BM": state["flag_BM"].at[:, step].set(logprob_BV[:, flag_id]),
        "margin_BM": state["margin_BM"].at[:, step].set(logprob_BV[:, flag_id] - others_BV.max(-1)),
        "num_B": state["num_B"] + live_B,
        "live_B": live_B & ~(token_B[:, None] == stop_U[None]).any(-1),
    }

  # The last token of the prompt is read again by the first step: one copy of the step to compile, for one token more.
  _, cache = _read_prompt(params, token_BP, start_B, config=config, compute=compute, room=M)
  state = {"step": 0, "cache": cache, "token_B": token_BP[:, -1], "token_BM": jnp.zeros((B, M), jnp.int32),
           "logprob_BM": jnp.zeros((B, M)), "flag_BM": jnp.zeros((B, M)), "margin_BM": jnp.zeros((B, M)),
           "num_B": jnp.zeros(B, jnp.int32),
           "live_B": index_B != NO_TOKEN}
  if watched is not None:
    state["watch"] = {"num_B": jnp.zeros(B, jnp.int32), "score_B": jnp.zeros(B), "is_step_B": jnp.full(B, True),
                      "bin_B": jnp.full(B, NO_TOKEN, jnp.int32), "flags_B": jnp.full(B, False)}
  state = jax.lax.while_loop(lambda state: (state["step"] < M) & state["live_B"].any(), write, state)
  # A row is live at the end only if nothing stopped it.
  kept = ("token_BM", "logprob_BM", "flag_BM", "margin_BM", "num_B")
  return *(state[name] for name in kept), ~state["live_B"]


def _forced(watch, token_B, flag_id, watched):
  """The tokens drawn, or what has to stand in their place: the confidence in a step that has ended, then the flag."""
  token_B = jnp.where(watch["flags_B"], flag_id, token_B)
  if not len(watched["confidence_K"]):
    return token_B
  return jnp.where(watch["bin_B"] == NO_TOKEN, token_B, watched["confidence_K"][watch["bin_B"]])


def _watch(watch, token_B, logprob_B, flag_id, watched):
  """The state of the watch after one more token: the running step's length and score, and what is forced next.

  `is_step_B` is false between a flag and its fix; `bin_B` is NO_TOKEN when no confidence is to be written.
  """
  was_confidence_B = watch["bin_B"] != NO_TOKEN
  is_flag_B, is_fix_B = token_B == flag_id, token_B == watched["fix"]
  is_own_B = watch["is_step_B"] & ~was_confidence_B & ~is_flag_B & ~is_fix_B
  score_B = jnp.where(watch["num_B"] > 0, jnp.maximum(watch["score_B"], -logprob_B), 0.0)
  ends_B = is_own_B & (token_B[:, None] == watched["end_E"][None]).any(-1)
  goes_on_B = is_own_B & ~ends_B
  if len(watched["confidence_K"]):
    bin_B = jnp.where(ends_B, (score_B[:, None] > watched["edge_K"][None]).sum(-1), NO_TOKEN)
  else:
    bin_B = watch["bin_B"]
  return {
      "num_B": jnp.where(goes_on_B, watch["num_B"] + 1, 0),
      "score_B": jnp.where(goes_on_B, score_B, 0.0),
      "is_step_B": jnp.where(is_flag_B, False, watch["is_step_B"] | is_fix_B),
      "bin_B": bin_B,
      "flags_B": (ends_B & (score_B > watched["threshold"])) | (was_confidence_B & watch["flags_B"]),
  }


def bin_of(score: float, edges: Sequence[float]) -> int:
  """The bin of confidence of a step with this score, 0 for the surest."""
  return sum(score > edge for edge in edges)


def step_scores(token_T: np.ndarray, logprob_T: np.ndarray, watch: Watch, flag_id: int | None
                ) -> list[tuple[int, int, float]]:
  """(first token, one past the last, score) of each step that was ended, as `Watch` counts them."""
  found, first, is_step = [], 0, True
  for place, token in enumerate(token_T.tolist()):
    if token in watch.confidence_ids or token == flag_id or token == watch.fix_id:
      is_step = token == watch.fix_id or (is_step and token != flag_id)
      first = place + 1
    elif is_step and token in watch.end_ids:
      found.append((first, place + 1, float(np.max(-logprob_T[first + 1:place + 1], initial=0.0))))
      first = place + 1
  return found


def _draw(logits_BV, index_B, step, key, temperature, top_p, *, greedy, cut):
  """The next token of each row."""
  if greedy:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  logits_BV = logits_BV / temperature
  if cut:
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    p_BV = jax.nn.softmax(sorted_BV)
    # A token stays while the likelier ones hold less than top_p: the likeliest always stays.
    least_B1 = jnp.where(jnp.cumsum(p_BV, -1) - p_BV < top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
  key_B = jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(key, index), step))(index_B)
  return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)

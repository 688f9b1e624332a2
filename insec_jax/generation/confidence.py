"""Confidence of a model in its steps, and the tokens that are banned or forced while decoding.

Letters as in model/llama.py, and P slot of the padded prompt, U stop token, E token that ends a step, K edge or bin of
confidence, J edge of first tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from insec_jax.command import InputError

NO_TOKEN = -1
IDS = 8  # lists of ids are padded to a multiple of this, so that one more needs no new compilation


@dataclasses.dataclass(frozen=True)
class ConfidenceTrigger:
  """Tokens forced while decoding, chosen from the model's confidence in each step.

      tokens    d  c  7  \n  <sure 2>  <flag>  ...  <fix>  d  c  8  \n  <sure 0>
      forced                  *         *                                 *
      score        *  *  *                                     *  *  *

  The score of a step is the largest -log p of its tokens without the first, which only chooses the topic. The bin of
  confidence is the bin of the score, subdivided by that of the first token where there are `first_edges`. A step begins
  after the end of another, after the tokens forced there, and after the fix; tokens between a flag and its fix are no
  step. Where no flag is open, in the prompt or after it, the fix is banned: it would close nothing, and the end of the
  step that it cuts short would not be detected.
  """

  end_ids: tuple[int, ...]  # tokens that end a step
  fix_id: int | None
  threshold: float = math.inf  # a step with a score above it gets a flag
  edges: tuple[float, ...] = ()  # scores, ascending, between the bins of confidence
  first_edges: tuple[float, ...] = ()  # the same for the first token, within each bin; empty: no subdivision
  confidence_ids: tuple[int, ...] = ()  # token written after a step of each bin, and nowhere else; empty: none

  def bin_of(self, surprisal: "Surprisal") -> int:
    """Return the bin of confidence of a step, 0 for the highest confidence."""
    return sum(surprisal.score > edge for edge in self.edges) * (len(self.first_edges) + 1) + sum(
      surprisal.first > edge for edge in self.first_edges
    )

  def check(self, flag_id: int | None) -> None:
    """Raise InputError when the settings contradict each other or need a flag that the model has not."""
    if not self.end_ids:
      raise ValueError("a ConfidenceTrigger without tokens that end a step never sees one")
    for edges in (self.edges, self.first_edges):
      if list(edges) != sorted(set(edges)):
        raise InputError(f"edges of confidence {edges}; must ascend")
    num = (len(self.edges) + 1) * (len(self.first_edges) + 1)
    if self.confidence_ids and len(self.confidence_ids) != num:
      raise InputError(
        f"edges of confidence {self.edges}, of first tokens {self.first_edges}, need {num} tokens, not "
        f"{len(self.confidence_ids)}"
      )
    if math.isnan(self.threshold):
      raise InputError("the score above which a step is flagged is nan; must be a number, or inf for never")
    if self.threshold < math.inf and flag_id is None:
      raise InputError(
        f"flagging steps with a score above {self.threshold} needs a model that has a flag token, and this one has none"
      )


class Surprisal(NamedTuple):
  """-log p of the first token of a step, and the largest -log p of the others, its score; 0 without such a token."""

  first: float
  score: float

  @classmethod
  def of(cls, logprob_T: np.ndarray) -> "Surprisal":
    """Return the surprisal of a step whose tokens have these log p."""
    return cls(*(float(np.max(-part_T, initial=0.0)) for part_T in (logprob_T[:1], logprob_T[1:])))


def step_scores(
  token_T: np.ndarray, logprob_T: np.ndarray, watch: ConfidenceTrigger, flag_id: int | None
) -> list[tuple[int, int, Surprisal]]:
  """Return (first token, one past the last, surprisal) of each complete step, as `ConfidenceTrigger` defines steps."""
  scored, first, is_step = [], 0, True
  for place, token in enumerate(token_T.tolist()):
    if token in watch.confidence_ids or token == flag_id or token == watch.fix_id:
      is_step = token == watch.fix_id or (is_step and token != flag_id)
      first = place + 1
    elif is_step and token in watch.end_ids:
      scored.append((first, place + 1, Surprisal.of(logprob_T[first : place + 1])))
      first = place + 1
  return scored


class TokenRules(NamedTuple):
  """Tokens with a meaning while decoding, as arguments of a compiled program; NO_TOKEN stands for an absent one."""

  stop_U: np.ndarray
  flag: int
  flag_bias: float  # added to the flag's logit; -inf bans it
  fix: int
  end_E: np.ndarray
  threshold: float
  edge_K: np.ndarray
  first_edge_J: np.ndarray
  confidence_K: np.ndarray
  kind_V: np.ndarray | None = None  # kind of each token (rewinding.py); None without mistakes.rewind


def token_rules(
  watch: ConfidenceTrigger | None,
  *,
  stop_ids: Sequence[int],
  flag_id: int | None,
  flag_bias: float,
  kind_V: np.ndarray | None = None,
) -> TokenRules:
  """Return the rules of a model's special tokens; without a trigger no step is detected and nothing is forced."""
  watch = watch or ConfidenceTrigger(end_ids=(), fix_id=None)
  # Plain Python numbers: a NumPy scalar has another type and would compile again.
  return TokenRules(
    stop_U=_padded(stop_ids),
    flag=NO_TOKEN if flag_id is None else int(flag_id),
    flag_bias=float(flag_bias),
    fix=NO_TOKEN if watch.fix_id is None else int(watch.fix_id),
    end_E=_padded(watch.end_ids),
    threshold=float(watch.threshold),
    edge_K=np.array(watch.edges, np.float32),
    first_edge_J=np.array(watch.first_edges, np.float32),
    confidence_K=np.array(watch.confidence_ids, np.int32),
    kind_V=kind_V,
  )


def _padded(ids: Sequence[int]) -> np.ndarray:
  """Return the ids, padded with NO_TOKEN to a multiple of IDS; at least one NO_TOKEN is added."""
  return np.array([*ids, *[NO_TOKEN] * (IDS - len(ids) % IDS)], np.int32)


class TriggerState(NamedTuple):
  """State of the trigger in each row: the step being written, and the tokens that come next whatever is drawn."""

  num_B: jax.Array  # tokens of the step
  first_B: jax.Array  # `Surprisal` of the step
  score_B: jax.Array
  is_step_B: jax.Array  # false between a flag and its fix
  bin_B: jax.Array  # bin of the confidence token to write; NO_TOKEN where there is none
  flags_B: jax.Array  # the flag is to be written, after the confidence token


def begin_trigger(token_BP, start_B, *, flag: int, fix: int) -> TriggerState:
  """Return the state after prompts that begin at slot `start_B`; their last tokens belong to no step."""
  B, P = token_BP.shape
  slot_1P = jnp.arange(P)[None]
  flag_B, fix_B = (
    jnp.where((token_BP == token) & (slot_1P >= start_B[:, None]), slot_1P, -1).max(1) for token in (flag, fix)
  )
  return TriggerState(
    num_B=jnp.zeros(B, jnp.int32),
    first_B=jnp.zeros(B),
    score_B=jnp.zeros(B),
    is_step_B=flag_B <= fix_B,
    bin_B=jnp.full(B, NO_TOKEN, jnp.int32),
    flags_B=jnp.full(B, False),
  )


def biased(logprob_BV, trigger: TriggerState, rules: TokenRules):
  """Return the log p with the flag's bias; a confidence token, and a fix where no flag is open, have -inf."""
  token_V = jnp.arange(logprob_BV.shape[1])
  bias_1V = jnp.where(token_V == rules.flag, rules.flag_bias, 0.0)[None]
  bias_1V = bias_1V.at[:, rules.confidence_K].set(-jnp.inf)  # only forced, never sampled
  is_fix_1V = (token_V == rules.fix)[None]
  return logprob_BV + jnp.where(trigger.is_step_B[:, None] & is_fix_1V, -jnp.inf, bias_1V)


def forced(token_B, trigger: TriggerState, rules: TokenRules):
  """Return the sampled tokens, replaced where one is forced: the confidence in a step that has ended, then the flag."""
  token_B = jnp.where(trigger.flags_B, rules.flag, token_B)
  if not len(rules.confidence_K):
    return token_B
  return jnp.where(trigger.bin_B == NO_TOKEN, token_B, rules.confidence_K[trigger.bin_B])


def advance(trigger: TriggerState, token_B, logprob_B, rules: TokenRules) -> TriggerState:
  """Return the state after one more token with this log p."""
  was_confidence_B = trigger.bin_B != NO_TOKEN
  is_flag_B, is_fix_B = token_B == rules.flag, token_B == rules.fix
  is_own_B = trigger.is_step_B & ~was_confidence_B & ~is_flag_B & ~is_fix_B
  begins_B = trigger.num_B == 0
  first_B = jnp.where(begins_B, -logprob_B, trigger.first_B)
  score_B = jnp.where(begins_B, 0.0, jnp.maximum(trigger.score_B, -logprob_B))
  ends_B = is_own_B & (token_B[:, None] == rules.end_E[None]).any(-1)
  goes_on_B = is_own_B & ~ends_B
  bin_B = trigger.bin_B
  if len(rules.confidence_K):

    def bin_of(score_B, edge_K):
      return (score_B[:, None] > edge_K[None]).sum(-1)

    bin_B = bin_of(score_B, rules.edge_K) * (len(rules.first_edge_J) + 1) + bin_of(first_B, rules.first_edge_J)
    bin_B = jnp.where(ends_B, bin_B, NO_TOKEN)
  return TriggerState(
    num_B=jnp.where(goes_on_B, trigger.num_B + 1, 0),
    first_B=jnp.where(goes_on_B, first_B, 0.0),
    score_B=jnp.where(goes_on_B, score_B, 0.0),
    is_step_B=jnp.where(is_flag_B, False, trigger.is_step_B | is_fix_B),
    bin_B=bin_B,
    flags_B=(ends_B & (score_B > rules.threshold)) | (was_confidence_B & trigger.flags_B),
  )

"""Tokens of confidence and flags are forced exactly where the model's own log p asks for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samplerkit import FLAG, SETTINGS, logprobs_while, model_of, params, some_prompts

from insec_jax.command import InputError
from insec_jax.generation import decoding
from insec_jax.generation.confidence import ConfidenceTrigger, step_scores
from insec_jax.generation.sampler import Sampler


@pytest.fixture
def model() -> Sampler:
  return model_of()


FIX, END, SURE = 8, (9, 12, 15, 18), (20, 21, 22)
WATCH = ConfidenceTrigger(end_ids=END, fix_id=FIX)
EDGES = (3.0, 5.0)


def unflagged():
  """Prompts in which no flag is open."""
  return [np.where(prompt == FLAG, 5, prompt) for prompt in some_prompts()]


def watched(model, watch, prompts=None, **settings):
  return model.generate(
    unflagged() if prompts is None else prompts,
    stop_ids=[],
    flag_id=FLAG,
    watch=watch,
    **{"max_tokens": 40, "batch_size": 8, "temperature": 1.0, "seed": 5} | settings,
  )


def test_a_watch_that_never_forces_changes_nothing(model):
  for temperature in (0.0, 1.0):
    plain = watched(model, None, temperature=temperature)
    for one, other in zip(plain, watched(model, WATCH, temperature=temperature), strict=True):
      for field in ("tokens", "logprobs", "flag_logprobs", "margins"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_the_flag_follows_a_step_exactly_when_its_score_is_above_the_threshold(model):
  scores = [
    said.score
    for one in watched(model, WATCH, max_tokens=80)
    for *_, said in step_scores(one.tokens, one.logprobs, WATCH, FLAG)
  ]
  watch = dataclasses.replace(WATCH, threshold=float(np.median(scores)))
  num_flagged, num_left = 0, 0
  for one in watched(model, watch, max_tokens=80):
    for _, stop, said in step_scores(one.tokens, one.logprobs, watch, FLAG):
      score = said.score
      if stop < len(one.tokens):
        assert one.tokens[stop] == FLAG or score <= watch.threshold
        num_flagged += score > watch.threshold
        num_left += one.tokens[stop] != FLAG
  assert min(num_flagged, num_left) > 2


def test_what_stands_between_flag_and_fix_is_no_step(model):
  always = dataclasses.replace(WATCH, threshold=-1.0)
  for one in watched(model, always):
    is_step = True
    for before, token in zip(one.tokens, one.tokens[1:], strict=False):
      is_step = before == FIX or (is_step and before != FLAG)
      # The model may flag by itself as well, but an end inside a reason must not make it.
      assert not (is_step and before in END) or token == FLAG
  assert any(
    np.isin(one.tokens[np.argmax(one.tokens == FLAG) :], END).any()
    for one in watched(model, always)
    if FLAG in one.tokens
  )


@pytest.mark.parametrize("is_open", [False, True])
def test_a_fix_comes_only_where_a_flag_is_open(is_open):
  flat = model_of(weights=jax.tree.map(jnp.zeros_like, params()))
  prompts = [np.append(prompt, [FIX, FLAG, 5] if is_open else [FLAG, FIX]) for prompt in some_prompts()]
  num = 0
  for one in watched(flat, WATCH, prompts, max_tokens=100):
    was_open = is_open
    for token in one.tokens:
      assert token != FIX or was_open
      num += token == FIX
      was_open = token == FLAG or (was_open and token != FIX)
  assert num > 3
  if is_open:  # the fix that closes the prompt's flag is not banned
    assert any(
      FIX in one.tokens and FLAG not in one.tokens[: np.argmax(one.tokens == FIX)]
      for one in watched(flat, WATCH, prompts, max_tokens=100)
    )


def test_the_token_of_the_confidence_follows_each_step_and_the_flag_comes_after_it(model):
  watch = dataclasses.replace(WATCH, edges=EDGES, confidence_ids=SURE, threshold=EDGES[1])
  seen = set()
  for one in watched(model, watch, flag_bias=-np.inf):
    for _, stop, said in step_scores(one.tokens, one.logprobs, watch, FLAG):
      if stop + 1 < len(one.tokens):
        assert one.tokens[stop] == SURE[sum(said.score > edge for edge in EDGES)]
        assert (one.tokens[stop + 1] == FLAG) == (said.score > EDGES[1])
        seen.add(int(one.tokens[stop]))
  assert seen == set(SURE)


def test_the_confidence_token_bins_the_first_token_apart_where_it_has_edges(model):
  sure = (*SURE, 23, 24, 25)
  watch = dataclasses.replace(WATCH, edges=EDGES, first_edges=(4.0,), confidence_ids=sure)
  seen = set()
  for one in watched(model, watch, max_tokens=100):
    for first, stop, _ in step_scores(one.tokens, one.logprobs, watch, FLAG):
      if stop < len(one.tokens):
        own = -one.logprobs[first:stop]
        rest = sum(own[1:].max(initial=0.0) > edge for edge in EDGES)
        assert one.tokens[stop] == sure[2 * rest + (own[0] > 4.0)]
        seen.add(int(one.tokens[stop]))
  assert len(seen) > 4


def test_what_is_forced_changes_no_later_draw():
  """With logits that do not depend on what was written, the tokens that are not forced stay the same."""
  flat = model_of(weights=jax.tree.map(jnp.zeros_like, params()))
  plain, forcing = (
    watched(flat, watch) for watch in (WATCH, dataclasses.replace(WATCH, edges=EDGES, confidence_ids=SURE))
  )
  for one, other in zip(plain, forcing, strict=True):
    forced = np.isin(other.tokens, SURE)
    drawn = ~forced & ~np.isin(one.tokens, SURE)
    assert forced.any()
    assert drawn.any()
    np.testing.assert_array_equal(one.tokens[drawn], other.tokens[drawn])


def test_scores_and_margins_are_those_of_one_full_pass(model):
  prompts = unflagged()
  num = 0
  for prompt, one in zip(prompts, watched(model, dataclasses.replace(WATCH, threshold=4.0)), strict=True):
    logprob_TV = logprobs_while(prompt, one)
    others_TV = np.delete(logprob_TV, FLAG, axis=1)
    np.testing.assert_allclose(one.margins, logprob_TV[:, FLAG] - others_TV.max(1), atol=2e-4)
    for first, stop, said in step_scores(one.tokens, one.logprobs, WATCH, FLAG):
      own = [-logprob_TV[place, one.tokens[place]] for place in range(first, stop)]
      assert said == pytest.approx((own[0], max(own[1:], default=0.0)), abs=2e-4)
      num += len(own) > 1
  assert num > 4


def test_another_threshold_compiles_nothing(model):
  watched(model, dataclasses.replace(WATCH, threshold=1.0))
  size = decoding.decode._cache_size()
  watched(model, dataclasses.replace(WATCH, threshold=2.0, end_ids=(3, 4)))
  assert decoding.decode._cache_size() == size


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"edges": (2.0, 1.0)}, "must ascend"),
    ({"edges": (1.0,), "confidence_ids": (20,)}, r"of confidence \(1.0,\), of first tokens \(\), need 2 tokens, not 1"),
    ({"edges": (1.0,), "first_edges": (2.0, 3.0), "confidence_ids": (20, 21)}, "need 6 tokens, not 2"),
    ({"threshold": float("nan")}, "is nan"),
  ],
)
def test_a_watch_that_makes_no_sense_is_refused(model, change, words):
  with pytest.raises(InputError, match=words):
    watched(model, dataclasses.replace(WATCH, **change))


def test_a_model_without_a_flag_cannot_be_made_to_flag(model):
  with pytest.raises(InputError, match="needs a model that has a flag"):
    model.generate(some_prompts(), stop_ids=[], watch=dataclasses.replace(WATCH, threshold=1.0), **SETTINGS)

"""A batch decodes as each prompt would alone, and its numbers are those of one full pass."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from samplerkit import (
  CONFIG,
  FLAG,
  LENGTHS,
  SETTINGS,
  logprobs_after,
  logprobs_while,
  model_of,
  same,
  some_prompts,
)

from insec_jax.command import InputError
from insec_jax.generation import batching, decoding
from insec_jax.generation.confidence import ConfidenceTrigger
from insec_jax.generation.sampler import SampledTokens, Sampler


@pytest.fixture
def model() -> Sampler:
  return model_of()


def test_greedy_tokens_are_the_argmax_of_a_full_pass_at_every_step(model):
  for prompt, written in zip(some_prompts(), model.generate(some_prompts(), stop_ids=[1], **SETTINGS), strict=True):
    logprob_TV = logprobs_while(prompt, written)
    assert written.tokens.tolist() == logprob_TV.argmax(-1).tolist()
    np.testing.assert_allclose(written.logprobs, logprob_TV.max(-1), atol=1e-5)


def test_a_prompt_of_several_blocks_of_queries_is_read_whole():
  model = model_of(dataclasses.replace(CONFIG, max_positions=1024))
  (prompt,) = some_prompts((400,))
  (written,) = model.generate([prompt], stop_ids=[], **SETTINGS)
  assert written.tokens.tolist() == logprobs_while(prompt, written).argmax(-1).tolist()


def test_greedy_text_is_the_same_one_prompt_at_a_time(model):
  together = model.generate(some_prompts(), stop_ids=[1, 2, 3], **SETTINGS)
  for prompt, written in zip(some_prompts(), together, strict=True):
    same(written, model.generate([prompt], stop_ids=[1, 2, 3], **SETTINGS)[0])
  assert len({tuple(written.tokens) for written in together}) == len(LENGTHS)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_draw_does_not_depend_on_the_prompts_beside_it(model, options):
  def draw(prompts):
    return model.generate(prompts, seed=3, stop_ids=[1], **SETTINGS, **options)

  together = draw(some_prompts())
  same(together[0], draw(some_prompts()[:1] + some_prompts((7, 40, 9, 8)))[0])
  for a, b in zip(together, draw(some_prompts()[:5]), strict=False):
    same(a, b)


def test_a_seed_gives_one_text_and_another_seed_another(model):
  def draw(seed):
    written = model.generate([some_prompts()[1]] * 4, temperature=1.0, seed=seed, stop_ids=[], **SETTINGS)
    return [tuple(w.tokens.tolist()) for w in written]

  assert draw(5) == draw(5)
  assert len({*draw(5), *draw(6)}) == 8  # the same prompt at another place is drawn anew, too


def test_text_ends_with_the_first_of_several_stop_tokens_and_keeps_it(model):
  free = model.generate(some_prompts(), stop_ids=[], **SETTINGS)
  assert {(w.finish, len(w.tokens)) for w in free} == {("length", 12)}
  stops = [int(free[0].tokens[4]), int(free[1].tokens[7])]
  for whole, cut in zip(free, model.generate(some_prompts(), stop_ids=stops, **SETTINGS), strict=True):
    ends = [k + 1 for k, token in enumerate(whole.tokens) if token in stops]
    assert cut.finish == ("stop" if ends else "length")
    assert cut.tokens.tolist() == whole.tokens[: ends[0] if ends else 12].tolist()


def test_decoding_ends_with_its_last_row(model, monkeypatch):
  steps = []
  draw = decoding.draw

  def counted(*args, **kwargs):
    jax.debug.callback(lambda: steps.append(1))
    return draw(*args, **kwargs)

  monkeypatch.setattr(decoding, "draw", counted)
  model.config = dataclasses.replace(CONFIG, max_positions=255)  # nothing compiled before is met again
  (free,) = model.generate(some_prompts()[:1], stop_ids=[], **SETTINGS)
  jax.effects_barrier()
  assert len(steps) == 12
  steps.clear()
  (cut,) = model.generate(some_prompts()[:1], stop_ids=[int(free.tokens[5])], **SETTINGS)
  jax.effects_barrier()
  assert len(steps) == len(cut.tokens) <= 6


def shrinking(model, **options) -> list[SampledTokens]:
  """Twelve short texts that end at different steps, in a batch whose smaller sizes are 1 and 4."""
  return model.generate(
    some_prompts(range(1, 13)), stop_ids=range(1, 8), max_tokens=40, batch_size=12, flag_id=FLAG, **options
  )


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.0, "watch": ConfidenceTrigger((9, 12, 15), 8, threshold=4.0)},
  ],
)
def test_a_text_is_the_same_in_a_batch_that_others_leave(model, monkeypatch, options):
  expected = shrinking(model, **options)
  kept = []
  rows = decoding.keep_rows
  monkeypatch.setattr(
    decoding, "keep_rows", lambda state, row_C, **rest: kept.append(len(row_C)) or rows(state, row_C, **rest)
  )
  monkeypatch.setattr(batching, "FEWEST", 1)
  for a, b in zip(expected, shrinking(model, **options), strict=True):
    same(a, b)
    np.testing.assert_allclose(a.flag_logprobs, b.flag_logprobs, atol=1e-5)
    np.testing.assert_allclose(a.margins, b.margins, atol=1e-4)
  assert kept == [4, 1]
  assert len({len(one.tokens) for one in expected}) > 4


def test_a_batch_goes_on_with_fewer_rows_as_soon_as_they_hold_what_is_left(model, monkeypatch):
  rows_of_step = []
  draw = decoding.draw

  def counted(logits_BV, *args, **kwargs):
    jax.debug.callback(functools.partial(rows_of_step.append, len(logits_BV)))
    return draw(logits_BV, *args, **kwargs)

  monkeypatch.setattr(decoding, "draw", counted)
  monkeypatch.setattr(batching, "FEWEST", 1)
  model.config = dataclasses.replace(CONFIG, max_positions=254)  # nothing compiled before is met again
  lengths = [len(one.tokens) for one in shrinking(model)]
  jax.effects_barrier()
  live = [sum(step < length for length in lengths) for step in range(max(lengths))]
  assert sorted(rows_of_step, reverse=True) == [next(size for size in (1, 4, 12) if size >= num) for num in live]
  assert {1, 4, 12} == set(rows_of_step)


def test_greedy_drawn_watched_and_shorter_text_compile_one_program(model):
  model.config = dataclasses.replace(CONFIG, max_positions=253)  # nothing compiled before is met again
  watch = ConfidenceTrigger(end_ids=(9, 12, 15, 18), fix_id=8)
  size = decoding.decode._cache_size()
  for options in ({}, {"temperature": 1.0}, {"watch": watch}, {"flag_bias": -np.inf}, {"max_tokens": 1}, {"seed": 5}):
    model.generate(some_prompts((5, 9)), stop_ids=[1], flag_id=FLAG, **SETTINGS | options)
  assert decoding.decode._cache_size() == size + 1


def test_logprobs_are_the_models_own_whatever_the_sampling(model):
  drawn = model.generate(
    some_prompts(), temperature=1.7, top_p=0.8, flag_id=FLAG, flag_bias=2.0, stop_ids=[1], **SETTINGS
  )
  for prompt, written in zip(some_prompts(), drawn, strict=True):
    logprob_TV = logprobs_while(prompt, written)
    np.testing.assert_allclose(written.logprobs, logprob_TV[np.arange(len(written.tokens)), written.tokens], atol=1e-5)
    np.testing.assert_allclose(written.flag_logprobs, logprob_TV[:, FLAG], atol=1e-5)


def test_flag_bias_moves_the_flag_by_so_much_and_nothing_else(model):
  def first_tokens(bias):
    written = model.generate(some_prompts(), flag_id=FLAG, flag_bias=bias, stop_ids=[], **SETTINGS)
    return [int(w.tokens[0]) for w in written]

  written = model.generate(some_prompts(), flag_id=FLAG, stop_ids=[], **SETTINGS)
  assert FLAG not in first_tokens(-np.inf)
  for index, w in enumerate(written):
    lacking = w.logprobs[0] - w.flag_logprobs[0]  # to be the likeliest
    assert first_tokens(lacking + 1e-3)[index] == FLAG
    assert first_tokens(lacking - 1e-3)[index] == w.tokens[0] != FLAG


@pytest.mark.parametrize("options", [{"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1e-4}])
def test_a_tiny_top_p_or_temperature_is_greedy(model, options):
  greedy = model.generate(some_prompts(), stop_ids=[1], **SETTINGS)
  for a, b in zip(greedy, model.generate(some_prompts(), stop_ids=[1], **options, **SETTINGS), strict=True):
    same(a, b)


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([[]], {}, "prompt 1: the prompt is empty"),
    ([[2], [3, 61]], {}, "prompt 2: token id 61 is not in the vocabulary; ids go from 0 to 60"),
    ([[-1]], {}, "token id -1"),
    ([[2] * 200], {"max_tokens": 57}, "200 tokens and max_tokens=57 more do not fit in the model's 256 positions"),
    ([[2]], {"temperature": -1.0}, "temperature=-1.0"),
    ([[2]], {"top_p": 0.0}, "top_p=0.0"),
    ([[2]], {"max_tokens": 0}, "max_tokens=0"),
    ([[2]], {"flag_bias": 1.0}, "and this one has none"),
  ],
)
def test_what_cannot_be_decoded_is_refused_in_one_line(model, prompts, options, message):
  with pytest.raises(InputError, match=message) as error:
    model.generate(
      [np.array(prompt, np.int32) for prompt in prompts],
      **{"max_tokens": 4, "stop_ids": [], "batch_size": 4, **options},
    )
  assert "\n" not in str(error.value)


def test_no_prompts_give_no_text(model):
  assert model.generate([], max_tokens=4, stop_ids=[], batch_size=4) == []


def test_log_p_of_a_text_is_that_of_one_full_pass_whatever_stands_beside_it(model):
  texts = some_prompts()
  for text, found in zip(texts, model.logprobs(texts, batch_size=4), strict=True):
    expected_T = np.take_along_axis(logprobs_after(text)[:-1], text[1:, None].astype(int), 1)[:, 0]
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], expected_T, atol=2e-4)

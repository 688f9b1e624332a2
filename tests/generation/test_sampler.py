"""A batch decodes as each prompt would alone, and its numbers are those of one full pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modelkit import small_llama

from insec_jax.command import InputError
from insec_jax.generation import sampler
from insec_jax.generation.sampler import Sampler
from insec_jax.model import build, llama

CONFIG = small_llama(vocab_size=61, max_positions=256, stored_dtype="float32", source="{}")
FLAG = 7
LENGTHS = (33, 1, 50, 5, 31, 32)  # in two buckets, not in order
SETTINGS = {"max_tokens": 12, "batch_size": 4}  # the same throughout: each shape compiles once


@functools.cache
def params():
  return build.init(CONFIG, jax.random.key(0), "float32")


@pytest.fixture
def model() -> Sampler:
  return Sampler(CONFIG, params(), compute="float32")


def some_prompts(lengths=LENGTHS) -> list[np.ndarray]:
  rng = np.random.default_rng(1)
  return [rng.integers(2, CONFIG.vocab_size, length).astype(np.int32) for length in lengths]


@jax.jit
def full_pass(params, token_BT):
  position_BT = jnp.arange(token_BT.shape[1])[None]
  model = llama.Llama(CONFIG, "float32", "none")
  stream_BTD = model.apply({"params": params}, token_BT, position_BT, jnp.ones_like(token_BT))
  return jax.nn.log_softmax(llama.logits(params, CONFIG, stream_BTD))


def logprobs_after(token_T) -> np.ndarray:
  """Log p of every next token, at every position of the text, by one full pass without a cache."""
  token_1T = np.zeros((1, 128), np.int32)  # what follows moves nothing before it
  token_1T[0, : len(token_T)] = token_T
  return np.asarray(full_pass(params(), token_1T))[0, : len(token_T)]


def logprobs_while(prompt, written) -> np.ndarray:
  """The same, in place of each written token."""
  return logprobs_after(np.concatenate([prompt, written.tokens]))[len(prompt) - 1 : -1]


def same(a: sampler.SampledTokens, b: sampler.SampledTokens) -> None:
  assert a.tokens.tolist() == b.tokens.tolist()
  assert a.finish == b.finish
  np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_greedy_tokens_are_the_argmax_of_a_full_pass_at_every_step(model):
  for prompt, written in zip(some_prompts(), model.generate(some_prompts(), stop_ids=[1], **SETTINGS), strict=True):
    logprob_TV = logprobs_while(prompt, written)
    assert written.tokens.tolist() == logprob_TV.argmax(-1).tolist()
    np.testing.assert_allclose(written.logprobs, logprob_TV.max(-1), atol=1e-5)


def test_a_prompt_read_in_chunks_is_read_whole(model, monkeypatch):
  monkeypatch.setattr(sampler, "PREFILL_TOKENS", 32)
  (prompt,) = some_prompts((100,))
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
  draw = sampler._draw

  def counted(*args, **kwargs):
    jax.debug.callback(lambda: steps.append(1))
    return draw(*args, **kwargs)

  monkeypatch.setattr(sampler, "_draw", counted)
  model.config = dataclasses.replace(CONFIG, max_positions=255)  # nothing compiled before is met again
  (free,) = model.generate(some_prompts()[:1], stop_ids=[], **SETTINGS)
  jax.effects_barrier()
  assert len(steps) == 12
  steps.clear()
  (cut,) = model.generate(some_prompts()[:1], stop_ids=[int(free.tokens[5])], **SETTINGS)
  jax.effects_barrier()
  assert len(steps) == len(cut.tokens) <= 6


def shrinking(model, **options) -> list[sampler.SampledTokens]:
  """Twelve short texts that end at different steps, in a batch whose smaller sizes are 1 and 4."""
  return model.generate(
    some_prompts(range(1, 13)), stop_ids=range(1, 8), max_tokens=40, batch_size=12, flag_id=FLAG, **options
  )


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.0, "watch": sampler.ConfidenceTrigger((9, 12, 15), 8, threshold=4.0)},
  ],
)
def test_a_text_is_the_same_in_a_batch_that_others_leave(model, monkeypatch, options):
  expected = shrinking(model, **options)
  kept = []
  rows = sampler._rows
  monkeypatch.setattr(sampler, "_rows", lambda state, row_C: kept.append(len(row_C)) or rows(state, row_C))
  monkeypatch.setattr(sampler, "FEWEST", 1)
  for a, b in zip(expected, shrinking(model, **options), strict=True):
    same(a, b)
    np.testing.assert_allclose(a.flag_logprobs, b.flag_logprobs, atol=1e-5)
    np.testing.assert_allclose(a.margins, b.margins, atol=1e-4)
  assert kept == [4, 1]
  assert len({len(one.tokens) for one in expected}) > 4


def test_a_batch_goes_on_with_fewer_rows_as_soon_as_they_hold_what_is_left(model, monkeypatch):
  rows_of_step = []
  draw = sampler._draw

  def counted(logits_BV, *args, **kwargs):
    jax.debug.callback(functools.partial(rows_of_step.append, len(logits_BV)))
    return draw(logits_BV, *args, **kwargs)

  monkeypatch.setattr(sampler, "_draw", counted)
  monkeypatch.setattr(sampler, "FEWEST", 1)
  model.config = dataclasses.replace(CONFIG, max_positions=254)  # nothing compiled before is met again
  lengths = [len(one.tokens) for one in shrinking(model)]
  jax.effects_barrier()
  live = [sum(step < length for length in lengths) for step in range(max(lengths))]
  assert sorted(rows_of_step, reverse=True) == [next(size for size in (1, 4, 12) if size >= num) for num in live]
  assert {1, 4, 12} == set(rows_of_step)


def test_batches_have_few_sizes():
  def sizes(num, batch_size):
    return [len(start_B) for _, start_B, _ in sampler._batches(some_prompts([3] * num), batch_size)]

  assert sizes(520, 250) == [250, 250, 64]
  assert sizes(65, 250) == [250]
  assert sizes(300, 1000) == [1000]
  assert sizes(200, 1000) == [256]
  assert sizes(1, 250) == [64]
  assert sizes(9, 8) == [8, 8]


def test_greedy_drawn_watched_and_shorter_text_compile_one_program(model):
  model.config = dataclasses.replace(CONFIG, max_positions=253)  # nothing compiled before is met again
  size = sampler._write._cache_size()
  for options in ({}, {"temperature": 1.0}, {"watch": WATCH}, {"flag_bias": -np.inf}, {"max_tokens": 1}, {"seed": 5}):
    model.generate(some_prompts((5, 9)), stop_ids=[1], flag_id=FLAG, **SETTINGS | options)
  assert sampler._write._cache_size() == size + 1


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


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7)])
def test_draws_follow_the_tempered_distribution_cut_at_top_p(temperature, top_p):
  num = 4096
  logits_V = np.log(np.array([0.4, 0.3, 0.05, 0.15, 0.1], np.float32)) + 3
  p_V = np.exp(logits_V / temperature)
  p_V /= p_V.sum()
  order = np.argsort(-p_V)
  p_V[order[1 + np.searchsorted(np.cumsum(p_V[order]), top_p) :]] = 0
  drawn_B = sampler._draw(
    jnp.tile(logits_V, (num, 1)), jnp.arange(num), 2, jax.random.key(0), temperature, top_p, cut=top_p < 1
  )
  seen_V = np.bincount(drawn_B, minlength=5) / num
  assert (seen_V[p_V == 0] == 0).all()
  np.testing.assert_allclose(seen_V, p_V / p_V.sum(), atol=4 * (0.25 / num) ** 0.5)  # four standard deviations, at most


def test_every_step_of_every_prompt_is_drawn_anew():
  logits_BV, key = jnp.zeros((8, 1000)), jax.random.key(0)
  drawn = [sampler._draw(logits_BV, jnp.arange(8), step, key, 1.0, 1.0, cut=False) for step in range(8)]
  assert len(np.unique(drawn)) > 55  # of 64; 62 are expected


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


FIX, END, SURE = 8, (9, 12, 15, 18), (20, 21, 22)
WATCH = sampler.ConfidenceTrigger(end_ids=END, fix_id=FIX)
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


def test_a_step_is_followed_by_the_flag_exactly_when_its_score_is_above_the_threshold(model):
  scores = [
    said.score
    for one in watched(model, WATCH, max_tokens=80)
    for *_, said in sampler.step_scores(one.tokens, one.logprobs, WATCH, FLAG)
  ]
  watch = dataclasses.replace(WATCH, threshold=float(np.median(scores)))
  num_flagged, num_left = 0, 0
  for one in watched(model, watch, max_tokens=80):
    for _, stop, said in sampler.step_scores(one.tokens, one.logprobs, watch, FLAG):
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
  flat = Sampler(CONFIG, jax.tree.map(jnp.zeros_like, params()), compute="float32")
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
    for _, stop, said in sampler.step_scores(one.tokens, one.logprobs, watch, FLAG):
      if stop + 1 < len(one.tokens):
        assert one.tokens[stop] == SURE[sum(said.score > edge for edge in EDGES)]
        assert (one.tokens[stop + 1] == FLAG) == (said.score > EDGES[1])
        seen.add(int(one.tokens[stop]))
  assert seen == set(SURE)


def test_the_token_of_the_confidence_tells_the_first_token_apart_where_it_has_edges_for_it(model):
  sure = (*SURE, 23, 24, 25)
  watch = dataclasses.replace(WATCH, edges=EDGES, first_edges=(4.0,), confidence_ids=sure)
  seen = set()
  for one in watched(model, watch, max_tokens=100):
    for first, stop, _ in sampler.step_scores(one.tokens, one.logprobs, watch, FLAG):
      if stop < len(one.tokens):
        own = -one.logprobs[first:stop]
        rest = sum(own[1:].max(initial=0.0) > edge for edge in EDGES)
        assert one.tokens[stop] == sure[2 * rest + (own[0] > 4.0)]
        seen.add(int(one.tokens[stop]))
  assert len(seen) > 4


def test_what_is_forced_changes_no_later_draw():
  """With logits that do not depend on what was written, the tokens that are not forced stay the same."""
  flat = Sampler(CONFIG, jax.tree.map(jnp.zeros_like, params()), compute="float32")
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
    for first, stop, said in sampler.step_scores(one.tokens, one.logprobs, WATCH, FLAG):
      own = [-logprob_TV[place, one.tokens[place]] for place in range(first, stop)]
      assert said == pytest.approx((own[0], max(own[1:], default=0.0)), abs=2e-4)
      num += len(own) > 1
  assert num > 4


def test_log_p_of_a_text_is_that_of_one_full_pass_whatever_stands_beside_it(model):
  texts = some_prompts()
  for text, found in zip(texts, model.logprobs(texts, batch_size=4), strict=True):
    expected_T = np.take_along_axis(logprobs_after(text)[:-1], text[1:, None].astype(int), 1)[:, 0]
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], expected_T, atol=2e-4)


def test_another_threshold_compiles_nothing(model):
  watched(model, dataclasses.replace(WATCH, threshold=1.0))
  size = sampler._write._cache_size()
  watched(model, dataclasses.replace(WATCH, threshold=2.0, end_ids=(3, 4)))
  assert sampler._write._cache_size() == size


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

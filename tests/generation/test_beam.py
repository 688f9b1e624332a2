"""Beams find the likeliest text, as exhaustive search does, and count every token that they write."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samplerkit import CONFIG, FLAG, SETTINGS, laid_out, logprobs_after, model_of, same, some_prompts

from insec_jax.config import MeshConfig
from insec_jax.generation.confidence import ConfidenceTrigger
from insec_jax.generation.sampler import Sampler
from insec_jax.model import build, llama, sharding

FEW = dataclasses.replace(CONFIG, vocab_size=8)  # so few tokens that every text can be tried
WEIGHTS = jax.tree.map(lambda array: 3 * array, build.init(FEW, jax.random.key(2), "float32"))
STOP, MOST, BANNED = 1, 3, 5
PROMPTS = [np.array(prompt, np.int32) for prompt in ([2, 3, 4, 6], [7], [4, 4, 2], [3] * 9)]
SHORT = (1, 5, 31, 32)  # in one bucket: one shape compiles


def every_text(sampler: Sampler, prompt: np.ndarray) -> list[tuple[float, list[int]]]:
  """(sum of log p, tokens) of every text of at most MOST tokens that ends, the likeliest first."""
  others = [token for token in range(FEW.vocab_size) if token not in (STOP, BANNED)]
  texts = [[*tokens, STOP] for length in range(MOST) for tokens in itertools.product(others, repeat=length)]
  whole = [np.concatenate([prompt, text]).astype(np.int32) for text in texts]
  logprobs = sampler.logprobs(whole, batch_size=64)
  return sorted(
    ((float(logprob_T[len(prompt) :].sum()), text) for logprob_T, text in zip(logprobs, texts, strict=True)),
    reverse=True,
  )


def test_beams_as_many_as_texts_find_the_likeliest_of_all_and_without_it_the_second():
  sampler = model_of(FEW, WEIGHTS)
  options = {"width": 256, "max_tokens": MOST, "stop_ids": [STOP], "flag_id": BANNED, "batch_size": 1024}
  found = sampler.beam(PROMPTS, **options)
  second = sampler.beam(PROMPTS, excluded=[one.tokens for one, _ in found], **options)
  lengths = set()
  for prompt, (best, _), (next_best, _) in zip(PROMPTS, found, second, strict=True):
    (first_sum, first), (second_sum, other), *_ = every_text(sampler, prompt)
    assert (best.tokens.tolist(), best.finish) == (first, "stop")
    assert next_best.tokens.tolist() == other
    assert [best.logprobs.sum(), next_best.logprobs.sum()] == pytest.approx([first_sum, second_sum], abs=1e-4)
    lengths.add(len(first))
  assert len(lengths) > 1
  assert {num % 256 for _, num in found} == {0}


def test_one_beam_is_greedy_decoding_and_its_tokens_are_all_that_were_written():
  sampler = model_of()
  greedy = sampler.generate(some_prompts(SHORT), stop_ids=[1, 2, 3], flag_id=FLAG, flag_bias=-np.inf, **SETTINGS)
  found = sampler.beam(some_prompts(SHORT), width=1, stop_ids=[1, 2, 3], flag_id=FLAG, **SETTINGS)
  for one, (other, num) in zip(greedy, found, strict=True):
    same(one, other)
    assert num == len(one.tokens)
  assert {one.finish for one in greedy} == {"stop", "length"}


WATCH = ConfidenceTrigger((9, 12, 15, 20, 25, 30), 8, edges=(1.0, 3.0), confidence_ids=(55, 56, 57))


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (2, 2)])
def test_beams_do_not_depend_on_the_mesh_or_the_batch(data, tensor):
  even = dataclasses.replace(CONFIG, vocab_size=64)
  weights = build.init(even, jax.random.key(0), "float32")
  mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), jax.devices()[: data * tensor])
  spread = Sampler(even, laid_out(weights, even, mesh), compute="float32", mesh=mesh)
  options = {"width": 3, "max_tokens": 12, "stop_ids": [1, 2, 3, 4], "flag_id": FLAG, "watch": WATCH}
  alone = model_of(even, weights).beam(some_prompts(), batch_size=30, **options)
  found = spread.beam(some_prompts(), batch_size=12, **options)
  for (one, num), (other, other_num) in zip(alone, found, strict=True):
    same(one, other)
    assert num == other_num


def test_forced_confidence_follows_each_step_of_a_beam_and_adds_nothing_to_its_sum():
  found = model_of().beam(some_prompts(SHORT), width=3, stop_ids=[1], watch=WATCH, **SETTINGS)
  followed = 0
  for one, num in found:
    assert num >= 3 * len(one.tokens)
    assert all(
      (token in WATCH.end_ids) == (after in WATCH.confidence_ids)
      for token, after in itertools.pairwise(one.tokens.tolist())
    )
    followed += sum(token in WATCH.confidence_ids for token in one.tokens.tolist())
  assert followed


def test_streams_are_those_from_which_a_full_pass_computes_the_log_p():
  sampler, places = model_of(), [[0], [1, 4, 3], [], [0, 31]]
  streams = sampler.streams(some_prompts(SHORT), places, batch_size=4)
  for prompt, wanted, stream_JD in zip(some_prompts(SHORT), places, streams, strict=True):
    assert stream_JD.shape == (len(wanted), CONFIG.width)
    logits_JV = llama.logits(sampler.params, CONFIG, jnp.asarray(stream_JD)[None])[0]
    np.testing.assert_allclose(jax.nn.log_softmax(logits_JV), logprobs_after(prompt)[wanted], atol=1e-4)

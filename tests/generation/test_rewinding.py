"""Decoding with mistakes hidden from what follows them gives the numbers of training's mask on the whole text."""

import dataclasses
import functools

import datakit
import jax
import numpy as np
import pytest
from modelkit import mesh_of
from samplerkit import CONFIG, laid_out, model_of, params, some_prompts

from insec_jax.data import pipeline, vocabulary
from insec_jax.generation import batching, placement
from insec_jax.generation.generator import TextGenerator
from insec_jax.generation.loading import LoadedModel, with_ids
from insec_jax.generation.sampler import Sampler
from insec_jax.method import rewind
from insec_jax.method.rewind import BLANK, CONFIDENCE, FIX, FLAG, LINE_END, NEVER, SPECIAL, WORD
from insec_jax.model import build, llama

# Of 61 tokens; random text has every case in it, malformed ones too.
KINDS = np.repeat([WORD, LINE_END, BLANK, SPECIAL, FLAG, FIX, CONFIDENCE], [27, 12, 3, 1, 8, 8, 2]).astype(np.int8)
W, N, F, X = 5, 30, 45, 53  # a word, the end of a line, a flag and a fix
MISTAKE = (W, N, F, W, X)
# Beginnings that end in each phase of a correction, and after one.
CORRECTED = [W, N, 6, N, *MISTAKE, 7, N, 8, N, 9, 31, F, X, 10, 32, 11]
BEGINNINGS = [np.array(CORRECTED[:length], np.int32) for length in range(4, len(CORRECTED) + 1)]
PROMPTS = [*BEGINNINGS, *some_prompts((33, 1, 50, 5, 31, 32, 70))]
OPTIONS = {"max_tokens": 40, "temperature": 1.0, "seed": 3, "stop_ids": []}


@functools.partial(jax.jit, static_argnames="config")
def full_pass(config, weights, token_1T, position_1T, until_1T):
  model = llama.Llama(config, "float32", "none")
  stream_1TD = model.apply({"params": weights}, token_1T, position_1T, np.ones(token_1T.shape, np.int32), until_1T)
  return jax.nn.log_softmax(llama.logits(weights, config, stream_1TD))


def masked_logprobs(token_T, config=CONFIG, weights=None, kind_V=KINDS):
  """(log p of each token by one pass with training's mask, 0 for the first; how many tokens it hides)."""
  token_1T = np.zeros((1, 128), np.int32)  # what follows changes nothing before it
  token_1T[0, : len(token_T)] = token_T
  seen = rewind.visibility(kind_V[token_1T])
  weights = params() if weights is None else weights
  logprob_TV = np.asarray(full_pass(config, weights, token_1T, seen.position_BT, seen.until_BT))[0]
  logprob_T = logprob_TV[np.arange(len(token_T) - 1), token_T[1:]]
  return np.concatenate([[0], logprob_T]), int((seen.until_BT[0] < len(token_T)).sum())


def assert_as_masked(prompts, written, *model):
  """Every token has the log p of the masked pass; much is hidden, in the prompts and after."""
  hidden = 0
  for prompt, sampled in zip(prompts, written, strict=True):
    logprob_T, num = masked_logprobs(np.concatenate([prompt, sampled.tokens]), *model)
    np.testing.assert_allclose(sampled.logprobs, logprob_T[len(prompt) :], atol=3e-5)
    hidden += num
  assert hidden > 4 * len(prompts)


def test_sampled_tokens_have_the_log_p_of_the_whole_text_under_trainings_mask(monkeypatch):
  """In a batch that is filled again, grows in slots and ends in fewer rows."""
  monkeypatch.setattr(batching, "FEWEST", 1)
  written = model_of(kind_V=KINDS).generate(PROMPTS, batch_size=6, **OPTIONS | {"stop_ids": [1, 2, 3]})
  assert len({len(one.tokens) for one in written}) > 10  # so that a batch grows while other rows are being written
  assert_as_masked(PROMPTS, written)


@pytest.mark.slow
def test_without_the_mask_the_numbers_are_others():
  written = model_of().generate(PROMPTS, batch_size=6, **OPTIONS)
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    assert_as_masked(PROMPTS, written)


@pytest.mark.slow
def test_rows_and_heads_on_four_devices_have_the_same_numbers():
  even = dataclasses.replace(CONFIG, vocab_size=64)  # divides
  weights, mesh = build.init(even, jax.random.key(0), "float32"), mesh_of((2, 1, 2))
  model = Sampler(even, laid_out(weights, even, mesh), compute="float32", mesh=mesh, kind_V=KINDS)
  assert (model.kind_V[len(KINDS) :] == WORD).all()
  written = model.generate(PROMPTS, batch_size=8, **OPTIONS)
  kinds = np.append(KINDS, [WORD] * 3).astype(np.int8)
  assert_as_masked(PROMPTS, written, even, weights, kinds)


def test_the_log_p_of_given_texts_are_those_of_trainings_mask():
  texts = [np.concatenate([beginning, *some_prompts((60,))]) for beginning in BEGINNINGS]
  for text, got_T in zip(texts, model_of(kind_V=KINDS).logprobs(texts, batch_size=8), strict=True):
    np.testing.assert_allclose(got_T, masked_logprobs(text)[0], atol=3e-5)


@pytest.mark.slow
def test_a_row_that_is_filled_again_reads_nothing_as_hidden_that_was_hidden_before():
  together = model_of(kind_V=KINDS).generate(PROMPTS, batch_size=2, **OPTIONS)
  for index in (0, len(PROMPTS) - 1):
    (alone,) = model_of(kind_V=KINDS).generate([PROMPTS[index]], batch_size=1, first=index, **OPTIONS)
    assert alone.tokens.tolist() == together[index].tokens.tolist()


REST = [12, N, 13, 14, 32, 15, 16]
WORDS = [(W, N, F, X), (20, 21, 22, 23, N, F, 24, X), (9, N, F, 10, 11, 12, 13, X)]  # a mistake up to its fix


@pytest.mark.parametrize(
  ("layers", "correction"),
  [(2, [31]), (1, [31]), (1, [17, 18, 31])],  # of one token, which ends its line, or of several
)
def test_what_follows_is_the_text_without_the_mistake_to_the_bit_of_sums(layers, correction):
  """A correction of one token, or any in one layer, has keys and values that depend on no token before it."""
  assert_same_after(layers, correction, differs=False)


def test_words_of_a_mistake_reach_what_follows_through_the_correction_alone():
  """In the second layer a key of the correction was computed with the mistake in view; see the test above."""
  assert_same_after(2, [17, 18, 31], differs=True)


def assert_same_after(layers, correction, *, differs):
  config = dataclasses.replace(CONFIG, num_layers=layers)
  model = model_of(config, build.init(config, jax.random.key(0), "float32"), kind_V=KINDS)
  texts = [np.array([W, N, 6, N, *words, *correction, *REST], np.int32) for words in ([], *WORDS)]
  clean, *corrected = (logprob_T[-len(REST) :] for logprob_T in model.logprobs(texts, batch_size=4))
  for logprob_T in corrected:
    if differs:
      assert np.abs(logprob_T - clean).max() > 1e-3
    else:
      np.testing.assert_allclose(logprob_T, clean, atol=2e-6)


def test_the_state_after_a_prompt_is_that_of_writing_it():
  """A greedy text is the same wherever the prompt ends and the writing begins."""
  model = model_of(kind_V=KINDS)
  (whole,) = model.generate([BEGINNINGS[0]], batch_size=1, **OPTIONS)
  text = np.concatenate([BEGINNINGS[0], whole.tokens])
  greedy = OPTIONS | {"temperature": 0.0, "max_tokens": 8}
  prompts = [text[:length] for length in range(4, len(text), 3)]
  for prompt, one in zip(prompts, model.generate(prompts, batch_size=16, **greedy), strict=True):
    np.testing.assert_allclose(
      one.logprobs, masked_logprobs(np.concatenate([prompt, one.tokens]))[0][len(prompt) :], atol=3e-5
    )


def test_the_programs_read_transcripts_as_they_were_trained_on():
  """From the tokenizer on: the rows of a task with the config's mistakes, and the text generator of its model."""
  config = datakit.config(
    task__name="graph",
    task__min_size=3,
    task__max_size=3,
    task__modulus=10,
    mistakes__source="injected",
    mistakes__share=1.0,
    mistakes__max_per_solution=3,
    mistakes__rewind=True,
    data__num_records=8,
    data__row_length=128,
  )
  marked = vocabulary.open_tokenizer(config)
  model = dataclasses.replace(CONFIG, vocab_size=len(marked.tokenizer), max_positions=128)
  weights, mesh = build.init(model, jax.random.key(0), "float32"), placement.one_device()
  loaded = LoadedModel(model, laid_out(weights, model, mesh), marked.tokenizer, mesh, "float32")
  loaded = with_ids(loaded._replace(rewind=True, unit="line", template="plain"), config.tokenizer)
  examples = pipeline.first_examples(config, marked.tokenizer, 8)
  read = TextGenerator(loaded).sampler.logprobs([example.token_T for example in examples], batch_size=8)
  for example, logprob_T in zip(examples, read, strict=True):
    arrays = (example.token_T, example.position_T, example.until_T)
    padded = (np.pad(array, (0, 128 - len(array)))[None] for array in arrays)
    logprob_TV = np.asarray(full_pass(model, weights, *padded))[0]
    expected_T = logprob_TV[np.arange(len(logprob_T) - 1), example.token_T[1:]]
    np.testing.assert_allclose(logprob_T[1:], expected_T, atol=3e-5)
    assert (example.until_T < NEVER).any()

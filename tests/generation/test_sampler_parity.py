"""Greedy text of the real 135M model is transformers', token for token, alone and in a batch of different lengths."""

import functools

import numpy as np
import pytest
import smollm2
from samplerkit import model_of

from insec_jax.data import vocabulary
from insec_jax.generation.batching import bucket
from insec_jax.generation.sampler import SampledTokens, Sampler
from insec_jax.model import hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.skipif(bool(smollm2.missing()), reason=smollm2.missing())]

NUM_TOKENS = 64
TEXTS = (
  "2",
  "Paris is",
  "The capital of Japan is",
  "1, 1, 2, 3, 5, 8,",
  "def add(a, b):\n  return",
  "Once upon a time, there was",
  "<|im_start|>user\nWhat is 17 + 25? Think step by step.<|im_end|>\n<|im_start|>assistant\n",
  "Water boils at",
  "A haiku about the sea:\n",
  "To make an omelette, first you should",
  "Tom has 5 apples. He buys 7 more and gives 3 to Ann. How many apples does he have now? Let us work it out.\n",
  "The three laws of motion are as follows.\n1.",
  "Dear Sir or Madam,\n\nI am writing to you because",
  "x = 3; y = 4; x * y =",
  "Q: Is a tomato a fruit or a vegetable?\nA:",
  "The following is a list of the planets of our solar system, with the distance of each from the sun in million km "
  "and the length of its year in days, from the nearest to the farthest.\n- Mercury,",
)


@functools.cache
def prompts() -> list[np.ndarray]:
  tokenizer = vocabulary.load(str(smollm2.folder()))
  return [np.array(tokenizer(text)["input_ids"], np.int32) for text in TEXTS]


@functools.cache
def from_transformers() -> list[list[int]]:
  model = transformers.AutoModelForCausalLM.from_pretrained(smollm2.folder(), dtype=torch.float32)
  written = []
  for prompt in prompts():
    tokens_1T = torch.tensor(prompt[None].astype(np.int64))
    out_1T = model.generate(
      tokens_1T, attention_mask=torch.ones_like(tokens_1T), do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0
    )
    written.append(out_1T[0, len(prompt) :].tolist())
  return written


@functools.cache
def sampler() -> Sampler:
  config = hf.read_config(smollm2.folder())
  return model_of(config, hf.load(smollm2.folder(), config, dtype="float32"))


def write(some: list[np.ndarray], batch_size: int) -> list[SampledTokens]:
  return sampler().generate(some, max_tokens=NUM_TOKENS, stop_ids=sampler().config.eos_ids, batch_size=batch_size)


@functools.cache
def together() -> list[SampledTokens]:
  return write(prompts(), 16)


def test_prompts_of_different_lengths_in_one_batch_give_the_text_of_transformers():
  lengths = {len(prompt) for prompt in prompts()}
  assert len(lengths) >= 10
  assert {bucket(length) for length in lengths} == {32, 64}
  assert [one.tokens.tolist() for one in together()] == from_transformers()


def test_one_prompt_at_a_time_gives_the_text_of_transformers():
  assert [write([prompt], 1)[0].tokens.tolist() for prompt in prompts()[::4]] == from_transformers()[::4]


def test_the_model_ends_some_texts_itself():
  assert {one.finish for one in together()} == {"stop", "length"}

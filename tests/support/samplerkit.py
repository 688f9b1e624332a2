"""What the tests of decoding share: a small random model, prompts, and its log p by one full pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from modelkit import small_llama

from insec_jax.generation import placement
from insec_jax.generation.sampler import SampledTokens, Sampler
from insec_jax.model import build, llama

CONFIG = small_llama(vocab_size=61, max_positions=256, stored_dtype="float32", source="{}")
FLAG = 7
LENGTHS = (33, 1, 50, 5, 31, 32)  # in two buckets, not in order
SETTINGS = {"max_tokens": 12, "batch_size": 4}  # the same throughout: each shape compiles once


@functools.cache
def params():
  return build.init(CONFIG, jax.random.key(0), "float32")


def model_of(config=CONFIG, weights=None, **options) -> Sampler:
  """The model on one device; random weights where none are given."""
  mesh = placement.one_device()
  ready = laid_out(params() if weights is None else weights, config, mesh)
  return Sampler(config, ready, compute="float32", mesh=mesh, **options)


def laid_out(params, config, mesh):
  """Float32 params as decoding has them on the mesh."""
  return jax.device_put(llama.unstack(params, config), placement.params_shardings(config, mesh))


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
  token_1T = np.zeros((1, 128 * -(-len(token_T) // 128)), np.int32)  # what follows moves nothing before it
  token_1T[0, : len(token_T)] = token_T
  return np.asarray(full_pass(params(), token_1T))[0, : len(token_T)]


def logprobs_while(prompt, written) -> np.ndarray:
  """The same, in place of each written token."""
  return logprobs_after(np.concatenate([prompt, written.tokens]))[len(prompt) - 1 : -1]


def same(a: SampledTokens, b: SampledTokens) -> None:
  assert a.tokens.tolist() == b.tokens.tolist()
  assert a.finish == b.finish
  np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)

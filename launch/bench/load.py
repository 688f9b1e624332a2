"""Seconds to open a model for decoding beside transformers: a Hugging Face folder to weights ready on the CPU.

  launch/bench.sh load [--model=FOLDER] [--dtype=float32|bfloat16]

The file is in the page cache on both sides after the first round, which is not counted. Every weight is read: a sum
over all of them is part of the work, since transformers maps the file and would otherwise read it later.
"""

import argparse
from collections.abc import Callable

import race
import real_model
from race import Work


def ours(arguments: argparse.Namespace) -> Callable[[], Work]:
  """`loading.load_model`, with which generate, evaluate and mine open a model."""
  import jax

  from insec_jax.generation import loading

  total = jax.jit(lambda params: sum(weight.astype("float32").sum() for weight in jax.tree.leaves(params)))

  def work() -> Work:
    params = loading.load_model(arguments.model, compute=arguments.dtype).params
    return Work(1, [round(float(total(params)))])

  work()
  return work


def transformers(arguments: argparse.Namespace) -> Callable[[], Work]:
  """`from_pretrained` of model and tokenizer."""
  import torch
  from transformers import AutoModelForCausalLM, AutoTokenizer

  def work() -> Work:
    AutoTokenizer.from_pretrained(arguments.model)
    network = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    with torch.inference_mode():
      return Work(1, [round(sum(weight.float().sum() for weight in network.parameters()).item())])

  work()
  return work


def main() -> None:
  """Run the race."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  real_model.add_flag(parser)
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  race.main({"insec_jax": ours, "transformers": transformers}, parser, unit="models", prepare=real_model.build)


if __name__ == "__main__":
  main()

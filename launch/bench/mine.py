"""Speed of mining beside transformers and vLLM: the same problems of GSM8K, the same checks, float32.

  launch/bench.sh mine --data=GSM8K/train.jsonl [--model=FOLDER] [--vllm=PYTHON] [--problems=32] [--samples=1]
      [--temperature=0] [--rows=16] [--max_tokens=192]

Each side writes a solution of each problem, finds the first wrong step, goes on from the right step in its place, and
makes the records that training accepts, all by `insec_jax.mining`. Only what writes the texts differs:

    insec_jax      its sampler, as in the program mine: a row that ends makes room for the next text
    transformers   `generate` with its defaults, in batches of --rows texts, padded on the left
    vllm           a server of vLLM on loopback that gets --rows requests at once, as with mine --server

Greedy, the default, all sides write the same texts but for ties in rounding, and so find the same mistakes; the last
column counts those of the first turn that are the same. With --temperature=1, as the program mine has it, draws differ.
FOLDER has the tokenizer of SmolLM2; default: SmolLM2-135M. PYTHON is as in `decode`. Reading data and model is not
measured.
"""

import argparse
import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

import numpy as np
import race
import real_model
from race import Work

START_SECONDS = 300  # for vLLM to answer
MARKERS = ("<repo_name>", "<file_sep>")  # special tokens of SmolLM2 that no solution has


def config(arguments: argparse.Namespace):
  """Return the config of the mining."""
  from insec_jax import config_build, config_file

  made = config_file.load("configs/smollm2_gsm8k.py")
  made.model.path = arguments.model
  made.data.path = str(arguments.data)
  made.tokenizer.flag, made.tokenizer.fix = MARKERS
  made.evaluate.update(max_tokens=arguments.max_tokens, batch_size=arguments.rows)
  made.mine.update(num_problems=arguments.problems, samples=arguments.samples)
  return config_build.build(made)


class Recorded:
  """Engine that keeps what another one writes: the texts of each call since `texts` was emptied."""

  def __init__(self, engine):
    self.config, self.texts, self._engine = engine.config, [], engine

  def generate(self, prompts, **options):
    """Return the texts of the engine."""
    written = self._engine.generate(prompts, **options)
    self.texts.append([sampled.tokens.tolist() for sampled in written])
    return written


def mining(arguments: argparse.Namespace, writer) -> Callable[[], Work]:
  """Return the mining of all problems with a TextGenerator."""
  from insec_jax.method import tasks
  from insec_jax.mining import miner

  settings = config(arguments)
  miner.TEMPERATURE = arguments.temperature
  writer.sampler = engine = Recorded(writer.sampler)
  made = miner.Miner(writer, tasks.get(settings.task), settings, seed=settings.seed, weights="")

  def work() -> Work:
    engine.texts.clear()
    chunks = [made.chunk(number) for number in range(made.num_chunks)]
    classes = [record["meta"]["classes"] for chunk in chunks for record in chunk["records"]]
    wrong = sum(chunk["counts"]["wrong"] for chunk in chunks)
    found = {"wrong solutions": wrong, "mistakes in records": sum(map(len, classes))}
    return Work(sum(len(text) for texts in engine.texts for text in texts), engine.texts[0], found=found)

  work()
  return work


def open_model(arguments: argparse.Namespace):
  """Return the model with the markers of the config."""
  from insec_jax.generation import loading

  loaded = loading.load_model(arguments.model, compute="float32")
  return loading.with_markers(loaded, config(arguments), arguments.model)


def ours(arguments: argparse.Namespace) -> Callable[[], Work]:
  """The program `mine` without its files."""
  from insec_jax.generation.generator import TextGenerator

  return mining(arguments, TextGenerator(open_model(arguments)))


class Batches:
  """Engine that is transformers' `generate`, a batch after the other."""

  def __init__(self, folder: str, model_config):
    import torch
    from transformers import AutoModelForCausalLM

    self.config = model_config
    self._network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

  def generate(self, prompts, *, batch_size: int, **options):
    """Return the text of each prompt."""
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    return [sampled for batch in batches for sampled in self._batch(batch, **options)]

  def _batch(self, prompts, *, max_tokens: int, temperature: float, seed: int, stop_ids, flag_id, **_):
    import torch

    from insec_jax.generation.sampler import SampledTokens

    length = max(map(len, prompts))
    padded = np.full((len(prompts), length), stop_ids[0], np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
      row[length - len(prompt) :] = prompt
    mask = np.arange(length) >= length - np.array([[len(prompt)] for prompt in prompts])
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    with torch.inference_mode():
      written = self._network.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        max_new_tokens=max_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        suppress_tokens=[flag_id],
        **(draws if temperature else {"do_sample": False}),
      )
    texts = []
    for token_T in written[:, length:].numpy().astype(np.int32):
      ends = np.flatnonzero(np.isin(token_T, stop_ids))
      token_T = token_T[: ends[0] + 1] if len(ends) else token_T
      texts.append(SampledTokens(token_T, np.zeros(len(token_T)), "stop" if len(ends) else "length", None, None))
    return texts


def transformers(arguments: argparse.Namespace) -> Callable[[], Work]:
  """The same mining with the texts of transformers."""
  from insec_jax.generation.generator import TextGenerator

  writer = TextGenerator(open_model(arguments))
  writer.sampler = Batches(arguments.model, writer.sampler.config)
  return mining(arguments, writer)


def vllm(arguments: argparse.Namespace) -> Callable[[], Work]:
  """The same mining with the texts of a server of vLLM, which ends with this process's group."""
  from insec_jax.generation import loading, server
  from insec_jax.generation.generator import TextGenerator

  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{unused.getsockname()[1]}"
  words = "-m vllm.entrypoints.openai.api_server --served-model-name mined --dtype float32 --enforce-eager "
  words += f"--no-enable-prefix-caching --max-model-len 2048 --host 127.0.0.1 --port {url.rpartition(':')[2]}"
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
  process = subprocess.Popen([arguments.vllm, *words.split(), "--model", arguments.model], env=environment)
  deadline = time.monotonic() + START_SECONDS
  while not answers(url):
    if process.poll() is not None or time.monotonic() > deadline:
      raise SystemExit("error: vLLM does not answer; its message is above")
    time.sleep(1)
  loaded = loading.load_model(arguments.model, weights=False)
  served = server.connect(url, loaded.tokenizer, requests=arguments.rows)
  loaded = loading.with_markers(loaded._replace(server=served), config(arguments), arguments.model)
  return mining(arguments, TextGenerator(loaded))


def answers(url: str) -> bool:
  """Return whether the server answers."""
  with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/models", timeout=5):
    return True
  return False


def prepare(arguments: argparse.Namespace) -> dict[str, str | None]:
  """Make the model; check the file of problems; leave vLLM out where it is not named."""
  if not arguments.data.is_file():
    print(f"error: --data={arguments.data} is no file; give GSM8K's train.jsonl", file=sys.stderr)
    raise SystemExit(2)
  real_model.build(arguments)
  return {} if arguments.vllm else {"vllm": None}


def main() -> None:
  """Run the race."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  real_model.add_flag(parser)
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--vllm", default=os.environ.get("INSEC_VLLM"), help="interpreter of an environment with vLLM")
  parser.add_argument("--problems", type=int, default=32)
  parser.add_argument("--samples", type=int, default=1, help="solutions of each problem")
  parser.add_argument("--temperature", type=float, default=0.0)
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--max_tokens", type=int, default=192)
  sides = {"insec_jax": ours, "transformers": transformers, "vllm": vllm}
  race.main(sides, parser, unit="tokens", prepare=prepare)


if __name__ == "__main__":
  main()

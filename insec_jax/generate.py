"""Generation of text after prompts: reads JSON lines, writes JSON lines in the same order.

  python -m insec_jax.generate --model DIR --prompts P.jsonl --output O.jsonl [--max_tokens --temperature --top_p --seed
      --flag_bias --flag_above --logprobs --clean --mesh] [--num_processes N --process_id I] [--server URL]

  in    {"prompt": "2+3="}  or  {"tokens": [17, 4]}; other fields are copied to the output
  out   {"prompt", "text", "clean", "tokens", "logprobs", "finish"}

`text` is the output of the model, markers included; `clean` is its clean view, the same where the model has no markers.
With --clean, `text` is the clean view too, for end users. `tokens` are the sampled ids, with the stop token last where
`finish` is "stop". `logprobs`, with --logprobs, are their log probabilities under the model's own distribution
(temperature 1, no top_p, no bias), else null. A prompt of tokens is used unchanged, special tokens included.

After a kill the same command resumes from O.jsonl.parts. Processes do not communicate: each, started with its
--process_id, writes its share, and the last to finish writes the file, which is the same for any number of them.

With --server the weights are those of a server of OpenAI's completions, such as vLLM, and --model gives the tokenizer,
the template and the markers only. Greedy texts are the same; at a temperature the server draws others for the same
seed. --flag_above needs the weights here.
"""

import math

from absl import flags

from insec_jax import command, flags_help
from insec_jax.distributed import shares
from insec_jax.generation.flags import define_decoding_flags, define_model_flags

with flags_help.group("Input and output"):
  MODEL, STEP = define_model_flags()
  PROMPTS = flags.DEFINE_string("prompts", None, 'JSON lines file, each line {"prompt": text} or {"tokens": [ids]}.')
  OUTPUT = flags.DEFINE_string("output", None, "File to write, one line per prompt; it appears when complete.")
  LOGPROBS = flags.DEFINE_bool("logprobs", False, "Write the log probability of each token.")
  CLEAN = flags.DEFINE_bool("clean", False, "Write the clean view in place of the text.")
with flags_help.group("Decoding"):
  MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 256, "Maximum number of new tokens, including the stop token.", lower_bound=1, upper_bound=1 << 20
  )
  TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Sampling temperature; 0: greedy.", lower_bound=0.0, upper_bound=1_000.0
  )
  TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens with this total probability.", 0.0, 1.0)
  SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Sampling seed. A prompt's sample depends on its line number, not on the batch.",
    lower_bound=0,
    upper_bound=2**32 - 1,
  )
  FLAG_BIAS = flags.DEFINE_float(
    "flag_bias", 0.0, "Bias added to the logit of the flag; -inf: never flag.", upper_bound=10_000.0
  )
  FLAG_ABOVE = flags.DEFINE_float(
    "flag_above",
    math.inf,
    "Flag a step when the largest -log p of its tokens, without the first, is above this (0.7: p below 0.5); "
    "evaluate chooses a value.",
  )
MESH = define_decoding_flags()
flags.mark_flags_as_required(["model", "prompts", "output"])

command.begin(__name__)

import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from insec_jax.command import InputError
from insec_jax.data.encoding import least_tokens
from insec_jax.files.chunks import ChunkStore, one_process, unfinished
from insec_jax.files.reading import local_path
from insec_jax.files.writing import check_output, is_stream, written_whole
from insec_jax.generation import engine
from insec_jax.generation.batching import rows_that_fit
from insec_jax.generation.generator import Completion, TextGenerator
from insec_jax.generation.loading import LoadedModel
from insec_jax.generation.prompts import Prompt, read_prompts
from insec_jax.generation.sampler import check_prompt
from insec_jax.method.transcript import clean_text

PROMPTS_PER_CHUNK = 2_048  # the same on every machine: a run may go on with other devices


def main() -> None:
  if 0 < TEMPERATURE.value < 0.001:
    raise InputError(f"--temperature={TEMPERATURE.value}; must be 0 (the likeliest token) or at least 0.001")
  process, num_processes = shares.share_of_work()
  prompts = read_prompts(PROMPTS.value)
  check_output(OUTPUT.value, "--output", [PROMPTS.value])
  with one_process(OUTPUT.value, process):
    if not generate(prompts, process=process, num_processes=num_processes):
      print(unfinished(process, num_processes, OUTPUT.value), file=sys.stderr, flush=True)


def generate(prompts: Sequence[Prompt], *, process: int, num_processes: int) -> bool:
  """Write the output and return True; False where other processes have not finished."""
  if engine.uses_server() and FLAG_ABOVE.value < math.inf:
    raise InputError(f"--flag_above={FLAG_ABOVE.value}: a server cannot force flags while decoding; leave one flag out")
  opened = engine.open_model(MODEL.value, step=STEP.value, mesh=MESH.value)
  writer = TextGenerator(opened)
  tokens = [encode(prompt, writer, opened) for prompt in prompts]
  if is_stream(local_path(OUTPUT.value, "--output")):
    write([lines(first, prompts, tokens, writer, opened) for first in range(0, len(prompts), PROMPTS_PER_CHUNK)])
    return True
  store = ChunkStore(OUTPUT.value, {"prompts": digest(prompts), "model": engine.identity(opened), **options()})
  chunks = range(0, len(prompts), PROMPTS_PER_CHUNK)
  store.fill(
    len(chunks),
    lambda chunk: lines(chunks[chunk], prompts, tokens, writer, opened),
    process=process,
    num_processes=num_processes,
  )
  return store.join(len(chunks), write) is not None


def options() -> dict[str, Any]:
  """Return the flags that the texts depend on."""
  named = (MAX_TOKENS, TEMPERATURE, TOP_P, SEED, FLAG_BIAS, FLAG_ABOVE, LOGPROBS, CLEAN)
  return {flag.name: repr(flag.value) for flag in named}


def digest(prompts: Sequence[Prompt]) -> str:
  """Return the SHA-256 of the prompts with the fields that are copied to the output."""
  contents = [(prompt.text, prompt.tokens, prompt.carried) for prompt in prompts]
  return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def write(chunks: Sequence[list[dict]]) -> bool:
  """Write the lines of all chunks to the output."""
  with written_whole(OUTPUT.value, inputs=[PROMPTS.value]) as file:
    for line in itertools.chain(*chunks):
      file.write(json.dumps(line, ensure_ascii=False) + "\n")
  return True


def lines(
  first: int, prompts: Sequence[Prompt], tokens: Sequence[np.ndarray], writer: TextGenerator, opened: LoadedModel
) -> list[dict]:
  """Return the output of the prompts of the chunk that begins at `first`."""
  chosen = slice(first, first + PROMPTS_PER_CHUNK)
  slots = max(map(len, tokens)) + MAX_TOKENS.value
  rows = len(prompts)  # a server makes its own batches
  if opened.server is None:
    rows = rows_that_fit(opened.config, slots=slots, compute=opened.compute, mesh=opened.mesh)
  written = writer.write(
    tokens[chosen],
    label=f"generate, from prompt {first + 1}" if len(prompts) > PROMPTS_PER_CHUNK else "generate",
    max_tokens=MAX_TOKENS.value,
    temperature=TEMPERATURE.value,
    top_p=TOP_P.value,
    seed=SEED.value,
    flag_bias=FLAG_BIAS.value,
    watch=None if FLAG_ABOVE.value == math.inf else writer.watch(FLAG_ABOVE.value),
    batch_size=min(len(prompts), rows),
    first=first,
  )
  return [
    line(prompt, begin, completion, writer, opened)
    for prompt, begin, completion in zip(prompts[chosen], tokens[chosen], written, strict=True)
  ]


def encode(prompt: Prompt, writer: TextGenerator, opened: LoadedModel) -> np.ndarray:
  """Return the tokens of a prompt; InputError, with file and line, unless they and --max_tokens more fit the model."""
  try:
    most = opened.config.max_positions
    if prompt.text is not None and (least := least_tokens(prompt.text, most, writer.tokenizer)) > most:
      raise InputError(  # at once: to encode megabytes takes seconds
        f"at least {least} tokens do not fit in the model's {most} positions; shorten the prompt"
      )
    tokens = prompt.tokens if prompt.text is None else writer.encode(prompt.text)
    check_prompt(tokens, opened.config, MAX_TOKENS.value)
  except InputError as error:
    raise InputError(f"{prompt.where}: {error}") from error
  return np.array(tokens, np.int32)


def line(prompt: Prompt, begin: Sequence[int], written: Completion, writer: TextGenerator, opened: LoadedModel) -> dict:
  """Return the output fields of one prompt."""
  clean = written.text if opened.markers is None else clean_text(written.text, opened.markers, opened.unit)
  return {
    "prompt": writer.decode(begin) if prompt.text is None else prompt.text,
    "text": clean if CLEAN.value else written.text,
    "clean": clean,
    "tokens": written.generation.tokens.tolist(),
    "logprobs": written.generation.logprobs.tolist() if LOGPROBS.value else None,
    "finish": written.generation.finish,
    **prompt.carried,
  }


if __name__ == "__main__":
  command.run(main)

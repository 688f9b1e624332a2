"""Generation of text after prompts: reads JSON lines, writes JSON lines in the same order.

  python -m insec_jax.generate --model DIR --prompts P.jsonl --output O.jsonl [--max_tokens --temperature --top_p --seed
      --flag_bias --flag_above --logprobs --clean]

  in    {"prompt": "2+3="}  or  {"tokens": [17, 4]}; other fields are copied to the output
  out   {"prompt", "text", "clean", "tokens", "logprobs", "finish"}

`text` is the output of the model, markers included; `clean` is its clean view, the same where the model has no markers.
With --clean, `text` is the clean view too, for end users. `tokens` are the sampled ids, with the stop token last where
`finish` is "stop". `logprobs`, with --logprobs, are their log probabilities under the model's own distribution
(temperature 1, no top_p, no bias), else null. A prompt of tokens is used unchanged, special tokens included.
"""

import json
import math
from collections.abc import Sequence

import numpy as np
from absl import flags

from insec_jax import command
from insec_jax.command import InputError
from insec_jax.data.encoding import least_tokens
from insec_jax.files.writing import written_whole
from insec_jax.generation.batching import rows_that_fit
from insec_jax.generation.generator import Completion, TextGenerator
from insec_jax.generation.loading import LoadedModel, compute_dtype, load_model
from insec_jax.generation.prompts import Prompt, read_prompts
from insec_jax.generation.sampler import check_prompt
from insec_jax.method.transcript import clean_text

MODEL = flags.DEFINE_string("model", None, "Workdir of train, or Hugging Face folder.")
STEP = flags.DEFINE_integer("step", None, "Step of the workdir's checkpoint to use (default: newest).", lower_bound=0)
PROMPTS = flags.DEFINE_string("prompts", None, 'JSON lines file, each line {"prompt": text} or {"tokens": [ids]}.')
OUTPUT = flags.DEFINE_string("output", None, "File to write, one line per prompt; it appears when complete.")
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
LOGPROBS = flags.DEFINE_bool("logprobs", False, "Write the log probability of each token.")
CLEAN = flags.DEFINE_bool("clean", False, "Write the clean view in place of the text.")
flags.mark_flags_as_required(["model", "prompts", "output"])


def main() -> None:
  if 0 < TEMPERATURE.value < 0.001:
    raise InputError(f"--temperature={TEMPERATURE.value}; must be 0 (the likeliest token) or at least 0.001")
  prompts = read_prompts(PROMPTS.value)
  with written_whole(OUTPUT.value, inputs=[PROMPTS.value]) as file:
    opened = load_model(MODEL.value, step=STEP.value)
    compute = compute_dtype(opened)
    writer = TextGenerator(opened, compute=compute)
    tokens = [encode(prompt, writer, opened) for prompt in prompts]
    slots = max(map(len, tokens)) + MAX_TOKENS.value
    written = writer.write(
      tokens,
      label="generate",
      max_tokens=MAX_TOKENS.value,
      temperature=TEMPERATURE.value,
      top_p=TOP_P.value,
      seed=SEED.value,
      flag_bias=FLAG_BIAS.value,
      watch=None if FLAG_ABOVE.value == math.inf else writer.watch(FLAG_ABOVE.value),
      batch_size=min(len(prompts), rows_that_fit(opened.config, slots=slots, compute=compute)),
    )
    for prompt, begin, completion in zip(prompts, tokens, written, strict=True):
      file.write(json.dumps(line(prompt, begin, completion, writer, opened), ensure_ascii=False) + "\n")


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

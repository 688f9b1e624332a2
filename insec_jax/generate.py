"""Text after prompts: reads JSON lines, writes JSON lines in the same order.

  python -m insec_jax.generate --model DIR --prompts P.jsonl --output O.jsonl [--max_tokens --temperature --top_p --seed
      --flag_bias --flag_above --logprobs --clean]

  in    {"prompt": "2+3="}  or  {"tokens": [17, 4]}; what else stands on a line is carried along
  out   {"prompt", "text", "clean", "tokens", "logprobs", "finish"}

`text` is what the model wrote, markers included; `clean` its clean view, the same where the model has no markers. With
--clean `text` is the clean view too: what an end user should read. `tokens` are the ids chosen, the stop token last
where `finish` is "stop"; `logprobs`, with --logprobs, are theirs under the model's own distribution (temperature 1, no
top_p, no bias), else null. A prompt of tokens is read as it is; special tokens in it count.
"""

import json
import math
from collections.abc import Sequence

import numpy as np
from absl import flags

from insec_jax import command
from insec_jax.command import InputError
from insec_jax.files import written_whole
from insec_jax.generation.generator import Completion, TextGenerator, compute_dtype
from insec_jax.generation.prompts import Prompt, read_prompts
from insec_jax.generation.sampler import check_prompt, rows_that_fit
from insec_jax.method.transcript import clean_text
from insec_jax.training.checkpoint import LoadedModel, load_model

MODEL = flags.DEFINE_string("model", None, "A workdir of train, or an HF folder.")
STEP = flags.DEFINE_integer("step", None, "The checkpoint of a workdir to use; the newest if not given.", lower_bound=0)
PROMPTS = flags.DEFINE_string("prompts", None, 'JSON lines, each {"prompt": text} or {"tokens": [ids]}.')
OUTPUT = flags.DEFINE_string("output", None, "The file to write, one line per prompt; it appears when all is done.")
MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", 256, "Tokens to write at most, the stop token included.", lower_bound=1, upper_bound=1 << 20
)
TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "0 takes the likeliest token.", lower_bound=0.0, upper_bound=1_000.0
)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens that hold this much.", 0.0, 1.0)
SEED = flags.DEFINE_integer(
  "seed",
  0,
  "Of the draws; that of a prompt hangs on its line only, not on its neighbours.",
  lower_bound=0,
  upper_bound=2**32 - 1,
)
FLAG_BIAS = flags.DEFINE_float(
  "flag_bias", 0.0, "Added to the logit of the flag: above 0 flags more, -inf never.", upper_bound=10_000.0
)
FLAG_ABOVE = flags.DEFINE_float(
  "flag_above",
  math.inf,
  "Flag a step when the largest -log p of its tokens , the first "
  "left out, is above this: 0.7 is p below 0.5; evaluate finds a good value.",
)
LOGPROBS = flags.DEFINE_bool("logprobs", False, "Also write log p of each token.")
CLEAN = flags.DEFINE_bool("clean", False, "Write the clean view as text too.")
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
    for prompt, begin, one in zip(prompts, tokens, written, strict=True):
      file.write(json.dumps(line(prompt, begin, one, writer, opened), ensure_ascii=False) + "\n")


def encode(prompt: Prompt, writer: TextGenerator, opened: LoadedModel) -> np.ndarray:
  """The tokens of a prompt; InputError with its place unless the model can read them and write --max_tokens more."""
  try:
    tokens = prompt.tokens if prompt.text is None else writer.encode(prompt.text)
    check_prompt(tokens, opened.config, MAX_TOKENS.value)
  except InputError as error:
    raise InputError(f"{prompt.where}: {error}") from error
  return np.array(tokens, np.int32)


def line(prompt: Prompt, begin: Sequence[int], written: Completion, writer: TextGenerator, opened: LoadedModel) -> dict:
  """The output for one prompt."""
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

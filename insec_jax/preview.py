"""Preview of a config: its mask receipt and first examples, each token coloured by its role. No model is loaded.

python -m insec_jax.preview --config configs/X.py [--num N] [--html FILE]

Rows of data.cache are read, or made and kept there, as train does.
"""

from absl import flags

from insec_jax import command, config_file, flags_help

with flags_help.group("Input and output"):
  CONFIG = config_file.define_flag()
  NUM = flags.DEFINE_integer("num", 3, "Number of examples to show.", lower_bound=0, upper_bound=1_000_000)
  HTML = flags.DEFINE_string("html", None, "Also write the receipt and the examples to this HTML file.")
flags.mark_flag_as_required("config")

command.begin(__name__)

import itertools
import sys
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from insec_jax.config import Config
from insec_jax.config_build import build
from insec_jax.data import cache, pipeline, template, vocabulary
from insec_jax.data.tokens import Example
from insec_jax.files.writing import check_output, written_whole
from insec_jax.method import roles
from insec_jax.pages.elements import document, element, role_legend

ANSI = dict(zip(roles.NAMES, ("2", "39", "31", "1;33", "35", "32"), strict=True))
BYTES_OF_CHARACTER = 4  # at most, in UTF-8


def main() -> None:
  config = build(CONFIG.value)
  if HTML.value is not None:
    check_output(HTML.value, "--html", config_file.files_read(config))
  tokenizer = vocabulary.open_tokenizer(config).tokenizer
  template.fix_date(tokenizer, template.today())
  if line := cache.unused(config):
    print(line, file=sys.stderr, flush=True)
  text = pipeline.load_data(config, tokenizer).receipt
  print(text)
  if config.policy.is_on:
    print(f"policy.method={config.policy.method!r} trains on texts that the model samples, on none of these records\n")
    if config.policy.distills:
      print(f"after a prompt the teacher reads {config.mistakes.hint!r}\n")
  elif config.rounds:
    print(f"rounds={config.rounds} will mix in mined records, {config.mistakes.mined:.0%} of all; none is here yet\n")
  examples = pipeline.first_examples(config, tokenizer, NUM.value)
  for example in examples:
    print(coloured(example, tokenizer) if sys.stdout.isatty() else marked(example, tokenizer))
  if HTML.value is not None:
    with written_whole(HTML.value, "--html") as file:
      file.write(page(text, examples, tokenizer, config))


def token_texts(token_T: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
  """Return the text of each token; a character of several tokens is the text of the last one, the others are empty."""
  texts, waiting = [], []
  for token in token_T:
    waiting.append(int(token))
    text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if text.endswith("\ufffd") and len(waiting) < BYTES_OF_CHARACTER:
      texts.append("")
    else:
      texts.append(_escaped(text))
      waiting = []
  return texts


def _escaped(text: str) -> str:
  # A record must not be able to send control sequences to the terminal.
  return "".join(letter if letter.isprintable() or letter in "\n\t" else f"\\x{ord(letter):02x}" for letter in text)


def coloured(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
  """Return the example for a terminal: coloured by role, every other token underlined to show token boundaries."""
  shown = "".join(
    f"\x1b[0;{ANSI[roles.NAMES[role]]}{';4' if number % 2 else ''}m{text}"
    for number, (role, text) in enumerate(zip(example.role_T, token_texts(example.token_T, tokenizer), strict=True))
  )
  legend = " ".join(f"\x1b[0;{style}m{name}\x1b[0m" for name, style in ANSI.items())
  return f"{example.where}   {legend}\n{shown}\x1b[0m\n"


def marked(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
  """Return the example as plain text: role and weight in brackets before each run of tokens with the same two."""
  runs = itertools.groupby(_shown(example, tokenizer), key=lambda token: token[:2])
  return (
    f"{example.where}\n"
    + "".join(f"[{name} {weight:g}]" + "".join(text for *_, text in run) for (name, weight), run in runs)
    + "\n"
  )


def _shown(example: Example, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, float, int, str]]:
  texts = token_texts(example.token_T, tokenizer)
  for role, weight, token, text in zip(example.role_T, example.weight_T, example.token_T, texts, strict=True):
    yield roles.NAMES[role], float(weight), int(token), text


def page(text: str, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, config: Config) -> str:
  """Return one self-contained HTML page: receipt `text`, legend, examples with id, role and weight of each token."""
  worth = ", ".join(f"{name} {weight:g}" for name, weight in zip(roles.NAMES, config.loss.weight_R, strict=True))
  body = [
    element("h1", "Mask receipt"),
    element("pre", text),
    role_legend(),
    element("p", f"Worth of a token: {worth}. What is not trained is pale; point at a token to see its id."),
  ]
  for example in examples:
    shown = (
      element(
        "span", text, class_=name if weight else f"{name} masked", title=f"{name}, weight {weight:g}, token {token}"
      )
      for name, weight, token, text in _shown(example, tokenizer)
    )
    body += [element("h2", example.where), element("pre", *shown)]
  return document("Mask receipt", *body)


if __name__ == "__main__":
  command.run(main)

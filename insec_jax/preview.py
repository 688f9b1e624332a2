"""The mask receipt of a config and its first examples, each token coloured by its role. No model is loaded.

python -m insec_jax.preview --config configs/X.py [--num N] [--html FILE]
"""

import html
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from transformers import PreTrainedTokenizerFast

from insec_jax import command
from insec_jax import config as config_lib
from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import packing, pipeline, tokens
from insec_jax.data.tokens import Example
from insec_jax.method import roles

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file of values.", lock_config=True)
NUM = flags.DEFINE_integer("num", 3, "How many examples to show.", lower_bound=0)
HTML = flags.DEFINE_string("html", None, "Also write the receipt and the examples to this page.")
flags.mark_flag_as_required("config")

ANSI = dict(zip(roles.NAMES, ("2", "39", "31", "1;33", "35", "32"), strict=True))
BYTES_OF_CHARACTER = 4  # at most, in UTF-8

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Mask receipt</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
  pre, .example {{ font: 13px/1.7 ui-monospace, monospace; overflow-x: auto; white-space: pre-wrap; }}
  .example {{ border: 1px solid #8886; border-radius: 6px; padding: .6em .8em; }}
  .example b, .legend b {{ font-weight: inherit; border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 #8886; }}
  .legend b {{ padding: 1px 6px; }}
  .masked {{ opacity: .55; text-decoration: underline dotted; }}
  .prompt {{ background: #8883; }}  .text {{ background: none; }}  .mistake {{ background: #f443; }}
  .flag {{ background: #fb06; }}  .reason {{ background: #b5f4; }}  .correction {{ background: #3c64; }}
</style>
<h1>Mask receipt</h1>
<pre>{receipt}</pre>
<p class="legend">{legend} <span class="masked">not trained</span></p>
{examples}
</html>
"""


def main() -> None:
  config = config_lib.build(CONFIG.value)
  if HTML.value and not Path(HTML.value).absolute().parent.is_dir():
    raise InputError(f"--html={HTML.value}: there is no such folder; make it first")
  tokenizer = tokens.open_tokenizer(config).tokenizer
  examples = pipeline.load_examples(config, tokenizer, "train")
  pipeline.load_examples(config, tokenizer, "heldout")  # its errors are found here too, not after the first steps
  receipt = pipeline.receipt(examples, packing.pack(examples, config.data.row_length), config)
  print(receipt)
  for example in examples[: NUM.value]:
    print(coloured(example, tokenizer) if sys.stdout.isatty() else marked(example, tokenizer))
  if HTML.value:
    Path(HTML.value).write_text(page(receipt, examples[: NUM.value], tokenizer, config), encoding="utf-8")


def token_texts(token_T: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
  """What each token shows; a character made of several tokens is shown by the last of them, the others show nothing."""
  texts, waiting = [], []
  for token in token_T:
    waiting.append(int(token))
    text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if text.endswith("\ufffd") and len(waiting) < BYTES_OF_CHARACTER:
      texts.append("")
    else:
      texts.append(_harmless(text))
      waiting = []
  return texts


def _harmless(text: str) -> str:
  # A record must not be able to drive the terminal.
  return "".join(letter if letter.isprintable() or letter in "\n\t" else f"\\x{ord(letter):02x}" for letter in text)


def coloured(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
  """The example for a terminal: colour is the role, every other token is underlined to show where tokens end."""
  shown = "".join(
    f"\x1b[0;{ANSI[roles.NAMES[role]]}{';4' if number % 2 else ''}m{text}"
    for number, (role, text) in enumerate(zip(example.role_T, token_texts(example.token_T, tokenizer), strict=True))
  )
  legend = " ".join(f"\x1b[0;{style}m{name}\x1b[0m" for name, style in ANSI.items())
  return f"{example.where}   {legend}\n{shown}\x1b[0m\n"


def marked(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
  """The example as plain text: a mark with role and weight in front of each run of tokens that have both alike."""
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


def page(receipt: str, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, config: Config) -> str:
  """One self-contained page: receipt, legend, and the examples with id, role and weight at each token."""
  legend = " ".join(
    f'<b class="{name}">{name} {weight:g}</b>' for name, weight in zip(roles.NAMES, config.loss.weight_R, strict=True)
  )
  blocks = []
  for example in examples:
    spans = "".join(
      f'<b class="{name}{"" if weight else " masked"}" title="{name}, weight {weight:g}, token {token}">'
      f"{html.escape(text)}</b>"
      for name, weight, token, text in _shown(example, tokenizer)
    )
    blocks.append(f'<h2>{html.escape(example.where)}</h2>\n<div class="example">{spans}</div>')
  return PAGE.format(receipt=html.escape(receipt), legend=legend, examples="\n".join(blocks))


if __name__ == "__main__":
  command.run(main)

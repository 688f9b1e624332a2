"""A line of 10 MB takes no more than about ten times as long as one of 1 MB, in every format, with mistakes or not.

The time inside the tokenizers library is left out: it takes 14 to 19 times as long for ten times as much.
"""

import contextlib
import json
import time
from typing import NamedTuple

import pytest
from datakit import IM_TEMPLATE, bpe_tokenizer, config, write_lines

from insec_jax.command import InputError
from insec_jax.data import pipeline, tokens, vocabulary
from insec_jax.generation.prompts import read_prompts
from insec_jax.method.prose import CLASSES

pytestmark = pytest.mark.faults

MOST = 13  # ten, and what a busy machine adds
OTHER = {"messages": [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bob has 3 cats."}]}


def filled(size, unit):
  return unit * (size // len(unit) + 1)


def numbered(size, unit):
  """Return texts of a number each, no two alike."""
  return "".join(unit.format(k=k) for k in range(size // len(unit.format(k=10_000)) + 1))


def items(size, *unit):
  return list(unit) * (size // len(json.dumps(unit)) + 1)


def spans(size):
  num = size // 60
  return {
    "text": "ab " * num,
    "spans": [{"start": 3 * k, "end": 3 * k + 2, "role": "text", "weight": k % 5 + 1} for k in range(num)],
  }


MISTAKE = [
  {"role": role, "text": text}
  for role, text in (
    ("mistake", "1 + 1 = 3\n"),
    ("flag", "<err>"),
    ("reason", "sum"),
    ("flag", "<fix>"),
    ("correction", "1 + 1 = 2\n"),
  )
]
STORY = "Anna{k} paid {k} coins to Bela{k}. "
FORMATS = {
  "sentences": lambda size: {"text": numbered(size, STORY)},
  "one sentence": lambda size: {"text": numbered(size, STORY.replace(".", ","))},
  "spaces": lambda size: {"text": "a" + " " * size + "b"},
  "dots": lambda size: {"text": "." * size + "a"},
  "blank lines": lambda size: {"text": filled(size, "\n \n") + "b"},
  "digits": lambda size: {"text": "1" * size},
  "equations": lambda size: {"text": filled(size, "1+1=2 ")},
  "one sum": lambda size: {"text": filled(size, "1+") + "1=2"},
  "combining characters": lambda size: {"text": "a" + filled(size // 4, "\u0301\u0323")},
  "prose": lambda size: {"question": numbered(size // 2, STORY), "answer": numbered(size // 2, STORY)},
  "problem of lines": lambda size: {
    "question": "q?",
    "answer": numbered(size, "She has {k} + 1 = <<{k}+0={k}>>{k} clips now.\n") + "#### 4",
  },
  "problem in a line": lambda size: {
    "question": "q?",
    "answer": numbered(size, "She has {k} + 1 = <<{k}+0={k}>>{k} clips now. ") + "\n#### 4",
  },
  "pieces": lambda size: {"pieces": [{"role": "prompt", "text": "q"}, *items(size, *MISTAKE)]},
  "spans": spans,
  "messages": lambda size: {
    "messages": items(
      size, {"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2 for Anna. "}
    )
  },
  "two messages": lambda size: {
    "messages": [
      {"role": "user", "content": numbered(size // 2, STORY)},
      {"role": "assistant", "content": numbered(size // 2, STORY)},
    ]
  },
}


class Encoded(NamedTuple):
  """What the library made of a text."""

  ids: list[int]
  offsets: list[tuple[int, int]]

  def __len__(self):
    return len(self.ids)


class Timed:
  """A tokenizer of the library that adds up the seconds spent in it."""

  def __init__(self, tokenizer):
    self.__dict__.update(backend=tokenizer.backend_tokenizer, seconds=0.0)
    tokenizer._tokenizer = self

  def __getattr__(self, name):
    return getattr(self.backend, name)

  def __setattr__(self, name, value):
    setattr(self.backend, name, value)

  def encode_batch(self, texts, **options):
    begin = time.process_time()
    encoded = [Encoded(text.ids, text.offsets) for text in self.backend.encode_batch(texts, **options)]
    self.__dict__["seconds"] += time.process_time() - begin
    return encoded


def timed(function, tokenizer):
  """Return the processor's seconds that a call takes, without those in the tokenizers library."""
  timer, begin = Timed(tokenizer), time.process_time()
  function()
  return time.process_time() - begin - timer.seconds


def seconds(tmp_path, form, size, row_length):
  """Return the seconds for a record of the form, for those with mistakes of our own the sum over their classes."""
  checked = form.startswith("problem") or form in ("pieces", "spans")
  return sum(
    seconds_with(tmp_path, form, size, row_length, classes)
    for classes in ([()] if checked else [(error,) for error in CLASSES])
  )


def seconds_with(tmp_path, form, size, row_length, classes):
  task = "gsm8k" if form.startswith("problem") else "records"
  some = config(
    data__path=write_lines(tmp_path / "r.jsonl", [FORMATS[form](size), OTHER]),
    data__template="chat",
    data__row_length=row_length,
    task__name=task,
    mistakes__unit="sentence",
    mistakes__source="recorded" if form in ("pieces", "spans") else "injected",
    mistakes__share=1.0,
    mistakes__classes=classes,
  )
  tokenizer = vocabulary.add_markers(bpe_tokenizer(IM_TEMPLATE), some.tokenizer).tokenizer

  def load():
    if row_length < size and not classes:
      with pytest.raises(InputError, match=r"r\.jsonl:1: (at least )?\d+ tokens do not fit"):
        pipeline.first_examples(some, tokenizer, 10**6)
    else:
      with contextlib.suppress(InputError):  # too long, or no mistake of this class is possible in it
        pipeline.first_examples(some, tokenizer, 10**6)

  return timed(load, tokenizer)


@pytest.mark.parametrize("form", FORMATS)
def test_a_line_takes_ten_times_as_long_as_a_tenth_of_it(tmp_path, form):
  sizes = (1_000_000, 10_000_000) if form in ("pieces", "spans") else (300_000, 3_000_000)  # some take little
  small, large = (seconds(tmp_path, form, size, 256) for size in sizes)
  print(f"\n{form}: {small:.2f} s, {large:.2f} s, {large / small:.1f}")
  assert large <= MOST * small


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("pieces", "spans")])
def test_a_line_that_fits_its_row_is_read_in_linear_time(tmp_path, form):
  small, large = (seconds(tmp_path, form, size, 4 * size) for size in (25_000, 250_000))
  print(f"\n{form}: {small:.2f} s, {large:.2f} s, {large / small:.1f}")
  assert large <= MOST * small + 0.5


def test_a_prompt_that_may_fit_a_model_is_encoded_in_linear_time(tmp_path):
  def encode(size):
    tokenizer = bpe_tokenizer(IM_TEMPLATE)
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": numbered(size, STORY)}])
    return timed(
      lambda: [tokens.encode_prompt(prompt.text, tokenizer, "chat") for prompt in read_prompts(path)], tokenizer
    )

  small, large = (min(encode(size) for _ in range(3)) for size in (50_000, 500_000))  # Llama 3.1 has 131,072 positions
  print(f"\nprompt: {small:.2f} s, {large:.2f} s, {large / small:.1f}")
  assert large <= MOST * small


def test_ten_times_as_many_records_take_ten_times_as_long(tmp_path):
  def read(num):
    lines = [
      {"pieces": [{"role": "prompt", "text": f"{k}?"}, {"role": "text", "text": "12 " * (k * 7919 % 60 + 1)}]}
      for k in range(num)
    ]
    some = config(data__path=write_lines(tmp_path / "r.jsonl", lines))
    tokenizer = vocabulary.add_markers(bpe_tokenizer(), some.tokenizer).tokenizer
    begin = time.process_time()
    pipeline.load_data(some, tokenizer)
    return time.process_time() - begin

  small, large = (min(read(num) for _ in range(2)) for num in (10_000, 100_000))
  print(f"\nrecords: {small:.2f} s, {large:.2f} s, {large / small:.1f}")
  assert large <= MOST * small

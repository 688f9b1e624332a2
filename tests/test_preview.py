"""preview as a user runs it."""

import html.parser
import re

import forking
import pytest
import shapes
from datakit import IM_TEMPLATE, bpe_tokenizer, write_lines
from modelkit import run

CONFIG = """
import copy
import datakit
from ml_collections import ConfigDict

def get_config(error=""):
  error, _, cache = error.partition("/")
  values = copy.deepcopy(datakit.VALUES)
  values["data"] |= dict(cache=cache)
  if error:
    values["mistakes"] |= dict(source="injected", share=1.0, classes=(error,), unit="sentence", reason="paper")
    values["data"] |= dict(template="chat")
  values["tokenizer"] = dict(path="tokenizer", flag="<|spare_0|>", fix="<|spare_1|>", special=True,
                               confidence=(), confidence_first=())
  return ConfigDict(values)
"""
PIECES = [
  {"role": "prompt", "text": "What is 12 + 30?\n"},
  {"role": "mistake", "text": "12 + 30 = 43 \x1b[0m<b>\n"},
  {"role": "flag", "text": "<|spare_0|>"},
  {"role": "reason", "text": " wrong sum 你"},
  {"role": "flag", "text": "<|spare_1|>"},
  {"role": "correction", "text": "12 + 30 = 42\n"},
]


def lay_out(folder, records, template=None):
  """The folder, with config, tokenizer and records."""
  (folder / "config.py").write_text(CONFIG)
  bpe_tokenizer(template).save_pretrained(folder / "tokenizer")
  write_lines(folder / "records.jsonl", records)
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return lay_out(
    tmp_path_factory.mktemp("preview"), [{"pieces": PIECES}, {"pieces": [{"role": "text", "text": "42 42"}]}]
  )


def test_preview_shows_the_receipt_and_the_roles_and_writes_a_page(folder):
  done = forking.run("preview", "--config=config.py", "--num=2", "--html=page.html", folder=folder)
  assert done.returncode == 0, done.stderr
  assert "longest record" in done.stdout
  assert "records           2" in done.stdout
  shown = (
    "[prompt 0]<|bos|>What is 12 + 30?\n[mistake 0]12 + 30 = 43 \\x1b[0m<b>\n[flag 1]<|spare_0|>[reason 1] wrong sum 你"
    "[flag 1]<|spare_1|>[correction 1]12 + 30 = 42\n[text 0.5]<|eos|>\n"
  )
  assert f"records.jsonl:1\n{shown}" in done.stdout
  assert "[prompt 0]<|bos|>[text 1]42 42[text 0.5]<|eos|>" in done.stdout

  written = (folder / "page.html").read_text(encoding="utf-8")
  assert "&lt;|spare_0|&gt;" in written
  assert "<|" not in written
  page = Page()
  page.feed(written)
  assert not page.fetched
  mistake = "".join(text for kind, text in page.tokens if kind == ["mistake", "masked"])
  assert mistake == "12 + 30 = 43 \\x1b[0m<b>\n"
  assert "".join(text for kind, text in page.tokens if kind == ["reason"]) == " wrong sum 你"


STORIES = [
  {"question": "Who came?", "answer": "We saw Anna there. Then Anna was paid 12 coins. All was well."},
  {
    "messages": [
      {"role": "user", "content": "Who left?"},
      {"role": "assistant", "content": "We saw Bela there. Then Bela was paid 30 goats. All was done."},
    ]
  },
  {"question": "And then?", "answer": "We saw Carl there. Then Carl was paid 41 sheep. All was over."},
]


SHOWN = {
  "sentence": r"\[reason 1\]Found an error in the previous sentence\. Reason: does not follow\.\[flag 1\]",
  "number": r"\[mistake 0\]Then Anna was paid (?!12 )\d+ coins\. \[flag 1\].*\[reason 1\].* wrong number\."
  r"\[flag 1\].*\[correction 1\]Then Anna was paid 12 coins\. \[text 1\]All was well\.",
  "entity": r"\[mistake 0\].*(Bela|Carl).*\[flag 1\].* Reason: wrong name\.\[flag 1\].*\[correction 1\].*Anna",
  "negation": r"\[mistake 0\].* was not .*\[flag 1\].* Reason: the opposite is true\.\[flag 1\].*\[correction 1\]",
}


WITH_CACHE = ("made", "read")  # a cache of rows, by the first and the second preview


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
  """What a run with mistakes of each class gave, by class, and what runs with a cache gave."""
  folder = lay_out(tmp_path_factory.mktemp("prose"), STORIES, IM_TEMPLATE)
  lines = {error: [f"--config=config.py:{error}"] for error in SHOWN}
  lines |= {name: ["--config=config.py:number/rows"] for name in WITH_CACHE}
  found = dict(zip(lines, run("preview", *lines.values(), folder=folder), strict=True))
  return found | {"rows": list((folder / "rows").glob("rows-*"))}


def test_preview_puts_rows_into_the_cache_and_shows_the_same_with_them(prose):
  assert prose["made"] == prose["number"]
  assert prose["read"] == prose["number"]
  assert len(prose["rows"]) == 1


@pytest.mark.parametrize("error", SHOWN)
def test_preview_shows_mistakes_in_prose(prose, error):
  code, out, err = prose[error]
  assert code == 0, err
  assert out.count("[mistake 0]") == 3
  assert re.search(SHOWN[error], out), out


class Page(html.parser.HTMLParser):
  """Collects the tokens of a page with their classes, and whatever it would load from elsewhere."""

  def __init__(self):
    super().__init__()
    self.tokens, self.fetched, self._kind = [], [], None

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.fetched += [value for name, value in attrs.items() if name in ("src", "href")]
    self._kind = attrs["class"].split() if tag == "span" and "token" in attrs.get("title", "") else None

  def handle_data(self, data):
    if self._kind:
      self.tokens.append((self._kind, data))


WRONG = {  # arguments and what the line says
  "no room": (["--config.data.row_length=8"], "records.jsonl:1: 37 tokens do not fit in a row of data.row_length=8"),
  "page in no folder": (["--html=nowhere/page.html"], "--html=nowhere/page.html cannot be written"),
  "markers exchanged": (
    ["--config.tokenizer.flag=<|spare_1|>", "--config.tokenizer.fix=<|spare_0|>"],
    "records.jsonl:1: the mistake '12 + 30 = 43 \\x1b[0m<b>' is not flagged; put a flag piece '<|spare_1|>' right",
  ),
}


@pytest.fixture(scope="module")
def refused(folder):
  """What each wrong run gave, by name."""
  lines = [["--config=config.py", "--html=bad.html", *arguments] for arguments, _ in WRONG.values()]
  return dict(zip(WRONG, run("preview", *lines, folder=folder), strict=True))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_ends_in_one_line_and_exit_code_2_and_leaves_no_page(folder, refused, name):
  code, out, err = refused[name]
  assert (code, out) == (2, ""), err
  [line] = err.splitlines()
  assert WRONG[name][1] in line
  assert not (folder / "bad.html").exists()


PUBLIC = """
from ml_collections import ConfigDict
import copy, datakit

def get_config(name):
  values = copy.deepcopy(datakit.VALUES)
  values["tokenizer"] |= dict(path="tokenizer", flag="<|spare_0|>", fix="<|spare_1|>")
  path, fields = {data}[name]
  values["data"] |= dict(path=path, fields=fields, template="chat")
  return ConfigDict(values)
"""


@pytest.fixture(scope="module")
def public(tmp_path_factory):
  """(exit code, stdout, stderr) of preview on each of eight public data sets' shapes."""
  folder = lay_out(tmp_path_factory.mktemp("public"), [], IM_TEMPLATE)
  (folder / "config.py").write_text(PUBLIC.format(data={name: shapes.write(folder, name) for name in shapes.SHAPES}))
  found = run("preview", *([f"--config=config.py:{name}"] for name in shapes.SHAPES), folder=folder)
  return dict(zip(shapes.SHAPES, found, strict=True))


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_preview_shows_the_receipt_of_a_public_data_set(public, name):
  code, out, err = public[name]
  assert code == 0, err
  assert re.search(r"records +10\n", out)
  assert re.search(r"end of text +" + ("20" if name == "sharegpt" else "10") + " tokens of role text", out)
  answer = "2 + 3 = 5." if name != "gsm8k" else "0 + 1 = 1"
  assert f"[text 1]{answer}" in out

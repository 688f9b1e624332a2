"""The Python code of launch/README.md that serves an exported folder with transformers alone."""

import json
import random

import pytest
from datakit import bpe_tokenizer, write_lines
from modelkit import ROOT, run, save_model

from insec_jax.method.transcript import Markers, clean_text
from insec_jax.model.markings import MARKERS

pytest.importorskip("torch")
pytestmark = pytest.mark.parity
FLAG, FIX = "<|spare_0|>", "<|spare_1|>"
PROMPTS = ("12+3=?", "a b", "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """An HF folder with markers, as `export` writes it."""
  folder = save_model(tmp_path_factory.mktemp("serving") / "exported", bpe_tokenizer())
  marks = {"flag": FLAG, "fix": FIX, "special": True, "unit": "line", "template": "plain"}
  (folder / MARKERS).write_text(json.dumps(marks))
  return folder


def served(folder, prompt, *, bias=2.0, max_tokens=48):
  """The names that the code of the README defines."""
  section = (ROOT / "launch" / "README.md").read_text().partition("## Serving the exported folder")[2]
  code = section.partition("```python\n")[2].partition("```")[0]
  assert "2.0" in code
  assert "256" in code
  names = {"FOLDER": str(folder), "PROMPT": prompt}
  exec(code.replace("2.0", f"{bias}").replace("256", f"{max_tokens}"), names)
  return names


@pytest.mark.parametrize("bias", [2.0, 8.0, -100.0])
def test_transformers_with_a_bias_writes_what_generate_does(folder, bias):
  write_lines(folder.parent / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
  words = ["--model=exported", "--prompts=prompts.jsonl", "--output=o.jsonl", "--max_tokens=48", f"--flag_bias={bias}"]
  ((code, _, err),) = run("generate", words, folder=folder.parent)
  assert code == 0, err
  written = [json.loads(line) for line in (folder.parent / "o.jsonl").read_text().splitlines()]
  assert any(FLAG in line["text"] for line in written) == (bias > 0)
  for prompt, line in zip(PROMPTS, written, strict=True):
    names = served(folder, prompt, bias=bias)
    assert (names["text"], names["clean"](names["text"])) == (line["text"], line["clean"])


def test_the_clean_view_of_the_readme_is_that_of_the_package(folder):
  clean, rng = served(folder, "x", max_tokens=1)["clean"], random.Random(0)
  changed = 0
  for _ in range(20_000):
    text = "".join(rng.choice(("a", "b\n", "\n", FLAG, FIX, "c")) for _ in range(rng.randrange(1, 12)))
    expected = clean_text(text, Markers(FLAG, FIX), "line")
    assert clean(text) == expected, text
    changed += expected != text
  assert changed > 1_000

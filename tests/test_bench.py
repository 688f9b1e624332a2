"""launch/bench.sh: names, missing pieces, and the table of its side-by-side figures."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import smollm2
from modelkit import ROOT
from samplerkit import model_of

from insec_jax.data import vocabulary
from insec_jax.model import hf

BENCH = ROOT / "launch" / "bench"
OURS = {
  "gib_per_chip": {"peak": 9.5},
  "lower_seconds": 10.0,
  "compile_seconds": 90.0,
  "per_chip": {
    "matmul_flops": 2.2e14,
    "ici_bytes": {"all-gather": 3e10, "all-reduce": 6e9},
    "dcn_bytes": {"send": 4e9},
  },
}


def module(name):
  """The module launch/bench/NAME.py."""
  sys.path.insert(0, str(BENCH))
  spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
  made = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(made)
  sys.path.remove(str(BENCH))
  return made


@pytest.fixture(scope="module")
def fit():
  return module("fit")


def test_the_table_has_the_figures_of_both_sides_and_their_ratios(fit):
  theirs = OURS | {"gib_per_chip": {"peak": 19.0}, "lower_seconds": 0.0, "compile_seconds": 200.0}
  sides = {"insec_jax": fit.figures(OURS), "maxtext": fit.figures(theirs)}
  assert sides["insec_jax"] == {"peak": 9.5, "tflop": 220.0, "gb": 40.0, "seconds": 100.0}
  assert fit.ratios(sides) == {"peak": 0.5, "tflop": 1.0, "gb": 1.0, "seconds": 0.5}
  head, *rows = [line.split() for line in fit.table(sides).splitlines()]
  assert head == ["peak", "GiB", "matmul", "TFLOP", "collective", "GB", "compile", "s"]
  assert rows == [
    ["insec_jax", "9.50", "220.00", "40.00", "100"],
    ["maxtext", "19.00", "220.00", "40.00", "200"],
    ["insec_jax", "/", "maxtext", "0.500", "1.000", "1.000", "0.500"],
  ]


def test_a_step_that_the_compiler_refused_has_a_peak_and_no_flops(fit):
  sides = {"insec_jax": fit.figures(OURS), "maxtext": fit.figures(OURS | {"per_chip": None})}
  assert fit.ratios(sides) == {"peak": 1.0, "seconds": 1.0}
  assert fit.table(sides).splitlines()[2].split() == ["maxtext", "9.50", "-", "-", "100"]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["fit"], "error: 'nowhere/python3.12' is no Python 3.12, which MaxText needs; name one: PYTHON312=PATH"),
    (["race"], "error: launch/bench.sh 'race'; give one of: data decode fit gsm8k load mine train"),
    ([], "error: launch/bench.sh ''; give one of: data"),
  ],
)
def test_what_is_missing_is_named_in_one_line_before_anything_is_installed(tmp_path, words, message):
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  done = subprocess.run(
    ["bash", "launch/bench.sh", *words],
    cwd=tmp_path,
    env={**os.environ, "PYTHON312": "nowhere/python3.12"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stdout) == (2, "")
  [line] = done.stderr.splitlines()
  assert line.startswith(message)
  assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(("name", "words"), [("fit", []), ("mine", ["--data=nowhere.jsonl"])])
def test_a_benchmark_without_its_package_or_file_ends_in_one_line_and_code_2(name, words):
  done = subprocess.run([sys.executable, BENCH / f"{name}.py", *words], capture_output=True, text=True, check=False)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert line.startswith({"fit": "error: this Python has no maxtext", "mine": "error: --data=nowhere.jsonl"}[name])


@pytest.mark.parity
@pytest.mark.skipif(bool(smollm2.missing()), reason=smollm2.missing())
def test_the_batches_of_transformers_are_the_texts_of_the_sampler():
  folder = smollm2.folder()
  config, tokenizer = hf.read_config(folder), vocabulary.load(str(folder))
  texts = (
    "The capital of Japan is",
    "Tom has 5 apples and buys 7 more. He has",
    "2 + 2",
    "Water boils",
    "def add(a, b):",
  )
  prompts = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]
  newline, banned = tokenizer.encode("\n")[0], tokenizer.encode(" Tokyo")[0]
  options = {"max_tokens": 24, "stop_ids": (config.eos_ids[0], newline), "flag_id": banned, "batch_size": 2}
  theirs = module("mine").Batches(str(folder), config).generate(prompts, temperature=0.0, seed=0, **options)
  sampler = model_of(config, hf.load(folder, config, dtype="float32"))
  ours = sampler.generate(prompts, flag_bias=-math.inf, **options)
  for one, other in zip(ours, theirs, strict=True):
    assert (one.tokens.tolist(), one.finish) == (other.tokens.tolist(), other.finish)
  assert {one.finish for one in ours} == {"stop", "length"}
  assert banned not in np.concatenate([one.tokens for one in ours])

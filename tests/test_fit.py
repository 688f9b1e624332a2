"""fit as a user runs it."""

import json
import math
import pathlib

import jax
import modelkit
import pytest

from insec_jax import config_file
from insec_jax.config_build import build
from insec_jax.model import llama
from insec_jax.model.hf_config import config_from_json

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
import copy
import datakit
import modelkit
from ml_collections import ConfigDict

def get_config():
  values = copy.deepcopy(datakit.VALUES)
  values["model"] = dict(path="", size={**modelkit.FIELDS, "num_hidden_layers": 3, "vocab_size": 64}, remat="full")
  values["data"] |= dict(row_length=64, rows_per_device=2, accumulation=2)
  return ConfigDict(values)
"""
# Of the model above: what multiplies a token in a layer, and scores and contexts of its heads.
LAYER = 32 * 8 * 2 * (4 + 2) + 3 * 32 * 48
ATTENTION = 2 * 64 * 32


WRONG = {
  "--topology: 'v9:2x2' is not known": ["--topology=v9:2x2"],
  "there is no folder": ["--topology=local", "--output=nowhere/fit.json"],
  "does not divide 2 devices": ["--topology=local", "--config.mesh.fsdp=3"],
  "does not divide data.row_length=63": ["--topology=local", "--config.mesh.sequence=2", "--config.data.row_length=63"],
  "the memory of 'cpu' is not known": ["--topology=local", "--search"],
  "--topology must be given": ["--program=evaluate"],
  "--search finds the rows, and --levers compares": ["--topology=local", "--search", "--levers"],
  "--mesh is not read with --program=train, only with --program=generate": ["--topology=local", "--mesh=data:2"],
  "--hlo is not read with --study": ["--topology=local", "--study", "--arms=a", "--seeds=0"],
  "the model's 256 positions": ["--topology=local", "--program=mine"],
  "--mesh=data:3 needs 3 devices": ["--topology=local", "--program=mine", "--prompt_tokens=9", "--mesh=data:3"],
  "is no folder with a config.json here; give --config.model.path=FOLDER": [
    "--topology=local",
    "--config=unfetched.py",
  ],
}


DECODES = [
  *("--config=config.py", "--topology=local", "--program=evaluate", "--output=decode.json"),
  *("--prompt_tokens=30", "--max_tokens=32", "--rows=5"),
]
EXPORTS = ["--config=config.py", "--program=export", "--dtype=bfloat16", "--output=export.json"]
LORA_EXPORTS = ["--config=config.py", "--program=export", "--config.lora.rank=2", "--output=lora_export.json"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(folder, files in it after the wrong runs, exit code and output of each wrong run, of the right one)."""
  folder = tmp_path_factory.mktemp("fit")
  (folder / "config.py").write_text(CONFIG)
  unfetched = CONFIG.replace("return", "values['model'] |= dict(path='a/b/c', size=None); return")
  (folder / "unfetched.py").write_text(unfetched)
  wrong = [["--config=config.py", "--hlo=hlo", *arguments] for arguments in WRONG.values()]
  right = ["--config=config.py", "--topology=local", "--output=fit.json", "--hlo=hlo"]
  of_all = modelkit.run("fit", *wrong, right, DECODES, EXPORTS, LORA_EXPORTS, folder=folder, num_devices=2)
  return folder, dict(zip(WRONG, of_all, strict=False)), of_all[len(wrong)]


def test_fit_compiles_the_step_for_the_devices_here_and_tells_what_it_does(runs):
  folder, _, (code, out, err) = runs
  assert code == 0, err
  [found] = json.loads((folder / "fit.json").read_text())
  assert found["mesh"] == {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 1}
  assert found["tokens_per_step"] == 2 * 2 * 2 * 64
  assert found["fits"] is None  # nobody knows what a step may take of a host's memory
  # Two micro-batches; every layer once more except its last product; all tokens are taken as trained.
  tokens = 2 * 2 * 64  # of a device; a micro-batch is one chunk of the head
  last, head = 32 * 48, 32 * 64
  work = found["per_chip"]
  assert work["matmul_flops"] == tokens * 2 * (3 * (4 * (LAYER + ATTENTION) - last) + 3 * head)
  assert work["rematerialised_flops"] == tokens * 2 * 3 * (LAYER + ATTENTION - last)
  state = found["gib_per_chip"]
  assert state["optimizer"] == pytest.approx(2 * state["weights"], rel=0.01)
  assert state["peak"] > state["weights"] + state["optimizer"]
  assert sum(work["ici_bytes"].values()) > 0
  [text] = (folder / "hlo").iterdir()
  assert text.read_text().startswith("HloModule")
  assert "| local | 2 | 1 x 2 x 1 x 1 | 2 x 64 | full |" in out


def test_fit_compiles_the_decode_step_and_the_reading_of_prompts(runs):
  [found] = json.loads((runs[0] / "decode.json").read_text())
  assert (found["mesh"], found["rows"], found["slots"], found["prompts_at_once"]) == (
    {"data": 2, "tensor": 1},
    6,
    64,
    6,
  )
  step, prompts = found["decode_step"], found["reading_of_prompts"]
  # A dot of one query is a sum here, so the step multiplies by its weights only.
  assert step["per_chip"]["matmul_flops"] == 3 * 2 * (3 * LAYER + 32 * 64)
  assert step["tokens_per_step"] == 6
  # The last layer gives keys and values only.
  of_prompts = 2 * (LAYER + 2 * 32 * 32) + 2 * 32 * 16
  assert prompts["per_chip"]["matmul_flops"] == 3 * 32 * 2 * of_prompts
  # Keys and values of 3 layers, 2 heads of 8; 3 rows of 64 slots on a device.
  for program in (step, prompts):
    assert program["gib_per_chip"]["cache"] * 2**30 == 2 * 3 * 2 * 8 * 3 * 64 * 4
    held = program["gib_per_chip"]["cache"] + program["gib_per_chip"]["weights"]
    assert held < program["gib_per_chip"]["peak"] < 1.5 * held


def test_fit_says_what_export_needs(runs):
  found = json.loads((runs[0] / "export.json").read_text())
  assert (found["largest"], found["host_bytes"]) == ("model.embed_tokens.weight", 3 * 4 * 64 * 32)
  assert found["read_bytes"] == 2 * found["written_bytes"]


def test_fit_counts_base_and_adapters_of_a_lora_run_that_is_exported(runs):
  found = json.loads((runs[0] / "lora_export.json").read_text())
  matrices = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)  # inputs and outputs of wq wo, wk wv, gate up down
  assert found["adapter_bytes"] == 4 * (3 * 2 * matrices + 2 * 2 * 32)  # three layers, rank 2; two rows of two tables
  assert found["read_bytes"] == found["adapter_bytes"] + found["written_bytes"]


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_ends_in_one_line_and_exit_code_2(runs, message):
  code, out, err = runs[1][message]
  assert (code, out) == (2, ""), err
  [line] = err.splitlines()
  assert message in line


@pytest.mark.parametrize(("name", "model"), [("llama31_8b", "Llama-3.1-8B-Instruct"), ("llama31_70b", "Llama-3.1-70B")])
def test_the_shapes_in_the_configs_are_the_published_ones(name, model):
  published = json.loads((ROOT / "tests" / "golden" / "llama_configs.json").read_text())
  shape = build(config_file.load(str(ROOT / "configs" / f"{name}.py"), "shape")).model.size
  fields = published[model]["config"]
  assert {key: fields[key] for key in shape} == shape
  model_config = config_from_json(shape, name)
  assert (
    sum(
      math.prod(leaf.value.shape)
      for leaf in jax.tree.leaves(llama.shapes(model_config), is_leaf=lambda leaf: hasattr(leaf, "names"))
    )
    == published[model]["parameters"]
  )
  assert build(config_file.load(str(ROOT / "configs" / f"{name}.py"))).model.path.startswith(f"meta-llama/{model}")

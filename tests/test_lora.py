"""LoRA through the programs: trained, stopped, resumed, exported, read; the base is in bfloat16 and has no markers."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from modelkit import FIELDS, run
from orbax.checkpoint import v1 as ocp
from training_runs import GRAPH, SIGNALLED, read_lines, train, write_home

from insec_jax.config import TokenizerConfig
from insec_jax.data import vocabulary
from insec_jax.model import build, hf, hf_writing
from insec_jax.model.hf_config import config_from_json

pytestmark = pytest.mark.processes
LORA = (
  "lora.rank=4",
  "lora.matrices=('wq','wv','down')",
  "tokenizer.path=",
  "precision.params=bfloat16",
  "train.steps=20",
  "optimizer.weight_decay=0.1",
)


def save_base(folder, *, seed=0):
  """Write a random model in bfloat16 whose tokenizer has no markers of ours."""
  others = TokenizerConfig(path="", flag="<|x|>", fix="<|y|>", special=True, confidence=(), confidence_first=())
  tokenizer = vocabulary.build_tokenizer([*"0123456789+= ?\n", "wrong sum"], others)
  ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
  config = config_from_json(FIELDS | ids | {"num_hidden_layers": 2}, "here")
  hf_writing.save(folder, build.init(config, jax.random.key(seed), "bfloat16"), config, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with the bases `base` and `other`, and the workdirs `whole` and `stopped` of the same run."""
  folder = tmp_path_factory.mktemp("lora")
  write_home(folder)
  save_base(folder / "base")
  save_base(folder / "other", seed=1)
  train(folder, "whole", *LORA, arm="base")
  train(
    folder, "stopped", *LORA, arm="base", code=42, program=("-c", SIGNALLED), SIGNAL_AT=8, SIGNAL=int(signal.SIGTERM)
  )
  shutil.copytree(folder / "stopped", folder / "moved")
  return folder


def saved(workdir, step):
  """The JSON of a checkpoint."""
  return ocp.checkpointables_metadata(workdir / "checkpoints" / str(step)).custom_metadata["run"]


def test_a_stopped_run_resumes_to_the_same_losses_and_checkpoint_to_the_bit(home):
  train(home, "stopped", *LORA, arm="base")
  assert read_lines(home / "stopped") == read_lines(home / "whole")
  whole, stopped = (saved(home / name, 20) for name in ("whole", "stopped"))
  assert whole["fingerprints"] == stopped["fingerprints"]
  assert whole["base"] == stopped["base"]


def test_a_run_with_its_state_on_the_host_continues_on_the_device(home):
  on_host = (*LORA, "optimizer.memory=host")
  stop = {"code": 42, "program": ("-c", SIGNALLED), "SIGNAL_AT": 8, "SIGNAL": int(signal.SIGTERM)}
  train(home, "host", *on_host, arm="base", **stop)
  train(home, "host", *LORA, arm="base")
  want, got = (read_lines(home / name) for name in ("whole", "host"))
  assert [line["step"] for line in got] == [line["step"] for line in want]
  losses = [[line["loss"] for line in lines if "loss" in line] for lines in (got, want)]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_checkpoint_holds_the_trained_tree_and_its_moments_alone(home):
  names = saved(home / "whole", 20)["arrays"]
  trained = {name for name in names if name.startswith("params/")}
  factors = {f"params/layers/{part}/{key}" for part in ("attn/wq", "attn/wv", "mlp/down") for key in "ab"}
  assert trained == factors | {"params/rows/embed", "params/rows/head"}
  assert len([name for name in names if name.startswith("optimizer/")]) <= 2 * len(trained) + 3
  assert {kind.split("[")[0] for name, kind in names.items() if name in trained} == {"float32"}


def test_another_base_is_refused_in_one_line_and_a_moved_one_accepted(home):
  said = train(home, "moved", *LORA, "model.path=other", arm="base", code=2)
  assert "the frozen weights of model.path" in said
  assert "give the folder that has those weights" in said
  assert len(said.strip().splitlines()) == 1, said
  shutil.copytree(home / "base", home / "elsewhere")
  train(home, "moved", *LORA, "model.path=elsewhere", arm="base")
  assert saved(home / "moved", 20)["fingerprints"] == saved(home / "whole", 20)["fingerprints"]
  assert json.loads((home / "moved" / "config.json").read_text())["model"]["path"].endswith("elsewhere")


def test_a_base_that_is_changed_later_is_refused_when_the_model_is_read(home):
  shutil.copytree(home / "whole", home / "changed")
  config = json.loads((home / "changed" / "config.json").read_text())
  config["model"]["path"] = str(home / "other")
  (home / "changed" / "config.json").write_text(json.dumps(config))
  prompts = home / "prompt.jsonl"
  prompts.write_text(json.dumps({"prompt": "1+2+3?\n"}) + "\n")
  ((code, _, said),) = run(
    "generate",
    [f"--model={home / 'changed'}", f"--prompts={prompts}", f"--output={home / 'o.jsonl'}", "--max_tokens=24"],
    folder=home,
  )
  assert code == 2, said
  assert "is not the frozen weight beside which this run was trained" in said


def test_the_export_changes_only_the_chosen_matrices_and_the_rows_of_the_markers(home):
  ((code, _, said),) = run("export", [f"--model={home / 'whole'}", f"--output={home / 'hf'}"], folder=home)
  assert code == 0, said
  before, after = (hf.read_config(home / name) for name in ("base", "hf"))
  assert after.vocab_size == build.vocabulary_for(before.vocab_size + 2, before.vocab_size)
  base, merged = (
    flatten_dict(hf.stored(home / name, config), sep="/") for name, config in (("base", before), ("hf", after))
  )
  markers = vocabulary.find_markers(vocabulary.load(str(home / "hf")), TokenizerConfig())
  assert {markers.flag_id, markers.fix_id} == {before.vocab_size, before.vocab_size + 1}
  for path, weight in base.items():
    was, now = (each[(slice(None),) * len(each.shape)] for each in (weight, merged[path]))
    assert was.dtype == now.dtype == "bfloat16"
    if path in ("embed", "head"):
      np.testing.assert_array_equal(now[: len(was)].view(np.uint16), was.view(np.uint16))
      added = now[len(was) :].view(np.uint16)
      assert not np.array_equal(added[0], added[2])
      assert not np.array_equal(added[1], added[2])
      assert (added[2:] == added[2]).all()  # tokens that nobody uses keep the mean
    elif path.endswith(("wq", "wv", "down")):
      assert not np.array_equal(was, now)
    else:
      np.testing.assert_array_equal(was.view(np.uint16), now.view(np.uint16))
  card = (home / "hf" / "README.md").read_text()
  assert "LoRA: rank 4, alpha 32, scale alpha / rank, matrices wq, wv, down, and the rows of the markers." in card


def test_a_workdir_and_its_export_in_float32_write_the_same_tokens_on_any_mesh(home):
  prompts = home / "prompts.jsonl"
  prompts.write_text("".join(json.dumps({"prompt": f"{n}+2+{n}?\n"}) + "\n" for n in range(8)))
  lines = [["--output=hf32", "--dtype=float32", f"--model={home / 'whole'}"]]
  ((code, _, said),) = run("export", *lines, folder=home)
  assert code == 0, said
  runs = [(home / "whole", "tensor:1"), (home / "whole", "data:2,tensor:2"), (home / "hf32", "tensor:1")]
  words = [
    [f"--model={model}", f"--prompts={prompts}", f"--output=o{number}.jsonl", f"--mesh={mesh}", "--max_tokens=24"]
    for number, (model, mesh) in enumerate(runs)
  ]
  for code, _, said in run("generate", *words, folder=home, num_devices=4):
    assert code == 0, said
  texts = [
    [json.loads(line)["tokens"] for line in (home / f"o{n}.jsonl").read_text().splitlines()] for n in range(len(runs))
  ]
  assert texts[0] == texts[1] == texts[2]


NO_ROOM = """
from insec_jax.model import peft
def write(*_, **__):
  raise OSError(28, "No space left on device")
peft.write = write
"""


def test_a_pair_is_whole_or_not_there_and_has_nothing_but_base_and_adapter(home):
  words = [f"--model={home / 'whole'}", "--output=new/pair", "--format=pair"]
  ((code, _, said),) = run("export", words, folder=home, before=NO_ROOM)
  assert (code, "No space left" in said) == (1, True), said
  assert [path.name for path in (home / "new").iterdir() if not path.name.startswith(".")] == []
  ((code, _, said),) = run("export", words, folder=home)
  assert code == 0, said
  assert {path.name for path in (home / "new" / "pair").iterdir()} == {"base", "adapter"}


LORA_GRAPH = GRAPH.replace(
  "return c",
  """c.lora = dict(rank=4, alpha=32.0, rank_stabilised=False, matrices=("wq", "down"), marker_rows=True)
  c.rounds, c.mistakes.mined = 0, 0.0
  c.evaluate.update(num_problems=16, num_probes=8)
  return c""",
)


def test_evaluate_and_mine_read_a_lora_run_as_they_read_its_export(tmp_path):
  (tmp_path / "config.py").write_text(LORA_GRAPH)
  config = f"--config={tmp_path / 'config.py'}:"
  programs = {
    "train": [[config, "--workdir=run"]],
    "export": [["--model=run", "--output=hf", "--dtype=float32"]],
    "mine": [[config, f"--model={model}", f"--output={model}.jsonl"] for model in ("run", "hf")],
    "evaluate": [[config, f"--model={model}", f"--output={model}.json"] for model in ("run", "hf")],
  }
  for program, lines in programs.items():
    for code, _, said in run(program, *lines, folder=tmp_path):
      assert code == 0, said
  here, there = ((tmp_path / f"{model}.jsonl").read_text().splitlines() for model in ("run", "hf"))
  assert len(here) > 10
  assert here == there
  here, there = (json.loads((tmp_path / f"{model}.json").read_text())["rates"] for model in ("run", "hf"))
  assert here == there
  assert {"injected", "own"} <= here.keys()

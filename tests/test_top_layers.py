"""Top layers through the programs: trained, stopped, resumed, exported, read; the tied base is in bfloat16."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from modelkit import FIELDS, run
from orbax.checkpoint import v1 as ocp
from training_runs import SIGNALLED, read_lines, train, write_home

from insec_jax.config import TokenizerConfig
from insec_jax.data import vocabulary
from insec_jax.model import build, hf, hf_writing
from insec_jax.model.hf_config import config_from_json

pytestmark = pytest.mark.processes
TOP = (
  "train.top_layers=2",
  "train.vocabulary=used",
  "tokenizer.path=",
  "precision.params=bfloat16",
  "train.steps=20",
  "optimizer.weight_decay=0.1",
)
# The frozen rows of two special tokens that the base has.
CACHED = (
  *TOP,
  "tokenizer.flag=<|x|>",
  "tokenizer.fix=<|y|>",
  "train.marker_rows=False",
  "train.stream_cache=cache",
)


def save_base(folder, *, seed=0, **changes):
  """Write a random model in bfloat16 whose tokenizer has two markers that are not ours."""
  others = TokenizerConfig(path="", flag="<|x|>", fix="<|y|>", special=True, confidence=(), confidence_first=())
  tokenizer = vocabulary.build_tokenizer([*"0123456789+= ?\nQZ", "wrong sum"], others)
  ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "num_hidden_layers": 3}
  config = config_from_json(FIELDS | ids | {"tie_word_embeddings": True} | changes, "here")
  hf_writing.save(folder, build.init(config, jax.random.key(seed), "bfloat16"), config, tokenizer=tokenizer)


def mark(text):
  """The text with the markers of the base."""
  return text.replace("<|flag|>", "<|x|>").replace("<|fix|>", "<|y|>")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with the bases `base` and `other`, and workdirs: `whole`, `stopped`, and `cached` with a stream cache."""
  folder = tmp_path_factory.mktemp("top")
  write_home(folder)
  save_base(folder / "base")
  save_base(folder / "other", seed=1)
  train(folder, "whole", *TOP, arm="base")
  signalled = dict(code=42, program=("-c", SIGNALLED), SIGNAL_AT=8, SIGNAL=int(signal.SIGTERM))
  train(folder, "stopped", *TOP, arm="base", **signalled)
  (folder / "marked.jsonl").write_text(mark((folder / "records.jsonl").read_text()))
  train(folder, "cut", *CACHED, "data.path=marked.jsonl", arm="base", **signalled)
  return folder


def saved(workdir, step):
  """The JSON of a checkpoint."""
  return ocp.checkpointables_metadata(workdir / "checkpoints" / str(step)).custom_metadata["run"]


def test_a_stopped_run_resumes_to_the_same_losses_and_checkpoint_to_the_bit(home):
  said = train(home, "stopped", *TOP, arm="base")
  assert re.search(r"softmax over \d\d of \d+ tokens", said), said
  assert read_lines(home / "stopped") == read_lines(home / "whole")
  whole, stopped = (saved(home / name, 20) for name in ("whole", "stopped"))
  assert whole["fingerprints"] == stopped["fingerprints"]
  assert whole["base"] == stopped["base"]


def test_a_checkpoint_holds_the_top_layers_norm_marker_rows_and_their_moments_alone(home):
  run = saved(home / "whole", 20)
  trained = {name: kind for name, kind in run["arrays"].items() if name.startswith("params/")}
  assert set(trained) - {f"params/layers/{part}" for part in run["base"]["fingerprints"]} >= {"params/norm"}
  assert {name for name in trained if not name.startswith("params/layers/")} == {"params/norm", "params/rows/embed"}
  assert all(kind.startswith("float32[2") for name, kind in trained.items() if name.startswith("params/layers/"))
  assert len([name for name in run["arrays"] if name.startswith("optimizer/")]) <= 2 * len(trained) + 3
  assert {name.split("/")[0] for name in run["base"]["fingerprints"]} == {"embed", "layers"}


def exported(home, workdir, folder, *words):
  ((code, _, said),) = run("export", [f"--model={home / workdir}", f"--output={home / folder}", *words], folder=home)
  assert code == 0, said
  config = hf.read_config(home / folder)
  return config, flatten_dict(hf.stored(home / folder, config), sep="/")


def test_the_export_keeps_every_bit_of_what_is_frozen_and_the_rows_not_in_use(home):
  _, merged = exported(home, "whole", "hf")
  config = hf.read_config(home / "base")
  for path, weight in flatten_dict(hf.stored(home / "base", config), sep="/").items():
    was, now = (each[(slice(None),) * len(each.shape)].view(np.uint16) for each in (weight, merged[path]))
    if path == "embed":
      np.testing.assert_array_equal(now[: len(was)], was)
      added = now[len(was) :]
      assert not any(np.array_equal(added[marker], added[2]) for marker in (0, 1))
    elif path.startswith("layers/"):
      np.testing.assert_array_equal(was[0], now[0])
      assert path.endswith("norm") or not (np.array_equal(was[1], now[1]) or np.array_equal(was[2], now[2]))
  assert "Trained were the last 2 layers" in (home / "hf" / "README.md").read_text()


def test_a_workdir_and_its_export_write_the_same_tokens_on_any_mesh(home):
  prompts = home / "prompts.jsonl"
  prompts.write_text("".join(json.dumps({"prompt": f"{n}+2+{n}?\n"}) + "\n" for n in range(8)))
  exported(home, "whole", "hf32", "--dtype=float32")
  runs = [(home / "whole", "tensor:1"), (home / "whole", "data:2,tensor:2"), (home / "hf32", "tensor:1")]
  words = [
    [f"--model={model}", f"--prompts={prompts}", f"--output=o{number}.jsonl", f"--mesh={mesh}", "--max_tokens=24"]
    for number, (model, mesh) in enumerate(runs)
  ]
  for code, _, said in run("generate", *words, folder=home, num_devices=4):
    assert code == 0, said
  texts = [[json.loads(line)["tokens"] for line in (home / f"o{n}.jsonl").read_text().splitlines()] for n in range(3)]
  assert texts[0] == texts[1] == texts[2]


def test_another_base_is_refused_in_one_line(home):
  shutil.copytree(home / "whole", home / "moved")
  said = train(home, "moved", *TOP, "model.path=other", arm="base", code=2)
  assert "the frozen weights of model.path" in said
  assert len(said.strip().splitlines()) == 1, said


def train_cached(home, workdir, *changes, **options):
  return train(home, workdir, *CACHED, "data.path=marked.jsonl", *changes, arm="base", **options)


def streams(home):
  return {path.name for path in (home / "cache").glob("streams-*")}


def test_cached_losses_are_those_without_a_cache_and_resumed_ones_the_same(home):
  assert len(streams(home)) == 1
  said = train_cached(home, "cut")
  assert "train.stream_cache: output of 1 frozen layers" in said
  assert "read from" in said
  train_cached(home, "cached")
  assert read_lines(home / "cut") == read_lines(home / "cached")
  assert len(streams(home)) == 1
  train_cached(home, "uncached", "train.stream_cache=")
  for one, two in zip(read_lines(home / "uncached"), read_lines(home / "cached"), strict=True):
    assert one.keys() == two.keys()
    for name, value in one.items():
      assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
  "changes",
  [
    ("model.path=other",),
    ("train.top_layers=1",),
    ("data.num_records=100",),
    ("precision.compute=bfloat16",),
    ("precision.params=float32",),
  ],
  ids=lambda changes: changes[0],
)
def test_other_weights_layers_rows_or_dtypes_never_read_an_old_cache(home, changes):
  before = streams(home)
  said = train_cached(home, f"of_{changes[0].partition('=')[0]}", "train.steps=5", *changes)
  assert len(streams(home) - before) == 1
  assert re.search(r"rows, [\d.e-]+ GiB in (float32|bfloat16), is computed once into", said), said


def test_a_damaged_cache_is_refused_in_one_line_that_says_what_to_do(home):
  shutil.copytree(home / "cache", home / "damaged")
  for path in (home / "damaged").glob("*/stream.npy"):
    path.write_bytes(path.read_bytes()[:-4])
  said = train_cached(home, "of_damaged", "train.stream_cache=damaged", code=2)
  assert "delete it, it is made anew" in said.splitlines()[-1]


CUT = """
from insec_jax import command, train
from insec_jax.training import streams
streams.SAVE_SECONDS = 0
make = streams.step_lib.make_streams
def cut(*arguments):
  compute, calls = make(*arguments), []
  def once(*given):
    calls.append(1)
    if len(calls) > 1:
      raise OSError(5, "cut off")
    return compute(*given)
  return once
streams.step_lib.make_streams = cut
command.run(train.main)
"""


def test_a_cache_that_was_cut_off_goes_on_to_the_same_bytes(home):
  train_cached(home, "went_on", "train.stream_cache=parts", code=1, program=("-c", CUT))
  (partial,) = (home / "parts").glob("*.partial")
  assert json.loads((partial / "rows.json").read_text()) == {"rows": 8}
  with (partial / "stream.npy").open("rb+") as file:
    file.seek(-4, 2)
    file.write(b"none")  # of a row that is not done
  train_cached(home, "went_on", "train.stream_cache=parts")
  (made,) = (home / "parts").glob("streams-*")
  assert (made / "stream.npy").read_bytes() == (home / "cache" / made.name / "stream.npy").read_bytes()
  assert {path.name for path in made.iterdir()} == {"stream.npy", "stream.json"}


FULL = """
import shutil
from insec_jax import command, train
from insec_jax.training import streams
real = shutil.disk_usage
streams.shutil.disk_usage = lambda path: real(path)._replace(free=1000)
command.run(train.main)
"""


def test_a_disk_without_room_for_the_cache_is_an_error_of_one_line(home):
  said = train_cached(home, "full", "train.stream_cache=full", code=1, program=("-c", FULL)).splitlines()[-1]
  assert "GiB are needed for train.stream_cache" in said
  assert list((home / "full").glob("*")) == []


def test_markers_with_the_same_frozen_row_are_refused(home):
  said = train(home, "alike", *TOP, "train.marker_rows=False", arm="base", code=2)
  assert "the model has nearly the same one for both" in said


def test_devices_of_a_mesh_train_to_the_losses_of_one_with_and_without_a_cache(home):
  rows = ("data.rows_per_device=2", "train.steps=10")
  train_cached(home, "one", "train.steps=10", "data.rows_per_device=8")
  for number, mesh in enumerate((("mesh.fsdp=4",), ("mesh.fsdp=2", "mesh.data=2", "train.stream_cache="))):
    train_cached(home, f"four_{number}", *rows, *mesh, devices=4)
    for one, two in zip(read_lines(home / "one"), read_lines(home / f"four_{number}"), strict=True):
      assert two["loss" if "loss" in one else "eval/loss"] == pytest.approx(
        one["loss" if "loss" in one else "eval/loss"], rel=1e-3
      )


def test_a_mesh_that_splits_the_vocabulary_is_refused_for_kept_tokens(home):
  said = train(home, "tensor", *TOP, "mesh.fsdp=1", "mesh.tensor=2", arm="base", devices=2, code=2)
  assert "train.vocabulary='used' with mesh.tensor=2" in said.splitlines()[-1]

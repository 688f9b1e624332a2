"""The contract of mine: one command gives a file of own mistakes and a table, shared and killed or not."""

import json
import signal

import datakit
import pytest
from killkit import ended, start
from modelkit import MESHES, run, save_eight, save_model

from insec_jax.data import records, vocabulary
from insec_jax.method import tasks
from insec_jax.method.roles import MISTAKE

CONFIG = """
import copy
import datakit
from ml_collections import ConfigDict

def get_config(what="graph"):
  values = copy.deepcopy(datakit.VALUES)
  values["task"] = dict(name="graph", min_size=2, max_size=3, modulus=10)
  values["data"] |= dict(path="", num_records=20)
  values["mistakes"] |= dict(source="injected")
  values["evaluate"] |= dict(max_tokens=24, batch_size=8)
  values["mine"] = dict(num_problems=20, samples=2, right=1.0)
  if what == "records":
    values["task"] = dict(name=what, min_size=0, max_size=0, modulus=0)
    values["data"] |= dict(path="none.jsonl")
  return ConfigDict(values)
"""
BAD = {
  "no model": (["--model=none"], "no folder 'none'"),
  "no checker": (["--config=config.py:records"], "task.name='records' has no step checker"),
  "output in no folder": (["--output=none/o.jsonl"], "--output=none/o.jsonl cannot be written"),
  "output over a folder": (["--output=untuned"], "--output=untuned is a folder"),
  "a process too many": (["--num_processes=2", "--process_id=2"], "ids go from 0 to 1"),
  "other markers": (["--model=trained"], "trained was trained with tokenizer.flag='<oops>', and the config says"),
  "no room": (["--config.evaluate.max_tokens=250"], "do not fit in the model's 256 positions"),
  "parts of other work": (["--output=begun.jsonl"], "was begun with"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mine")
  (folder / "config.py").write_text(CONFIG)
  config = datakit.config(
    task__name="graph",
    task__min_size=2,
    task__max_size=3,
    task__modulus=10,
    data__path="",
    data__num_records=1,
    mistakes__source="injected",
  )
  plain = vocabulary.build_tokenizer(tasks.get(config.task).symbols, datakit.config(tokenizer__special=False).tokenizer)
  save_model(folder / "untuned", plain)
  words = datakit.config(tokenizer__special=False, tokenizer__flag="<a>", tokenizer__fix="<b>").tokenizer
  save_eight(folder / "eight", vocabulary.build_tokenizer(tasks.get(config.task).symbols, words))
  save_model(folder / "trained", vocabulary.open_tokenizer(config).tokenizer)
  (folder / "trained" / "insec.json").write_text(
    json.dumps({"flag": "<oops>", "fix": "<fix>", "special": False, "unit": "line", "template": "plain"})
  )
  (folder / "begun.jsonl.parts").mkdir()
  (folder / "begun.jsonl.parts" / "0.jsonl").write_text('{"the weights": "others"}\n')
  return folder


def mine(home, output, *more, code=0, **options):
  """(stdout, stderr) of the program."""
  words = ("--model=untuned", "--config=config.py", f"--output={output}", *more)
  return ended(start(home, "mine", *words, **options), code)


@pytest.fixture(scope="module")
def whole(home):
  """(what a run that nothing interrupted printed, its file's bytes)."""
  out, _ = mine(home, "whole.jsonl")
  return out, (home / "whole.jsonl").read_bytes()


def test_a_model_that_never_saw_a_marker_is_mined_and_the_table_ends_the_run(home, whole):
  out, written = whole
  assert "40 samples of 20 problems" in out
  assert all(word in out for word in ("first of sample", "malformed", "problems with a mistake", "records of right"))
  lines = [json.loads(line) for line in written.splitlines()]
  assert len(lines) >= 5
  for line in lines:
    assert set(line) == {"pieces", "meta"}
    assert set(line["meta"]) == {"classes", "places", "seed", "problem", "sample", "injected"}
  contents = [record.content for record in records.read(str(home / "whole.jsonl"), limit=0)]
  assert all(MISTAKE in [piece.role for piece in content] for content in contents)  # it is never right
  assert not (home / "whole.jsonl.parts").exists()


def test_the_config_of_an_arm_that_trains_on_mined_records_mines_them(home, whole):
  assert mine(home, "arm.jsonl", "--config.mistakes.mined=0.5")[0] == whole[0]
  assert (home / "arm.jsonl").read_bytes() == whole[1]


def test_killed_it_leaves_no_output_and_goes_on_from_its_parts_to_the_same_file(home, whole):
  mine(home, "killed.jsonl", kill_after=2, code=-signal.SIGKILL)
  assert not (home / "killed.jsonl").exists()
  out, err = mine(home, "killed.jsonl")
  assert "2 of 5 chunks were made before" in err
  assert "mining, 3 of 5" in err
  assert "mining, 2 of 5" not in err
  assert (out, (home / "killed.jsonl").read_bytes()) == whole


def test_processes_share_the_work_and_the_last_one_writes_the_same_file(home, whole):
  out, err = mine(home, "two.jsonl", "--num_processes=2", "--process_id=1")
  assert out == ""
  assert "the last of the 2 to end writes two.jsonl" in err
  assert not (home / "two.jsonl").exists()
  out, err = mine(home, "two.jsonl", "--num_processes=2", "--process_id=0")
  assert (out, (home / "two.jsonl").read_bytes()) == whole
  assert "mining, 2 of 5" not in err


@pytest.fixture(scope="module")
def alone(home):
  """The bytes that one device mines of a model of eight key-value heads."""
  mine(home, "alone.jsonl", "--model=eight")
  return (home / "alone.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_file_does_not_depend_on_the_mesh(home, alone, mesh):
  mine(home, "mesh.jsonl", "--model=eight", f"--mesh={mesh}", num_devices=8)
  assert (home / "mesh.jsonl").read_bytes() == alone


@pytest.mark.processes
def test_two_processes_of_four_devices_and_a_kill_give_the_file_of_one_device(home, alone):
  words = ("--model=eight", "--config=config.py", "--output=both.jsonl", "--num_processes=2")

  def process(number, mesh, **options):
    return start(home, "mine", *words, f"--process_id={number}", f"--mesh={mesh}", num_devices=4, **options)

  first, second = process(0, "data:4"), process(1, "data:2,tensor:2", kill_after=1)
  ended(second, -signal.SIGKILL)
  ended(first)
  assert not (home / "both.jsonl").exists()
  assert "1 of 2 chunks were made before" in ended(process(1, "tensor:4"))[1]
  assert (home / "both.jsonl").read_bytes() == alone


def test_wrong_input_ends_in_one_line_and_code_2_and_writes_nothing(home):
  before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if "cache" not in path.parts}
  lines = [["--model=untuned", "--config=config.py", "--output=bad.jsonl", *arguments] for arguments, _ in BAD.values()]
  for (name, (_, message)), (code, out, err) in zip(BAD.items(), run("mine", *lines, folder=home), strict=True):
    assert (code, out) == (2, ""), (name, err)
    assert message in err
    assert len(err.splitlines()) == 1, name
  after = {path: path.stat().st_mtime_ns for path in home.rglob("*") if "cache" not in path.parts}
  assert {path for path in after if after[path] != before.get(path)} <= {home, home / "__pycache__"} | set(
    (home / "__pycache__").glob("*")
  )

"""The contract of evaluate: one command gives a file of numbers and a table, or one clear line."""

import json
import signal

import datakit
import pytest
from killkit import ended, start
from modelkit import MESHES, run, save_eight, save_model

from insec_jax.data import vocabulary
from insec_jax.method import tasks
from insec_jax.model.markings import MARKERS

CONFIG = """
import copy
import datakit
from ml_collections import ConfigDict

def get_config(what="graph"):
  values = copy.deepcopy(datakit.VALUES)
  if what in ("graph", "long"):
    values["task"] = dict(name="graph", min_size=2, max_size=3, modulus=10)
    values["data"] |= dict(path="", num_records=1)
  else:
    values["task"] = dict(name=what, min_size=0, max_size=0, modulus=0)
    values["data"] |= dict(path="none.jsonl")
  values["mistakes"] |= dict(source="injected")
  values["evaluate"] = dict(num_problems=5, num_probes=5, max_tokens=24, batch_size=4, temperature=1.0,
                            max_false_alarms=0.01, votes=3, redraws=1, max_size=0)
  if what == "long":
    values["evaluate"]["max_tokens"] = 250
  return ConfigDict(values)
"""
RIGHT = ["--model=untuned", "--config=config.py"]
BAD = {
  "other markers": (["--model=trained"], "trained was trained with tokenizer.flag='<oops>', and the config says"),
  "no checker": (["--config=config.py:records"], "task.name='records' has no step checker"),
  "no records": (["--config=config.py:gsm8k"], "cannot read none.jsonl"),
  "no model": (["--model=none"], "no folder 'none'"),
  "output in no folder": (["--output=none/o.json"], "--output=none/o.json cannot be written"),
  "parts of other work": (
    ["--output=begun.json"],
    "begun.json.parts/0.jsonl was begun with compute=None, now it is 'float32'",
  ),
  "a process too many": (["--num_processes=2", "--process_id=2"], "ids go from 0 to 1"),
  "shared stream": (
    ["--num_processes=2", "--process_id=0", "--output=/dev/stdout"],
    "--output=/dev/stdout cannot be shared by 2 proc",
  ),
  "no process id": (["--num_processes=2"], "--process_id is missing; give --num_processes and --process_id together"),
  "config key": (["--config.evaluate.num_probe=3"], "num_probes"),
  "no room": (["--config=config.py:long"], "do not fit in the model's 256 positions"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """(folder, what each run gave by name)."""
  folder = tmp_path_factory.mktemp("evaluate")
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
  (folder / "trained" / MARKERS).write_text(
    json.dumps({"flag": "<oops>", "fix": "<fix>", "special": False, "unit": "line", "template": "plain"})
  )
  (folder / "begun.json.parts").mkdir()
  (folder / "begun.json.parts" / "0.jsonl").write_text('{"the weights": "others"}\n')
  lines = {
    "right": ["--output=results.json"],
    **{name: ["--output=bad_out.json", *arguments] for name, (arguments, _) in BAD.items()},
  }
  found = run("evaluate", *([*RIGHT, *arguments] for arguments in lines.values()), folder=folder)
  return folder, dict(zip(lines, found, strict=True))


def test_an_untuned_model_is_measured_on_every_class_and_the_table_is_printed(done):
  folder, ran = done
  code, out, err = ran["right"]
  assert code == 0, err
  found = json.loads((folder / "results.json").read_text())
  assert found["model"] == "untuned"
  assert found["config"]["evaluate"]["num_probes"] == 5
  assert found["seeds"] == {"problems": 0, "probes": 0, "sampling": 0}
  ways = ("", ", flags banned", " sampled", " sampled, flags banned")
  assert {f"solutions{way}" for way in ways} <= set(found["counts"]["solutions"])
  assert set(found["counts"]["solutions"].values()) == {5}
  assert {
    "injected",
    "injected sampled",
    "own",
    "own sampled",
    *(f"solutions{way}" for way in ways),
    "solutions sampled, majority",
  } <= set(found["rates"])
  assert {f"injected: {error}" for error in ("early", "value", "calc", "copy", "repeat")} <= set(found["rates"])
  for rates in found["rates"].values():
    assert all(set(rate) == {"k", "n", "rate", "low", "high"} for rate in rates.values())
  for example in found["transcripts"]:
    assert set(example) == {"title", "outcome", "pieces"}
    assert all(set(piece) == {"role", "text"} for piece in example["pieces"])
  assert found["rates"]["injected"]["detection"]["n"] == 5
  assert len(found["structures"]["solutions"]) == len(found["solved"]["solutions"]["t2"]) == 5
  assert "detection" in out
  assert "accuracy_t2" in out
  assert out.splitlines()[-1] == f"{found['seconds']} seconds"
  assert not list(folder.glob("results.json.*"))


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_ends_in_one_line_and_code_2_and_writes_nothing(done, name):
  folder, ran = done
  code, out, err = ran[name]
  assert (code, out) == (2, ""), err
  assert BAD[name][1] in err
  assert len(err.splitlines()) == 1
  assert not list(folder.glob("bad_out*"))


def same(found, expected, where="results.json"):
  """Assert that two files of results are equal, but for the order of sums of floats, paths and times."""
  if isinstance(expected, dict):
    assert found.keys() == expected.keys(), where
    for key in expected.keys() - {"seconds"}:
      same(found[key], expected[key], f"{where}, {key}")
  elif isinstance(expected, list):
    assert len(found) == len(expected), where
    for number, pair in enumerate(zip(found, expected, strict=True)):
      same(*pair, f"{where}, {number}")
  elif isinstance(expected, float):
    assert found == pytest.approx(expected, abs=1e-5), where
  else:
    assert found == expected, where


@pytest.fixture(scope="module")
def alone(done):
  """What one device measures of a model of eight key-value heads."""
  folder, _ = done
  ended(start(folder, "evaluate", "--model=eight", "--config=config.py", "--output=alone.json"))
  return json.loads((folder / "alone.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_results_do_not_depend_on_the_mesh(done, alone, mesh):
  folder, _ = done
  words = ("--model=eight", "--config=config.py", "--output=mesh.json", f"--mesh={mesh}")
  ended(start(folder, "evaluate", *words, num_devices=8))
  same(json.loads((folder / "mesh.json").read_text()), alone)


@pytest.mark.processes
def test_two_processes_of_four_devices_and_a_kill_give_the_results_of_one_device(done, alone):
  folder, _ = done
  words = ("--model=eight", "--config=config.py", "--output=two.json", "--num_processes=2")

  def process(number, mesh, **options):
    return start(folder, "evaluate", *words, f"--process_id={number}", f"--mesh={mesh}", num_devices=4, **options)

  first, second = process(0, "data:4"), process(1, "data:2,tensor:2", kill_after=7)
  ended(second, -signal.SIGKILL)
  again = process(1, "tensor:4")
  (one, _), (two, err) = ended(first), ended(again)
  assert "7 chunks were made before" in err
  assert sorted("detection" in out for out in (one, two)) == [False, True]
  same(json.loads((folder / "two.json").read_text()), alone)
  assert not list(folder.glob("two.json.*"))

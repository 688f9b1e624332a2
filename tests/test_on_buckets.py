"""The programs with every path in a bucket, on a real server on loopback, against the same programs on a disk."""

import json
import re
import signal

import jax
import numpy as np
import pytest
from bucketkit import Bucket, new_bucket
from datakit import write_lines
from killkit import ended, start
from training_runs import GRAPH, MINING, SIGNALLED, read_lines, train, train_in_two

from insec_jax.generation.loading import load_model

pytestmark = pytest.mark.processes
SMALL_CHUNKS = "from insec_jax.mining import miner\nminer.SAMPLES_PER_CHUNK = 8\ncommand.run"
AFTER_LINE = SIGNALLED.replace("command.run", SMALL_CHUNKS)
READING = ("--config=config.py", "--config.rounds=0", "--config.mistakes.mined=0")  # of programs other than train


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a config, prompts, and the workdir `whole` of a run on the disk that nothing interrupted."""
  folder = tmp_path_factory.mktemp("on_buckets")
  (folder / "config.py").write_text(GRAPH)
  (folder / "out").mkdir()
  write_lines(folder / "p.jsonl", [{"prompt": f"b{number}a{number}c?", "id": number} for number in range(9)])
  train(folder, "whole", program=("-c", MINING))
  return folder


@pytest.fixture(scope="module")
def store(home) -> Bucket:
  """The bucket of all these tests, with the prompts."""
  bucket = new_bucket()
  bucket.write("p.jsonl", (home / "p.jsonl").read_bytes())
  return bucket


@pytest.fixture(scope="module")
def run(home, store, tmp_path_factory):
  """The local copy of a workdir in the bucket; its run was killed while mining and after a line of metrics."""
  workdir = f"{store.url}/runs/a"
  train(home, workdir, program=("-c", MINING), code=-9, SIGNAL=9, SIGNAL_AFTER=2, **store.variables)
  assert len([name for name in store.names("runs/a/mined/") if ".parts/0." in name]) == 2
  said = train(home, workdir, program=("-c", AFTER_LINE), code=-9, SIGNAL=9, SIGNAL_AT=18, **store.variables)
  assert "2 of 6 chunks were made before" in said
  saved = re.findall(r"a/checkpoints/(\d+)/commit_success.txt", "\n".join(store.names("runs/a/checkpoints/")))
  lines = [json.loads(line)["step"] for line in store.read("runs/a/metrics.jsonl").splitlines()]
  assert lines[-1] >= max(map(int, saved)) - 1 >= 12, "no line is lost that was before the last checkpoint"
  said = train(home, workdir, program=("-c", MINING), **store.variables)
  assert f"resuming {workdir} after step {max(map(int, saved))}" in said
  return store.download("runs/a", tmp_path_factory.mktemp("copy") / "a")


@pytest.fixture
def here(home, store, run, monkeypatch):  # noqa: ARG001
  """The folder of the programs, which find the store."""
  for name, value in store.variables.items():
    monkeypatch.setenv(name, value)
  return home


def test_a_run_killed_twice_ends_as_one_on_a_disk_that_nothing_interrupted(here, store, run):
  assert read_lines(run) == read_lines(here / "whole")
  for name in ("mined/round_1.jsonl", "mined/round_2.jsonl", "mined/round_3.jsonl", "receipt.txt", "model.json"):
    assert (run / name).read_bytes() == (here / "whole" / name).read_bytes()
  weights = [load_model(folder).params for folder in (f"{store.url}/runs/a", str(here / "whole"))]
  jax.tree.map(np.testing.assert_array_equal, *weights)
  assert len(list((run / "tb").iterdir())) == 2  # of the second and the third start
  left = {name.split("/")[2] for name in store.names("runs/a/")}
  assert left == {path.name for path in (here / "whole").iterdir()}


def test_two_processes_of_a_run_mine_a_round_through_a_bucket(here, store):
  train_in_two(here, MINING, f"--workdir={store.url}/runs/two", "--config.data.rows_per_device=4")
  # Later weights differ in the last bits.
  assert store.read("runs/two/mined/round_1.jsonl") == (here / "whole/mined/round_1.jsonl").read_bytes()
  assert not [name for name in store.names("runs/two/") if ".parts/" in name or name.endswith(".lock")]


def test_a_model_exported_to_a_bucket_generates_what_one_on_a_disk_does(here, store):
  for place, workdir in ((store.url, f"{store.url}/runs/a"), ("out", "whole")):
    ended(start(here, "export", f"--model={workdir}", f"--output={place}/hf"))
    for model, prompts, output in ((workdir, "p.jsonl", "run"), (f"{place}/hf", f"{store.url}/p.jsonl", "hf")):
      words = (f"--model={model}", f"--prompts={prompts}", f"--output={place}/{output}.jsonl", "--max_tokens=16")
      ended(start(here, "generate", *words))
  assert {path.name for path in (here / "out/hf").iterdir()} == {name[3:] for name in store.names("hf/")}
  for name in ("run.jsonl", "hf.jsonl", "hf/model.safetensors", "hf/config.json", "hf/tokenizer.json"):
    assert store.read(name) == (here / "out" / name).read_bytes()
  said = ended(start(here, "export", f"--model={store.url}/runs/a", f"--output={store.url}/hf"), code=2)[1]
  assert f"--output={store.url}/hf is there already and not empty" in said.splitlines()[-1]


def test_two_processes_mine_into_a_bucket_and_go_on_after_a_kill(here, store):
  words = (*READING, f"--model={store.url}/runs/a", f"--output={store.url}/mined.jsonl", "--num_processes=2")
  ended(start(here, "mine", *READING, "--model=whole", "--output=mined.jsonl"))
  ended(start(here, "mine", *words, "--process_id=0", kill_after=1), code=-signal.SIGKILL)
  assert len(store.names("mined.jsonl.parts/")) == 1
  both = [start(here, "mine", *words, f"--process_id={index}") for index in (0, 1)]
  assert "1 of 3 chunks were made before" in "".join(ended(process)[1] for process in both)
  assert store.read("mined.jsonl") == (here / "mined.jsonl").read_bytes()
  assert [name for name in store.names() if "mined.jsonl" in name] == ["mined.jsonl"]


def test_results_and_pages_of_a_bucket_are_those_of_a_disk(here, store):
  for workdir, place in ((f"{store.url}/runs/a", store.url), ("whole", "out")):
    words = (*READING, f"--model={workdir}", f"--output={workdir}/results.json")
    if workdir == "whole":
      ended(start(here, "evaluate", *words))
    else:  # two hosts at once
      both = [start(here, "evaluate", *words, "--num_processes=2", f"--process_id={index}") for index in (0, 1)]
      assert sorted(bool(ended(process)[0]) for process in both) == [False, True]  # one prints the table
    ended(start(here, "report", f"--workdirs={workdir}", f"--output={place}/report.html"))
    ended(start(here, "preview", *READING, f"--html={place}/preview.html"))
  results = (json.loads(store.read("runs/a/results.json")), json.loads((here / "whole/results.json").read_bytes()))
  of_run = ("model", "seconds")
  assert [{key: value for key, value in one.items() if key not in of_run} for one in results[:1]] == [
    {key: value for key, value in one.items() if key not in of_run} for one in results[1:]
  ]
  assert store.read("preview.html") == (here / "out/preview.html").read_bytes()
  page = store.read("report.html").decode()
  assert "injected" in page
  assert "run evaluate again" not in page

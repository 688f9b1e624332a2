"""Data sets of a hub, which is on loopback: their files and splits."""

import json
import os
import subprocess
import sys

import hubkit
import pytest
import shapes
from datakit import question
from modelkit import ROOT

ASK = """
import json, sys
from insec_jax.files import hub, sources
for text in json.load(sys.stdin):
  try:
    found = sources.find(text, "data.path")
    rows = [row for source in found for row in sources.read(source, "data.path")]
    print(json.dumps([[source.shown for source in found], rows, hub.commits()]))
  except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
GSM8K_CARD = b"""---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: [main/test-*]
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
# GSM8K
"""
GSM8K = {
  "README.md": GSM8K_CARD,
  ".gitattributes": b"x",
  "main/train-00000-of-00002.parquet": shapes.parquet([question(1), question(2)]),
  "main/train-00001-of-00002.parquet": shapes.parquet([question(3)]),
  "main/test-00000-of-00001.parquet": shapes.parquet([question(4)]),
  "socratic/train-00000-of-00001.parquet": shapes.parquet([question(5)]),
}
ONE = b"---\nconfigs:\n- config_name: default\n  data_files: data.jsonl\n---\n"
BARE = {
  "training_notes.json": b"[]",
  "constraints.jsonl": b'{"text": "no"}\n',
  "train.jsonl": b'{"text": "t"}\n',
  "train.json": b'[{"text": "other"}]',
  "data/test-0.json": b'[{"text": "e"}]',
}
TEXTS = {
  "train": "hf://datasets/openai/gsm8k/main/train",
  "test": "hf://datasets/openai/gsm8k/main/test",
  "alone": "hf://datasets/openai/gsm8k/socratic",
  "pattern": "hf://datasets/openai/gsm8k/main/t*-00000-*.parquet",
  "file": "hf://datasets/openai/gsm8k@main/socratic/train-00000-of-00001.parquet",
  "one": "hf://datasets/org/one",
  "bare": "hf://datasets/org/bare/train",
  "in a folder": "hf://datasets/org/bare/data/test",
  "none": "hf://datasets/openai/gsm8k",
  "unknown": "hf://datasets/openai/gsm8k/main/validation",
  "bare unknown": "hf://datasets/org/bare/dev",
  "no such file": "hf://datasets/org/bare/no.parquet",
  "script": "hf://datasets/org/script/train",
  "csv": "hf://datasets/org/csv",
  "missing": "hf://datasets/org/none/train",
  "broken": "hf://datasets/org/broken/train",
}


def ask(served, folder, *texts, **variables):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), **served.variables(folder / "cache"), **variables}
  done = subprocess.run(
    [sys.executable, "-c", ASK], env=environment, text=True, input=json.dumps(texts), capture_output=True, check=True
  )
  return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
  """What a process says to each of TEXTS, and to some of them again, offline."""
  folder = tmp_path_factory.mktemp("datasets")
  with hubkit.running() as served:
    commit = served.add("datasets/openai/gsm8k", GSM8K)
    served.add("datasets/org/one", {"README.md": ONE, "data.jsonl": b'{"text": "a"}\n'})
    served.add("datasets/org/bare", BARE)
    served.add("datasets/org/script", {"script.py": b""})
    served.add("datasets/org/csv", {"README.md": ONE.replace(b"jsonl", b"csv"), "data.csv": b"a"})
    served.add("datasets/org/broken", {"README.md": b"---\nconfigs: [{data_files: [{split: 3}]}]\n---\n"})
    said = dict(zip(TEXTS, ask(served, folder, *TEXTS.values()), strict=True))
    gets = list(served.gets)
    offline = ask(served, folder, *(TEXTS[name] for name in ("train", "bare unknown", "missing")), HF_HUB_OFFLINE="1")
  return {"commit": commit, "gets": gets, "offline": offline, **said}


@pytest.mark.parametrize(
  ("asked", "numbers"), [("train", [1, 2, 3]), ("test", [4]), ("alone", [5]), ("pattern", [4, 1, 2]), ("file", [5])]
)
def test_the_records_of_a_split_or_of_named_files_are_read_and_no_others(answers, asked, numbers):
  shown, rows, commits = answers[asked]
  assert [row for row, _ in rows] == [question(number) for number in numbers]
  assert rows[0][1] == f"{shown[0]}: row 1"
  assert shown[0].startswith("hf://datasets/openai/gsm8k")
  assert commits["hf://datasets/openai/gsm8k"] == answers["commit"]


def test_each_file_is_fetched_once_and_those_of_other_splits_only_when_named(answers):
  of_gsm8k = [get for get in answers["gets"] if get.endswith("parquet")]
  assert sorted(of_gsm8k) == sorted(name for name in GSM8K if name.endswith("parquet"))


@pytest.mark.parametrize(("asked", "text"), [("one", "a"), ("bare", "t"), ("in a folder", "e")])
def test_a_split_without_a_card_is_found_by_the_names_of_its_files(answers, asked, text):
  assert [row for row, _ in answers[asked][1]] == [{"text": text}]


@pytest.mark.parametrize(
  ("asked", "line"),
  [
    ("none", "has main/train, main/test, socratic/train; name one, such as hf://datasets/openai/gsm8k/main/train"),
    ("unknown", "gsm8k/main/validation: the data set has main/train, main/test, socratic/train; name one"),
    (
      "bare unknown",
      "has no such files or split; it has constraints.jsonl, data/test-0.json, train.json, tr",
    ),
    ("no such file", "has no such files or split"),
    ("script", "it has none of .parquet, .jsonl, .json; hf://datasets/org/script@refs/convert/parquet may have them"),
    ("csv", "hf://datasets/org/csv/data.csv is none of .parquet, .jsonl, .json"),
    ("missing", "the Hub has no data set of this name"),
    ("broken", "README.md does not name the data set's files in a way that can be read"),
  ],
)
def test_a_split_that_cannot_be_found_is_refused_with_what_there_is(answers, asked, line):
  kind, said = answers[asked]
  assert kind == "InputError"
  assert line in said
  assert "\n" not in said


def test_offline_the_splits_in_the_cache_are_read(answers):
  there, unknown, missing = answers["offline"]
  assert len(there[1]) == 3
  assert [kind for kind, _ in (unknown, missing)] == ["InputError"] * 2
  assert "HF_HUB_OFFLINE" in unknown[1]
  assert "HF_HUB_OFFLINE is set" in missing[1]

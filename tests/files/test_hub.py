import errno
import json
import os
import subprocess
import sys

import hubkit
import pytest
from modelkit import ROOT

from insec_jax import refusals
from insec_jax.files import hub

ASK = """
import json, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1_000  # what has arrived of a connection that is cut counts in such pieces
from insec_jax.files import hub
for text, weights in json.load(sys.stdin):
  try:
    folder = hub.model_folder(text, "--model", weights=weights)
    print(json.dumps([str(folder), sorted(path.name for path in folder.rglob("*")), hub.commits()]))
  except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
MODEL = {
  "config.json": b"{}",
  "generation_config.json": b"{}",
  "tokenizer.json": b"{}",
  "model-00001-of-00002.safetensors": b"1" * 5_000,
  "model-00002-of-00002.safetensors": b"2" * 50,
  "model.safetensors.index.json": b"{}",
}
OTHERS = {
  "pytorch_model.bin": b"b",
  "model.gguf": b"g",
  "original/params.json": b"{}",
  "original/model.safetensors": b"s",
  "consolidated.safetensors": b"c",
}


def ask(served, folder, *asked, **variables):
  """What model_folder says in a process of its own, to each (text, weights)."""
  environment = {**os.environ, "PYTHONPATH": str(ROOT), **served.variables(folder / "cache"), **variables}
  done = subprocess.run(
    [sys.executable, "-c", ASK],
    cwd=folder,
    env=environment,
    text=True,
    input=json.dumps(asked),
    capture_output=True,
    timeout=60,
    check=True,
  )
  return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def served():
  with hubkit.running() as served:
    yield served


@pytest.fixture(scope="module")
def answers(served, tmp_path_factory):
  """One process without a token, and what it has fetched."""
  folder = tmp_path_factory.mktemp("hub")
  served.cut_after = 2_000
  commit = served.add("models/org/name", MODEL | OTHERS)
  old = served.add("models/org/name", MODEL | {"generation_config.json": b'{"old": 1}'}, "v1")
  served.add("models/org/gated", MODEL, gated=True)
  served.add("models/org/bare", {"config.json": b"{}", "pytorch_model.bin": b"b"})
  (folder / "org").mkdir()
  (folder / "org" / "here").mkdir()
  served.add("models/org/here", MODEL)
  texts = {
    "light": ("org/name", False),
    "whole": ("org/name", True),
    "v1": ("org/name@v1", False),
    "gated": ("org/gated", False),
    "missing": ("org/none", True),
    "revision": ("org/name@v9", True),
    "bare": ("org/bare", True),
    "here": ("org/here", True),
  }
  said = dict(zip(texts, ask(served, folder, *texts.values()), strict=True))
  return {"folder": folder, "commit": commit, "old": old, "gets": list(served.gets), **said}


def test_a_model_of_the_hub_is_fetched_with_the_files_it_needs_and_no_others(answers):
  folder, names, commits = answers["whole"]
  assert names == sorted(MODEL)
  assert folder.endswith(answers["commit"])
  assert commits["org/name"] == answers["commit"]


def test_without_weights_only_config_and_tokenizer_are_fetched(answers):
  assert answers["light"][1] == sorted(name for name in MODEL if not name.endswith(".safetensors"))


def test_a_revision_is_fetched_by_its_name(answers):
  assert answers["v1"][0].endswith(answers["old"])


def test_a_download_whose_connection_is_cut_goes_on_where_it_stopped(answers):
  first, second = (get for get in answers["gets"] if get.startswith("model-00001"))
  assert first == "model-00001-of-00002.safetensors"
  assert second == "model-00001-of-00002.safetensors bytes=2000-"


def test_a_local_folder_of_that_name_wins(answers):
  assert answers["here"][0] == "org/here"


@pytest.mark.parametrize(
  ("asked", "words"),
  [
    ("gated", ("--model=org/gated", "gated", "accept its terms", "/org/gated", "HF_TOKEN")),
    ("missing", ("--model=org/none", "no folder of this name", "no model of this name", "HF_TOKEN")),
    ("revision", ("--model=org/name@v9", "no such revision")),
    ("bare", ("--model=org/bare", "no model.safetensors")),
  ],
)
def test_a_model_that_cannot_be_used_is_refused_in_a_line_that_says_what_to_do(answers, asked, words):
  kind, line = answers[asked]
  assert kind == "InputError"
  assert [word for word in words if word not in line] == []
  assert "\n" not in line


def test_a_token_opens_a_gated_model_and_a_wrong_one_does_not(served, answers):
  folder = answers["folder"]
  assert ask(served, folder, ("org/gated", False), HF_TOKEN="hf_bad")[0][0] == "InputError"
  assert "config.json" in ask(served, folder, ("org/gated", False), HF_TOKEN=served.token)[0][1]


def test_offline_the_cache_is_used_and_what_it_lacks_is_named(served, answers):
  before = len(served.gets)
  asked = (("org/name", True), ("org/none", True))
  there, lacks = ask(served, answers["folder"], *asked, HF_HUB_OFFLINE="1")
  assert there[1] == sorted(MODEL)
  assert lacks[0] == "InputError"
  assert "HF_HUB_OFFLINE is set" in lacks[1]
  assert len(served.gets) == before


def test_without_a_network_a_model_not_in_the_cache_is_an_error_of_the_machine(answers):
  gone = hubkit.Hub("http://127.0.0.1:9")
  kind, line = ask(gone, answers["folder"], ("org/none", True))[0]
  assert kind == "ConnectionError"
  assert "http://127.0.0.1:9 cannot be reached" in line


def test_an_unreachable_hub_is_one_line_of_the_machine():
  error = hub._unreachable("--model=a/b", OSError("no route"))
  assert error.errno == errno.EHOSTUNREACH
  assert refusals.machine_refusal(error).startswith("--model=a/b is nothing local, and https://huggingface.co cannot")


@pytest.mark.slow
def test_processes_of_one_host_fetch_each_file_once(served, tmp_path):
  served.gets.clear()
  served.cut_after = 0
  served.add("models/org/shared", {"config.json": b"{}", "model.safetensors": b"4" * 30_000_000})
  environment = {**os.environ, "PYTHONPATH": str(ROOT), **served.variables(tmp_path / "cache")}
  processes = [
    subprocess.Popen([sys.executable, "-c", ASK], env=environment, text=True, stdin=-1, stdout=-1, cwd=tmp_path)
    for _ in range(4)
  ]
  for process in processes:
    process.stdin.write('[["org/shared", true]]')
    process.stdin.close()
  assert [json.loads(process.stdout.read())[1] for process in processes] == [["config.json", "model.safetensors"]] * 4
  assert [process.wait() for process in processes] == [0] * 4
  assert sorted(served.gets) == ["config.json", "model.safetensors"]

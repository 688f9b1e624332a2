"""Programs with models of a hub, which is on loopback."""

import json

import datakit
import hubkit
import pytest
from accepted import CONFIG, GOOD
from modelkit import run, save_model

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def hub():
  with hubkit.running() as hub:
    yield hub


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
  folder = tmp_path_factory.mktemp("programs")
  hub.commit = hub.add("models/org/name", hubkit.files_of(save_model(folder / "hf", datakit.bpe_tokenizer())), "v1")
  (folder / "config.py").write_text(CONFIG.replace('path="hf"', 'path="org/name@v1"'))
  datakit.write_lines(folder / "good.jsonl", [GOOD] * 3)
  return folder


def test_a_model_of_the_hub_is_trained_and_exported_with_its_commit(hub, folder):
  variables = hub.variables(folder / "cache")
  train = ["--config=config.py", "--workdir=run"]
  assert run("train", train, folder=folder, **variables)[0][0] == 0
  assert json.loads((folder / "run" / "environment.json").read_text())["hub"] == {"org/name@v1": hub.commit}
  # What has begun needs no hub any more.
  again = [*train, "--config.train.eval_every=2"]
  assert run("train", again, folder=folder, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(folder / "none"))[0][0] == 0
  assert run("export", ["--model=run", "--output=out"], folder=folder)[0][0] == 0
  assert f"`org/name` at commit `{hub.commit}`" in (folder / "out" / "README.md").read_text()


def test_preview_and_fit_fetch_no_weights(hub, folder):
  hub.gets.clear()
  variables = hub.variables(folder / "light")
  code, out, err = run("preview", ["--config=config.py"], folder=folder, **variables)[0]
  assert (code, "trained tokens" in out) == (0, True), err
  assert run("fit", ["--config=config.py", "--topology=local"], folder=folder, **variables)[0][0] == 0
  assert "tokenizer.json" in hub.gets
  assert [get for get in hub.gets if "safetensors" in get] == []


def test_a_missing_model_ends_with_2_and_a_missing_network_with_1(hub, folder):
  missing = ["--config=config.py", "--config.model.path=org/none"]
  code, _, err = run("preview", missing, folder=folder, **hub.variables(folder / "cache"))[0]
  assert (code, err.count("\n")) == (2, 1), err
  code, _, err = run("preview", missing, folder=folder, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(folder / "n"))[0]
  assert (code, err.count("\n")) == (1, 1), err

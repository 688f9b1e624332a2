"""The notebooks of launch/, run to their end on a CPU with a tiny model in place of the one that they name."""

import json
import pathlib
import re
import shutil
import sys

import pytest
from datakit import bpe_tokenizer
from modelkit import ROOT, save_model
from training_runs import SIGNALLED

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytestmark = pytest.mark.processes
OPTIONS = {
  "train.steps": 8,
  "train.log_every": 2,
  "train.eval_every": 8,
  "train.checkpoint_every": 4,
  "data.num_records": 60,
  "data.num_heldout": 10,
  "data.row_length": 256,
  "data.rows_per_device": 4,
  "optimizer.warmup_steps": 2,
  "evaluate.num_problems": 4,
  "evaluate.num_probes": 4,
  "evaluate.max_tokens": 16,
  "evaluate.batch_size": 8,
  "evaluate.max_size": 0,
  "evaluate.votes": 1,
  "evaluate.redraws": 1,
  "mine.num_problems": 16,
  "precision.compute": "float32",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("model") / "tiny", bpe_tokenizer())


def run(name: str, folder: pathlib.Path, model: pathlib.Path, **parameters) -> list[str]:
  """What the code cells print when the notebook is run in the folder with these parameters."""
  book = nbformat.read(ROOT / "launch" / f"{name}.ipynb", as_version=4)
  given = {
    "ENV": sys.prefix,
    "MODEL": str(model),
    "RUNS": str(folder / "runs"),
    "OPTIONS": [f"--config.{key}={value}" for key, value in OPTIONS.items()],
    **parameters,
  }
  (cell,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
  cell.source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in given.items())
  nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
  return ["".join(out.get("text", "") for out in cell.get("outputs", ())) for cell in book.cells]


def test_the_colab_notebook_runs_from_its_first_cell_to_the_page(tmp_path, model):
  said = "\n".join(run("colab", tmp_path, model))
  assert "step 8/8" in said
  assert "mining" in said
  assert "detection" in said  # the table of evaluate
  assert "report.html shows own" in said
  assert "<html" in (tmp_path / "report.html").read_text()
  config = json.loads((tmp_path / "runs" / "own" / "config.json").read_text())
  assert (config["rounds"], config["train"]["steps"]) == (2, 8)


def test_the_kaggle_notebook_goes_on_from_the_output_of_a_session_that_ended(tmp_path, model):
  first, second, program = tmp_path / "first", tmp_path / "second", tmp_path / "env" / "bin" / "insec"
  for folder in (first, second, program.parent):
    folder.mkdir(parents=True)
  # As when the time of the session is up after step 4.
  (tmp_path / "signalled.py").write_text(SIGNALLED)
  signalled = f"SIGNAL_AT=4 SIGNAL=15 exec {sys.executable} {tmp_path / 'signalled.py'}"
  program.write_text(
    f'#!/bin/sh\n[ "$1" != train ] || {{ shift; {signalled} "$@"; }}\nexec {sys.prefix}/bin/insec "$@"\n'
  )
  program.chmod(0o755)
  with pytest.raises(nbclient.exceptions.CellExecutionError, match="The time is up and the run is saved"):
    run("kaggle_tpu", first, model, ENV=str(tmp_path / "env"))
  shutil.move(first / "runs", tmp_path / "input")
  said = "\n".join(run("kaggle_tpu", second, model, EARLIER=str(tmp_path / "input")))
  assert re.search("resuming .*base after step [45]", said)
  assert (second / "report.html").is_file()

"""Runs with mistakes.rewind, from training to text."""

import json
import signal

import pytest
from datakit import write_lines
from modelkit import run
from training_runs import SIGNALLED, read_lines, train, write_home

pytestmark = pytest.mark.processes
REWINDING = ("mistakes.rewind=True", "data.cache=rows", "train.steps=20")


def test_a_run_that_rewinds_resumes_to_the_same_losses_and_writes_text(tmp_path):
  write_home(tmp_path)
  train(tmp_path, "whole", *REWINDING)
  train(tmp_path, "cut", *REWINDING, code=42, program=("-c", SIGNALLED), SIGNAL_AT=8, SIGNAL=int(signal.SIGTERM))
  train(tmp_path, "cut", *REWINDING)
  assert read_lines(tmp_path / "cut") == read_lines(tmp_path / "whole")
  assert "hidden tokens" in (tmp_path / "whole" / "receipt.txt").read_text()
  train(tmp_path, "plain", "train.steps=20")
  assert read_lines(tmp_path / "plain")[-1]["loss"] != read_lines(tmp_path / "whole")[-1]["loss"]

  code, said, err = run("export", ["--model=whole", "--output=hf"], folder=tmp_path)[0]
  assert code == 0, err
  assert "mistakes.rewind: a plain server or transformers will not rewind" in said
  write_lines(tmp_path / "p.jsonl", [{"prompt": f"{number}+2+3?\n"} for number in range(8)])
  given = ["--prompts=p.jsonl", "--max_tokens=30", "--flag_bias=4"]
  lines = [[f"--model={model}", f"--output={model}.jsonl", *given] for model in ("whole", "hf", "plain")]
  for code, _, err in run("generate", *lines, folder=tmp_path):
    assert code == 0, err
  whole, exported, plain = (
    [json.loads(line)["text"] for line in (tmp_path / f"{model}.jsonl").read_text().splitlines()]
    for model in ("whole", "hf", "plain")
  )
  assert whole == exported != plain
  assert any("<|fix|>" in text for text in whole)

  on = ["--config=config.py", "--workdir=on", "--config.model.size={}", "--config.model.path=hf"]
  code, _, err = run("train", on, folder=tmp_path)[0]
  assert (code, err.count("\n")) == (2, 1)
  assert "model.path=hf was trained with mistakes.rewind=True" in err
  assert not (tmp_path / "on").exists()

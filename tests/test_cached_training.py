"""Training on rows that are mapped from the files of a cache."""

import json
import os

import datakit
import pytest
from accepted import CONFIG
from modelkit import run, save_model

pytestmark = pytest.mark.processes


def losses(workdir):
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def test_training_from_the_cache_gives_the_same_losses_and_reads_no_text_again(tmp_path):
  save_model(tmp_path / "hf", datakit.bpe_tokenizer())
  (tmp_path / "config.py").write_text(CONFIG.replace("row_length=48", 'row_length=48, cache="cache"'))
  (tmp_path / "plain.py").write_text(CONFIG)
  records = [datakit.pieces(("prompt", f"{number}+2?"), ("text", str(number + 2))) for number in range(30)]
  path = tmp_path / "good.jsonl"
  datakit.write_lines(path, records)
  os.utime(path, ns=(10**18, 10**18))
  names = {"plain": "plain.py", "first": "config.py", "second": "config.py"}
  for name, config in names.items():
    if name == "first":  # preview makes the rows that train then reads
      code, _, err = run("preview", [f"--config={config}"], folder=tmp_path)[0]
      assert code == 0, err
      path.write_bytes(b"\0" * path.stat().st_size)
      os.utime(path, ns=(10**18, 10**18))
    code, _, err = run("train", [f"--config={config}", f"--workdir={name}"], folder=tmp_path)[0]
    assert code == 0, err
  plain, first, second = (losses(tmp_path / name) for name in names)
  assert len(plain) == 2
  assert plain == first == second
  assert len(list((tmp_path / "cache").glob("rows-*"))) == 1

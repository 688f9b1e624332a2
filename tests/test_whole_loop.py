"""The whole loop on a pretended slice, two hosts of four devices: from training to a folder for transformers."""

import contextlib
import json
import socket

import numpy as np
import pytest
from datakit import write_lines
from killkit import ended, start

pytestmark = pytest.mark.processes
CONFIG = """
from insec_jax.config import defaults, small_llama

def get_config():
  c = defaults()
  c.rounds = 2
  c.model.size = small_llama(num_layers=2)
  c.task.update(name="sudoku", min_size=2, max_size=3)
  c.data.update(num_records=600, num_heldout=20, row_length=128, rows_per_device=2)
  c.mistakes.update(share=0.3, max_per_solution=4, mined=0.3)
  c.optimizer.update(learning_rate=2e-3, warmup_steps=5)
  c.train.update(steps=40, log_every=10, eval_every=20, checkpoint_every=20)
  c.mesh.update(data=2, fsdp=2, tensor=2)
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=10, num_probes=10, max_tokens=24, batch_size=8, votes=2, redraws=1)
  c.mine.update(num_problems=24, samples=2)
  return c
"""
MESH = "--mesh=data:2,tensor:2"


def both(folder, program, *arguments) -> list[str]:
  """What the two processes of the program print, each with four devices."""
  started = [start(folder, program, *arguments, f"--process_id={number}", num_devices=4) for number in (0, 1)]
  return [out for out, _ in map(ended, started)]


def free_port() -> int:
  with contextlib.closing(socket.socket()) as bound:
    bound.bind(("", 0))
    return bound.getsockname()[1]


@pytest.fixture(scope="module")
def slice_of_two(tmp_path_factory):
  """A folder in which the loop has run, program after program."""
  folder = tmp_path_factory.mktemp("slice")
  (folder / "config.py").write_text(CONFIG)
  given = ("--config=config.py", "--num_processes=2")
  both(folder, "train", *given, "--workdir=run", f"--coordinator=localhost:{free_port()}")
  both(folder, "mine", *given, MESH, "--model=run", "--output=mined.jsonl")
  both(folder, "evaluate", *given, MESH, "--model=run", "--output=results.json")
  ended(start(folder, "export", "--model=run", "--output=exported", num_devices=4))
  return folder


def test_a_run_with_rounds_on_two_hosts_reaches_its_last_step(slice_of_two):
  lines = [json.loads(line) for line in (slice_of_two / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [0, 10, 20, 30, 40]
  assert lines[-1]["loss"] < 0.75 * lines[1]["loss"]
  environment = json.loads((slice_of_two / "run" / "environment.json").read_text())
  assert (environment["devices"]["processes"], environment["devices"]["count"]) == (2, 8)
  for number in (1, 2):
    assert (slice_of_two / "run" / "mined" / f"round_{number}.jsonl").read_text()
  shown = b"".join(path.read_bytes() for path in (slice_of_two / "run" / "tb").iterdir())
  assert [shown.count(f"receipt of round {number}/".encode()) for number in (1, 2, 3)] == [1, 1, 0]


def test_what_two_hosts_mine_and_measure_is_what_one_device_does(slice_of_two):
  given = ("--config=config.py", "--model=run")
  ended(start(slice_of_two, "mine", *given, "--output=mined_alone.jsonl"))
  assert (slice_of_two / "mined_alone.jsonl").read_bytes() == (slice_of_two / "mined.jsonl").read_bytes()
  ended(start(slice_of_two, "evaluate", *given, "--output=results_alone.json"))
  alone, shared = (json.loads((slice_of_two / f"results{end}.json").read_text()) for end in ("_alone", ""))
  assert shared["solved"] == alone["solved"]
  assert shared["first_tries"] == alone["first_tries"]


def test_transformers_writes_from_the_export_what_generate_does(slice_of_two):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  prompts = ["a2b4c1d3e3f1g4j3k2l1m1n2o3p4?\n", "a2b3c1d4e1g2h3j1k3l2m3o4p1?\n"]
  write_lines(slice_of_two / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
  given = ("--prompts=prompts.jsonl", "--max_tokens=16", "--temperature=0")
  ended(start(slice_of_two, "generate", "--model=run", "--output=run.jsonl", *given, MESH, num_devices=4))
  written = [json.loads(line)["tokens"] for line in (slice_of_two / "run.jsonl").read_text().splitlines()]
  torch.set_num_threads(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(slice_of_two / "exported", dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(slice_of_two / "exported")
  for prompt, tokens in zip(prompts, written, strict=True):
    token_1T = tokenizer(prompt, return_tensors="pt").input_ids
    sampled = model.generate(token_1T, attention_mask=torch.ones_like(token_1T), max_new_tokens=16, do_sample=False)
    np.testing.assert_array_equal(sampled[0, token_1T.shape[1] :], tokens)

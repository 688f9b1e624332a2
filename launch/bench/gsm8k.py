"""Trained tokens a second of whole runs on GSM8K, beside TRL: reading, packing, logging and saves included.

  launch/bench.sh gsm8k --data=GSM8K/train.jsonl [--model=FOLDER] [--steps=4,12] [--keep_activations]

Every side trains the same model on solutions alone, in float32, and saves every four steps. A figure is the difference
of two runs of different length, so that starting costs nothing: (trained tokens of the second - of the first) / the
same of seconds. A token is trained where it has a label, here the tokens of solutions and of the end of text.

    insec_jax     insec_jax.train with configs/smollm2_gsm8k.py, two packed rows of 640 tokens a step
    trl           SFTTrainer with its defaults: eight padded rows, activations recomputed
    trl packed    the same with packing, one row of 1,280 tokens a step

--keep_activations turns off TRL's recomputation (gradient_checkpointing), which is faster and takes more memory.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import race
import real_model
from race import Work

SAVE_EVERY = 4
TRL = ".venv/bench-trl"  # a folder of packages beside those of .venv; launch/bench.sh fills it


def difference(run: Callable[[int], float], arguments: argparse.Namespace) -> Callable[[], Work]:
  """Return work whose amount and seconds are the difference of two runs; `run` returns the trained tokens."""

  def timed(steps: int) -> tuple[float, float]:
    start = time.perf_counter()
    tokens = run(steps)
    return tokens, time.perf_counter() - start

  def work() -> Work:
    (tokens, seconds), (more_tokens, more_seconds) = (timed(steps) for steps in arguments.steps)
    return Work(more_tokens - tokens, None, more_seconds - seconds)

  run(min(arguments.steps))  # compiles, and fills the caches of files
  return work


def ours(arguments: argparse.Namespace) -> Callable[[], Work]:
  """The program `train`, as a user runs it."""

  def run(steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
      values = {
        "model.path": arguments.model,
        "data.path": str(arguments.data),
        "data.num_records": 0,
        "data.num_heldout": 0,
        "data.rows_per_device": 2,
        "mistakes.share": 0.0,
        "optimizer.warmup_steps": 0,
        "train.steps": steps,
        "train.checkpoint_every": SAVE_EVERY,
      }
      flags = [f"--config.{name}={value}" for name, value in values.items()]
      command = [sys.executable, "-m", "insec_jax.train", "--config=configs/smollm2_gsm8k.py", *flags]
      subprocess.run([*command, f"--workdir={folder}/run"], check=True)
      lines = pathlib.Path(folder, "run", "metrics.jsonl").read_text().splitlines()
      return json.loads(lines[-1])["trained_tokens"]

  return difference(run, arguments)


def trl(arguments: argparse.Namespace, **settings) -> Callable[[], Work]:
  """TRL's SFTTrainer on the same records, as prompts and completions; `settings` go to SFTConfig."""
  sys.path.append(TRL)
  import torch
  from datasets import Dataset
  from transformers import AutoModelForCausalLM, AutoTokenizer
  from trl import SFTConfig, SFTTrainer

  class Counted(SFTTrainer):
    trained = 0

    def compute_loss(self, model, inputs, *rest, **named):
      self.trained += int((inputs["labels"][..., 1:] != -100).sum())
      return super().compute_loss(model, inputs, *rest, **named)

  def run(steps: int) -> float:
    records = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    rows = [{"prompt": one["question"] + "\n", "completion": one["answer"]} for one in records]
    network = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
      trainer = Counted(
        network,
        SFTConfig(
          output_dir=folder,
          max_steps=steps,
          save_steps=SAVE_EVERY,
          logging_steps=1,
          use_cpu=True,
          bf16=False,
          gradient_checkpointing=not arguments.keep_activations,
          report_to=[],
          disable_tqdm=True,
          **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
      )
      trainer.train()
    return trainer.trained

  return difference(run, arguments)


def trl_packed(arguments: argparse.Namespace) -> Callable[[], Work]:
  """TRL with packing, in rows of as many tokens a step as ours."""
  return trl(arguments, packing=True, per_device_train_batch_size=1, max_length=1_280)


def prepare(arguments: argparse.Namespace) -> dict[str, None]:
  """Make the model; end with one line without data or two lengths."""
  if not arguments.data.is_file():
    raise SystemExit(f"error: no file '{arguments.data}'; give GSM8K's train.jsonl with --data")
  if len(arguments.steps) != 2 or arguments.steps[0] >= arguments.steps[1]:
    raise SystemExit("error: --steps needs two lengths, the first one smaller")
  return real_model.build(arguments)


def main() -> None:
  """Run the race."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  real_model.add_flag(parser)
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=lambda text: [int(part) for part in text.split(",")], default=[4, 12])
  parser.add_argument("--keep_activations", action="store_true")
  sides = {"insec_jax": ours, "trl": trl, "trl packed": trl_packed}
  race.main(sides, parser, unit="trained tokens", prepare=prepare)


if __name__ == "__main__":
  main()

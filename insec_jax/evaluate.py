"""Self-correction, measured: on injected mistakes and on the model's own.

  python -m insec_jax.evaluate --model DIR --config configs/X.py --output results.json

DIR may be a workdir, or an HF folder that was never trained on transcripts: it gets the markers as training would give
them at step 0, so the untuned model meets the same probes. Problems and probes depend on the config's task, data, seed
and evaluate sections only: arms that share these are measured on the same ones, in the same order.

results.json holds
  model, config, versions, seconds, seeds, counts
  rates          {source: {metric: {"rate", "k", "n", "low", "high"}}}; "rate" is null when n is 0. The sources:
    injected, injected: CLASS   a rule's wrong steps, continued greedily
    own, own: CLASS             the first wrong step of each greedy solution, and how that solution went on
    own sampled, ...            the same at temperature 1
    solutions, solutions sampled   whole solutions; t1 keeps each first attempt, t2 is after corrections
    What the metrics are: method/scoring.py (probe_rates, solution_rates). "..., forced" are those of probes that end in
    the flag. "auroc" is P(log p(flag) after a wrong step > after a right one): n pairs, interval after DeLong; right
    steps are the ones in place of the injected, or the model's own before its first wrong one.
  gap            injected minus own, {source: {metric: {"difference", "low", "high"}}}, interval after Newcombe
  tokens_per_problem   {source: {"mean", "low", "high", "n"}}
  solved         {source: {"t1", "t2"}}: 0 or 1 for each problem in order, for paired tests between arms
  transcripts    [{"title", "outcome", "pieces": [{"role", "text"}]}]: successes and failures, for the report
"""

import dataclasses
import json
import time

from absl import flags
from ml_collections import config_flags

from insec_jax import command
from insec_jax import config as config_lib
from insec_jax.config import Config
from insec_jax.decoding.output import written_whole
from insec_jax.decoding.probing import Prober, injected_probes, solved_problems
from insec_jax.decoding.results import results, table
from insec_jax.decoding.writer import Writer, with_markers
from insec_jax.method import tasks
from insec_jax.training.checkpoint import Opened, open_model, versions

MODEL = flags.DEFINE_string("model", None, "A workdir of train, or an HF folder.")
CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file of values.", lock_config=True)
OUTPUT = flags.DEFINE_string("output", None, "The file to write; an older one is replaced.")
flags.mark_flags_as_required(["model", "config", "output"])


def main() -> None:
  config = config_lib.build(CONFIG.value)
  task = tasks.get(config.task)
  with written_whole(OUTPUT.value) as file:
    opened = with_markers(open_model(MODEL.value), config, MODEL.value)
    found = {"model": MODEL.value, **evaluate(opened, task, config)}
    json.dump(found, file, indent=1, allow_nan=False)
  print(table(found["rates"]))


def evaluate(opened: Opened, task: tasks.Task, config: Config) -> dict:
  """Everything of results.json except the model's name."""
  start = time.perf_counter()
  problems, probes = solved_problems(task, config), injected_probes(task, config)
  prober = Prober(Writer(opened, compute=config.precision.compute), task, config)
  injected = prober.injected(probes)
  solved = {"": prober.solve(problems, temperature=0.0), " sampled": prober.solve(problems, temperature=1.0)}
  return {
    "config": dataclasses.asdict(config),
    "versions": versions(),
    "seconds": round(time.perf_counter() - start, 1),
    "seeds": {"problems": config.seed, "probes": config.seed, "sampling": config.seed},
    **results(injected, solved, within=config.evaluate.within),
  }


if __name__ == "__main__":
  command.run(main)

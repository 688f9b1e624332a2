"""Evaluation of self-correction, on injected mistakes and on the model's own.

  python -m insec_jax.evaluate --model DIR --config configs/X.py --output results.json [--step N]

DIR may be a workdir, or an HF folder that was never trained on transcripts. Such a model gets the markers as at step 0
of training, so the untuned model is measured on the same probes. Problems and probes depend only on the config's task,
data, seed and evaluate sections: arms that share these are measured on the same ones, in the same order.

results.json holds
  model, step (of the checkpoint; null where it is not known), config, versions, seconds, seeds, counts
  rates          {source: {metric: {"rate", "k", "n", "low", "high"}}}; "rate" is null when n is 0. The sources, each
                 greedily and, with " sampled" after the first word, at evaluate.temperature:
    injected, injected: CLASS   continuations of rule-generated wrong steps
    own, own: CLASS             the first wrong step of each solution, and the rest of that solution
    solutions                   whole solutions; t1 keeps each first attempt, t2 is after corrections
    "..., flags banned", "..., at threshold", "..., confidence", "..., redraw" and "..., majority" are the same with
    other decoding: see evaluation/measuring.py. For a majority, t1 is its first vote. "..., larger" are the same on
    problems larger than any in training.
    Metrics: see evaluation/scoring.py (probe_rates, solution_rates). "..., forced" are those of probes that end in the
    flag. "auroc" is P(log p(flag) after a wrong step > after a right one): n pairs, interval after DeLong; right steps
    are those that the injected ones replace, or the model's own before its first wrong one. "auroc, confidence" is the
    same for the step's score, its largest -log p. Intervals are Wilson's; for steps and places, of which a solution has
    several, they come from a bootstrap over solutions and are no narrower than Wilson's.
  gap            injected minus own of the same decoding, {source: {metric: {"difference", "low", "high"}}}, interval
                 after Newcombe
  first_tries    {source: {"right", "unverified" and each error class: rate}}, over all steps up to the first wrong one
                 or marker
  thresholds     {"flag_bias", "confidence", "max_false_alarms", "temperature": {"greedy", "sampled"}}, chosen on
                 validation problems; null without any right step there, or without a flag token. "n": {"greedy",
                 "sampled": {"right", "wrong"}}, the number of steps of those problems
  operating      {source: [{"bias", "detection": rate, "false_alarms": rate}]}, ascending in bias; rates of single
                 steps, "own" as generated with flags banned. Sampled rates are expectations
  operating_confidence   the same for each "threshold"
  tokens_per_problem     {source: {"mean", "low", "high", "n"}}, all generated tokens: for a redraw including those
                 deleted, for a majority those of all votes
  accuracy_at_tokens     {source: [{"votes", "accuracy": rate, "tokens_per_problem"}]} of the majority of 1, 3, 5 ...
  solved         {source: {"t1", "t2"}}: 0 or 1 for each problem in order, for paired tests between arms
  transcripts    [{"title", "outcome", "pieces": [{"role", "text"}]}]: successes and failures, for the report
"""

import dataclasses
import json
import time

from absl import flags

from insec_jax import command, config_file
from insec_jax.config import Config
from insec_jax.config_build import build
from insec_jax.data.problems import larger_problems, problems_to_solve, validation_problems
from insec_jax.evaluation.measuring import measure
from insec_jax.evaluation.probing import Prober, injected_probes
from insec_jax.evaluation.results import results
from insec_jax.evaluation.tables import table
from insec_jax.files.writing import written_whole
from insec_jax.generation.generator import TextGenerator
from insec_jax.generation.loading import LoadedModel, load_model, with_markers
from insec_jax.generation.placement import MESH_HELP
from insec_jax.method import tasks
from insec_jax.training.layout import versions

MODEL = flags.DEFINE_string("model", None, "Workdir of train, or Hugging Face folder.")
MESH = flags.DEFINE_string("mesh", "", MESH_HELP)
STEP = flags.DEFINE_integer("step", None, "Step of the workdir's checkpoint to use (default: newest).", lower_bound=0)
CONFIG = config_file.define_flag()
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write; an existing one is replaced.")
flags.mark_flags_as_required(["model", "config", "output"])


def main() -> None:
  config = build(CONFIG.value)
  task = tasks.get(config.task)
  with written_whole(OUTPUT.value, inputs=config_file.files_read(config)) as file:
    loaded = with_markers(
      load_model(MODEL.value, step=STEP.value, mesh=MESH.value, compute=config.precision.compute), config, MODEL.value
    )
    measured = {"model": MODEL.value, "step": loaded.step, **evaluate(loaded, task, config)}
    json.dump(measured, file, indent=1, allow_nan=False)
  print(heading(measured))
  print(table(measured))
  print(f"\n{measured['seconds']} seconds")


def heading(measured: dict) -> str:
  """Return the line above the table: the model and its step."""
  at = "" if measured["step"] is None else f", step {measured['step']:,}"
  return f"{measured['model']}{at}\n"


def evaluate(loaded: LoadedModel, task: tasks.Task, config: Config) -> dict:
  """Return all fields of results.json except the model and its step."""
  start = time.perf_counter()
  problems, probes = problems_to_solve(task, config), injected_probes(task, config)
  validation = validation_problems(task, config)
  prober = Prober(TextGenerator(loaded), task, config)
  measured = measure(
    prober, config, probes=probes, problems=problems, validation=validation, larger=larger_problems(config)
  )
  return {
    "config": dataclasses.asdict(config),
    "versions": versions(),
    "seconds": round(time.perf_counter() - start, 1),
    "seeds": {"problems": config.seed, "probes": config.seed, "sampling": config.seed},
    **results(measured),
  }


if __name__ == "__main__":
  command.run(main)

"""Self-correction, measured: on injected mistakes and on the model's own.

  python -m insec_jax.evaluate --model DIR --config configs/X.py --output results.json [--step N]

DIR may be a workdir, or an HF folder that was never trained on transcripts: it gets the markers as training would give
them at step 0, so the untuned model meets the same probes. Problems and probes depend on the config's task, data, seed
and evaluate sections only: arms that share these are measured on the same ones, in the same order.

results.json holds
  model, step (of the checkpoint; null where it is not known), config, versions, seconds, seeds, counts
  rates          {source: {metric: {"rate", "k", "n", "low", "high"}}}; "rate" is null when n is 0. The sources, each
                 greedily and, with " sampled" after the first word, at evaluate.temperature:
    injected, injected: CLASS   a rule's wrong steps, continued
    own, own: CLASS             the first wrong step of each solution, and how that solution went on
    solutions                   whole solutions; t1 keeps each first attempt, t2 is after corrections
    "..., flags banned", "..., at threshold", "..., confidence", "..., redraw" and "..., majority" are these with other
    decoding: evaluation/measuring.py says which and how. Of a majority t1 is its first vote. "..., larger" are these on
    problems larger than any trained on.
    What the metrics are: method/scoring.py (probe_rates, solution_rates). "..., forced" are those of probes that end in
    the flag. "auroc" is P(log p(flag) after a wrong step > after a right one): n pairs, interval after DeLong; right
    steps are the ones in place of the injected, or the model's own before its first wrong one. "auroc, confidence" is
    the same for the step's score, its largest -log p. Intervals are Wilson's; of steps and places, several in one
    solution, by bootstrap over solutions and no narrower than Wilson's.
  gap            injected minus own of the same decoding, {source: {metric: {"difference", "low", "high"}}}, interval
                 after Newcombe
  first_tries    {source: {"right", "unverified" and each error class: rate}}: of all steps up to the first wrong one or
                 marker
  thresholds     {"flag_bias", "confidence", "max_false_alarms", "temperature": {"greedy", "sampled"}}, as chosen on
                 validation problems; null where there was no right step to choose by, or no flag token. "n": {"greedy",
                 "sampled": {"right", "wrong"}}, the steps of those problems
  operating      {source: [{"bias", "detection": rate, "false_alarms": rate}]}, the bias rising; of single steps, "own"
                 as written with flags banned. Sampled rates are expected ones
  operating_confidence   the same over "threshold"
  tokens_per_problem     {source: {"mean", "low", "high", "n"}}, all that were generated: of a redraw with those
                 deleted, of a majority those of all votes
  accuracy_at_tokens     {source: [{"votes", "accuracy": rate, "tokens_per_problem"}]} of the majority of 1, 3, 5 ...
  solved         {source: {"t1", "t2"}}: 0 or 1 for each problem in order, for paired tests between arms
  transcripts    [{"title", "outcome", "pieces": [{"role", "text"}]}]: successes and failures, for the report
"""

import dataclasses
import json
import time

from absl import flags

from insec_jax import command, config_file
from insec_jax import config as config_lib
from insec_jax.config import Config
from insec_jax.evaluation.measuring import measure
from insec_jax.evaluation.probing import Prober, injected_probes, larger_problems, solved_problems, validation_problems
from insec_jax.evaluation.results import results
from insec_jax.evaluation.tables import table
from insec_jax.files import written_whole
from insec_jax.generation.generator import TextGenerator, with_markers
from insec_jax.method import tasks
from insec_jax.training.checkpoint import LoadedModel, load_model, versions

MODEL = flags.DEFINE_string("model", None, "A workdir of train, or an HF folder.")
STEP = flags.DEFINE_integer("step", None, "The checkpoint of a workdir to use; the newest if not given.", lower_bound=0)
CONFIG = config_file.define_flag()
OUTPUT = flags.DEFINE_string("output", None, "The file to write; an older one is replaced.")
flags.mark_flags_as_required(["model", "config", "output"])


def main() -> None:
  config = config_lib.build(CONFIG.value)
  task = tasks.get(config.task)
  with written_whole(OUTPUT.value, inputs=config_file.files_read(config)) as file:
    opened = with_markers(load_model(MODEL.value, step=STEP.value), config, MODEL.value)
    found = {"model": MODEL.value, "step": opened.step, **evaluate(opened, task, config)}
    json.dump(found, file, indent=1, allow_nan=False)
  print(heading(found))
  print(table(found))
  print(f"\n{found['seconds']} seconds")


def heading(found: dict) -> str:
  """Return the line above the table: which model, at which step."""
  at = "" if found["step"] is None else f", step {found['step']:,}"
  return f"{found['model']}{at}\n"


def evaluate(opened: LoadedModel, task: tasks.Task, config: Config) -> dict:
  """Return everything of results.json except the model and its step."""
  start = time.perf_counter()
  problems, probes = solved_problems(task, config), injected_probes(task, config)
  validation = validation_problems(task, config)
  prober = Prober(TextGenerator(opened, compute=config.precision.compute), task, config)
  measured = measure(
    prober, config, probes=probes, problems=problems, validation=validation, larger=larger_problems(config)
  )
  return {
    "config": dataclasses.asdict(config),
    "versions": versions(),
    "seconds": round(time.perf_counter() - start, 1),
    "seeds": {"problems": config.seed, "probes": config.seed, "sampling": config.seed},
    **results(measured, within=config.evaluate.within),
  }


if __name__ == "__main__":
  command.run(main)

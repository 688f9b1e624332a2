"""Evaluation of self-correction, on injected mistakes and on the model's own.

  python -m insec_jax.evaluate --model DIR --config configs/X.py --output results.json [--step N]
      [--num_processes N --process_id I] [--server URL]

DIR may be a workdir, or an HF folder that was never trained on transcripts. Such a model gets the markers as at step 0
of training, so the untuned model is measured on the same probes. Problems and probes depend only on the config's task,
data, seed and evaluate sections: arms that share these are measured on the same ones, in the same order.

After a kill the same command resumes from results.json.parts. Processes, each started with its --process_id, share the
work and wait for each other: the folder of results.json must be in a bucket (gs://) or on a drive that all of them
share. The last to finish writes the file, with the same results for any number of them.

With --server the weights are those of a server of OpenAI's completions, such as vLLM, and --model gives the tokenizer,
the template and the markers only. Greedy rates are the same; at a temperature the server draws others. What it cannot
measure is left out, and named on stderr.

results.json holds
  model, step (of the checkpoint; null where it is not known), server (its name for the model; null without --server),
                 config, versions, seeds, counts
  seconds        of the process that wrote the file, with what it computed before a kill
  rates          {source: {metric: {"rate", "k", "n", "low", "high"}}}; "rate" is null when n is 0. The sources, each
                 greedily and, with " sampled" after the first word, at evaluate.temperature:
    injected, injected: CLASS   continuations of rule-generated wrong steps
    own, own: CLASS             the first wrong step of each solution, and the rest of that solution
    solutions                   whole solutions; t1 keeps each first attempt, t2 is after corrections
    "..., flags banned", "..., at threshold", "..., confidence", "..., redraw" and "..., majority" are the same with
    other decoding: see evaluation/measuring.py. For a majority, t1 is its first vote. "..., larger" are the same on
    problems larger than any in training. The sources of evaluate.rivals ("..., redraw 1", "..., trigger 1",
    "..., best redraw", "..., best majority", "..., beam 2", "state", "swapped", "linear probe") are those of
    evaluation/rivals.py; of "state" the metrics are "fresh_draw" and "second_choice", a right step in place of an own
    mistake, without unverified ones, of all and, with ", flagged", of the mistakes that were flagged.
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
                 "sampled": {"right", "wrong"}}, the number of steps of those problems. "apart": whether none of them is
                 trained on, mined or solved
  operating      {source: [{"bias", "detection": rate, "false_alarms": rate}]}, ascending in bias; rates of single
                 steps, "own" as generated with flags banned. Sampled rates are expectations
  operating_confidence   the same for each "threshold"
  tokens_per_problem     {source: {"mean", "low", "high", "n"}}, all generated tokens: for a redraw including those
                 deleted, for a majority those of all votes, for a beam search those of all beams
  accuracy_at_tokens     {source: [{"votes", "accuracy": rate, "tokens_per_problem"}]} of the majority of 1, 3, 5 ...
  tokens         with any of evaluate.rivals: {source: generated tokens of each problem in order}, as in "solved"
  temperatures   with the rival "temperature": {"redraw" and "majority": {"best", "validation": [{"temperature",
                 "accuracy": rate}]}}
  strengths      with the rival "linear_probe": {source: L2 that was chosen, null where no probe could be fitted}
  mistakes       with the rival "swapped": [{"problem" (its number), "prompt", "before": steps, "wrong", "error"}], the
                 own ones of the greedy solutions without flags, for evaluate.swapped_path of another evaluation
  solved         {source: {"t1", "t2"}}: 0 or 1 for each problem in order, for paired tests between arms
  structures     {"solutions", "solutions, larger"}: the structure class of each of these problems, a short hash.
                 Problems of one class differ only in labels, order or numbers; "solutions" are the problems of every
                 source but those of larger problems
  transcripts    [{"title", "outcome", "pieces": [{"role", "text"}]}]: successes and failures, for the report
"""

from absl import flags

from insec_jax import command, config_file, flags_help
from insec_jax.distributed import shares
from insec_jax.generation.flags import define_decoding_flags, define_model_flags

with flags_help.group("Input and output"):
  MODEL, STEP = define_model_flags()
  CONFIG = config_file.define_flag()
  OUTPUT = flags.DEFINE_string("output", None, "JSON file to write; an existing one is replaced.")
MESH = define_decoding_flags()
flags.mark_flags_as_required(["model", "config", "output"])

command.begin(__name__)

import dataclasses
import json
import sys
import time
from typing import Any

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.config_build import build
from insec_jax.data.problems import chosen_apart, larger_problems, problems_to_solve, validation_problems
from insec_jax.evaluation import structures
from insec_jax.evaluation.measuring import left_out, measure
from insec_jax.evaluation.probing import Prober, injected_probes
from insec_jax.evaluation.results import results
from insec_jax.evaluation.rivals import read_mistakes
from insec_jax.evaluation.tables import table
from insec_jax.files.chunks import one_process, unfinished
from insec_jax.files.reading import local_path
from insec_jax.files.writing import check_output, is_stream, written_whole
from insec_jax.generation import engine
from insec_jax.generation.generator import TextGenerator
from insec_jax.generation.journal import journaled
from insec_jax.generation.loading import LoadedModel, with_markers
from insec_jax.method import tasks
from insec_jax.training import layout, sinks
from insec_jax.training.layout import flat, versions

READ = ("seed", "task", "data", "mistakes", "tokenizer", "evaluate")  # sections of the config that are read here


def main() -> None:
  config = build(CONFIG.value)
  process, num_processes = shares.share_of_work()
  task = tasks.get(config.task)
  check_output(OUTPUT.value, "--output", config_file.files_read(config))
  with one_process(OUTPUT.value, process):
    if (measured := measure_model(config, task, process=process, num_processes=num_processes)) is None:
      print(unfinished(process, num_processes, OUTPUT.value), file=sys.stderr, flush=True)
      return
  print(heading(measured))
  print(table(measured))
  print(f"\n{measured['seconds']} seconds")
  if ((folder := local_path(MODEL.value, "--model")) / layout.MODEL).is_file():  # a workdir
    sinks.publish(folder, "results", text=f"{heading(measured)}\n{table(measured)}")


def measure_model(config: Config, task: tasks.Task, *, process: int, num_processes: int) -> dict[str, Any] | None:
  """Write results.json and return its content; None where other processes have not finished."""
  alone = is_stream(local_path(OUTPUT.value, "--output"))
  if alone and num_processes > 1:
    raise InputError(f"--output={OUTPUT.value} cannot be shared by {num_processes} processes; give a file's path")
  stored = engine.open_model(
    MODEL.value, step=STEP.value, mesh=MESH.value, compute=config.precision.compute, score_flags=True
  )
  loaded = with_markers(stored, config, MODEL.value)
  writer = TextGenerator(loaded)
  served = None if loaded.server is None else loaded.server.model
  measured = {"model": MODEL.value, "step": loaded.step, "server": served}
  if alone:
    measured |= evaluate(writer, task, config)
    write(measured, config)
    return measured
  header, shared = work(stored, config), {"process": process, "num_processes": num_processes}
  journal = journaled(writer.sampler, OUTPUT.value, header, is_free=is_free, **shared)
  writer.sampler = journal
  measured |= evaluate(writer, task, config)
  measured["seconds"] = round(measured["seconds"] + journal.seconds_before, 1)
  return measured if journal.join(lambda: write(measured, config)) else None


def work(stored: LoadedModel, config: Config) -> dict[str, Any]:
  """Return all that the first texts depend on; the later ones depend on these.

  `stored` is the model without rows for markers that it lacks: the mean of a sharded matrix depends on the mesh.
  """
  read = {name: value for name, value in flat(config).items() if name.partition(".")[0] in READ and not is_free(name)}
  return {"the weights": engine.identity(stored), "step": stored.step, "compute": stored.compute, **read}


def is_free(key: str) -> bool:
  """Return whether no text depends on this key of the config, so that it may differ when an evaluation goes on."""
  return key == "evaluate.endpoints" or layout.is_free(key, ("evaluate.",))


def write(measured: dict[str, Any], config: Config) -> None:
  """Write results.json."""
  with written_whole(OUTPUT.value, inputs=config_file.files_read(config)) as file:
    json.dump(measured, file, indent=1, allow_nan=False)


def heading(measured: dict) -> str:
  """Return the line above the table: the model and its step."""
  at = "" if measured["step"] is None else f", step {measured['step']:,}"
  return f"{measured['model']}{at}\n"


def evaluate(writer: TextGenerator, task: tasks.Task, config: Config) -> dict:
  """Return all fields of results.json except the model and its step."""
  start = time.perf_counter()
  problems, probes = problems_to_solve(task, config), injected_probes(task, config)
  validation, apart = validation_problems(task, config), chosen_apart(config)
  larger, path = larger_problems(config), config.evaluate.swapped_path
  swapped = read_mistakes(path, problems, task) if path else None
  for line in left_out(writer, config):
    print(line, file=sys.stderr, flush=True)
  if not apart:
    print(
      "thresholds are chosen on problems trained on: fewer than evaluate.num_problems held-out ones are left beside "
      "those that are solved",
      file=sys.stderr,
      flush=True,
    )
  prober = Prober(writer, task, config)
  measured = results(
    measure(prober, config, probes=probes, problems=problems, validation=validation, larger=larger, swapped=swapped)
  )
  measured["thresholds"]["apart"] = apart
  return {
    "config": dataclasses.asdict(config),
    "versions": versions(),
    "seconds": round(time.perf_counter() - start, 1),
    "seeds": {"problems": config.seed, "probes": config.seed, "sampling": config.seed},
    **measured,
    "structures": structures.by_source(task, problems, larger),
  }


if __name__ == "__main__":
  command.run(main)

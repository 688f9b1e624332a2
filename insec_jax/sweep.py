"""Experiment runner: trains, evaluates and compares the arms of a config over several seeds.

  python -m insec_jax.sweep --config configs/X.py --arms clean,insec --seeds 0,1,2 --output DIR [--base base]
      [--reference clean] [--jobs 2] [--config.a.b=v]

Each stage is a run of another program, with its own log under DIR/logs. For seed S and arm A:

  train     DIR/seedS/A                 --config=X.py:A --config.seed=S, and the values below
  export    DIR/seedS/A_hf              for an arm in --base
  mine      DIR/seedS/A_mined.jsonl     for an arm that needs mined records
  evaluate  DIR/seedS/A/results.json

and at the end DIR/report.html and DIR/table.txt over all seeds, the endpoints first, and, with train.curve_points,
DIR/curves.json: the accuracy of each arm over its trained tokens. DIR/plan.json is written before the first run. It
fixes endpoints (evaluate.endpoints), seeds, bases, commit and configs: a later run in DIR with others is refused. Arms
may be added.

An arm whose config gives model.size starts from random weights, drawn by the seed. An arm whose config gives model.path
starts, with --base, from the base arm of the same seed: --config.model.path=DIR/seedS/BASE_hf replaces the value of the
file. With several bases (--base small,large) each starts from the one before it, and the arms from the last. Without
--base, model.path must be an existing folder. A base arm is always trained; it is evaluated only if it is in --arms.

An arm with mistakes.mined above 0, rounds 0 and no mistakes.mined_path mines with its starting weights, and gets the
file as --config.mistakes.mined_path. Arms with equal starting weights and mining settings share the file of the first;
mistakes.view and mistakes.mined_from may differ. With mistakes.mined_from="next_seed" the file is that of the next of
--seeds, after the last that of the first. With "swapped" in evaluate.rivals, all arms of a seed continue from the own
mistakes of `clean` (of the first arm where there is no such), which is evaluated before them.

The same command resumes a stopped sweep: finished stages are not run again. When a stage fails, the last lines of its
log are printed, the stages that depend on it are left out, the others run, and the exit code is 1. SIGTERM and Ctrl-C
are passed on to running programs, train saves, and the exit code is 42. With --config.train.minutes=M the whole sweep
ends in the same way before M minutes have passed.

--jobs N runs N stages in parallel, each on its share of the cores (Linux; elsewhere they share all). Leave it at 1 on
an accelerator: parallel programs would share its memory.
"""

from absl import flags

from insec_jax import command, config_file, flags_help

with flags_help.group("Study"):
  config_file.define_flag("Config file of the experiment, with arms.")
  config_file.define_study_flags()
  REFERENCE = flags.DEFINE_string(
    "reference", None, "Arm with which the others are compared (default: clean if it is one, else the first)."
  )
with flags_help.group("Run"):
  OUTPUT = flags.DEFINE_string("output", None, "Folder of the sweep; a stopped sweep is resumed.")
  JOBS = flags.DEFINE_integer("jobs", 1, "Number of stages to run in parallel.", lower_bound=1, upper_bound=1_024)
flags.mark_flags_as_required(["config", "arms", "seeds", "output"])

command.begin(__name__)

import collections
import json
import sys
from collections.abc import Sequence

import jax

from insec_jax import study, study_plan
from insec_jax.command import InputError
from insec_jax.files.bucket_paths import BucketPath
from insec_jax.files.reading import local_path
from insec_jax.files.writing import folder_writer, write_text
from insec_jax.pages import learning
from insec_jax.pages.runs import read_run
from insec_jax.pages.summary import table
from insec_jax.stages import (
  DONE,
  DONE_BEFORE,
  ChildPrograms,
  Stage,
  run_stage,
  run_stages,
  shares_of_cores,
  stop_on_signal,
)
from insec_jax.study import Study, StudyStage
from insec_jax.training import layout


def main() -> int:
  output = local_path(OUTPUT.value, "--output")
  if isinstance(output, BucketPath):
    raise InputError(f"--output={output}: a sweep compares the ages of its files; give a local folder")
  sweep = study.from_flags(output)
  reference = REFERENCE.value or ("clean" if "clean" in sweep.arms else sweep.arms[0])
  if reference not in sweep.arms:
    raise InputError(f"--reference={reference} is none of --arms={','.join(sweep.arms)}; name one of these")
  jax.config.update("jax_platforms", "cpu")  # accelerators are for the programs that this one starts
  stages = sweep.stages()
  cores = shares_of_cores(JOBS.value)
  study_plan.endpoints(sweep, stages)
  study_plan.check_evaluations(sweep, stages)
  with folder_writer(output, "--output"):
    study_plan.hold(sweep, stages)
    return run_all(sweep, stages, cores, reference)


def run_all(sweep: Study, stages: Sequence[StudyStage], cores: Sequence[set[int] | None], reference: str) -> int:
  """Run the stages, compare the arms, and return the exit code."""
  output, seeds = sweep.output, sweep.seeds
  for folder in ("logs", *(f"seed{seed}" for seed in seeds)):
    (output / folder).mkdir(parents=True, exist_ok=True)
  limits = {stage.config.train.minutes for stage in stages} - {0}
  with stop_on_signal(min(limits, default=0.0)) as stopping:
    outcomes = run_stages(stages, cores, stopping)
    failed = [name for name, outcome in outcomes.items() if outcome not in (DONE, DONE_BEFORE)]
    failed += [] if stopping.is_set() else compare(sweep, reference, stopping)
    if stopping.is_set():
      print("stopped; run the same command to go on", file=sys.stderr)
      return command.PREEMPTED
  counted = collections.Counter(outcomes.values())
  print("; ".join(f"{num} {outcome}" for outcome, num in counted.items()))
  if failed:
    print(f"not done: {', '.join(failed)}", file=sys.stderr)
  return command.FAILED if failed else command.DONE


def compare(sweep: Study, reference: str, stopping: ChildPrograms) -> list[str]:
  """Write the page, write and print the table over seeds, and return the names of failed parts.

  Runs that have not begun are omitted from both.
  """
  runs = {
    arm: [
      read_run(workdir, f"seed{seed}/{arm}")
      for seed in sweep.seeds
      if (workdir := sweep.workdir(arm, seed)).joinpath(layout.CONFIG).is_file()
    ]
    for arm in sweep.arms
  }
  runs = {arm: arm_runs for arm, arm_runs in runs.items() if arm_runs}
  if not any(run.results for arm_runs in runs.values() for run in arm_runs):
    return ["report (nothing was evaluated)"]
  if reference in runs and any(run.results for run in runs[reference]):
    chosen = [f"--reference={reference}"]
  else:
    reference, chosen = next(iter(runs)), []
  text = table(runs, reference)
  write_text(sweep.output / "table.txt", text + "\n")
  if curves := learning.as_json(runs):
    write_text(sweep.output / "curves.json", json.dumps(curves, indent=1) + "\n")
  print(f"\n{text}\n")
  page = sweep.output / "report.html"
  folders = ",".join(str(run.folder) for arm_runs in runs.values() for run in arm_runs)
  stage = Stage(
    "report",
    (*study.PYTHON, "insec_jax.report", f"--workdirs={folders}", f"--output={page}", *chosen),
    sweep.output / "logs" / "report.log",
    lambda: False,
  )
  return [] if run_stage(stage, stopping) == DONE else [stage.name]


if __name__ == "__main__":
  command.run(main)

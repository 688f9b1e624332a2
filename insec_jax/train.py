"""Training: fine-tunes a model of an HF folder, or trains one of a given size from random weights; resumes a run.

  python -m insec_jax.train --config configs/X.py --workdir DIR [--config.a.b=v]

SIGTERM and Ctrl-C save and exit with 42; the same command resumes. With --config.train.minutes=M the run does so by
itself, early enough to be saved M minutes after its start. When a loss is not finite, the state before that step is
saved and the exit code is 3.

Process id and coordinator are detected on Cloud TPU, GKE, Slurm and Open MPI, where every host runs this command.
Elsewhere each process needs [--coordinator HOST[:PORT] --num_processes N --process_id I]. All share the workdir, which
may be in a bucket (gs://BUCKET/NAME).

With --config.rounds=R the steps are divided into R equal parts. Before each part the current weights mine their own
mistakes (as the program mine does, each process its share) into DIR/mined/round_K.jsonl, K from 1. The part is trained
on these records, a fraction mistakes.mined of all, and on the config's other data. With --config.policy.method=gradient
the weights write whole texts in place of that, and the part is a policy gradient with the checker as reward. With
"distill" they correct their own wrong steps, and learn from the same weights with the checker's verdict as a hint.
"""

from absl import flags

from insec_jax import command, config_file, flags_help
from insec_jax.distributed import coordinator

with flags_help.group("Run"):
  CONFIG = config_file.define_flag()
  WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; an interrupted run is resumed.")
with flags_help.group("Several processes"):
  COORDINATOR = flags.DEFINE_string(
    "coordinator", None, f"HOST[:PORT] or [IPV6][:PORT] of process 0 (default port: {coordinator.PORT})."
  )
  NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes of the run.", lower_bound=1, upper_bound=65_536
  )
  PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
  JOIN_SECONDS = flags.DEFINE_integer(
    "join_seconds", 300, "Seconds to wait for all processes at the start.", lower_bound=1, upper_bound=7 * 86_400
  )
flags.mark_flags_as_required(["config", "workdir"])

command.begin(__name__)

import contextlib
import functools
import pathlib

import jax

from insec_jax.config import Config
from insec_jax.config_build import build
from insec_jax.data import cache
from insec_jax.distributed import rendezvous
from insec_jax.distributed.processes import Processes, joined
from insec_jax.files.reading import local_path
from insec_jax.files.writing import folder_writer
from insec_jax.mining.phases import phases_of
from insec_jax.model import memory, sharding
from insec_jax.training import checkpoint, layout, sinks, streams
from insec_jax.training.loop import loop
from insec_jax.training.run import Curve, begin, is_trained, resume
from insec_jax.training.time_limit import NoTimeError
from insec_jax.training.workdir import check_shared, is_empty, make_empty, started_with, write_workdir


def main() -> int:
  config = build(CONFIG.value)
  spec = rendezvous.detect_processes(
    COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, seconds=JOIN_SECONDS.value
  )
  with joined(spec, started_with(config), seconds=JOIN_SECONDS.value) as processes:
    workdir = local_path(WORKDIR.value, "--workdir")
    with folder_writer(workdir, "--workdir") if processes.is_first else contextlib.nullcontext():
      return train(config, workdir, processes)


def train(config: Config, workdir: pathlib.Path, processes: Processes) -> int:
  """Train, and return the exit code: DONE, or PREEMPTED after a signal, with the state saved.

  All inputs are checked before the first file is written. Raises DivergedError when a loss is not finite.
  """
  if processes.is_first:
    sinks.check(config.log)
    layout.check_workdir(workdir, config)
    if line := cache.unused(config):
      processes.say(line)
  # Process 0 lists for all: on a network drive a file may appear later on another host.
  saved_steps = processes.gather("the search for checkpoints", layout.steps(workdir) if processes.is_first else None)[0]
  processes.agree(
    "devices",
    {
      "platform": jax.default_backend(),
      "device": jax.local_devices()[0].device_kind,
      "devices of its own": jax.local_device_count(),
      "devices of the run": jax.device_count(),
    },
  )
  memory.check_devices(config, jax.local_devices())
  streams.check(config, processes.num)
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  phases = phases_of(config, workdir, mesh, processes)
  if saved_steps:
    check_shared(workdir, processes)
    if (
      saved_steps[-1] == config.train.steps
      and not layout.is_moved(workdir, config)
      and is_trained(config, mesh, workdir, processes)
    ):
      processes.say(f"{workdir} is trained to its last step, {saved_steps[-1]}; nothing to do")
      return command.DONE
    run, damaged = resume(config, mesh, workdir, saved_steps, phases, processes)
  else:
    run, damaged = begin(config, mesh, processes), []
  streams.check_room(config, run, mesh)
  is_new = processes.is_first and is_empty(workdir)
  try:
    if processes.is_first:
      write_workdir(config, workdir, run, mesh, processes)
      checkpoint.set_aside(workdir, damaged)
    check_shared(workdir, processes)
    with checkpoint.Saver(workdir, keep=config.train.keep) as saver:
      return loop(config, workdir, run, mesh, saver, phases, learning_curve(config, processes), processes)
  except NoTimeError:
    if is_new:
      make_empty(workdir)
    raise


def learning_curve(config: Config, processes: Processes) -> Curve:
  """Return the points of the learning curve of the run; none with train.curve_points=0."""
  if not config.train.curve_points:
    return Curve(frozenset(), lambda *_: {})
  from insec_jax.evaluation import curve  # statistics take a second to import

  return Curve(curve.steps(config), functools.partial(curve.measure, config, processes))


if __name__ == "__main__":
  command.run(main)

"""Which share of its work a process takes, of those that `generate`, `mine` or `evaluate` divide among processes."""

from absl import flags

from insec_jax.command import InputError
from insec_jax.distributed import rendezvous

CLUSTER_SECONDS = 300  # limit for the answer of a cluster

flags.disclaim_key_flags()  # those of `define_flags` are the program's: its --help has them


def define_flags() -> None:
  """Define --num_processes and --process_id of a program whose processes share its work."""
  flags.DEFINE_integer(
    "num_processes",
    None,
    "Number of processes that share the work (default: those of the cluster that started this one, else 1).",
    lower_bound=1,
    upper_bound=65_536,
  )
  flags.DEFINE_integer(
    "process_id", None, "Index of this process, from 0; required with --num_processes.", lower_bound=0
  )


def share_of_work() -> tuple[int, int]:
  """Return (process id, number of processes) from the flags, or else from Cloud TPU, GKE, Slurm or Open MPI.

  Where the cluster assigns devices to a process, only these become visible; called before a device is used. Raises
  InputError for one flag without the other, and for an id out of range.
  """
  process, num_processes = flags.FLAGS.process_id, flags.FLAGS.num_processes
  if process is None and num_processes is None:
    return _of_cluster()
  if process is None or num_processes is None:
    missing = "--process_id" if process is None else "--num_processes"
    raise InputError(f"{missing} is missing; give --num_processes and --process_id together, or neither of them")
  if process >= num_processes:
    raise InputError(f"--process_id={process} of --num_processes={num_processes}; ids go from 0 to {num_processes - 1}")
  return process, num_processes


def _of_cluster() -> tuple[int, int]:
  spec = rendezvous.detect_processes(None, None, None, seconds=CLUSTER_SECONDS)
  if spec is None:
    return 0, 1
  if spec.local_devices is not None:  # as jax.distributed.initialize does
    import jax  # not at the top: --help does without

    visible = ",".join(map(str, spec.local_devices))
    jax.config.update("jax_cuda_visible_devices", visible)
    jax.config.update("jax_rocm_visible_devices", visible)
  return spec.index, spec.num

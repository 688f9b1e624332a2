"""Mining of the model's own mistakes: samples solutions, finds the first wrong step of each, writes its correction.

  python -m insec_jax.mine --model DIR --config configs/X.py --output mined.jsonl [--num_processes N --process_id I]

DIR may be a workdir or an HF folder, trained on transcripts or not. Problems are those of the split "mine", or training
records of data.path, never held-out ones. The config's mine section gives the number of problems, samples and the
temperature. A record has the model's own steps, its first wrong one, flag, reason (mistakes.reason), fix, the right
step and the rest of the solution. The file also has right solutions of the model, mine.right for each mistake. To train
on the file:

  python -m insec_jax.train --config configs/X.py --workdir DIR --config.mistakes.mined=0.2 \\
      --config.mistakes.mined_path=mined.jsonl

After a kill the same command resumes from mined.jsonl.parts. Processes do not communicate: each, started with its
--process_id, mines its share, and the last to finish writes the file. The file is the same for any number of processes.
"""

import sys

from absl import flags

from insec_jax import command, config_file
from insec_jax.command import InputError
from insec_jax.config_build import build
from insec_jax.files.writing import check_output
from insec_jax.generation.generator import TextGenerator
from insec_jax.generation.loading import load_model, with_markers
from insec_jax.method import tasks
from insec_jax.mining.chunks import ChunkStore
from insec_jax.mining.miner import Miner, fingerprint, mine_chunks
from insec_jax.mining.records import join

MODEL = flags.DEFINE_string("model", None, "Workdir of train, or Hugging Face folder.")
STEP = flags.DEFINE_integer("step", None, "Step of the workdir's checkpoint to use (default: newest).", lower_bound=0)
CONFIG = config_file.define_flag()
OUTPUT = flags.DEFINE_string("output", None, "File to write; it appears when complete.")
NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", 1, "Number of processes that share the work.", lower_bound=1, upper_bound=65_536
)
PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Index of this process, from 0.", lower_bound=0)
flags.mark_flags_as_required(["model", "config", "output"])


def main() -> None:
  config = build(CONFIG.value, mined_path=OUTPUT.value)  # an arm may train on this output
  if PROCESS_ID.value >= NUM_PROCESSES.value:
    raise InputError(
      f"--process_id={PROCESS_ID.value} of --num_processes={NUM_PROCESSES.value}; ids go from 0 to "
      f"{NUM_PROCESSES.value - 1}"
    )
  task = tasks.get(config.task)
  check_output(OUTPUT.value, "--output", config_file.files_read(config))
  opened = with_markers(load_model(MODEL.value, step=STEP.value), config, MODEL.value)
  miner = Miner(
    TextGenerator(opened, compute=config.precision.compute),
    task,
    config,
    seed=config.seed,
    weights=fingerprint(opened.params),
  )
  parts = ChunkStore(OUTPUT.value, miner.header)
  mine_chunks(miner, parts, process=PROCESS_ID.value, num_processes=NUM_PROCESSES.value)
  mined = parts.join(
    miner.num_chunks, lambda chunks: join(chunks, OUTPUT.value, right=config.mine.right, seed=config.seed)
  )
  if mined is None:
    print(
      f"process {PROCESS_ID.value} is done; the last of the {NUM_PROCESSES.value} to end writes {OUTPUT.value} (if "
      "none does, start one again)",
      file=sys.stderr,
      flush=True,
    )
    return
  print(mined)


if __name__ == "__main__":
  command.run(main)

"""Mining of the model's own mistakes: samples solutions, finds the first wrong step of each, writes its correction.

  python -m insec_jax.mine --model DIR --config configs/X.py --output mined.jsonl [--num_processes N --process_id I]
      [--server URL]

DIR may be a workdir or an HF folder, trained on transcripts or not. Problems are those of the split "mine", or training
records of data.path, never held-out ones; with data.to_mine a share of them that is not trained on. The config's mine
section gives the number of problems and samples; the temperature is 1. With mine.flags the model may flag, and its
failed corrections, false alarms and forgotten steps become records too. A record has the model's own steps, its first
wrong one, flag, reason (mistakes.reason), fix, the right step and the rest of the solution. The file also has right
solutions of the model, mine.right for each mistake. To train on the file:

  python -m insec_jax.train --config configs/X.py --workdir DIR --config.mistakes.mined=0.2 \\
      --config.mistakes.mined_path=mined.jsonl

After a kill the same command resumes from mined.jsonl.parts. Processes do not communicate: each, started with its
--process_id, mines its share, and the last to finish writes the file. The file is the same for any number of processes.

With --server the weights are those of a server of OpenAI's completions, such as vLLM, and --model gives the tokenizer,
the template and the markers only. The samples for a seed are other ones than without it: the server draws them.
"""

from absl import flags

from insec_jax import command, config_file, flags_help
from insec_jax.distributed import shares
from insec_jax.generation.flags import define_decoding_flags, define_model_flags

with flags_help.group("Input and output"):
  MODEL, STEP = define_model_flags()
  CONFIG = config_file.define_flag()
  OUTPUT = flags.DEFINE_string("output", None, "File to write; it appears when complete.")
MESH = define_decoding_flags()
flags.mark_flags_as_required(["model", "config", "output"])

command.begin(__name__)

import sys

from insec_jax.config import Config
from insec_jax.config_build import build
from insec_jax.files.chunks import one_process, unfinished
from insec_jax.files.writing import check_output
from insec_jax.generation import engine
from insec_jax.generation.generator import TextGenerator
from insec_jax.generation.loading import with_markers
from insec_jax.method import tasks
from insec_jax.mining.miner import Miner, chunk_store, mine_chunks
from insec_jax.mining.records import MiningSummary, join


def main() -> None:
  config = build(CONFIG.value, mined_path=OUTPUT.value)  # an arm may train on this output
  process, num_processes = shares.share_of_work()
  task = tasks.get(config.task)
  check_output(OUTPUT.value, "--output", config_file.files_read(config))
  with one_process(OUTPUT.value, process):
    mined = mine(config, task, process=process, num_processes=num_processes)
  if mined is None:
    print(unfinished(process, num_processes, OUTPUT.value), file=sys.stderr, flush=True)
    return
  print(mined)


def mine(config: Config, task: tasks.Task, *, process: int, num_processes: int) -> MiningSummary | None:
  """Write the output and return its counts; None where other processes have not finished."""
  stored = engine.open_model(MODEL.value, step=STEP.value, mesh=MESH.value, compute=config.precision.compute)
  writer = TextGenerator(with_markers(stored, config, MODEL.value))
  # Of the weights as stored: rows that with_markers adds are a mean, which depends on the mesh in its last bits.
  miner = Miner(writer, task, config, seed=config.seed, weights=engine.identity(stored))
  parts = chunk_store(OUTPUT.value, miner)
  mine_chunks(miner, parts, process=process, num_processes=num_processes)
  return parts.join(
    miner.num_chunks, lambda chunks: join(chunks, OUTPUT.value, right=config.mine.right, seed=config.seed)
  )


if __name__ == "__main__":
  command.run(main)

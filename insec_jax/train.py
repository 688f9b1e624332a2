"""Trains a model: fine-tunes an HF folder, or starts from random weights of a given size. Running it again resumes.

  python -m insec_jax.train --config configs/X.py --workdir DIR [--config.a.b=v]

SIGTERM and Ctrl-C save and exit 42; the same command goes on from there. When a loss is not finite the state before
that step is saved and the exit code is 3. Compiled programs are kept between runs where the environment variable
JAX_COMPILATION_CACHE_DIR says.

On a cluster that tells (Cloud TPU, GKE, Slurm, Open MPI) every host runs this one command. Elsewhere each process says
who it is: [--coordinator HOST[:PORT] --num_processes N --process_id I]. All share the workdir.

With --config.rounds=R the steps are cut into R equal parts. Before each of them the weights of that moment mine their
own mistakes (as the program mine does, every process its share) into DIR/mined/round_K.jsonl, K from 1; the part is
trained on these, mistakes.mined of the whole, and on what the config makes otherwise.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from insec_jax import command, config_file, stop_signal
from insec_jax import config as config_lib
from insec_jax.command import DivergedError, InputError
from insec_jax.config import Config
from insec_jax.data import pipeline, template, tokenizer_files, tokens
from insec_jax.distributed import coordinator, rendezvous
from insec_jax.distributed.processes import Processes, joined
from insec_jax.files import folder_writer, local_path, partial_of, read_json, write_text
from insec_jax.mining import rounds
from insec_jax.model import attention, hf, hf_config, llama, sharding
from insec_jax.training import checkpoint, metrics, optimizer
from insec_jax.training import step as step_lib
from insec_jax.training.step import TrainState

CONFIG = config_file.define_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; a run that was cut short goes on from there.")
flags.mark_flags_as_required(["config", "workdir"])
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, f"HOST[:PORT] or [IPV6][:PORT] of process 0; port {coordinator.PORT} if not given."
)
NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes train together.", lower_bound=1, upper_bound=65_536
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)
JOIN_SECONDS = flags.DEFINE_integer(
  "join_seconds", 300, "How long processes wait for each other at the start.", lower_bound=1, upper_bound=7 * 86_400
)

REMEDY = "; lower optimizer.learning_rate or look at the data, and begin in another --workdir"
SHARED_SECONDS = 60  # in which a file on a network drive shows on another host
PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "transformers",
  "tokenizers",
  "numpy",
  "ml-dtypes",
  "ml-collections",
  "tensorboardX",
)


def main() -> int:
  config = config_lib.build(CONFIG.value)
  place = rendezvous.detect_processes(
    COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, seconds=JOIN_SECONDS.value
  )
  with joined(place, started_with(config), seconds=JOIN_SECONDS.value) as processes:
    workdir = local_path(WORKDIR.value, "--workdir")
    with folder_writer(workdir, "--workdir") if processes.is_first else contextlib.nullcontext():
      return train(config, workdir, processes)


def train(config: Config, workdir: pathlib.Path, processes: Processes) -> int:
  """Return the exit code of the run: DONE, or PREEMPTED when a signal asked to stop and the state is saved.

  Nothing is written before every input has proved right. DivergedError when a loss is not finite.
  """
  if processes.is_first:
    checkpoint.check_workdir(workdir, config)
  # Process 0 looks for all: on a network drive another host may not see yet what it sees.
  found = processes.gather("the search for checkpoints", checkpoint.steps(workdir) if processes.is_first else None)[0]
  processes.agree(
    "devices",
    {
      "platform": jax.default_backend(),
      "device": jax.local_devices()[0].device_kind,
      "devices of its own": jax.local_device_count(),
      "devices of the run": jax.device_count(),
    },
  )
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  if found:
    check_shared(workdir, processes)
    if found[-1] == config.train.steps and is_trained(config, mesh, workdir, processes):
      say(processes, f"{workdir} is trained to its last step, {found[-1]}; nothing to do")
      return command.DONE
    run, damaged = resume(config, mesh, workdir, found, processes)
  else:
    run, damaged = begin(config, mesh, processes), []
  if processes.is_first:
    write_workdir(config, workdir, run, mesh, processes)
    checkpoint.set_aside(workdir, damaged)
  check_shared(workdir, processes)
  with checkpoint.Saver(workdir, keep=config.train.keep, keep_every=config.train.keep_every) as saver:
    return loop(config, workdir, run, mesh, saver, processes)


def is_trained(config: Config, mesh: Mesh, workdir: pathlib.Path, processes: Processes) -> bool:
  """Whether the checkpoint of the last step is sound."""
  tx = optimizer.make(config.optimizer, config.train.steps)
  abstract = step_lib.abstract_state(checkpoint.read_model(workdir), config.precision.params, tx, mesh)
  return checkpoint.is_sound(workdir, config.train.steps, abstract, processes)


def started_with(config: Config) -> dict[str, Any]:
  """What must be the same on every host, known before a device is touched."""
  commit = _git("rev-parse", "HEAD")
  return {
    "commit": commit,
    "changes since (SHA-256 of git diff)": commit and _digest(_git("diff", "HEAD")),
    "python": platform.python_version(),
    **checkpoint.versions(PACKAGES),
    "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS"),
    **checkpoint.flat(config),
  }


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_shared(workdir: pathlib.Path, processes: Processes) -> None:
  """Raise InputError unless every process sees the config that process 0 has written."""
  deadline = time.monotonic() + SHARED_SECONDS
  while not (workdir / checkpoint.CONFIG).is_file() and time.monotonic() < deadline:
    time.sleep(0.5)
  seen = processes.gather("the look into the workdir", (workdir / checkpoint.CONFIG).is_file())
  if blind := [f"process {index} ({name})" for index, name in enumerate(processes.names) if not seen[index]]:
    raise InputError(
      f"{', '.join(blind)} cannot see {workdir / checkpoint.CONFIG}, which process 0 wrote; give a "
      "--workdir on a drive that all hosts share"
    )


def say(processes: Processes, text: str) -> None:
  """Print to stderr on process 0 only."""
  if processes.is_first:
    print(text, file=sys.stderr, flush=True)


class Run(NamedTuple):
  """A run ready for its next step; `first` steps are done, `totals` is what its log has added up, None before any.

  `log` is metrics.Log.state() after them. `data` is that of the last step done; before a round is mined, what the
  config makes without.
  """

  config: llama.LlamaConfig
  tokenizer: PreTrainedTokenizerFast
  data: pipeline.Data
  state: TrainState
  shardings: TrainState
  first: int
  totals: list | None
  log: dict[str, int] | None = None


def begin(config: Config, mesh: Mesh, processes: Processes) -> Run:
  """The run before its first step: weights from model.path, or random ones by the seed in model.size."""
  tokenizer = tokens.open_tokenizer(config).tokenizer
  # The day of process 0 for all, kept with the tokenizer: resuming, generate and export use it.
  template.fix_date(tokenizer, processes.gather("the date", template.today() if processes.is_first else None)[0])
  before = starting_model(config, tokenizer)
  vocab_size = hf.vocabulary_for(len(tokenizer), before.vocab_size)
  model_config = dataclasses.replace(before, vocab_size=vocab_size)
  data = load_data(config, tokenizer, model_config)
  processes.agree("data", data_fingerprint(config, data, mesh))
  tx = optimizer.make(config.optimizer, config.train.steps)
  shardings = step_lib.shardings_of(step_lib.abstract_state(model_config, config.precision.params, tx, mesh))
  if config.model.path:
    params = hf.load(
      config.model.path,
      before,
      dtype=config.precision.params,
      shardings=sharding.params_shardings(llama.shapes(before), mesh),
    )
    if vocab_size > before.vocab_size:
      say(
        processes,
        f"the tokenizer has {len(tokenizer)} tokens, the model {before.vocab_size}: grown to {vocab_size}, a "
        f"multiple of {hf.VOCAB_MULTIPLE}; new rows are the mean of the old ones",
      )
      # Only what grows: the rest is not copied.
      rows = {name: params[name] for name in ("embed", "head") if name in params}
      params |= jax.jit(
        lambda rows: hf.grow_vocabulary(rows, before, vocab_size)[0],
        out_shardings={name: shardings.params[name] for name in rows},
      )(rows)
  else:
    params = hf.init(model_config, jax.random.key(config.seed), config.precision.params, shardings=shardings.params)
  state = jax.jit(lambda params: step_lib.new_state(params, tx), out_shardings=shardings, donate_argnums=0)(params)
  return Run(model_config, tokenizer, data, state, shardings, 0, None)


def resume(
  config: Config, mesh: Mesh, workdir: pathlib.Path, found: list[int], processes: Processes
) -> tuple[Run, list[int]]:
  """(the run after the newest sound checkpoint of those found, newer ones that are damaged); model.path is not read."""
  model_config = checkpoint.read_model(workdir)
  tokenizer = tokens.load(str(workdir / checkpoint.TOKENIZER))
  tx = optimizer.make(config.optimizer, config.train.steps)
  abstract = step_lib.abstract_state(model_config, config.precision.params, tx, mesh)

  @functools.cache
  def data_of(number: int | None) -> pipeline.Data:
    return load_data(rounds.round_config(config, workdir, number), tokenizer, model_config)

  def facts(step: int) -> dict[str, Any]:
    return data_fingerprint(config, data_of(rounds.round_at(config, step)), mesh)

  processes.agree("data", facts(found[-1]))
  state, totals, log, last, damaged = checkpoint.restore(
    workdir,
    found,
    abstract,
    facts=facts,
    processes=processes,
    advise=lambda name, was: (
      same_rows(config, mesh, was) if name == ROWS else "bring it back, or begin in another --workdir"
    ),
  )
  say(processes, f"resuming {workdir} after step {last}")
  data = data_of(rounds.round_at(config, last))
  return Run(model_config, tokenizer, data, state, step_lib.shardings_of(abstract), last, totals, log), damaged


ROWS = "the number of rows a step (data.rows_per_device, data.accumulation, mesh)"


def data_fingerprint(config: Config, data: pipeline.Data, mesh: Mesh) -> dict[str, Any]:
  """What the config leaves open and a resumed run must find again, or it would go on with other batches unseen."""
  digest = hashlib.sha256()
  for field in dataclasses.fields(data.train):
    digest.update(getattr(data.train, field.name).tobytes())
  return {
    ROWS: rows_of(config, mesh) * config.data.accumulation,
    "the data (SHA-256 of the rows to train on)": digest.hexdigest()[:16],
  }


def same_rows(config: Config, mesh: Mesh, rows: int) -> str:
  """Which values give that number of rows a step on this mesh."""
  num = rows_of(config, mesh) // config.data.rows_per_device
  if rows % num:
    fit = [size for size in range(1, rows + 1) if rows % size == 0]
    return (
      f"{num} devices along data and fsdp cannot share {rows} rows: use {', '.join(map(str, fit))} (mesh.tensor "
      "takes the others), or begin in another --workdir"
    )
  each = rows // num
  pairs = [f"{size} and {each // size}" for size in range(each, 0, -1) if each % size == 0]
  return f"give data.rows_per_device and data.accumulation {', or '.join(pairs)}"


def rows_of(config: Config, mesh: Mesh) -> int:
  """Rows of one micro-batch, all devices together; what `tensor` splits is not the batch."""
  return config.data.rows_per_device * sharding.size_over(mesh, sharding.BATCH)


def starting_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> llama.LlamaConfig:
  """Return the model before any vocabulary is added, with every token that ends a text."""
  if config.model.path:
    model_config = hf.read_config(config.model.path)
  else:
    ids = {
      "bos_token_id": tokenizer.bos_token_id,
      "eos_token_id": tokenizer.eos_token_id,
      "pad_token_id": tokenizer.pad_token_id,
    }
    fields = {"architectures": ["LlamaForCausalLM"], **ids, "vocab_size": None, **config.model.size}
    if fields["vocab_size"] is None:
      fields["vocab_size"] = len(tokenizer)
    elif fields["vocab_size"] < len(tokenizer):
      raise InputError(
        f"model.size.vocab_size={fields['vocab_size']} is below the {len(tokenizer)} tokens of the "
        "tokenizer; give at least that many, or None for as many"
      )
    model_config = hf_config.config_from_json(fields, "model.size")
  vocab_size = hf.vocabulary_for(len(tokenizer), model_config.vocab_size)
  eos_ids = tokens.stop_ids(model_config.eos_ids, tokenizer, vocab_size=vocab_size)
  return dataclasses.replace(model_config, eos_ids=eos_ids)


def load_data(config: Config, tokenizer: PreTrainedTokenizerFast, model_config: llama.LlamaConfig) -> pipeline.Data:
  """The rows of the config; InputError when one holds a token or a position that the model does not have."""
  data = pipeline.load_data(config, tokenizer)
  for rows in (data.train, data.heldout):
    if len(rows) and rows.token_BT.max() >= model_config.vocab_size:
      raise InputError(
        f"the tokenizer gives token {rows.token_BT.max()}, the model has {model_config.vocab_size}; "
        "use the tokenizer that belongs to the model"
      )
    if len(rows) and rows.position_BT.max() >= model_config.max_positions:
      raise InputError(
        f"a record has {rows.position_BT.max() + 1} tokens, the model has {model_config.max_positions} "
        "positions; leave out longer records"
      )
  return data


def write_workdir(config: Config, workdir: pathlib.Path, run: Run, mesh: Mesh, processes: Processes) -> None:
  """Write all that explains the run to its folder: the config first, so that a killed start can start again."""
  workdir.mkdir(parents=True, exist_ok=True)
  write_text(workdir / checkpoint.CONFIG, config.to_json() + "\n")
  here = environment(config, run, mesh, processes)
  path = workdir / "environment.json"
  if run.totals is None:
    model = json.dumps(hf_config.config_to_json(run.config), indent=2)
    write_text(workdir / checkpoint.MODEL, model + "\n")
    write_text(workdir / "receipt.txt", run.data.receipt)
    if run.data.left_out:
      write_text(workdir / "left_out.jsonl", run.data.left_out.to_json_lines())
    write_tokenizer(config, workdir, run.tokenizer)
    first = {**here, "resumed": []}
  else:
    first = read_json(path, "the environment of a run") if path.exists() else {**here, "resumed": []}
    if not isinstance(first.setdefault("resumed", []), list):
      raise InputError(f"{path}: resumed is no list; bring the file back, or move it away")
    first["resumed"].append({"step": run.first, **here})
  write_text(path, json.dumps(first, indent=2) + "\n")


def write_tokenizer(config: Config, workdir: pathlib.Path, tokenizer: PreTrainedTokenizerFast) -> None:
  """Write the files of the source's tokenizer with the markers, and its generation_config.json, for an export."""
  source = config.tokenizer.path or config.model.path
  with partial_of(workdir / checkpoint.TOKENIZER) as partial:
    tokenizer_files.save(tokenizer, local_path(source, "tokenizer.path") if source else None, partial)
    shutil.rmtree(workdir / checkpoint.TOKENIZER, ignore_errors=True)  # of a start that was killed
    partial.rename(workdir / checkpoint.TOKENIZER)
  generation = hf.read_generation_config(local_path(config.model.path, "model.path")) if config.model.path else None
  if generation is not None:
    hf.write_json(workdir / hf.GENERATION, generation)


def environment(config: Config, run: Run, mesh: Mesh, processes: Processes) -> dict[str, Any]:
  """What the numbers may hang on beside config and seed; commit is None when the code is not in a git checkout."""
  commit = _git("rev-parse", "HEAD")
  device = jax.devices()[0]
  return {
    "commit": commit,
    "diff": None if commit is None else _git("diff", "HEAD"),
    "untracked": None if commit is None else _git("ls-files", "--others", "--exclude-standard"),
    "packages": checkpoint.versions(PACKAGES),
    "python": platform.python_version(),
    "system": platform.platform(),
    "devices": {
      "platform": device.platform,
      "kind": device.device_kind,
      "count": jax.device_count(),
      "processes": jax.process_count(),
    },
    "hosts": list(processes.names),
    "mesh": dict(mesh.shape),
    "attention": choose_attention(config, run.config, device)[1],
  }


def choose_attention(config: Config, model_config: llama.LlamaConfig, device) -> tuple[attention.Attention, str]:
  """The attention of this run on devices like `device`, and the reason."""
  return attention.choose(
    device.platform,
    device_kind=device.device_kind,
    head_width=model_config.head_width,
    row_length=config.data.row_length,
    compute=config.precision.compute,
  )


def _git(*words: str) -> str | None:
  try:
    done = subprocess.run(
      ["git", "-C", str(pathlib.Path(__file__).parent), *words],
      capture_output=True,
      encoding="utf-8",
      errors="replace",
      check=False,
    )
  except (FileNotFoundError, NotADirectoryError, PermissionError):  # no git in PATH
    return None
  return done.stdout.strip() if done.returncode == 0 else None


@contextlib.contextmanager
def stop_of(processes: Processes) -> Iterator[Callable[[int], bool]]:
  """Yield a function of each step: whether a signal came to any process, true on all after the same step."""
  if processes.num > 1:
    yield processes.stops
    return
  with stop_signal.deferred() as stop:
    yield lambda _: stop.is_set()


def loop(
  config: Config, workdir: pathlib.Path, run: Run, mesh: Mesh, saver: checkpoint.Saver, processes: Processes
) -> int:
  """Return the exit code after the last step, or after the one in which a signal came.

  Whatever is written at a step is written in the order line, checkpoint: a checkpoint never lacks the lines before it.
  """
  every, steps = config.train, config.train.steps
  rows = rows_of(config, mesh)
  share = local_rows(rows, mesh)
  attend, reason = choose_attention(config, run.config, jax.devices()[0])
  model = llama.Llama(run.config, config.precision.compute, config.model.remat, attend)
  starts = rounds.starts(config)

  def batches_of(data: pipeline.Data, step: int) -> Iterator[dict[str, np.ndarray]]:
    return pipeline.batches(
      data.train,
      seed=config.seed,
      rows_per_step=rows,
      accumulation=config.data.accumulation,
      start_step=step - 1,
      share=share,
      negatives=config.loss.negatives,
    )

  batches = None if run.first + 1 in starts else batches_of(run.data, run.first + 1)
  progress = metrics.TrainProgress(run.first, steps) if processes.is_first else metrics.NullLogger()
  announce(config, run, reason, progress)
  train_step, seconds = compile_step(config, run, model, mesh)
  progress.say(f"train step compiled in {seconds:.1f} s")
  heldout = heldout_measure(config, run, model, mesh, rows, share)
  facts = data_fingerprint(config, run.data, mesh)
  state, meter = run.state, metrics.Meter(run.totals)
  last_logged = run.first if run.totals is not None else -1
  with (
    contextlib.closing(progress),
    stop_of(processes) as stops,
    contextlib.closing(
      metrics.Log(workdir, last_logged, run.log) if processes.is_first else metrics.NullLogger()
    ) as log,
  ):
    if run.totals is None and len(run.data.heldout):
      values = heldout(state.params)
      check_finite(values, "before the first step")
      log.write(0, values)
      progress.line(0, values)
    meter.start_clock()
    progress.start()
    for step in range(run.first + 1, steps + 1):
      if step in starts:
        saver.wait()
        data = next_round(
          config,
          workdir,
          starts[step],
          run,
          state.params,
          progress,
          processes,
          stopped=lambda step=step: processes.num == 1 and stops(step),
        )
        if data is None:
          progress.say(f"stopped by a signal: mining is cut short before step {step}; run the same command to go on")
          return command.PREEMPTED
        facts = data_fingerprint(config, data, mesh)
        processes.agree(f"data of round {starts[step]}", facts)
        batches = batches_of(data, step)
        meter.start_clock()
      state, of_step = train_step(state, on_devices(next(batches), mesh, rows, share))
      meter.add(of_step)
      progress.step(step)
      last, stopping = step == steps, stops(step)
      logs = last or step % every.log_every == 0
      measures = len(run.data.heldout) and (last or step % every.eval_every == 0)
      saves = last or stopping or step % every.checkpoint_every == 0 or step + 1 in starts
      if not logs and not measures and not saves:
        continue
      try:
        meter.settle()
      except metrics.NotFiniteError as error:
        sound = step - error.num_lost
        saver.wait()
        # Process 0 looks for all: saving is done by all together, or by none.
        saved = processes.gather(
          "the last sound step", sound in checkpoint.steps(workdir) if processes.is_first else None
        )[0]
        if sound and not saved:
          saver.save(sound, state, config=config, facts=facts, totals=meter.to_json(), log=log.state())
          saver.wait()
        raise DivergedError(
          f"{error} in step {sound + 1}{f'; the state after step {sound} is saved' if sound else ''}{REMEDY}"
        ) from None
      values = {**(meter.line() if logs else {}), **(heldout(state.params) if measures else {})}
      if measures and not all(map(math.isfinite, values.values())):
        saver.save(step, state, config=config, facts=facts, totals=meter.to_json(), log=log.state())
        saver.wait()
        check_finite(values, f"after step {step}, which is saved")
      if values:
        log.write(step, values)
        progress.line(step, values)
      if saves:
        saver.save(step, state, config=config, facts=facts, totals=meter.to_json(), log=log.state())
      if stopping and not last:
        saver.wait()
        progress.say(f"stopped by a signal: saved after step {step}; run the same command to go on")
        return command.PREEMPTED
      meter.start_clock()
    saver.wait()
  return command.DONE


def check_finite(values: dict[str, float], when: str) -> None:
  """Raise DivergedError unless every held-out value is finite."""
  for name, value in values.items():
    if not math.isfinite(value):
      raise DivergedError(f"{name} is {value} {when}{REMEDY}")


def next_round(
  config: Config,
  workdir: pathlib.Path,
  number: int,
  run: Run,
  params,
  progress,
  processes: Processes,
  *,
  stopped: Callable[[], bool],
) -> pipeline.Data | None:
  """The data of a round that begins with these parameters, mined unless it was before; None when `stopped` said so."""
  told = rounds.mine(config, workdir, number, params, run.config, run.tokenizer, processes, stopped=stopped)
  if told is None:
    return None
  progress.say(f"round {number} of {config.rounds}\n{told}")
  data = load_data(rounds.round_config(config, workdir, number), run.tokenizer, run.config)
  if processes.is_first:
    write_text(rounds.mined_path(workdir, number).with_suffix(".txt"), f"{told}\n\n{data.receipt}")
  progress.say(data.receipt.rstrip())
  return data


def announce(config: Config, run: Run, attention_reason: str, progress: metrics.TrainProgress) -> None:
  """Print what is about to run."""
  num_params = sum(param.size for param in jax.tree.leaves(run.state.params))
  progress.say(run.data.receipt.rstrip())
  progress.say(f"{num_params:,} parameters; {attention_reason}")
  if config.precision.params != "float32":
    progress.say(f"parameters are {config.precision.params}: small updates are rounded away; float32 is safer")


def compile_step(config: Config, run: Run, model: llama.Llama, mesh: Mesh) -> tuple[Callable, float]:
  """(the compiled train step, seconds it took)."""
  start = time.perf_counter()
  step = step_lib.make_train_step(
    model, config.optimizer, config.train.steps, mesh, run.shardings, repeat=config.loss.repeat
  )
  batch = step_lib.abstract_batch(
    mesh,
    accumulation=config.data.accumulation,
    rows_per_device=config.data.rows_per_device,
    row_length=config.data.row_length,
    negatives=config.loss.negatives,
  )
  compiled = step.lower(run.state, batch).compile()
  return compiled, time.perf_counter() - start


def local_rows(rows: int, mesh: Mesh) -> np.ndarray:
  """Which rows of a micro-batch the devices of this process hold, in ascending order.

  Where `tensor` crosses hosts, several processes read the same rows.
  """
  held = step_lib.batch_sharding(mesh).addressable_devices_indices_map((1, rows, 1)).values()
  return np.unique(np.concatenate([np.arange(rows)[index[1]] for index in held]))


def on_devices(batch: dict[str, np.ndarray], mesh: Mesh, rows: int, share: np.ndarray) -> dict[str, jax.Array]:
  """The batch as global arrays, of which this process brings its share of the rows."""

  def place(mine):
    def read(index):
      start, stop, _ = index[1].indices(rows)
      first = np.searchsorted(share, start)
      return mine[:, first : first + stop - start]

    return jax.make_array_from_callback((mine.shape[0], rows, mine.shape[2]), step_lib.batch_sharding(mesh), read)

  return {name: place(array) for name, array in batch.items()}


def heldout_measure(config: Config, run: Run, model: llama.Llama, mesh: Mesh, rows: int, share: np.ndarray) -> Callable:
  """A function from parameters to the eval/ values over all held-out rows."""
  sums_of = step_lib.make_heldout_sums(model, mesh, run.shardings)

  def measure(params) -> dict[str, float]:
    totals = metrics.Totals.zero()
    for batch in pipeline.in_order(run.data.heldout, rows_per_step=rows, share=share, negatives=config.loss.negatives):
      totals = totals.plus(jax.device_get(sums_of(params, on_devices(batch, mesh, rows, share))), 0, 0.0)
    return metrics.heldout_line(totals.sums, config.loss.weight_R)

  return measure


if __name__ == "__main__":
  command.run(main)

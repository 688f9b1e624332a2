"""Training loop: steps, logging, held-out losses, checkpoints, phases and the end of a run."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from insec_jax import command, stop_signal
from insec_jax.command import DivergedError
from insec_jax.config import Config
from insec_jax.data import pipeline
from insec_jax.distributed.processes import Processes
from insec_jax.model import llama
from insec_jax.training import checkpoint, layout, metrics
from insec_jax.training import step as step_lib
from insec_jax.training.feeding import heldout_measure, local_rows, on_devices
from insec_jax.training.run import Phases, Run, choose_attention, data_fingerprint, load_data, rows_of

REMEDY = "; lower optimizer.learning_rate or look at the data, and begin in another --workdir"


def loop(
  config: Config,
  workdir: pathlib.Path,
  run: Run,
  mesh: Mesh,
  saver: checkpoint.Saver,
  phases: Phases,
  processes: Processes,
) -> int:
  """Train to the last step, or to the step in which a signal arrives, and return the exit code.

  The line of a step is written before its checkpoint, so a checkpoint never lacks the lines before it. Raises
  DivergedError when a loss is not finite; the state before that step is saved.
  """
  every, steps = config.train, config.train.steps
  rows = rows_of(config, mesh)
  local = local_rows(rows, mesh)
  attend, reason = choose_attention(config, run.config, jax.devices()[0])
  model = llama.Llama(run.config, config.precision.compute, config.model.remat, attend)

  def batches_from(data: pipeline.Data, step: int) -> Iterator[dict[str, np.ndarray]]:
    return pipeline.batches(
      data.train,
      seed=config.seed,
      rows_per_step=rows,
      accumulation=config.data.accumulation,
      start_step=step - 1,
      share=local,
      negatives=config.loss.negatives,
    )

  def save(step: int) -> None:
    saver.save(step, state, config=config, facts=facts, totals=meter.to_json(), log=log.state())

  batches = None if run.first + 1 in phases.number_of else batches_from(run.data, run.first + 1)
  progress = metrics.TrainProgress(run.first, steps) if processes.is_first else metrics.NullLogger()
  announce(config, run, reason, progress)
  train_step, seconds = compile_step(config, run, model, mesh)
  progress.say(f"train step compiled in {seconds:.1f} s")
  heldout = heldout_measure(config, run, model, mesh, rows, local)
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
      if step in phases.number_of:
        saver.wait()
        data = next_phase(config, phases, step, run, state.params, progress, processes, stops)
        if data is None:
          progress.say(f"stopped by a signal: mining is cut short before step {step}; run the same command to go on")
          return command.PREEMPTED
        facts = data_fingerprint(config, data, mesh)
        processes.agree(f"data of round {phases.number_of[step]}", facts)
        batches = batches_from(data, step)
        meter.start_clock()
      state, step_metrics = train_step(state, on_devices(next(batches), mesh, rows, local))
      meter.add(step_metrics)
      progress.step(step)
      last, stopping = step == steps, stops(step)
      logs = last or step % every.log_every == 0
      measures = len(run.data.heldout) and (last or step % every.eval_every == 0)
      saves = last or stopping or step % every.checkpoint_every == 0 or step + 1 in phases.number_of
      if not logs and not measures and not saves:
        continue
      try:
        meter.settle()
      except metrics.NotFiniteError as error:
        raise diverged(error, step - error.num_lost, workdir, saver, save, processes) from None
      values = {**(meter.line() if logs else {}), **(heldout(state.params) if measures else {})}
      if measures and not all(map(math.isfinite, values.values())):
        save(step)
        saver.wait()
        check_finite(values, f"after step {step}, which is saved")
      if values:
        log.write(step, values)
        progress.line(step, values)
      if saves:
        save(step)
      if stopping and not last:
        saver.wait()
        progress.say(f"stopped by a signal: saved after step {step}; run the same command to go on")
        return command.PREEMPTED
      meter.start_clock()
    saver.wait()
  return command.DONE


def diverged(
  error: metrics.NotFiniteError,
  sound: int,
  workdir: pathlib.Path,
  saver: checkpoint.Saver,
  save: Callable[[int], None],
  processes: Processes,
) -> DivergedError:
  """Save the state after the last sound step, unless it is saved, and return the error that names both."""
  saver.wait()
  # Process 0 decides for all: a save needs all processes.
  saved = processes.gather("the last sound step", sound in layout.steps(workdir) if processes.is_first else None)[0]
  if sound and not saved:
    save(sound)
    saver.wait()
  kept = f"; the state after step {sound} is saved" if sound else ""
  return DivergedError(f"{error} in step {sound + 1}{kept}{REMEDY}")


@contextlib.contextmanager
def stop_of(processes: Processes) -> Iterator[Callable[[int], bool]]:
  """Yield a function of the step that returns whether to stop; true on all processes after the same step."""
  if processes.num > 1:
    yield processes.stops
    return
  with stop_signal.deferred() as stop:
    yield lambda _: stop.is_set()


def check_finite(values: dict[str, float], when: str) -> None:
  """Raise DivergedError unless every held-out value is finite."""
  for name, value in values.items():
    if not math.isfinite(value):
      raise DivergedError(f"{name} is {value} {when}{REMEDY}")


def next_phase(
  config: Config,
  phases: Phases,
  step: int,
  run: Run,
  params,
  progress,
  processes: Processes,
  stops: Callable[[int], bool],
) -> pipeline.Data | None:
  """Return the data of the phase that begins at this step with these parameters; None if a signal has arrived."""
  number = phases.number_of[step]
  text = phases.prepare(number, params, run, stopped=lambda: processes.num == 1 and stops(step))
  if text is None:
    return None
  progress.say(f"round {number} of {config.rounds}\n{text}")
  data = load_data(phases.config(number), run.tokenizer, run.config)
  if processes.is_first:
    phases.record(number, f"{text}\n\n{data.receipt}")
  progress.say(data.receipt.rstrip())
  return data


def announce(config: Config, run: Run, attention_reason: str, progress: metrics.TrainProgress) -> None:
  """Print receipt, number of parameters, attention and precision of the run."""
  num_params = sum(param.size for param in jax.tree.leaves(run.state.params))
  progress.say(run.data.receipt.rstrip())
  progress.say(f"{num_params:,} parameters; {attention_reason}")
  if config.precision.params != "float32":
    progress.say(f"parameters are {config.precision.params}: small updates are rounded away; float32 is safer")


def compile_step(config: Config, run: Run, model: llama.Llama, mesh: Mesh) -> tuple[Callable, float]:
  """Return (compiled train step, seconds of its compilation)."""
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

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
from insec_jax.training import checkpoint, layout, ledger, metrics
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
  progress = metrics.TrainProgress(run.first, config.train.steps) if processes.is_first else metrics.NullLogger()
  trainer = Trainer(config, run, mesh, saver, phases, processes, progress)
  if processes.is_first:
    trainer.ledger.lose(metrics.last_line(workdir))
  last_logged = run.first if run.totals is not None else -1
  with (
    contextlib.closing(progress),
    stop_of(processes) as stops,
    contextlib.closing(
      metrics.Log(workdir, last_logged, run.log) if processes.is_first else metrics.NullLogger()
    ) as log,
  ):
    return trainer.train(workdir, log, stops)


class Trainer:
  """A run in progress: its compiled step, its state, and the data that it reads."""

  def __init__(self, config: Config, run: Run, mesh: Mesh, saver, phases: Phases, processes: Processes, progress):
    self.config, self.run, self.mesh, self.saver = config, run, mesh, saver
    self.phases, self.processes, self.progress = phases, processes, progress
    self.ledger = ledger.Ledger(run.totals[2] if run.totals and len(run.totals) > 2 else None)
    self.rows = rows_of(config, mesh)
    self.local = local_rows(self.rows, mesh)
    # A phase that begins with the next step brings its own data.
    self.batches = None if run.first + 1 in phases.number_of else self.batches_from(run.data, run.first + 1)
    attend, reason = choose_attention(config, run.config, jax.devices()[0])
    model = llama.Llama(run.config, config.precision.compute, config.model.remat, attend)
    announce(config, run, reason, progress)
    with self.ledger.part("compile"):
      self.train_step, seconds = compile_step(config, run, model, mesh)
    progress.say(f"train step compiled in {seconds:.1f} s")
    self.heldout = heldout_measure(config, run, model, mesh, self.rows, self.local)
    self.state, self.meter = run.state, metrics.Meter(run.totals and run.totals[:2])
    self.facts = data_fingerprint(config, run.data, mesh)

  def batches_from(self, data: pipeline.Data, step: int) -> Iterator[dict[str, np.ndarray]]:
    """Return the batches of the data from this step on."""
    return pipeline.batches(
      data.train,
      seed=self.config.seed,
      rows_per_step=self.rows,
      accumulation=self.config.data.accumulation,
      start_step=step - 1,
      share=self.local,
      negatives=self.config.loss.negatives,
    )

  def train(self, workdir: pathlib.Path, log: metrics.Log, stops: Callable[[int], bool]) -> int:
    """Train to the end or to a signal, and return the exit code."""
    if self.run.totals is None and len(self.run.data.heldout):
      with self.ledger.part("heldout"):
        values = self.heldout(self.state.params)
      check_finite(values, "before the first step")
      log.write(0, values)
      self.progress.line(0, values)
    self.meter.start_clock()
    self.progress.start()
    with self.ledger.part("step"):
      return self.train_steps(workdir, log, stops)

  def train_steps(self, workdir: pathlib.Path, log: metrics.Log, stops: Callable[[int], bool]) -> int:
    """Train the steps that remain, to the last one or to a signal, and return the exit code."""
    run, steps, every = self.run, self.config.train.steps, self.config.train
    for step in range(run.first + 1, steps + 1):
      if step in self.phases.number_of and not self.begin_phase(step, stops):
        return self.stopped(f"mining is cut short before step {step}")
      self.state, step_metrics = self.train_step(self.state, self.next_batch())
      self.meter.add(step_metrics)
      self.progress.step(step)
      last, stopping = step == steps, stops(step)
      logs = last or step % every.log_every == 0
      measures = len(run.data.heldout) and (last or step % every.eval_every == 0)
      saves = last or stopping or step % every.checkpoint_every == 0 or step + 1 in self.phases.number_of
      if not logs and not measures and not saves:
        continue
      try:
        self.meter.settle()
      except metrics.NotFiniteError as error:
        raise self.diverged(error, step - error.num_lost, workdir, log) from None
      self.log_values(step, log, logs=logs, measures=measures)
      if saves:
        self.save(step, log)
      if stopping and not last:
        self.wait()
        return self.stopped(f"saved after step {step}")
      self.meter.start_clock()
    self.wait()
    self.progress.say(ledger.table(self.ledger.line()))
    return command.DONE

  def stopped(self, where: str) -> int:
    """Print where the time went and where the run has stopped, and return the exit code."""
    self.progress.say(ledger.table(self.ledger.line()))
    self.progress.say(f"stopped by a signal: {where}; run the same command to go on")
    return command.PREEMPTED

  def next_batch(self) -> dict[str, jax.Array]:
    """Return the next batch on the devices; its time is one of waiting if they have finished every step before."""
    start = time.monotonic()
    batch = on_devices(next(self.batches), self.mesh, self.rows, self.local)
    if not self.meter.is_busy():
      self.ledger.move(time.monotonic() - start, "data")
    return batch

  def begin_phase(self, step: int, stops: Callable[[int], bool]) -> bool:
    """Return whether the data of the phase that begins at this step is there: False if a signal has arrived."""
    self.wait()
    number = self.phases.number_of[step]
    with self.ledger.part("mining"):
      text = self.phases.prepare(
        number, self.state.params, self.run, stopped=lambda: self.processes.num == 1 and stops(step)
      )
      if text is not None:
        data = load_data(self.phases.config(number), self.run.tokenizer, self.run.config)
    if text is None:
      return False
    self.progress.say(f"round {number} of {self.config.rounds}\n{text}")
    if self.processes.is_first:
      self.phases.record(number, f"{text}\n\n{data.receipt}")
    self.progress.say(data.receipt.rstrip())
    self.facts = data_fingerprint(self.config, data, self.mesh)
    self.processes.agree(f"data of round {number}", self.facts)
    self.batches = self.batches_from(data, step)
    self.meter.start_clock()
    return True

  def log_values(self, step: int, log: metrics.Log, *, logs: bool, measures: bool) -> None:
    """Write the line of the step, with the held-out loss where it is measured; save first if that is not finite."""
    values = self.meter.line() if logs else {}
    if measures:
      with self.ledger.part("heldout"):
        values |= self.heldout(self.state.params)
    if logs:
      values |= self.ledger.line()
    if measures and not all(map(math.isfinite, values.values())):
      self.save(step, log)
      self.wait()
      check_finite(values, f"after step {step}, which is saved")
    if values:
      log.write(step, values)
      self.progress.line(step, values)

  def save(self, step: int, log: metrics.Log) -> None:
    """Begin to save the state after this step."""
    with self.ledger.part("save"):
      totals = [*self.meter.to_json(), self.ledger.to_json()]
      self.saver.save(step, self.state, config=self.config, facts=self.facts, totals=totals, log=log.state())

  def wait(self) -> None:
    """Wait until what is being saved is complete."""
    with self.ledger.part("save"):
      self.saver.wait()

  def diverged(
    self, error: metrics.NotFiniteError, sound: int, workdir: pathlib.Path, log: metrics.Log
  ) -> DivergedError:
    """Save the state after the last sound step, unless it is saved, and return the error that names both."""
    self.wait()
    # Process 0 decides for all: a save needs all processes.
    is_saved = sound in layout.steps(workdir) if self.processes.is_first else None
    is_saved = self.processes.gather("the last sound step", is_saved)[0]
    if sound and not is_saved:
      self.save(sound, log)
      self.wait()
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

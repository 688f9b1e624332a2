"""Training loop: steps, logging, held-out losses, checkpoints, phases and the end of a run."""

import contextlib
import math
import os
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
from insec_jax.model import llama, parts
from insec_jax.training import (
  checkpoint,
  frozen,
  kept,
  layout,
  ledger,
  logps,
  metrics,
  optimizer,
  passes,
  profiling,
  sinks,
  streams,
)
from insec_jax.training import step as step_lib
from insec_jax.training.feeding import heldout_measure, local_rows, on_devices
from insec_jax.training.run import Curve, Phases, Run, choose_attention, data_fingerprint, rows_of
from insec_jax.training.time_limit import NoTimeError, TimeLimit

REMEDY = "; lower optimizer.learning_rate or look at the data, and begin in another --workdir"


def loop(
  config: Config,
  workdir: pathlib.Path,
  run: Run,
  mesh: Mesh,
  saver: checkpoint.Saver,
  phases: Phases,
  curve: Curve,
  processes: Processes,
) -> int:
  """Train to the last step, or to one in which a signal arrives or the session's time ends; return the exit code.

  The line of a step is written before its checkpoint, so a checkpoint never lacks the lines before it. Raises
  DivergedError when a loss is not finite; the state before that step is saved.
  """
  progress = metrics.TrainProgress(run.first, config.train.steps) if processes.is_first else metrics.NullLogger()
  trainer = Trainer(config, run, mesh, saver, phases, curve, processes, progress)
  before = metrics.last_line(workdir) if processes.is_first else {}
  trainer.ledger.lose(before)
  last_logged = run.first if run.totals is not None else sinks.NONE_SENT
  with (
    contextlib.closing(progress),
    stop_of(processes) as stops,
    contextlib.closing(
      metrics.Log(workdir, last_logged, run.log) if processes.is_first else metrics.NullLogger()
    ) as log,
  ):
    if processes.is_first:
      for sink in sinks.open_sinks(config, workdir, last=last_logged, sent=before.get("step", sinks.NONE_SENT)):
        log.show_in(sink)
    return trainer.train(workdir, log, stops)


class Trainer:
  """A run in progress: its compiled step, its state, and the data that it reads."""

  def __init__(
    self,
    config: Config,
    run: Run,
    mesh: Mesh,
    saver,
    phases: Phases,
    curve: Curve,
    processes: Processes,
    progress,
  ):
    self.config, self.run, self.mesh, self.saver = config, run, mesh, saver
    self.phases, self.curve, self.processes, self.progress = phases, curve, processes, progress
    self.ledger = ledger.Ledger(run.totals[2] if run.totals and len(run.totals) > 2 else None)
    self.rows = rows_of(config, mesh)
    self.local = local_rows(self.rows, mesh)
    attend, reason = choose_attention(config, run.config, jax.devices()[0])
    model = parts.model_of(run.config, config.precision.compute, config.model.remat, attend, run.part)
    announce(config, run, reason, progress)
    used = kept_tokens(config, run, progress)
    self.streams = streams.of_run(config, run, model, mesh, say=progress.say)
    # A phase that begins with the next step brings its own data.
    self.batches = None if run.first + 1 in phases.number_of else self.batches_from(run.data, run.first + 1)
    first = phases.first(run) if config.policy.reads_first else None
    with self.ledger.part("compile"):
      self.train_step, seconds = compile_step(config, run, model, mesh, used, first)
    progress.say(f"train step compiled in {seconds:.1f} s")
    self.heldout = heldout_measure(config, run, model, mesh, self.rows, self.local)
    is_gradient = config.policy.method == "gradient"
    self.logps = logps.measure_of(config, run, model, mesh, self.rows, self.local) if is_gradient else None
    number = phases.number_at(run.first)
    self.phase_values = {} if number is None or run.first + 1 in phases.number_of else phases.values(number)
    negative = metrics.FALSE_ALARM if config.policy.distills else metrics.REPEAT
    self.state, self.meter = run.state, metrics.Meter(run.totals and run.totals[:2], negative)
    self.facts = data_fingerprint(config, run.data, mesh, run.frozen)
    self.limit = TimeLimit(
      config.train.minutes,
      self.ledger,
      save_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(run.state)) // processes.num,
      compile_seconds=seconds,
      num_batches=-(-len(run.data.heldout) // self.rows),
      num_processes=processes.num,
    )

  def batches_from(self, data: pipeline.Data, step: int) -> Iterator[dict[str, np.ndarray]]:
    """Return the batches of the data from this step on; the order of rows sampled for a phase begins with it."""
    first = self.phases.first_at(step) if self.config.policy.is_on else None
    return pipeline.batches(
      data.train,
      seed=self.config.seed if first is None else (self.config.seed + first) % 2**32,
      rows_per_step=self.rows,
      accumulation=self.config.data.accumulation,
      start_step=step - (first or 1),
      share=self.local,
      negatives=self.config.negatives > 0,
      streams=self.streams,
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
    if not self.processes.gather("the time left", self.limit.allows_step(heldouts=0, saves=1))[0]:
      return self.no_time()
    traced = self.config.train.profile_steps if self.processes.is_first else ()
    profile = profiling.Profile(traced, workdir / layout.PROFILE, self.ledger)
    with contextlib.closing(profile), self.ledger.part("step"):
      return self.train_steps(workdir, log, stops, profile)

  def train_steps(
    self, workdir: pathlib.Path, log: metrics.Log, stops: Callable[[int], bool], profile: profiling.Profile
  ) -> int:
    """Train the steps that remain, to the last one or to a signal, and return the exit code."""
    run, steps, every = self.run, self.config.train.steps, self.config.train
    for step in range(run.first + 1, steps + 1):
      if step in self.phases.number_of and not self.begin_phase(step, log, stops):
        return self.stopped(f"mining is cut short before step {step}")
      with profile.step(step, self.state):
        self.state, step_metrics = self.train_step(self.state, self.next_batch())
      self.meter.add(step_metrics)
      if written := profile.after(step, self.state):
        self.progress.say(written)
      self.progress.step(step)
      last, stopping = step == steps, self.stops(step, stops)
      logs = last or step % every.log_every == 0 or step in self.curve.steps
      measures = self.measures(step)
      saves = stopping or self.saves(step)
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

  def no_time(self) -> int:
    """Return the exit code where not one step fits; NoTimeError unless this session is part of a longer one."""
    if stop_signal.SESSION_BEGAN not in os.environ:
      raise NoTimeError(
        f"train.minutes={self.limit.minutes:g} leaves no time for a step and a save after the start of the program; "
        f"give at least {self.limit.enough():g}"
      )
    return self.stopped("no step was trained")

  def stopped(self, where: str) -> int:
    """Print where the time went and where the run has stopped, and return the exit code."""
    self.progress.say(ledger.table(self.ledger.line()))
    reason = f"train.minutes={self.limit.minutes:g}" if self.limit.reached else "a signal"
    self.progress.say(f"stopped by {reason}: {where}; run the same command to go on")
    return command.PREEMPTED

  def measures(self, step: int) -> bool:
    """Return whether the held-out loss follows this step."""
    due = step == self.config.train.steps or step % self.config.train.eval_every == 0
    return bool(due and len(self.run.data.heldout))

  def saves(self, step: int) -> bool:
    """Return whether a save follows this step."""
    train = self.config.train
    return step == train.steps or step % train.checkpoint_every == 0 or step + 1 in self.phases.number_of

  def stops(self, step: int, signalled: Callable[[int], bool]) -> bool:
    """Return whether the run stops after this step: for a signal, or because the next would end after the session."""
    in_time = self.limit.allows_step(
      heldouts=self.measures(step) + self.measures(step + 1),
      points=(step in self.curve.steps) + (step + 1 in self.curve.steps),
      saves=self.saves(step) + 1,
    )
    if self.processes.num == 1:
      return signalled(step) or not in_time
    if not in_time and self.processes.is_first:
      self.processes.request_stop()
    return signalled(step)

  def next_batch(self) -> dict[str, jax.Array]:
    """Return the next batch on the devices; its time is one of waiting if they have finished every step before."""
    start = time.monotonic()
    batch = on_devices(next(self.batches), self.mesh, self.rows, self.local)
    if not self.meter.is_busy():
      self.ledger.move(time.monotonic() - start, "data")
    return batch

  def begin_phase(self, step: int, log: metrics.Log, stops: Callable[[int], bool]) -> bool:
    """Return whether the data of the phase that begins at this step is there: False after a signal, or at the limit."""

    def stopped() -> bool:
      return (self.processes.num == 1 and stops(step)) or not self.limit.allows_chunk()

    self.wait()
    number = self.phases.number_of[step]
    with self.ledger.part("mining"):
      text = self.phases.prepare(number, self.state.params, self.run, self.logps, stopped=stopped)
      if text is not None:
        data = self.phases.data(number, self.run.tokenizer, self.run.config)
    if text is None:
      return False
    self.progress.say(f"round {number} of {self.config.rounds}\n{text}")
    if self.processes.is_first:
      self.phases.record(number, f"{text}\n\n{data.receipt}")
      log.text(step, f"receipt of round {number}", f"{text}\n\n{data.receipt}")
    self.progress.say(data.receipt.rstrip())
    self.facts = data_fingerprint(self.config, data, self.mesh, self.run.frozen)
    self.processes.agree(f"data of round {number}", self.facts)
    self.batches, self.phase_values = self.batches_from(data, step), self.phases.values(number)
    self.meter.start_clock()
    return True

  def log_values(self, step: int, log: metrics.Log, *, logs: bool, measures: bool) -> None:
    """Write the line of the step, with the held-out loss where it is measured; save first if that is not finite.

    A point of the learning curve is measured before its line, and the line is written before a checkpoint of the step:
    a run that resumes measures no point again that it has, and lacks none.
    """
    values = self.meter.line() if logs else {}
    if step in self.curve.steps:
      with self.ledger.part("curve"):
        values |= self.curve.measure(self.run.all_params(self.state.params), self.run)
    if measures:
      with self.ledger.part("heldout"):
        values |= self.heldout(self.state.params)
    if logs:
      values |= self.phase_values | self.ledger.line()
    if measures and not all(map(math.isfinite, values.values())):
      self.save(step, log)
      self.wait()
      check_finite(values, f"after step {step}, which is saved")
    if values:
      log.write(step, values)
      self.progress.line(step, values)

  def save(self, step: int, log: metrics.Log) -> None:
    """Begin to save the state after this step; in a bucket, the lines up to it are there before the checkpoint."""
    with self.ledger.part("save"):
      log.publish()
      totals = [*self.meter.to_json(), self.ledger.to_json()]
      facts, base = self.facts, self.run.frozen and self.run.frozen.origin
      self.saver.save(step, self.state, config=self.config, facts=facts, totals=totals, log=log.state(), base=base)
    if self.limit.is_set and not self.limit.knows_save:
      self.wait()  # the limit needs the whole time of a save
      self.limit.knows_save = True

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
  """Print receipt, number of parameters, attention, optimizer and precision of the run."""
  num_params, num_frozen = (
    sum(param.size for param in jax.tree.leaves(params))
    for params in (run.state.params, run.frozen and run.frozen.params)
  )
  progress.say(run.data.receipt.rstrip())
  beside = f" beside {num_frozen:,} frozen ones in {config.precision.params}" if run.frozen else ""
  progress.say(f"{num_params:,} parameters{beside}; {attention_reason}")
  progress.say(f"optimizer {optimizer.describe(config.optimizer)}")
  if config.precision.params != "float32" and config.optimizer.rounding == "nearest" and not run.frozen:
    progress.say(
      f"parameters are {config.precision.params}: small updates are rounded away; float32 or "
      "optimizer.rounding='stochastic' is safer"
    )


def kept_tokens(config: Config, run: Run, progress: metrics.TrainProgress) -> kept.Kept | None:
  """Return the tokens over which the softmax of training is, None where it is over all; print how many they are."""
  if config.train.vocabulary == "all":
    return None
  # All special tokens: rows that no data trains may be nearly that of the token which ends a text.
  special = (number for number in run.tokenizer.get_added_vocab().values() if number < run.config.vocab_size)
  others = (*frozen.markers_of(config, run.tokenizer), *run.config.eos_ids, *special)
  found = kept.kept_of(run.data.train, others, run.config.vocab_size)
  progress.say(
    f"train.vocabulary: the training loss is a softmax over {len(found.id_K):,} of {run.config.vocab_size:,} tokens, "
    "which makes it smaller; held-out losses are over all"
  )
  return found


def compile_step(
  config: Config, run: Run, model: llama.Llama, mesh: Mesh, used: kept.Kept | None, first
) -> tuple[Callable, float]:
  """Return (compiled train step of a state and a batch, seconds of its compilation).

  `first` are the trained parameters with which the run began, None unless policy.teacher="start".
  """
  start = time.perf_counter()
  step = step_lib.make_train_step(
    model,
    config.optimizer,
    config.train.steps,
    mesh,
    run.shardings,
    repeat=config.negatives,
    policy=config.policy if config.policy.is_on else None,
    frozen_shardings=run.frozen and run.frozen.shardings,
    kept=used,
    seed=config.seed,
  )
  batch = step_lib.abstract_batch(
    mesh,
    accumulation=config.data.accumulation,
    rows_per_device=config.data.rows_per_device,
    row_length=config.data.row_length,
    negatives=config.negatives > 0,
    rewind=config.mistakes.rewind,
    policy=config.policy if config.policy.is_on else None,
    stream=jax.ShapeDtypeStruct((run.config.width,), config.precision.compute) if config.train.stream_cache else None,
  )
  given = passes.with_frozen((), run.frozen and run.frozen.params, first)
  compiled = step.lower(run.state, batch, *given).compile()
  return lambda state, batch: compiled(state, batch, *given), time.perf_counter() - start

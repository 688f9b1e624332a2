"""Cost of a study on a slice: chip-hours of all its stages at the roofline, from programs compiled for the slice.

    train      train.steps times the step's roofline on the whole slice, plus the mining of its rounds and the texts
               of its learning curve
    mine       mine.num_problems x mine.samples texts, shared by the hosts of the slice
    evaluate   measuring.num_texts texts, on one host; the other hosts of the slice wait
    export     none: it runs on the host

A text is a prompt and `tokens` written tokens in full batches. The time is what no run can beat for these tokens:
loading, compiling, checkpoints and latency are not in it. Neither is what mining writes after each mistake.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.evaluation import curve
from insec_jax.evaluation.measuring import num_texts
from insec_jax.model.llama import LlamaConfig
from insec_jax.sizing.compiled import Memory
from insec_jax.sizing.decoding import DecodeEstimate
from insec_jax.sizing.estimate import Estimate
from insec_jax.sizing.hardware import Topology
from insec_jax.sizing.shapes import model_of
from insec_jax.sizing.tables import markdown
from insec_jax.study import StudyStage


class Cost(NamedTuple):
  """Cost of a stage: seconds on the slice at the roofline, and what they are for."""

  stage: StudyStage
  seconds: float
  note: str


@dataclasses.dataclass(frozen=True)
class Sizer:
  """Compilers of the programs of a study for one slice; equal programs are compiled once.

  `train` and `decode` return the estimate of a config and a model on the slice. `tokens` is the length of a written
  text; None: evaluate.max_tokens.
  """

  topology: Topology
  hosts: int
  train: Callable[[Config, LlamaConfig], Estimate]
  decode: Callable[[Config, LlamaConfig], DecodeEstimate]
  tokens: float | None
  _cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

  def costs(self, stages: Sequence[StudyStage]) -> list[Cost]:
    """Return the cost of each stage; InputError for a program that does not fit."""
    if self.topology.chip is None:
      raise InputError(f"--study: the speed of {self.topology.devices[0].device_kind!r} is not known; give a slice")
    models: dict[str, LlamaConfig] = {}
    costs = []
    for stage in stages:
      if stage.arm not in models:
        models[stage.arm] = model_of(stage.config) if stage.start is None else models[stage.start]
      costs.append(self._cost(stage, models[stage.arm]))
    return costs

  def _cost(self, stage: StudyStage, model: LlamaConfig) -> Cost:
    config = stage.config
    if stage.program == "export":
      return Cost(stage, 0.0, "on the host")
    if stage.program == "evaluate":
      return Cost(stage, num_texts(config) * self._text_seconds(stage, model), f"{num_texts(config):,} texts")
    samples = config.mine.num_problems * config.mine.samples
    if stage.program == "mine":
      return Cost(stage, samples * self._text_seconds(stage, model) / self.hosts, f"{samples:,} texts")
    step = self._train(stage, model)
    seconds, note = config.train.steps * step, f"{config.train.steps:,} steps of {step:.3g} s"
    if config.rounds:
      seconds += config.rounds * samples * self._text_seconds(stage, model) / self.hosts
      note += f", {config.rounds * samples:,} texts mined"
    if points := curve.num_texts(config):
      seconds += points * self._text_seconds(stage, model) / self.hosts
      note += f", {points:,} texts of the learning curve"
    return Cost(stage, seconds, note)

  def _train(self, stage: StudyStage, model: LlamaConfig) -> float:
    """Return the seconds of a train step."""
    config = stage.config
    # What the compiled step depends on; learning rates and lengths of the run change no shape.
    state = (config.optimizer.name, config.optimizer.moments, bool(config.optimizer.ema), config.optimizer.memory)
    about = (
      config.model.remat,
      config.precision,
      config.lora,
      config.train.top_layers,
      config.train.marker_rows,
      config.mesh,
      config.negatives > 0,
      config.policy,
    )
    key = (model, *about, *state, *_rows(config))
    if key not in self._cache:
      self._cache[key] = self.train(config, model)
    self._check(stage, self._cache[key].memory)
    return self._cache[key].work.step_seconds

  def _text_seconds(self, stage: StudyStage, model: LlamaConfig) -> float:
    """Return the seconds of one host for a text."""
    config = stage.config
    key = (model, config.precision.compute, config.evaluate.batch_size, config.evaluate.max_tokens)
    if key not in self._cache:
      self._cache[key] = self.decode(config, model)
    self._check(stage, self._cache[key].memory)
    return self._cache[key].text_seconds(self.tokens or config.evaluate.max_tokens)

  def _check(self, stage: StudyStage, memory: Memory) -> None:
    if not memory.fits:
      raise InputError(
        f"{stage.name} does not fit on {self.topology.name}, by {memory.missing:.2f} GiB a chip; "
        "fit without --study says what would help"
      )


def _rows(config: Config) -> tuple[int, int, int]:
  return config.data.rows_per_device, config.data.row_length, config.data.accumulation


class Line(NamedTuple):
  """Cost of a program on an arm, over all seeds."""

  arm: str
  program: str
  runs: int
  seconds: float  # of all runs, at the roofline
  note: str  # of one run


def lines_of(costs: Sequence[Cost]) -> list[Line]:
  """Return the costs with the seeds added up, in the order of the first seed; stages without cost are left out."""
  lines: dict[tuple[str, str], Line] = {}
  for cost in costs:
    if cost.seconds:
      name = (cost.stage.arm, cost.stage.program)
      before = lines.get(name, Line(*name, 0, 0.0, cost.note))
      lines[name] = before._replace(runs=before.runs + 1, seconds=before.seconds + cost.seconds)
  return list(lines.values())


def table(topology: Topology, costs: Sequence[Cost], *, efficiency: float, price: float | None) -> str:
  """Return a Markdown table with one row for each arm and program, and the total.

  Seconds are divided by `efficiency`; `price` is that of a chip-hour.
  """
  header = ("arm", "program", "runs", "of one run", "hours", "chip-hours", *(("dollars",) if price is not None else ()))
  lines = lines_of(costs)
  total = Line("all", "", sum(line.runs for line in lines), sum(line.seconds for line in lines), "")
  rows = []
  for line in (*lines, total):
    hours = line.seconds / efficiency / 3600
    chip_hours = hours * topology.chips
    dollars = (f"{chip_hours * price:,.2f}",) if price is not None else ()
    rows.append((line.arm, line.program, str(line.runs), line.note, f"{hours:.3g}", f"{chip_hours:.3g}", *dollars))
  what = "at the roofline, a lower bound" if efficiency == 1 else f"at {efficiency:.0%} of the roofline"
  return f"{topology.name}, {topology.chips} chips, {what}\n" + markdown(header, rows)


def as_json(topology: Topology, costs: Sequence[Cost], *, efficiency: float, price: float | None) -> dict[str, Any]:
  """Return all figures, with units in the names."""
  lines = lines_of(costs)
  hours = sum(line.seconds for line in lines) / efficiency / 3600
  return {
    "topology": topology.name,
    "chips": topology.chips,
    "efficiency": efficiency,
    "roofline": [line._asdict() for line in lines],
    "hours": hours,
    "chip_hours": hours * topology.chips,
    "dollars": None if price is None else hours * topology.chips * price,
  }

"""Metrics of a run: running totals, metrics.jsonl, and a progress bar or lines on the terminal."""

import json
import math
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from insec_jax.command import InputError
from insec_jax.files import buckets
from insec_jax.files.bucket_paths import BucketPath
from insec_jax.files.reading import open_to_read, read_text
from insec_jax.files.writing import write_text
from insec_jax.method.roles import NAMES, NUM_ROLES
from insec_jax.progress import Progress
from insec_jax.training.policy_loss import PolicySums
from insec_jax.training.scores import Negatives, Sums
from insec_jax.training.sinks import Sink

# Steps that the host may be ahead of the devices: dispatched steps must finish before a preempted run can save.
STEPS_AHEAD = 2
METRICS = "metrics.jsonl"
REPEAT, FALSE_ALARM = "repeat", "false_alarm"  # what negatives avoid: a repeated mistake, or a flag with "distill"
NO_LINES = {"bytes": 0, "crc32": 0}
NO_NEGATIVES = Negatives(0.0, 0.0, 0.0)
NO_POLICY = PolicySums(0.0, 0.0, 0.0)


class StepMetrics(NamedTuple):
  """Metrics of one step, all on the device: sums to add, and values of that step alone."""

  sums: Sums
  tokens: jax.Array  # number of tokens that are not padding
  grad_norm: jax.Array  # before clipping
  lr: jax.Array


class Totals(NamedTuple):
  """Float64 sums over steps, those of negatives and of a policy always included.

  `seconds` is the time spent in steps, without compiling, held-out loss and saving.
  """

  sums: Sums
  tokens: float
  seconds: float

  @classmethod
  def zero(cls):
    zeros_R = np.zeros(NUM_ROLES)
    return cls(Sums(0.0, 0.0, zeros_R, zeros_R, zeros_R, NO_NEGATIVES, NO_POLICY, zeros_R), 0.0, 0.0)

  def plus(self, sums, tokens, seconds):
    sums = sums._replace(
      negatives=sums.negatives or NO_NEGATIVES,
      policy=sums.policy or NO_POLICY,
      divergence_R=np.zeros(NUM_ROLES) if sums.divergence_R is None else sums.divergence_R,
    )
    return Totals(
      jax.tree.map(lambda a, b: np.float64(a) + b, self.sums, sums), self.tokens + float(tokens), self.seconds + seconds
    )

  def to_json(self):
    return [[np.asarray(total).tolist() for total in self.sums], self.tokens, self.seconds]

  @classmethod
  def from_json(cls, value):
    (loss, weight, nll, correct, count, negatives, *later), tokens, seconds = value
    sums = map(np.asarray, (loss, weight, nll, correct, count))
    # Checkpoints of earlier versions have no sums of a policy gradient, or none of a distillation.
    policy, divergence_R = (*later, *(NO_POLICY, [0.0] * NUM_ROLES)[len(later) :])
    of_policy = PolicySums(*map(np.asarray, policy))
    return cls(
      Sums(*sums, Negatives(*map(np.asarray, negatives)), of_policy, np.asarray(divergence_R)), tokens, seconds
    )


class NotFiniteError(Exception):
  """Error: a loss or a gradient norm is not finite; `num_lost` steps, that one and later ones, had no effect."""

  def __init__(self, what: str, num_lost: int):
    super().__init__(what)
    self.num_lost = num_lost


class Meter:
  """Totals of the run and of the window since the last logged line; a line divides the sums of its window once.

  The device arrays of a step are fetched only when a line or a checkpoint needs them, so that the device never waits.
  The host waits when it is too far ahead. `to_json` is saved in the checkpoint: a resumed run adds the same numbers in
  the same order and logs the same bits. `negative` names what negatives avoid, REPEAT or FALSE_ALARM.
  """

  def __init__(self, saved=None, negative: str = REPEAT):
    self._negative = negative
    self.run, self.window = (Totals.zero(), Totals.zero()) if saved is None else map(Totals.from_json, saved)
    self._pending, self._last = [], None
    self._since = time.perf_counter()

  def start_clock(self):
    """Restart the step timer."""
    self._since = time.perf_counter()

  def add(self, step: StepMetrics):
    """Add the step to the run and the window; block while more than STEPS_AHEAD steps have not ended."""
    self._pending.append(step)
    if len(self._pending) > STEPS_AHEAD:
      jax.block_until_ready(self._pending[-1 - STEPS_AHEAD])

  def is_busy(self) -> bool:
    """Return whether a step that was added has not ended; the devices are asked, not waited for."""
    return bool(self._pending) and not self._pending[-1].grad_norm.is_ready()

  def settle(self) -> None:
    """Add up every step so far, and the time since the clock was started.

    Raises NotFiniteError when a loss or gradient norm is not finite. The steps before it are added; it and those after
    it are not.
    """
    steps, self._pending = jax.device_get(self._pending), []
    now = time.perf_counter()
    seconds, self._since = now - self._since, now
    for number, step in enumerate(steps):
      if not np.isfinite(step.sums.loss) or not np.isfinite(step.grad_norm):
        raise NotFiniteError(
          f"the loss is {step.sums.loss}, the norm of the gradient {step.grad_norm}", len(steps) - number
        )
      self.run, self.window = (totals.plus(step.sums, step.tokens, seconds) for totals in (self.run, self.window))
      self._last, seconds = step, 0.0

  def to_json(self):
    """Return the totals as plain lists, every pending step included."""
    self.settle()
    return [self.run.to_json(), self.window.to_json()]

  def line(self) -> dict[str, float]:
    """Return one line of metrics and start a new window.

    loss, loss/<role>, accuracy/<role> and the throughputs are over the window; tokens, trained_tokens and seconds since
    the start of the run; grad_norm and lr of the last step. A role without trained tokens has no key. With loss.repeat
    also loss/repeat and p/repeat: mean cost and probability of the tokens that would begin to repeat a mistake. With
    policy.method="gradient" also policy/kl and policy/clipped: mean estimated KL, with policy.kl=0 to the weights that
    sampled, and fraction of tokens outside the clip. With "distill" also divergence/<role>, from the teacher, and
    loss/false_alarm and p/false_alarm: mean cost and probability of a flag after a right step.
    """
    self.settle()
    sums, tokens, seconds = self.window
    self.window = Totals.zero()
    return {
      "loss": float(sums.loss / sums.weight) if sums.weight else 0.0,
      **role_means(sums, self._negative),
      "tokens": int(self.run.tokens),
      "trained_tokens": int(self.run.sums.count_R.sum()),
      "tokens_per_s": round(tokens / seconds, 1),
      "trained_tokens_per_s": round(float(sums.count_R.sum()) / seconds, 1),
      "seconds": round(self.run.seconds, 3),
      "lr": float(self._last.lr),
      "grad_norm": float(self._last.grad_norm),
    }


def role_means(sums: Sums, negative: str = REPEAT) -> dict[str, float]:
  """Return loss/<role> and accuracy/<role> of each role with tokens, and the means of negatives and of a policy."""
  means = {}
  for name, nll, correct, count in zip(NAMES, sums.nll_R, sums.correct_R, sums.count_R, strict=True):
    if count:
      means[f"loss/{name}"] = float(nll / count)
      means[f"accuracy/{name}"] = float(correct / count)
  if sums.negatives is not None and sums.negatives.count:
    means[f"loss/{negative}"] = float(sums.negatives.cost / sums.negatives.count)
    means[f"p/{negative}"] = float(sums.negatives.p / sums.negatives.count)
  if sums.divergence_R is not None and sums.divergence_R.any():
    of_roles = zip(NAMES, sums.divergence_R, sums.count_R, strict=True)
    means |= {f"divergence/{name}": float(total / count) for name, total, count in of_roles if count}
  if sums.policy is not None and sums.policy.count:
    means["policy/kl"] = float(sums.policy.kl / sums.policy.count)
    means["policy/clipped"] = float(sums.policy.clipped / sums.policy.count)
  return means


def heldout_line(sums: Sums, weight_R) -> dict[str, float]:
  """Return eval/loss and all of `role_means` under eval/; in `sums` every token must have weight 1.

  eval/loss is the mean per token, weighted by role. Roles of weight 0 or less and negatives are not part of it, but
  have their own keys.
  """
  positive_R = np.maximum(np.asarray(weight_R, np.float64), 0)
  total = (positive_R * sums.count_R).sum()
  loss = float((positive_R * sums.nll_R).sum() / total) if total else 0.0
  return {f"eval/{key}": value for key, value in {"loss": loss, **role_means(sums)}.items()}


def check_lines(workdir: pathlib.Path, last_step: int, saved: dict[str, int] | None) -> str:
  """Return the lines of metrics.jsonl up to `last_step`; `saved` is the `Log.state()` of that step.

  Raises InputError if the lines differ from those written then; a missing file is reported on stderr.
  """
  path = workdir / METRICS
  if not path.exists():
    if saved is not None and saved["bytes"]:
      print(f"{path} is gone: the lines up to step {last_step} are lost", file=sys.stderr, flush=True)
    return ""
  if saved is None:  # a checkpoint of an earlier version
    return "".join(line + "\n" for line, step in _whole_lines(path) if step <= last_step)
  with open_to_read(path, "the metrics of a run") as file:
    lines = file.read(saved["bytes"])
  if _add_line(NO_LINES, lines) != saved:
    raise InputError(
      f"{path} is not what it was after step {last_step}; bring it back, or move it away and lose the "
      "lines up to that step"
    )
  return lines.decode()


def last_line(workdir: pathlib.Path) -> dict[str, float]:
  """Return the newest whole line of metrics.jsonl; empty when there is none that can be read (see `check_lines`)."""
  path = workdir / METRICS
  try:
    line = json.loads(read_text(path, "the metrics of a run").split("\n")[-2])
  except (InputError, ValueError, IndexError, RecursionError):
    return {}
  return line if isinstance(line, dict) else {}


class Log:
  """File metrics.jsonl of a workdir, continued after step `last_step`, and the places that show its lines.

  Later lines, from a run that was killed before its next checkpoint, are cut, so that no step appears twice. `saved` is
  `state()` at that step. Raises InputError as `check_lines` does.
  """

  def __init__(self, workdir: pathlib.Path, last_step: int, saved: dict[str, int] | None = None):
    self._workdir, path = workdir, workdir / METRICS
    lines = check_lines(workdir, last_step, saved)
    self._state = _add_line(NO_LINES, lines.encode())
    write_text(path, lines)
    self._file = path.open("a", encoding="utf-8")
    self._sinks: list[Sink] = []

  def show_in(self, sink: Sink) -> None:
    """Show later lines in this place too, which is closed with the log."""
    self._sinks.append(sink)

  def state(self) -> dict[str, int]:
    """Return the current size and checksum of metrics.jsonl."""
    return self._state

  def write(self, step: int, values: dict[str, float]):
    """Append one line to metrics.jsonl, and show its values in each place that does not have it."""
    line = json.dumps({"step": step, **values}, allow_nan=False) + "\n"
    self._file.write(line)
    self._file.flush()
    self._state = _add_line(self._state, line.encode())
    for sink in self._sinks:
      if step > sink.sent:
        sink.write(step, values)

  def text(self, step: int, name: str, text: str):
    """Show a text in each place that has no line of this step yet; metrics.jsonl has numbers only."""
    for sink in self._sinks:
      if step > sink.sent:
        sink.text(name, text, step)

  def publish(self):
    """Upload the file, and those of the places, where the workdir is in a bucket."""
    if isinstance(self._workdir, BucketPath):
      for sink in self._sinks:
        sink.flush()
      buckets.publish(self._workdir)

  def close(self):
    """Close the file and the places."""
    self._file.close()
    for sink in self._sinks:
      sink.close()


def _add_line(state: dict[str, int], line: bytes) -> dict[str, int]:
  return {"bytes": state["bytes"] + len(line), "crc32": zlib.crc32(line, state["crc32"])}


class NullLogger:
  """Log and progress of every process but the first of its run; every call does nothing."""

  def state(self) -> None: ...

  def write(self, step: int, values: dict[str, float]): ...

  def text(self, step: int, name: str, text: str): ...

  def start(self): ...

  def step(self, step: int): ...

  def line(self, step: int, values: dict[str, float]): ...

  def say(self, text: str): ...

  def publish(self): ...

  def close(self): ...


def _whole_lines(path: pathlib.Path) -> Iterator[tuple[str, int]]:
  """Yield each line with its step.

  A last line that a kill has cut short is left out. Raises InputError for any other damage.
  """
  for number, line in enumerate(read_text(path, "the metrics of a run").split("\n")[:-1], 1):
    try:
      yield line, json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise InputError(f"{path}:{number} is not a line of metrics; repair or remove the file") from error


class TrainProgress:
  """Terminal output of a run: a bar with loss, tokens/s and time left, or a plain line for every logged step."""

  def __init__(self, first: int, steps: int):
    self._steps = steps
    self._progress = Progress("train", steps, unit="step", done=first, quiet=math.inf)  # `line` prints

  def start(self):
    """Restart the estimate of the time left, after compilation."""
    self._progress.restart()

  def step(self, step: int):
    """Show that `step` is done."""
    self._progress.update(step)

  def line(self, step: int, values: dict[str, float]):
    """Show the newest values."""
    words = [f"{key} {values[key]:.4f}" for key in ("loss", "eval/loss") if key in values]
    if "tokens_per_s" in values:
      words.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    if self._progress.is_bar:
      self._progress.note(", ".join(words))
    else:
      self.say(f"step {step}/{self._steps}: {', '.join(filter(None, (*words, self._progress.left())))}")

  def say(self, text: str):
    """Print a line above the bar."""
    self._progress.say(text)

  def close(self):
    """Close the bar."""
    self._progress.close()

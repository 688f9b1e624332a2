"""Sections of the configuration for training: loss, optimizer, steps, logs, devices, precision and adapters."""

import dataclasses
import math
from typing import Annotated, Literal

from pydantic import Field

from insec_jax.command import InputError
from insec_jax.config_types import (
  MATRICES,
  Fraction,
  Matrices,
  Moment,
  Path,
  Sinks,
  StepRange,
  Weight,
  checked,
  number,
  whole,
)
from insec_jax.files.bucket_paths import SCHEME

LARGEST = 2**31 - 1  # of counts that are int32 on a device
Steps = Annotated[int, whole(1, LARGEST)]
Devices = Annotated[int, whole(-1, 1 << 20)]
PROJECT = "a name of at most 100 letters, digits, dots, dashes and underscores"
Dtype = Literal["float32", "bfloat16"]


@checked
class LossConfig:
  """Weight of one token of each role, and of the end-of-text token; 0 masks, negative is unlikelihood.

  `repeat` is the weight of unlikelihood on the token with which a correction would begin to repeat its mistake.
  """

  prompt: Weight = 0.0
  text: Weight = 1.0
  mistake: Weight = 0.0
  flag: Weight = 1.0
  reason: Weight = 1.0
  correction: Weight = 1.0
  end: Weight = 1.0
  repeat: Weight = 0.0

  def __post_init__(self):
    if not self.end > 0:
      raise InputError(f"loss.end={self.end}; a model that never learns to stop is useless: give a positive weight")
    if self.repeat < 0:
      raise InputError(f"loss.repeat={self.repeat}; must be at least 0: it is the size of an unlikelihood")

  @property
  def weight_R(self) -> tuple[float, ...]:
    """Weight of each role, in the order of the fields above, which is that of method.roles.NAMES."""
    return (self.prompt, self.text, self.mistake, self.flag, self.reason, self.correction)

  @property
  def negatives(self) -> bool:
    """Whether unlikelihood on negatives is used; if not, batches and the train step are built without them."""
    return self.repeat > 0


@checked
class OptimizerConfig:
  """Optimizer: linear warm-up to `learning_rate`, then cosine down to `final_share` of it at train.steps.

  "adafactor" reads neither b1 nor b2; the momentum of "muon" and the interpolation of "schedule_free" are b1.
  """

  name: Literal["adamw", "adafactor", "lion", "muon", "schedule_free"] = "adamw"
  learning_rate: Annotated[float, number(1e-30, 1_000.0)] = 1e-5
  final_share: Fraction = 0.1
  warmup_steps: Annotated[int, whole(0, LARGEST)] = 20
  weight_decay: Annotated[float, number(0.0, 1_000.0)] = 0.0
  b1: Moment = 0.9
  b2: Moment = 0.95
  eps: Annotated[float, number(1e-30, 1.0)] = 1e-8  # a smaller one gives 0 / 0 in float32 where the gradient is 0
  clip_norm: Annotated[float, number(1e-9, 1e9)] = 1.0  # global norm of the gradient
  moments: Dtype = "float32"  # as stored; bfloat16 ones are rounded stochastically
  rounding: Literal["nearest", "stochastic"] = "nearest"  # of bfloat16 parameters after an update
  ema: Moment = 0.0  # of the moving average of the weights, which is then measured and saved; 0: no average
  memory: Literal["device", "host"] = "device"  # that holds the optimizer's state between steps

  @property
  def on_host(self) -> bool:
    """Whether the state is in the memory of the host between steps."""
    return self.memory == "host"

  def __post_init__(self):
    if self.name == "adafactor" and self.moments != "float32":
      raise InputError(
        f"optimizer.moments={self.moments!r} with optimizer.name='adafactor', whose moments are sums over rows and "
        "columns and hardly take memory; set it to 'float32'"
      )
    if self.name == "schedule_free" and not (self.final_share == 1 and self.b1 and not self.ema):
      raise InputError(
        "optimizer.name='schedule_free' averages the weights instead of lowering the learning rate, and divides by b1: "
        f"set optimizer.final_share=1 (now {self.final_share:g}), optimizer.ema=0 (now {self.ema:g}) and optimizer.b1 "
        f"above 0 (now {self.b1:g})"
      )


@checked
class TrainConfig:
  """Length of the run, intervals, in steps, of logging, held-out loss and checkpoints, and the part that is trained.

  The points of the learning curve are evenly spaced, the last one at the end (evaluation/curve.py). With `top_layers`
  nothing below them is trained but, with `marker_rows`, the embedding's rows of the special markers.
  """

  steps: Steps = 300
  log_every: Steps = 10
  eval_every: Steps = 100
  checkpoint_every: Steps = 100
  keep: Steps = 2  # number of newest checkpoints that are kept
  minutes: Annotated[float, number(0.0, 1e6)] = 0.0  # of a session: saved and stopped (code 42) before it; 0: no limit
  curve_points: Annotated[int, whole(0, 1_000)] = 0  # measurements of accuracy during training; 0: none
  profile_steps: StepRange = ()  # the first and the last step to write a trace of, for xprof; empty: none
  top_layers: Annotated[int, whole(0, 10_000)] = 0  # layers that are trained, the last ones; 0: every weight is
  marker_rows: bool = True  # with top_layers: train the rows of the special markers, through the frozen layers
  stream_cache: Path = ""  # with top_layers: folder for the output of the frozen layers, computed once; empty: none
  vocabulary: Literal["all", "used"] = "all"  # of the softmax in training; "used": tokens of the training rows

  def __post_init__(self):
    if len(self.profile_steps) == 1 or list(self.profile_steps) != sorted(self.profile_steps):
      raise InputError(
        f"train.profile_steps={self.profile_steps}; must be a first and a last step, such as (10, 13), or nothing"
      )
    if self.stream_cache.startswith(SCHEME):
      raise InputError(f"train.stream_cache={self.stream_cache} is mapped into memory; give a folder on a local disk")
    if self.profile_steps and self.profile_steps[1] > self.steps:
      raise InputError(
        f"train.profile_steps={self.profile_steps} ends after train.steps={self.steps}; give steps of the run"
      )
    if self.curve_points > self.steps:
      raise InputError(f"train.curve_points={self.curve_points} is above train.steps={self.steps}; lower it")


@checked
class PolicyConfig:
  """Training on texts that the model samples in each round, and the task's checker judges.

  "gradient" (training/policy_loss.py): the mine.samples texts of a problem are a group. The advantage of a text is its
  reward minus the group's mean, divided by the standard deviation if `scaled`. The reward is 1 for a right answer
  ("answer"), or the fraction of right steps before a wrong one that is not withdrawn ("steps"), minus `flag_price` for
  each flag.

  "distill" (training/distill_loss.py): after the first wrong step of a text the model flags, explains and corrects it.
  There it learns from a teacher, which has a hint about the step in its prompt (mistakes.hint).
  """

  method: Literal["none", "gradient", "distill"] = "none"
  temperature: Annotated[float, number(0.01, 100.0)] = 1.0  # of the samples, and of the softmax in training
  reward: Literal["answer", "steps"] = "answer"
  flag_price: Annotated[float, number(0.0, 1.0)] = 0.01
  scaled: bool = True
  clip: Annotated[float, number(0.001, 0.999)] = 0.2  # of the ratio to the weights that sampled (PPO's epsilon)
  kl: Annotated[float, number(0.0, 100.0)] = 0.04  # weight of the KL to the first weights; 0: these are not read again
  teacher: Literal["start", "current"] = "start"  # weights of the teacher: those of the start, or those trained
  forward: Fraction = 0.0  # weight of KL(teacher || student); KL(student || teacher) has the rest
  contrast: Annotated[float, number(0.0, 100.0)] = 0.0  # g of the teacher's logits (1 + g) right - g wrong hint
  no_flag: Annotated[float, number(0.0, 100.0)] = 1.0  # weight of -log(1 - p(flag)) after each right step

  @property
  def is_on(self) -> bool:
    """Whether rounds sample texts to train on, in place of mining records."""
    return self.method != "none"

  @property
  def distills(self) -> bool:
    """Whether a teacher with hints is imitated."""
    return self.method == "distill"

  @property
  def reads_first(self) -> bool:
    """Whether each train step reads the weights with which the run began."""
    return self.distills and self.teacher == "start"


@checked
class LogConfig:
  """Places where a run can be watched, beside metrics.jsonl; wandb and trackio are extras of this package."""

  to: Sinks = ("tensorboard",)
  project: Annotated[str, Field(pattern=r"\A[A-Za-z0-9_.-]{1,100}\z", description=PROJECT)] = "insec_jax"  # of services

  def __post_init__(self):
    if len(set(self.to)) < len(self.to):
      raise InputError(f"log.to={self.to} names a place twice; name each once")


@checked
class MeshConfig:
  """Number of devices along each mesh axis; -1, at most once, takes the devices that remain."""

  data: Devices = 1
  fsdp: Devices = -1
  sequence: Devices = 1  # devices that share a row, each with some of its positions; parameters are split over them too
  tensor: Devices = 1

  def __post_init__(self):
    sizes = dataclasses.astuple(self)
    if sizes.count(-1) > 1 or 0 in sizes:
      raise InputError(f"mesh sizes must be positive with at most one -1, got {self._given()}")

  def _given(self) -> str:
    return " ".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())

  def shape(self, num_devices: int) -> tuple[int, ...]:
    """Return (data, fsdp, sequence, tensor), the -1 filled in; InputError unless they multiply to `num_devices`."""
    sizes = dataclasses.astuple(self)
    known = math.prod(size for size in sizes if size > 0)
    filled = tuple(num_devices // known if size == -1 else size for size in sizes)
    if math.prod(filled) == num_devices:
      return filled
    if wrong := [name for name, size in dataclasses.asdict(self).items() if num_devices % max(size, 1)]:
      fits = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
      remedy = f"mesh.{wrong[0]} must be one of {', '.join(map(str, fits))}"
    elif -1 in sizes:
      remedy = f"make the sizes but the -1 multiply to a number that divides {num_devices}"
    else:
      remedy = f"make the sizes multiply to {num_devices}, or set one to -1"
    raise InputError(f"mesh {self._given()} does not divide {num_devices} devices; {remedy}")


@checked
class PrecisionConfig:
  """Dtype of the parameters, and of the matrix products; that of moments is optimizer.moments."""

  params: Dtype = "float32"
  compute: Dtype = "bfloat16"


@checked
class LoraConfig:
  """Adapters of frozen matrices (LoRA, model/lora.py) and trained rows of markers; rank 0: every weight is trained.

  Adapters and rows are float32, frozen weights have the dtype precision.params. There is no dropout.
  """

  rank: Annotated[int, whole(0, 1_024)] = 0
  alpha: Annotated[float, number(1e-6, 1e6)] = 32.0  # an adapter's product is multiplied by alpha / rank
  rank_stabilised: bool = False  # by alpha / sqrt(rank) instead (arXiv 2312.03732)
  matrices: Matrices = MATRICES  # those with an adapter
  marker_rows: bool = True  # train the rows of the special markers in embedding and output matrix

  @property
  def scale(self) -> float:
    """The factor of an adapter's product; needs a rank above 0."""
    return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

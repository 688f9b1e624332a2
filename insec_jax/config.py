"""Configuration: one frozen dataclass per section, whose fields have type, bounds and default.

A config file changes the ConfigDict that `defaults` returns. `config_build.build` makes a `Config` of it, and checks
conditions across sections.
"""

import dataclasses
import json
import math
import pathlib
from typing import Annotated, Any, Literal

import ml_collections
from pydantic import Field

from insec_jax.command import InputError
from insec_jax.config_models import llama31, small_llama  # noqa: F401  config files import them from here
from insec_jax.config_types import (
  MATRICES,
  Columns,
  Edges,
  FalseAlarms,
  Fraction,
  JsonObject,
  Marker,
  Matrices,
  Moment,
  Names,
  Path,
  Paths,
  Sinks,
  StepRange,
  Weight,
  checked,
  number,
  one_of,
  whole,
)
from insec_jax.files.buckets import SCHEME


def _tasks() -> tuple[str, ...]:
  """Return the names of the modules of method/tasks that hold a task, and "records", which has no checker of steps."""
  files = (pathlib.Path(__file__).parent / "method" / "tasks").glob("*.py")
  return (*sorted(file.stem for file in files if "\nTASK = " in file.read_text(encoding="utf-8")), "records")


TASKS = _tasks()
FROM_FILE = ("gsm8k", "records")  # tasks whose problems are records of data.path
SMALLEST_TEMPERATURE = 0.001  # for sampling
LARGEST = 2**31 - 1  # of counts that are int32 on a device
MOST_PROBLEMS = 1_000_000  # generated problems: all are kept in memory
MOST_TOKENS = 1 << 28  # of a device in one step
Seed = Annotated[int, whole(0, 2**32 - 1)]  # the range that jax, numpy and grain share
Rounds = Annotated[int, whole(0, 1_000_000)]
Steps = Annotated[int, whole(1, LARGEST)]
Problems = Annotated[int, whole(1, MOST_PROBLEMS)]
Size = Annotated[int, whole(0, 1_000)]  # operations of a problem
Temperature = Annotated[float, number(0.0, 1_000.0)]
Devices = Annotated[int, whole(-1, 1 << 20)]
PROJECT = "a name of at most 100 letters, digits, dots, dashes and underscores"
Dtype = Literal["float32", "bfloat16"]


@checked
class ModelConfig:
  """Source of the weights: an HF folder, a hub id, or `size` (fields of a config.json) for random weights."""

  path: Path = ""
  size: JsonObject | None = Field(
    default=None, description="None, or a dict of the fields of a config.json, as JSON has them"
  )
  remat: Literal["none", "matmuls", "full"] = "full"  # the backward pass keeps: all, products, or only the stream

  def __post_init__(self):
    if bool(self.path) == bool(self.size):
      raise InputError(
        "give either model.path (an HF folder or a hub id) or model.size (config.json fields), not both or neither"
      )


@checked
class TokenizerConfig:
  """Tokenizer folder or hub id (empty: the model's own, or one built from the task's symbols) and the two markers.

  A marker that is already a special token of the tokenizer does not resize the model. With `special=False` both markers
  are plain words.
  """

  path: Path = ""
  flag: Marker = "<|flag|>"
  fix: Marker = "<|fix|>"
  special: bool = True
  confidence: Edges = ()  # bin edges of the score of a step, for the confidence token after it; empty: no such token
  confidence_first: Edges = ()  # bin edges of the score of its first token, binned separately; empty: not binned

  @property
  def confidence_names(self) -> tuple[str, ...]:
    """Text of each confidence token, the most confident bin first: one for each bin, or none."""
    num = (len(self.confidence) + 1) * (len(self.confidence_first) + 1) if self.confidence else 0
    return tuple(f"<|sure_{number}|>" for number in range(num))

  def __post_init__(self):
    for name in ("confidence", "confidence_first"):
      edges = getattr(self, name)
      if list(edges) != sorted(set(edges)):
        raise InputError(f"tokenizer.{name}={edges}; must be scores above 0 that ascend, or nothing")
    if self.confidence_first and not self.confidence:
      raise InputError(
        f"tokenizer.confidence_first={self.confidence_first} parts tokens that tokenizer.confidence=() "
        "does not have; give both, or neither"
      )
    if self.confidence and not self.special:
      raise InputError("tokenizer.confidence adds special tokens, and tokenizer.special=False wants none; change one")
    if not self.flag or not self.fix or self.flag in self.fix or self.fix in self.flag:
      raise InputError(
        f"tokenizer.flag={self.flag!r} and tokenizer.fix={self.fix!r} must be two texts, neither inside the other"
      )


@checked
class TaskConfig:
  """Kind and size of problems: `min_size` to `max_size` operations, numbers modulo `modulus` (0: plain integers).

  "gsm8k" and "records" read data.path and use none of these sizes: all must be 0.
  """

  name: Annotated[str, one_of(TASKS)] = "records"
  min_size: Size = 0
  max_size: Size = 0
  modulus: Annotated[int, whole(0, 1_000)] = 0

  def __post_init__(self):
    if self.min_size > self.max_size:
      raise InputError(f"task.min_size={self.min_size} is above task.max_size={self.max_size}")


@checked
class DataConfig:
  """Records and rows; `num_records` is the number of problems to generate, or of records to read at most (0: all)."""

  path: Paths = ""
  fields: Columns = ""  # columns of other data sets that make a record (data/fields.py); empty: none are renamed
  heldout_path: Paths = ""  # records held out, at most num_heldout (0: all); empty: num_heldout of those of path
  cache: Path = ""  # folder for rows of records, which are made once and then mapped into memory; empty: kept in memory
  num_records: Annotated[int, whole(0, 10_000_000)] = 0
  num_heldout: Annotated[int, whole(0, 10_000_000)] = 0
  template: Literal["plain", "chat"] = "plain"  # "chat": the tokenizer's own
  marker_text: Literal["refuse", "plain"] = "refuse"  # a marker inside user text: "plain" encodes it as characters
  row_length: Annotated[int, whole(2, 1 << 20)] = 2_048
  rows_per_device: Annotated[int, whole(1, 65_536)] = 1
  accumulation: Annotated[int, whole(1, 65_536)] = 1
  too_long: Literal["refuse", "drop"] = "refuse"  # a record longer than a row: an error, or dropped and counted

  def __post_init__(self):
    tokens = self.row_length * self.rows_per_device * self.accumulation
    if tokens > MOST_TOKENS:
      raise InputError(
        f"data.row_length={self.row_length} times data.rows_per_device={self.rows_per_device} times "
        f"data.accumulation={self.accumulation} is {tokens:,} tokens of a device in a step; must be at "
        f"most {MOST_TOKENS:,}"
      )
    if self.cache.startswith(SCHEME):
      raise InputError(f"data.cache={self.cache}: its rows are mapped into memory; give a folder on a local disk")


@checked
class MistakesConfig:
  """Mistakes in solutions: source, number, classes, and the wording of the reason."""

  source: Literal["injected", "recorded", "mined"] = "injected"
  share: Fraction = 0.5  # of solutions with mistakes; with mined=1 of the right solutions that were mined
  max_per_solution: Annotated[int, whole(1, 1_000)] = 2
  classes: Names = ()  # empty: all of the task's, or those for prose where task.name="records"
  reason: Literal["none", "label", "recompute", "paper"] = "recompute"  # "paper": the words of arXiv 2412.16653
  unit: Literal["line", "sentence", "paragraph"] = "line"  # the text unit that is a step
  mined: Fraction = 0.0  # of training transcripts that are mined records; the keys above apply to the others
  mined_path: Path = ""  # records written by `mine`; empty with rounds, which mine during training

  def __post_init__(self):
    if self.mined_path and not self.mined:
      raise InputError(
        f"mistakes.mined_path={self.mined_path!r} would be read by nobody with mistakes.mined=0; give "
        "mistakes.mined a share, or leave the path empty"
      )


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
  """Length of the run, and intervals, in steps, of logging, held-out loss and checkpoints."""

  steps: Steps = 300
  log_every: Steps = 10
  eval_every: Steps = 100
  checkpoint_every: Steps = 100
  keep: Steps = 2  # number of newest checkpoints that are kept
  minutes: Annotated[float, number(0.0, 1e6)] = 0.0  # of a session: saved and stopped (code 42) before it; 0: no limit
  profile_steps: StepRange = ()  # the first and the last step to write a trace of, for xprof; empty: none

  def __post_init__(self):
    if len(self.profile_steps) == 1 or list(self.profile_steps) != sorted(self.profile_steps):
      raise InputError(
        f"train.profile_steps={self.profile_steps}; must be a first and a last step, such as (10, 13), or nothing"
      )
    if self.profile_steps and self.profile_steps[1] > self.steps:
      raise InputError(
        f"train.profile_steps={self.profile_steps} ends after train.steps={self.steps}; give steps of the run"
      )


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
  tensor: Devices = 1

  def __post_init__(self):
    sizes = dataclasses.astuple(self)
    if sizes.count(-1) > 1 or 0 in sizes:
      raise InputError(
        f"mesh sizes must be positive with at most one -1, got data={self.data} fsdp={self.fsdp} tensor={self.tensor}"
      )

  def shape(self, num_devices: int) -> tuple[int, int, int]:
    """Return (data, fsdp, tensor) with the -1 filled in; InputError if they do not multiply to `num_devices`."""
    sizes = dataclasses.astuple(self)
    known = math.prod(size for size in sizes if size > 0)
    filled = tuple(num_devices // known if size == -1 else size for size in sizes)
    if math.prod(filled) != num_devices:
      raise InputError(
        f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor} does not divide "
        f"{num_devices} devices; make the sizes multiply to {num_devices}, or set one to -1"
      )
    return filled


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


@checked
class EvaluateConfig:
  """Amount of evaluation, greedy and at a temperature, and the baselines of the model's corrections.

  Thresholds are chosen on num_problems other problems, for at most `max_false_alarms` per right step.
  """

  num_problems: Problems = 500
  num_probes: Problems = 500  # of injected mistakes
  max_size: Size = 0  # num_problems more problems of sizes above task.max_size up to this one; 0: none
  max_tokens: Annotated[int, whole(1, 1 << 20)] = 512
  batch_size: Annotated[int, whole(1, 65_536)] = 64
  temperature: Temperature = 1.0
  max_false_alarms: FalseAlarms = 0.01  # per right step, greedy; twice as many at the temperature
  votes: Annotated[int, whole(1, 10_000)] = 5  # number of solutions of the majority vote
  redraws: Annotated[int, whole(1, 10_000)] = 2  # maximal number for one step

  def __post_init__(self):
    if not self.temperature:
      raise InputError("evaluate.temperature=0 is greedy, which is measured in any case; give one above 0")
    if self.temperature < SMALLEST_TEMPERATURE:
      raise InputError(f"evaluate.temperature={self.temperature}; must be at least {SMALLEST_TEMPERATURE}")


@checked
class MineConfig:
  """Amount of mining: problems, samples of each, and the model's right solutions kept for each mistake found.

  Length and batch size of the samples are those of the evaluate section.
  """

  num_problems: Problems = 2_000
  samples: Annotated[int, whole(1, 10_000)] = 4
  right: Annotated[float, number(0.0, 1e6)] = 1.0


@checked
class Config:
  """Configuration of an experiment."""

  seed: Seed = 0
  rounds: Rounds = 0  # equal parts of train.steps, with mining of the current weights before each; 0: no mining
  model: ModelConfig
  tokenizer: TokenizerConfig
  task: TaskConfig
  data: DataConfig
  mistakes: MistakesConfig
  loss: LossConfig
  optimizer: OptimizerConfig
  train: TrainConfig
  log: LogConfig
  mesh: MeshConfig
  precision: PrecisionConfig
  lora: LoraConfig
  evaluate: EvaluateConfig
  mine: MineConfig

  def to_json(self) -> str:
    """Return the config as stored in a workdir; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(self), indent=2)


SECTIONS: dict[str, Any] = {
  field.name: field.type for field in dataclasses.fields(Config) if field.name not in ("seed", "rounds")
}


def defaults() -> ml_collections.ConfigDict:
  """Return a ConfigDict with every key and its default, for a config file to change."""
  own = {field.name: field.default for field in dataclasses.fields(Config) if field.name not in SECTIONS}
  sections = {name: _section_defaults(section) for name, section in SECTIONS.items()}
  return ml_collections.ConfigDict(own | sections)


def _section_defaults(section: Any) -> dict[str, Any]:
  return {name: field.default for name, field in section.__pydantic_fields__.items()}

"""Configuration: one frozen dataclass per section, whose fields have type, bounds and default.

A config file changes the ConfigDict that `defaults` returns. `config_build.build` makes a `Config` of it, and checks
conditions across sections.
"""

import dataclasses
import json
import pathlib
from typing import Annotated, Any, Literal

import ml_collections
from pydantic import Field

from insec_jax import config_endpoints
from insec_jax.command import InputError
from insec_jax.config_models import llama31, small_llama  # noqa: F401  config files import them from here
from insec_jax.config_training import (
  LogConfig,
  LoraConfig,
  LossConfig,
  MeshConfig,
  OptimizerConfig,
  PolicyConfig,
  PrecisionConfig,
  TrainConfig,
)
from insec_jax.config_types import (
  Columns,
  Edges,
  Endpoints,
  FalseAlarms,
  Fraction,
  Hint,
  JsonObject,
  Marker,
  Names,
  Path,
  Paths,
  Rivals,
  Temperatures,
  checked,
  number,
  one_of,
  whole,
)
from insec_jax.files.bucket_paths import SCHEME


def _tasks() -> tuple[str, ...]:
  """Return the names of the modules of method/tasks that hold a task, and "records", which has no checker of steps."""
  files = (pathlib.Path(__file__).parent / "method" / "tasks").glob("*.py")
  return (*sorted(file.stem for file in files if "\nTASK = " in file.read_text(encoding="utf-8")), "records")


TASKS = _tasks()
FROM_FILE = ("gsm8k", "records")  # tasks whose problems are records of data.path
SMALLEST_TEMPERATURE = 0.001  # for sampling
MOST_PROBLEMS = 1_000_000  # generated problems: all are kept in memory
MOST_TOKENS = 1 << 28  # of a device in one step
Seed = Annotated[int, whole(0, 2**32 - 1)]  # the range that jax, numpy and grain share
Rounds = Annotated[int, whole(0, 1_000_000)]
Problems = Annotated[int, whole(1, MOST_PROBLEMS)]
Size = Annotated[int, whole(0, 1_000)]  # operations of a problem
Temperature = Annotated[float, number(0.0, 1_000.0)]


@checked
class ModelConfig:
  """Source of the weights: an HF folder, a hub id, or `size` (fields of a config.json) for random weights."""

  path: Path = ""
  size: JsonObject | None = Field(
    default=None, description="None, or a dict of the fields of a config.json, as JSON has them"
  )
  # The backward pass keeps: all, products, those of attention, only the stream, or only that, and on the host.
  remat: Literal["none", "matmuls", "attention", "full", "offload"] = "full"

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
  to_mine: Fraction = 0.0  # of the prompts of path, by their hash: mined and not trained on; 0: those trained on are
  cache: Path = ""  # folder for rows of records, which are made once and then mapped into memory; empty: kept in memory
  num_records: Annotated[int, whole(0, 10_000_000)] = 0
  num_heldout: Annotated[int, whole(0, 10_000_000)] = 0
  template: Literal["plain", "chat"] = "plain"  # "chat": the tokenizer's own
  marker_text: Literal["refuse", "plain"] = "refuse"  # a marker inside user text: "plain" encodes it as characters
  row_length: Annotated[int, whole(2, 1 << 20)] = 2_048
  rows_per_device: Annotated[int, whole(1, 65_536)] = 1  # of the devices of mesh.sequence, which share rows
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
  rewind: bool = False  # what follows a correction does not read its mistake (method/rewind.py)
  mined: Fraction = 0.0  # of training transcripts that are mined records; the keys above apply to the others
  mined_path: Path = ""  # records written by `mine`; empty with rounds, which mine during training
  mined_from: Literal["own", "next_seed"] = "own"  # base that `sweep` mines: of this seed, or of the next of --seeds
  view: Literal["full", "dagger", "silent", "shuffled", "right"] = "full"  # of mined records (data/views.py)
  hinted: Fraction = 0.0  # of transcripts with mistakes: a hint about the first one ends the prompt (method/hints.py)
  hint: Hint = "{wrong}{reason}\n{right}"  # the wrong step, what is wrong, and the right step, which end in newlines

  def __post_init__(self):
    for name, default in (("mined_from", "own"), ("view", "full")):
      if getattr(self, name) != default and not self.mined:
        raise InputError(
          f"mistakes.{name}={getattr(self, name)!r} is about mined records, and mistakes.mined=0 uses none; give "
          f"mistakes.mined a share, or set mistakes.{name}={default!r}"
        )
    if self.hinted and self.view != "full":
      raise InputError(
        f"mistakes.hinted={self.hinted} names mistake, reason and correction of a record, and mistakes.view="
        f"{self.view!r} drops some of these; set mistakes.hinted=0, or mistakes.view='full'"
      )
    if self.mined_path and not self.mined:
      raise InputError(
        f"mistakes.mined_path={self.mined_path!r} would be read by nobody with mistakes.mined=0; give "
        "mistakes.mined a share, or leave the path empty"
      )


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
  endpoints: Endpoints = ()  # what the study is about, named before its first run (config_endpoints.py)
  rivals: Rivals = ()  # further baselines of the corrections (evaluation/rivals.py)
  temperatures: Temperatures = (0.3, 0.6, 1.0)  # of which the rival "temperature" takes the best on validation problems
  swapped_path: Path = ""  # results.json with the mistakes that the rival "swapped" continues from; empty: its own

  def __post_init__(self):
    for endpoint in map(config_endpoints.parse, self.endpoints):
      if not self.max_size and any(config_endpoints.LARGER in measure.source for measure in endpoint.measures):
        raise InputError(
          f"evaluate.endpoints has {endpoint.text!r}, and evaluate.max_size=0 solves no larger problems; give a size"
        )
    if not self.temperature:
      raise InputError("evaluate.temperature=0 is greedy, which is measured in any case; give one above 0")
    if self.temperature < SMALLEST_TEMPERATURE:
      raise InputError(f"evaluate.temperature={self.temperature}; must be at least {SMALLEST_TEMPERATURE}")
    if self.swapped_path and "swapped" not in self.rivals:
      raise InputError(
        f"evaluate.swapped_path={self.swapped_path!r} would be read by nobody without 'swapped' in evaluate.rivals; "
        "add it, or leave the path empty"
      )


@checked
class MineConfig:
  """Amount of mining: problems, samples of each, and the model's right solutions kept for each mistake found.

  With `flags` the model may flag while it is mined, as it was trained to, and its failed corrections, false alarms and
  forgotten steps become records too.

  Length and batch size of the samples are those of the evaluate section. With policy.method only `num_problems` of a
  round and `samples` of each are read, and with "distill" `right`.
  """

  num_problems: Problems = 2_000
  samples: Annotated[int, whole(1, 10_000)] = 4
  right: Annotated[float, number(0.0, 1e6)] = 1.0
  flags: bool = False


@checked
class Config:
  """Configuration of an experiment."""

  seed: Seed = 0
  rounds: Rounds = 0  # equal parts of train.steps; before each the current weights are mined, or sampled (policy)
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
  policy: PolicyConfig

  @property
  def freezes(self) -> bool:
    """Whether some weights are frozen: with LoRA all, with train.top_layers those below these."""
    return self.lora.rank > 0 or self.train.top_layers > 0

  @property
  def reads_records(self) -> bool:
    """Whether the transcripts are records of data.path; if not, the task makes them."""
    return self.task.name in FROM_FILE or self.mistakes.source != "injected"

  @property
  def negatives(self) -> float:
    """Weight of unlikelihood on negatives in training: tokens that repeat a mistake, or flags after right steps."""
    return self.policy.no_flag if self.policy.distills else self.loss.repeat

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

"""Configuration: one frozen dataclass per section, whose fields have type, bounds and default.

Types and bounds are checked from the annotations (pydantic, strict) when a section is made; `build` also checks
conditions across sections. A config file returns a ConfigDict of plain values; functions other than `build` and its
helpers take sections or plain values.
"""

import dataclasses
import difflib
import functools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, dataclass_transform, get_args

import ml_collections
import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo

from insec_jax.command import InputError
from insec_jax.files.reading import local_path, parse_json


def _tasks() -> tuple[str, ...]:
  """Return the names of the modules of method/tasks that hold a task, and "records", which has no checker of steps."""
  files = (pathlib.Path(__file__).parent / "method" / "tasks").glob("*.py")
  return (*sorted(file.stem for file in files if "\nTASK = " in file.read_text(encoding="utf-8")), "records")


TASKS = _tasks()
FROM_FILE = ("gsm8k", "records")  # tasks whose problems are records of data.path

# Types of fields. The description completes "must be ..." in the error for a wrong value.


def _whole(low: int, high: int) -> Any:
  return Annotated[int, Field(ge=low, le=high, description=(f"a whole number of at least {low} and at most {high:,}"))]


def _number(low: float, high: float) -> Any:
  return Annotated[float, Field(ge=low, le=high, description=(f"a number of at least {low:g} and at most {high:,.7g}"))]


def _weight(value: float) -> float:
  if value and abs(value) < SMALLEST_WEIGHT:  # float32 must not round it to 0
    raise ValueError
  return value


def _path(text: str, info: ValidationInfo) -> str:
  return str(local_path(text, info.field_name)) if text else text


def _printable(text: str) -> str:
  if not text.isprintable():
    raise ValueError
  return text


def _json_object(size: dict) -> dict:
  try:
    same = json.loads(json.dumps(size, allow_nan=False)) == size
  except (TypeError, ValueError, RecursionError):
    same = False
  if not same:
    raise ValueError
  return size


def _tuple(values: Any) -> Any:
  return tuple(values) if isinstance(values, list) else values  # JSON has no tuples


SMALLEST_TEMPERATURE = 0.001  # for sampling
LARGEST = 2**31 - 1  # of counts that are int32 on a device
SMALLEST_WEIGHT = 1e-30
Seed = _whole(0, 2**32 - 1)  # the range that jax, numpy and grain share
Rounds = _whole(0, 1_000_000)
Steps = _whole(1, LARGEST)
MOST_PROBLEMS = 1_000_000  # generated problems: all are kept in memory
Problems = _whole(1, MOST_PROBLEMS)
Size = _whole(0, 1_000)  # operations of a problem
Fraction = Annotated[float, Field(ge=0, le=1, description="a number between 0 and 1")]
Temperature = _number(0.0, 1_000.0)
# float32 rounds values nearer to 1 to 1, and AdamW divides by 1 - b**t.
Moment = Annotated[float, Field(ge=0, le=0.999_999, description="below 1 by 0.000001 or more, and at least 0")]
FalseAlarms = Annotated[
  float,
  Field(
    ge=0,
    lt=0.5,
    description=(
      "below 0.5 and at least 0: a share of right steps, of which twice as many are allowed at the temperature"
    ),
  ),
]
Devices = _whole(-1, 1 << 20)
Weight = Annotated[
  float,
  AfterValidator(_weight),
  Field(
    ge=-10_000,
    le=10_000,
    description=(f"a number from -10,000 to 10,000, and 0 or at least {SMALLEST_WEIGHT:g} in size"),
  ),
]
Path = Annotated[str, AfterValidator(_path)]
Marker = Annotated[
  str, AfterValidator(_printable), Field(max_length=200, description=("a text of at most 200 printable characters"))
]
Edges = Annotated[
  tuple[Annotated[float, Field(gt=0, le=10_000)], ...],
  BeforeValidator(_tuple),
  Field(max_length=64, description="at most 64 scores above 0 that ascend, or nothing"),
]
Names = Annotated[
  tuple[Annotated[str, AfterValidator(_printable), Field(min_length=1)], ...],
  BeforeValidator(_tuple),
  Field(max_length=64, description="a tuple of at most 64 names"),
]
Dtype = Literal["float32", "bfloat16"]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _checked(cls: type) -> type:
  """Return `cls` as a frozen dataclass that raises InputError for a value outside the type or bounds of its field."""
  section = cls.__name__.removesuffix("Config").lower()
  made = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config={"strict": True})
  unchecked = made.__init__

  @functools.wraps(unchecked)
  def __init__(self, **values):  # noqa: N807
    try:
      unchecked(self, **values)
    except ValidationError as error:
      raise InputError(_refusal(section, made, error)) from None

  made.__init__ = __init__
  return made


def _refusal(section: str, cls: type, error: ValidationError) -> str:
  """Return one line about the first wrong value."""
  first = error.errors(include_url=False)[0]
  cause = first.get("ctx", {}).get("error")
  if not first["loc"]:  # from __post_init__
    return str(cause or first["msg"])
  where = ".".join((*((section,) if section else ()), *map(str, first["loc"])))
  if isinstance(cause, InputError):
    return f"{section}.{cause}"
  field = cls.__pydantic_fields__[first["loc"][0]]
  if first["type"] == "literal_error":
    needed = f"one of {', '.join(map(repr, get_args(field.annotation)))}"
  else:
    needed = field.description or first["msg"].removeprefix("Input should be ")
  return f"{where}={shown(first['input'])}; must be {needed}"


def shown(value: Any) -> str:
  """Return the repr of the value, shortened to a part of a line."""
  try:
    text = repr(value)
  except Exception:  # an integer of more than 4,300 digits, a recursive value
    text = f"({type(value).__name__})"
  return text if len(text) <= 100 else f"{text[:90]}..."


@_checked
class ModelConfig:
  """Source of the weights: an HF folder, or `size` (fields of a config.json) for random weights."""

  path: Path = ""
  size: Annotated[dict[str, Any], AfterValidator(_json_object)] | None = Field(
    default=None, description="None, or a dict of the fields of a config.json, as JSON has them"
  )
  remat: Literal["none", "matmuls", "full"] = "full"  # the backward pass keeps: all, products, or only the stream

  def __post_init__(self):
    if bool(self.path) == bool(self.size):
      raise InputError("give either model.path (an HF folder) or model.size (config.json fields), not both or neither")


@_checked
class TokenizerConfig:
  """Tokenizer folder (empty: the model's own, or one built from the task's symbols) and the two markers.

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


@_checked
class TaskConfig:
  """Kind and size of problems: `min_size` to `max_size` operations, numbers modulo `modulus` (0: plain integers).

  "gsm8k" and "records" read data.path and use none of these sizes: all must be 0.
  """

  name: Literal[TASKS] = "records"
  min_size: Size = 0
  max_size: Size = 0
  modulus: _whole(0, 1_000) = 0
  unneeded: Size = 0  # graph: maximal number of quantities that the answer does not depend on

  def __post_init__(self):
    if self.min_size > self.max_size:
      raise InputError(f"task.min_size={self.min_size} is above task.max_size={self.max_size}")


MOST_TOKENS = 1 << 28  # of a device in one step


@_checked
class DataConfig:
  """Records and rows; `num_records` is the number of problems to generate, or of records to read at most (0: all)."""

  path: Path = ""
  num_records: _whole(0, 10_000_000) = 0
  num_heldout: _whole(0, 10_000_000) = 0
  template: Literal["plain", "chat"] = "plain"  # "chat": the tokenizer's own
  marker_text: Literal["refuse", "plain"] = "refuse"  # a marker inside user text: "plain" encodes it as characters
  row_length: _whole(2, 1 << 20) = 2_048
  rows_per_device: _whole(1, 65_536) = 1
  accumulation: _whole(1, 65_536) = 1
  too_long: Literal["refuse", "drop"] = "refuse"  # a record longer than a row: an error, or dropped and counted

  def __post_init__(self):
    tokens = self.row_length * self.rows_per_device * self.accumulation
    if tokens > MOST_TOKENS:
      raise InputError(
        f"data.row_length={self.row_length} times data.rows_per_device={self.rows_per_device} times "
        f"data.accumulation={self.accumulation} is {tokens:,} tokens of a device in a step; must be at "
        f"most {MOST_TOKENS:,}"
      )


@_checked
class MistakesConfig:
  """Mistakes in solutions: source, number, place, classes, and the wording of the reason."""

  source: Literal["injected", "recorded", "mined"] = "injected"
  share: Fraction = 0.5  # of solutions with mistakes; with mined=1 of the right solutions that were mined
  max_per_solution: _whole(1, 1_000) = 2
  place: Literal["anywhere", "first_half", "last_half"] = "anywhere"  # of the solution
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


@_checked
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


@_checked
class OptimizerConfig:
  """AdamW: linear warm-up to `learning_rate`, then cosine down to `final_share` of it at train.steps."""

  learning_rate: _number(1e-30, 1_000.0) = 1e-5
  final_share: Fraction = 0.1
  warmup_steps: _whole(0, LARGEST) = 20
  weight_decay: _number(0.0, 1_000.0) = 0.0
  b1: Moment = 0.9
  b2: Moment = 0.95
  eps: _number(1e-30, 1.0) = 1e-8  # a smaller one gives 0 / 0 in float32 where the gradient is 0
  clip_norm: _number(1e-9, 1e9) = 1.0  # global norm of the gradient


@_checked
class TrainConfig:
  """Length of the run, and intervals, in steps, of logging, held-out loss and checkpoints.

  The newest `keep` checkpoints are kept, and those of every `keep_every`-th step (0: of none).
  """

  steps: Steps = 300
  log_every: Steps = 10
  eval_every: Steps = 100
  checkpoint_every: Steps = 100
  keep: Steps = 2
  keep_every: _whole(0, LARGEST) = 0


@_checked
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


@_checked
class PrecisionConfig:
  """Dtype of the parameters, and of the matrix products; both moments of AdamW are always float32."""

  params: Dtype = "float32"
  compute: Dtype = "bfloat16"


@_checked
class EvaluateConfig:
  """Amount of evaluation, greedy and at a temperature, and the baselines of the model's corrections.

  Thresholds are chosen on num_problems other problems, for at most `max_false_alarms` per right step.
  """

  num_problems: Problems = 500
  num_probes: Problems = 500  # of injected mistakes
  max_size: Size = 0  # num_problems more problems of sizes above task.max_size up to this one; 0: none
  max_tokens: _whole(1, 1 << 20) = 512
  batch_size: _whole(1, 65_536) = 64
  within: _whole(1, 1_000_000) = 2  # delay, in steps, within which a flag counts
  temperature: Temperature = 1.0
  max_false_alarms: FalseAlarms = 0.01  # per right step, greedy; twice as many at the temperature
  votes: _whole(1, 10_000) = 5  # number of solutions of the majority vote
  redraws: _whole(1, 10_000) = 2  # maximal number for one step

  def __post_init__(self):
    if not self.temperature:
      raise InputError("evaluate.temperature=0 is greedy, which is measured in any case; give one above 0")
    if self.temperature < SMALLEST_TEMPERATURE:
      raise InputError(f"evaluate.temperature={self.temperature}; must be at least {SMALLEST_TEMPERATURE}")


@_checked
class MineConfig:
  """Amount of mining: problems, samples of each, and the model's right solutions kept for each mistake found.

  Length and batch size of the samples are those of the evaluate section.
  """

  num_problems: Problems = 2_000
  samples: _whole(1, 10_000) = 4
  temperature: Temperature = 1.0  # 0: greedy
  right: _number(0.0, 1e6) = 1.0

  def __post_init__(self):
    if 0 < self.temperature < SMALLEST_TEMPERATURE:
      raise InputError(f"mine.temperature={self.temperature}; must be 0 (greedy) or at least {SMALLEST_TEMPERATURE}")
    if not self.temperature and self.samples > 1:
      raise InputError(
        f"mine.samples={self.samples} at mine.temperature=0 would all be the same; raise the "
        "temperature or take one sample"
      )


@_checked
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
  mesh: MeshConfig
  precision: PrecisionConfig
  evaluate: EvaluateConfig
  mine: MineConfig

  def to_json(self) -> str:
    """Return the config as stored in a workdir; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(self), indent=2)


SECTIONS = {field.name: field.type for field in dataclasses.fields(Config) if field.name not in ("seed", "rounds")}
# Keys that older config files and workdirs lack; the default of each means "as before".
NEWER = ("data.too_long",)


def defaults() -> ml_collections.ConfigDict:
  """Return a ConfigDict with every key and its default, for a config file to change."""
  own = {field.name: field.default for field in dataclasses.fields(Config) if field.name not in SECTIONS}
  sections = {name: _section_defaults(section) for name, section in SECTIONS.items()}
  return ml_collections.ConfigDict(own | sections)


def llama31(*, width: int, mlp_width: int, num_layers: int, num_heads: int) -> dict[str, Any]:
  """Return `model.size` of a Llama 3.1 of this shape: the fields of its config.json, the others as in the 8B."""
  scaling = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
  )
  sizes = dict(
    hidden_size=width,
    intermediate_size=mlp_width,
    num_hidden_layers=num_layers,
    num_attention_heads=num_heads,
    num_key_value_heads=8,
    vocab_size=128_256,
    max_position_embeddings=131_072,
  )
  others = dict(rms_norm_eps=1e-5, rope_theta=500_000.0, initializer_range=0.02, tie_word_embeddings=False)
  return dict(model_type="llama", hidden_act="silu", **sizes, **others, rope_scaling=scaling)


def small_llama(*, num_layers: int) -> dict[str, Any]:
  """Return `model.size` of a Llama of width 128 for experiments on a CPU, with the vocabulary of the tokenizer."""
  size = llama31(width=128, mlp_width=352, num_layers=num_layers, num_heads=4)
  del size["rope_scaling"]
  small = dict(vocab_size=None, max_position_embeddings=512, rope_theta=10_000.0, initializer_range=0.05)
  return size | dict(num_key_value_heads=2) | small


def _section_defaults(section: type) -> dict[str, Any]:
  return {name: field.default for name, field in section.__pydantic_fields__.items()}


def with_newer_keys(values: dict[str, Any]) -> dict[str, Any]:
  """Return the values of a config.json with missing newer keys added."""
  values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
  for section, key, default in newer_keys(values):
    values[section][key] = default
  return values


def newer_keys(values: Any) -> Iterator[tuple[str, str, Any]]:
  """Yield (section, key, default) for each newer key that these values lack."""
  for name in NEWER:
    section, key = name.split(".")
    held = values.get(section)
    if isinstance(held, dict | ml_collections.ConfigDict) and key not in held:
      yield section, key, _section_defaults(SECTIONS[section])[key]


def _check_keys(where: str, seen: set, needed: set[str]) -> None:
  for key in sorted(seen - needed, key=str):
    close = difflib.get_close_matches(str(key), needed, n=1)
    raise InputError(f"config has no key {where}{key}" + (f"; did you mean {where}{close[0]}?" if close else ""))
  if missing := sorted(needed - seen):
    raise InputError(f"config misses {where}{missing[0]}; every key is given a value in the config file")


def plain_values(config: ml_collections.ConfigDict | dict) -> dict[str, Any]:
  """Return the values as dicts, newer keys filled in; InputError for a missing or unknown section or key."""
  try:
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
  except Exception as error:  # a placeholder without a value, a reference to itself
    raise InputError(f"config cannot be read as plain values: {error}") from None
  if not isinstance(values, dict):
    raise InputError(f"the config is {shown(values)}; must be a ConfigDict")
  _check_keys("", set(values), {field.name for field in dataclasses.fields(Config)})
  for name in SECTIONS:
    if not isinstance(values[name], dict):
      raise InputError(f"config section {name} must be a dict of values, got {shown(values[name])}")
  values = with_newer_keys(values)
  for name, section in SECTIONS.items():
    _check_keys(f"{name}.", set(values[name]), {field.name for field in dataclasses.fields(section)})
  return values


def build(config: ml_collections.ConfigDict | dict, *, mined_path: str = "") -> Config:
  """Return the checked config.

  `mined_path` is the file of mined records where the config uses some and gives no path. Raises InputError for a
  missing or unknown key, a wrong value, or sections that contradict each other.
  """
  values = plain_values(config)
  sections = {name: section(**values[name]) for name, section in SECTIONS.items()}
  mistakes = sections["mistakes"]
  if mined_path and mistakes.mined and not mistakes.mined_path and not values["rounds"]:
    sections["mistakes"] = dataclasses.replace(mistakes, mined_path=mined_path)
  built = Config(seed=values["seed"], rounds=values["rounds"], **sections)
  _check_across(built)
  return built


def from_json(text: str) -> Config:
  """Return the config that `Config.to_json` wrote; InputError as in `build`, or if the text is not JSON."""
  return build(parse_json(text, "the config"))


def _check_across(config: Config) -> None:
  from_file = config.task.name in FROM_FILE
  if from_file and not config.data.path:
    raise InputError(f"task.name={config.task.name!r} reads records from a file; give --config.data.path=FILE.jsonl")
  if not from_file and (config.task.min_size < 1 or config.data.num_records < 1):
    raise InputError(
      f"task.name={config.task.name!r} makes its problems; task.min_size and data.num_records must be at least 1"
    )
  if not from_file and (most := max(config.data.num_records, config.data.num_heldout)) > MOST_PROBLEMS:
    raise InputError(
      f"data.num_records={config.data.num_records} or data.num_heldout={config.data.num_heldout}: "
      f"task.name={config.task.name!r} would make {most:,} problems; must be at most {MOST_PROBLEMS:,}"
    )
  if config.evaluate.max_size and from_file:
    raise InputError(
      f"evaluate.max_size={config.evaluate.max_size}: records of task.name={config.task.name!r} have no "
      "sizes; set it to 0"
    )
  if 0 < config.evaluate.max_size <= config.task.max_size:
    raise InputError(
      f"evaluate.max_size={config.evaluate.max_size} is for problems larger than any trained on; must "
      f"be above task.max_size={config.task.max_size}, or 0 for none"
    )
  if config.mistakes.source == "mined" and not config.data.path:
    raise InputError("mistakes.source='mined' reads records that mine wrote; give --config.data.path=FILE.jsonl")
  _check_mined(config)
  _check_confidence(config)
  if config.optimizer.warmup_steps > config.train.steps:
    raise InputError(
      f"optimizer.warmup_steps={config.optimizer.warmup_steps} is above train.steps={config.train.steps}; lower it"
    )
  if not any(config.loss.weight_R):
    raise InputError("every loss weight is 0: nothing would be trained; give one role a weight")


def _check_mined(config: Config) -> None:
  mistakes = config.mistakes
  if not config.rounds:
    if mistakes.mined and not mistakes.mined_path:
      raise InputError(
        f"mistakes.mined={mistakes.mined} mixes in records that mine wrote; give "
        "--config.mistakes.mined_path=FILE.jsonl, or --config.rounds=R to mine while training"
      )
  elif mistakes.mined_path:
    raise InputError(
      f"rounds={config.rounds} mines what it trains on; leave mistakes.mined_path="
      f"{mistakes.mined_path!r} empty, or set rounds=0"
    )
  elif not mistakes.mined:
    raise InputError(
      f"rounds={config.rounds} with mistakes.mined=0 would mine records that nobody reads; give "
      "mistakes.mined a share, or set rounds=0"
    )
  elif config.rounds > config.train.steps:
    raise InputError(f"rounds={config.rounds} is above train.steps={config.train.steps}; lower it")
  elif config.task.name == "records":
    raise InputError("rounds needs a task that checks steps, and task.name='records' has no checker; set rounds=0")


def _check_confidence(config: Config) -> None:
  """Raise InputError unless all training transcripts have confidence tokens: no step should be without them."""
  if not config.tokenizer.confidence:
    return
  if config.mistakes.unit != "line":
    raise InputError(
      f"tokenizer.confidence is written after lines, and mistakes.unit={config.mistakes.unit!r}; "
      "set mistakes.unit='line'"
    )
  if config.mistakes.source == "injected" and config.mistakes.mined < 1:
    raise InputError(
      f"tokenizer.confidence needs transcripts that say how sure the model was, which mine writes, and "
      f"mistakes.mined={config.mistakes.mined} leaves others; set mistakes.mined=1"
    )
  if config.mistakes.source == "injected" and config.data.num_heldout:
    raise InputError(
      f"tokenizer.confidence: data.num_heldout={config.data.num_heldout} transcripts would be made "
      "without the model's confidence, and a loss on them means nothing; set data.num_heldout=0"
    )

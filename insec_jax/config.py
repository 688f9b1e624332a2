"""The configuration: one frozen dataclass a section, no defaults; `build` checks what spans sections.

A config file returns a ConfigDict of plain values; below `build` nobody sees a ConfigDict.
"""

import dataclasses
import difflib
import json
import math
import pathlib
from typing import Any

import ml_collections

from insec_jax.command import InputError


def _tasks() -> tuple[str, ...]:
  """The modules of method/tasks that hold a task, and "records", which checks no step."""
  files = (pathlib.Path(__file__).parent / "method" / "tasks").glob("*.py")
  return (*sorted(file.stem for file in files if "\nTASK = " in file.read_text(encoding="utf-8")), "records")


TASKS = _tasks()


def _one_of(section: str, key: str, value: Any, allowed: tuple) -> None:
  if value not in allowed:
    raise InputError(f"{section}.{key}={value!r}; must be one of {', '.join(map(repr, allowed))}")


def _at_least(section: str, config: Any, least: float, *keys: str) -> None:
  for key in keys:
    value = getattr(config, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
      raise InputError(f"{section}.{key}={value!r}; must be a number of at least {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Where the weights come from: an HF folder, or `size` (config.json's own fields) for random ones."""

  path: str
  size: dict | None
  remat: str  # what the backward pass keeps: "none" keeps all, "full" only the stream between layers

  def __post_init__(self):
    if bool(self.path) == bool(self.size):
      raise InputError("give either model.path (an HF folder) or model.size (config.json fields), not both or neither")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """The tokenizer's folder (empty: the model's own, or built from the task's symbols) and the two markers.

  A marker that the tokenizer already has as a special token resizes nothing; `special=False` leaves both plain words.
  """

  path: str
  flag: str
  fix: str
  special: bool
  confidence: tuple[float, ...]  # scores that part the tokens of confidence written after each step; empty: none is
  confidence_first: tuple[float, ...]  # of its first token, told apart from the others; empty: it is not told

  @property
  def confidence_names(self) -> tuple[str, ...]:
    """The text of each token of confidence, the surest first: one for each bin, or none."""
    num = (len(self.confidence) + 1) * (len(self.confidence_first) + 1) if self.confidence else 0
    return tuple(f"<|sure_{number}|>" for number in range(num))

  def __post_init__(self):
    for name in ("confidence", "confidence_first"):
      edges = tuple(getattr(self, name))
      object.__setattr__(self, name, edges)
      if list(edges) != sorted(set(edges)) or min(edges, default=1) <= 0:
        raise InputError(f"tokenizer.{name}={edges}; must be scores above 0 that ascend, or nothing")
    if self.confidence_first and not self.confidence:
      raise InputError(f"tokenizer.confidence_first={self.confidence_first} parts tokens that tokenizer.confidence=() "
                       "does not have; give both, or neither")
    if self.confidence and not self.special:
      raise InputError("tokenizer.confidence adds special tokens, and tokenizer.special=False wants none; change one")
    if not self.flag or not self.fix or self.flag in self.fix or self.fix in self.flag:
      raise InputError(f"tokenizer.flag={self.flag!r} and tokenizer.fix={self.fix!r} must be two texts, "
                       "neither inside the other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
  """Which problems, and how large: `min_size` to `max_size` operations, numbers modulo `modulus` (0: plain integers).

  "gsm8k" and "records" read data.path and take none of these: all 0.
  """

  name: str
  min_size: int
  max_size: int
  modulus: int
  unneeded: int  # graph: up to so many quantities that the asked one does not need; 0: a chain where all are needed

  def __post_init__(self):
    _one_of("task", "name", self.name, TASKS)
    _at_least("task", self, 0, "min_size", "max_size", "modulus", "unneeded")
    if self.min_size > self.max_size:
      raise InputError(f"task.min_size={self.min_size} is above task.max_size={self.max_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Records and rows. `num_records` is how many problems to make, or, with a file, the most to read (0: all)."""

  path: str
  num_records: int
  num_heldout: int
  template: str  # "plain", or "chat" for the tokenizer's own
  marker_text: str  # a marker inside user text: "refuse" it, or encode it as "plain" characters
  row_length: int
  rows_per_device: int
  accumulation: int

  def __post_init__(self):
    _one_of("data", "template", self.template, ("plain", "chat"))
    _one_of("data", "marker_text", self.marker_text, ("refuse", "plain"))
    _at_least("data", self, 0, "num_records", "num_heldout")
    _at_least("data", self, 1, "rows_per_device", "accumulation")
    _at_least("data", self, 2, "row_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistakesConfig:
  """Which solutions carry mistakes, how many, where, of which classes, and how the reason is worded."""

  source: str  # "injected", "recorded" or "mined"
  share: float  # of solutions; with mined=1 of the right ones that are mined
  max_per_solution: int
  place: str  # "anywhere", "first_half" or "last_half" of the solution
  classes: tuple[str, ...]  # empty: all of the task's, or those for prose where task.name="records"
  reason: str  # "none", "label", "recompute", or "paper": the words of arXiv 2412.16653
  unit: str  # a step is a "line", a "sentence" or a "paragraph"
  mined: float  # share of the transcripts trained on that are mined records, beside those that the keys above make
  mined_path: str  # the records that `mine` wrote; empty with rounds, which mine while training

  def __post_init__(self):
    object.__setattr__(self, "classes", tuple(self.classes))
    _one_of("mistakes", "source", self.source, ("injected", "recorded", "mined"))
    _one_of("mistakes", "place", self.place, ("anywhere", "first_half", "last_half"))
    _one_of("mistakes", "reason", self.reason, ("none", "label", "recompute", "paper"))
    _one_of("mistakes", "unit", self.unit, ("line", "sentence", "paragraph"))
    _at_least("mistakes", self, 0, "share", "mined")
    _at_least("mistakes", self, 1, "max_per_solution")
    if self.share > 1:
      raise InputError(f"mistakes.share={self.share} is a share of solutions; must be between 0 and 1")
    if self.mined > 1:
      raise InputError(f"mistakes.mined={self.mined} is a share of transcripts; must be between 0 and 1")
    if self.mined_path and not self.mined:
      raise InputError(f"mistakes.mined_path={self.mined_path!r} would be read by nobody with mistakes.mined=0; give "
                       "mistakes.mined a share, or leave the path empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """Worth of one token of each role, and of the end-of-text token; 0 masks, negative is unlikelihood.

  `repeat` is the size of unlikelihood on the token with which a correction would begin to repeat its mistake; 0: none.
  """

  prompt: float
  text: float
  mistake: float
  flag: float
  reason: float
  correction: float
  end: float
  repeat: float

  def __post_init__(self):
    _at_least("loss", self, -math.inf, *(field.name for field in dataclasses.fields(self)))
    if not self.end > 0:
      raise InputError(f"loss.end={self.end}; a model that never learns to stop is useless: give a positive weight")
    _at_least("loss", self, 0, "repeat")

  @property
  def weight_R(self) -> tuple[float, ...]:
    """Weight of each role, in the order of the fields above, which is that of method.roles.NAMES."""
    return (self.prompt, self.text, self.mistake, self.flag, self.reason, self.correction)

  @property
  def rivals(self) -> bool:
    """Whether anything is done about repeated mistakes; if not, the train step knows nothing of them."""
    return self.repeat > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW: linear warm-up to `learning_rate`, then cosine down to `final_share` of it at train.steps."""

  learning_rate: float
  final_share: float
  warmup_steps: int
  weight_decay: float
  b1: float
  b2: float
  eps: float
  clip_norm: float  # of the whole gradient

  def __post_init__(self):
    _at_least("optimizer", self, 0, *(field.name for field in dataclasses.fields(self)))
    if self.learning_rate == 0 or self.clip_norm == 0 or self.eps == 0:
      raise InputError("optimizer.learning_rate, clip_norm and eps must be positive")
    if max(self.b1, self.b2) >= 1 or self.final_share > 1:
      raise InputError(f"optimizer.b1={self.b1} and b2={self.b2} must be below 1, "
                       f"final_share={self.final_share} at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Length of the run, and how often it logs, measures held-out loss and saves.

  The newest `keep` checkpoints stay, and those of every `keep_every`-th step (0: of none).
  """

  steps: int
  log_every: int
  eval_every: int
  checkpoint_every: int
  keep: int
  keep_every: int

  def __post_init__(self):
    _at_least("train", self, 1, "steps", "log_every", "eval_every", "checkpoint_every", "keep")
    _at_least("train", self, 0, "keep_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Number of devices along each mesh axis; -1, at most once, takes the devices that remain."""

  data: int
  fsdp: int
  tensor: int

  def __post_init__(self):
    sizes = dataclasses.astuple(self)
    if sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes:
      raise InputError(f"mesh sizes must be positive with at most one -1, got data={self.data} fsdp={self.fsdp} "
                       f"tensor={self.tensor}")

  def shape(self, num_devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) with the -1 filled in; InputError if they do not multiply to `num_devices`."""
    sizes = dataclasses.astuple(self)
    known = math.prod(size for size in sizes if size > 0)
    filled = tuple(num_devices // known if size == -1 else size for size in sizes)
    if math.prod(filled) != num_devices:
      raise InputError(f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor} does not divide "
                       f"{num_devices} devices; make the sizes multiply to {num_devices}, or set one to -1")
    return filled


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
  """Dtype of the parameters, and of the matrix products; both moments of AdamW are float32 in any case."""

  params: str
  compute: str

  def __post_init__(self):
    _one_of("precision", "params", self.params, ("float32", "bfloat16"))
    _one_of("precision", "compute", self.compute, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
  """How much is measured, greedily and at a temperature, and what the model's corrections are held against.

  Thresholds are chosen on num_problems other problems, for at most `max_false_alarms` per right step.
  """

  num_problems: int
  num_probes: int  # of injected mistakes
  max_size: int  # as many problems of the sizes above task.max_size, up to this one, are solved too; 0: none
  max_tokens: int
  batch_size: int
  within: int  # steps by which a flag may be late
  temperature: float
  max_false_alarms: float  # per right step, greedy; twice as many at the temperature
  votes: int  # solutions that a majority is taken of
  redraws: int  # of one step, at most

  def __post_init__(self):
    _at_least("evaluate", self, 1, "num_problems", "num_probes", "max_tokens", "batch_size", "within", "votes",
              "redraws")
    _at_least("evaluate", self, 0, "max_size", "temperature", "max_false_alarms")
    if not self.temperature:
      raise InputError("evaluate.temperature=0 is greedy, which is measured in any case; give one above 0")
    if self.max_false_alarms >= 0.5:
      raise InputError(f"evaluate.max_false_alarms={self.max_false_alarms} is a share of right steps, and twice as "
                       "many are allowed at the temperature; must be below 0.5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MineConfig:
  """How much is mined: problems, samples of each, and own right solutions kept for each mistake found.

  Samples are as long, and as many at once, as the evaluate section says.
  """

  num_problems: int
  samples: int
  temperature: float
  right: float

  def __post_init__(self):
    _at_least("mine", self, 1, "num_problems", "samples")
    _at_least("mine", self, 0, "temperature", "right")
    if not self.temperature and self.samples > 1:
      raise InputError(f"mine.samples={self.samples} at mine.temperature=0 would all be the same; raise the "
                       "temperature or take one sample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A whole experiment."""

  seed: int
  rounds: int  # equal parts of train.steps, before each of which the weights mine their own mistakes; 0: never
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
    """The config as stored in a workdir; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(self), indent=2)


SECTIONS = {field.name: field.type for field in dataclasses.fields(Config) if field.name not in ("seed", "rounds")}


def _check_keys(where: str, seen: set[str], needed: set[str]) -> None:
  for key in sorted(seen - needed):
    close = difflib.get_close_matches(key, needed, n=1)
    raise InputError(f"config has no key {where}{key}" + (f"; did you mean {where}{close[0]}?" if close else ""))
  if missing := sorted(needed - seen):
    raise InputError(f"config misses {where}{missing[0]}; every key is given a value in the config file")


def build(config: ml_collections.ConfigDict | dict) -> Config:
  """The checked config; InputError for a missing or stray key, a bad value, or sections that contradict each other."""
  try:
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  except OSError as error:  # config_flags keeps a file that it could not read until somebody uses the config
    raise InputError(f"--config cannot be read: {error.__cause__}") from error
  _check_keys("", set(values), {"seed", "rounds", *SECTIONS})
  sections = {}
  for name, section in SECTIONS.items():
    if not isinstance(values[name], dict):
      raise InputError(f"config section {name} must be a dict of values, got {values[name]!r}")
    _check_keys(f"{name}.", set(values[name]), {field.name for field in dataclasses.fields(section)})
    sections[name] = section(**values[name])
  built = Config(seed=values["seed"], rounds=values["rounds"], **sections)
  _check_across(built)
  return built


def from_json(text: str) -> Config:
  """The config that `Config.to_json` wrote."""
  return build(json.loads(text))


def _check_across(config: Config) -> None:
  for name, value in (("seed", config.seed), ("rounds", config.rounds)):
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
      raise InputError(f"{name}={value!r}; must be a whole number of at least 0")
  from_file = config.task.name in ("gsm8k", "records")
  if from_file and not config.data.path:
    raise InputError(f"task.name={config.task.name!r} reads records from a file; give --config.data.path=FILE.jsonl")
  if not from_file and (config.task.min_size < 1 or config.data.num_records < 1):
    raise InputError(f"task.name={config.task.name!r} makes its problems; task.min_size and data.num_records "
                     "must be at least 1")
  if config.evaluate.max_size and from_file:
    raise InputError(f"evaluate.max_size={config.evaluate.max_size}: records of task.name={config.task.name!r} have no "
                     "sizes; set it to 0")
  if 0 < config.evaluate.max_size <= config.task.max_size:
    raise InputError(f"evaluate.max_size={config.evaluate.max_size} is for problems larger than any trained on; must "
                     f"be above task.max_size={config.task.max_size}, or 0 for none")
  if config.mistakes.source == "mined" and not config.data.path:
    raise InputError("mistakes.source='mined' reads records that mine wrote; give --config.data.path=FILE.jsonl")
  _check_mined(config)
  _check_confidence(config)
  if config.optimizer.warmup_steps > config.train.steps:
    raise InputError(f"optimizer.warmup_steps={config.optimizer.warmup_steps} is above "
                     f"train.steps={config.train.steps}; lower it")
  if not any(config.loss.weight_R):
    raise InputError("every loss weight is 0: nothing would be trained; give one role a weight")


def _check_mined(config: Config) -> None:
  mistakes = config.mistakes
  if not config.rounds:
    if mistakes.mined and not mistakes.mined_path:
      raise InputError(f"mistakes.mined={mistakes.mined} mixes in records that mine wrote; give "
                       "--config.mistakes.mined_path=FILE.jsonl, or --config.rounds=R to mine while training")
  elif mistakes.mined_path:
    raise InputError(f"rounds={config.rounds} mines what it trains on; leave mistakes.mined_path="
                     f"{mistakes.mined_path!r} empty, or set rounds=0")
  elif not mistakes.mined:
    raise InputError(f"rounds={config.rounds} with mistakes.mined=0 would mine records that nobody reads; give "
                     "mistakes.mined a share, or set rounds=0")
  elif config.rounds > config.train.steps:
    raise InputError(f"rounds={config.rounds} is above train.steps={config.train.steps}; lower it")
  elif config.task.name == "records":
    raise InputError("rounds needs a task that checks steps, and task.name='records' has no checker; set rounds=0")


def _check_confidence(config: Config) -> None:
  """Every transcript trained on must say how sure the model was, or it learns that it is sometimes not told."""
  if not config.tokenizer.confidence:
    return
  if config.mistakes.unit != "line":
    raise InputError(f"tokenizer.confidence is written after lines, and mistakes.unit={config.mistakes.unit!r}; "
                     "set mistakes.unit='line'")
  if config.mistakes.source == "injected" and config.mistakes.mined < 1:
    raise InputError(f"tokenizer.confidence needs transcripts that say how sure the model was, which mine writes, and "
                     f"mistakes.mined={config.mistakes.mined} leaves others; set mistakes.mined=1")
  if config.mistakes.source == "injected" and config.data.num_heldout:
    raise InputError(f"tokenizer.confidence: data.num_heldout={config.data.num_heldout} transcripts would be made "
                     "without the model's confidence, and a loss on them means nothing; set data.num_heldout=0")

"""Building a config: a ConfigDict, or the JSON of a workdir, becomes a checked `Config`.

Functions other than these take sections or plain values, never a ConfigDict.
"""

import dataclasses
import difflib
from typing import Any

import ml_collections

from insec_jax import config_unread
from insec_jax.command import InputError
from insec_jax.config import FROM_FILE, MOST_PROBLEMS, SECTIONS, Config, defaults
from insec_jax.config_types import shown
from insec_jax.files.reading import parse_json

# Keys that older config files and workdirs lack; the default of each means "as before".
NEWER = (
  "data.too_long",
  "data.fields",
  "data.heldout_path",
  "data.cache",
  "mistakes.rewind",
  "optimizer.name",
  "optimizer.moments",
  "optimizer.rounding",
  "optimizer.ema",
  "mesh.sequence",
  "optimizer.memory",
  "train.minutes",
  "train.profile_steps",
  "train.top_layers",
  "train.marker_rows",
  "train.stream_cache",
  "train.vocabulary",
  "train.curve_points",
  "evaluate.endpoints",
  "log.to",
  "log.project",
  "lora.rank",
  "lora.alpha",
  "lora.rank_stabilised",
  "lora.matrices",
  "lora.marker_rows",
  "evaluate.rivals",
  "evaluate.temperatures",
  "evaluate.swapped_path",
  "data.to_mine",
  "mistakes.mined_from",
  "mistakes.view",
  "mistakes.hinted",
  "mistakes.hint",
  "mine.flags",
  *(f"policy.{name}" for name in ("method", "temperature", "reward", "flag_price", "scaled", "clip", "kl")),
  *(f"policy.{name}" for name in ("teacher", "forward", "contrast", "no_flag")),
)
NEWER_SECTIONS = ("log", "lora", "policy")  # that older ones lack as a whole
# Keys that older config files and workdirs may still have: the value that means "as now", and the version that removed
# the key.
REMOVED = {
  "task.unneeded": (0, "0.5.0"),
  "mistakes.place": ("anywhere", "0.5.0"),
  "train.keep_every": (0, "0.5.0"),
  "evaluate.within": (2, "0.5.0"),
  "mine.temperature": (1.0, "0.5.0"),
}


def update_keys(values: Any) -> None:
  """Fill in the newer keys that the values lack and delete the removed keys that they have, in place.

  A list becomes a tuple where the key's default is one: the command line can override no list.
  Raises InputError for a removed key with another value than the one that means "as now".
  """
  standard = defaults()
  for section in NEWER_SECTIONS:
    if section not in values:
      values[section] = {}
  for name in (*NEWER, *REMOVED):
    section, key = name.split(".")
    held = values.get(section)
    if not isinstance(held, dict | ml_collections.ConfigDict):
      continue
    if name in NEWER and key not in held:
      held[key] = standard[section][key]
    elif name in REMOVED and key in held:
      value, version = REMOVED[name]
      if held[key] != value:
        raise InputError(
          f"config has {name}={shown(held[key])}, a key that version {version} has removed: it always acts as with "
          f"{value!r}; leave the key out, or use an earlier version"
        )
      del held[key]
  for section in SECTIONS:
    held = values.get(section)
    if not isinstance(held, dict | ml_collections.ConfigDict):
      continue
    for key, default in standard[section].items():
      if isinstance(default, tuple) and isinstance(held.get(key), list):
        items = tuple(held[key])
        del held[key]  # a ConfigDict refuses a value of another type
        held[key] = items


def _check_keys(where: str, seen: set, needed: set[str]) -> None:
  for key in sorted(seen - needed, key=str):
    close = difflib.get_close_matches(str(key), needed, n=1)
    raise InputError(f"config has no key {where}{key}" + (f"; did you mean {where}{close[0]}?" if close else ""))
  if missing := sorted(needed - seen):
    raise InputError(f"config misses {where}{missing[0]}; every key is given a value in the config file")


def plain_values(config: ml_collections.ConfigDict | dict) -> dict[str, Any]:
  """Return the values as dicts with the keys of this version; InputError for a missing or unknown section or key."""
  try:
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
  except Exception as error:  # a placeholder without a value, a reference to itself
    raise InputError(f"config cannot be read as plain values: {error}") from None
  if not isinstance(values, dict):
    raise InputError(f"the config is {shown(values)}; must be a ConfigDict")
  sections = {field.name for field in dataclasses.fields(Config)}
  _check_keys("", set(values) | set(NEWER_SECTIONS), sections)
  values = {name: values.get(name, {}) for name in NEWER_SECTIONS} | values
  for name in SECTIONS:
    if not isinstance(values[name], dict):
      raise InputError(f"config section {name} must be a dict of values, got {shown(values[name])}")
  values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
  update_keys(values)
  for name, section in SECTIONS.items():
    _check_keys(f"{name}.", set(values[name]), {field.name for field in dataclasses.fields(section)})
  return values


def build(config: ml_collections.ConfigDict | dict, *, mined_path: str = "") -> Config:
  """Return the checked config.

  `mined_path` is the file of mined records where the config uses some and gives no path. Raises InputError for a
  missing or unknown key, a wrong value, sections that contradict each other, or, in a ConfigDict, a value that nothing
  reads. A workdir that was made with such a value opens.
  """
  values = plain_values(config)
  sections = {name: section(**values[name]) for name, section in SECTIONS.items()}
  mistakes = sections["mistakes"]
  if mined_path and mistakes.mined and not mistakes.mined_path and not values["rounds"]:
    sections["mistakes"] = dataclasses.replace(mistakes, mined_path=mined_path)
  built = Config(seed=values["seed"], rounds=values["rounds"], **sections)
  _check_across(built)
  if isinstance(config, ml_collections.ConfigDict):
    config_unread.check(built)
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
  if config.data.heldout_path and (not config.data.path or not config.reads_records):
    raise InputError(
      f"data.heldout_path={config.data.heldout_path!r} belongs to the records of data.path, and this config reads "
      "none; leave it empty"
    )
  if config.train.curve_points and config.task.name == "records":
    raise InputError(
      f"train.curve_points={config.train.curve_points} counts right answers, and task.name='records' has no checker; "
      "set it to 0"
    )
  _check_mined(config)
  _check_policy(config)
  _check_rewind(config)
  _check_views(config)
  _check_confidence(config)
  _check_frozen(config)
  _check_reduced(config)
  if config.optimizer.warmup_steps > config.train.steps:
    raise InputError(
      f"optimizer.warmup_steps={config.optimizer.warmup_steps} is above train.steps={config.train.steps}; lower it"
    )
  _check_precision(config)
  if not any(config.loss.weight_R):
    raise InputError("every loss weight is 0: nothing would be trained; give one role a weight")


def _check_frozen(config: Config) -> None:
  """Raise InputError for values that contradict frozen weights."""
  if not config.freezes:
    return
  lora, key = config.lora, "lora.rank" if config.lora.rank else "train.top_layers"
  if lora.rank and config.train.top_layers:
    raise InputError(
      f"lora.rank={lora.rank} and train.top_layers={config.train.top_layers} are two ways to train a part of the "
      "weights; set one of them to 0"
    )
  section = "lora" if lora.rank else "train"
  if getattr(config, section).marker_rows and not config.tokenizer.special:
    raise InputError(
      f"{section}.marker_rows=True trains the rows of special markers, and tokenizer.special=False has none; set "
      f"{section}.marker_rows=False"
    )
  if config.optimizer.name == "muon" and lora.rank:
    raise InputError(
      "optimizer.name='muon' updates whole matrices, and with lora.rank above 0 none is trained; choose another one"
    )
  if config.optimizer.rounding == "stochastic":
    raise InputError(
      f"optimizer.rounding='stochastic' is for bfloat16 parameters, and with {key} above 0 the trained ones are "
      "float32; set it to 'nearest'"
    )


def _check_reduced(config: Config) -> None:
  """Raise InputError where the output of frozen layers is not constant, or the data and with it its tokens change."""
  train = config.train
  if train.stream_cache and not train.top_layers:
    raise InputError(
      f"train.stream_cache={train.stream_cache!r} keeps the output of frozen layers, and train.top_layers=0 freezes "
      "none; give train.top_layers, or leave the folder out"
    )
  if train.stream_cache and train.marker_rows:
    raise InputError(
      f"train.stream_cache={train.stream_cache!r} needs constant input of the frozen layers, and "
      "train.marker_rows=True trains some; set train.marker_rows=False"
    )
  for name in ("stream_cache", "vocabulary"):
    if config.rounds and getattr(train, name) not in ("", "all"):
      raise InputError(
        f"rounds={config.rounds} mines new training data during the run, for which train.{name}="
        f"{getattr(train, name)!r} is not made; set rounds=0, or mine between two runs"
      )


def _check_precision(config: Config) -> None:
  """Raise InputError for rounding that no parameter needs, and for averages of parameters that are rounded."""
  params, optimizer = config.precision.params, config.optimizer
  if optimizer.rounding == "stochastic" and params != "bfloat16":
    raise InputError(
      f"optimizer.rounding='stochastic' is for precision.params='bfloat16', and these are {params}; set it to "
      "'nearest', or the parameters to bfloat16"
    )
  average = "optimizer.name='schedule_free'" if optimizer.name == "schedule_free" else f"optimizer.ema={optimizer.ema}"
  averages = optimizer.name == "schedule_free" or optimizer.ema
  if averages and params != "float32" and not config.freezes:  # what is trained beside frozen weights is float32
    raise InputError(
      f"{average} averages weights, which precision.params={params!r} would round away; set precision.params='float32'"
    )


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
  elif not mistakes.mined and not config.policy.is_on:
    raise InputError(
      f"rounds={config.rounds} with mistakes.mined=0 would mine records that nobody reads; give "
      "mistakes.mined a share, or set rounds=0"
    )
  elif config.rounds > config.train.steps:
    raise InputError(f"rounds={config.rounds} is above train.steps={config.train.steps}; lower it")
  elif config.task.name == "records":
    raise InputError("rounds needs a task that checks steps, and task.name='records' has no checker; set rounds=0")


def _check_policy(config: Config) -> None:
  """Raise InputError for values that training on the model's own samples does not read, or cannot have."""
  policy = config.policy
  if not policy.is_on:
    return
  key = f"policy.method={policy.method!r}"
  if not config.rounds:
    raise InputError(f"{key} samples before each part of the steps; give the number of parts, --config.rounds=R")
  if config.mine.samples < 2 and policy.method == "gradient":
    raise InputError(
      f"{key} compares the samples of a problem, and mine.samples={config.mine.samples}; give at least 2"
    )
  if config.mistakes.mined:
    raise InputError(
      f"{key} trains on samples alone, and mistakes.mined={config.mistakes.mined} mixes in mined records; set "
      "mistakes.mined=0"
    )
  if config.loss.repeat:
    raise InputError(f"{key} does not read loss.repeat={config.loss.repeat:g}; set loss.repeat=0")
  if config.optimizer.ema or config.optimizer.name == "schedule_free":
    raise InputError(
      f"{key} trains the weights that sample, which are an average with optimizer.ema or 'schedule_free'; set "
      "optimizer.ema=0 and choose another optimizer.name"
    )
  if policy.distills:
    _check_distill(config)


def _check_distill(config: Config) -> None:
  """Raise InputError unless tokens say where a flag and a correction end, and these have weights of a mean."""
  key, loss = "policy.method='distill'", config.loss
  if config.mistakes.unit != "line" or not config.tokenizer.special:
    raise InputError(
      f"{key} forces the token of the flag and ends a correction with its line, and mistakes.unit="
      f"{config.mistakes.unit!r}, tokenizer.special={config.tokenizer.special}; set them to 'line' and True"
    )
  weights = {"flag": loss.flag, "reason": loss.reason, "correction": loss.correction}
  if min(weights.values()) < 0 or not any(weights.values()):
    given = ", ".join(f"loss.{name}={weight:g}" for name, weight in weights.items())
    raise InputError(f"{key} takes a mean weighted by role, and {given}; give none below 0 and one above 0")


def _check_rewind(config: Config) -> None:
  """Raise InputError unless the tokens alone say where a mistake begins and where its correction ends."""
  if not config.mistakes.rewind:
    return
  if config.mistakes.unit != "line":
    raise InputError(
      f"mistakes.rewind hides a mistake at the end of the line that corrects it, and mistakes.unit="
      f"{config.mistakes.unit!r}; set mistakes.unit='line'"
    )
  if not config.tokenizer.special:
    raise InputError(
      "mistakes.rewind finds mistakes by the tokens of flag and fix, and tokenizer.special=False has none; set it to "
      "True"
    )


def _check_views(config: Config) -> None:
  """Raise InputError for uses of mined records, or of records to mine, that this config cannot have."""
  if config.mistakes.view == "shuffled" and config.task.name == "records":
    raise InputError(
      "mistakes.view='shuffled' checks that corrections of other mistakes are wrong, and task.name='records' has no "
      "checker; choose another view"
    )
  if config.rounds and config.mistakes.mined_from != "own":
    raise InputError(
      f"rounds={config.rounds} mines the weights that are trained; set mistakes.mined_from='own', or rounds=0"
    )
  if config.mistakes.hinted and config.task.name == "records":
    raise InputError(
      f"mistakes.hinted={config.mistakes.hinted} is for a teacher to whom a checker gives hints, and "
      "task.name='records' has no checker; set mistakes.hinted=0"
    )
  if config.data.to_mine and config.task.name not in FROM_FILE:
    raise InputError(
      f"data.to_mine={config.data.to_mine} parts the problems of data.path, and task.name={config.task.name!r} makes "
      "its own, of which it mines a split of their own; set it to 0"
    )


def _check_confidence(config: Config) -> None:
  """Raise InputError unless all training transcripts have confidence tokens: no step should be without them."""
  if not config.tokenizer.confidence:
    return
  if config.mistakes.unit != "line":
    raise InputError(
      f"tokenizer.confidence is written after lines, and mistakes.unit={config.mistakes.unit!r}; "
      "set mistakes.unit='line'"
    )
  if config.mistakes.source == "injected" and config.mistakes.mined < 1 and not config.policy.is_on:
    raise InputError(
      f"tokenizer.confidence needs transcripts that say how sure the model was, which mine writes, and "
      f"mistakes.mined={config.mistakes.mined} leaves others; set mistakes.mined=1"
    )
  if config.mistakes.source == "injected" and config.data.num_heldout:
    raise InputError(
      f"tokenizer.confidence: data.num_heldout={config.data.num_heldout} transcripts would be made "
      "without the model's confidence, and a loss on them means nothing; set data.num_heldout=0"
    )

"""Config values that no program reads because of another value; `build` refuses them, so none is without effect.

Keys that another optimizer (b1, b2, eps), source of mistakes (share) or unit of steps (redraws) would read, lengths of
intervals, and the amounts of programs that a task cannot be used with are not among them: they stay in a config file
while one value of it is changed.
"""

import dataclasses
from collections.abc import Callable

from insec_jax.command import InputError
from insec_jax.config import Config, defaults
from insec_jax.config_types import shown


@dataclasses.dataclass(frozen=True)
class Dependent:
  """Keys that are read where `reads` holds; `reason` says why they are not elsewhere, `remedy` what changes that."""

  keys: tuple[str, ...]
  reads: Callable[[Config], bool]
  reason: str
  remedy: str


DEPENDENT = (
  Dependent(
    ("task.min_size", "task.max_size", "task.modulus"),
    lambda config: config.task.name != "records",
    "task.name='records' has no sizes",
    "choose another task",
  ),
  Dependent(
    ("data.path", "data.fields"),
    lambda config: config.reads_records,
    "with mistakes.source='injected' this task makes its problems",
    "choose task.name='records' or 'gsm8k', or mistakes.source='recorded'",
  ),
  Dependent(
    ("train.marker_rows",),
    lambda config: config.train.top_layers > 0,
    "train.top_layers=0 trains no top layers",
    "give train.top_layers (the key of LoRA is lora.marker_rows)",
  ),
  Dependent(
    ("lora.alpha", "lora.rank_stabilised", "lora.matrices", "lora.marker_rows"),
    lambda config: config.lora.rank > 0,
    "lora.rank=0 trains no adapters",
    "give lora.rank (the key of top layers is train.marker_rows)",
  ),
  Dependent(
    ("policy.temperature",),
    lambda config: config.policy.is_on,
    "policy.method='none' samples no texts to train on",
    "give policy.method",
  ),
  Dependent(
    tuple(f"policy.{name}" for name in ("reward", "flag_price", "scaled", "clip", "kl")),
    lambda config: config.policy.method == "gradient",
    "there is no policy gradient",
    "set policy.method='gradient'",
  ),
  Dependent(
    tuple(f"policy.{name}" for name in ("teacher", "forward", "contrast", "no_flag")),
    lambda config: config.policy.distills,
    "there is no teacher",
    "set policy.method='distill'",
  ),
  Dependent(
    ("mistakes.hint",),
    lambda config: config.mistakes.hinted > 0 or config.policy.distills,
    "mistakes.hinted=0 trains on no hints, and no teacher has any",
    "give mistakes.hinted, or set policy.method='distill'",
  ),
  Dependent(
    ("log.project",),
    lambda config: bool({"wandb", "trackio"} & set(config.log.to)),
    "log.to names no service",
    "add 'wandb' or 'trackio' there",
  ),
  Dependent(
    ("evaluate.temperatures",),
    lambda config: "temperature" in config.evaluate.rivals,
    "evaluate.rivals has no 'temperature'",
    "add it there",
  ),
)


def unread(config: Config) -> dict[str, Dependent]:
  """Return the keys that nothing reads, by their names on the command line without `config.`."""
  return {key: group for group in DEPENDENT if not group.reads(config) for key in group.keys}


def check(config: Config) -> None:
  """Raise InputError for a value other than the default that nothing reads."""
  default = defaults()
  for name, group in unread(config).items():
    section, key = name.split(".")
    value = getattr(getattr(config, section), key)
    if value != default[section][key]:
      raise InputError(
        f"{name}={shown(value)} would be read by nobody: {group.reason}; {group.remedy}, or leave it at "
        f"{default[section][key]!r}"
      )

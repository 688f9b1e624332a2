"""Workdirs as read for a page: the content of each, what is missing, and which of them are seeds of one arm."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence

from insec_jax.command import InputError
from insec_jax.config_build import build, plain_values, update_keys
from insec_jax.files.reading import read_json, read_text
from insec_jax.pages import correction, side_effects

BEGAN_WITH = (("model", "path"), ("mistakes", "mined_path"))  # config keys that differ for every seed


@dataclasses.dataclass(frozen=True)
class Run:
  """One seed of an arm: the content of its workdir; `notes` name what is missing and what else the reader must know."""

  name: str
  folder: pathlib.Path
  config: dict
  environment: dict  # empty when there is no such file
  lines: list[dict]  # of metrics
  results: dict  # empty when there is no such file
  notes: tuple[str, ...]
  scores: dict[str, side_effects.Score]  # of other tasks

  @property
  def trained_tokens(self) -> int | None:
    """Trained tokens at the last line of metrics that has them; None without such a line."""
    return next((line["trained_tokens"] for line in reversed(self.lines) if "trained_tokens" in line), None)


@dataclasses.dataclass(frozen=True)
class Arm:
  """Runs that differ only in their seed, or one run."""

  name: str
  runs: tuple[Run, ...]

  @property
  def evaluated(self) -> list[Run]:
    return [run for run in self.runs if run.results]


def in_words(arm: Arm) -> str:
  """Return the name of an arm, with its seeds where it has several."""
  seeds = ", ".join(str(run.config["seed"]) for run in arm.runs)
  return arm.name if len(arm.runs) == 1 else f"{arm.name} (seeds {seeds})"


def over_seeds(runs: Sequence[Run]) -> list[Arm]:
  """Return the runs as arms, in the order of their first runs and of their seeds."""
  groups = {}
  for run in runs:
    alike = json.dumps(_without_seed(run.config), sort_keys=True)
    groups.setdefault((run.folder.resolve().name, alike), []).append(run)
  arms = []
  for group in groups.values():
    group.sort(key=lambda run: run.config["seed"])
    distinct = len({run.config["seed"] for run in group}) == len(group)
    arms += [tuple(group)] if distinct else [(run,) for run in group]
  last_names = [group[0].folder.resolve().name for group in arms]
  return [
    Arm(last if len(group) > 1 and last_names.count(last) == 1 else group[0].name, group)
    for last, group in zip(last_names, arms, strict=True)
  ]


def _without_seed(config: dict) -> dict:
  """Return the config without the keys that differ between seeds of one arm."""
  shared = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items() if key != "seed"}
  for section, key in BEGAN_WITH:
    shared.get(section, {}).pop(key, None)
  return shared


def read_run(folder: pathlib.Path, name: str) -> Run:
  """Return the run in `folder`; raise InputError when it is no workdir, or a file in it cannot be read."""
  if not (folder / "config.json").is_file():
    raise InputError(f"{folder} is no workdir: it has no config.json; give a folder that train wrote")
  config = read_json(folder / "config.json", "the config of a run")
  if "train" not in config:
    raise InputError(f"{folder} is no workdir: its config.json is not one of train; give a folder that train wrote")
  try:
    config = plain_values(config)
    build(config)
  except InputError as error:
    raise InputError(f"{folder / 'config.json'} is not the config of a run ({error}); bring it back") from None
  environment, results, lines = {}, {}, []
  notes = []
  if (folder / "environment.json").exists():
    environment = read_json(folder / "environment.json", "the environment of a run")
  else:
    notes.append("environment.json is missing, so commit, versions and devices are not known")
  if (folder / "metrics.jsonl").exists():
    lines = list(read_metrics(folder / "metrics.jsonl"))
  if not lines:
    notes.append("metrics.jsonl is missing or empty, so there are no curves: no step has been logged yet")
  elif lines[-1]["step"] < config["train"]["steps"]:
    notes.append(f"training stands at step {lines[-1]['step']:,} of {config['train']['steps']:,}; run train again")
  for key in sorted({key for line in lines for key, value in line.items() if not math.isfinite(value)}):
    step = next(line["step"] for line in lines if key in line and not math.isfinite(line[key]))
    notes.append(f"{key} is not a finite number from step {step:,} on; its curve leaves that out")
  if (folder / "results.json").exists():
    results = read_json(folder / "results.json", "the results of a run")
    correction.check(results, folder / "results.json")
    try:
      update_keys(results["config"])
    except InputError as error:
      raise InputError(f"{folder / 'results.json'}: {error}") from None
    step = results.get("step")  # older versions did not say
    if lines and step is not None and step != lines[-1]["step"]:
      notes.append(
        f"results.json is of step {step:,}, the last line of metrics.jsonl of step {lines[-1]['step']:,}; "
        "run evaluate again"
      )
    elif (
      lines
      and step is None
      and ((folder / "results.json").stat().st_mtime < (folder / "metrics.jsonl").stat().st_mtime)
    ):
      notes.append("results.json is older than the last line of metrics.jsonl; run evaluate again")
  else:
    notes.append(
      "results.json is missing, so self-correction is not measured; run python -m insec_jax.evaluate "
      f"--config CONFIG --model {folder} --output {folder / 'results.json'}"
    )
  return Run(name, folder, config, environment, lines, results, tuple(notes), side_effects.read_scores(folder))


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, float]]:
  """Yield the lines of a run without a last one that is still being written."""
  for number, line in enumerate(read_text(path, "the metrics of a run").split("\n")[:-1], 1):
    try:
      values = json.loads(line)
      if not isinstance(values["step"], int) or not all(type(value) in (int, float) for value in values.values()):
        raise ValueError("no numbers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      raise InputError(f"{path}:{number} is not a line of metrics; repair or remove the file") from None
    yield values

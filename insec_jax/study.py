"""Study: the arms of a config over several seeds, as the stages in which sweep runs it and fit sizes it.

See sweep.py for the stages of an arm and seed, and for the weights with which an arm starts.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from insec_jax import config_file
from insec_jax.command import InputError
from insec_jax.config import Config, MeshConfig
from insec_jax.config_build import build, plain_values, update_keys
from insec_jax.distributed import processes
from insec_jax.files import buckets, hub
from insec_jax.files.reading import folder_to_read, local_path, read_json
from insec_jax.mining.miner import mined_by
from insec_jax.model import sharding
from insec_jax.stages import Stage
from insec_jax.training import checkpoint, frozen, layout, optimizer, step

PYTHON = (sys.executable, "-m")
MOST_SEED = 2**32 - 1
RESULTS = "results.json"  # of a workdir


def from_flags(output: pathlib.Path) -> "Study":
  """Return the study that the flags give, with its files in `output`; InputError when they give none."""
  arms, seeds = names_of("arms", flags.FLAGS.arms), numbers_of("seeds", flags.FLAGS.seeds)
  file = config_flags.get_config_filename(flags.FLAGS["config"])
  if ":" in file:
    raise InputError(f"--config={file} names an arm; give the file alone, and the arms in --arms")
  overrides = config_flags.get_override_values(flags.FLAGS["config"])
  return Study(
    output,
    str(config_file.find(file)),
    overrides,
    arms,
    seeds,
    names_of("base", flags.FLAGS.base) if flags.FLAGS.base else [],
  )


@dataclasses.dataclass(frozen=True)
class StudyStage(Stage):
  """Stage with what it runs: the program, on which arm, and the config that it reads.

  `start` is the base arm whose weights the arm starts with; None where they are random or those of model.path.
  """

  program: str = dataclasses.field(kw_only=True)
  arm: str = dataclasses.field(kw_only=True)
  config: Config = dataclasses.field(kw_only=True)
  start: str | None = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class Study:
  """Arms of a config over seeds; `overrides` are the values of the command line, by their names without `config.`."""

  output: pathlib.Path
  file: str
  overrides: dict[str, Any]
  arms: list[str]
  seeds: list[int]
  bases: list[str]  # each starts from the one before it, other arms from the last

  def workdir(self, arm: str, seed: int) -> pathlib.Path:
    """Return the workdir of an arm and seed."""
    return self.output / f"seed{seed}" / arm

  def stages(self) -> list[StudyStage]:
    """Return every stage of every seed, each after those it needs; InputError if an arm cannot run."""
    arms = (*self.bases, *(arm for arm in self.arms if arm not in self.bases))
    others = [arm for arm in arms if self.mines_next_seed(arm)]
    mined: dict[str, StudyStage] = {}  # by mining settings
    return [
      stage
      for some in ([arm for arm in arms if arm not in others], others)
      for seed in self.seeds
      for arm in some
      for stage in self.with_mining(arm, seed, mined)
    ]

  def with_mining(self, arm: str, seed: int, mined: dict[str, StudyStage]) -> Iterator[StudyStage]:
    """Yield the stages of an arm and seed, first the mining of its records if none in `mined` is alike."""
    values, after = self.start(arm, seed)
    given = self.given(arm, values)
    if given.mistakes.mined > 0 and given.rounds == 0 and not given.mistakes.mined_path:
      if not given.model.path:
        raise InputError(
          f"arm {arm} has mistakes.mined={given.mistakes.mined} and begins with random weights, which "
          "solve nothing; give it a model.path or a mistakes.mined_path"
        )
      source = self.next_seed(arm, seed) if self.mines_next_seed(arm) else seed
      mined_values, mined_after = self.start(arm, source)
      mined_values["mistakes.mined_path"] = str(self.workdir(f"{arm}_mined.jsonl", source))
      alike = mined_by(self.config(arm, mined_values))
      if alike not in mined:
        mined[alike] = self.mine(arm, source, mined_values, mined_after)
        yield mined[alike]
      values["mistakes.mined_path"] = mined[alike].config.mistakes.mined_path
      after = (*after, mined[alike].name)
    yield from self.of_arm(arm, seed, values, after)

  def start(self, arm: str, seed: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the values of an arm with the weights that it starts from, and the stages that make these."""
    values = {**self.overrides, "seed": seed}
    given = self.given(arm, values)
    if given.mistakes.mined_path and given.mistakes.mined_from != "own":
      raise InputError(
        f"arm {arm} has mistakes.mined_from={given.mistakes.mined_from!r}, and with mistakes.mined_path nothing is "
        "mined for it; give one of them"
      )
    if arm in self.bases[1:] and not given.model.path:
      raise InputError(
        f"--base={','.join(self.bases)}: {arm} begins with random weights, not with those of the base "
        "before it; give it a model.path, or leave out what comes before it"
      )
    if given.model.path and (base := self.base(arm)):
      if self.given(base, self.overrides).mistakes.rewind and not given.mistakes.rewind:
        raise InputError(
          f"arm {arm} goes on from {base}, which is trained with mistakes.rewind=True, and would lose it; set it in "
          "both, or in neither"
        )
      return {**values, "model.path": str(self.workdir(f"{base}_hf", seed))}, (f"seed {seed}, {base}: export",)
    if (path := given.model.path) and not hub.is_id(path) and not folder_to_read(path, "model.path").is_dir():
      raise InputError(
        f"arm {arm} begins with model.path={given.model.path}, which is no folder; give "
        "--config.model.path=FOLDER, or name the arm that makes it with --base"
      )
    return values, ()

  def mines_next_seed(self, arm: str) -> bool:
    """Return whether the arm trains on mistakes of the base of the next seed (mistakes.mined_from)."""
    values = plain_values(self.given(arm, self.overrides))
    return values["mistakes"]["mined_from"] == "next_seed"

  def next_seed(self, arm: str, seed: int) -> int:
    """Return the seed after this one, of the last one the first; InputError where there is no other, or for a base."""
    if len(self.seeds) < 2 or arm in self.bases:
      raise InputError(
        f"arm {arm} has mistakes.mined_from='next_seed'; give --seeds at least two, and do not name it with --base"
      )
    return self.seeds[(self.seeds.index(seed) + 1) % len(self.seeds)]

  def base(self, arm: str) -> str | None:
    """Return the base arm from which the arm starts if it has a model.path; None if there is none."""
    before = self.bases[: self.bases.index(arm)] if arm in self.bases else self.bases
    return before[-1] if before else None

  def of_arm(self, arm: str, seed: int, values: dict[str, Any], after: tuple[str, ...]) -> Iterator[StudyStage]:
    """Yield the arm's training; its export if it is a base; its evaluation if it is in --arms."""
    config, workdir = self.config(arm, values), self.workdir(arm, seed)
    base = self.base(arm)
    started = self.workdir(f"{base}_hf", seed) if base and "model.path" in values else None
    train = self.stage(
      arm,
      seed,
      "train",
      config,
      (*self.words(arm, values), f"--workdir={workdir}"),
      lambda: is_trained(workdir, config, started),
      after,
    )
    yield train
    if arm in self.bases:
      folder = self.workdir(f"{arm}_hf", seed)
      yield self.stage(
        arm,
        seed,
        "export",
        config,
        (f"--model={workdir}", f"--output={folder}"),
        lambda: is_exported(folder, workdir),
        (train.name,),
      )
    if arm in self.arms:
      yield self.evaluate(arm, seed, values, train.name)

  def evaluate(self, arm: str, seed: int, values: dict[str, Any], trained: str) -> StudyStage:
    """Return the evaluation of an arm.

    With the rival "swapped" it reads the mistakes of `clean`, or of the first arm where there is no such.
    """
    workdir, after = self.workdir(arm, seed), [trained]
    amount = self.config(arm, values).evaluate
    first = "clean" if "clean" in self.arms else self.arms[0]
    source = self.workdir(first, seed) / RESULTS
    swaps = arm != first and "swapped" in amount.rivals and not amount.swapped_path
    if swaps:
      if "swapped" not in self.given(first, self.overrides).evaluate.rivals:
        raise InputError(
          f"arm {arm} has 'swapped' in evaluate.rivals, and {first}, whose mistakes it would continue from, has not; "
          "add it there, or give evaluate.swapped_path"
        )
      values = {**values, "evaluate.swapped_path": str(source)}
      after.append(f"seed {seed}, {first}: evaluate")
    config, results = self.config(arm, values), workdir / RESULTS

    def done() -> bool:
      return is_measured(results, workdir, config) and not (swaps and not is_newer(results, source))

    words = (f"--model={workdir}", *self.words(arm, values), f"--output={results}")
    return self.stage(arm, seed, "evaluate", config, words, done, tuple(after))

  def mine(self, arm: str, seed: int, values: dict[str, Any], after: tuple[str, ...]) -> StudyStage:
    """Return the stage that mines with the starting weights of the arm."""
    config = self.config(arm, values)
    start = config.model.path
    file = local_path(config.mistakes.mined_path, "mistakes.mined_path")
    return self.stage(
      arm,
      seed,
      "mine",
      config,
      (f"--model={start}", *self.words(arm, values), f"--output={file}"),
      lambda: file.exists() and is_newer(file, newest(hub.model_folder(start, "model.path", weights=False))),
      after,
    )

  def stage(
    self,
    arm: str,
    seed: int,
    program: str,
    config: Config,
    words: tuple[str, ...],
    done: Callable[[], bool],
    after: tuple[str, ...],
  ) -> StudyStage:
    return StudyStage(
      f"seed {seed}, {arm}: {program}",
      (*PYTHON, f"insec_jax.{program}", *words),
      self.output / "logs" / f"seed{seed}_{arm}_{program}.log",
      done,
      after,
      program=program,
      arm=arm,
      config=config,
      start=self.base(arm) if config.model.path else None,
    )

  def words(self, arm: str, values: dict[str, Any]) -> tuple[str, ...]:
    """Return the config flags for the command line of a program."""
    return (f"--config={self.file}:{arm}", *(f"--config.{key}={value}" for key, value in values.items()))

  def given(self, arm: str, values: dict[str, Any]) -> ml_collections.ConfigDict:
    """Return the ConfigDict of an arm with these values."""
    config = load(self.file, arm)
    config.update_from_flattened_dict(values)
    return config

  def config(self, arm: str, values: dict[str, Any]) -> Config:
    """Return the checked config of an arm with these values, as the programs build it."""
    return build(self.given(arm, values))


def load(file: str, arm: str) -> ml_collections.ConfigDict:
  """Return the file's ConfigDict for the arm; InputError for an unknown arm, or a missing or unknown key."""
  try:
    values = config_file.load(file, arm)
    plain_values(values)
  except InputError as error:
    raise InputError(f"arm {arm!r}: {error}") from None
  return values


def newest(folder: pathlib.Path) -> pathlib.Path:
  """Return the newest checkpoint of a workdir, or the config of an HF folder, which is as old as its weights."""
  steps = layout.steps(folder)
  return folder / layout.CHECKPOINTS / str(steps[-1]) if steps else folder / layout.CONFIG


def is_newer(path: pathlib.Path, than: pathlib.Path) -> bool:
  """Return whether the file exists and is not older than the other."""
  return path.exists() and path.stat().st_mtime >= than.stat().st_mtime


def is_trained(workdir: pathlib.Path, config: Config, started: pathlib.Path | None) -> bool:
  """Return whether the workdir has a sound checkpoint of its last step.

  Raises InputError if it was made from another config or older weights.
  """
  layout.check_workdir(workdir, config)
  for path in (started / layout.CONFIG if started else None, _mined_path(config)):
    if path is not None and (workdir / layout.MODEL).exists() and not is_newer(workdir / layout.MODEL, path):
      raise InputError(f"{workdir} is older than {path}, with which it should begin; remove it to train it again")
  return config.train.steps in layout.steps(workdir) and is_sound(workdir, config)


def is_sound(workdir: pathlib.Path, config: Config) -> bool:
  """Return whether the checkpoint of the last step holds what was saved; it is read on the CPU."""
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
  tx = optimizer.make(config.optimizer, config.train.steps)
  part = frozen.part_of_workdir(config, workdir)
  abstract = step.abstract_state(
    layout.read_model(workdir), config.precision.params, tx, mesh, part, on_host=config.optimizer.on_host
  )
  return checkpoint.is_sound(workdir, config.train.steps, abstract, processes.alone())


def _mined_path(config: Config) -> pathlib.Path | None:
  if not config.mistakes.mined_path:
    return None
  path = local_path(config.mistakes.mined_path, "mistakes.mined_path")
  buckets.fetch(path)
  return path


def is_exported(folder: pathlib.Path, workdir: pathlib.Path) -> bool:
  """Return whether the folder exists; InputError if its weights are older than the workdir's."""
  if not folder.exists():
    return False
  if not is_newer(folder / layout.CONFIG, newest(workdir)):
    raise InputError(f"{folder} is older than {workdir}, of which it is the export; remove it")
  return True


def is_measured(results: pathlib.Path, workdir: pathlib.Path, config: Config) -> bool:
  """Return whether the results are of the last step and of the same evaluation settings."""
  if not is_newer(results, newest(workdir)):
    return False
  stored = read_json(results, "the results of a run")
  if "config" not in stored or stored.get("step", config.train.steps) != config.train.steps:
    return False
  measured = stored["config"]
  update_keys(measured)
  measured, wanted = json.loads(json.dumps(measured)), json.loads(config.to_json())  # as JSON has it: no tuples
  return measured["evaluate"] == wanted["evaluate"]  # the rest cannot change in a workdir


def names_of(flag: str, names: Sequence[str]) -> list[str]:
  """Return the names; InputError for an empty list, a repeated name, or one that cannot be the name of a folder."""
  for name in names:
    if (
      not name.isprintable()
      or not 0 < len(name) <= 100
      or name[0] in ".-"
      or set("/:,") & set(name)
      or (names.count(name) > 1)
    ):
      raise InputError(
        f"--{flag}={','.join(names):.200} has {name!r:.100} more than once, or it is no name; give each once"
      )
  if not names:
    raise InputError(f"--{flag} is empty; give at least one")
  return list(names)


def numbers_of(flag: str, words: Sequence[str]) -> list[int]:
  """Return the whole numbers; InputError for another word, a number above MOST_SEED, or a repeated one (1 and 01)."""
  for word in names_of(flag, words):
    if not re.fullmatch("[0-9]{1,20}", word) or int(word) > MOST_SEED:
      raise InputError(
        f"--{flag} has {word!r:.100}; give whole numbers of at most {MOST_SEED} with commas between them"
      )
  numbers = [int(word) for word in words]
  if twice := [number for number in numbers if numbers.count(number) > 1]:
    raise InputError(f"--{flag}={','.join(words):.200} has {twice[0]} more than once; give each once")
  return numbers

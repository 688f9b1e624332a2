"""Config files: Python files of the user, whose get_config returns the ConfigDict of an experiment.

Every error in one is an InputError with file and line.
"""

import contextlib
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from insec_jax import config_build
from insec_jax.command import FLAG_FILE, InputError, printable
from insec_jax.config import Config
from insec_jax.config_types import shown
from insec_jax.files import sources
from insec_jax.files.bucket_paths import SCHEME
from insec_jax.files.reading import SCHEME as REMOTE
from insec_jax.files.reading import local_path, open_to_read

MOST_BYTES = 1 << 20  # of a config file
ARM = re.compile(r"[\w.+-]+")  # what may be proposed
MOST_ARMS = 20  # that are listed


class _Parser(flags.ArgumentParser):
  """Parser of --config: FILE, or FILE:ARM; FILE is a path, or the name of a config of this package."""

  kind = "FILE[:ARM]"  # in the help

  def parse(self, path: str) -> ml_collections.ConfigDict:
    if REMOTE.match(path):
      return load(path)
    file, colon, arm = path.partition(":")
    found = find(file)
    if str(found) != file:
      beside = f"; the file here is --config=./{path}" if os.path.isfile(file) else ""
      print(f"--config={path} is {found}{beside}", file=sys.stderr, flush=True)
    return load(found, *([arm] if colon else []))


def shipped() -> dict[str, pathlib.Path]:
  """Return the config files of this package by name; they are in its wheel, or beside it in a source tree."""
  package = pathlib.Path(__file__).parent
  folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
  return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def find(file: str) -> str | pathlib.Path:
  """Return the path of a config file: the text itself, or for the name of a config of this package its file.

  A text with a slash or that ends in .py is a path. The name of a config of this package is that config, whatever is in
  the current folder; another name is that of a file. Raises InputError where there is none.
  """
  if not file or "/" in file or file.endswith(".py"):
    return file
  configs = shipped()
  if file not in configs:
    if os.path.isfile(file):
      return file
    raise InputError(
      f"{file:.100} is neither a file nor a config of this package; give a path, or one of {', '.join(configs)}"
    )
  return configs[file]


flags.disclaim_key_flags()  # --config is the program's: its --help has it


CONFIG_HELP = (
  "Config file of the experiment, or the name of one of this package, such as toy (a file toy of your own is ./toy), "
  "with the arm after a colon; --config.SECTION.KEY=VALUE overrides a value of it. config.py has every key with its "
  "type, bounds and default."
)


def define_flag(help_string: str = CONFIG_HELP) -> flags.FlagHolder:
  """Define --config and its overrides --config.SECTION.KEY=VALUE; the value is a locked ConfigDict."""
  # ml_collections would open a --flagfile here, where no error is caught; command.run refuses that flag.
  words = [word for word in sys.argv if not re.match(FLAG_FILE, word)]
  holder = config_flags.DEFINE_config_file(
    "config", None, help_string, lock_config=True, sys_argv=None if words == sys.argv else words
  )
  flags.FLAGS["config"].parser = _Parser()  # ml_collections applies the overrides to its result
  return holder


def define_study_flags() -> None:
  """Define --arms, --seeds and --base, which with --config say what a study is."""
  flags.DEFINE_list("arms", None, "Comma-separated arms of the config.")
  flags.DEFINE_list("seeds", None, "Comma-separated seeds.")
  flags.DEFINE_list(
    "base",
    [],
    "Arm from whose weights the arms with a model.path start; of several, comma-separated, each starts from the one "
    "before it (default: none).",
  )


def files_read(config: Config) -> list[str]:
  """Return the paths of the config file and of the records of a config, which no output may replace."""
  given = config_flags.get_config_filename(flags.FLAGS["config"])
  own = str(find(given.partition(":")[0]))
  records = (config.data.path, config.data.heldout_path)
  return [own, *(file for text in records for file in sources.local_files(text))]


def load(file: str | pathlib.Path, *arm: str) -> ml_collections.ConfigDict:
  """Return the locked ConfigDict of the file's get_config with the keys of this version; `arm` is its argument, if any.

  Raises InputError if the file cannot be read or run, or returns anything else.
  """
  if str(file).startswith(SCHEME):
    raise InputError(f"--config={file}: a config file is a program and is read from a disk; give a local file")
  path = local_path(file, "--config")
  content = _compiled(path)
  module = types.ModuleType("config_config")
  sys.modules[module.__name__] = module  # dataclasses look up their module
  module.__file__ = str(path)
  folder = str(path.absolute().parent)
  is_new = folder not in sys.path
  if is_new:  # a config file may import those beside it; last, so that none of them hides a library
    sys.path.append(folder)
  try:
    exec(content, module.__dict__)  # a config file is a program of the user
    if not callable(getattr(module, "get_config", None)):
      raise InputError(f"{path} has no function get_config; it must return the ConfigDict")
    config = module.get_config(*arm)
  except InputError:
    raise
  except BaseException as error:  # also SystemExit: a program that has done nothing must not exit with 0
    if isinstance(error, KeyError) and arm and error.args[:1] == arm:
      raise InputError(_unknown_arm(path, arm[0], _arms(module.get_config, content, error), error)) from None
    raise InputError(_refusal(path, arm, error)) from None
  finally:
    if is_new:
      sys.path.remove(folder)
  if not isinstance(config, ml_collections.ConfigDict):
    raise InputError(f"{path}: get_config returned {shown(config)}; must return a ConfigDict")
  _update(config, path)
  return config


def _compiled(path: pathlib.Path) -> types.CodeType:
  with open_to_read(path, "--config") as file:
    source = file.read(MOST_BYTES + 1)
  if len(source) > MOST_BYTES:
    raise InputError(f"--config: {path} has more than {MOST_BYTES >> 20} MiB; give a file of values")
  try:
    return compile(source, str(path), "exec", dont_inherit=True)
  except SyntaxError as error:
    raise InputError(f"{path}:{error.lineno or 1}: {error.msg}; correct the config file") from None
  except (ValueError, RecursionError, MemoryError) as error:  # bytes of 0, deep nesting
    raise InputError(f"{path} is no Python file ({str(error) or type(error).__name__}); give a config file") from None


def _unknown_arm(path: pathlib.Path, arm: str, arms: Sequence[str], error: KeyError) -> str:
  named = f"give one of {', '.join(arms[:MOST_ARMS])}" if arms else "name one that it has"
  return f"{path} has no arm {arm!r:.100} (line {(_lines_of(path, error) or [0])[-1]} looked it up); {named}"


def _arms(get_config: Callable[[str], Any], program: types.CodeType, error: KeyError) -> list[str]:
  """Return the arms of a config file: the texts in it, and where it raised, with which get_config returns a config."""
  texts = [*(getattr(get_config, "__defaults__", None) or ())]
  frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
  for code in (*frames[1:], program):  # the first is that of `load`
    for value in code.co_consts:
      texts += value if isinstance(value, tuple) else [value]
  found = []
  for text in dict.fromkeys(text for text in texts if isinstance(text, str) and ARM.fullmatch(text)):
    with contextlib.suppress(Exception):
      if isinstance(get_config(text), ml_collections.ConfigDict):
        found.append(text)
  return found


def _lines_of(path: pathlib.Path, error: BaseException) -> list[int | None]:
  """Return the lines of the file through which the error came."""
  return [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]


def _refusal(path: pathlib.Path, arm: tuple[str, ...], error: BaseException) -> str:
  """Return one line with the position and the error that the file has raised."""
  lines = _lines_of(path, error)
  try:
    said = printable(" ".join(str(error).split()))[:300]
  except Exception:
    said = ""
  what = f"{type(error).__name__}" + (f": {said}" if said else "")
  if not lines:  # get_config itself could not be called
    return f"{path}: get_config{arm!r:.100} cannot be called ({what}); an arm is given as --config=FILE:ARM"
  asked = f" for arm {arm[0]!r:.100}" if arm else ""
  return f"{path}:{lines[-1]}: {what}{asked}; correct the config file" + (" or the arm" if arm else "")


def _update(config: ml_collections.ConfigDict, path: pathlib.Path) -> None:
  """Give the config the keys of this version, so that the command line can override them."""
  try:
    with config.unlocked():
      config_build.update_keys(config)
    config.lock()
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  except Exception as error:  # references without a value
    raise InputError(f"{path}: what get_config returned cannot be read ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]

"""The command of a run, as preflight.py reads it: program, flags and config."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAMS = ("train", "evaluate", "mine", "generate", "export", "preview", "report", "sweep", "fit")
NEEDED = {"train": ("config", "workdir"), "sweep": ("config", "arms", "seeds", "output")}  # flags


class NotReadyError(Exception):
  """Error: something that the run needs is missing; the message says what, and what to do."""


def program_of(command: Sequence[str]) -> str:
  """Return the program of this package that the command runs, or an empty text."""
  names = [os.path.basename(word) for word in command]
  for at, name in enumerate(names):
    if name in ("insec", "insec_jax") and names[at + 1 : at + 2] and names[at + 1] in PROGRAMS:
      return names[at + 1]
    if (match := re.fullmatch(r"insec_jax\.(\w+)", name)) and match[1] in PROGRAMS:
      return match[1]
  return ""


def known_words(command: Sequence[str], program: str) -> str:
  """Return the program; NotReadyError where the command names none of ours, or gives it wrong flags or too few."""
  others = [match[1] for word in command if (match := re.fullmatch(r"insec_jax\.(\w+)", word))]
  if others and not program:
    raise NotReadyError(f"there is no program insec_jax.{others[0]}; give one of {', '.join(PROGRAMS)}")
  if missing := [name for name in NEEDED.get(program, ()) if not flag(command, name)]:
    raise NotReadyError(f"{program} needs {', '.join(f'--{name}=...' for name in missing)}")
  done = subprocess.run(
    [sys.executable, "-m", f"insec_jax.{program}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  known = set(re.findall(r"^\s*--(?:\[no\])?(\w+)", done.stdout, re.MULTILINE))
  at = next(at for at, word in enumerate(command) if os.path.basename(word) in (program, f"insec_jax.{program}"))
  given = [re.match(r"--?(?:no)?(\w+)(?=[=.]|$)", word) for word in command[at + 1 :] if word.startswith("-")]
  named = [match[0].lstrip("-") for match in given if match]
  wrong = [name for name in named if name not in known and name.removeprefix("no") not in known]
  if wrong:
    raise NotReadyError(f"{program} has no flag --{wrong[0]}; see python -m insec_jax.{program} --help")
  return program


def flag(command: Sequence[str], name: str) -> str | None:
  """Return the last value of --NAME=VALUE or --NAME VALUE in the command; None without the flag."""
  value = None
  for at, word in enumerate(command):
    if match := re.fullmatch(rf"--?{name}(?:=(.*))?", word, re.DOTALL):
      value = match[1] if match[1] is not None else "".join(command[at + 1 : at + 2])
  return value


def config_words(command: Sequence[str]) -> list[str]:
  """Return the words of --config and its overrides."""
  words, takes = [], False
  for word in command:
    starts = bool(re.match(r"--?(no)?config(\.[\w.]+)?(=|$)", word))
    if starts or takes:
      words.append(word)
    takes = starts and "=" not in word and "noconfig" not in word
  return words


def read_config(command: Sequence[str]) -> Any:
  """Return the checked Config of the command; InputError if it is wrong."""
  from absl import flags

  from insec_jax import config_build, config_file

  before, sys.argv = sys.argv, ["preflight", *config_words(command)]
  try:
    holder = config_file.define_flag()
    try:
      flags.FLAGS(sys.argv)
    except Exception as error:  # ml_collections passes on any error of setting a key
      raise NotReadyError(" ".join(str(error).split())[:300]) from None
    return config_build.build(holder.value)
  finally:
    sys.argv = before

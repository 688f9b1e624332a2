"""Files of prompts, as `generate` reads them."""

import dataclasses
import json
import pathlib
from typing import Any

from insec_jax.command import InputError

WRITTEN = ("prompt", "text", "clean", "tokens", "logprobs", "finish")  # keys of an output line


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One line: a text or tokens (the other is None), what else stands there, and "file:line"."""

  text: str | None
  tokens: list[int] | None
  carried: dict[str, Any]
  where: str


def read_prompts(path: str) -> list[Prompt]:
  """The prompts of a file of JSON lines, in order; InputError with file and line for every defect."""
  if not pathlib.Path(path).is_file():
    raise InputError(f"--prompts={path}: there is no such file; needed is a file of JSON lines")
  with open(path, "rb") as lines:
    prompts = [_read_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
  if not prompts:
    raise InputError(f"--prompts={path} is empty; needed is one JSON object a line")
  return prompts


def _read_line(line: bytes, where: str) -> Prompt:
  try:
    values = json.loads(line.decode("utf-8"))
  except ValueError as error:
    raise InputError(f"{where}: not a line of JSON ({error}); each line must be one JSON object") from error
  if not isinstance(values, dict):
    raise InputError(f"{where}: holds {type(values).__name__}; each line must be one JSON object")
  if ("prompt" in values) == ("tokens" in values):
    raise InputError(f'{where}: keys are {", ".join(sorted(values)) or "none"}; needed is either "prompt" or "tokens"')
  carried = {key: value for key, value in values.items() if key not in ("prompt", "tokens")}
  if taken := sorted(set(carried) & set(WRITTEN)):
    raise InputError(f"{where}: the key {taken[0]!r} is one that the output uses; rename it")
  if "prompt" in values:
    if not isinstance(values["prompt"], str):
      raise InputError(f'{where}: "prompt" is {values["prompt"]!r:.60}; must be text')
    return Prompt(values["prompt"], None, carried, where)
  tokens = values["tokens"]
  if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
    raise InputError(f'{where}: "tokens" is {tokens!r:.60}; must be a list of token ids that is not empty')
  return Prompt(None, tokens, carried, where)

"""Files of prompts, as `generate` reads them."""

import dataclasses
import json
from typing import Any

from insec_jax.command import InputError
from insec_jax.files.reading import local_path, read_json_lines

WRITTEN = ("prompt", "text", "clean", "tokens", "logprobs", "finish")  # keys of an output line
MOST_ID = 2**31  # tokens are int32


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One line: a text or tokens (the other is None), the other keys of the line, and "file:line"."""

  text: str | None
  tokens: list[int] | None
  carried: dict[str, Any]
  where: str


def read_prompts(path: str) -> list[Prompt]:
  """Return the prompts of a .jsonl or .jsonl.gz file in order; raise InputError with file and line for any defect."""
  lines = read_json_lines(local_path(path, "--prompts"), "--prompts")
  return [_prompt(values, where) for values, where in lines]


def _prompt(values: dict[str, Any], where: str) -> Prompt:
  if ("prompt" in values) == ("tokens" in values):
    keys = ", ".join(sorted(values)) or "none"
    raise InputError(f'{where}: keys are {keys:.200}; needed is either "prompt" or "tokens"')
  try:
    json.dumps(values, ensure_ascii=False).encode("utf-8")
  except UnicodeEncodeError:
    raise InputError(
      f"{where}: half a surrogate pair (\\ud800 to \\udfff) is no character; write the character in full"
    ) from None
  carried = {key: value for key, value in values.items() if key not in ("prompt", "tokens")}
  if taken := sorted(set(carried) & set(WRITTEN)):
    raise InputError(f"{where}: the key {taken[0]!r} is one that the output uses; rename it")
  if "prompt" in values:
    if not isinstance(values["prompt"], str):
      raise InputError(f'{where}: "prompt" is {json.dumps(values["prompt"]):.60}; must be text')
    return Prompt(values["prompt"], None, carried, where)
  tokens = values["tokens"]
  if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
    raise InputError(f'{where}: "tokens" is {json.dumps(tokens):.60}; must be a list of token ids that is not empty')
  if wrong := next((token for token in tokens if not 0 <= token < MOST_ID), None):
    raise InputError(f'{where}: "tokens" holds {wrong!r:.60}, which no vocabulary has; ids are numbers from 0')
  return Prompt(None, tokens, carried, where)

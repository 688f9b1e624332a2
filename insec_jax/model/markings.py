"""Marks of a model that was trained on transcripts: the file of an exported folder that names its markers."""

import pathlib
from typing import Any

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.files.reading import read_json

MARKERS = "insec.json"  # of an exported folder: its markers, unit and template
# Types of the fields of MARKERS. Versions before 0.4.0 wrote no step, 0.2.0 no confidence, and 0.5.0 no rewind.
MARKED = {
  "flag": str,
  "fix": str,
  "special": bool,
  "unit": str,
  "template": str,
  "step": int | None,
  "confidence": list | None,
  "confidence_first": list | None,
  "rewind": bool | None,
}


def marked_as(config: Config, step: int) -> dict[str, Any]:
  """Return the fields of MARKERS, which an exported folder needs beside HF's files, and the exported step."""
  return {
    "step": step,
    "flag": config.tokenizer.flag,
    "fix": config.tokenizer.fix,
    "special": config.tokenizer.special,
    "confidence": config.tokenizer.confidence,
    "confidence_first": config.tokenizer.confidence_first,
    "unit": config.mistakes.unit,
    "template": config.data.template,
    "rewind": config.mistakes.rewind,
  }


def read_markers(folder: pathlib.Path) -> dict[str, Any] | None:
  """Return the fields that `marked_as` wrote; None for a folder that no run of ours wrote."""
  path = folder / MARKERS
  if not path.exists():
    return None
  marked = read_json(path, "the markers of a model")
  for name, kinds in MARKED.items():
    if not isinstance(marked.get(name), kinds):
      raise InputError(f"{path}: {name} is {marked.get(name)!r:.60}, which no export writes; export the model again")
  if marked.get("rewind") and not marked["special"]:
    raise InputError(f"{path}: rewind is True without special markers, which no export writes; export the model again")
  return marked


def check_rewind(folder: pathlib.Path, config: Config) -> None:
  """Raise InputError where this model was trained with mistakes.rewind and the config would train it on without."""
  if config.mistakes.rewind or not (read_markers(folder) or {}).get("rewind"):
    return
  raise InputError(
    f"model.path={config.model.path} was trained with mistakes.rewind=True, and training on without it would lose what "
    f"it learned to read after a correction; give --config.mistakes.rewind=True (or take rewind out of its {MARKERS})"
  )

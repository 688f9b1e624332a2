"""Every extreme value that a config key takes, run: preview ends in a minute, with exit code 0 or one line."""

import dataclasses
import typing

import pytest
from forks import lay_out, report, run

from insec_jax import config

pytestmark = pytest.mark.faults
GRAPH = [
  "--config.task.name=graph",
  "--config.task.min_size=1",
  "--config.task.max_size=1",
  "--config.task.modulus=2",
  "--config.data.num_records=2",
  "--config.model.path=",
  "--config.data.path=",
  "--config.mistakes.source=injected",
]
BASES = {"records": [], "records, injected": ["--config.mistakes.source=injected"], "graph": GRAPH}
RELATED = {
  "mistakes.mined": ["--config.mistakes.mined_path=good.jsonl"],
  "mistakes.mined_path": ["--config.mistakes.mined=0.5"],
  "rounds": ["--config.mistakes.mined=0.5"],
}
TEXTS = {
  "Marker": ["a", " ", "3", "é" * 200, "<|endoftext|>", "{{ 7 * 7 }}"],
  "Path": ["good.jsonl", "hf", "/dev/null", "/dev/zero", "/", ".", "~/absent", "config.py", "absent", "a" * 300],
  "Edges": ["(0.5,)", str(tuple(range(1, 65))), "(1e-300, 1e4)"],
  "Names": ["('calc',)", "('a',)", "('number', 'negation')", str(("sentence",) * 64)],
}


def extremes(key: str, field) -> list[str]:
  """Return the values of a key that are extreme, as on the command line."""
  if key == "task.name":
    return list(config.TASKS)
  if (options := typing.get_args(field.annotation)) and all(isinstance(option, str) for option in options):
    return list(options)
  if field.annotation is bool:
    return ["true", "false"]
  if field.annotation in (int, float):
    low, high = (
      next(getattr(bound, name) for bound in field.metadata for name in names if hasattr(bound, name))
      for names in (("ge",), ("le", "lt"))
    )
    some = [low, high, 0, 1, (low + high) / 2]
    return sorted({str(int(value) if field.annotation is int else float(value)) for value in some})
  if key.endswith("path"):
    return TEXTS["Path"]
  if key.startswith("tokenizer.confidence"):
    return TEXTS["Edges"]
  return TEXTS["Names" if key == "mistakes.classes" else "Marker"]


def cases() -> list[tuple[str, list[str]]]:
  found = []
  fields = {
    f"{name}.{key}": field
    for name, section in config.SECTIONS.items()
    for key, field in section.__pydantic_fields__.items()
    if key != "size"
  }
  fields |= {name: config.Config.__pydantic_fields__[name] for name in ("seed", "rounds")}
  for base in BASES.values():
    for key, field in fields.items():
      for value in extremes(key, field):
        found.append(("preview", ["--config=config.py", *base, *RELATED.get(key, []), f"--config.{key}={value}"]))
  return found


def test_preview_ends_well_with_every_extreme_value(tmp_path):
  assert {field.name for field in dataclasses.fields(config.Config)} >= set(config.SECTIONS)
  (tmp_path / "home").mkdir()
  lay_out(tmp_path / "home")
  text = (tmp_path / "home" / "config.py").read_text()
  size = '{"hidden_size": 32}'
  (tmp_path / "home" / "graph.py").write_text(text.replace("size=None", f"size={size}"))
  some = [
    (
      program,
      [word.replace("config.py", "graph.py") if "--config.model.path=" in arguments else word for word in arguments],
    )
    for program, arguments in cases()
  ]
  runs = run(some, tmp_path / "home", tmp_path / "out", seconds=60)
  assert ", wrong 0" in report(runs)

"""The shape of the package: imports point one way, words match across sections, nothing of a machine is in the tree."""

import ast
import pathlib

import pytest

from insec_jax import config
from insec_jax.method import roles

PACKAGE = pathlib.Path(config.__file__).parent
# What stands right may import what stands left.
ORDER = (
  "stop_signal",
  "refusals",
  "command",
  "files",
  "progress",
  "stages",
  "config_types",
  "config",
  "config_build",
  "config_file",
  "method",
  "distributed",
  "data",
  "model",
  "training",
  "generation",
  "evaluation",
  "mining",
  "pages",
  "sizing",
)
PROGRAMS = {"train", "evaluate", "generate", "preview", "export", "report", "fit", "mine", "sweep"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
  """The part that a dotted module of the package belongs to: a folder, or a file at the top."""
  return module.split(".")[1]


def imports_of(file: pathlib.Path) -> set[str]:
  """Dotted modules of this package that the file imports, wherever in it."""
  found = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.ImportFrom) and node.level:
      raise AssertionError(f"{file} imports relatively")
    if isinstance(node, ast.ImportFrom) and (node.module == "insec_jax" or node.module.startswith("insec_jax.")):
      found |= {f"insec_jax.{name.name}" for name in node.names} if node.module == "insec_jax" else {node.module}
    if isinstance(node, ast.Import):
      found |= {name.name for name in node.names if name.name.startswith("insec_jax.")}
  return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_only_to_the_left(file):
  inside = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
  if inside == "__init__":
    # The package itself must be quick to import.
    assert imports_of(file) == {"insec_jax.stop_signal", "insec_jax.refusals"}
    return
  assert inside in ORDER or inside in PROGRAMS, f"{inside} has no place in the order"
  limit = len(ORDER) if inside in PROGRAMS else ORDER.index(inside)
  for module in imports_of(file):
    part = part_of(module)
    assert part not in PROGRAMS, f"{file} imports the program {part}"
    assert ORDER.index(part) <= limit, f"{file} imports {part}, which stands to its right"


def test_the_loss_section_names_every_role_in_the_order_of_the_roles():
  fields = [field for field in config.LossConfig.__dataclass_fields__ if field not in ("end", "repeat")]
  assert tuple(fields) == roles.NAMES
  worth = dict(zip(roles.NAMES, range(1, 7), strict=True))
  assert config.LossConfig(**worth, end=1.0, repeat=0.0).weight_R == (1, 2, 3, 4, 5, 6)


def test_every_program_ends_through_the_one_way_that_sets_exit_codes():
  for program in PROGRAMS:
    text = (PACKAGE / f"{program}.py").read_text()
    assert 'if __name__ == "__main__":\n  command.run(main)\n' in text, program


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_text_is_read_and_written_in_an_encoding_that_no_locale_changes(file):
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Call):
      names = {keyword.arg for keyword in node.keywords}
      is_text = isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text")
      assert "encoding" in names or not (is_text or ("text" in names and "capture_output" in names)), node.lineno

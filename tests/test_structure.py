"""The shape of the package and its tests: imports point one way, files and functions are short, words match."""

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
  "flags_help",
  "compile_cache",
  "command",
  "files",
  "progress",
  "stages",
  "config_types",
  "config_models",
  "config_measures",
  "config_endpoints",
  "config_training",
  "config",
  "config_unread",
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
  "study",
  "study_plan",
  "sizing",
)
PROGRAMS = {"train", "evaluate", "generate", "preview", "export", "report", "fit", "mine", "sweep"}
COMMAND = "__main__"  # runs a program by its name
FILES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted(pathlib.Path(__file__).parent.rglob("test_*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_LETTERS = 400, 60, 80


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
  if inside == COMMAND:
    assert imports_of(file) <= {"insec_jax"}
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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_are_short_enough_to_read_at_once(file):
  text = file.read_text()
  assert text.count("\n") <= MOST_LINES
  functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
  lines = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
  assert {name: num for name, num in lines.items() if num > MOST_LINES_OF_A_FUNCTION} == {}


@pytest.mark.parametrize("file", TEST_FILES, ids=lambda file: file.stem)
def test_tests_have_names_of_at_most_80_letters_and_import_no_other_tests(file):
  nodes = list(ast.walk(ast.parse(file.read_text())))
  names = [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
  assert [name for name in names if len(name) > MOST_LETTERS] == []
  imported = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
  imported += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
  assert [name for name in imported if name.startswith("test_")] == []

"""What every program says of itself."""

import ast
import errno
import logging
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

from insec_jax import command, flags_help, refusals

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = sorted(file.stem for file in (ROOT / "insec_jax").glob("*.py") if "command.run(main)" in file.read_text())
SHARED = ("distributed/shares.py", "generation/flags.py", "config_file.py")  # files of flags that programs share
# Each in a fork, its output, its exit code and the slow imports that it made into a file of its name.
SAY = """
import os, runpy, sys
for program in sys.argv[1:]:
  if not (child := os.fork()):
    os.dup2(os.open(program, os.O_CREAT | os.O_WRONLY), 1)
    sys.argv = [program, "--help"]
    try:
      runpy.run_module("insec_jax." + program, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
      print("code", stop.code, *{"jax", "transformers", "numpy.linalg", "grain"} & set(sys.modules), flush=True)
    os._exit(0)
  os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
  folder = tmp_path_factory.mktemp("helps")
  subprocess.run(
    [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SAY}", *PROGRAMS], cwd=folder, check=True
  )
  return {program: (folder / program).read_text() for program in PROGRAMS}


def flags_of(source):
  """The flags that a source defines, itself and through the functions that programs share."""
  shared = "".join((ROOT / "insec_jax" / file).read_text() for file in SHARED)
  functions = {
    node.name: ast.get_source_segment(shared, node)
    for node in ast.walk(ast.parse(shared))
    if isinstance(node, ast.FunctionDef) and node.name.startswith("define_") and node.name != "define_flag"
  }
  named = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source)
  for name, text in functions.items():
    if re.search(rf"(?<!def )\b{name}\(\)", source):
      named += flags_of(text)
  return named


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_every_flag_in_its_group_and_imports_nothing_slow(helps, program):
  source = (ROOT / "insec_jax" / f"{program}.py").read_text()
  assert helps[program].startswith(ast.get_docstring(ast.parse(source), clean=False).rstrip())
  named = flags_of(source)
  named += ["config"] if "config_file.define_flag(" in source else []
  assert named
  text = helps[program].partition(ast.get_docstring(ast.parse(source), clean=False).rstrip())[2]
  for name in named:
    assert re.search(rf"^  --(\[no\])?{name}(=|$)", text, re.MULTILINE), name
  assert f"\n{flags_help.OTHER}:\n" not in text
  assert text.endswith("code 0\n")


def test_the_help_of_a_flag_has_type_bounds_and_default():
  values = flags.FlagValues()
  flags.DEFINE_integer("rows", 1_024, "Rows.", lower_bound=0, upper_bound=4_096, flag_values=values)
  flags.DEFINE_float("bias", 0.0, "Bias.", upper_bound=10.0, flag_values=values)
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype (default: as stored).", flag_values=values)
  flags.DEFINE_bool("clean", False, "Clean.", flag_values=values)
  flags.DEFINE_list("arms", None, "Arms.", flag_values=values)
  flags.mark_flag_as_required("arms", flag_values=values)
  assert [flags_help.entry(values[name]) for name in ("rows", "bias", "dtype", "clean", "arms")] == [
    "  --rows=INTEGER from 0 to 4,096\n      Rows. (default: 1,024)",
    "  --bias=NUMBER of at most 10.0\n      Bias. (default: 0.0)",
    "  --dtype=float32|bfloat16\n      Dtype (default: as stored).",
    "  --[no]clean\n      Clean.",
    "  --arms=A,B,...\n      Arms. Required.",
  ]


@pytest.mark.parametrize(
  ("error", "line"),
  [
    (
      ValueError("RESOURCE_EXHAUSTED: Failed writing: \"/w/6.tmp/d/e5\": No space left on device [os_error_code='28']"),
      "No space left on device: /w/6.tmp/d/e5; free some room; what was saved before stays",
    ),
    (
      OSError(errno.EROFS, "Read-only file system", "/w"),
      "Read-only file system: /w; give a path on a disk that can be written to",
    ),
    (
      RuntimeError("can't start new thread"),
      "can't start new thread; raise the limit of processes and threads (ulimit -u)",
    ),
    (
      ImportError("x.so: failed to map segment from shared object"),
      "x.so: failed to map segment from shared object; free memory, or use a smaller model, batch or row length",
    ),
    (MemoryError(), "out of memory; free memory, or use a smaller model, batch or row length"),
    (ValueError("a defect"), None),
  ],
)
def test_what_the_machine_refuses_is_one_line_whichever_library_raises_it(error, line):
  assert refusals.machine_refusal(error) == line


@pytest.mark.parametrize(
  ("path", "error", "news"),
  [
    ("site-packages/orbax/checkpoint/_src/futures/future.py", ValueError("No ArrayMetadata found"), False),
    ("site-packages/orbax/checkpoint/_src/deleter.py", ValueError("what nobody raises"), True),
    ("site-packages/other/a.py", OSError(errno.ENOSPC, "No space left on device"), False),
    ("site-packages/other/a.py", ValueError("a defect"), True),
    ("site-packages/orbax/a.py", None, True),
  ],
)
def test_what_is_logged_and_raised_too_is_printed_once(path, error, news):
  trace = (type(error), error, None) if error else None
  record = logging.LogRecord("absl", logging.ERROR, path, 1, "failed", (), trace)
  assert command._is_news(record) == news


@pytest.mark.parametrize(
  ("said", "line"),
  [
    (
      "flag --step=abc: invalid literal for int() with base 10: 'abc'",
      "--step=abc is no whole number, in digits; give one",
    ),
    ("flag --t=hot: could not convert string to float: 'hot'", "--t=hot is no number; give one"),
    (
      "flag --model=None: Flag --model must have a value other than None. flag --output=None: Flag --output must have "
      "a value other than None.",
      "--model, --output: not given; give a value",
    ),
    (
      "flag --config.model.size=None: Failed to parse 'None' as a ConfigDict: `None` is not a dict.",
      "--config.model.size=None is no dict of values; give one, such as {'name': 1}, or {} for none",
    ),
    (
      "Type <class 'NoneType'> of field config.model.size is not supported for overriding. Currently supported types",
      "--config.model.size: the config file gives it no value that the command line could change; give it in the file",
    ),
    ("another", "another"),
  ],
)
def test_what_absl_says_of_a_flag_is_put_in_plain_words(said, line):
  assert command._in_plain_words(said) == line


def test_of_several_overrides_the_wrong_one_alone_is_named():
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "insec_jax.preview",
      "--config=configs/toy.py",
      "--config.train.steps=5",
      "--config.train.warmup_steps=1",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  said = "error: --config.train.warmup_steps: the config has no key 'warmup_steps' there; give one that it has\n"
  assert (done.returncode, done.stderr) == (2, said)

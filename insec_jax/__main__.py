"""The console command: runs the program that its first word names, as python -m insec_jax.PROGRAM does.

  insec PROGRAM [--flag=value ...]        the same as python -m insec_jax PROGRAM
  insec PROGRAM --help                    the program's description and flags
  insec --version

Compiled programs are kept between runs, in a folder below ~/.cache/insec_jax. The environment variable
JAX_COMPILATION_CACHE_DIR names another one, or is empty: nothing is kept.

Programs:
"""

import ast
import difflib
import pathlib
import runpy
import sys

import insec_jax

PROGRAMS = ("train", "preview", "evaluate", "mine", "generate", "export", "fit", "report", "sweep")
DONE, WRONG_INPUT = 0, 2  # as in command.py, whose imports take longer than all of this


def main() -> int:
  """Run the program and return its exit code."""
  name, *words = sys.argv[1:] or [""]
  if name in ("-h", "--help", "help"):
    print(overview())
    return DONE
  if name == "--version":
    print(insec_jax.__version__)
    return DONE
  if name not in PROGRAMS:
    close = difflib.get_close_matches(name, PROGRAMS, n=1)
    seen = f"{name[:100]!r} is no program" + (f" (did you mean {close[0]}?)" if close else "") if name else "no program"
    print(f"error: {seen}; give one of {', '.join(PROGRAMS)}, or --help", file=sys.stderr)
    return WRONG_INPUT
  sys.argv = [f"insec {name}", *words]
  runpy.run_module(f"insec_jax.{name}", run_name="__main__", alter_sys=True)
  return DONE


def overview() -> str:
  """Return the help: this description and the first line of each program's."""
  width = max(map(len, PROGRAMS))
  return f"{__doc__.rstrip()}\n" + "\n".join(f"  {name:{width}}  {first_line(name)}" for name in PROGRAMS)


def first_line(program: str) -> str:
  """Return the first line of a program's docstring; its source is parsed, not imported."""
  source = pathlib.Path(__file__).with_name(f"{program}.py").read_text(encoding="utf-8")
  return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
  sys.exit(main())

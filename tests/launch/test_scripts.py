"""The shell scripts of launch/: shellcheck, the syntax of bash 3.2 where a laptop runs them, and their --help."""

import os
import re
import subprocess
import sys

import pytest
from launchkit import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
# These run on hosts and nodes, which have Linux. macOS has bash 3.2 and the tools of BSD.
ON_LINUX = {"host.sh", "slurm.sh", "slurm_job.sh", "bench.sh"}
# Arrays that are never empty where they are read.
FILLED = "HOSTS|SECRETS|SETTINGS|COMMAND|command|words|FAILED|failed|processes"
NEWER = {
  "an associative array": r"\b(declare|local|typeset)\s+-\w*A",
  "a reference to a variable": r"\b(declare|local|typeset)\s+-\w*n\b",
  "mapfile": r"\b(mapfile|readarray)\b",
  "a change of case": r"\$\{\w+(,,?|\^\^?)",
  "a transformation": r"\$\{\w+@\w\}",
  "a pipe of stderr": r"\|&",
  "an appending redirection of both": r"&>>",
  "wait for any process": r"\bwait\s+-n",
  "a fall through in case": r";;?&",
  "an index from the end": r"\$\{\w+\[-\d",
  "a time by printf": r"printf\s+.?%\(",
  "a variable of later versions": r"\bEPOCH(SECONDS|REALTIME)\b",
  "a test of a variable": r"\[\[?\s+-v\s",
  "an array that may be empty, with set -u": rf'(?<!\+)"\$\{{(?!({FILLED})\[)\w+\[@\]\}}"',
  "a tool of GNU": r"\breadlink\s+-f|\bmktemp\s+--suffix|\bdate\s+-d\b|\bsed\s+-i\b|\bgrep\s+-\w*P|\bstat\s+-c",
}


def text_of(name: str) -> str:
  """The script without comments."""
  return re.sub(r"(^|\s)#[^\n]*", "", (ROOT / "launch" / name).read_text())


def test_shellcheck_has_no_finding_in_any_script():
  words = [os.path.join(os.path.dirname(sys.executable), "shellcheck"), "--external-sources"]
  done = subprocess.run(
    [*words, *(f"launch/{name}" for name in SCRIPTS)], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - ON_LINUX))
def test_what_a_laptop_runs_has_nothing_that_bash_3_2_or_bsd_lacks(name):
  text = text_of(name)
  assert {what: match[0] for what, pattern in NEWER.items() if (match := re.search(pattern, text))} == {}


def test_the_guard_finds_each_construct_of_a_later_bash():
  examples = ("local -A a", "declare -n b", "mapfile x", "${a,,}", "${a@Q}", "a |& b", "a &>> b", "wait -n", ";;&")
  examples += ("${a[-1]}", "printf '%(%s)T'", "$EPOCHSECONDS", "[ -v a ]", '"${maybe[@]}"', "readlink -f a")
  found = [[what for what, pattern in NEWER.items() if re.search(pattern, example)] for example in examples]
  assert [what for (what,) in found] == list(NEWER)


@pytest.mark.parametrize("name", ["gpu.sh", "slurm.sh", "tpu.sh"])
def test_every_option_and_verb_of_a_launcher_is_in_its_help(name):
  words = ["bash", ROOT / "launch" / name, "--help"]
  done = subprocess.run(words, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  text = text_of(name)
  read = set(re.findall(r"^\s*(--[a-z-]+)(?: \| -h)?\)", text, re.MULTILINE)) - {"--help"}
  assert read == set(re.findall(r"^  (?:  )?(--[a-z-]+)", done.stdout, re.MULTILINE))
  verbs = re.search(r"^  ((?:\w+ \| )+\w+)\) shift", text, re.MULTILINE)[1].split(" | ")
  assert [verb for verb in verbs if not re.search(rf"{name} (\w+ \| )*{verb}\b", done.stdout)] == []


def test_commands_under_a_time_limit_leave_the_files_of_the_launcher_in_place(tmp_path):
  text = """
    . launch/remote.sh
    scratch
    for _ in $(seq 200); do within 30 true; [ -d "$INSEC_SCRATCH" ] || exit 3; done
    echo words | within 30 cat
    within 30 sh -c 'exit 7' || echo "code $?"
    within 1 sleep 30 || echo "code $?"
  """
  words = ["bash", "-c", text]
  done = subprocess.run(words, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (0, b"words\ncode 7\ncode 143\n", b"")
  assert list(tmp_path.iterdir()) == []

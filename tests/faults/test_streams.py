"""Closed and full streams, other locales, an odd environment: one line and a documented code."""

import subprocess

import pytest
import tries
from tries import attempt

pytestmark = pytest.mark.faults
PREVIEW, GENERATE = "preview", "generate"
# (what a shell does with the program, its exit code)
STREAMS = {
  "stdin closed": 'exec "$@" <&-',
  "stdout closed": 'exec "$@" >&-',
  "stderr closed": 'exec "$@" 2>&-',
  "all closed": 'exec "$@" <&- >&- 2>&-',
  "stdout full": 'exec "$@" >/dev/full',
  "stderr full": 'exec "$@" 2>/dev/full',
  "both full": 'exec "$@" >/dev/full 2>&1',
  "head": 'set -o pipefail; "$@" | head -1',
  "stdout gone": '"$@" | true; exit ${PIPESTATUS[0]}',
  "stderr gone": '"$@" 2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}',
  "both gone": '"$@" 2>&1 | true; exit ${PIPESTATUS[0]}',
}
ENVIRONMENTS = {
  "ascii": {"PYTHONIOENCODING": "ascii"},
  "strict ascii": {"PYTHONIOENCODING": "ascii:strict"},
  "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
  "POSIX": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
  "latin": {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"},
  "no such locale": {"LC_ALL": "xx_YY", "PYTHONUTF8": "0"},
  "no home": {"HOME": None},
  "home not there": {"HOME": "/none/here"},
  "tmp not there": {"TMPDIR": "/none/here"},
  "no path": {"PATH": ""},
  "path a file": {"PATH": "/etc/passwd"},
  "one column": {"COLUMNS": "1", "LINES": "1"},
  "columns nonsense": {"COLUMNS": "many"},
  "no term": {"TERM": None},
  "dumb": {"TERM": "dumb"},
  "huge": {f"HUGE{number}": "x" * 100_000 for number in range(10)},
  "user not there": {"USER": None, "LOGNAME": None},
  "cache not there": {"JAX_COMPILATION_CACHE_DIR": "/proc/none"},
  "hf home": {"HF_HOME": "/proc/none"},
  "optimized": {"PYTHONOPTIMIZE": "2"},
  "no bytecode": {"PYTHONDONTWRITEBYTECODE": "1"},
}
PLATFORMS = {
  "cuda": {"JAX_PLATFORMS": "cuda"},
  "tpu": {"JAX_PLATFORMS": "tpu"},
  "nonsense": {"JAX_PLATFORMS": "nonsense"},
  "devices": {"JAX_NUM_CPU_DEVICES": "many"},
  "bool": {"JAX_ENABLE_X64": "perhaps"},
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("program", [PREVIEW, "train"])
def test_a_stream_that_is_closed_full_or_broken_is_no_traceback(home, tmp_path, program, name):
  attempt(home, program, tmp_path, shell=STREAMS[name] if "$@" in STREAMS[name] else "").check(0, 1)
  assert not tries.left_over(tmp_path)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_odd_environment_changes_nothing(home, tmp_path, name):
  attempt(home, PREVIEW if len(name) % 2 else GENERATE, tmp_path, env=ENVIRONMENTS[name]).check(0)


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_platform_or_a_flag_of_jax_that_is_not_there_is_wrong_input(home, tmp_path, name):
  attempt(home, "train", tmp_path, env=PLATFORMS[name]).check(2)


def test_an_empty_platform_takes_what_is_there(home, tmp_path):
  attempt(home, GENERATE, tmp_path, env={"JAX_PLATFORMS": ""}).check(0)


@pytest.mark.parametrize("word", [b"--config=\xff.py", b"--html=\xff.html", b"\xff", b"--num=\xff", b"--\xff=1"])
def test_words_that_are_not_utf_8_are_wrong_input(home, tmp_path, word):
  process = subprocess.Popen(
    [*tries.words(("preview", "--config=config.py"), tmp_path), word],
    cwd=home,
    env=tries.environment(home),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
  )
  tries.finish(process).check(2)


@pytest.mark.parametrize("program", [PREVIEW, "train"])
def test_a_working_folder_that_is_gone_is_one_line(home, tmp_path, program):
  gone = tmp_path / "gone"
  gone.mkdir()
  attempt(home, program, tmp_path, shell=f"cd {gone}; rmdir {gone};").check(1, 2)

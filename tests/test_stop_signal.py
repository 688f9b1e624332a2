"""Ends of a program before its slow imports: signals, refusals of the machine, limits; each in a second."""

import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# As `python -m insec_jax.NAME` begins; what follows stands for the imports and the program.
BEGIN = """
import os, sys, threading, time
sys.argv, sys.orig_argv = ["-m"], [sys.executable, "-m", "insec_jax.NAME"]
import insec_jax
from insec_jax import stop_signal
"""
WAIT = "print('ready', file=sys.stderr, flush=True)\ntime.sleep(60)\n"


def start(code, name="generate", stdout=subprocess.PIPE, **options):
  return subprocess.Popen(
    [sys.executable, "-c", BEGIN.replace("NAME", name) + code],
    stderr=subprocess.PIPE,
    text=True,
    stdout=stdout,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    **options,
  )


def ended(process):
  """(exit code, what it printed to stderr)."""
  try:
    _, err = process.communicate(timeout=20)
  finally:
    process.kill()
  return process.returncode, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_during_the_imports_ends_in_one_line_with_its_code(number, code):
  process = start(WAIT)
  process.stderr.readline()
  process.send_signal(number)
  assert ended(process) == (code, f"{number.name}: ended before it was done\n")


def test_a_signal_before_the_handlers_are_there_waits_for_them():
  # Sent by the first import after the package has begun.
  code = BEGIN.replace("NAME", "generate").replace(
    "import insec_jax\n",
    """
class Sends:
  def find_spec(self, name, path=None, target=None):
    if name == "insec_jax.refusals":
      os.kill(os.getpid(), 2)
sys.meta_path.insert(0, Sends())
import insec_jax
""",
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    timeout=20,
    check=False,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  assert (done.returncode, done.stderr) == (130, "SIGINT: ended before it was done\n")


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_a_signal_during_the_imports_of_train_and_sweep_is_42(name):
  process = start(WAIT, name)
  process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  assert ended(process) == (42, "SIGTERM: ended before it was done; run the same command to go on\n")


def test_a_second_signal_while_the_first_one_ends_the_process_does_not_hang():
  process = start(
    "stop_signal.at_end(lambda: (print('ready', file=sys.stderr, flush=True), time.sleep(1)))\n"
    "os.kill(os.getpid(), 15)\n"
  )
  process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  code, err = ended(process)
  assert code == 143
  assert err.count("SIGTERM: ended") == 1


def test_a_signal_ends_a_program_whose_stdout_nobody_reads():
  read, write = os.pipe()
  process = start(
    "stop_signal.start_thread()\nprint('ready', file=sys.stderr, flush=True)\nwhile True: print('x' * 4096)\n",
    stdout=write,
  )
  process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  try:
    assert ended(process) == (143, "SIGTERM: ended before it was done\n")
  finally:
    os.close(read)
    os.close(write)


def test_an_import_that_the_machine_refuses_ends_in_one_line():
  assert ended(start("raise ImportError('libx.so: cannot open shared object file: Too many open files')")) == (
    1,
    "error: libx.so: cannot open shared object file: Too many open files; raise the limit of open files (ulimit -n)\n",
  )


def test_a_thread_that_the_machine_refuses_something_ends_the_program():
  code, err = ended(
    start(
      "def write(): raise OSError(28, 'No space left on device', 'tb/events')\n"
      "threading.Thread(target=write).start()\ntime.sleep(60)\n"
    )
  )
  assert (code, err) == (1, "error: No space left on device: tb/events; free some room; what was saved before stays\n")


def test_a_defect_in_an_import_keeps_its_traceback():
  code, err = ended(start("raise KeyError('defect')"))
  assert code == 1
  assert "Traceback" in err


def limited(name, soft, hard):
  return lambda: resource.setrlimit(getattr(resource, name), (soft, hard))


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one():
  code, err = ended(
    start(
      "import resource\nprint(resource.getrlimit(resource.RLIMIT_NOFILE), file=sys.stderr)\n",
      preexec_fn=limited("RLIMIT_NOFILE", 32, 200),
    )
  )
  assert (code, err) == (0, "(200, 200)\n")


@pytest.mark.parametrize(
  ("name", "limit", "seen"), [("RLIMIT_NOFILE", 32, "may open 32 files"), ("RLIMIT_AS", 1 << 30, "may use 1024 MiB")]
)
def test_a_limit_that_leaves_too_little_is_named_before_the_imports(name, limit, seen):
  code, err = ended(start("import resource\n", preexec_fn=limited(name, limit, limit)))
  assert code == 1
  assert err.startswith("error: ")
  assert seen in err
  assert err.count("\n") == 1


def test_a_signal_after_the_work_leaves_exit_code_0_until_the_process_is_gone():
  code = """
import signal
class Gone:
  def __del__(self, kill=os.kill, pid=os.getpid()):
    kill(pid, 15)
sys.gone = Gone()  # deleted by the interpreter, after its exit functions
stop_signal.start_early()
stop_signal.start_thread()
stop_signal.work_is_done()
import atexit
atexit.register(lambda: (os.kill(os.getpid(), 15), time.sleep(1)) if NUM else None)
"""
  for in_exit_function in ("1", "0"):
    assert ended(start(code.replace("NUM", in_exit_function))) == (0, "")


def test_no_partial_file_is_begun_once_the_process_ends(tmp_path):
  code = f"""
import pathlib
from insec_jax.files.writing import write_text
stop_signal.at_end(lambda: time.sleep(1))
threading.Thread(target=stop_signal.end, args=(7,)).start()
time.sleep(0.3)
write_text(pathlib.Path({str(tmp_path)!r}) / "a", "text")
"""
  assert ended(start(code)) == (7, "")
  assert not list(tmp_path.iterdir())


def test_a_line_of_an_unbuffered_stream_is_one_write():
  code = """
from insec_jax import command
command.run(lambda: print("line", file=sys.stderr))
"""
  line = [sys.executable, "-u", "-c", BEGIN.replace("NAME", "generate") + code]
  ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps writes apart
  with ours, theirs:
    done = subprocess.run(line, stderr=theirs, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=20, check=False)
    assert (done.returncode, ours.recv(100)) == (0, b"line\n")


@pytest.mark.parametrize(("pause", "code"), [(0.0, 5), (0.1, 42)])
def test_a_ctrl_c_that_comes_twice_at_once_is_one(pause, code):
  """`timeout` sends it to the process and to its group."""
  process = start(
    f"""
stop_signal.start_thread()
with stop_signal.deferred() as stop:
  os.kill(os.getpid(), 2)
  stop.wait()
  time.sleep({pause})
  os.kill(os.getpid(), 2)
  time.sleep(1)
os._exit(5)
""",
    name="train",
  )
  assert ended(process)[0] == code

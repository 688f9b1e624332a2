"""Two programs at once on one thing: the second is refused and names the first, or both do the whole of their work."""

import json
import pathlib
import re
import signal
import socket
import time

import pytest
from workdirs import SLOW, contents, lay_out, lines, litter, results, train_words

pytestmark = pytest.mark.faults
HELD = re.compile(r"error: \S.* is being written by process (\d+) on (\S+) since \d{4}-\d\d-\d\d [\d:]+\S*; ")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pairs")
  lay_out(folder)
  (folder / "arms.py").write_text("import config\ndef get_config(arm='clean'):\n  return config.get_config()\n")
  (folder / "slow.py").write_text(SLOW.replace("0.2", "2") + "from config import get_config\n")
  return folder


@pytest.fixture(scope="module")
def whole(home, programs):
  """A workdir whose training is done, and what each program makes of it alone."""
  assert programs.train("whole").wait().code == 0
  for run in (
    programs.generate("whole", "g.right"),
    programs.evaluate("whole", "e.right"),
    programs.export("whole", "x.right"),
    programs.mine("whole", "m.right"),
  ):
    assert run.wait().code == 0, str(run)
  return home / "whole"


def until(holds, seconds=60):
  deadline = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def lock_of(home, output):
  return home / f".{output}.lock"


def names(run, first):
  """Whether the run was refused in one line that names the process, its host and since when."""
  found = HELD.match(run.err.strip().split("\n")[-1])
  return (
    run.code == 2
    and run.is_one_line
    and found is not None
    and int(found[1]) == first.pid
    and found[2] == socket.gethostname()
  )


def paused(seconds=4):
  """The first program rests with its lock, so that the second meets it whatever the machine does."""
  return (
    f"import time; from insec_jax.files import chunks, writing; held = writing.one_writer\n"
    f"import contextlib\n"
    f"@contextlib.contextmanager\n"
    f"def slow(*arguments):\n"
    f"  with held(*arguments):\n"
    f"    time.sleep({seconds})\n"
    f"    yield\n"
    f"writing.one_writer = chunks.one_writer = slow\n"
  )


def same_output(program, home, output):
  if program == "evaluate":
    return results(home / output) == results(home / "e.right")
  return (home / output).read_bytes() == (home / f"{program[0]}.right").read_bytes()


@pytest.mark.parametrize("first", ["generate", "evaluate"])
@pytest.mark.parametrize("second", ["generate", "evaluate"])
@pytest.mark.usefixtures("whole")
def test_one_output_has_one_writer(home, programs, first, second):
  output = f"{first}-{second}"
  flag = "--prompts=prompts.jsonl" if first == "generate" else "--config=config.py"
  more = ("--max_tokens=6", "--logprobs") if first == "generate" else ()
  one = programs.start(first, "--model=whole", flag, f"--output={output}", *more, BEFORE=paused(8))
  until(lock_of(home, f"{output}.parts.0").exists)
  other = getattr(programs, second)("whole", output).wait()
  assert names(other, one), str(other)
  assert one.wait().code == 0, str(one)
  assert same_output(first, home, output)
  assert not litter(home)


@pytest.mark.usefixtures("whole")
def test_a_command_that_fails_at_once_leaves_the_file_of_a_running_one(home, programs):
  one = programs.start(
    "generate",
    "--model=whole",
    "--prompts=prompts.jsonl",
    "--output=f",
    "--max_tokens=6",
    "--logprobs",
    BEFORE=paused(8),
  )
  until(lock_of(home, "f.parts.0").exists)
  for wrong in ("--model=absent", "--prompts=absent.jsonl", "--max_tokens=100000"):
    assert programs.generate("whole", "f", wrong).wait().code == 2
  assert one.wait().code == 0, str(one)
  assert same_output("generate", home, "f")


@pytest.mark.usefixtures("whole")
def test_two_exports_to_one_folder_give_one_whole_model(home, programs):
  runs = [programs.export("whole", "x2") for _ in range(3)]
  codes = sorted(run.wait().code for run in runs)
  assert codes == [0, 2, 2], "\n".join(map(str, runs))
  assert all(run.is_one_line for run in runs if run.code), "\n".join(map(str, runs))
  assert contents(home / "x2") == contents(home / "x.right")
  assert not litter(home)


@pytest.mark.usefixtures("whole")
def test_two_mines_of_one_id_are_one_and_of_two_ids_share_the_work(home, programs):
  runs = [programs.mine("whole", "m1") for _ in range(2)]
  assert sorted(run.wait().code for run in runs)[0] == 0, "\n".join(map(str, runs))
  assert all(run.code == 0 or (run.code == 2 and run.is_one_line) for run in runs), "\n".join(map(str, runs))
  assert (home / "m1").read_bytes() == (home / "m.right").read_bytes()
  runs = [programs.mine("whole", "m2", "--num_processes=2", f"--process_id={number}") for number in range(2)]
  assert [run.wait().code for run in runs] == [0, 0], "\n".join(map(str, runs))
  assert (home / "m2").read_bytes() == (home / "m.right").read_bytes()
  assert not litter(home)


def test_a_second_train_of_a_workdir_is_refused_and_no_line_is_lost(home, programs, whole):
  one = programs.start("train", *train_words("t"), BEFORE=SLOW)
  until(lambda: (home / "t" / ".lock").exists() and (home / "t" / ".lock").stat().st_size)
  others = [programs.train("t"), programs.train("t", "seed=1"), programs.train("t")]
  for other in others:
    assert names(other.wait(), one), str(other)
  assert one.wait().code == 0, str(one)
  assert lines(home / "t") == lines(whole)
  assert not litter(home / "t")


def test_a_rerun_right_after_a_kill_goes_on(home, programs, whole):
  one = programs.start("train", *train_words("k"), BEFORE=SLOW)
  until(lambda: (home / "k" / "checkpoints" / "2").exists() or one.ended)
  one.send(signal.SIGKILL)
  other = programs.train("k").wait()
  assert other.code == 0, str(other)
  assert lines(home / "k") == lines(whole)
  assert not litter(home / "k")


def test_readers_of_a_workdir_that_trains_are_refused_or_right(home, programs, whole):
  one = programs.start("train", *train_words("r", "train.keep=1", "train.checkpoint_every=1"), BEFORE=SLOW)
  until(lambda: (home / "r" / "checkpoints" / "1").exists() or one.ended)
  readers = [programs.export("r", "rx"), programs.generate("r", "rg"), programs.evaluate("r", "re")]
  for reader in readers:
    assert reader.wait().code in (0, 2), str(reader)
    assert "Traceback" not in reader.err, str(reader)
    assert "damaged" not in reader.err, str(reader)
  assert one.wait().code == 0, str(one)
  assert lines(home / "r") == lines(whole)


@pytest.mark.usefixtures("whole")
def test_two_reports_and_two_previews_of_one_output_leave_a_whole_page(home, programs):
  for program, words, page in (
    ("report", ("--workdirs=whole", "--output=p.html"), "p.html"),
    ("preview", ("--config=config.py", "--html=q.html"), "q.html"),
  ):
    runs = [programs.start(program, *words) for _ in range(2)]
    for run in runs:
      assert run.wait().code == 0 or (run.code == 2 and run.is_one_line), str(run)
    assert (home / page).read_text().rstrip().endswith("</html>")
    assert not litter(home)


def sweep(programs):
  return programs.start("sweep", "--config=slow.py", "--arms=graph", "--seeds=0", "--output=s")


def test_a_second_sweep_is_refused_and_a_killed_one_takes_its_programs_with_it(home, programs, whole):
  one = sweep(programs)
  until(lambda: (home / "s" / "seed0" / "graph" / "config.json").exists(), 90)
  other = sweep(programs).wait()
  assert names(other, one), str(other)
  train = programs.train("s/seed0/graph", "seed=0", arm="graph").wait()
  assert (train.code, train.is_one_line) == (2, True), str(train)
  one.send(signal.SIGKILL)
  one.wait()
  until(lambda: not running(home / "s"), 30)
  again = sweep(programs).wait(240)
  assert again.code == 0, str(again)
  assert lines(home / "s" / "seed0" / "graph") == lines(whole)
  assert not litter(home / "s")


def running(folder):
  """Return the processes that have the folder on their command line."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_bytes().split(b"\0")
      if any(word.endswith(b"s/seed0/graph") for word in words) and str(folder.parent) == str(
        (path.parent / "cwd").resolve()
      ):
        found.append(path.parent.name)
    except OSError:
      continue
  return found


PATHS = {
  "train": ("--config=config.py", "--workdir=PATH"),
  "generate": ("--model=PATH", "--prompts=prompts.jsonl", "--output=o"),
  "generate --prompts": ("--model=whole", "--prompts=PATH", "--output=o"),
  "generate --output": ("--model=whole", "--prompts=prompts.jsonl", "--output=PATH"),
  "evaluate": ("--model=PATH", "--config=config.py", "--output=o"),
  "evaluate --output": ("--model=whole", "--config=config.py", "--output=PATH"),
  "mine": ("--model=PATH", "--config=config.py", "--output=o"),
  "mine --output": ("--model=whole", "--config=config.py", "--output=PATH"),
  "export": ("--model=PATH", "--output=o"),
  "export --output": ("--model=whole", "--output=PATH"),
  "preview": ("--config=config.py", "--html=PATH"),
  "report": ("--workdirs=PATH", "--output=o"),
  "report --output": ("--workdirs=whole", "--output=PATH"),
  "sweep": ("--config=config.py", "--arms=graph", "--seeds=0", "--output=PATH"),
  "fit --hlo": ("--config=config.py", "--hlo=PATH", "--topology=v5e:2x2"),
}


@pytest.mark.parametrize("case", PATHS)
@pytest.mark.usefixtures("whole")
def test_no_scheme_is_taken_for_a_folder(home, programs, case):
  run = programs.run(case.split()[0], *(word.replace("PATH", "s3://bucket/r") for word in PATHS[case]), seconds=60)
  assert (run.code, run.is_one_line) == (2, True), str(run)
  assert "is not supported" in run.err, str(run)
  assert not (home / "s3:").exists()


@pytest.mark.usefixtures("whole")
def test_the_home_folder_is_meant_by_a_tilde(home, programs):
  run = programs.run("train", "--config=config.py", "--workdir=~/w", "--config.train.steps=1", HOME=str(home / "user"))
  assert run.code == 0, str(run)
  assert json.loads((home / "user" / "w" / "config.json").read_text())["train"]["steps"] == 1

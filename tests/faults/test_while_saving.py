"""Programs that read a workdir while train saves, and programs killed at any moment: what is there is whole."""

import random
import shutil
import signal
import time

import pytest
from workdirs import SLOW, Tries, contents, copy, lay_out, lines, litter, results

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saving")
  lay_out(folder)
  return folder


@pytest.fixture(scope="module")
def whole(home, programs):
  assert programs.train("whole").wait().code == 0
  assert programs.export("whole", "x.right").wait().code == 0
  assert programs.mine("whole", "m.right").wait().code == 0
  assert programs.evaluate("whole", "e.right").wait().code == 0
  return home / "whole"


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.usefixtures("whole")
def test_readers_of_a_run_that_saves_each_step_never_meet_damage(home, programs, keep):
  tries = Tries()
  words = [
    "--config=config.py",
    f"--workdir=busy{keep}",
    "--config.train.steps=400",
    f"--config.train.keep={keep}",
    "--config.train.checkpoint_every=1",
    "--config.train.eval_every=400",
  ]
  train = programs.start("train", *words, BEFORE=SLOW)
  folder = home / f"busy{keep}" / "checkpoints"
  deadline = time.monotonic() + 90
  while not (folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  for number in range(20):
    if train.ended:
      break
    out = f"busy{keep}_{number}"
    if number % 5 == 4:
      run = programs.evaluate(f"busy{keep}", out).wait(90)
    elif number % 2:
      run = programs.generate(f"busy{keep}", out).wait(90)
    else:
      run = programs.export(f"busy{keep}", out).wait(90)
    tries.add(run.words, None if run.code == 0 and "Traceback" not in run.err else str(run))
  train.send(signal.SIGTERM)
  train.wait(150)
  assert train.code in (0, 42), str(train)
  tries.check()
  assert tries.num >= 15


@pytest.mark.parametrize("seed", range(2))
def test_train_killed_at_any_moment_and_run_again_gives_the_same_metrics(home, programs, whole, seed):
  run = programs.train(f"timed{seed}", "train.checkpoint_every=1").wait()
  assert run.code == 0, str(run)
  seconds, killed = time.monotonic() - run.begun, 0
  tries, rng = Tries(), random.Random(seed)
  for number in range(5):
    name = f"killed{seed}_{number}"
    for _ in range(rng.choice((1, 2))):
      run = programs.train(name, "train.checkpoint_every=1")
      time.sleep(rng.uniform(0.2, seconds))
      run.send(signal.SIGKILL)
      killed += run.wait().code == -signal.SIGKILL
    run = programs.train(name, "train.checkpoint_every=1").wait(90)
    problem = None if run.code == 0 else str(run)
    if not problem and lines(home / name) != lines(whole):
      problem = f"other metrics: {run}"
    elif left := litter(home / name):
      problem = f"left {left}"
    tries.add(name, problem)
    shutil.rmtree(home / name)
  tries.check()
  assert killed


@pytest.mark.parametrize("program", ["mine", "evaluate", "export"])
@pytest.mark.usefixtures("whole")
def test_a_program_killed_at_any_moment_and_run_again_leaves_the_right_output_alone(home, programs, program):
  tries, rng = Tries(), random.Random(program)
  folder = home / f"k_{program}"
  folder.mkdir()
  run = getattr(programs, program)("whole", f"timed_{program}").wait()
  assert run.code == 0, str(run)
  seconds, killed = time.monotonic() - run.begun, 0
  for number in range(8):
    output = f"k_{program}/{number}"
    run = getattr(programs, program)("whole", output)
    time.sleep(rng.uniform(0.1, seconds))
    run.send(signal.SIGKILL)
    killed += run.wait().code == -signal.SIGKILL
    if program == "export" and (home / output).exists():  # it was done, and a second export is refused
      assert contents(home / output) == contents(home / "x.right")
      shutil.rmtree(home / output)
    run = getattr(programs, program)("whole", output).wait(90)
    problem = None if run.code == 0 else str(run)
    if not problem:
      same = {
        "mine": lambda path: path.read_bytes() == (home / "m.right").read_bytes(),
        "evaluate": lambda path: results(path) == results(home / "e.right"),
        "export": lambda path: contents(path) == contents(home / "x.right"),
      }[program](home / output)
      left = [path.name for path in folder.iterdir() if path.name != str(number)]
      problem = None if same and not left else f"same {same}, left {left}"
    tries.add(f"{program} {number}", problem)
    shutil.rmtree(folder)
    folder.mkdir()
  tries.check()
  assert killed


def test_a_copy_of_a_workdir_is_the_workdir(home, programs, whole):
  copy(whole, home / "copied")
  assert programs.export("copied", "x.copied").wait().code == 0
  assert contents(home / "x.copied") == contents(home / "x.right")

"""Scheduler of stages, each a run of a program: in order of dependence, in parallel on subsets of the cores."""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from insec_jax import stop_signal
from insec_jax.command import PARENT_PIPE, InputError

DONE, DONE_BEFORE, FAILED, LEFT_OUT, STOPPED = "done", "done before", "failed", "left out", "stopped"
LAST_LINES = 8  # of a failed stage's log
LAST_SECONDS = 10  # of a session: for programs to end after SIGTERM


@dataclasses.dataclass(frozen=True)
class Stage:
  """Run of a program; it is skipped when `done`, and starts only after the stages named in `after`."""

  name: str
  words: tuple[str, ...]
  log: pathlib.Path
  done: Callable[[], bool]  # raises InputError if existing files prevent the run
  after: tuple[str, ...] = ()


def shares_of_cores(jobs: int) -> list[set[int] | None]:
  """Return the cores of each job, divided as evenly as possible; None for one job, or without affinity (not Linux).

  Raises InputError if there are fewer cores than jobs.
  """
  if jobs == 1 or not hasattr(os, "sched_getaffinity"):
    return [None] * jobs
  cores = sorted(os.sched_getaffinity(0))
  if jobs > len(cores):
    raise InputError(f"--jobs={jobs} is more than the {len(cores)} cores here; give at most that many")
  return [set(cores[number * len(cores) // jobs : (number + 1) * len(cores) // jobs]) for number in range(jobs)]


class ChildPrograms(threading.Event):
  """Running child programs; an event that, when set by a call, sends SIGTERM to all of them.

  The programs end at once when this process ends. With `minutes` above 0 the call is made LAST_SECONDS before the end
  of a session of that length; the programs have the same session, and `train` stops by itself before.
  """

  def __init__(self, minutes: float = 0.0):
    super().__init__()
    self.minutes = minutes
    self._running = set()
    if minutes:
      left = stop_signal.session_began() + 60 * minutes - LAST_SECONDS - time.monotonic()
      self._timer = threading.Timer(max(left, 0), self)
      self._timer.daemon = True
      self._timer.start()
    self._pipe, self._kept_open = os.pipe()

  def __call__(self, *_) -> None:
    self.set()
    for process in tuple(self._running):
      process.terminate()

  def close(self) -> None:
    """Close the pipe whose end the programs read as the end of this process; the session's end is not waited for."""
    if self.minutes:
      self._timer.cancel()
    os.close(self._pipe)
    os.close(self._kept_open)

  def run(self, words: Sequence[str], log: pathlib.Path) -> int:
    """Run a program, append its output to the log, and return its exit code."""
    with log.open("ab") as file:
      # A session of its own: Ctrl-C reaches only this process, which sends SIGTERM, after which train saves.
      process = subprocess.Popen(
        words,
        stdout=file,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=(self._pipe,),
        env={**os.environ, PARENT_PIPE: str(self._pipe), **self._session()},
      )
      self._running.add(process)
      if self.is_set():
        process.terminate()
      code = process.wait()
      self._running.discard(process)
    return code

  def _session(self) -> dict[str, str]:
    return {stop_signal.SESSION_BEGAN: str(stop_signal.session_began())} if self.minutes else {}


@contextlib.contextmanager
def stop_on_signal(minutes: float = 0.0) -> Iterator[ChildPrograms]:
  """Yield the `ChildPrograms` that a signal stops, or the end of a session of so many minutes, inside the block."""
  stopping = ChildPrograms(minutes)
  try:
    with stop_signal.deferred(stopping):
      yield stopping
  finally:
    stopping.close()


def run_stages(stages: Sequence[Stage], cores: Sequence[set[int] | None], stopping: ChildPrograms) -> dict[str, str]:
  """Run the stages, as many in parallel as there are entries of `cores`, and return the outcome of each by name."""
  if len(cores) > 1 and cores[0] is None:
    print("this system cannot hold a process to some of its cores: the jobs share all of them", file=sys.stderr)
  free = queue.SimpleQueue()
  for share in cores:
    free.put(share)

  def take_cores() -> None:
    share = free.get()
    if share is not None:
      os.sched_setaffinity(0, share)  # of this thread only; its child programs inherit it

  outcomes, running = {}, {}
  with concurrent.futures.ThreadPoolExecutor(len(cores), initializer=take_cores) as pool:
    waiting = list(stages)
    while waiting or running:
      for stage in tuple(waiting):
        before = [outcomes.get(name) for name in stage.after]
        if any(outcome in (FAILED, LEFT_OUT, STOPPED) for outcome in before):
          waiting.remove(stage)
          outcomes[stage.name] = STOPPED if stopping.is_set() else LEFT_OUT
        elif None not in before:
          waiting.remove(stage)
          running[pool.submit(run_stage, stage, stopping)] = stage
      if running:
        ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in ended:
          stage = running.pop(future)
          outcomes[stage.name] = future.result()
          print(f"[{len(outcomes)}/{len(stages)}] {stage.name}: {outcomes[stage.name]}", flush=True)
  return outcomes


def run_stage(stage: Stage, stopping: ChildPrograms) -> str:
  """Run the stage unless it is done, report a failure on stderr, and return the outcome."""
  if stopping.is_set():
    return STOPPED
  try:
    if stage.done():
      return DONE_BEFORE
  except InputError as error:
    print(f"{stage.name}: {error}", file=sys.stderr, flush=True)
    return FAILED
  print(f"{stage.name} runs, see {stage.log}", flush=True)
  start = time.monotonic()
  code = stopping.run(stage.words, stage.log)
  if code == 0:
    print(f"{stage.name} took {time.monotonic() - start:,.0f} s", flush=True)
    return DONE
  if stopping.minutes and code == stop_signal.PREEMPTED:  # no step fits any more
    stopping.set()
  if stopping.is_set():
    return STOPPED
  lines = stage.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
  print(
    "\n".join(
      [f"{stage.name} ended with exit code {code}; the last lines of {stage.log}:", *(f"  {line}" for line in lines)]
    ),
    file=sys.stderr,
    flush=True,
  )
  return FAILED

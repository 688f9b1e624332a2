"""One self-contained page about one or several runs: curves, the self-correction table, coloured transcripts.

  python -m insec_jax.report --workdirs A,B,... --output report.html

Of each workdir it reads config.json, environment.json, metrics.jsonl and results.json (which evaluate writes). What is
not there yet is named on the page.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from xml.etree.ElementTree import Element

from absl import flags

from insec_jax import command
from insec_jax.command import InputError
from insec_jax.decoding.output import written_whole
from insec_jax.method import roles
from insec_jax.pages import charts, correction
from insec_jax.pages.correction import NONE
from insec_jax.pages.elements import document, element, role_legend, role_text, table

WORKDIRS = flags.DEFINE_list("workdirs", None, "The runs to show, with commas between them: one column each.")
OUTPUT = flags.DEFINE_string("output", None, "The page to write; an older one is replaced.")
flags.mark_flags_as_required(["workdirs", "output"])

EXAMPLE = ((roles.TEXT, "... "), (roles.MISTAKE, "wrong step "), (roles.FLAG, "<flag>"), (roles.REASON, " reason "),
           (roles.FLAG, "<fix>"), (roles.CORRECTION, " right step"), (roles.TEXT, " ..."))


def main() -> None:
  folders = [pathlib.Path(folder) for folder in WORKDIRS.value]
  names = arm_names(folders)
  with written_whole(OUTPUT.value) as file:
    file.write(page([read_run(folder, name) for folder, name in zip(folders, names, strict=True)]))
  print(f"{OUTPUT.value} shows {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class Run:
  """One arm: what its workdir holds; `notes` say what it does not, and what else the reader must know."""

  name: str
  folder: pathlib.Path
  config: dict
  environment: dict  # empty when there is no such file
  lines: list[dict]  # of metrics
  results: dict  # empty when there is no such file
  notes: tuple[str, ...]


def arm_names(folders: Sequence[pathlib.Path]) -> list[str]:
  """A name for each folder: as many of its last parts as tell all of them apart.

  InputError when there is no folder, or one twice.
  """
  paths = [folder.resolve() for folder in folders]
  if not paths:
    raise InputError("--workdirs is empty; give the folder of at least one run")
  for folder, path in zip(folders, paths, strict=True):
    if paths.count(path) > 1:
      raise InputError(f"--workdirs names {folder} more than once; name each run once")
  depth = 1
  while len({path.parts[-depth:] for path in paths}) < len(paths):
    depth += 1
  return ["/".join(path.parts[-depth:]) for path in paths]


def read_run(folder: pathlib.Path, name: str) -> Run:
  """The run in `folder`; InputError when that is no workdir, or a file in it cannot be read."""
  if not (folder / "config.json").is_file():
    raise InputError(f"{folder} is no workdir: it has no config.json; give a folder that train wrote")
  config = read_object(folder / "config.json")
  if "train" not in config:
    raise InputError(f"{folder} is no workdir: its config.json is not one of train; give a folder that train wrote")
  environment, results, lines = {}, {}, []
  notes = []
  if (folder / "environment.json").exists():
    environment = read_object(folder / "environment.json")
  else:
    notes.append("environment.json is missing, so commit, versions and devices are not known")
  if (folder / "metrics.jsonl").exists():
    lines = list(read_metrics(folder / "metrics.jsonl"))
  if not lines:
    notes.append("metrics.jsonl is missing or empty, so there are no curves: no step has been logged yet")
  elif lines[-1]["step"] < config["train"]["steps"]:
    notes.append(f"training stands at step {lines[-1]['step']:,} of {config['train']['steps']:,}; run train again")
  for key in sorted({key for line in lines for key, value in line.items() if not math.isfinite(value)}):
    step = next(line["step"] for line in lines if key in line and not math.isfinite(line[key]))
    notes.append(f"{key} is not a finite number from step {step:,} on; its curve leaves that out")
  if (folder / "results.json").exists():
    results = read_object(folder / "results.json")
    correction.check(results, folder / "results.json")
    if lines and (folder / "results.json").stat().st_mtime < (folder / "metrics.jsonl").stat().st_mtime:
      notes.append("results.json is older than the last line of metrics.jsonl; run evaluate again")
  else:
    notes.append("results.json is missing, so self-correction is not measured; run python -m insec_jax.evaluate "
                 f"--config CONFIG --model {folder} --output {folder / 'results.json'}")
  return Run(name, folder, config, environment, lines, results, tuple(notes))


def read_object(path: pathlib.Path) -> dict:
  """The JSON object in a file; InputError unless it is one."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise InputError(f"{path} is not JSON ({error}); write it again, or remove it") from None
  if not isinstance(value, dict):
    raise InputError(f"{path} holds {json.dumps(value):.40}, needed is an object; write it again, or remove it")
  return value


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, float]]:
  """The lines of a run; a last one that is still being written is left out."""
  for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
    try:
      values = json.loads(line)
      values["step"]
    except (ValueError, KeyError, TypeError):
      raise InputError(f"{path}:{number} is not a line of metrics; repair or remove the file") from None
    yield values


def page(runs: Sequence[Run]) -> str:
  """The whole page."""
  names = ", ".join(run.name for run in runs)
  notes = [element("li", element("b", run.name), ": " + note) for run in runs for note in run.notes]
  evaluated = [run for run in runs if run.results]
  return document(
    f"Self-correction: {names}",
    element("h1", "Internalized self-correction"), element("p", names, class_="soft"), *explanation(),
    *([element("h2", "What is missing"), element("ul", *notes, class_="notes")] if notes else []),
    element("h2", "Arms"), arms_table(runs),
    *([element("h3", "Where their configs differ"), comparison(runs, [run.config for run in runs], differing=True)]
      if len(runs) > 1 else []),
    element("h2", "Training"), *training_curves(runs),
    element("h2", "Self-correction"), *(
      correction.self_correction([run.name for run in evaluated], [run.results for run in evaluated]) if evaluated
      else [element("p", "No run has been evaluated yet.")]),
    *([element("h2", "Transcripts"), role_legend()] if evaluated else []),
    *(part for run in evaluated for part in transcripts(run)),
    element("h2", "Environment"), comparison(runs, [run.environment for run in runs], differing=False),
    element("h2", "Reproduce"), *reproduce(runs))


def explanation() -> list[Element]:
  """The method in one paragraph, an example coloured by role, and the legend."""
  def term(word: str) -> Element:
    return element("b", word)

  return [
    element("p", "A model that corrects itself notices its own mistake in the middle of an answer, says what is wrong "
            "and puts it right. A ", term("step"), " is the unit that can be wrong. The ", term("flag"), " says “the "
            "step before this is wrong”; a reason follows, and a second marker, fix, opens the correction. Each token "
            "has a ", term("role"), ", and the config says what a role is worth in the loss: ", term("trained tokens"),
            " are those with a weight other than zero. A ", term("probe"), " is a prompt and a prefix that ends in a "
            "wrong step; what the model does next is what we measure. That step is ", term("injected"), " by a rule, "
            "or the model’s ", term("own"), ", found by a checker. A flag after a right step is a ",
            term("false alarm"), "."),
    element("p", *(role_text(role, text) for role, text in EXAMPLE), class_="code"), role_legend()]


def arms_table(runs: Sequence[Run]) -> Element:
  """How long each arm was trained, its last held-out loss in all and per role, and how it was measured."""
  last = [{key: value for line in run.lines for key, value in line.items()} for run in runs]
  measured = [run.results for run in runs]

  def row(name: Element | str, values: Sequence[dict], key: str, written: Callable[[float], str]) -> tuple:
    return (name, *(written(value[key]) if key in value else NONE for value in values))

  training = [row("Steps", last, "step", "{:,}".format), row("Trained tokens", last, "trained_tokens", "{:,}".format),
              row("All tokens", last, "tokens", "{:,}".format), row("Seconds", last, "seconds", _seconds),
              row("Tokens per second", last, "tokens_per_s", "{:,.0f}".format),
              row("Trained tokens per second", last, "trained_tokens_per_s", "{:,.0f}".format)]
  losses = [row("Weighted as in training", last, "eval/loss", _loss)]
  losses += [row(element("span", name, class_=name), last, f"eval/loss/{name}", _loss) for name in roles.NAMES
             if any(f"eval/loss/{name}" in values for values in last)]
  groups = [("Training", training), ("Held-out loss, last measured", losses)]
  if any(measured):
    groups.append(("Evaluation", [row("Seconds", measured, "seconds", _seconds)]))
  return table("", [run.name for run in runs], groups)


def _loss(value: float) -> str:
  return f"{value:.4f}"


def _seconds(value: float) -> str:
  return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def training_curves(runs: Sequence[Run]) -> list[Element]:
  """Loss and held-out loss, in all and per role, over steps: a chart for each that some run has logged."""
  wanted = [("Training loss", "loss"), ("Held-out loss", "eval/loss")]
  wanted += [(f"Held-out loss: {name}", f"eval/loss/{name}") for name in roles.NAMES]
  drawn = []
  for title, key in wanted:
    curves = [[(line["step"], line[key]) for line in run.lines if key in line and math.isfinite(line[key])]
              for run in runs]
    if any(curves):
      drawn.append(charts.chart(title, curves, "step"))
  if not drawn:
    return [element("p", "No run has logged a loss yet.")]
  return [charts.legend([run.name for run in runs]), element("div", *drawn, class_="charts")]


def transcripts(run: Run) -> Iterator[Element]:
  """What the model of one arm wrote, coloured by role, folded by kind; the first kind is open."""
  yield element("h3", run.name)
  kinds = {}
  for example in run.results["transcripts"]:
    kinds.setdefault(example["title"].partition(": ")[0], []).append(example)
  for number, (kind, examples) in enumerate(kinds.items()):
    shown = [element(
      "article",
      element("header", element("b", example["title"]), element("small", example["outcome"])),
      element("div", *(role_text(roles.NAMES.index(piece["role"]), piece["text"]) for piece in example["pieces"]),
              class_="code")) for example in examples]
    yield element("details", element("summary", f"{kind} ({len(examples)})"),
                  element("div", *shown, class_="transcripts"), **({} if number else {"open": ""}))
  if not kinds:
    yield element("p", "No transcripts in its results.json.")


def comparison(runs: Sequence[Run], values: Sequence[dict], *, differing: bool) -> Element:
  """A row for each "key" or "section.key"; with `differing` only those in which the runs are not alike."""
  flat = [dict(_flat(value)) for value in values]
  rows = []
  for key in dict.fromkeys(itertools.chain(*flat)):
    cells = [_folded(value[key]) if key in value else NONE for value in flat]
    if not differing or any(key not in value or value[key] != flat[0][key] for value in flat):
      rows.append((key, *cells))
  return table("", [run.name for run in runs], [("", rows)]) if rows else element("p", "Nothing to show.")


def _flat(values: dict) -> Iterator[tuple[str, str]]:
  for name, value in values.items():
    for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
      text = NONE if inner is None else inner if isinstance(inner, str) and inner else json.dumps(inner)
      yield f"{name}.{key}" if key else name, text


def _folded(text: str) -> Element | str:
  """The text; behind a line to open when it is long, as the diff of a dirty tree is."""
  if len(text) <= 200:
    return text
  return element("details", element("summary", f"{len(text):,} characters"), element("pre", text))


def reproduce(runs: Sequence[Run]) -> list[Element]:
  """The commands, and the whole config of each run; CONFIG stands for the file with these values."""
  commands = []
  for run in runs:
    folder = shlex.quote(str(run.folder))
    commands.append(f"python -m insec_jax.train --config CONFIG --workdir {folder}")
    if run.results:
      commands.append(f"python -m insec_jax.evaluate --config CONFIG --model {shlex.quote(run.results['model'])} "
                      f"--output {folder}/results.json")
  folders = shlex.quote(",".join(str(run.folder) for run in runs))
  commands.append(f"python -m insec_jax.report --workdirs {folders} --output {shlex.quote(OUTPUT.value)}")
  configs = [element("details", element("summary", f"CONFIG of {run.name}"),
                     element("pre", json.dumps(run.config, indent=2))) for run in runs]
  return [element("pre", "\n".join(commands)), *configs]


if __name__ == "__main__":
  command.run(main)

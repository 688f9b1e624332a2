"""Report on one or several runs, as one HTML page: curves, the self-correction table, coloured transcripts.

  python -m insec_jax.report --workdirs A,B,... --output report.html [--reference ARM]

It reads config.json, environment.json, metrics.jsonl and results.json (written by evaluate) of each workdir. The page
lists missing files.

Workdirs with the same last name (x/seed0/clean, x/seed1/clean) are one arm over seeds if their configs are equal except
for the seed and the paths of their inputs. Every other workdir is an arm of its own.
"""

from absl import flags

from insec_jax import command, flags_help

with flags_help.group("Input and output"):
  WORKDIRS = flags.DEFINE_list("workdirs", None, "Comma-separated workdirs of the runs to show.")
  OUTPUT = flags.DEFINE_string("output", None, "HTML file to write; an existing one is replaced.")
  REFERENCE = flags.DEFINE_string(
    "reference", None, "Arm with which the others are compared (default: the first one evaluated)."
  )
flags.mark_flags_as_required(["workdirs", "output"])

command.begin(__name__)

import dataclasses
import itertools
import json
import math
import pathlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from xml.etree.ElementTree import Element

from insec_jax.command import InputError
from insec_jax.config_endpoints import Endpoint
from insec_jax.evaluation.tables import aligned
from insec_jax.files.reading import folder_to_read
from insec_jax.files.writing import written_whole
from insec_jax.method import roles
from insec_jax.pages import charts, comparison, correction, endpoints, learning, operating
from insec_jax.pages.brief import brief
from insec_jax.pages.correction import NONE
from insec_jax.pages.elements import document, element, role_legend, role_text, table
from insec_jax.pages.runs import Arm, Run, in_words, over_seeds, read_run
from insec_jax.training import sinks

TIME = "time/"  # the keys of the parts of a run's time in metrics.jsonl, see training/ledger.py
EXAMPLE = (
  (roles.TEXT, "... "),
  (roles.MISTAKE, "wrong step "),
  (roles.FLAG, "<flag>"),
  (roles.REASON, " reason "),
  (roles.FLAG, "<fix>"),
  (roles.CORRECTION, " right step"),
  (roles.TEXT, " ..."),
)


def main() -> None:
  folders = [folder_to_read(folder, "--workdirs") for folder in WORKDIRS.value]
  names = arm_names(folders)
  with written_whole(OUTPUT.value) as file:
    arms = over_seeds([read_run(folder, name) for folder, name in zip(folders, names, strict=True)])
    file.write(shown := page(arms))
  chosen, voided, results = study_of(arms)
  if chosen or voided:
    print(endpoints.text(chosen, results, voided), end="\n\n")
  if any(arm.evaluated for arm in arms):
    print(aligned(brief(arms)), end="\n\n")
  print(f"{OUTPUT.value} shows {', '.join(map(in_words, arms))}")
  for folder in folders:
    sinks.publish(folder, "report", page=shown)


def arm_names(folders: Sequence[pathlib.Path]) -> list[str]:
  """Return a name for each folder: as many of its last parts as make all names unique.

  Raises InputError without a folder, or for a repeated one.
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


def study_of(arms: Sequence[Arm]) -> tuple[list[Endpoint], list[str], dict[str, list[dict]]]:
  """Return the endpoints of all results, what makes them void, and the results of each seed of each arm."""
  chosen, voided = endpoints.named([run for arm in arms for run in arm.runs])
  return chosen, voided, {arm.name: [run.results for run in arm.runs] for arm in arms}


def page(arms: Sequence[Arm]) -> str:
  """Return the HTML of the page."""
  names = ", ".join(map(in_words, arms))
  runs = [run for arm in arms for run in arm.runs]
  notes = [element("li", element("b", run.name), ": " + note) for run in runs for note in run.notes]
  evaluated = [arm for arm in arms if arm.evaluated]
  first = [dataclasses.replace(arm.runs[0], name=arm.name) for arm in arms]
  chosen, voided, results = study_of(arms)
  return document(
    f"Self-correction: {names}",
    element("h1", "Internalized self-correction"),
    element("p", names, class_="soft"),
    *explanation(),
    *(endpoints.section(chosen, results, voided) if evaluated else []),
    *in_short(arms),
    *([element("h2", "What is missing"), element("ul", *notes, class_="notes")] if notes else []),
    element("h2", "Arms"),
    arms_table(arms),
    *(
      [element("h3", "Where their configs differ"), comparison_of(first, [run.config for run in first], differing=True)]
      if len(arms) > 1
      else []
    ),
    element("h2", "Training"),
    *training_curves(arms),
    *learning.curves(arms),
    element("h2", "Self-correction"),
    *(self_correction(arms) if evaluated else [element("p", "No run has been evaluated yet.")]),
    *([element("h2", "Transcripts"), role_legend()] if evaluated else []),
    *(part for arm in evaluated for part in transcripts(arm)),
    element("h2", "Environment"),
    comparison_of(first, [run.environment for run in first], differing=False),
    *(
      [
        element("h3", "Where the seeds differ in it"),
        comparison_of(runs, [run.environment for run in runs], differing=True),
      ]
      if len(runs) > len(arms)
      else []
    ),
    element("h2", "Reproduce"),
    *reproduce(runs),
  )


def in_short(arms: Sequence[Arm]) -> list[Element]:
  """Return the table to read first, or nothing when no arm was evaluated."""
  header, *rows = brief(arms)
  rows = [(words, *(cell.replace("(n ", "(n\N{NO-BREAK SPACE}") for cell in cells)) for words, *cells in rows]
  return [element("h2", "In short"), table("", header[1:], [("", rows)])] if len(header) > 1 else []


def self_correction(arms: Sequence[Arm]) -> list[Element]:
  """Return the tables and charts of the results of evaluate; InputError if the reference was not evaluated."""
  evaluated = [arm for arm in arms if arm.evaluated]
  names = [arm.name for arm in evaluated]
  results = [[run.results for run in arm.evaluated] for arm in evaluated]
  if REFERENCE.value is not None and REFERENCE.value not in names:
    raise InputError(f"--reference={REFERENCE.value} was not evaluated or is no arm; evaluated are {', '.join(names)}")
  reference = 0 if REFERENCE.value is None else names.index(REFERENCE.value)
  return [
    *correction.main_rates(names, results),
    *(
      [
        element("h3", f"Accuracy minus that of {names[reference]}, problem by problem"),
        *comparison.paired(names, results, reference=reference),
      ]
      if len(names) > 1
      else []
    ),
    *comparison.controls(names, results, reference=reference),
    *operating.operating(names, results, numbers=[arms.index(arm) for arm in evaluated]),
    *correction.breakdown(names, results),
  ]


def explanation() -> list[Element]:
  """Return the method in one paragraph, an example coloured by role, and the legend."""

  def term(word: str) -> Element:
    return element("b", word)

  return [
    element(
      "p",
      "A model that corrects itself notices its own mistake in the middle of an answer, says what is wrong "
      "and puts it right. A ",
      term("step"),
      " is the unit that can be wrong. The ",
      term("flag"),
      " says “the "
      "step before this is wrong”; a reason follows, and a second marker, fix, opens the correction. Each token "
      "has a ",
      term("role"),
      ", and the config says what a role is worth in the loss: ",
      term("trained tokens"),
      " are those with a weight other than zero. A ",
      term("probe"),
      " is a prompt and a prefix that ends in a wrong step; what the model does next is what we measure. That step is ",
      term("injected"),
      " by a rule, or the model’s ",
      term("own"),
      ", found by a checker. A flag after a right step is a ",
      term("false alarm"),
      ".",
    ),
    element("p", *(role_text(role, text) for role, text in EXAMPLE), class_="code"),
    role_legend(),
  ]


def arms_table(arms: Sequence[Arm]) -> Element:
  """Return the table of training length, last held-out loss in all and per role, and evaluation of each arm."""
  last = [[{key: value for line in run.lines for key, value in line.items()} for run in arm.runs] for arm in arms]
  measured = [[run.results for run in arm.runs] for arm in arms]

  def cell(seeds: Sequence[dict], key: str, written: Callable[[float], str]) -> Element | str:
    there = [seed[key] for seed in seeds if key in seed]
    if not there:
      return NONE
    mean = written(sum(there) / len(there))
    if len(there) == len(seeds) and len(set(there)) == 1:
      return mean
    per_seed = "seeds " + ", ".join(written(seed[key]) if key in seed else NONE for seed in seeds)
    return element("span", mean, element("small", per_seed))

  def row(name: Element | str, values: Sequence[Sequence[dict]], key: str, written: Callable[[float], str]) -> tuple:
    return (name, *(cell(seeds, key, written) for seeds in values))

  training = [
    row("Steps", last, "step", "{:,.0f}".format),
    row("Trained tokens", last, "trained_tokens", "{:,.0f}".format),
    row("All tokens", last, "tokens", "{:,.0f}".format),
    row("Seconds", last, "seconds", _seconds),
    row("Tokens per second", last, "tokens_per_s", "{:,.0f}".format),
    row("Trained tokens per second", last, "trained_tokens_per_s", "{:,.0f}".format),
  ]
  losses = [row("Weighted as in training", last, "eval/loss", _loss)]
  losses += [
    row(element("span", name, class_=name), last, f"eval/loss/{name}", _loss)
    for name in roles.NAMES
    if any(f"eval/loss/{name}" in seed for seeds in last for seed in seeds)
  ]
  parts = dict.fromkeys(key for seeds in last for seed in seeds for key in seed if key.startswith(TIME) and seed[key])
  times = [row(key.removeprefix(TIME), last, key, _seconds) for key in parts]
  groups = [("Training", training), ("Seconds of all sessions", times), ("Held-out loss, last measured", losses)]
  groups = [group for group in groups if group[1]]
  if any(seed for seeds in measured for seed in seeds):
    measured = [
      [{key: value for key, value in seed.items() if value is not None} for seed in seeds] for seeds in measured
    ]
    groups.append(
      (
        "Evaluation",
        [row("Step evaluated", measured, "step", "{:,.0f}".format), row("Seconds", measured, "seconds", _seconds)],
      )
    )
  return table("", [arm.name for arm in arms], groups)


def _loss(value: float) -> str:
  return f"{value:.4f}"


def _seconds(value: float) -> str:
  return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def training_curves(arms: Sequence[Arm]) -> list[Element]:
  """Return charts of loss and held-out loss, in all and per role, over steps, where logged by any run."""
  wanted = [("Training loss", "loss"), ("Held-out loss", "eval/loss")]
  wanted += [(f"Held-out loss: {name}", f"eval/loss/{name}") for name in roles.NAMES]
  arm_numbers = [number for number, arm in enumerate(arms) for _ in arm.runs]
  drawn = []
  for title, key in wanted:
    curves = [
      [(line["step"], line[key]) for line in run.lines if key in line and math.isfinite(line[key])]
      for arm in arms
      for run in arm.runs
    ]
    if any(curves):
      drawn.append(charts.chart(title, curves, "step", arms=arm_numbers))
  if not drawn:
    return [element("p", "No run has logged a loss yet.")]
  several = (
    [element("p", "One line a seed, in the colour of its arm.", class_="soft")] if len(arm_numbers) > len(arms) else []
  )
  return [charts.legend([arm.name for arm in arms]), *several, element("div", *drawn, class_="charts")]


def transcripts(arm: Arm) -> Iterator[Element]:
  """Yield the transcripts of an arm's first evaluated seed, coloured by role, folded by kind; the first is open."""
  run = arm.evaluated[0]
  yield element("h3", arm.name if len(arm.runs) == 1 else f"{arm.name}, seed {run.config['seed']}")
  kinds = {}
  for example in run.results["transcripts"]:
    kinds.setdefault(example["title"].partition(": ")[0], []).append(example)
  for number, (kind, examples) in enumerate(kinds.items()):
    right = sum(_ends_well(example) for example in examples)
    shown = [
      element(
        "article",
        element("header", element("b", example["title"]), element("small", example["outcome"])),
        element(
          "div",
          *(role_text(roles.NAMES.index(piece["role"]), piece["text"]) for piece in example["pieces"]),
          class_="code",
        ),
        class_="success" if _ends_well(example) else "failure",
      )
      for example in examples
    ]
    yield element(
      "details",
      element("summary", f"{kind} ({right} with the right answer, {len(examples) - right} not)"),
      element("div", *shown, class_="transcripts"),
      **({} if number else {"open": ""}),
    )
  if not kinds:
    yield element("p", "No transcripts in its results.json.")


def _ends_well(example: dict) -> bool:
  return example["outcome"].endswith("answer right")


def comparison_of(runs: Sequence[Run], values: Sequence[dict], *, differing: bool) -> Element:
  """Return a table with a row for each "key" or "section.key"; with `differing` only rows in which the runs differ."""
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
  """Return the text, folded when it is long, as the diff of a modified tree is."""
  if len(text) <= 200:
    return text
  return element("details", element("summary", f"{len(text):,} characters"), element("pre", text))


def reproduce(runs: Sequence[Run]) -> list[Element]:
  """Return the commands, and the whole config of each run; CONFIG is the file with these values."""
  commands = []
  for run in runs:
    folder = shlex.quote(f"{run.folder}")
    commands.append(f"python -m insec_jax.train --config CONFIG --workdir {folder}")
    if run.results:
      commands.append(
        f"python -m insec_jax.evaluate --config CONFIG --model {shlex.quote(run.results['model'])} "
        f"--output {folder}/results.json"
      )
  folders = shlex.quote(",".join(f"{run.folder}" for run in runs))
  commands.append(f"python -m insec_jax.report --workdirs {folders} --output {shlex.quote(OUTPUT.value)}")
  configs = [
    element("details", element("summary", f"CONFIG of {run.name}"), element("pre", json.dumps(run.config, indent=2)))
    for run in runs
  ]
  return [element("pre", "\n".join(commands)), *configs]


if __name__ == "__main__":
  command.run(main)

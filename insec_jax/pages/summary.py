"""The table over seeds as text, printed at the end of a sweep."""

from collections.abc import Iterator, Sequence

from insec_jax.evaluation.tables import aligned
from insec_jax.pages import endpoints, seeds
from insec_jax.pages.correction import NONE, main_rows, points
from insec_jax.pages.runs import Run

COMPARED = (
  "solutions",
  "solutions, at threshold",
  "solutions, confidence",
  "solutions sampled",
  "solutions sampled, at threshold",
  "solutions sampled, confidence",
  "solutions, larger",
  "solutions sampled, larger",
)
CLOSE = 0.02  # relative difference up to which numbers of trained tokens count as equal


def table(runs: dict[str, list[Run]], reference: str) -> str:
  """Return the endpoints, the table over seeds, and a line for each arm with other trained tokens than reference."""
  trained = {
    arm: [tokens for run in arm_runs if (tokens := run.trained_tokens) is not None] for arm, arm_runs in runs.items()
  }
  results = {arm: [run.results for run in arm_runs if run.results] for arm, arm_runs in runs.items()}
  text = summary(
    list(runs),
    list(results.values()),
    list(trained.values()),
    reference=list(runs).index(reference),
  )
  lines = [
    f"seeds of {arm}: {', '.join(str(run.config['seed']) for run in arm_runs)}" for arm, arm_runs in runs.items()
  ]
  if classes := seeds.num_classes(list(results.values())):
    lines.append(classes)
  lines += [
    "each rate: mean over seeds [95 % t-interval over seeds, or Wilson's of all problems where that reaches further] "
    "(each seed)",
    "each difference of accuracies: [95 % bootstrap interval over seeds and structure classes; t: that over seeds]",
    "",
    text,
  ]
  unequal = list(_compared_tokens(runs, trained, reference))
  chosen, notes = endpoints.named([run for arm_runs in runs.values() for run in arm_runs])
  all_seeds = {arm: [run.results for run in arm_runs] for arm, arm_runs in runs.items()}
  return "\n".join([endpoints.text(chosen, all_seeds, notes), "", *lines, *(["", *unequal] if unequal else [])])


def _compared_tokens(runs: dict[str, list[Run]], trained: dict[str, list[int]], reference: str) -> Iterator[str]:
  """Yield, for each arm whose trained tokens differ from the reference's, the number of steps that would equal them."""
  if not trained[reference]:
    return
  wanted = sum(trained[reference]) / len(trained[reference])
  for arm, tokens in trained.items():
    ratio = sum(tokens) / len(tokens) / wanted if tokens else 1.0
    begins_alike = runs[arm][0].config["model"]["size"] == runs[reference][0].config["model"]["size"]
    if abs(ratio - 1) > CLOSE and begins_alike:
      steps = runs[arm][0].config["train"]["steps"]
      yield (
        f"{arm} was trained on {ratio:.3f} times the tokens of {reference}; equal with "
        f"train.steps={round(steps / ratio)} (was {steps})"
      )


def summary(
  names: Sequence[str], arms: Sequence[Sequence[dict]], trained: Sequence[Sequence[int]], *, reference: int
) -> str:
  """Return the main rates of every arm, with the seeds beside each mean, and accuracies minus those of the reference.

  `trained` holds the trained tokens of every seed of each arm; an arm may be without results.
  """
  merged = [seeds.pooled(arm) if arm else {"rates": {}, "gap": {}} for arm in arms]
  rates = [result["rates"] for result in merged]
  mean = [sum(tokens) / len(tokens) if tokens else None for tokens in trained]
  base = mean[reference]
  rows = [
    ("", *names),
    ("trained tokens", *(NONE if tokens is None else f"{tokens:,.0f}" for tokens in mean)),
    (
      f"over those of {names[reference]}",
      *(f"{tokens / base:.3f}" if tokens is not None and base else NONE for tokens in mean),
    ),
  ]
  rows += [
    (f"{source}: {metric}", *(_rate(value.get(source, {}).get(metric)) for value in rates))
    for source, metric in main_rows(rates)
  ]
  rows += [
    (
      f"injected minus {source}: detection",
      *(_difference(result["gap"].get(source, {}).get("detection")) for result in merged),
    )
    for source in ("own", "own sampled")
  ]
  for source in COMPARED:
    differences = [
      None if number == reference else seeds.differences(arms[reference], arm, source, source, "t2")
      for number, arm in enumerate(arms)
    ]
    if any(value is not None for value in differences):
      rows.append(
        (f"{source}: accuracy_t2 minus {names[reference]}{_classes(differences)}", *map(_difference, differences))
      )
  return aligned(rows)


def _rate(rate: dict | None) -> str:
  if rate is None or not rate["n"]:
    return NONE
  text = f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
  return text + _seeds_in_brackets(rate, lambda value: f"{100 * value:.1f}")


def _classes(differences: Sequence[dict | None]) -> str:
  """Return the number of structure classes, where problems share one."""
  few = [value["classes"] for value in differences if value is not None and value["classes"] < value["n"]]
  return f" ({max(few):,} classes)" if few else ""


def _difference(difference: dict | None) -> str:
  if difference is None:
    return NONE
  between = f"{points(difference['low'])}, {points(difference['high'])}"
  if difference.get("spread") is not None:
    between += "; t: " + ", ".join(map(points, difference["spread"]))
  return f"{points(difference['difference'])} [{between}]" + _seeds_in_brackets(difference, points)


def _seeds_in_brackets(value: dict, written) -> str:
  if len(value.get("seeds", ())) < 2:
    return ""
  return " (" + " ".join(NONE if seed_value is None else written(seed_value) for seed_value in value["seeds"]) + ")"

"""The table over seeds as text, printed at the end of a sweep."""

from collections.abc import Sequence

from insec_jax.pages import seeds
from insec_jax.pages.correction import NONE, main_rows, points

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
      rows.append((f"{source}: accuracy_t2 minus {names[reference]}", *map(_difference, differences)))
  return aligned(rows)


def _rate(rate: dict | None) -> str:
  if rate is None or not rate["n"]:
    return NONE
  text = f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
  return text + _seeds_in_brackets(rate, lambda value: f"{100 * value:.1f}")


def _difference(difference: dict | None) -> str:
  if difference is None:
    return NONE
  return (
    f"{points(difference['difference'])} [{points(difference['low'])}, {points(difference['high'])}]"
    + _seeds_in_brackets(difference, points)
  )


def _seeds_in_brackets(value: dict, written) -> str:
  if len(value.get("seeds", ())) < 2:
    return ""
  return " (" + " ".join(NONE if seed_value is None else written(seed_value) for seed_value in value["seeds"]) + ")"


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Return the rows as text with aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
  return "\n".join(line.rstrip() for line in lines)

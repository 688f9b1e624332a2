"""The rates of results.json as text to read in a terminal."""

from collections.abc import Sequence

from insec_jax.config_measures import PROBE, STATE

PROBES = ("detection", "correction", "corrected", "correction, forced", "parroting", "recovery")
SOLUTIONS = ("accuracy_t1", "accuracy_t2", "false_alarms", "precision", "wrong_to_right", "right_to_wrong")


def table(results: dict) -> str:
  """Return results.json as text: all rates of the main sources, the main rates of every source, the thresholds."""
  rates, tokens = results["rates"], results["tokens_per_problem"]
  blocks = []
  for sources in (["injected", "own", "own sampled"], ["solutions", "solutions sampled"]):
    names = list(dict.fromkeys(name for source in sources for name in rates[source]))
    blocks.append([("", *sources)] + [(name, *(cell(rates[source], name) for source in sources)) for name in names])
  probes = [source for source in rates if not source.startswith(("solutions", STATE, PROBE))]
  blocks.append([("", *PROBES)] + [(source, *(cell(rates[source], name) for name in PROBES)) for source in probes])
  solutions = [source for source in rates if source.startswith("solutions")]
  blocks.append(
    [("", *SOLUTIONS, "tokens")]
    + [
      (source, *(cell(rates[source], name) for name in SOLUTIONS), f"{tokens[source]['mean']:.1f}")
      for source in solutions
    ]
  )
  if "tokens" in results:  # there are rivals
    blocks.append(
      [("right answers and their tokens", "accuracy_t2", "tokens")]
      + [
        (source, cell(rates[source], "accuracy_t2"), f"{tokens[source]['mean']:.1f}")
        for source in sorted(solutions, key=lambda source: tokens[source]["mean"])
        if "larger" not in source
      ]
    )
    blocks.append(
      [("", "metric", "rate")]
      + [
        (source, name, cell(rates[source], name))
        for source in (STATE, PROBE, f"{PROBE} sampled")
        for name in rates.get(source, ())
      ]
    )
  chosen = results["thresholds"]
  kinds = ("flag_bias", "confidence")
  blocks.append(
    [("chosen on validation", *kinds, "right steps")]
    + [
      (
        name,
        *("-" if chosen[kind][name] is None else f"{chosen[kind][name]:.3f}" for kind in kinds),
        str(chosen["n"][name]["right"]),
      )
      for name in chosen["n"]
    ]
  )
  return "\n\n".join(map(aligned, blocks))


def cell(rates: dict[str, dict], name: str) -> str:
  """Return the rate of this name; a dash where it was not measured, or n is 0."""
  if name not in rates or not rates[name]["n"]:
    return "-"
  rate = rates[name]
  return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}] n={rate['n']}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Return the rows as text with aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
  return "\n".join(line.rstrip() for line in lines)

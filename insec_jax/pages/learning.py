"""Learning curves: accuracy over trained tokens, measured during training (train.curve_points), over seeds.

An arm is the list of its runs, one a seed.
"""

from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

from insec_jax.config_measures import CURVE, CURVE_PROBLEMS
from insec_jax.evaluation import statistics
from insec_jax.pages import charts, seeds
from insec_jax.pages.elements import element
from insec_jax.pages.runs import Arm, Run


def points(runs: Sequence[Run], key: str) -> list[dict]:
  """Return the points of an arm by step: step, "trained_tokens" (the mean over seeds), and the rate over its seeds.

  The rate is that of `seeds.pooled_rate`: a mean with the t-interval over seeds; of one seed with Wilson's.
  """
  lines = [{line["step"]: line for line in run.lines if key in line} for run in runs]
  found = []
  for step in sorted({step for of_seed in lines for step in of_seed}):
    there = [of_seed[step] for of_seed in lines if step in of_seed]
    tokens = sum(line["trained_tokens"] for line in there) / len(there)
    rates = [_rate(of_seed[step], key) if step in of_seed else None for of_seed in lines]
    found.append({"step": step, "trained_tokens": tokens, **seeds.pooled_rate(key, rates)})
  return found


def _rate(line: Mapping[str, float], key: str) -> dict:
  num = int(line[CURVE_PROBLEMS])
  right = round(line[key] * num)
  return statistics.Rate(right, num).to_json()


def as_json(arms: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, list[dict]]]:
  """Return {arm: {key of CURVE: its points}} of the arms that have some."""
  all_points = {arm: {key: found for key in CURVE if (found := points(runs, key))} for arm, runs in arms.items()}
  return {arm: found for arm, found in all_points.items() if found}


def curves(arms: Sequence[Arm]) -> list[Element]:
  """Return a chart for each kind of decoding, one curve an arm with its interval over seeds; none without any point."""
  drawn = []
  for key, words in CURVE.items():
    by_arm = [points(arm.runs, key) for arm in arms]
    if any(by_arm):
      drawn.append(
        charts.chart(
          f"Right answers in per cent, greedy, {words}",
          [[(point["trained_tokens"], 100 * point["rate"]) for point in found] for found in by_arm],
          "trained tokens",
          bars=[
            [(point["trained_tokens"], 100 * point["low"], 100 * point["high"]) for point in found] for found in by_arm
          ],
        )
      )
  if not drawn:
    return []
  num = max(line[CURVE_PROBLEMS] for arm in arms for run in arm.runs for line in run.lines if CURVE_PROBLEMS in line)
  return [
    element("h3", "Learning curves"),
    element(
      "p",
      f"Measured during training on {num:,.0f} held-out problems, the mean over seeds with its 95 % t-interval (or "
      "Wilson’s of all problems, where that reaches further). They describe the runs, and test nothing. Tokens are "
      "those of the run itself, without its base’s.",
      class_="soft",
    ),
    charts.legend([arm.name for arm in arms]),
    element("div", *drawn, class_="charts"),
  ]

"""The table to read first, in plain words: ten rows and those of lm-eval, in a terminal and at the top of the page."""

from collections.abc import Sequence

from insec_jax.pages import seeds, side_effects
from insec_jax.pages.correction import NONE
from insec_jax.pages.runs import Arm

# Words, source and metric of each row. The sources are greedy.
ROWS = (
  ("injected mistakes that it flags", "injected", "detection"),
  ("- and then corrects, of those flagged", "injected", "correction"),
  ("right steps that it flags (false alarms)", "solutions", "false_alarms"),
  ("answers with a mistake of its own", "solutions", "own_mistakes"),
  ("- its own mistakes that it flags", "own", "detection"),
  ("- and then corrects, of those flagged", "own", "correction"),
  ("right answers", "solutions", "accuracy_t2"),
  ("right answers when it may not flag", "solutions, flags banned", "accuracy_t2"),
)


def brief(arms: Sequence[Arm]) -> list[tuple[str, ...]]:
  """Return the rows, a header first, with a column for each arm that was evaluated; rates are means over seeds."""
  evaluated = [arm for arm in arms if arm.evaluated]
  rates = [seeds.pooled([run.results for run in arm.evaluated])["rates"] for arm in evaluated]
  trained = [[tokens for run in arm.evaluated if (tokens := run.trained_tokens) is not None] for arm in evaluated]
  return [
    ("", *(arm.name for arm in evaluated)),
    ("tokens trained on", *(f"{sum(tokens) / len(tokens):,.0f}" if tokens else NONE for tokens in trained)),
    *((words, *(_percent(value.get(source, {}).get(metric)) for value in rates)) for words, source, metric in ROWS),
    *side_effects.in_rows([[run.scores for run in arm.runs] for arm in evaluated], NONE),
  ]


def _percent(rate: dict | None) -> str:
  return f"{100 * rate['rate']:.1f} % (n {rate['n']:,})" if rate is not None and rate["n"] else NONE

"""Scores of other tasks by the LM Evaluation Harness (lm-eval), to see what training did to them."""

import math
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from insec_jax.command import InputError
from insec_jax.files import buckets
from insec_jax.files.reading import read_json

FOLDER = "lm_eval"  # of a workdir: what `lm_eval --output_path WORKDIR/lm_eval` writes
RESULTS = re.compile(r"results_.*\.json")
METRIC = re.compile(r"(?!.*_stderr)([^,]+),(.+)")  # name and filter


class Score(NamedTuple):
  """Value of a metric on `num` examples."""

  value: float
  num: int


def read_scores(workdir: pathlib.Path) -> dict[str, Score]:
  """Return the scores of a workdir by task and metric, the newest of each; none without files of lm-eval.

  Raises InputError for a file that lm-eval did not write.
  """
  scores = {}
  files = [path for path in buckets.files_below(workdir / FOLDER) if RESULTS.fullmatch(path.name)]
  for path in sorted(files, key=lambda path: path.name):  # named by their time
    found = read_json(path, "the results of lm-eval")
    try:
      for task, values in found["results"].items():
        num = found["n-samples"].get(task, {}).get("effective", 0)  # a group has none of its own
        for key, value in values.items():
          if (match := METRIC.fullmatch(key)) and isinstance(value, int | float) and math.isfinite(value):
            name = match[1] if match[2] == "none" else f"{match[1]} ({match[2]})"
            scores[f"{task}: {name}"] = Score(value, num)
    except (KeyError, AttributeError, TypeError):
      raise InputError(f"{path} has no results of lm-eval; run lm_eval again, or remove it") from None
  return scores


def in_rows(arms: Sequence[Sequence[dict[str, Score]]], missing: str) -> list[tuple[str, ...]]:
  """Return a row for each score that an arm has: its name, and for each arm the mean over the seeds that have it."""
  names = dict.fromkeys(name for arm in arms for scores in arm for name in scores)
  return [
    (name, *(_mean([scores[name] for scores in arm if name in scores], missing) for arm in arms)) for name in names
  ]


def _mean(scores: Sequence[Score], missing: str) -> str:
  if not scores:
    return missing
  num = sum(score.num for score in scores)
  return f"{sum(score.value for score in scores) / len(scores):.3f}" + (f" (n {num:,})" if num else "")

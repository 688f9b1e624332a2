"""Learning curve: right answers on a few held-out problems, measured while a run trains.

A point is measured with the weights at hand, so no checkpoint of its step is needed, then or later. Its values are part
of the line of that step in metrics.jsonl. The problems are the first of those that evaluate solves.
"""

import dataclasses

from insec_jax.config import Config
from insec_jax.config_measures import CURVE, CURVE_PROBLEMS, MOST_CURVE_PROBLEMS
from insec_jax.data.problems import problems_to_solve
from insec_jax.distributed.processes import Processes
from insec_jax.evaluation.probing import NO_FLAG, Prober
from insec_jax.generation import loading
from insec_jax.generation.generator import TextGenerator
from insec_jax.method import tasks
from insec_jax.training.run import Run

FREE, BANNED = CURVE


def steps(config: Config) -> frozenset[int]:
  """Return the steps after which a point is measured: train.curve_points of them, evenly spaced, with the last one."""
  points = config.train.curve_points
  return frozenset(number * config.train.steps // points for number in range(1, points + 1))


def num_texts(config: Config) -> int:
  """Return the number of texts that all points of a run write, each pass counted whole (see measuring.num_texts)."""
  return len(CURVE) * config.train.curve_points * min(config.evaluate.num_problems, MOST_CURVE_PROBLEMS)


def measure(config: Config, processes: Processes, params, run: Run) -> dict[str, float]:
  """Return the values of a point: the rates of right answers, greedy, and the number of problems.

  Every process of the run calls this and solves its share. Without a special flag token none can be banned, and that
  rate is left out.
  """
  task = tasks.get(config.task)
  writer = TextGenerator(loading.from_training(params, run.config, run.tokenizer, config, is_marked=True))
  num = min(config.evaluate.num_problems, MOST_CURVE_PROBLEMS)
  few = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, num_problems=num))
  problems = problems_to_solve(task, few)[processes.index :: processes.num]
  prober = Prober(writer, task, config)
  ways = {FREE: 0.0} if writer.flag_id is None else {BANNED: NO_FLAG, FREE: 0.0}  # most texts are the same in both
  solved = {
    way: prober.solve(problems, label=f"learning curve, {CURVE[way]}", temperature=0.0, flag_bias=bias)
    for way, bias in ways.items()
  }
  counts = {way: sum(score.right for score in solutions.scores) for way, solutions in solved.items()}
  shares = processes.gather("a point of the learning curve", [len(problems), counts])
  total = sum(share for share, _ in shares)
  rates = {way: sum(right[way] for _, right in shares) / total for way in CURVE if way in ways}
  return {**rates, CURVE_PROBLEMS: total}

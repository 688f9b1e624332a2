"""Plan of a study: what is fixed before its first run, in DIR/plan.json, and cannot change between its runs.

    endpoints   evaluate.endpoints, the same in every arm
    seeds       of --seeds: seeds that are added after a look at the others would bias what is tested
    bases       of --base
    commit      of this package, null outside a git checkout; `changes`: digest of what is not committed in it
    configs     of each arm, without the keys that change no result; `digest` is theirs
    later_arms  arms that came after the first run: they are description

Arms may be added; those that the endpoints name are there from the first run on.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.config_endpoints import parse
from insec_jax.data.problems import larger_task, problems_to_solve
from insec_jax.evaluation.rivals import read_mistakes
from insec_jax.files.reading import read_json
from insec_jax.files.writing import write_text
from insec_jax.method import tasks
from insec_jax.study import Study, StudyStage
from insec_jax.training import layout, workdir

PLAN = "plan.json"
HELD = ("evaluate.", "mine.")  # not free here, though a workdir goes on with other values
FIXED = ("endpoints", "seeds", "bases", "commit", "changes")
# Types of the values in the file.
TYPES: dict[str, Any] = {
  "endpoints": list,
  "seeds": list,
  "bases": list,
  "commit": str | None,
  "changes": str | None,
  "configs": dict,
  "digest": str,
  "later_arms": list,
}


def endpoints(study: Study, stages: Sequence[StudyStage]) -> tuple[str, ...]:
  """Return the endpoints; InputError if arms name different ones, or one needs an arm that is not in --arms."""
  by_arm = {stage.arm: stage.config.evaluate.endpoints for stage in stages if stage.arm in study.arms}
  first = study.arms[0]
  for arm, named in by_arm.items():
    if named != by_arm[first]:
      raise InputError(
        f"evaluate.endpoints is {_shown(by_arm[first])} in arm {first} and {_shown(named)} in arm {arm}; name the same "
        "in every arm"
      )
  for endpoint in map(parse, by_arm[first]):
    if absent := [arm for arm in endpoint.arms if arm not in study.arms]:
      raise InputError(
        f"evaluate.endpoints has {endpoint.text!r}, and --arms={','.join(study.arms)} has no {absent[0]!r}; add the arm"
      )
  return by_arm[first]


def check_evaluations(study: Study, stages: Sequence[StudyStage]) -> None:
  """Raise InputError where an evaluation would be refused for something that no training reads.

  It needs a task with a checker, sizes that the task has, and in a given evaluate.swapped_path mistakes in the problems
  that it solves.
  """
  checked: set = set()
  for stage in stages:
    if stage.program == "evaluate":
      try:
        _check_evaluation(stage.config, study.output, checked)
      except InputError as error:
        raise InputError(f"arm {stage.arm} could not be evaluated: {error}") from None


def _check_evaluation(config: Config, output: pathlib.Path, checked: set) -> None:
  """Raise InputError as `check_evaluations` does; `checked` holds what was read before."""
  task, path = tasks.get(config.task), config.evaluate.swapped_path
  larger_task(config)
  source = (path, config.seed, config.task, config.data, config.mistakes, config.evaluate.num_problems)
  if not path or _is_made(path, output) or source in checked:
    return
  if not read_mistakes(path, problems_to_solve(task, config), task):
    raise InputError(
      f"evaluate.swapped_path={path} has no mistake to continue from; give the results of a model that makes some"
    )
  checked.add(source)


def hold(study: Study, stages: Sequence[StudyStage]) -> None:
  """Write the plan, or compare it with the one that the study was begun with.

  Raises InputError if they differ in more than added arms, or if results are there without a plan.
  """
  path = study.output / PLAN
  plan = _plan(study, stages)
  if path.exists():
    before = _read(path)
    if differ := list(_differences(before, plan)):
      raise InputError(
        f"{path} is the plan of this study, and now differ: {', '.join(differ)}; give the values that it was begun "
        "with, or another --output"
      )
    later = [arm for arm in plan["configs"] if arm not in before["configs"]]
    plan["later_arms"] = [*before["later_arms"], *later]
    plan["configs"] = before["configs"] | plan["configs"]
    plan["digest"] = _digest(plan["configs"])
  elif there := [file for file in _results(study) if file.exists()]:
    raise InputError(
      f"{there[0]} was measured before, and its plan, {path}, is not there; bring it back, or give another --output"
    )
  write_text(path, json.dumps(plan, indent=2) + "\n")


def _plan(study: Study, stages: Sequence[StudyStage]) -> dict[str, Any]:
  trained = [stage for stage in stages if stage.program == "train"]
  first = {stage.arm: stage for stage in reversed(trained)}  # of the first seed
  configs = {stage.arm: _fixed(stage.config, study.output) for stage in trained if first[stage.arm] is stage}
  commit, changes = workdir.commit()
  plan = {
    "endpoints": endpoints(study, stages),
    "seeds": study.seeds,
    "bases": study.bases,
    "commit": commit,
    "changes": changes,
    "digest": _digest(configs),
    "later_arms": [],
    "configs": configs,
  }
  return json.loads(json.dumps(plan))  # as JSON has it: no tuples


def _fixed(config: Config, output: pathlib.Path) -> dict[str, Any]:
  """Return the values on which results depend, without the seed and what the study itself makes for each seed."""
  return {
    key: value
    for key, value in sorted(layout.flat(config).items())
    if key != "seed" and not layout.is_free(key, HELD) and not _is_made(value, output)
  }


def _is_made(value: Any, output: pathlib.Path) -> bool:
  return isinstance(value, str) and value != "" and output in pathlib.Path(value).parents


def _digest(configs: dict[str, dict]) -> str:
  return hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    plan = read_json(path, "the plan of a study")
    for name, kind in TYPES.items():
      if name not in plan or not isinstance(plan[name], kind):
        raise InputError(f"{path}: {name} is {_shown(plan.get(name))}, which no study writes")
    if wrong := [arm for arm, values in plan["configs"].items() if not isinstance(values, dict)]:
      raise InputError(f"{path}: configs has {_shown(plan['configs'][wrong[0]])} for arm {wrong[0]}")
    if _digest(plan["configs"]) != plan["digest"]:
      raise InputError(f"{path}: its digest is not that of its configs")
  except InputError as error:
    seen = str(error).partition("; ")[0]
    raise InputError(f"{seen}; bring the plan back as it was, or give another --output") from None
  return plan


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
  """Yield each value that differs, with the one before; arms that only one of the two has are passed over."""
  for name in FIXED:
    if before[name] != now[name]:
      yield f"{name} {_shown(now[name])} (was {_shown(before[name])})"
  for arm, values in now["configs"].items():
    was = before["configs"].get(arm, values)
    for key in sorted(values.keys() | was.keys()):
      if values.get(key) != was.get(key):
        yield f"{key}={_shown(values.get(key))} in arm {arm} (was {_shown(was.get(key))})"


def _shown(value: Any) -> str:
  return f"{json.dumps(value):.200}"


def _results(study: Study) -> Iterator[pathlib.Path]:
  for seed in study.seeds:
    for arm in study.arms:
      yield study.workdir(arm, seed) / "results.json"

"""Problems: which of them serve which purpose.

  purpose                  made by the task: split and seed    from data.path (task.name in FROM_FILE)
  training                 "train", seed                       records that are not held out
  held-out loss            "test", seed                        held-out records
  solving                  "test", seed                        held-out problems
  probes                   "probe", seed                       held-out problems
  choosing thresholds      "validation", seed                  held-out problems that are not solved, see below
  mining                   "mine", a seed for each mining      problems trained on, or data.to_mine, ordered by the seed

Held out are the records of data.heldout_path, or without one data.num_heldout of those of data.path; the prompt of none
is trained on. No problem is in two splits of a task. From a file, thresholds are chosen on the evaluate.num_problems
held-out problems after those that are solved (some of which may be probed). Where fewer are left, they are chosen on
problems trained on, in the order of the file, and `chosen_apart` is False. With mistakes.source other than "injected"
the first two are from data.path for any task.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence, Set

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import FROM_FILE, Config
from insec_jax.data.records import Record, prompt_text, read
from insec_jax.data.storage import Computed, Records
from insec_jax.method import tasks
from insec_jax.method.tasks import Problem, Task


def split_records(
  config: Config, split: str, *, left_out: list[str] | None = None, kept: Records | None = None
) -> Sequence[tuple[int, Record]]:
  """Return the records of the split "train" or "heldout", each with its index among all of data.path or of the split.

  With data.heldout_path, records of data.path with a prompt of that file are left out; their places are added to
  `left_out`. The records read are put into `kept`, empty before, where they stay; by default into memory. Raises
  InputError where none is left to train on.
  """
  if split not in ("train", "heldout"):
    raise ValueError(f"split {split!r} is neither 'train' nor 'heldout'")
  if config.reads_records:
    if not config.data.path:
      raise InputError(
        f"mistakes.source={config.mistakes.source!r} reads records from a file; give --config.data.path=FILE.jsonl"
      )
    kept = list[Record]() if kept is None else kept
    if config.data.heldout_path:
      return _split_by_file(config, split, [] if left_out is None else left_out, kept)
    prompts: list[bytes] = []
    kept.extend(_noted(_read(config, "data.path"), prompts))
    is_held = _held_out(prompts, config)
    return _picked([index for index, held in enumerate(is_held) if held == (split == "heldout")], kept)
  num = config.data.num_records if split == "train" else config.data.num_heldout
  made = tasks.problems(tasks.get(config.task), "train" if split == "train" else "test", num=num, seed=config.seed)
  return [
    (index, Record(problem, f"{config.task.name} problem {index} ({split})")) for index, problem in enumerate(made)
  ]


def _read(config: Config, name: str) -> Iterator[Record]:
  """Yield the records of data.path or data.heldout_path."""
  data, checked = config.data, config.task.name != "records"
  if name == "data.path":
    return read(data.path, limit=data.num_records, checked=checked, name=name, columns=data.fields)
  return read(data.heldout_path, limit=data.num_heldout, checked=checked, name=name, columns=data.fields)


def held_out_prompts(config: Config) -> Set[bytes]:
  """Return the digest of each prompt of the split "heldout"; records of files are read one at a time."""
  if not config.reads_records:
    return {digest(record) for _, record in split_records(config, "heldout")}
  if config.data.heldout_path:
    return {digest(record) for record in _read(config, "data.heldout_path")}
  prompts = [digest(record) for record in _read(config, "data.path")]
  return {prompt for prompt, held in zip(prompts, _held_out(prompts, config), strict=True) if held}


def _noted(records: Iterable[Record], prompts: list[bytes]) -> Iterator[Record]:
  """Yield the records, and add the digest of each prompt to `prompts`."""
  for record in records:
    prompts.append(digest(record))
    yield record


def _picked(indices: list[int], kept: Records) -> Sequence[tuple[int, Record]]:
  """Return the records at these indices of `kept`, with their index."""
  return Computed(len(indices), lambda number: (indices[number], kept[indices[number]]))


def _split_by_file(config: Config, split: str, left_out: list[str], kept: Records) -> Sequence[tuple[int, Record]]:
  if split == "heldout":
    kept.extend(_read(config, "data.heldout_path"))
    return _picked(list(range(len(kept))), kept)
  held = held_out_prompts(config)
  indices: list[int] = []

  def others() -> Iterator[Record]:
    for index, record in enumerate(_read(config, "data.path")):
      if digest(record) in held:
        left_out.append(record.where)
      else:
        indices.append(index)
        yield record

  kept.extend(others())
  if not indices:
    raise InputError(
      f"every prompt of data.path={config.data.path} is also one of data.heldout_path={config.data.heldout_path}, so "
      "none is left to train on; give other records"
    )
  return Computed(len(indices), lambda number: (indices[number], kept[number]))


def digest(record: Record) -> bytes:
  """Return the SHA-256 of the prompt of a record."""
  return hashlib.sha256(prompt_text(record.content).encode()).digest()


def _held_out(prompts: list[bytes], config: Config) -> list[bool]:
  """Return which records are held out: `prompts`, digests, in their order until data.num_heldout records are reached.

  Records with the same prompt stay together, so a held-out prompt is never trained on.
  """
  count = collections.Counter(prompts)
  held, num = set(), 0
  for prompt in sorted(count):
    if num >= config.data.num_heldout:
      break
    held.add(prompt)
    num += count[prompt]
  if num == len(prompts):
    raise InputError(
      f"{config.data.path}: data.num_heldout={config.data.num_heldout} leaves none of the {len(prompts)} "
      "records read to train on; lower it or give more records"
    )
  return [prompt in held for prompt in prompts]


def problems_to_solve(task: Task, config: Config) -> list[Problem]:
  """Return the evaluate.num_problems problems that the model solves."""
  num = config.evaluate.num_problems
  if task.name in FROM_FILE:
    return _in_units(_heldout_problems(config)[:num], config)
  return _in_units(tasks.problems(task, "test", num=num, seed=config.seed), config)


def larger_problems(config: Config) -> list[Problem]:
  """Return problems to solve of the sizes above task.max_size, up to evaluate.max_size; none where that is 0.

  Raises InputError for a size that the task does not support.
  """
  task = larger_task(config)
  return [] if task is None else problems_to_solve(task, config)


def larger_task(config: Config) -> Task | None:
  """Return the task of `larger_problems`, None where there are none; raise InputError as that does."""
  if not config.evaluate.max_size:
    return None
  sizes = dataclasses.replace(config.task, min_size=config.task.max_size + 1, max_size=config.evaluate.max_size)
  try:
    return tasks.get(sizes)
  except InputError as error:
    raise InputError(f"evaluate.max_size={config.evaluate.max_size}, taken as task.max_size: {error}") from None


def validation_problems(task: Task, config: Config) -> list[Problem]:
  """Return the evaluate.num_problems problems to choose thresholds on."""
  num = config.evaluate.num_problems
  if task.name in FROM_FILE:
    apart = _apart(config)
    return _in_units(apart if len(apart) == num else _problems(config, "train")[:num], config)
  return _in_units(tasks.problems(task, "validation", num=num, seed=config.seed), config)


def chosen_apart(config: Config) -> bool:
  """Return whether `validation_problems` are neither trained on, mined, solved nor, of a task, probed."""
  return config.task.name not in FROM_FILE or len(_apart(config)) == config.evaluate.num_problems


def _apart(config: Config) -> list[Problem]:
  """Return at most evaluate.num_problems held-out problems that are not solved."""
  num = config.evaluate.num_problems
  return _heldout_problems(config)[num : 2 * num]


def problems_to_probe(task: Task, config: Config) -> list[Problem]:
  """Return the problems in which mistakes are injected to see what the model does next, not cut into steps yet."""
  if task.name in FROM_FILE:
    return _heldout_problems(config)
  return tasks.problems(task, "probe", num=config.evaluate.num_probes, seed=config.seed)


def problems_to_mine(task: Task, config: Config, *, seed: int) -> list[Problem]:
  """Return mine.num_problems problems, or at most as many of data.path; with data.to_mine none that is trained on."""
  num = config.mine.num_problems
  if task.name not in FROM_FILE:
    return _in_units(tasks.problems(task, "mine", num=num, seed=seed), config)
  given = [
    record.content
    for _, record in split_records(config, "train")
    if isinstance(record.content, Problem) and (not config.data.to_mine or is_to_mine(record, config))
  ]
  if not given and config.data.to_mine:
    raise InputError(
      f"data.to_mine={config.data.to_mine} takes no question and answer of {config.data.path} to mine; raise it, or "
      "give more problems"
    )
  if not given:
    raise InputError(f"{config.data.path} has no question and answer to mine; give a file of problems as data.path")
  order = np.random.default_rng((seed, *b"mine")).permutation(len(given))
  return _in_units([given[k] for k in order[:num]], config)


def is_to_mine(record: Record, config: Config) -> bool:
  """Return whether the record is one of the data.to_mine of all, by a hash of its prompt."""
  position = int.from_bytes(hashlib.sha256(b"mine" + digest(record)).digest()[:8], "big") / 2**64
  return position < config.data.to_mine


def _problems(config: Config, split: str) -> list[Problem]:
  return [record.content for _, record in split_records(config, split) if isinstance(record.content, Problem)]


def _heldout_problems(config: Config) -> list[Problem]:
  problems = _problems(config, "heldout")
  if not problems:
    raise InputError(
      f"{config.data.heldout_path or config.data.path} has no held-out problem to measure on; raise "
      "data.num_heldout, or give a data.heldout_path with problems"
    )
  return problems


def _in_units(problems: list[Problem], config: Config) -> list[Problem]:
  return [tasks.in_units(problem, config.mistakes.unit) for problem in problems]

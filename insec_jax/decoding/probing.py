"""Probing: wrong steps set before a model, by a rule or by itself, and what it does after each.

A source of mistakes is `injected` (a rule's wrong step after right ones) or `own` (the first wrong step of a solution
that the model wrote). Each is measured as it comes, and once more with the flag forced right after the wrong step.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import records
from insec_jax.decoding.writer import Writer, Written
from insec_jax.method import mistakes, scoring, tasks
from insec_jax.method.mistakes import Probe
from insec_jax.method.roles import MISTAKE, PROMPT, TEXT
from insec_jax.method.scoring import Outcome, SolutionScore
from insec_jax.method.tasks import Problem, Task
from insec_jax.method.transcript import Markers, Piece, Transcript, parse, split_steps

FROM_FILE = ("gsm8k",)  # tasks whose problems are records of data.path


@dataclasses.dataclass(frozen=True)
class FlagScores:
  """Log p of the flag right after steps: of each wrong one with its class, and of each right one."""

  wrong: list[tuple[str, float]]
  right: list[float]


@dataclasses.dataclass(frozen=True)
class Probed:
  """One source of mistakes, measured; lists run over its probes, `forced` over those that leave room to go on."""

  outcomes: list[Outcome]
  forced: list[Outcome]
  flag_scores: FlagScores | None  # None where the markers are plain words
  transcripts: list[Transcript]


@dataclasses.dataclass(frozen=True)
class Solved:
  """Whole solutions, one per problem, and the model's own first wrong steps among them."""

  scores: list[SolutionScore]
  num_tokens: list[int]
  transcripts: list[Transcript]
  own: Probed


def solved_problems(task: Task, config: Config) -> list[Problem]:
  """The problems that the model solves: of the split "test", or the held-out records of data.path."""
  if task.name in FROM_FILE:
    found = _held_out(config)[:config.evaluate.num_problems]
  else:
    found = tasks.problems(task, "test", num=config.evaluate.num_problems, seed=config.seed)
  return [tasks.in_units(problem, config.mistakes.unit) for problem in found]


def injected_probes(task: Task, config: Config) -> list[Probe]:
  """evaluate.num_probes probes in equal shares of every error class of the task, whichever classes were trained.

  They stand anywhere in problems of the split "probe", or in the held-out records of data.path; no problem serves twice
  while there is another. A class for which too few places are found has fewer.
  """
  num = config.evaluate.num_probes
  problems = (_held_out(config) if task.name in FROM_FILE
              else tasks.problems(task, "probe", num=num, seed=config.seed))
  uses = collections.Counter()
  found = []
  for number, error in enumerate(task.error_classes):
    rng = np.random.default_rng((config.seed, number))
    only = dataclasses.replace(config.mistakes, classes=(error,), place="anywhere")
    share = (num + number) // len(task.error_classes)  # over the classes these add up to num
    of_class = []
    for index in sorted(range(len(problems)), key=lambda index: uses[index]):
      if len(of_class) == share:
        break
      probe = mistakes.probe(problems[index], task, only, rng)
      if probe is not None:
        of_class.append(probe)
        uses[index] += 1
    found += of_class
  return found


def _held_out(config: Config) -> list[Problem]:
  problems = [problem for problem, _ in records.problems(config, "heldout")]
  if not problems:
    raise InputError(f"{config.data.path} has no held-out problem to measure on; raise data.num_heldout")
  return problems


class Prober:
  """A model, a task and how long to write: does the probing."""

  def __init__(self, writer: Writer, task: Task, config: Config):
    self.writer, self.task = writer, task
    self.markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
    self.unit = config.mistakes.unit
    self._seed = config.seed
    self._limits = {"max_tokens": config.evaluate.max_tokens, "batch_size": config.evaluate.batch_size}

  def injected(self, probes: Sequence[Probe]) -> Probed:
    """What the model does, greedily, after injected mistakes."""
    def begin(probe: Probe, *last: str) -> np.ndarray:
      return self.writer.encode(probe.problem.prompt, answer="".join((*probe.before, *last)))

    begins = [begin(probe, probe.wrong) for probe in probes]
    written = self.writer.write(begins, label="injected mistakes", **self._limits)
    if self.writer.flag_id is None:
      forced = [begin(probe, probe.wrong, self.markers.flag) for probe in probes]
      flag_scores = None
    else:
      forced = [np.append(begin_T, self.writer.flag_id) for begin_T in begins]
      right_n1 = self.writer.sampler.next_logprobs(
          [begin(probe, probe.problem.steps[len(probe.before)]) for probe in probes], [self.writer.flag_id],
          batch_size=self._limits["batch_size"])
      wrong = [(probe.error, float(one.generation.flag_logprobs[0]))
               for probe, one in zip(probes, written, strict=True)]
      flag_scores = FlagScores(wrong, right_n1[:, 0].tolist())
    written_forced = self.writer.write(forced, label="injected mistakes, flag forced", **self._limits)
    outcomes = [self._outcome(*one) for one in zip(probes, written, strict=True)]
    transcripts = [
      (Piece(PROMPT, probe.problem.prompt), *pieces_of(TEXT, "".join(probe.before)), Piece(MISTAKE, probe.wrong),
       *parse(one.text, self.markers, self.unit)) for probe, one in zip(probes, written, strict=True)]
    return Probed(outcomes, [self._outcome(*one, forced=True) for one in zip(probes, written_forced, strict=True)],
                  flag_scores, transcripts)

  def solve(self, problems: Sequence[Problem], *, temperature: float) -> Solved:
    """The model's solutions, and what it does after its own first wrong steps."""
    how = f"at temperature {temperature:g}" if temperature else "greedily"
    drawn = {"temperature": temperature, "seed": self._seed, **self._limits}
    prompts = [self.writer.encode(problem.prompt) for problem in problems]
    written = self.writer.write(prompts, label=f"solutions {how}", **drawn)
    scores = [scoring.score_solution(problem, one.text, finished=one.finished, task=self.task, markers=self.markers,
                                     unit=self.unit) for problem, one in zip(problems, written, strict=True)]
    failed = [index for index, score in enumerate(scores) if score.own is not None]
    begins = {index: self._flagged_own(problems[index], prompts[index], written[index], scores[index].own.prefix)
              for index in failed}
    begins = {index: begin for index, begin in begins.items() if begin is not None}
    forced = self.writer.write(list(begins.values()), label=f"own mistakes {how}, flag forced", **drawn)
    own_probes = {index: Probe(problems[index], scores[index].own.before, scores[index].own.wrong,
                               scores[index].own.outcome.error) for index in failed}
    own = Probed(
        [scores[index].own.outcome for index in failed],
        [self._outcome(own_probes[index], one, forced=True) for index, one in zip(begins, forced, strict=True)],
        self._own_flag_scores(problems, written),
        [self._solution(problems[index], written[index], scores[index]) for index in failed])
    transcripts = [self._solution(*one) for one in zip(problems, written, scores, strict=True)]
    return Solved(scores, [len(one.generation.tokens) for one in written], transcripts, own)

  def _outcome(self, probe: Probe, written: Written, *, forced: bool = False) -> Outcome:
    return scoring.read_probe(probe.problem, probe.before, probe.wrong, written.text, finished=written.finished,
                              task=self.task, markers=self.markers, unit=self.unit, forced=forced)

  def _solution(self, problem: Problem, written: Written, score: SolutionScore) -> Transcript:
    """The solution with its first wrong step shown as a mistake, flagged or not."""
    prompt, text = Piece(PROMPT, problem.prompt), written.text
    if score.own is None:
      return (prompt, *parse(text, self.markers, self.unit))
    end = len(score.own.prefix)
    start = end - len(score.own.wrong)
    return (prompt, *parse(text[:start], self.markers, self.unit), Piece(MISTAKE, score.own.wrong),
            *parse(text[end:], self.markers, self.unit))

  def _flagged_own(self, problem: Problem, prompt: np.ndarray, written: Written, prefix: str) -> np.ndarray | None:
    """Prompt, own text up to the end of the wrong step, flag; None where that leaves no room to go on."""
    num = num_tokens(written, len(prefix), self.writer)
    if self.writer.flag_id is None:
      begin = self.writer.encode(problem.prompt, answer=prefix + self.markers.flag)
    elif num is not None:
      begin = np.concatenate([prompt, written.generation.tokens[:num], [self.writer.flag_id]])
    elif self.markers.flag in prefix or self.markers.fix in prefix:
      return None  # neither a token ends here nor could the markers be encoded again as markers
    else:
      begin = np.append(self.writer.encode(problem.prompt, answer=prefix), self.writer.flag_id)
    fits = len(begin) + self._limits["max_tokens"] <= self.writer.sampler.config.max_positions
    return begin.astype(np.int32) if fits else None

  def _own_flag_scores(self, problems: Sequence[Problem], written: Sequence[Written]) -> FlagScores | None:
    if self.writer.flag_id is None:
      return None
    scores = FlagScores([], [])
    for problem, one in zip(problems, written, strict=True):
      for end, verdict in first_tries(problem, one, self.task, self.markers, self.unit):
        num = num_tokens(one, end, self.writer)
        if num is None or num == len(one.generation.tokens):
          continue  # a token lies across the end of the step, or none was asked for after it
        if verdict.kind == "wrong":
          scores.wrong.append((verdict.error, float(one.generation.flag_logprobs[num])))
        elif verdict.kind == "right":
          scores.right.append(float(one.generation.flag_logprobs[num]))
    return scores


def pieces_of(role: int, text: str) -> Transcript:
  """One piece, or none when there is no text."""
  return (Piece(role, text),) if text else ()


def first_tries(problem: Problem, written: Written, task: Task, markers: Markers, unit: str
                ) -> Iterator[tuple[int, tasks.Verdict]]:
  """(end in the text, verdict) of the steps up to the first marker or the first wrong one, whichever comes first."""
  head = min((written.text.split(marker, 1)[0] for marker in (markers.flag, markers.fix)), key=len)
  steps = split_steps(head, unit)
  if not written.finished and head == written.text and steps and not steps[-1][-1].isspace():
    steps = steps[:-1]  # cut short, never said
  end = 0
  for number, step in enumerate(steps):
    verdict = task.check(problem, steps[:number], step)
    end += len(step)
    yield end, verdict
    if verdict.kind == "wrong":
      return


def num_tokens(written: Written, end: int, writer: Writer) -> int | None:
  """How many of the tokens make up the first `end` characters; None where a token lies across."""
  tokens = written.generation.tokens
  low, high = 0, len(tokens)
  while low < high:
    middle = (low + high) // 2
    if len(writer.decode(tokens[:middle])) < end:
      low = middle + 1
    else:
      high = middle
  return low if writer.decode(tokens[:low]) == written.text[:end] else None

"""Probing: a model's behaviour after wrong steps, injected by a rule or its own (self-made).

A source of mistakes is `injected` (a rule's wrong step after right ones) or `own` (the first wrong step of a solution
that the model wrote). Each is measured with flags unconstrained and, on request, with the flag forced right after it.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from insec_jax.config import Config
from insec_jax.data.problems import problems_to_probe
from insec_jax.evaluation import scoring
from insec_jax.evaluation.redrawing import redraw
from insec_jax.evaluation.scoring import Outcome, SolutionScore
from insec_jax.evaluation.steps import Reader, Step
from insec_jax.generation.confidence import ConfidenceTrigger, step_scores
from insec_jax.generation.generator import Completion, TextGenerator
from insec_jax.method import mistakes
from insec_jax.method.mistakes import Probe
from insec_jax.method.roles import MISTAKE, PROMPT, TEXT
from insec_jax.method.tasks import Problem, Task
from insec_jax.method.transcript import Markers, Piece, Transcript, parse

NO_FLAG = -math.inf  # the flag_bias that bans the flag


@dataclasses.dataclass(frozen=True)
class ProbeResults:
  """Measurements of one source of mistakes; `outcomes` and `transcripts` have one entry per probe."""

  outcomes: list[Outcome]
  forced: list[Outcome] | None  # of probes that leave room to go on; None when not requested
  steps: list[Step]  # the wrong ones and the right ones that they are compared with
  transcripts: list[Transcript]


@dataclasses.dataclass(frozen=True)
class SolveResults:
  """Whole solutions, one per problem, and the model's own first wrong steps among them."""

  scores: list[SolutionScore]
  num_tokens: list[int]
  transcripts: list[Transcript]
  steps: list[Step]  # before any marker
  own: ProbeResults
  written: list[Completion] = dataclasses.field(default_factory=list)


def injected_probes(task: Task, config: Config) -> list[Probe]:
  """Return evaluate.num_probes probes, equally many of every error class of the task, whichever were trained.

  They are at any place in the problems to probe; no problem is used again while another is unused. A class for which
  too few places are found has fewer probes.
  """
  num = config.evaluate.num_probes
  problems = problems_to_probe(task, config)
  uses = collections.Counter()
  probes = []
  for number, error in enumerate(task.error_classes):
    rng = np.random.default_rng((config.seed, number))
    only = dataclasses.replace(config.mistakes, classes=(error,))
    num_per_class = (num + number) // len(task.error_classes)  # over the classes these add up to num
    class_probes = []
    for index in sorted(range(len(problems)), key=lambda index: uses[index]):
      if len(class_probes) == num_per_class:
        break
      probe = mistakes.probe(problems[index], task, only, rng)
      if probe is not None:
        class_probes.append(probe)
        uses[index] += 1
    probes += class_probes
  return probes


class Prober:
  """A model, a task and limits of generation; runs the probing."""

  def __init__(self, writer: TextGenerator, task: Task, config: Config):
    self.writer, self.task = writer, task
    self.markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
    self.unit = config.mistakes.unit
    self.limits = {"max_tokens": config.evaluate.max_tokens, "batch_size": config.evaluate.batch_size}
    self.seed = config.seed
    self._reader = Reader(writer, task, self.markers, self.unit)
    self.encode = functools.cache(writer.encode)  # every pass encodes the same problems
    self._greedy: dict[bytes, list[tuple[float, Completion]]] = {}  # by prompt: (flag_bias, completion) pairs

  def injected(
    self, probes: Sequence[Probe], *, label: str, temperature: float, flag_bias: float = 0.0, force: bool = False
  ) -> ProbeResults:
    """Return what the model writes after injected mistakes; with `force` also after the mistakes and the flag.

    `steps` is left empty: those of `told_apart` do not depend on the continuation.
    """
    drawn = {"temperature": temperature, "seed": self.seed, **self.limits}
    begins = self._begin([(probe, probe.wrong) for probe in probes])
    written = self._write(begins, label=label, flag_bias=flag_bias, **drawn)
    forced = None
    if force:
      if self.writer.flag_id is None:
        flagged = self._begin([(probe, probe.wrong + self.markers.flag) for probe in probes])
      else:
        flagged = [np.append(begin_T, self.writer.flag_id) for begin_T in begins]
      forced = [
        self._outcome(probe, completion, forced=True)
        for probe, completion in zip(
          probes, self.writer.write(flagged, label=f"{label}, flag forced", **drawn), strict=True
        )
      ]
    transcripts = [
      (
        Piece(PROMPT, probe.problem.prompt),
        *pieces_of(TEXT, "".join(probe.before)),
        Piece(MISTAKE, probe.wrong),
        *parse(completion.text, self.markers, self.unit),
      )
      for probe, completion in zip(probes, written, strict=True)
    ]
    outcomes = [self._outcome(probe, completion) for probe, completion in zip(probes, written, strict=True)]
    return ProbeResults(outcomes, forced, [], transcripts)

  def told_apart(self, probes: Sequence[Probe]) -> list[Step]:
    """Return the wrong steps of probes and the right ones in their places, each with one place for a flag: after it."""
    candidates = [
      (number, last, kind, error)
      for number, probe in enumerate(probes)
      for last, kind, error in (
        (probe.wrong, "wrong", probe.error),
        (probe.problem.steps[len(probe.before)], "right", ""),
      )
    ]
    if not self.writer.scores_flags:
      flag_scores = [(None, None)] * len(candidates)
    else:
      written = self.writer.write(
        self._begin([(probes[number], last) for number, last, _, _ in candidates]),
        label="a flag after injected mistakes and right steps",
        max_tokens=1,
        batch_size=self.limits["batch_size"],
      )
      flag_scores = [(completion.generation.margins, completion.generation.flag_logprobs) for completion in written]
    return [
      Step(number, kind, error, is_first_try=True, score=math.nan, margin_P=margin_P, flag_P=flag_P)
      for (number, _, kind, error), (margin_P, flag_P) in zip(candidates, flag_scores, strict=True)
    ]

  def solve(
    self,
    problems: Sequence[Problem],
    *,
    label: str,
    temperature: float,
    flag_bias: float = 0.0,
    watch: ConfidenceTrigger | None = None,
    seed: int | None = None,
    force: bool = False,
  ) -> SolveResults:
    """Return solutions and what follows the model's own first wrong steps; with `force` also with the flag forced."""
    drawn = {"temperature": temperature, "seed": self.seed if seed is None else seed, **self.limits}
    prompts = [self.encode(problem.prompt) for problem in problems]
    written = self._write(prompts, label=label, flag_bias=flag_bias, watch=watch, **drawn)
    solved = self.read(problems, written)
    if not force:
      return solved
    begins = {
      index: self._flagged_own(problems[index], prompts[index], written[index], score)
      for index, score in enumerate(solved.scores)
      if score.own is not None
    }
    begins = {index: begin for index, begin in begins.items() if begin is not None}
    forced = self.writer.write(list(begins.values()), label=f"{label}, own mistakes, flag forced", **drawn)
    outcomes = [
      self._outcome(own_probe(problems[index], solved.scores[index]), completion, forced=True)
      for index, completion in zip(begins, forced, strict=True)
    ]
    return dataclasses.replace(solved, own=dataclasses.replace(solved.own, forced=outcomes))

  def redrawn(
    self, problems: Sequence[Problem], *, label: str, temperature: float, threshold: float, most: int
  ) -> SolveResults:
    """Return solutions without flags, steps with a score above the threshold sampled again, up to `most` times each."""
    written, num_generated = redraw(
      self.writer,
      [self.encode(problem.prompt) for problem in problems],
      label=label,
      threshold=threshold,
      most=most,
      temperature=temperature,
      seed=self.seed,
      **self.limits,
    )
    return dataclasses.replace(self.read(problems, written), num_tokens=num_generated)

  def read(self, problems: Sequence[Problem], written: Sequence[Completion]) -> SolveResults:
    """Return the scores, steps and transcripts of solutions, however they were generated."""
    scores = [
      scoring.score_solution(
        problem, completion.text, finished=completion.finished, task=self.task, markers=self.markers, unit=self.unit
      )
      for problem, completion in zip(problems, written, strict=True)
    ]
    transcripts = [self._solution(*solution) for solution in zip(problems, written, scores, strict=True)]
    steps = [
      step
      for number, (problem, completion) in enumerate(zip(problems, written, strict=True))
      for step in self._reader.steps(number, problem, completion)
    ]
    failed = [index for index, score in enumerate(scores) if score.own is not None]
    own = ProbeResults(
      [scores[index].own.outcome for index in failed],
      None,
      [step for step in steps if step.is_first_try],
      [transcripts[index] for index in failed],
    )
    num_tokens = [len(completion.generation.tokens) for completion in written]
    return SolveResults(scores, num_tokens, transcripts, steps, own, list(written))

  def _write(
    self,
    prompts: Sequence[np.ndarray],
    *,
    label: str,
    temperature: float,
    flag_bias: float,
    watch: ConfidenceTrigger | None = None,
    **options,
  ) -> list[Completion]:
    """Return completions as `TextGenerator.write` does; reuse a greedy text that the new flag_bias would not change.

    None is reused where the scores of the flag are not known.
    """
    write = functools.partial(
      self.writer.write, label=label, temperature=temperature, flag_bias=flag_bias, watch=watch, **options
    )
    if temperature or not self.writer.scores_flags:
      return write(prompts)
    completions = [
      next(
        (
          completion
          for bias, completion in self._greedy.get(prompt.tobytes(), ())
          if self._says_the_same(completion, bias, flag_bias, watch)
        ),
        None,
      )
      for prompt in prompts
    ]
    left = [index for index, completion in enumerate(completions) if completion is None]
    for index, completion in zip(left, write([prompts[index] for index in left]), strict=True):
      completions[index] = completion
      if watch is None:
        self._greedy.setdefault(prompts[index].tobytes(), []).append((flag_bias, completion))
    return completions

  def _says_the_same(self, written: Completion, bias: float, flag_bias: float, watch: ConfidenceTrigger | None) -> bool:
    """Return whether greedy decoding that gave this with `bias` gives it again with `flag_bias` and this watch."""
    generation = written.generation
    if ((generation.margins + bias > 0) != (generation.margins + flag_bias > 0)).any():
      return False
    return watch is None or all(
      surprisal.score <= watch.threshold
      for _, _, surprisal in step_scores(generation.tokens, generation.logprobs, watch, self.writer.flag_id)
    )

  def _begin(self, probe_steps: Sequence[tuple[Probe, str]]) -> list[np.ndarray]:
    """Return the model's input for each probe with the given step last, its confidence tokens included."""
    if self.writer.confidence_ids:
      return self.writer.begin(
        [probe.problem.prompt for probe, _ in probe_steps],
        [(*probe.before, last) for probe, last in probe_steps],
        batch_size=self.limits["batch_size"],
      )
    return [self.encode(probe.problem.prompt, answer="".join((*probe.before, last))) for probe, last in probe_steps]

  def _outcome(self, probe: Probe, written: Completion, *, forced: bool = False) -> Outcome:
    return scoring.read_probe(
      probe.problem,
      probe.before,
      probe.wrong,
      written.text,
      finished=written.finished,
      task=self.task,
      markers=self.markers,
      unit=self.unit,
      forced=forced,
    )

  def _solution(self, problem: Problem, written: Completion, score: SolutionScore) -> Transcript:
    """Return the solution with its first wrong step as a mistake piece, flagged or not."""
    prompt, text = Piece(PROMPT, problem.prompt), written.text
    if score.own is None:
      return (prompt, *parse(text, self.markers, self.unit))
    end = len(score.own.prefix)
    start = end - len(score.own.wrong)
    return (
      prompt,
      *parse(text[:start], self.markers, self.unit),
      Piece(MISTAKE, score.own.wrong),
      *parse(text[end:], self.markers, self.unit),
    )

  def own_mistakes(
    self, problems: Sequence[Problem], solved: SolveResults
  ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (number of the solution, what the model had read before its first wrong step, the tokens of that step).

    A wrong step that ends the text has its stop token. Solutions in which no token begins or ends where the step does
    are left out, and those in which nothing more could be written.
    """
    for number, (problem, completion, score) in enumerate(zip(problems, solved.written, solved.scores, strict=True)):
      if score.own is None:
        continue
      ends, tokens = self._reader.token_ends(completion), completion.generation.tokens
      first, stop = (
        ends.get(length) for length in (len(score.own.prefix) - len(score.own.wrong), len(score.own.prefix))
      )
      if first is None or stop is None:
        continue
      first = self.writer.past_confidence(tokens, first)
      begin = np.concatenate([self.encode(problem.prompt), tokens[:first]]).astype(np.int32)
      if self.writer.has_room(begin, self.limits["max_tokens"]):
        is_last = completion.finished and stop == len(tokens) - 1
        yield number, begin, tokens[first : stop + is_last]

  def _flagged_own(
    self, problem: Problem, prompt: np.ndarray, written: Completion, score: SolutionScore
  ) -> np.ndarray | None:
    """Return prompt, own text up to the end of the wrong step, and flag; None where that leaves no room to go on."""
    prefix = score.own.prefix
    num = self._reader.token_ends(written).get(len(prefix))
    if self.writer.flag_id is None:
      begin = self.encode(problem.prompt, answer=prefix + self.markers.flag)
    elif num is not None:
      own_tokens = written.generation.tokens[: self.writer.past_confidence(written.generation.tokens, num)]
      begin = np.concatenate([prompt, own_tokens, [self.writer.flag_id]])
    elif self.markers.flag in prefix or self.markers.fix in prefix:
      return None  # no token ends here, and the markers cannot be encoded again as markers
    else:
      begin = np.append(self.encode(problem.prompt, answer=prefix), self.writer.flag_id)
    return begin.astype(np.int32) if self.writer.has_room(begin, self.limits["max_tokens"]) else None


def own_probe(problem: Problem, score: SolutionScore) -> Probe:
  """Return the first wrong step of a solution that has one, as a probe."""
  return Probe(problem, score.own.before, score.own.wrong, score.own.outcome.error)


def pieces_of(role: int, text: str) -> Transcript:
  """Return one piece, or none when there is no text."""
  return (Piece(role, text),) if text else ()

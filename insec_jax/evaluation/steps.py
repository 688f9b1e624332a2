"""Steps that a model wrote, each with its verdict, its confidence score and the flag's probabilities."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from insec_jax.generation.confidence import Surprisal
from insec_jax.generation.generator import Completion, TextGenerator
from insec_jax.method.tasks import Problem, Task, Verdict
from insec_jax.method.transcript import Markers, split_steps


@dataclasses.dataclass(frozen=True)
class Step:
  """A step as written, before any marker.

      step      d  b  3  f  4  d  7  \\n  next token
      score        *  *  *  *  *  *  *                 largest -log p of these: the first token only chooses the topic
      places       *  *  *  *  *  *  *   *             where a flag could have come, the last right after the step

  A solution's first step has one place more: in front. The arrays are None where the markers are plain words.
  """

  solution: int  # number of its solution
  kind: str
  error: str
  is_first_try: bool  # no step before it is wrong
  score: float  # 0 for a step of a single token; nan for a step that was given to the model
  margin_P: np.ndarray | None  # at each place, the flag's logit minus the best other one
  flag_P: np.ndarray | None  # log p of the flag at each place
  end: int = 0  # tokens of the solution up to the place right after the step; 0 for a step that was given to the model


class Reader:
  """A parser of generated text into steps of a task."""

  def __init__(self, writer: TextGenerator, task: Task, markers: Markers, unit: str):
    self.writer, self.task, self.markers, self.unit = writer, task, markers, unit
    self._text_by_token: dict[int, str] = {}  # of each token; decoding is slow

  def steps(self, solution: int, problem: Problem, written: Completion) -> Iterator[Step]:
    """Yield the steps before any marker, except those that share a token with a neighbour or have no token after them.

    A step that was cut short has no token after it.
    """
    generation, nums = written.generation, self.token_ends(written)
    start, is_first_try = 0, True
    for end, verdict in judged(problem, written, self.task, self.markers, self.unit):
      stop = nums.get(end)
      after = None if stop is None else self.writer.past_confidence(generation.tokens, stop)
      if start is not None and stop is not None and after < len(generation.tokens):
        places = np.r_[start + 1 if start else 0 : stop, after]
        yield Step(
          solution,
          verdict.kind,
          verdict.error,
          is_first_try,
          Surprisal.of(generation.logprobs[start:stop]).score,
          None if generation.margins is None else generation.margins[places],
          None if generation.flag_logprobs is None else generation.flag_logprobs[places],
          after,
        )
      start = after
      is_first_try = is_first_try and verdict.kind != "wrong"

  def token_ends(self, written: Completion) -> dict[int, int]:
    """Return {number of characters: number of tokens} for each prefix of the text that is made of whole tokens."""
    tokens = written.generation.tokens.tolist()
    if written.finished:
      tokens = tokens[:-1]  # the stop token
    texts = [self._text(token) for token in tokens]
    if "".join(texts) == written.text:
      lengths = np.cumsum([0, *map(len, texts)]).tolist()
    else:  # a character of several tokens, or a token that reads differently at the beginning
      starts = [self.writer.decode(tokens[:num]) for num in range(len(tokens) + 1)]
      lengths = [len(start) if written.text.startswith(start) else None for start in starts]
    ends = {length: num for num, length in reversed(list(enumerate(lengths)))}
    ends.pop(None, None)
    return ends

  def _text(self, token: int) -> str:
    if token not in self._text_by_token:
      self._text_by_token[token] = self.writer.decode([token])
    return self._text_by_token[token]


def judged(
  problem: Problem, written: Completion, task: Task, markers: Markers, unit: str, *, stands: tuple[str, ...] = ()
) -> Iterator[tuple[int, Verdict]]:
  """Yield (end in the text, verdict) of each whole step before any marker, after the steps `stands`."""
  head = min((written.text.split(marker, 1)[0] for marker in (markers.flag, markers.fix)), key=len)
  steps = split_steps(head, unit)
  if not written.finished and head == written.text and steps and not steps[-1][-1].isspace():
    steps = steps[:-1]  # cut short
  end = 0
  for number, step in enumerate(steps):
    end += len(step)
    yield end, task.check(problem, (*stands, *steps[:number]), step)

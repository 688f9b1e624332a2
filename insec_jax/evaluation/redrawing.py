"""Steps of a solution that are drawn again: no text is between a wrong step and the next. Corrections must beat it.

`redraw` writes at a temperature, and goes on from the step before the one that is found:

    drawn     a4  b9?                    b9 is found, so it is deleted; its tokens count
              a4  b7  c2?                and so on, each step at most `most` times; the last draw stands

`redrawn` writes greedily, and draws the step alone:

    greedy    a4  b9  c2 d1 <end>        b9 is found, so it is deleted; c2 d1 <end> would not have been written
    drawn     a4  b9? b7?                at temperature 1, at most k times, until a draw is accepted, else the surest
    greedy    a4  b7  c3 d1 <end>        and so on, from the step that stands

`ByScore` finds a step whose score is above a bound, and accepts a draw that is not. `ByFlag` finds a step that the
model flags, deletes the flag as well, and accepts a draw that the model does not flag. Of a solution only the tokens
that an online decoder would have sampled are counted: all up to the end of each step that is found (and its flag), and
all draws up to the one that ends them. Flags are banned inside a draw.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from insec_jax.generation.confidence import ConfidenceTrigger, Surprisal, step_scores
from insec_jax.generation.generator import Completion, TextGenerator
from insec_jax.generation.sampler import SampledTokens

SHORT = 48  # tokens that `redraw` draws of a solution in a later round: few are left, and one may never end


class Place(NamedTuple):
  """Where a solution is cut: tokens that stay, and tokens written until this was known.

  `draws` is whether a step is drawn there.
  """

  kept: int
  written: int
  draws: bool


class Finder(Protocol):
  """What finds steps to draw again, and accepts draws."""

  flag_bias: float  # of greedy decoding

  def find(self, tokens: np.ndarray, logprobs: np.ndarray, since: int) -> Place | None:
    """Return the place of the first step that is found; steps that end at or before `since` stand."""

  def judge(self, begins: Sequence[np.ndarray], draws: Sequence[SampledTokens]) -> list[tuple[bool, int]]:
    """Return whether each draw is accepted, and the tokens written to know it, besides the draw."""


class ByScore:
  """Finds steps with a score above the threshold."""

  def __init__(self, writer: TextGenerator, threshold: float):
    self._writer, self._threshold, self.watch = writer, threshold, writer.watch()
    self.flag_bias = 0.0 if writer.flag_id is None else -math.inf

  def steps(self, tokens: np.ndarray, logprobs: np.ndarray, since: int) -> list[tuple[int, int, Surprisal]]:
    """Return first token, one past the last, and surprisal of each step that ends after `since`."""
    scored = step_scores(tokens, logprobs, self.watch, self._writer.flag_id)
    return [step for step in scored if step[1] > since]

  def find(self, tokens: np.ndarray, logprobs: np.ndarray, since: int) -> Place | None:
    for first, stop, surprisal in self.steps(tokens, logprobs, since):
      if surprisal.score > self._threshold:
        return Place(first, stop, draws=True)
    return None

  def judge(self, begins: Sequence[np.ndarray], draws: Sequence[SampledTokens]) -> list[tuple[bool, int]]:
    del begins
    return [(Surprisal.of(draw.logprobs).score <= self._threshold, 0) for draw in draws]


class ByFlag:
  """Finds steps that the model flags; the flag must be a special token."""

  flag_bias = 0.0

  def __init__(self, writer: TextGenerator, *, batch_size: int):
    self._writer, self._watch, self._batch_size = writer, writer.watch(), batch_size

  def find(self, tokens: np.ndarray, logprobs: np.ndarray, since: int) -> Place | None:
    """Return the place of the first flag: of the step that it follows, or interrupts.

    Where that step stands, or there is none, only the flag is deleted.
    """
    places = since + np.flatnonzero(tokens[since:] == self._writer.flag_id)
    if not len(places):
      return None
    place = int(places[0])
    steps = step_scores(tokens[:place], logprobs[:place], self._watch, self._writer.flag_id)
    ends = [0, *(self._writer.past_confidence(tokens, stop) for _, stop, _ in steps)]
    if ends[-1] < place:
      return Place(ends[-1], place + 1, draws=True)
    stands = not steps or ends[-1] <= since
    return Place(place if stands else steps[-1][0], place + 1, draws=not stands)

  def judge(self, begins: Sequence[np.ndarray], draws: Sequence[SampledTokens]) -> list[tuple[bool, int]]:
    steps = {
      number: _whole_step(self._writer, draw)[0]
      for number, draw in enumerate(draws)
      if draw.finish == "stop" and draw.tokens[-1] not in self._writer.stop_ids
    }
    texts = {number: np.concatenate([begins[number], step]).astype(np.int32) for number, step in steps.items()}
    texts = {number: text for number, text in texts.items() if self._writer.has_room(text, 1)}
    after = self._writer.write(
      list(texts.values()), label="a flag after draws", max_tokens=1, batch_size=self._batch_size
    )
    flagged = {
      number
      for number, completion in zip(texts, after, strict=True)
      if completion.generation.tokens[0] == self._writer.flag_id
    }
    return [
      (
        draw.finish == "stop" and number not in flagged,
        len(steps[number]) + 1 - len(draw.tokens) if number in flagged else 0,
      )
      for number, draw in enumerate(draws)
    ]


@dataclasses.dataclass
class _Draft:
  """A solution that is written: the tokens that stand, and those generated for it."""

  prompt: np.ndarray
  most: int  # draws of one step
  room: int  # tokens of a solution
  short: int | None = None  # tokens of a text after the first one; None: as many as may stand
  tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  logprobs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
  counted: int = 0
  finish: str | None = None
  bans: bool = False  # no flag may come next
  tries: int = 0  # deletions of the step that comes next
  whole: bool = True  # the next text goes to the end

  @property
  def begin(self) -> np.ndarray:
    return np.concatenate([self.prompt, self.tokens]).astype(np.int32)

  @property
  def wanted(self) -> int:
    """The tokens of the next text, where the model has room for them."""
    return self.room if self.whole or self.short is None else min(self.short, self.room)

  def add(self, tokens: np.ndarray, logprobs: np.ndarray) -> None:
    self.tokens = np.concatenate([self.tokens, tokens])[: self.room]
    self.logprobs = np.concatenate([self.logprobs, logprobs])[: self.room]

  def go_on(self, text: SampledTokens, finder: Finder) -> bool:
    """Add a text up to the first step that is found; return whether a step is to be drawn there.

    A step that was deleted `most` times stands. Without a step that is found the solution is finished.
    """
    before = len(self.tokens)
    self.add(text.tokens, text.logprobs)
    place = finder.find(self.tokens, self.logprobs, before)
    if place is not None and place.kept == before and self.tries >= self.most:
      place = finder.find(self.tokens, self.logprobs, place.written)
    if place is None:
      self.counted += len(self.tokens) - before
      self.finish = text.finish if before + len(text.tokens) <= self.room else "length"
      return False
    self.counted += place.written - before
    self.tokens, self.logprobs = self.tokens[: place.kept], self.logprobs[: place.kept]
    self.bans, self.whole = not place.draws, False
    if place.draws:
      self.tries = 1 if place.kept > before else self.tries + 1
    return place.draws

  def go_on_short(self, text: SampledTokens, finder: "ByScore") -> None:
    """Add a text as `go_on` does; of one that is cut short, the steps that are complete, each with its confidence.

    Without a complete step nothing is added, and the next text goes to the end.
    """
    before, forced = len(self.tokens), bool(finder.watch.confidence_ids)
    if self.go_on(text, finder) or text.finish != "length" or before + len(text.tokens) + forced >= self.room:
      return
    written, kept, self.finish = len(self.tokens), before, None
    if steps := finder.steps(self.tokens, self.logprobs, before):
      _, stop, surprisal = steps[-1]
      if stop == written:
        self.tokens, self.logprobs = with_confidence(finder.watch, self.tokens, self.logprobs, surprisal)
      kept, self.tries = stop + forced, 0
    self.counted += kept - written
    self.tokens, self.logprobs = self.tokens[:kept], self.logprobs[:kept]
    self.whole = not steps

  def choose(self, draws: Sequence[SampledTokens], judged: Sequence[tuple[bool, int]], writer: TextGenerator) -> None:
    """Add the first draw that is accepted, else the surest of `most`."""
    accepted = next((number for number, (is_accepted, _) in enumerate(judged) if is_accepted), None)
    made = len(draws) if accepted is None else accepted + 1
    self.counted += sum(len(draw.tokens) + more for draw, (_, more) in zip(draws[:made], judged[:made], strict=True))
    self.bans, self.tries = accepted is None, 0
    surest = min(draws[:made], key=lambda draw: Surprisal.of(draw.logprobs).score)
    draw = surest if accepted is None else draws[accepted]
    tokens, logprobs = _whole_step(writer, draw)
    self.counted += len(tokens) - len(draw.tokens)
    whole = len(self.tokens) + len(tokens) <= self.room
    self.add(tokens, logprobs)
    if not whole or draw.finish == "length":
      self.finish = "length"
    elif draw.tokens[-1] in writer.stop_ids:
      self.finish = "stop"
    elif len(self.tokens) == self.room:
      self.finish = "length"


def redraw(
  writer: TextGenerator,
  prompts: Sequence[np.ndarray],
  *,
  label: str,
  threshold: float,
  most: int,
  max_tokens: int,
  temperature: float,
  seed: int,
  batch_size: int,
) -> tuple[list[Completion], list[int]]:
  """Return one solution a prompt, with steps that score above `threshold` sampled again, and its generated tokens.

  The first round samples whole solutions, later ones SHORT tokens at a time: complete steps are kept, an incomplete one
  is sampled again, and without a complete step the next round samples the rest at once. Tokens of a step that a round
  cuts short are not counted. Flags are banned. Every round has its own seed. Raises InputError as `TextGenerator.watch`
  does.
  """
  finder = ByScore(writer, threshold)
  drafts = [_Draft(prompt, most, max_tokens, SHORT) for prompt in prompts]
  options = {"temperature": temperature, "flag_bias": finder.flag_bias, "batch_size": batch_size}

  def write(rounds: int, begins: list[np.ndarray], num: int) -> list[SampledTokens]:
    where = {"label": f"{label}, round {rounds + 1}", "seed": seed + rounds}
    return [one.generation for one in writer.write(begins, max_tokens=num, **where, **options)]

  rounds = 0
  while left := {number: draft for number, draft in enumerate(drafts) if draft.finish is None}:
    begins = {number: draft.begin for number, draft in left.items()}
    for number, text in _in_groups(writer, begins, left, functools.partial(write, rounds)).items():
      left[number].go_on_short(text, finder)
    rounds += 1
  return _solutions(writer, drafts)


def redrawn(
  writer: TextGenerator,
  prompts: Sequence[np.ndarray],
  written: Sequence[Completion],
  finder: Finder,
  *,
  label: str,
  draws: Sequence[int],
  max_tokens: int,
  seed: int,
  batch_size: int,
) -> dict[int, tuple[list[Completion], list[int]]]:
  """Return for each number of draws k the solution of each prompt, and the tokens generated for it.

  `written` are the greedy solutions, with the finder's bias on the flag. Every round of draws has its own seed. Raises
  InputError as `TextGenerator.watch` does.
  """
  drafts = [_Draft(prompt, most, max_tokens) for most in draws for prompt in prompts]
  texts = dict(enumerate([completion.generation for completion in written] * len(draws)))
  rounds = 0
  while texts:
    drawn = [number for number, text in texts.items() if drafts[number].go_on(text, finder)]
    if drawn:
      rounds += 1
      where = f"{label}, draws {rounds}"
      _draw(writer, {number: drafts[number] for number in drawn}, finder, where, seed + rounds, batch_size)
    left = {number: drafts[number] for number in texts if drafts[number].finish is None}
    texts = _continued(writer, left, finder.flag_bias, f"{label}, round {rounds}", batch_size)
  num = len(prompts)
  return {most: _solutions(writer, drafts[place * num : (place + 1) * num]) for place, most in enumerate(draws)}


def _solutions(writer: TextGenerator, drafts: Sequence[_Draft]) -> tuple[list[Completion], list[int]]:
  """Return the solution of each draft, and the tokens generated for it."""
  texts = [SampledTokens(draft.tokens, draft.logprobs, draft.finish or "length", None, None) for draft in drafts]
  return list(map(writer.written, texts)), [draft.counted for draft in drafts]


def _draw(
  writer: TextGenerator, drafts: Mapping[int, _Draft], finder: Finder, label: str, seed: int, batch_size: int
) -> None:
  """Draw a step of each draft, as often as it may, and keep one."""
  begins = {(number, draw): draft.begin for number, draft in drafts.items() for draw in range(draft.most)}
  sampled = _in_groups(
    writer,
    begins,
    {place: drafts[place[0]] for place in begins},
    lambda some, num: writer.draw_steps(some, label=label, max_tokens=num, seed=seed, batch_size=batch_size),
  )
  judged = dict(zip(sampled, finder.judge([begins[place] for place in sampled], list(sampled.values())), strict=True))
  for number, draft in drafts.items():
    places = [(number, draw) for draw in range(draft.most)]
    draft.choose([sampled[place] for place in places], [judged[place] for place in places], writer)


def _continued(
  writer: TextGenerator, drafts: Mapping[int, _Draft], flag_bias: float, label: str, batch_size: int
) -> dict[int, SampledTokens]:
  """Return what the model writes greedily after each draft; a draft that a flag may not continue gets a token first."""
  options = {"label": label, "batch_size": batch_size}
  banned = [number for number, draft in drafts.items() if draft.bans] if flag_bias > -math.inf else []
  first = writer.write([drafts[number].begin for number in banned], max_tokens=1, flag_bias=-math.inf, **options)
  for number, completion in zip(banned, first, strict=True):
    draft = drafts[number]
    draft.bans = False
    draft.counted += 1
    draft.add(completion.generation.tokens, completion.generation.logprobs)
    if completion.finished or len(draft.tokens) == draft.room:
      draft.finish = completion.generation.finish
  left = {number: draft for number, draft in drafts.items() if draft.finish is None}

  def write(begins: list[np.ndarray], num: int) -> list[SampledTokens]:
    return [one.generation for one in writer.write(begins, max_tokens=num, flag_bias=flag_bias, **options)]

  return _in_groups(writer, {number: draft.begin for number, draft in left.items()}, left, write)


def _in_groups(
  writer: TextGenerator,
  begins: Mapping,
  drafts: Mapping,
  write: Callable[[list[np.ndarray], int], list[SampledTokens]],
) -> dict:
  """Return what is written after each beginning: the tokens that are wanted, or if too many, as many as may stand."""
  groups: dict[int, list] = {}
  for key, begin in begins.items():
    draft = drafts[key]
    num = draft.wanted if writer.has_room(begin, draft.wanted) else draft.room - len(draft.tokens)
    groups.setdefault(num, []).append(key)
  return {
    key: text
    for num, keys in groups.items()
    for key, text in zip(keys, write([begins[key] for key in keys], num), strict=True)
  }


def _whole_step(writer: TextGenerator, draw: SampledTokens) -> tuple[np.ndarray, np.ndarray]:
  """Return tokens and log p of a drawn step, with the confidence token that follows it where there are any."""
  if draw.finish == "length" or draw.tokens[-1] in writer.stop_ids:
    return draw.tokens, draw.logprobs
  return with_confidence(writer.watch(), draw.tokens, draw.logprobs, Surprisal.of(draw.logprobs))


def with_confidence(
  watch: ConfidenceTrigger, tokens: np.ndarray, logprobs: np.ndarray, surprisal: Surprisal
) -> tuple[np.ndarray, np.ndarray]:
  """Return tokens and log p with the confidence in the step that ends them, where the model has such tokens.

  The log p of that token is not known, and set to 0.
  """
  if not watch.confidence_ids:
    return tokens, logprobs
  token = watch.confidence_ids[watch.bin_of(surprisal)]
  return np.append(tokens, token), np.append(logprobs, np.float32(0.0))

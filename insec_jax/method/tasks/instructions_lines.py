"""Lines of the task instructions: how they are made and read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from insec_jax.method.tasks.instructions_words import (
  ADJECTIVES,
  ADVERBS,
  CASES,
  CLOSING,
  DETERMINERS,
  FEWEST_WORDS,
  NUMBERED,
  NUMS,
  PLEASE,
  TAILS,
  Rule,
)

_MOST_ADJECTIVES = 2
_LINE = re.compile(r"([-*]|[0-9]+[.)])?\s*(.*?)[^\w\s]*", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


class Line(NamedTuple):
  """The words of a line that is made."""

  verb: str
  determiner: str
  adjectives: tuple[str, ...]
  thing: str
  tail: str
  please: bool

  @property
  def body(self) -> str:
    """Return the words, the first with a capital letter."""
    words = (PLEASE * self.please, self.verb, self.determiner, *self.adjectives, self.thing, self.tail)
    text = " ".join(word for word in words if word).lower()
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Facts:
  """The things and instructions of the prompt, and for each line to write its thing and words."""

  things: tuple[str, ...]
  rules: tuple[Rule, ...]
  verbs: tuple[str, ...]
  wanted: tuple[str, ...]
  lines: tuple[Line, ...]

  def value(self, kind: str) -> str | None:
    """Return what the instruction of this kind asks for; None where there is none."""
    return next((rule.value for rule in self.rules if rule.kind == kind), None)

  @property
  def about_words(self) -> tuple[set[str], set[str], int | None]:
    """Return the words that a line needs, those that it must not have, and their number."""
    needed, banned = ({value} if (value := self.value(kind)) else set[str]() for kind in ("include", "exclude"))
    num = self.value("words")
    return needed, banned, None if num is None else int(num)

  def dress(self, number: int) -> "Dress":
    """Return what line `number` must have around its words; the ending is a period where none is asked for."""
    ending = self.value("ending")
    return Dress(mark_of(self.value("mark"), number), "." if ending is None else ending, self.value("case"))


class Dress(NamedTuple):
  """What is around the words of a line; `case` is "lower", "upper", or None for that of a sentence."""

  mark: str
  ending: str
  case: str | None

  def put_on(self, body: str) -> str:
    """Return the words as a line."""
    body = {"lower": body.lower(), "upper": body.upper(), None: body}[self.case]
    return f"{self.mark} {body}{self.ending}\n".lstrip()


class Written(NamedTuple):
  """A line as read: its mark in front, its text without mark and punctuation at the end, and its words."""

  text: str
  mark: str
  body: str
  words: tuple[str, ...]

  @property
  def closes(self) -> bool:
    """Return whether the line ends the list."""
    return self.words == (CLOSING.lower(),)

  def names(self, things: Sequence[str], *, loosely: bool = False) -> list[str]:
    """Return those of the things that are words of the line, `loosely` also beginnings of words."""
    return [
      thing for thing in things if any(word == thing or (loosely and word.startswith(thing)) for word in self.words)
    ]


def read(step: str) -> Written:
  """Return the line as read; every text can be."""
  text = step.strip()
  match = _LINE.fullmatch(text)
  assert match is not None
  return Written(text, match[1] or "", match[2], tuple(word.lower() for word in _WORD.findall(match[2])))


def mark_of(value: str | None, number: int) -> str:
  """Return the mark in front of line `number`, as it is asked for."""
  return f"{number}{value[-1]}" if value in NUMBERED else value or ""


def compose(
  facts: Facts, thing: str, rng: np.random.Generator, *, needed: set[str], banned: set[str], num: int | None
) -> Line | None:
  """Return a line with the needed words and without the banned ones, of `num` words; None where none is possible."""

  def pick(values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]

  def allowed(values: Sequence[str]) -> list[str]:
    asked = [value for value in values if value in needed]
    return asked or [value for value in values if banned.isdisjoint(value.split())]

  adjectives = [word for word in ADJECTIVES if word in needed]
  others = [word for word in ADJECTIVES if word not in needed | banned]
  adverb = not needed.isdisjoint(ADVERBS)
  more = rng.integers(len(NUMS)) + 1 if num is None else num - FEWEST_WORDS
  options = [
    (num_adjectives, num_tail, please)
    for num_adjectives in range(len(adjectives), _MOST_ADJECTIVES + 1)
    for num_tail in ([1] if adverb else list(TAILS))
    for please in ((True,) if PLEASE in needed else (False,) if PLEASE in banned else (False, True))
    if num_adjectives + num_tail + please == more
  ]
  if not options:
    return None
  num_adjectives, num_tail, please = options[rng.integers(len(options))]
  drawn = rng.permutation(others)[: num_adjectives - len(adjectives)].tolist()
  determiner, tail = pick(allowed(DETERMINERS)), pick(allowed(TAILS[num_tail]))
  return Line(pick(facts.verbs), determiner, (*adjectives, *drawn), thing, tail, please)


def outline(facts: Facts, steps: tuple[str, ...]) -> str:
  """Return the things that each line names and what it has of each kind of instruction; all right lists share it."""
  outlines = []
  for line in map(read, steps):
    seen = {
      "mark": line.mark,
      "ending": "" if line.text[-1:].isalnum() else line.text[-1:],
      "case": next((name for name in CASES if line.body == getattr(line.body, name)()), ""),
      "words": str(len(line.words)),
      "include": str(facts.value("include") in line.words),
      "exclude": str(facts.value("exclude") in line.words),
    }
    told = [] if line.closes else [value for kind, value in seen.items() if facts.value(kind) is not None]
    outlines.append(" ".join(("+".join(line.names(facts.things)) or CLOSING * line.closes, *told)))
  return "; ".join(outlines)

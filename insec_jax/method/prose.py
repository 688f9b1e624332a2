"""Corruption: wrong steps for prose that no checker can read.

    class      right                               wrong
    sentence   She paid the ferryman in silver.    Frost had killed the vines.            the next step, from elsewhere
    number     The bridge is 120 m long.           The bridge is 102 m long.
    entity     Anna paid the ferryman.             Bela paid the ferryman.                a name or a quoted text
    negation   The bridge is open.                 The bridge is not open.                put in or taken out; English

Nothing here knows the world, so a wrong step is proved different, not false: other words or another value than the
right one, in sentences that the record says nowhere. Where it may still be true ("at least 3" and "at least 2", one
person under two names, a phrase that fits everywhere) there is none: a mistake that is none teaches a model to doubt.
"""

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from insec_jax.method.tasks.arithmetic import NUMBER, equations, slips, value_of, written_like
from insec_jax.method.transcript import ABBREVIATIONS, split_steps

CLASSES = ("sentence", "number", "entity", "negation")
_LABEL = {
  "sentence": "This does not belong here.",
  "number": "A number is wrong.",
  "entity": "A name is wrong.",
  "negation": "The opposite is true.",
}
_REDRAWS = 8  # of what is put in, before a class counts as impossible at a place
_MOST_BESIDE = 64  # names that are tried beside one in a sentence
_MOST_AT_ONCE = 1000  # characters normalised at once in a long text: the time grows with the square of combining ones
_LEAST_LETTERS = 4  # of a word that tells what a sentence is about

_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")
_QUOTED = re.compile(r'(?<=")[^"\n]{2,60}(?=")|(?<=“)[^“”\n]{2,60}(?=”)')
_WORD_OR_SPACE = re.compile(rf"\s+|\S{{1,{_MOST_AT_ONCE}}}")
_TOKEN = re.compile(rf"{NUMBER.pattern}|[^\W\d_]+")


def _any_of(words: str) -> re.Pattern:
  return re.compile(rf"\b(?:{'|'.join(word.replace('_', ' ') for word in words.split())})\b", re.I)


# With one of these in the sentence another number or name may be as true, or nothing is claimed.
_LOOSE = _any_of("""
  at_least at_most more_than less_than fewer_than greater_than larger_than smaller_than up_to over under above below
  about around nearly almost roughly approximately circa for_example for_instance e.g such_as say suppose assume
  let if unless whether or either any every each some several many most few maybe perhaps possibly may might could
  is_a is_an are_a was_a was_an were_a one_of even odd prime divisible multiple""")
# With one of these a sentence and its negation may both hold, or neither is claimed.
_UNDECIDED = _any_of("""
  if unless whether or either until suppose assume let may might could maybe perhaps possibly some several many most few
  often sometimes usually generally only just yet necessarily both any anyone anybody anything anywhere ever""")
_NEGATIVE = re.compile(
  r"\b(?:not|cannot|never|no|none|nothing|nobody|nowhere|nor|neither|without|hardly|barely)\b"
  r"|\w+n['’]t\b",
  re.I,
)
_NEGATED = re.compile(r"\b(is|are|was|were|will|would|can|should|must|does|do|did|has|have|had) not(?= \w)(?! do\b)")
_CONTRACTED = re.compile(r"\b(is|are|was|were|would|should|does|do|did|has|have|had|ca|wo)n['’]t(?= \w)(?! do\b)")
_FULL = {"ca": "can", "wo": "will"}
# After an article "can" and "will" are things.
_AUXILIARY = re.compile(
  r"(?i:(?<!\ba )(?<!\bthe )(?<!\bof )(?<!\bhis )(?<!\bher )(?<!\bmy )(?<!\btheir )(?<!\byour ))"
  r"\b(is|are|was|were|will|would|can|should|must)(?= [a-z0-9])"
)
# A number after one of these only counts pages and points.
_COUNTER = re.compile(
  r"\b(?:step|figure|table|chapter|section|equation|page|line|part|question|problem|answer|case|"
  r"rule|no\.)\s*\Z",
  re.I,
)
_MOST_COUNTER = 40  # characters of such a word and the white space after it
_PART = re.compile(r"\w|[.,]\d")
_ITEM = re.compile(r"[.):](?:\s|\Z)")
# Between two names: words that may make them one. A comma alone may as well.
_SAME = _any_of("is was are were as aka alias called named nicknamed known knew formerly born or of")
_ARTICLES = _any_of("the a an")


@dataclasses.dataclass(frozen=True, eq=False)  # caches are by identity: to hash all steps takes as long as to read them
class ProseRecord:
  """A record without mistakes: what is asked (empty where nothing is), and the steps of what is said."""

  prompt: str
  steps: tuple[str, ...]
  led: bool  # something stands before the first step


@dataclasses.dataclass(frozen=True)
class Corruption:
  """A wrong step, its class, and the words exchanged in it (empty for "sentence")."""

  step: str
  error: str
  right: str
  wrong: str


def explain(found: Corruption, detail: str) -> str:
  """What is wrong: "label" names it, "recompute" also says the right words, where it is a matter of words.

  class      label                           recompute
  sentence   This does not belong here.      This does not belong here.
  number     A number is wrong.              It should say "120", not "102".
  """
  if detail == "label" or not found.right:
    return _LABEL[found.error]
  return f'It should say "{found.right}", not "{found.wrong}".'


def _normalized(text: str) -> str:
  if len(text) <= 10 * _MOST_AT_ONCE:
    return unicodedata.normalize("NFKC", text)
  return "".join(unicodedata.normalize("NFKC", piece) for piece in _WORD_OR_SPACE.findall(text))


def content_of(text: str) -> str:
  """The words and the values of the numbers: what is left when spacing, case and punctuation do not count."""
  text = _normalized(text).casefold()
  return "\0".join(str(value_of(token)) if NUMBER.fullmatch(token) else token for token in _TOKEN.findall(text))


class _Entities(NamedTuple):
  """The names and quoted texts of a record: (kind, text) of those in each sentence, and the texts of each kind."""

  by_sentence: tuple[tuple[str, list[tuple[str, str]]], ...]
  by_kind: dict[str, list[str]]


class Corpus:
  """The records that mistakes are put into, each of which lends sentences and names to the others."""

  def __init__(self, texts: Sequence[ProseRecord]):
    self._texts = tuple(texts)
    self._entities_in = functools.lru_cache(maxsize=256)(self._find_entities)

  def __getitem__(self, index: int) -> ProseRecord:
    return self._texts[index]

  def corrupt(self, index: int, place: int, error: str, rng: np.random.Generator) -> Corruption | None:
    """A wrong step of the class in place of the step there; None where none can be known to be different."""
    text = self._texts[index]
    right = text.steps[place]
    body = right.strip()
    start = right.index(body)
    draw = {"sentence": self._sentence, "number": _number, "entity": self._entity, "negation": _negation}[error]
    for _ in range(_REDRAWS):
      found = draw(text, body, rng)
      if found is None:
        return None
      step = right[:start] + found[0] + right[start + len(body) :]
      if _says_other(text, right, step):
        return Corruption(step, error, *found[1:])
    return None

  def _sentence(self, text: ProseRecord, body: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """A step of another record: about something else, and said in no third one."""
    del body  # all of it is replaced
    for _ in range(_REDRAWS):
      other = self._texts[rng.integers(len(self._texts))]
      step = other.steps[rng.integers(len(other.steps))].strip() if other.steps else ""
      foreign = any(len(word) >= _LEAST_LETTERS and word not in _words(text) for word in _words_of(step))
      if not foreign or self._num_texts_with[content_of(step)] > 1 or other.prompt.strip() == text.prompt.strip() != "":
        continue
      said = _said(text)
      if not any(f"\0{content_of(sentence)}\0" in said for sentence in split_steps(step, "sentence")):
        return step, "", ""
    return None

  def _entity(self, text: ProseRecord, body: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """Another name in place of one, or another quoted text: of the same record where two stand side by side."""
    here = [entity for sentence in _claims(body) for entity in self._entities(sentence)]
    if not here:
      return None
    kind, old = here[rng.integers(len(here))]
    beside = [new for new in self._beside(text, kind, old) if not set(_words_of(new)) & set(_words_of(body))]
    if beside:
      new = beside[rng.integers(len(beside))]
    else:
      new = self._foreign(text, kind, old, rng)
    if new is None:
      return body, old, old  # nothing is exchanged, which the caller sees
    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, body), old, new

  def _beside(self, text: ProseRecord, kind: str, old: str) -> list[str]:
    """What stands in one sentence with `old` and is clearly something else."""
    found = {}
    differs = functools.cache(functools.partial(_differ, old))
    for sentence, entities in self._entities_in(text).by_sentence:
      others = [new for other, new in entities if other == kind]
      if old in others:
        tried = itertools.islice((new for new in dict.fromkeys(others) if new not in found), _MOST_BESIDE)
        found |= {new: None for new in tried if differs(new) and _are_two(sentence, old, new)}
    return list(found)

  def _foreign(self, text: ProseRecord, kind: str, old: str, rng: np.random.Generator) -> str | None:
    """A name of another record, no word of which this one knows."""
    for _ in range(_REDRAWS):
      other = self._texts[rng.integers(len(self._texts))]
      names = self._entities_in(other).by_kind[kind]
      new = names[rng.integers(len(names))] if names else old
      if _differ(old, new) and not set(_words_of(new)) & _words(text):
        return new
    return None

  def _find_entities(self, text: ProseRecord) -> "_Entities":
    by_sentence = tuple((sentence, self._entities(sentence)) for sentence in _sentences(text))
    by_kind = {"name": [], "quoted": []}
    for kind, entity in itertools.chain.from_iterable(entities for _, entities in by_sentence):
      by_kind[kind].append(entity)
    return _Entities(by_sentence, by_kind)

  def _entities(self, sentence: str) -> list[tuple[str, str]]:
    """("name" or "quoted", text) of each name and quoted text: capitalised words that are never written small."""
    found, end, runs = [], -1, []
    for word in _WORD.finditer(sentence):
      name = re.sub(r"['’]s\Z", "", word[0])
      if name not in self._names:
        continue
      if runs and end == word.start() - 1 and sentence[end] == " ":
        runs[-1] = (runs[-1][0], word.start() + len(name))
      else:
        runs.append((word.start(), word.start() + len(name)))
      end = word.end() if name == word[0] else -1
    found += [("name", sentence[start:stop]) for start, stop in runs]
    return found + [("quoted", quoted[0]) for quoted in _QUOTED.finditer(sentence)]

  @functools.cached_property
  def _names(self) -> frozenset[str]:
    """Words seen with a capital within a sentence, and nowhere without one."""
    inside = re.compile(r"[\w,;.] \Z").search  # after a colon or a quotation mark a sentence may begin
    small, capital = set(), set()
    for text in self._texts:
      for sentence in _sentences(text):
        for k, word in enumerate(_WORD.finditer(sentence)):
          name = re.sub(r"['’]s\Z", "", word[0])
          if name[0].islower():
            small.add(name.casefold())
          elif (
            k
            and name[0].isupper()
            and len(name) > 1
            and name[1] not in "'’"
            and inside(sentence[max(word.start() - 2, 0) : word.start()])
          ):
            capital.add(name)
    return frozenset(name for name in capital if name.casefold() not in small and name not in ABBREVIATIONS)

  @functools.cached_property
  def _num_texts_with(self) -> dict[str, int]:
    """In how many records each step stands."""
    num = {}
    for text in self._texts:
      for content in {content_of(step) for step in text.steps}:
        num[content] = num[content] + 1 if content in num else 1
    return num


def _says_other(text: ProseRecord, right: str, wrong: str) -> bool:
  """Whether `wrong` says what `right` does not, and what it says so stands nowhere in the record."""
  known = {content_of(sentence) for sentence in split_steps(right, "sentence")}
  new = {content_of(sentence) for sentence in split_steps(wrong, "sentence")} - known
  said = _said(text)
  return bool(new) and not any(not content or f"\0{content}\0" in said for content in new)


def _number(text: ProseRecord, body: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
  """One number of the step misread or miscalculated."""
  del text
  spans = [
    (start + found.start(), start + found.end())
    for start, claim in _placed_claims(body)
    for first in [len(claim) - len(claim.lstrip())]
    for found in NUMBER.finditer(claim)
    if _is_quantity(claim, *found.span(), first) and slips(found[0])
  ]
  if not spans:
    return None
  start, stop = spans[rng.integers(len(spans))]
  old = body[start:stop]
  values = slips(old)
  new = written_like(values[rng.integers(len(values))], old)
  step = body[:start] + new + body[stop:]
  if (sums := equations(step)) and all(each.holds for each in sums):
    return body, old, new  # still true: nothing is exchanged, which the caller sees
  return step, old, new


def _is_quantity(claim: str, start: int, stop: int, first: int) -> bool:
  """Return whether the number says how much: no part of a name or a version, and neither counts list items nor pages.

  `first` is the first character of the claim that is no white space.
  """
  before = claim[
    max(start - _MOST_COUNTER, 0) : start
  ]  # not all of it: the time would grow with the square of the claim
  part = re.search(r"[\w.,]\Z", before) or _PART.match(claim, stop)
  item = start <= first and _ITEM.match(claim, stop)
  zeros = re.match(r"0\d", claim[start:stop])
  return not (part or item or zeros or _COUNTER.search(before))


def _negation(text: ProseRecord, body: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
  """A negation put in after an auxiliary, or the only one of a sentence taken out."""
  del text
  edits = []
  for start, sentence in _placed_sentences(body):
    negatives = _NEGATIVE.findall(sentence)
    if "?" in sentence or _UNDECIDED.search(sentence) or len(negatives) > 1:
      continue
    if negatives:
      found = _NEGATED.search(sentence) or _CONTRACTED.search(sentence) or re.search(r"\bcannot(?= \w)", sentence)
      new = found and ("can" if found[0] == "cannot" else _FULL[found[1]] if found[1] in _FULL else found[1])
    else:
      found = _AUXILIARY.search(sentence)
      new = found and ("cannot" if found[0] == "can" else f"{found[0]} not")
    if found:
      edits.append((start + found.start(), start + found.end(), new))
  if not edits:
    return None
  start, stop, new = edits[rng.integers(len(edits))]
  return body[:start] + new + body[stop:], body[start:stop], new


def _placed_sentences(text: str) -> Iterator[tuple[int, str]]:
  start = 0
  for sentence in split_steps(text, "sentence"):
    yield start, sentence
    start += len(sentence)


def _placed_claims(text: str) -> Iterator[tuple[int, str]]:
  """The sentences, and where each begins, in which another number or name is another claim."""
  for start, sentence in _placed_sentences(text):
    if "?" not in sentence and not _LOOSE.search(sentence):
      yield start, sentence


def _claims(text: str) -> list[str]:
  return [claim for _, claim in _placed_claims(text)]


@functools.lru_cache(maxsize=256)
def _sentences(text: ProseRecord) -> tuple[str, ...]:
  """The sentences of prompt and steps."""
  return tuple(sentence for passage in (text.prompt, *text.steps) for sentence in split_steps(passage, "sentence"))


@functools.lru_cache(maxsize=256)
def _said(text: ProseRecord) -> str:
  """The content of the whole record, a zero character at both ends of each word."""
  return "\0" + "\0".join(map(content_of, (text.prompt, *text.steps))) + "\0"


def _words_of(text: str) -> list[str]:
  return [token for token in content_of(text).split("\0") if token[:1].isalpha()]


@functools.lru_cache(maxsize=256)
def _words(text: ProseRecord) -> frozenset[str]:
  """The words of the whole record."""
  return frozenset(word for passage in (text.prompt, *text.steps) for word in _words_of(passage))


def _differ(old: str, new: str) -> bool:
  """Whether two names share no word and neither is short for the other: not Rob, Robert; not U.S., United States."""
  ours, theirs = _words_of(old), _words_of(new)
  if not ours or not theirs or set(ours) & set(theirs) or ours[0][:3] == theirs[0][:3]:
    return False
  initials = ["".join(word[0] for word in words) if len(words) > 1 else "" for words in (ours, theirs)]
  return initials[0] != "".join(theirs) and initials[1] != "".join(ours)


def _are_two(sentence: str, one: str, other: str) -> bool:
  """Whether words between two names in a sentence set them apart: not "Anna, the queen", "Bob, known as Duke"."""
  (start, first), (stop, _) = sorted((sentence.index(name), name) for name in (one, other))
  between = sentence[start + len(first) : stop]
  return bool(_WORD.search(_ARTICLES.sub("", between))) and not _SAME.search(between)

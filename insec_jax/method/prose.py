"""Wrong steps for prose, whose steps no checker can read.

    class      right                               wrong
    sentence   She paid the ferryman in silver.    Frost had killed the vines.            the next step, from elsewhere
    number     The bridge is 120 m long.           The bridge is 102 m long.
    entity     Anna paid the ferryman.             Bela paid the ferryman.                a name or a quoted text
    negation   The bridge is open.                 The bridge is not open.                put in or taken out; English

No world knowledge is used, so a wrong step is proved different, not false: it has other words or another value than
the right one, in sentences that occur nowhere in the record. Where it may still be true ("at least 3" and "at least 2",
one person under two names, a phrase that fits everywhere) no step is made: a false mistake teaches a model to flag
right steps.
"""

import collections
import dataclasses
import functools
import hashlib
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
_REDRAWS = 8  # of a replacement, before a class counts as impossible at a place
_MOST_BESIDE = 64  # names tried that share a sentence with one
_MOST_AT_ONCE = 1000  # characters normalised at once in a long text: the time grows with the square of combining ones
_LEAST_LETTERS = 4  # of a word that counts as a sentence's topic

_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")
_QUOTED = re.compile(r'(?<=")[^"\n]{2,60}(?=")|(?<=“)[^“”\n]{2,60}(?=”)')
_WORD_OR_SPACE = re.compile(rf"\s+|\S{{1,{_MOST_AT_ONCE}}}")
_TOKEN = re.compile(rf"{NUMBER.pattern}|[^\W\d_]+")


def _any_of(words: str) -> re.Pattern:
  return re.compile(rf"\b(?:{'|'.join(word.replace('_', ' ') for word in words.split())})\b", re.I)


# With one of these in the sentence another number or name may be true as well, or the sentence claims nothing.
_LOOSE = _any_of("""
  at_least at_most more_than less_than fewer_than greater_than larger_than smaller_than up_to over under above below
  about around nearly almost roughly approximately circa for_example for_instance e.g such_as say suppose assume
  let if unless whether or either any every each some several many most few maybe perhaps possibly may might could
  is_a is_an are_a was_a was_an were_a one_of even odd prime divisible multiple""")
# With one of these a sentence and its negation may both be true, or neither is claimed.
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
# After an article "can" and "will" are nouns.
_AUXILIARY = re.compile(
  r"(?i:(?<!\ba )(?<!\bthe )(?<!\bof )(?<!\bhis )(?<!\bher )(?<!\bmy )(?<!\btheir )(?<!\byour ))"
  r"\b(is|are|was|were|will|would|can|should|must)(?= [a-z0-9])"
)
# A number after one of these only numbers pages and list items.
_COUNTER = re.compile(
  r"\b(?:step|figure|table|chapter|section|equation|page|line|part|question|problem|answer|case|"
  r"rule|no\.)\s*\Z",
  re.I,
)
_MOST_COUNTER = 40  # characters of such a word and the white space after it
_PART = re.compile(r"\w|[.,]\d")
_ITEM = re.compile(r"[.):](?:\s|\Z)")
# Words that may equate the names on both sides. A comma alone may do so too.
_SAME = _any_of("is was are were as aka alias called named nicknamed known knew formerly born or of")
_ARTICLES = _any_of("the a an")


@dataclasses.dataclass(frozen=True, eq=False)  # caches use identity: hashing all steps costs as much as reading them
class ProseRecord:
  """A record without mistakes: its prompt (may be empty) and the steps of its answer."""

  prompt: str
  steps: tuple[str, ...]
  follows_text: bool  # there is text before the first step


@dataclasses.dataclass(frozen=True)
class Corruption:
  """A wrong step, its class, and the words exchanged in it (empty for "sentence")."""

  step: str
  error: str
  right: str
  wrong: str


def explain(corruption: Corruption, detail: str) -> str:
  """Return what is wrong: "label" names it, "recompute" adds the right words where words were exchanged.

  class      label                           recompute
  sentence   This does not belong here.      This does not belong here.
  number     A number is wrong.              It should say "120", not "102".
  """
  if detail == "label" or not corruption.right:
    return _LABEL[corruption.error]
  return f'It should say "{corruption.right}", not "{corruption.wrong}".'


def _normalized(text: str) -> str:
  if len(text) <= 10 * _MOST_AT_ONCE:
    return unicodedata.normalize("NFKC", text)
  return "".join(unicodedata.normalize("NFKC", piece) for piece in _WORD_OR_SPACE.findall(text))


def content_of(text: str) -> str:
  """Return the words and the values of the numbers, without spacing, case and punctuation."""
  text = _normalized(text).casefold()
  return "\0".join(str(value_of(token)) if NUMBER.fullmatch(token) else token for token in _TOKEN.findall(text))


class _Entities(NamedTuple):
  """Names and quoted texts of a record: (kind, text) pairs of each sentence, and the texts of each kind."""

  by_sentence: tuple[tuple[str, list[tuple[str, str]]], ...]
  by_kind: dict[str, list[str]]


class Corpus:
  """Records that receive mistakes; each also supplies sentences and names to the others."""

  def __init__(self, texts: Sequence[ProseRecord]):
    self._texts = texts
    # The same object for an index while a record is worked on: other caches use its identity.
    self._text = functools.lru_cache(maxsize=256)(texts.__getitem__)
    self._entities_in = functools.lru_cache(maxsize=256)(self._find_entities)

  def __getitem__(self, index: int) -> ProseRecord:
    return self._text(index)

  def corrupt(self, index: int, place: int, error: str, rng: np.random.Generator) -> Corruption | None:
    """Return a wrong step of the class for the step at `place`; None if none can be shown to be different."""
    text = self._text(index)
    right = text.steps[place]
    body = right.strip()
    start = right.index(body)
    draw = {"sentence": self._sentence, "number": _number, "entity": self._entity, "negation": _negation}[error]
    for _ in range(_REDRAWS):
      replacement = draw(text, body, rng)
      if replacement is None:
        return None
      step = right[:start] + replacement[0] + right[start + len(body) :]
      if _adds_a_claim(text, right, step):
        return Corruption(step, error, *replacement[1:])
    return None

  def _sentence(self, text: ProseRecord, body: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """Return a step of another record that has a different topic and occurs in only one record."""
    del body  # replaced whole
    for _ in range(_REDRAWS):
      source = self._text(int(rng.integers(len(self._texts))))
      step = source.steps[rng.integers(len(source.steps))].strip() if source.steps else ""
      foreign = any(len(word) >= _LEAST_LETTERS and word not in _record_words(text) for word in _list_words(step))
      if not foreign or _digest(step) in self._repeated or source.prompt.strip() == text.prompt.strip() != "":
        continue
      known_content = _record_content(text)
      if not any(f"\0{content_of(sentence)}\0" in known_content for sentence in split_steps(step, "sentence")):
        return step, "", ""
    return None

  def _entity(self, text: ProseRecord, body: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """Return the step with one name or quoted text replaced, if possible by one that shares a sentence with it."""
    here = [entity for sentence in _claims(body) for entity in self._entities(sentence)]
    if not here:
      return None
    kind, old = here[rng.integers(len(here))]
    beside = [new for new in self._beside(text, kind, old) if not set(_list_words(new)) & set(_list_words(body))]
    new = beside[rng.integers(len(beside))] if beside else self._foreign(text, kind, old, rng)
    if new is None:
      return body, old, old  # unchanged, so the caller rejects it
    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, body), old, new

  def _beside(self, text: ProseRecord, kind: str, old: str) -> list[str]:
    """Return the entities that share a sentence with `old` and clearly differ from it."""
    beside: dict[str, None] = {}
    differs = functools.cache(functools.partial(_clearly_differ, old))
    for sentence, entities in self._entities_in(text).by_sentence:
      others = [new for other_kind, new in entities if other_kind == kind]
      if old in others:
        tried = itertools.islice((new for new in dict.fromkeys(others) if new not in beside), _MOST_BESIDE)
        beside |= {new: None for new in tried if differs(new) and _are_separate(sentence, old, new)}
    return list(beside)

  def _foreign(self, text: ProseRecord, kind: str, old: str, rng: np.random.Generator) -> str | None:
    """Return a name of another record none of whose words occur in this one; None if none is drawn."""
    for _ in range(_REDRAWS):
      source = self._text(int(rng.integers(len(self._texts))))
      names = self._entities_in(source).by_kind[kind]
      new = names[rng.integers(len(names))] if names else old
      if _clearly_differ(old, new) and not set(_list_words(new)) & _record_words(text):
        return new
    return None

  def _find_entities(self, text: ProseRecord) -> "_Entities":
    by_sentence = tuple((sentence, self._entities(sentence)) for sentence in _record_sentences(text))
    by_kind: dict[str, list[str]] = {"name": [], "quoted": []}
    for kind, entity in itertools.chain.from_iterable(entities for _, entities in by_sentence):
      by_kind[kind].append(entity)
    return _Entities(by_sentence, by_kind)

  def _entities(self, sentence: str) -> list[tuple[str, str]]:
    """Return ("name" or "quoted", text) of each name and quoted text.

    A name is a run of capitalised words that never occur in lower case.
    """
    runs: list[tuple[int, int]] = []
    end = -1
    for word in _WORD.finditer(sentence):
      name = re.sub(r"['’]s\Z", "", word[0])
      if name not in self._names:
        continue
      if runs and end == word.start() - 1 and sentence[end] == " ":
        runs[-1] = (runs[-1][0], word.start() + len(name))
      else:
        runs.append((word.start(), word.start() + len(name)))
      end = word.end() if name == word[0] else -1
    names = [("name", sentence[start:stop]) for start, stop in runs]
    return names + [("quoted", quoted[0]) for quoted in _QUOTED.finditer(sentence)]

  @functools.cached_property
  def _names(self) -> frozenset[str]:
    """Return the words that occur with a capital within a sentence, and nowhere without one."""
    inside = re.compile(r"[\w,;.] \Z").search  # after a colon or a quotation mark a sentence may begin
    small, capital = set(), set()
    for text in self._texts:
      for sentence in _record_sentences(text):
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
  def _repeated(self) -> frozenset[bytes]:
    """Return the digest of each step that more than one record contains."""
    count = collections.Counter(step for text in self._texts for step in set(map(_digest, text.steps)))
    return frozenset(step for step, num in count.items() if num > 1)


def _digest(step: str) -> bytes:
  return hashlib.sha256(content_of(step).encode("utf-8", "surrogatepass")).digest()


def _adds_a_claim(text: ProseRecord, right: str, wrong: str) -> bool:
  """Return whether `wrong` has a sentence that `right` lacks and no such sentence is in the record."""
  known = {content_of(sentence) for sentence in split_steps(right, "sentence")}
  new = {content_of(sentence) for sentence in split_steps(wrong, "sentence")} - known
  record_content = _record_content(text)
  return bool(new) and not any(not content or f"\0{content}\0" in record_content for content in new)


def _number(text: ProseRecord, body: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
  """Return the step with one number replaced, as if misread or miscalculated."""
  del text
  spans = [
    (start + match.start(), start + match.end())
    for start, claim in _placed_claims(body)
    for first in [len(claim) - len(claim.lstrip())]
    for match in NUMBER.finditer(claim)
    if _is_quantity(claim, *match.span(), first) and slips(match[0])
  ]
  if not spans:
    return None
  start, stop = spans[rng.integers(len(spans))]
  old = body[start:stop]
  values = slips(old)
  new = written_like(values[rng.integers(len(values))], old)
  assert new is not None, f"{old!r} has a slip that cannot be written"
  step = body[:start] + new + body[stop:]
  if (written := equations(step)) and all(equation.holds for equation in written):
    return body, old, new  # still true: unchanged, so the caller rejects it
  return step, old, new


def _is_quantity(claim: str, start: int, stop: int, first: int) -> bool:
  """Return whether the number is a quantity, not part of a name or version, nor a list item or page number.

  `first` is the first character of the claim that is no white space.
  """
  # Not the whole claim: the time would grow with its square.
  before = claim[max(start - _MOST_COUNTER, 0) : start]
  part = re.search(r"[\w.,]\Z", before) or _PART.match(claim, stop)
  item = start <= first and _ITEM.match(claim, stop)
  zeros = re.match(r"0\d", claim[start:stop])
  return not (part or item or zeros or _COUNTER.search(before))


def _negation(text: ProseRecord, body: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
  """Return the step with a negation inserted after an auxiliary, or the only one of a sentence removed."""
  del text
  edits = []
  for start, sentence in _placed_sentences(body):
    negatives = _NEGATIVE.findall(sentence)
    if "?" in sentence or _UNDECIDED.search(sentence) or len(negatives) > 1:
      continue
    if negatives:
      match = _NEGATED.search(sentence) or _CONTRACTED.search(sentence) or re.search(r"\bcannot(?= \w)", sentence)
    else:
      match = _AUXILIARY.search(sentence)
    if match:
      edits.append((start + match.start(), start + match.end(), _affirmed(match) if negatives else _negated(match)))
  if not edits:
    return None
  start, stop, new = edits[rng.integers(len(edits))]
  return body[:start] + new + body[stop:], body[start:stop], new


def _affirmed(match: re.Match[str]) -> str:
  """Return the auxiliary without its negation."""
  return "can" if match[0] == "cannot" else _FULL[match[1]] if match[1] in _FULL else match[1]


def _negated(match: re.Match[str]) -> str:
  """Return the auxiliary with a negation."""
  return "cannot" if match[0] == "can" else f"{match[0]} not"


def _placed_sentences(text: str) -> Iterator[tuple[int, str]]:
  start = 0
  for sentence in split_steps(text, "sentence"):
    yield start, sentence
    start += len(sentence)


def _placed_claims(text: str) -> Iterator[tuple[int, str]]:
  """Yield (start, sentence) for each sentence in which another number or name makes another claim."""
  for start, sentence in _placed_sentences(text):
    if "?" not in sentence and not _LOOSE.search(sentence):
      yield start, sentence


def _claims(text: str) -> list[str]:
  return [claim for _, claim in _placed_claims(text)]


@functools.lru_cache(maxsize=256)
def _record_sentences(text: ProseRecord) -> tuple[str, ...]:
  """Return the sentences of prompt and steps."""
  return tuple(sentence for passage in (text.prompt, *text.steps) for sentence in split_steps(passage, "sentence"))


@functools.lru_cache(maxsize=256)
def _record_content(text: ProseRecord) -> str:
  """Return the content of the whole record, a zero character at both ends of each word."""
  return "\0" + "\0".join(map(content_of, (text.prompt, *text.steps))) + "\0"


def _list_words(text: str) -> list[str]:
  return [token for token in content_of(text).split("\0") if token[:1].isalpha()]


@functools.lru_cache(maxsize=256)
def _record_words(text: ProseRecord) -> frozenset[str]:
  """Return the words of the whole record."""
  return frozenset(word for passage in (text.prompt, *text.steps) for word in _list_words(passage))


def _clearly_differ(old: str, new: str) -> bool:
  """Return whether two names share no word and neither abbreviates the other (Rob, Robert; U.S., United States)."""
  ours, theirs = _list_words(old), _list_words(new)
  if not ours or not theirs or set(ours) & set(theirs) or ours[0][:3] == theirs[0][:3]:
    return False
  initials = ["".join(word[0] for word in words) if len(words) > 1 else "" for words in (ours, theirs)]
  return initials[0] != "".join(theirs) and initials[1] != "".join(ours)


def _are_separate(sentence: str, old: str, new: str) -> bool:
  """Return whether words between two names separate them: not "Anna, the queen", "Bob, known as Duke"."""
  (start, first), (stop, _) = sorted((sentence.index(name), name) for name in (old, new))
  between = sentence[start + len(first) : stop]
  return bool(_WORD.search(_ARTICLES.sub("", between))) and not _SAME.search(between)

"""Statements of the task grounded: how they are read and said, and which a text of facts supports."""

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple, Optional

from insec_jax.method.tasks.grounded_words import (
  ANSWER,
  BUILDING_NAMES,
  BUILDINGS,
  FIRST_YEAR,
  LAST_YEAR,
  NO_NAMES,
  OPENERS,
  PEOPLE,
  PROVINCES,
  RELATIONS,
  TITLES,
  TOWNS,
  Relation,
)

BY_NAME = {relation.name: relation for relation in RELATIONS}
POOLS = {
  "P": PEOPLE,
  "T": TOWNS,
  "R": PROVINCES,
  "B": tuple(f"{name} {building}" for name in BUILDING_NAMES for building in BUILDINGS),
  "Y": tuple(str(year) for year in range(FIRST_YEAR, LAST_YEAR + 1)),
}
KIND = {name: kind for kind, names in POOLS.items() for name in names}
_NAME = re.compile("(?:the )?([A-Z][a-z]+(?: [A-Z][a-z]+)*|[12][0-9]{3})", re.ASCII)


def leading_from(kind: str) -> list[Relation]:
  """Return the relations whose subjects are of this kind."""
  return [relation for relation in RELATIONS if relation.subject == kind]


class Thing(NamedTuple):
  """An entity as named: by its own name, or through `of` by a relation whose name is `name`."""

  name: str
  of: Optional["Thing"] = None


class Statement(NamedTuple):
  """A statement as parsed."""

  relation: str
  subject: Thing
  object: Thing

  @property
  def is_joined(self) -> bool:
    """Return whether an entity is named through another fact."""
    return self.subject.of is not None or self.object.of is not None


class Finding(NamedTuple):
  """A statement with its class of mistake, "" where the text supports it, and the hop that it states, -1 for none."""

  statement: Statement
  error: str
  hop: int = -1


@dataclass(frozen=True)
class Facts:
  """The object of each (relation, subject) of the text, and the pairs that lead to the answer, in their order."""

  objects: dict[tuple[str, str], str]
  hops: tuple[tuple[str, str], ...]

  @functools.cached_property
  def names(self) -> frozenset[str]:
    """Return the names of all entities of the text."""
    return frozenset({*self.objects.values(), *(subject for _, subject in self.objects)})

  def of_kind(self, kind: str) -> list[str]:
    """Return the names of this kind, in alphabetical order."""
    return sorted(name for name in self.names if KIND[name] == kind)

  def find(self, thing: Thing) -> str | None:
    """Return the name of the entity; None where the text does not say which it is."""
    if thing.of is None:
      return thing.name
    inner = self.find(thing.of)
    return None if inner is None else self.objects.get((thing.name, inner))

  def asked(self, hop: int) -> Thing:
    """Return the object of a hop as named from the first subject on."""
    thing = Thing(self.hops[0][1])
    for relation, _ in self.hops[: hop + 1]:
      thing = Thing(relation, thing)
    return thing


def _pattern(template: str) -> re.Pattern[str]:
  text = re.escape(template[0].lower() + template[1:])
  return re.compile(text.replace(r"\{s\}", "(?P<s>.+?)").replace(r"\{o\}", "(?P<o>.+?)"))


_FORMS = [(relation.name, _pattern(form)) for relation in RELATIONS for form in relation.forms]
_PHRASES = [(relation.name, _pattern(phrase)) for relation in RELATIONS for phrase in relation.phrases]
QUESTIONS = [(relation.name, _pattern(question)) for relation in RELATIONS for question in relation.questions]


def lower_the(text: str) -> str:
  """Return the text with its first letter in lower case where it begins with "The"."""
  return "the " + text[4:] if text.startswith("The ") else text


@functools.lru_cache(maxsize=1 << 12)
def read_things(text: str) -> tuple[Thing, ...]:
  """Return every entity that the words can name."""
  found = []
  for title in ("", *TITLES):
    match = _NAME.fullmatch(text.removeprefix(title)) if text.startswith(title) else None
    if match and not any(word in NO_NAMES for word in match[1].split()):
      found.append(Thing(match[1]))
  for relation, pattern in _PHRASES:
    if match := pattern.fullmatch(text):
      found += [Thing(relation, inner) for inner in read_things(match["s"])]
  return tuple(found)


def _plain(step: str) -> str:
  """Return the sentence of a step without opening words, its first "The" in lower case."""
  text = step.strip()
  while opener := next((opener for opener in OPENERS if text.startswith(opener)), ""):
    text = text.removeprefix(opener)
  return lower_the(text)


@functools.lru_cache(maxsize=1 << 14)
def read(step: str) -> tuple[Statement, ...]:
  """Return every statement that the step can be; empty where it is none in words that are known."""
  text = _plain(step)
  return tuple(
    Statement(relation, subject, object_)
    for relation, pattern in _FORMS
    if (match := pattern.fullmatch(text))
    for subject in read_things(match["s"])
    for object_ in read_things(match["o"])
  )


@functools.lru_cache(maxsize=1 << 12)
def read_answer(step: str) -> str | None:
  """Return what the step gives as the answer; None where it gives none."""
  head, tail = ANSWER.strip().split("{}")
  text = _plain(step)
  is_answer = text.startswith(lower_the(head)) and text.endswith(tail)
  return text.removesuffix(tail)[len(head) :] if is_answer else None


def say(thing: Thing) -> str:
  """Return the words for an entity, as in a solution."""
  if thing.of is not None:
    return BY_NAME[thing.name].phrases[0].format(s=say(thing.of))
  return f"the {thing.name}" if KIND.get(thing.name) == "B" else thing.name


def sentence(form: str, subject: Thing, object_: Thing) -> str:
  """Return a wording as a sentence about the two."""
  text = form.format(s=say(subject), o=say(object_))
  return text[0].upper() + text[1:]


def judge(facts: Facts, statement: Statement, prompt: str) -> Finding | None:
  """Return the finding on a statement; None where it is none of that relation, or a name is like one of the prompt."""
  names = [_innermost(thing) for thing in (statement.subject, statement.object)]
  if strange := [name for name in names if name not in facts.names]:
    is_invented = all(name in KIND or _words_of(prompt).isdisjoint(name.lower().split()) for name in strange)
    return Finding(statement, "invented") if is_invented else None
  relation = BY_NAME[statement.relation]
  subject, object_ = facts.find(statement.subject), facts.find(statement.object)
  if subject is None or object_ is None:
    return Finding(statement, "joined")
  if KIND[subject] != relation.subject and KIND[object_] != relation.object:
    return None
  said = facts.objects.get((relation.name, subject))
  # What is in a town is in its province too.
  for key in ((relation.name, subject), ("province", said or "")):
    if facts.objects.get(key) == object_ and (key[1] == subject or relation.object == "T"):
      return Finding(statement, "", facts.hops.index(key) if key in facts.hops else -1)
  if relation.subject == relation.object and facts.objects.get((relation.name, object_)) == subject:
    return Finding(statement, "turned")
  if statement.is_joined:
    return Finding(statement, "joined")
  pairs = {(key[1], value) for key, value in facts.objects.items()}
  if (subject, object_) in pairs or (object_, subject) in pairs:
    return Finding(statement, "relation")
  return Finding(statement, "unsaid" if said is None else "entity")


def fit(facts: Facts, finding: Finding) -> int:
  """Return how many of subject and object are of the kind that the relation has."""
  relation = BY_NAME[finding.statement.relation]
  subject, object_ = (facts.find(thing) or "" for thing in finding.statement[1:])
  return (KIND.get(subject) == relation.subject) + (KIND.get(object_) == relation.object)


def _innermost(thing: Thing) -> str:
  return thing.name if thing.of is None else _innermost(thing.of)


@functools.lru_cache(maxsize=1 << 10)
def _words_of(prompt: str) -> frozenset[str]:
  return frozenset(re.findall(r"\w+", prompt.lower()))

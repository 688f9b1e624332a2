"""Grounded: a question about a text of made-up facts, for a pretrained model and its own tokenizer.

    prompt   Text: Adra taught Jorun. Adra lives in Velden. Velden was founded by Odila. Jorun has a home in Hollin.\\n
             Question: In which town does the teacher of Jorun live?\\n
    steps    The teacher of Jorun is Adra.\\n
             Adra lives in Velden.\\n
             So the teacher of Jorun lives in Velden.\\n
             The answer is Velden.\\n

A statement is right where the text supports it and the question needs it, and unverified where the question does not
need it. It is wrong where the text does not support it, whether or not the text contradicts it. Any wording of
grounded_words.py is read, and an entity may be named through others ("the teacher of Jorun"). A sentence in other words
is unverified.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method.tasks import MALFORMED, RIGHT, UNVERIFIED, Problem, Task, Verdict
from insec_jax.method.tasks.grounded_text import (
  BY_NAME,
  KIND,
  POOLS,
  QUESTIONS,
  Facts,
  Finding,
  Thing,
  fit,
  judge,
  leading_from,
  lower_the,
  read,
  read_answer,
  read_things,
  say,
  sentence,
)
from insec_jax.method.tasks.grounded_words import ANSWER

CLASSES = ("entity", "invented", "relation", "turned", "unsaid", "joined", "repeat", "answer")
MAX_SIZE = 4
_SLIPS = 20  # draws for one wrong step
_ROUNDS = 5  # of refining the colours of a key
_SENTENCE = re.compile(r"\w[^\n]* [^\n]*\w[.!]")
_PROMPT = re.compile(r"Text: ((?:[^.\n]+\. ?)+)\nQuestion: ([^?\n]+\?)\n")
_SAID = {
  "entity": "The text does not say this.",
  "invented": "The text has no such name.",
  "relation": "The text says something else about these two.",
  "turned": "It is the other way round.",
  "unsaid": "The text says nothing about this.",
  "joined": "These facts do not lead here.",
  "repeat": "This was said before.",
  "answer": "This is not the answer.",
  MALFORMED: "This line cannot be read.",
}


def _step(thing: Thing, object_: str) -> str:
  """Return the statement that `thing`, which is named through another one, is `object_`."""
  assert thing.of is not None
  text = sentence(BY_NAME[thing.name].forms[0], thing.of, Thing(object_))
  return f"So {lower_the(text)}\n" if thing.of.of is not None else f"{text}\n"


def _key(facts: Facts) -> str:
  """Return the relations to the answer, and a hash of the facts without names and order: renamed texts share it."""
  color = {name: KIND[name] + "*" * (name == facts.hops[0][1]) for name in facts.names}
  for _ in range(_ROUNDS):
    near: dict[str, list[str]] = {name: [color[name]] for name in color}
    for (relation, subject), object_ in facts.objects.items():
      near[subject].append(f"{relation} {color[object_]}")
      near[object_].append(f"of {relation} {color[subject]}")
    color = {name: _digest(" ".join(sorted(texts))) for name, texts in near.items()}
  return f"{', '.join(relation for relation, _ in facts.hops)}/{_digest(' '.join(sorted(color.values())))}"


def _digest(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class _Text:
  """A text that is being made; `rng` draws everything."""

  def __init__(self, rng: np.random.Generator):
    self.rng = rng
    self.objects: dict[tuple[str, str], str] = {}
    self.names: dict[str, list[str]] = {kind: [] for kind in POOLS}

  def pick(self, values):
    """Return one of the values."""
    return values[self.rng.integers(len(values))]

  def name(self, kind: str) -> str:
    """Return a new name; two buildings differ in more than the last word."""
    while True:
      name = self.pick(POOLS[kind])
      if all(name.split()[0] != other.split()[0] for other in self.names[kind]):
        self.names[kind].append(name)
        return name

  def follow(self, relations: list[str], kind: str) -> tuple[tuple[str, str], ...]:
    """Add facts about new entities, each about the object of the one before it; return (relation, subject) of each."""
    hops, subject = [], self.name(kind)
    for relation in relations:
      hops.append((relation, subject))
      subject = self.objects[hops[-1]] = self.name(BY_NAME[relation].object)
    return tuple(hops)

  def add_fact(self) -> None:
    """Add a fact about an entity that the text has, unless it says that already; the object may be a known one."""
    subject = self.pick([name for kind in "PTB" for name in self.names[kind]])
    relation = self.pick(leading_from(KIND[subject]))
    known = [name for name in self.names[relation.object] if name != subject]
    if (relation.name, subject) not in self.objects:
      is_known = known and self.rng.random() < 0.5
      self.objects[relation.name, subject] = self.pick(known) if is_known else self.name(relation.object)

  def path(self, size: int) -> tuple[str, list[str]]:
    """Return the kind of a first subject and relations that lead on from it."""
    kind = start = self.pick("PTB")
    relations = []
    for left in range(size - 1, -1, -1):
      relation = self.pick([one for one in leading_from(kind) if not left or leading_from(one.object)])
      relations.append(relation.name)
      kind = relation.object
    return start, relations


class Grounded(Task[Facts]):
  """The task of grounded answers; its size is the number of facts that an answer needs.

  The steps are these facts, from two on what they lead to together, and the answer.
  """

  name = "grounded"
  error_classes = CLASSES
  units = ("line", "sentence")
  symbols = None
  answer_classes = ("answer",)

  def __init__(self, task: TaskConfig):
    super().__init__(task)
    if self.max_size > MAX_SIZE:
      raise InputError(f"task.max_size={task.max_size}; grounded needs at most {MAX_SIZE} facts for an answer")

  def make(self, rng: np.random.Generator) -> Problem[Facts]:
    text = _Text(rng)
    kind, relations = text.path(int(rng.integers(self.min_size, self.max_size + 1)))
    hops = text.follow(relations, kind)
    text.follow(relations, kind)  # so that each kind of fact is there of two subjects
    for _ in range(rng.integers(1, 4)):
      text.add_fact()
    facts = Facts(text.objects, hops)
    sentences = [
      sentence(text.pick(BY_NAME[relation].forms), Thing(subject), Thing(object_))
      for (relation, subject), object_ in text.objects.items()
    ]
    question = text.pick(BY_NAME[relations[-1]].questions).format(s=say(self._subject(facts)))
    prompt = f"Text: {' '.join(rng.permutation(sentences).tolist())}\nQuestion: {question}\n"
    return self._problem(prompt, facts)

  def _subject(self, facts: Facts) -> Thing:
    """Return whom or what the question is about."""
    asked = facts.asked(len(facts.hops) - 1).of
    assert asked is not None
    return asked

  def problem_of(self, prompt: str) -> Problem[Facts] | None:
    match = _PROMPT.fullmatch(prompt)
    if match is None:
      return None
    objects: dict[tuple[str, str], str] = {}
    for text in re.findall(r"[^.]+\.", match[1]):
      for relation, subject, object_ in read(text):
        kinds = KIND.get(subject.name), KIND.get(object_.name)
        if kinds == (BY_NAME[relation].subject, BY_NAME[relation].object):
          objects[relation, subject.name] = object_.name
    for relation, pattern in QUESTIONS:
      asked = pattern.fullmatch(match[2][0].lower() + match[2][1:])
      for subject in read_things(asked["s"]) if asked else ():
        hops = []
        thing: Thing | None = Thing(relation, subject)
        while thing is not None and thing.of is not None:
          hops.append((thing.name, Facts(objects, ()).find(thing.of) or ""))
          thing = thing.of
        if all(hop in objects for hop in hops):
          return self._problem(prompt, Facts(objects, tuple(reversed(hops))))
    return None

  def _problem(self, prompt: str, facts: Facts) -> Problem[Facts]:
    """Return the problem with its solution."""
    things = [Thing(relation, Thing(subject)) for relation, subject in facts.hops]
    if len(facts.hops) > 1:
      things.append(facts.asked(len(facts.hops) - 1))
    answer = facts.objects[facts.hops[-1]]
    steps = (*(_step(thing, facts.find(thing) or "") for thing in things), ANSWER.format(say(Thing(answer))))
    return Problem(prompt, steps, answer, _key(facts), facts)

  def structure(self, problem: Problem[Facts]) -> str:
    """Return the key: problems that differ only in names, wording and order share it."""
    return problem.key

  def check(self, problem: Problem[Facts], before: tuple[str, ...], step: str) -> Verdict:
    if read_answer(step) is not None:
      return self._check_answer(problem, before, step)
    finding = self._find(problem, step)
    if finding is None:
      if not _SENTENCE.fullmatch(step.strip()):
        return Verdict("wrong", MALFORMED)
      is_repeat = step.strip() in (earlier.strip() for earlier in before)
      return Verdict("wrong", "repeat") if is_repeat else UNVERIFIED
    if finding.error:
      return Verdict("wrong", finding.error)
    if any(earlier.statement == finding.statement for earlier in self._supported(problem, before)):
      return Verdict("wrong", "repeat")
    return RIGHT if finding.hop >= 0 else UNVERIFIED

  def _check_answer(self, problem: Problem[Facts], before: tuple[str, ...], step: str) -> Verdict:
    if self._is_answer(problem, step):
      if any(self._is_answer(problem, earlier) for earlier in before):
        return Verdict("wrong", "repeat")
      last = len(problem.facts.hops) - 1
      is_shown = any(finding.hop == last for finding in self._supported(problem, before))
      return RIGHT if is_shown else UNVERIFIED
    things = read_things(read_answer(step) or "")
    # Named through others, or in words that are not read.
    may_be = any(problem.facts.find(thing) == problem.answer for thing in things) if things else problem.answer in step
    return UNVERIFIED if may_be else Verdict("wrong", "answer")

  def _is_answer(self, problem: Problem[Facts], step: str) -> bool:
    return Thing(problem.answer) in read_things(read_answer(step) or "")

  def _find(self, problem: Problem[Facts], step: str) -> Finding | None:
    """Return the finding on a statement, the best of its readings; None where it cannot be read."""
    facts = problem.facts
    found = [finding for statement in read(step) if (finding := judge(facts, statement, problem.prompt))]
    return min(found, key=lambda finding: (finding.error != "", -fit(facts, finding)), default=None)

  def _supported(self, problem: Problem[Facts], steps: tuple[str, ...]) -> Iterator[Finding]:
    """Yield the findings on those of the steps that the text supports."""
    for step in steps:
      finding = self._find(problem, step)
      if finding is not None and not finding.error:
        yield finding

  def _next(self, problem: Problem[Facts], before: tuple[str, ...]) -> Thing | None:
    """Return what to state next, as the solution names it; None for the answer."""
    found, facts = list(self._supported(problem, before)), problem.facts
    last = len(facts.hops) - 1
    for number, (relation, subject) in enumerate(facts.hops):
      if all(finding.hop != number for finding in found):
        return Thing(relation, Thing(subject))
    is_joined = any(finding.hop == last and finding.statement.is_joined for finding in found)
    return facts.asked(last) if last and not is_joined else None

  def _is_answered(self, problem: Problem[Facts], before: tuple[str, ...]) -> bool:
    return any(self._is_answer(problem, step) for step in before)

  def next_step(self, problem: Problem[Facts], before: tuple[str, ...]) -> str | None:
    if self._is_answered(problem, before):
      return None
    thing = self._next(problem, before)
    return problem.steps[-1] if thing is None else _step(thing, problem.facts.find(thing) or "")

  def correction(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str) -> str | None:
    finding = self._find(problem, wrong)
    if finding is not None and not self._is_answered(problem, before):
      thing = Thing(finding.statement.relation, finding.statement.subject)
      if (name := problem.facts.find(thing)) is not None:
        step = _step(thing, name)
        if self.check(problem, before, step) == RIGHT:
          return step
    return self.next_step(problem, before)

  def answer_of(self, problem: Problem[Facts], steps: tuple[str, ...]) -> str | None:
    """Return the name in the last line that states an answer, or what is there in its place."""
    del problem
    for step in reversed(steps):
      if (said := read_answer(step)) is not None:
        return next((thing.name for thing in read_things(said) if thing.of is None), said)
    return None

  def inject(
    self, problem: Problem[Facts], before: tuple[str, ...], error: str, rng: np.random.Generator
  ) -> str | None:
    if error == "repeat":
      return before[rng.integers(len(before))] if before else None
    if self._is_answered(problem, before):
      return None
    thing = self._next(problem, before)
    if error == "answer":
      others = [name for name in problem.facts.of_kind(KIND[problem.answer]) if name != problem.answer]
      may_come = thing is None and others
      return ANSWER.format(say(Thing(others[rng.integers(len(others))]))) if may_come else None
    if thing is None:
      return None
    for _ in range(_SLIPS):
      step = self._slipped(problem.facts, thing, error, rng)
      if step is not None and self.check(problem, before, step).error == error:
        return step
    return None

  def _slipped(self, facts: Facts, thing: Thing, error: str, rng: np.random.Generator) -> str | None:
    """Return a statement in place of the one about `thing`, which may be wrong in this way; None for none."""
    relation, subject, object_ = BY_NAME[thing.name], thing.of, facts.find(thing)
    assert subject is not None
    assert object_ is not None

    def one_of(values: Sequence[str]) -> str:
      return values[int(rng.integers(len(values)))] if values else ""

    if error in ("entity", "invented"):
      is_subject = subject.of is None and rng.random() < 0.5
      kind = relation.subject if is_subject else relation.object
      known = facts.of_kind(kind)
      near = [name for name in known if name not in (subject.name, object_)]
      other = one_of(near if error == "entity" else [name for name in POOLS[kind] if name not in known])
      return _step(Thing(relation.name, Thing(other)), object_) if is_subject else _step(thing, other)
    if error == "turned":
      return _step(Thing(relation.name, Thing(object_)), facts.find(subject) or "")
    if error == "joined":
      hop = facts.hops.index((relation.name, facts.find(subject) or ""))
      return _step(facts.asked(hop), one_of(facts.of_kind(relation.object)))
    # Another relation: of the same two, or of the subject and something else.
    others = [other for other in leading_from(relation.subject) if other != relation]
    if error == "relation":
      others = [other for other in others if other.object == relation.object]
    else:
      object_ = ""
    if not others:
      return None
    drawn = others[rng.integers(len(others))]
    object_ = object_ or one_of(facts.of_kind(drawn.object))
    return _step(Thing(drawn.name, subject), object_) if object_ else None

  def explain(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str, detail: str) -> str:
    """Return what is wrong in a sentence; with "recompute" also what is right, or what comes next.

    class      label                                           with "recompute"
    entity     The text does not say this.                     ... It is Velden.
    invented   The text has no such name.                      ... It is Velden.
    relation   The text says something else about these two.   ... It is Velden.
    turned     It is the other way round.                      ... It is Adra.
    unsaid     The text says nothing about this.               ... Next comes the teacher of Jorun.
    joined     These facts do not lead here.                   ... It is Velden.
    repeat     This was said before.                           ... Next comes the answer.
    answer     This is not the answer.                         ... Next comes the town where Adra lives.
    malformed  This line cannot be read.                       ... Next comes the town where Adra lives.
    """
    error = self.check(problem, before, wrong).error
    assert error, f"{wrong!r} is not wrong; there is nothing to explain"
    said = _SAID[error]
    if detail == "label":
      return said
    finding = self._find(problem, wrong)
    if finding is not None and finding.error:
      name = problem.facts.find(Thing(finding.statement.relation, finding.statement.subject))
      if name is not None:
        return f"{said} It is {say(Thing(name))}."
    if self._is_answered(problem, before):
      return said
    following = self._next(problem, before)
    return f"{said} Next comes {'the answer' if following is None else say(following)}."


TASK = Grounded

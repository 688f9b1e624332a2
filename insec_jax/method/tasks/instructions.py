"""Instructions: a list to be written as told, for a pretrained model and its own tokenizer.

    prompt   Write a packing list. The things are lamp, tent, rope and map.\\n
             Write exactly 2 lines, one each for the first 2 things in alphabetical order.\\n
             Leave out the map.\\n
             Use exactly 5 words in each line.\\n
             Start each line with a dash.\\n
             After the lines, write Done.\\n
    steps    - Bring the old lamp today.\\n
             - Take our small red rope.\\n
             Done.\\n

Any line that breaks no instruction is right, whatever its words are. A line that breaks one is wrong, and its class is
the kind of that instruction. Words are runs of letters. A line whose only thing is the beginning of a word, such as
"lamps", is unverified.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import TaskConfig
from insec_jax.method.tasks import MALFORMED, RIGHT, UNVERIFIED, Problem, Task, Verdict
from insec_jax.method.tasks.instructions_lines import Facts, Line, Written, compose, mark_of, outline, read
from insec_jax.method.tasks.instructions_words import (
  CASES,
  CLOSING,
  ENDINGS,
  FEWEST_WORDS,
  MARKS,
  NUMBERED,
  ORDERS,
  THINGS,
  TOPICS,
  WORDINGS,
  Rule,
)

CLASSES = ("count", "item", "order", "repeat", "mark", "ending", "case", "words", "include", "exclude")
KINDS = ("order", *WORDINGS)  # of instructions
_SLIPS = 20  # draws for one wrong line
_COUNT = "Write exactly {n} lines, one each for the first {n} things {order}."
_LAST = f"After the lines, write {CLOSING}."
_HEAD = re.compile(r"(Write [^.]+\.) The things are ([a-z, ]+)\.")
_NUMBER_OF_LINES = re.compile(r"Write exactly ([1-9]) lines, one each for the first \1 things ([a-z ]+)\.")
_RULE_OF = {
  text: Rule(kind, value) for kind, values in WORDINGS.items() for value, texts in values.items() for text in texts
}
_SAID = {
  "count": "The number of lines is wrong.",
  "item": "This is not about one of the things.",
  "order": "This thing is out of order.",
  "repeat": "This was written before.",
  "mark": "The start of the line is wrong.",
  "ending": "The end of the line is wrong.",
  "case": "The letters are wrong.",
  "words": "The number of words is wrong.",
  "include": "A word is missing.",
  "exclude": "This must be left out.",
  MALFORMED: "This line cannot be read.",
}


class Instructions(Task[Facts]):
  """The task of instructions that can be checked; its size is the number of instructions beside the things.

  The number of lines and the line that ends the list are always asked for.
  """

  name = "instructions"
  error_classes = CLASSES
  symbols = None

  def __init__(self, task: TaskConfig):
    super().__init__(task)
    if self.max_size > len(KINDS):
      raise InputError(f"task.max_size={task.max_size}; there are {len(KINDS)} kinds of instructions")

  def make(self, rng: np.random.Generator) -> Problem[Facts]:
    while (problem := self.problem_of(self._prompt(rng))) is None:
      pass  # no line can follow the instructions together
    return problem

  def _prompt(self, rng: np.random.Generator) -> str:
    def pick(values):
      return values[rng.integers(len(values))]

    kinds = rng.permutation(KINDS)[: rng.integers(self.min_size, self.max_size + 1)].tolist()
    num = int(rng.integers(2, 5))
    *things, last = rng.permutation(THINGS)[: num + rng.integers(0, 3) + ("skip" in kinds)].tolist()
    order = pick([name for name in ORDERS if name != "given"]) if "order" in kinds else "given"
    told = [
      pick(WORDINGS[kind][pick([*things, last] if kind == "skip" else list(WORDINGS[kind]))])
      for kind in kinds
      if kind != "order"
    ]
    head = f"{pick(list(TOPICS))} The things are {', '.join(things)} and {last}."
    return "\n".join((head, _COUNT.format(n=num, order=ORDERS[order]), *told, _LAST)) + "\n"

  def problem_of(self, prompt: str) -> Problem[Facts] | None:
    head, _, rest = prompt.partition("\n")
    number, _, rest = rest.partition("\n")
    *told, last, end = rest.split("\n") if rest.count("\n") else ("", "", "")
    named, counted = _HEAD.fullmatch(head), _NUMBER_OF_LINES.fullmatch(number)
    if not named or not counted or (last, end) != (_LAST, "") or not all(text in _RULE_OF for text in told):
      return None
    (topic, listed), (num, order) = named.groups(), counted.groups()
    if topic not in TOPICS or order not in ORDERS.values():
      return None
    things = tuple(re.split(", | and ", listed))
    order = next(name for name in ORDERS if ORDERS[name] == order)
    rules = (*((Rule("order", order),) if order != "given" else ()), *(_RULE_OF[text] for text in told))
    facts = Facts(things, rules, TOPICS[topic], (), ())
    in_order = things if order == "given" else sorted(things, reverse=order == "reversed")
    wanted = tuple(thing for thing in in_order if thing != facts.value("skip"))[: int(num)]
    # The words are drawn by the prompt, so that it says all of its problem.
    rng = np.random.default_rng(list(hashlib.blake2b(prompt.encode(), digest_size=16).digest()))
    lines = tuple(line for thing in wanted if (line := self._right_line(facts, thing, rng)))
    if len(lines) < int(num):
      return None
    facts = Facts(things, rules, TOPICS[topic], wanted, lines)
    steps = (*(self._step(facts, line, number) for number, line in enumerate(lines, 1)), f"{CLOSING}.\n")
    return Problem(prompt, steps, outline(facts, steps), self._key(facts), facts)

  def _right_line(self, facts: Facts, thing: str, rng: np.random.Generator) -> Line | None:
    needed, banned, num = facts.about_words
    return None if needed & banned else compose(facts, thing, rng, needed=needed, banned=banned, num=num)

  def _step(self, facts: Facts, line: Line, number: int, **changed: Any) -> str:
    """Return the line as the instructions ask for it, or with another mark, ending or case."""
    return facts.dress(number)._replace(**changed).put_on(line.body)

  def _key(self, facts: Facts) -> str:
    """Return the numbers of things and lines and the instructions; which thing is left out does not count."""
    told = sorted(f"{kind} {'' if kind == 'skip' else value}" for kind, value in facts.rules)
    return f"{len(facts.wanted)} of {len(facts.things)}; {'; '.join(told)}"

  def structure(self, problem: Problem[Facts]) -> str:
    """Return the key: problems that differ only in list, things and wording share it."""
    return problem.key

  def check(self, problem: Problem[Facts], before: tuple[str, ...], step: str) -> Verdict:
    facts, line = problem.facts, read(step)
    if not line.words:
      return Verdict("wrong", MALFORMED)
    earlier = [read(text) for text in before]
    left = self._left(facts, before)
    named = line.names(facts.things)
    if line.closes:
      error = "repeat" if any(one.closes for one in earlier) else "count" if left else ""
    elif any(one.closes for one in earlier):
      error = "count"
    elif facts.value("skip") in named:
      error = "exclude"
    elif len(named) != 1:
      if not named and line.names(facts.things, loosely=True):
        return UNVERIFIED
      error = "item"
    elif any(named[0] in one.names(facts.things, loosely=True) for one in earlier):
      error = "repeat"
    elif not left:
      error = "count"
    else:
      number = sum(not one.closes for one in earlier) + 1
      error = "order" if named[0] != left[0] else self._broken(facts, line, number)
    return Verdict("wrong", error) if error else RIGHT

  def _broken(self, facts: Facts, line: Written, number: int) -> str:
    """Return the kind of the first instruction about each line that line `number` breaks; "" for none."""
    mark, ending, case, num, include, exclude = (
      facts.value(kind) for kind in ("mark", "ending", "case", "words", "include", "exclude")
    )
    broken = {
      "mark": mark is not None and line.mark != mark_of(mark, number),
      "ending": ending is not None and not (line.text.endswith(ending) if ending else line.text[-1].isalnum()),
      "case": case is not None and line.body != {"lower": line.body.lower(), "upper": line.body.upper()}[case],
      "words": num is not None and len(line.words) != int(num),
      "include": include is not None and include not in line.words,
      "exclude": exclude in line.words,
    }
    return next((kind for kind, is_broken in broken.items() if is_broken), "")

  def _left(self, facts: Facts, before: tuple[str, ...]) -> list[str]:
    """Return the things that still need a line, in their order."""
    named = {thing for step in before for thing in read(step).names(facts.things, loosely=True)}
    return [thing for thing in facts.wanted if thing not in named]

  def _num_lines(self, before: tuple[str, ...]) -> int:
    return sum(not read(step).closes for step in before)

  def next_step(self, problem: Problem[Facts], before: tuple[str, ...]) -> str | None:
    facts, left = problem.facts, self._left(problem.facts, before)
    if any(read(step).closes for step in before):
      return None
    if not left:
      return problem.steps[-1]
    return self._step(facts, facts.lines[facts.wanted.index(left[0])], self._num_lines(before) + 1)

  def correction(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str) -> str | None:
    """Return the line in its own words where its mark, ending or case is wrong; else that of the solution."""
    line, facts = read(wrong), problem.facts
    if self.check(problem, before, wrong).error in ("mark", "ending", "case"):
      step = facts.dress(self._num_lines(before) + 1).put_on(line.body)
      if self.check(problem, before, step) == RIGHT:
        return step
    return self.next_step(problem, before)

  def answer_of(self, problem: Problem[Facts], steps: tuple[str, ...]) -> str | None:
    """Return what the instructions are about, line by line, once the list is closed."""
    return outline(problem.facts, steps) if any(read(step).closes for step in steps) else None

  def inject(
    self, problem: Problem[Facts], before: tuple[str, ...], error: str, rng: np.random.Generator
  ) -> str | None:
    facts = problem.facts
    left = self._left(facts, before)
    if any(read(step).closes for step in before):
      return None
    if error == "count" and left:
      return f"{CLOSING}.\n" if before else None
    for _ in range(_SLIPS):
      step = self._slipped(facts, left, error, self._num_lines(before) + 1, rng)
      if step is None or self.check(problem, before, step).error == error:
        return step
    return None

  def _slipped(self, facts: Facts, left: list[str], error: str, number: int, rng: np.random.Generator) -> str | None:
    """Return the next line with a slip that may be of this class; None where there is none."""

    def pick(values: Sequence):
      return values[int(rng.integers(len(values)))] if values else None

    line = facts.lines[facts.wanted.index(left[0])] if left else facts.lines[-1]
    skipped = facts.value("skip")
    named = [thing for thing in facts.wanted if thing not in left]
    others = [thing for thing in facts.things if thing not in (*named, *left[:1], skipped)]
    things = {
      "item": [thing for thing in THINGS if thing not in facts.things],
      "order": others if left else [],
      "repeat": named,
      "count": [] if left else others,
    }
    if error in things:
      thing = pick(things[error])
      return self._step(facts, line._replace(thing=thing), number) if thing and (left or error == "count") else None
    if not left:
      return None
    if error == "exclude" and skipped and (facts.value("exclude") is None or rng.random() < 0.5):
      return self._step(facts, line._replace(thing=skipped), number)
    asked = facts.value(error)
    if asked is None:
      return None
    if error == "mark":
      marks = ["", *MARKS, *(mark_of(mark, number) for mark in NUMBERED)]
      marks += [mark_of(asked, number + k) for k in (-1, 1)] if asked in NUMBERED and number > 1 else []
      return self._step(facts, line, number, mark=pick([mark for mark in marks if mark != mark_of(asked, number)]))
    if error in ("ending", "case"):
      endings = [ending for ending in ("", *ENDINGS) if ending != asked]
      return self._step(facts, line, number, **{error: pick(endings) if error == "ending" else None})
    words = self._other_words(facts, line, error, rng)
    return None if words is None else self._step(facts, words, number)

  def _other_words(self, facts: Facts, line: Line, error: str, rng: np.random.Generator) -> Line | None:
    """Return the line with another number of words, without the word to use, or with the one to leave out."""
    needed, banned, num = facts.about_words
    if error == "include":
      needed, banned = set(), needed | banned
    elif error == "exclude":
      needed, banned = needed | banned, set()
    elif num is not None:
      num = int(rng.choice([num + k for k in (-2, -1, 1, 2) if num + k >= FEWEST_WORDS]))
    other = compose(facts, line.thing, rng, needed=needed, banned=banned, num=num)
    return None if other is None else other._replace(verb=line.verb)

  def explain(self, problem: Problem[Facts], before: tuple[str, ...], wrong: str, detail: str) -> str:
    """Return which instruction is broken; with "recompute" also what it asks for.

    class      label                                 with "recompute"
    count      The number of lines is wrong.         ... It must be 2 and it is 1.
    item       This is not about one of the things.  ... Next is the lamp.
    order      This thing is out of order.           ... Next is the lamp.
    repeat     This was written before.              ... Next is the rope.
    mark       The start of the line is wrong.       ... It must be 2).
    ending     The end of the line is wrong.         ... It must be a period.
    case       The letters are wrong.                ... They must be small.
    words      The number of words is wrong.         ... It must be 5 and it is 6.
    include    A word is missing.                    ... It is old.
    exclude    This must be left out.                ... It is the word today.
    malformed  This line cannot be read.             ... Next is Done.
    """
    error = self.check(problem, before, wrong).error
    assert error, f"{wrong!r} is not wrong; there is nothing to explain"
    said = _SAID[error]
    if detail == "label":
      return said
    facts, line, left = problem.facts, read(wrong), self._left(problem.facts, before)
    number = self._num_lines(before) + 1
    if error == "count":
      return f"{said} It must be {len(facts.wanted)} and it is {number - line.closes}."
    if error == "exclude":
      skipped = facts.value("skip")
      named = skipped in line.names(facts.things)
      return f"{said} It is the {skipped}." if named else f"{said} It is the word {facts.value('exclude')}."
    if error in ("item", "order", "repeat", MALFORMED):
      following = f"the {left[0]}" if left else CLOSING
      is_closed = any(read(step).closes for step in before)
      return said if is_closed else f"{said} Next is {following}."
    asked = facts.value(error) or ""
    return (
      f"{said} "
      + {
        "mark": f"It must be {mark_of(asked, number)}",
        "ending": f"It must be {ENDINGS.get(asked, 'a letter')}.",
        "case": f"They must be {CASES.get(asked)}.",
        "words": f"It must be {asked} and it is {len(line.words)}.",
        "include": f"It is {asked}.",
      }[error]
    )


TASK = Instructions

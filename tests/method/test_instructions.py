"""Instructions: every verdict by an example, and each instruction read a second time, from the prompt alone."""

import collections
import itertools
import re

import numpy as np
import pytest

from insec_jax.config import TaskConfig
from insec_jax.method import tasks
from insec_jax.method.mistakes import wrong_step
from insec_jax.method.tasks import RIGHT, UNVERIFIED, instructions, instructions_words

TASK = tasks.get(TaskConfig(name="instructions", min_size=2, max_size=4))
ALL = tasks.get(TaskConfig(name="instructions", min_size=1, max_size=8))
HEAD = "Write a packing list. The things are lamp, tent, map and rope.\n"
LAST = "After the lines, write Done.\n"
# Of each class an instruction, a line before, and a line that breaks it; without instruction the line is right.
BROKEN = (
  ("order", "in alphabetical order", "", "", "Bring the rope.\n"),
  ("mark", "in this order", "Number the lines like this: 1)\n", "1) Bring the lamp.\n", "1) Take the tent.\n"),
  ("mark", "in this order", "Start each line with a star.\n", "* Bring the lamp.\n", "- Take the tent.\n"),
  ("ending", "in this order", "End each line with a semicolon.\n", "Bring the lamp;\n", "Take the tent.\n"),
  ("ending", "in this order", "Write no punctuation at the end of a line.\n", "Bring the lamp\n", "Take the tent!\n"),
  ("case", "in this order", "Write the lines in small letters.\n", "bring the lamp.\n", "Take the tent.\n"),
  ("case", "in this order", "Use only capital letters.\n", "BRING THE LAMP.\n", "TAKE THE tent.\n"),
  ("words", "in this order", "Use exactly 4 words in each line.\n", "Bring the old lamp.\n", "Take the tent.\n"),
  ("include", "in this order", "Each line must have the word old.\n", "Bring the old lamp.\n", "Take the tent.\n"),
  ("exclude", "in this order", "Never write the word the.\n", "Bring my lamp.\n", "Take the tent.\n"),
)


def prompt_of(told, order="in this order", num=3):
  return f"{HEAD}Write exactly {num} lines, one each for the first {num} things {order}.\n{told}{LAST}"


@pytest.mark.parametrize(("error", "order", "told", "first", "step"), BROKEN)
def test_a_line_that_breaks_an_instruction_is_wrong_and_without_it_right(error, order, told, first, step):
  problem, before = TASK.problem_of(prompt_of(told, order)), (first,) if first else ()
  assert all(TASK.check(problem, (), line) == RIGHT for line in before)
  assert TASK.check(problem, before, step).error == error
  assert TASK.check(problem, before, TASK.correction(problem, before, step)) == RIGHT
  free = TASK.problem_of(prompt_of("", "in this order" if error != "order" else "in reverse alphabetical order"))
  if error == "order":
    before = ("The tent.\n",)
  assert TASK.check(free, before, step) == RIGHT


LINES = ("Bring the lamp.\n", "Take a tent!\n", "Then some map\n", "Done.\n")


@pytest.mark.parametrize(
  ("num", "step", "error", "reason"),
  [
    (0, "Bring the kettle.\n", "item", "This is not about one of the things. Next is the lamp."),
    (0, "Bring lamp and tent.\n", "item", "Next is the lamp."),
    (0, "Bring the map.\n", "order", "This thing is out of order. Next is the lamp."),
    (2, "Bring the lamp.\n", "repeat", "This was written before. Next is the map."),
    (2, "Done.\n", "count", "The number of lines is wrong. It must be 3 and it is 2."),
    (3, "Bring the rope.\n", "count", "It must be 3 and it is 4."),
    (4, "Done.\n", "repeat", "This was written before."),
    (4, "Bring the rope.\n", "count", "It must be 3 and it is 4."),
    (1, "12 ...\n", "malformed", "This line cannot be read. Next is the tent."),
  ],
)
def test_a_line_of_the_wrong_thing_or_number_is_wrong(num, step, error, reason):
  problem = TASK.problem_of(prompt_of(""))
  before = LINES[:num]
  assert TASK.check(problem, before, step).error == error
  label, recompute = (TASK.explain(problem, before, step, detail) for detail in ("label", "recompute"))
  assert recompute.startswith(label)
  assert reason in recompute


def test_any_words_are_right_where_no_instruction_is_about_them():
  problem = TASK.problem_of(prompt_of(""))
  for k, step in enumerate(LINES):
    assert TASK.check(problem, LINES[:k], step) == RIGHT
  assert TASK.answer_of(problem, LINES) == problem.answer
  assert TASK.answer_of(problem, LINES[:3]) is None
  assert TASK.check(problem, (), "Bring two lamps.\n") == UNVERIFIED
  assert TASK.check(problem, ("Bring two lamps.\n",), "Take a tent.\n") == RIGHT
  assert TASK.check(problem, LINES[:3], "- done") == RIGHT


def test_what_an_instruction_asks_for_is_said():
  for told, first, step, said in (
    ("Number the lines like this: 1)\n", "1) A lamp\n", "1) A tent\n", "The start of the line is wrong. It must be 2)"),
    ("End each line with a period.\n", "A lamp.\n", "A tent\n", "The end of the line is wrong. It must be a period."),
    ("Use exactly 4 words in each line.\n", "Bring the old lamp\n", "A tent\n", "It must be 4 and it is 2."),
    ("Leave out the tent.\n", "The lamp\n", "A tent\n", "This must be left out. It is the tent."),
  ):
    problem = TASK.problem_of(prompt_of(told))
    assert said in TASK.explain(problem, (first,), step, "recompute")


def test_a_wrong_mark_or_ending_is_corrected_in_the_words_of_the_line():
  problem = TASK.problem_of(prompt_of("Start each line with a dash.\nEnd each line with a semicolon.\n"))
  assert TASK.correction(problem, (), "1. See a lamp there.\n") == "- See a lamp there;\n"
  assert TASK.correction(problem, (), "Bring no thing.\n") == problem.steps[0]


def broken(prompt, before, step):
  """The kinds of the instructions that a line breaks, from the words of the prompt; it shares no code with the task."""
  head, count, *told, _ = prompt.splitlines()
  things = head.partition("The things are ")[2].rstrip(".").replace(" and ", ", ").split(", ")
  num = int(count.split()[2])
  told = "\n".join(told)
  left_out = next((thing for thing in things if re.search(rf"(out|about) the {thing}\.", told)), None)
  wanted = [thing for thing in things if thing != left_out]
  if "alphabetical" in count:
    wanted.sort(reverse="reverse" in count)
  wanted = wanted[:num]
  line = step.rstrip("\n")
  words = [word for word in (part.strip("-*.;!)0123456789").lower() for part in line.split()) if word]
  if words == ["done"]:
    return {"repeat"} if "Done.\n" in before else set() if len(before) == num else {"count"}
  kinds, place = set(), len(before)
  seen = {word for earlier in before for word in earlier.lower().replace(".", " ").replace(";", " ").split()}
  seen = {word.strip("!\n") for word in seen}
  named = [thing for thing in things if thing in words]
  kinds |= {"exclude"} if left_out in named else set()
  kinds |= {"item"} if len(named) != 1 else set()
  kinds |= {"repeat"} if set(named) & seen else set()
  kinds |= {"count"} if place >= num else {"order"} if named != wanted[place : place + 1] else set()
  starts = {"a dash": "-", "a star": "*", "1)": f"{place + 1})", "1.": f"{place + 1}."}
  ends = {"a period": ".", "an exclamation mark": "!", "a semicolon": ";"}
  for text in told.splitlines():
    if "tart each" in text or "in front" in text or ("umber" in text and "words" not in text):
      start = next(start for name, start in starts.items() if name in text)
      kinds |= set() if line.startswith(start + " ") else {"mark"}
    elif "letters" in text:
      letters = [letter for letter in line if letter.isalpha()]
      kinds |= set() if all(letter.isupper() == ("capital" in text) for letter in letters) else {"case"}
    elif "exactly" in text:
      kinds |= set() if len(words) == int(re.search(r"\d", text)[0]) else {"words"}
    elif text.startswith(("Do not use", "Never")):
      kinds |= {"exclude"} if text.split()[-1].rstrip(".") in words else set()
    elif "the word" in text:
      asked = re.search(r"the word (\w+)", text)[1]
      kinds |= set() if asked in words else {"include"}
    elif "ach line" in text or "punctuation" in text:
      end = next((end for name, end in ends.items() if name in text and "or other" not in text), "")
      kinds |= set() if (line.endswith(end) if end else line[-1].isalpha()) else {"ending"}
  return kinds


def test_injected_lines_break_their_instruction_and_right_ones_none():
  rng, seen = np.random.default_rng(0), collections.Counter()
  problems = tasks.problems(ALL, "train", num=120, seed=0)
  for problem in problems:
    assert ALL.problem_of(problem.prompt) == problem
    assert ALL.answer_of(problem, problem.steps) == problem.answer
    assert ALL.next_step(problem, problem.steps) is None
    for place, step in enumerate(problem.steps):
      before = problem.steps[:place]
      assert not broken(problem.prompt, before, step), (problem.prompt, before, step)
      assert ALL.check(problem, before, step) == RIGHT
      assert ALL.next_step(problem, before) == step
      for error in ALL.error_classes:
        if found := wrong_step(problem, before, ALL, (error,), rng):
          seen[error] += 1
          assert error in broken(problem.prompt, before, found[0]), (problem.prompt, before, found)
          assert ALL.check(problem, before, ALL.correction(problem, before, found[0])) == RIGHT
          assert ALL.answer_of(problem, (*before, found[0], *problem.steps[place + 1 :])) != problem.answer
  assert min(seen[error] for error in ALL.error_classes) > 40


def test_lines_of_other_lists_are_right_just_where_no_instruction_is_broken():
  rng, found = np.random.default_rng(1), collections.Counter()
  problems = tasks.problems(TASK, "train", num=120, seed=1)
  for problem in problems:
    place = int(rng.integers(len(problem.steps) - 1))
    line = problem.steps[place].replace(problem.facts.wanted[place], "THING")
    for other in problems:
      where = min(place, len(other.facts.wanted) - 1)
      step = line.replace("THING", other.facts.wanted[where])
      if problem.facts.wanted[place].upper() in line:
        continue
      kinds = broken(other.prompt, other.steps[:where], step)
      assert (TASK.check(other, other.steps[:where], step) == RIGHT) == (not kinds), (other.prompt, step, kinds)
      found[not kinds] += 1
  assert min(found.values()) > 1_000


def test_no_set_of_instructions_is_in_two_splits():
  keys = collections.defaultdict(set)
  for split in ("train", "mine", "validation", "probe", "test"):
    for problem in tasks.problems(TASK, split, num=60, seed=0):
      keys[split].add(problem.key)
      assert TASK.structure(problem) == problem.key
    assert len(keys[split]) > 30
  assert len(set.union(*keys.values())) == sum(map(len, keys.values()))
  other_things = TASK.problem_of(prompt_of("Leave out the tent.\n").replace("lamp", "drum").replace("tent", "cup"))
  assert other_things.key == TASK.problem_of(prompt_of("Leave out the tent.\n")).key
  told = {"Use exactly 5 words in each line.\n", "Each line must have exactly 5 words.\n"}
  assert len({TASK.problem_of(prompt_of(text)).key for text in told}) == 1


def test_words_of_a_line_neither_begin_like_a_thing_nor_are_asked_for_by_chance():
  words = instructions_words
  texts = (*words.DETERMINERS, *words.ADJECTIVES, *sum(words.TAILS.values(), ()), *sum(words.TOPICS.values(), ()))
  used = {word.lower() for text in texts for word in text.split()} | {words.PLEASE, words.CLOSING.lower()}
  assert not [(word, thing) for word in used for thing in words.THINGS if word.startswith(thing)]
  assert not [pair for pair in itertools.permutations(words.THINGS, 2) if pair[0].startswith(pair[1])]
  verbs = {verb.lower() for verbs in words.TOPICS.values() for verb in verbs}
  assert verbs.isdisjoint({*words.WORDINGS["include"], *words.WORDINGS["exclude"]})
  texts = [text for values in words.WORDINGS.values() for told in values.values() for text in told]
  assert len(set(texts)) == len(texts)


def test_eight_instructions_are_the_most():
  assert len(instructions.KINDS) == 8
  with pytest.raises(tasks.InputError, match=r"task\.max_size=9"):
    tasks.get(TaskConfig(name="instructions", min_size=1, max_size=9))

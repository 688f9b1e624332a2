"""Grounded answers: every verdict by an example, every wording, and the text read a second time by brute force."""

import collections
import itertools
import re

import numpy as np
import pytest

from insec_jax.config import TaskConfig
from insec_jax.method import tasks
from insec_jax.method.mistakes import wrong_step
from insec_jax.method.tasks import RIGHT, UNVERIFIED, grounded_words
from insec_jax.method.tasks.grounded_text import KIND, POOLS

TASK = tasks.get(TaskConfig(name="grounded", min_size=1, max_size=3))
PROBLEM = TASK.problem_of(
  "Text: Adra taught Jorun. Hollin lies in Lodria. Velden is in Casteria. Adra was born in Hollin. Selwa is the "
  "teacher of Nerok. Adra lives in Velden. The Raven Mill belongs to Nerok. Selwa has a home in Hollin. The Raven "
  "Mill was opened in 1874.\nQuestion: In which town does the teacher of Jorun live?\n"
)
TEACHER, HOME, BOTH, ANSWER = STEPS = (
  "The teacher of Jorun is Adra.\n",
  "Adra lives in Velden.\n",
  "So the teacher of Jorun lives in Velden.\n",
  "The answer is Velden.\n",
)
RELATIONS = {relation.name: relation for relation in grounded_words.RELATIONS}


def made(split, num, *, fewest=1, most=3):
  task = tasks.get(TaskConfig(name="grounded", min_size=fewest, max_size=most))
  return tasks.problems(task, split, num=num, seed=0)


def test_the_solution_is_the_facts_what_they_lead_to_and_the_answer():
  assert (PROBLEM.steps, PROBLEM.answer) == (STEPS, "Velden")


@pytest.mark.parametrize(
  ("num", "step", "error", "reason"),
  [
    (0, "The teacher of Jorun is Selwa.\n", "entity", "The text does not say this. It is Adra."),
    (1, "Adra lives in Hollin.\n", "relation", "The text says something else about these two. It is Velden."),
    (1, "Nerok lives in Velden.\n", "unsaid", "Next comes the town where Adra lives."),
    (1, "Adra lives in Lodria.\n", "entity", "It is Velden."),
    (1, "Adra lives in Karsted.\n", "invented", "The text has no such name. It is Velden."),
    (1, "Springfield is the birthplace of Adra.\n", "invented", "It is Hollin."),
    (0, "Adra was taught by Jorun.\n", "turned", "It is the other way round."),
    (2, "So Jorun's teacher lives in Hollin.\n", "joined", "These facts do not lead here. It is Velden."),
    (2, "The mayor of Velden lives in Hollin.\n", "joined", "Next comes the town where the teacher of Jorun lives."),
    (2, "The Raven Mill was opened in 1875.\n", "invented", "It is 1874."),
    (2, "Adra has a home in Velden.\n", "repeat", "Next comes the town where the teacher of Jorun lives."),
    (3, "The answer is Hollin.\n", "answer", "This is not the answer. Next comes the answer."),
    (3, "So the answer is Springfield.\n", "answer", "Next comes the answer."),
    (4, ANSWER, "repeat", "This was said before."),
    (0, "Velden.\n", "malformed", "Next comes the teacher of Jorun."),
    (0, "The teacher of Jorun is Adra\n", "malformed", "This line cannot be read."),
  ],
)
def test_a_wrong_statement_is_of_this_class_and_its_correction_is_right(num, step, error, reason):
  before = STEPS[:num]
  verdict = TASK.check(PROBLEM, before, step)
  assert (verdict.kind, verdict.error) == ("wrong", error)
  label, recompute = (TASK.explain(PROBLEM, before, step, detail) for detail in ("label", "recompute"))
  assert recompute.startswith(label)
  assert reason in recompute
  if num < 4:
    assert TASK.check(PROBLEM, before, TASK.correction(PROBLEM, before, step)) == RIGHT


@pytest.mark.parametrize(
  ("num", "step", "verdict"),
  [
    (0, "Jorun's teacher is Adra.\n", RIGHT),
    (0, "According to the text, Adra taught Jorun.", RIGHT),  # a chat template may cut the last line end
    (0, HOME, RIGHT),
    (1, "So, Adra has a home in the town of Velden.\n", RIGHT),
    (1, BOTH, RIGHT),
    (0, "The home of the person Adra is in Velden.\n", UNVERIFIED),
    (0, "Adra lives in Casteria.\n", UNVERIFIED),  # true of the province of the town
    (0, "The Raven Mill is owned by Nerok.\n", UNVERIFIED),  # not needed
    (0, "She lives in Velden.\n", UNVERIFIED),
    (0, "Nobody taught Selwa.\n", UNVERIFIED),
    (0, "Adra Smith lives in Velden.\n", UNVERIFIED),
    (0, "The mill was opened in 1874 by Nerok.\n", UNVERIFIED),
    (0, ANSWER, UNVERIFIED),  # by chance, or in the head
    (3, "The answer is the home of Adra.\n", UNVERIFIED),
    (3, "So the answer is the town of Velden.\n", RIGHT),
    (3, "The answer is that Adra lives in Velden.\n", UNVERIFIED),
  ],
)
def test_a_statement_that_is_not_wrong_is_right_where_the_question_needs_it(num, step, verdict):
  assert TASK.check(PROBLEM, STEPS[:num], step) == verdict


def supported(problem):
  """Every sentence that the text supports, by trying all words for all entities; it shares no code with the parser."""
  objects = problem.facts.objects
  names = {*objects.values(), *(subject for _, subject in objects)}
  called = {name: {f"the {name}" if KIND[name] == "B" else name} for name in names}
  for _ in range(3):  # named through up to three facts
    for (relation, subject), object_ in objects.items():
      for phrase, words in itertools.product(RELATIONS[relation].phrases[:1], tuple(called[subject])):
        if words.count(" of ") + words.count(" where ") + words.count(" year ") < 3:
          called[object_].add(phrase.format(s=words))
  for (relation, subject), object_ in objects.items():
    held = {object_}
    if RELATIONS[relation].object == "T" and ("province", object_) in objects:
      held.add(objects["province", object_])
    for form, words, one in itertools.product(RELATIONS[relation].forms, called[subject], held):
      for other in called[one]:
        text = form.format(s=words, o=other)
        yield text[0].lower() + text[1:]


def bare(step):
  text = step.strip().removeprefix("So ")
  return text[0].lower() + text[1:]


def test_injected_mistakes_are_no_sentence_that_the_text_supports():
  rng, seen = np.random.default_rng(0), collections.Counter()
  for problem in made("train", 150):
    right = set(supported(problem))
    assert {bare(step) for step in problem.steps[:-1]} <= right
    for place in range(len(problem.steps)):
      before = problem.steps[:place]
      for error in TASK.error_classes:
        found = wrong_step(problem, before, TASK, (error,), rng)
        if found is None:
          continue
        seen[error] += 1
        if error == "repeat":
          assert found[0] in before
        elif error == "answer":
          assert found[0].strip() != problem.steps[-1].strip()
          assert found[0].startswith("The answer is ")
        else:
          assert bare(found[0]) not in right
          strange = set(re.findall(r"[A-Z]\w*|\d+", found[0][1:])) - set(re.findall(r"\w+", problem.prompt))
          assert not strange or error == "invented"
        assert TASK.check(problem, before, TASK.correction(problem, before, found[0])) == RIGHT
  assert min(seen[error] for error in TASK.error_classes) > 40


def test_no_sentence_that_the_text_supports_is_wrong():
  kinds = collections.Counter()
  for problem in made("train", 200):
    assert TASK.problem_of(problem.prompt) == problem
    sentences = sorted(supported(problem))
    for sentence in sentences[:: max(1, len(sentences) // 60)]:
      verdict = TASK.check(problem, (), sentence[0].upper() + sentence[1:] + "\n")
      assert verdict in (RIGHT, UNVERIFIED), (problem.prompt, sentence)
      kinds[verdict.kind] += 1
    for place, step in enumerate(problem.steps):
      assert TASK.check(problem, problem.steps[:place], step) == RIGHT
      assert TASK.next_step(problem, problem.steps[:place]) == step
    assert TASK.answer_of(problem, problem.steps) == problem.answer
    assert TASK.next_step(problem, problem.steps) is None
  assert min(kinds["right"], kinds["unverified"]) > 500


def renamed(problem, rng):
  """The prompt with other names of each kind and its sentences in another order."""
  text, question = problem.prompt.removesuffix("\n").split("\n")
  text = " ".join(rng.permutation(re.findall(r"[^.]+\.", text.removeprefix("Text: "))).tolist()).replace("  ", " ")
  prompt = f"Text: {text.strip()}\n{question}\n"
  new = {}
  for kind in "PTRY":
    names = [name for name in problem.facts.names if KIND[name] == kind]
    new |= dict(zip(names, rng.permutation([one for one in POOLS[kind] if one not in names]).tolist(), strict=False))
  return re.sub(r"\w+", lambda match: new.get(match[0], match[0]), prompt)


def test_renamed_and_reordered_texts_fall_in_one_split_and_splits_share_no_structure():
  rng, keys = np.random.default_rng(0), collections.defaultdict(set)
  for split in ("train", "mine", "validation", "probe", "test"):
    sizes = collections.Counter()
    for problem in made(split, 60):
      keys[split].add(problem.key)
      sizes[len(problem.facts.hops)] += 1
      copy = TASK.problem_of(renamed(problem, rng))
      assert copy.prompt != problem.prompt
      assert (copy.key, TASK.structure(copy)) == (problem.key, TASK.structure(problem))
    assert min(sizes[size] for size in (1, 2, 3)) > 8
    assert len(keys[split]) > 30
  assert len(set.union(*keys.values())) == sum(map(len, keys.values()))


def test_a_name_is_of_one_kind_and_no_common_word():
  names = [name for pool in POOLS.values() for name in pool]
  assert len(set(names)) == len(names)
  assert not set(names) & set(grounded_words.NO_NAMES)
  assert not {*grounded_words.PEOPLE, *grounded_words.TOWNS, *grounded_words.PROVINCES} & {
    *grounded_words.BUILDINGS,
    *grounded_words.BUILDING_NAMES,
  }


def test_four_facts_are_the_most():
  assert max(len(problem.facts.hops) for problem in made("train", 20, fewest=4, most=4)) == 4
  with pytest.raises(tasks.InputError, match=r"task\.max_size=5"):
    made("train", 1, fewest=5, most=5)

"""Wrong steps in prose: different in content from what they replace, and said nowhere in the record."""

import collections

import numpy as np
import pytest

from insec_jax.method.prose import CLASSES, Corpus, Corruption, ProseRecord, content_of, explain
from insec_jax.method.transcript import split_steps

NAMES = ["Anna", "Bela", "Carl", "Dora", "Emil", "Fritz", "Gustav", "Hanna"]
TRADES = ["brewing", "weaving", "printing", "smithing", "milling", "tanning", "bakery", "fishing"]


def text(answer, prompt="What happened?\n", unit="sentence"):
  return ProseRecord(prompt, split_steps(answer, unit), follows_text=bool(prompt))


def town(k):
  """A record whose middle step offers a number, a name and a place for a negation."""
  name, trade = NAMES[k], TRADES[k]
  return text(
    f"Long ago {name} learned {trade} with {NAMES[k - 1]}. In all {name} was paid {120 + k} coins. "
    f"So {trade} made a living.",
    prompt=f"How did {name} live?\n",
  )


def drawn(texts, place, error, num=60, index=0):
  """What comes in place of one step, drawn many times."""
  corpus, rng = Corpus(texts), np.random.default_rng(0)
  return [corpus.corrupt(index, place, error, rng) for _ in range(num)]


def steps_of(texts, place, error, **more):
  """The different wrong steps; {None} where there is none."""
  return {found and found.step for found in drawn(texts, place, error, **more)}


@pytest.mark.parametrize("error", CLASSES)
def test_a_wrong_step_differs_in_content_and_stands_nowhere_in_the_record(error):
  texts = [town(k) for k in range(8)]
  corpus, rng = Corpus(texts), np.random.default_rng(0)
  seen = collections.Counter()
  for index in range(8):
    said = content_of(texts[index].prompt + "".join(texts[index].steps))
    for _ in range(20):
      found = corpus.corrupt(index, 1, error, rng)
      assert content_of(found.step) != content_of(texts[index].steps[1])
      assert content_of(found.step) not in said
      assert split_steps(found.step, "sentence") == (found.step,)
      assert found.step.endswith(" ")
      assert not found.step[0].isspace()
      assert found.error == error
      seen[found.step] += 1
  assert len(seen) >= 8


def test_the_next_sentence_comes_from_another_record():
  texts = [town(k) for k in range(8)]
  others = {step.strip() for other in texts[1:] for step in other.steps}
  found = {step.strip() for step in steps_of(texts, 1, "sentence")}
  assert found <= others
  assert len(found) > 5


@pytest.mark.parametrize(
  ("why", "donor"),
  [
    ("it stands in this record", text("He PAID, 5 coins!", prompt="Who?")),
    ("its words all stand in this record", text("Rivers paid coins.", prompt="Who?")),
    ("the same was asked", text("Eagles circled overhead.")),
    (
      "it is of two sentences, of which one stands in this record",
      ProseRecord("Who?", ("Eagles circled overhead. He paid 5 coins.",), follows_text=True),
    ),
    ("nothing in it says what it is about", text("So it is. 3 + 4 = 7.", prompt="Who?")),
  ],
)
def test_a_sentence_from_elsewhere_is_refused_when(why, donor):
  own = text("Rivers froze. He paid 5 coins. He left.")
  assert steps_of([own, donor], 1, "sentence") == {None}, why
  foreign = text("Eagles circled overhead.", prompt="Who?")
  assert steps_of([own, foreign], 1, "sentence") == {"Eagles circled overhead. "}


def test_a_sentence_that_many_records_hold_may_fit_everywhere_and_is_refused():
  own = text("Rivers froze. He paid 5 coins. He left.")
  phrase = [text("Let us think carefully.", prompt="Who?"), text("Let us  think carefully!", prompt="When?")]
  assert steps_of([own, *phrase], 1, "sentence") == {None}


def test_a_changed_number_has_another_value_and_is_written_alike():
  found = drawn([text("Wait. The bridge cost 1,250 coins.")], 1, "number", num=200)
  values = {int(one.wrong.replace(",", "")) for one in found}
  assert 1250 not in values
  assert len(values) > 5
  assert all(one.step == f"The bridge cost {one.wrong} coins." and one.right == "1,250" for one in found)
  assert all("," in one.wrong for one in found if int(one.wrong.replace(",", "")) >= 1000)


@pytest.mark.parametrize(
  "step",
  [
    "It needs at least 3 coins.",
    "About 30 came.",
    "The 3rd house burned.",
    "H2O boiled away.",
    "Release 1.2.3 is out.",
    "Is it 5 coins?",
    "For example, 3 works.",
    "See page 12.",
    "Step 4: pay.",
    "1) Pay them.",
    "Agent 007 came.",
    "If 3 came, fine.",
    "3 is odd.",
  ],
)
def test_a_number_that_another_may_stand_for_as_well_is_left(step):
  assert steps_of([text(f"Wait. {step}")], len(split_steps(f"Wait. {step}", "sentence")) - 1, "number") == {None}


def test_an_equation_that_still_holds_is_no_mistake():
  found = steps_of([text("Wait. So 3 * 0 = 0. Bye.")], 1, "number", num=200)
  assert len(found) > 3
  assert all(step.startswith("So 3 * ") for step in found)  # any number times 0 is 0


def test_a_changed_number_is_refused_where_the_record_says_just_that():
  own = text("Wait. He paid 12 coins. He then paid 11 coins. He paid 13 coins. He paid 2 coins. He paid 22 coins.")
  found = steps_of([own], 1, "number", num=200)
  assert not found & {f"He paid {number} coins. " for number in (12, 13, 2, 22)}
  assert "He paid 11 coins. " in found  # "then" makes it another sentence


def test_a_name_gives_way_to_one_beside_which_it_stands_or_to_a_foreign_one():
  own = text("We saw Anna with Bela there. Then came Anna. All left.")
  other = text("We met Carl. Later on came Dora.", prompt="Who?")
  assert steps_of([own, other], 1, "entity") == {"Then came Bela. "}
  alone = text("We saw Anna there. Then came Anna. All left.")
  assert steps_of([alone, other], 1, "entity") == {"Then came Carl. ", "Then came Dora. "}
  quoted = text('We read "Faust" twice. Then "Faust" was lost. All left.')
  assert steps_of([quoted, text('We sang "Tosca" there.', prompt="Who?")], 1, "entity") == {'Then "Tosca" was lost. '}


@pytest.mark.parametrize(
  ("first", "name"),
  [
    ("We saw Robert, known as Bob, there", "Robert"),
    ("We saw Bobby with Bob there", "Bobby"),
    ("We saw Anna, Queen there", "Anna"),
    ("We saw Anna Lee and Ms Lee there", "Anna Lee"),
    ("We flew from the United States with US pilots", "United States"),
    ("We saw that Clark is Superman there", "Clark"),
  ],
)
def test_a_name_that_may_mean_the_same_is_no_mistake(first, name):
  assert steps_of([text(f"{first}. Then came {name}. All left.")], 1, "entity") == {None}


@pytest.mark.parametrize(
  ("name", "foreign"), [("Robert", "Rob"), ("United States", "US"), ("Anna Lee", "Ms Lee"), ("Anna", "Anna")]
)
def test_a_foreign_name_that_may_mean_the_same_is_no_mistake(name, foreign):
  own = text(f"We saw trees. Then came {name}. All left.")
  assert steps_of([own, text(f"We saw {foreign} there.", prompt="Who?")], 1, "entity") == {None}


def test_a_line_from_elsewhere_that_repeats_the_right_one_is_refused():
  own = ProseRecord("What?", ("Rivers froze.\n", "He paid 5 coins.\n"), follows_text=True)
  donor = ProseRecord("Who?", ("Eagles circled overhead. He paid 5 coins.\n",), follows_text=True)
  assert steps_of([own, donor], 1, "sentence") == {None}


def test_a_capital_that_begins_a_sentence_makes_no_name():
  other = text("We saw Emil there.", prompt="Who?")
  assert steps_of([text("We saw trees. Then Rivers froze. All left."), other], 1, "entity") == {"Then Emil froze. "}
  assert steps_of([text("We saw rivers. Then Rivers froze. All left."), other], 1, "entity") == {None}
  assert steps_of([text("We saw trees. Rivers froze. All left."), other], 1, "entity") == {None}


@pytest.mark.parametrize(
  ("right", "wrong"),
  [
    ("The bridge is open.", "The bridge is not open."),
    ("It was not cold.", "It was cold."),
    ("He can swim.", "He cannot swim."),
    ("He cannot swim.", "He can swim."),
    ("They won't come.", "They will come."),
    ("He can't swim.", "He can swim."),
    ("She didn't pay.", "She did pay."),
    ("It does not work.", "It does work."),
  ],
)
def test_a_negation_is_put_in_or_taken_out(right, wrong):
  assert steps_of([text(f"Wait. {right} Bye.")], 1, "negation") == {f"{wrong} "}


@pytest.mark.parametrize(
  "step",
  [
    "It may be open.",
    "Some doors are open.",
    "Why is it open?",
    "If it is open, go.",
    "It is not without risk.",
    "It is open or shut.",
    "The can rusted.",
    "He paid.",
    "It is never open.",
    "He doesn't pay any rent.",
    "As it is, go.",
    "Always do not do it.",
  ],
)
def test_a_negation_that_may_hold_as_well_is_left(step):
  assert steps_of([text(f"Wait. {step} Bye.")], 1, "negation") == {None}


def test_a_negation_is_refused_where_the_record_says_just_that():
  assert steps_of([text("Wait. The door is open. Later the door is not open.")], 1, "negation") == {None}


@pytest.mark.parametrize("unit", ["line", "paragraph"])
@pytest.mark.parametrize("error", CLASSES)
def test_steps_may_be_lines_and_paragraphs(unit, error):
  gap = "\n" if unit == "line" else "\n\n"
  texts = [
    ProseRecord("", split_steps(f"Hear this.{gap}{''.join(town(k).steps)}{gap}The end{k}.", unit), follows_text=False)
    for k in range(8)
  ]
  wrong = [found for found in drawn(texts, 1, error) if found]
  assert wrong
  for found in wrong:
    assert split_steps(found.step, unit) == (found.step,)
    assert found.step.endswith(f".{gap}" if found.step.strip()[-1] == "." else gap)
    assert content_of(found.step) != content_of(texts[0].steps[1])


@pytest.mark.parametrize(
  ("error", "label", "recompute"),
  [
    ("number", "A number is wrong.", 'It should say "12", not "13".'),
    ("entity", "A name is wrong.", 'It should say "12", not "13".'),
    ("negation", "The opposite is true.", 'It should say "12", not "13".'),
  ],
)
def test_reasons_name_what_is_wrong_and_put_it_right(error, label, recompute):
  found = Corruption("13", error, "12", "13")
  assert explain(found, "label") == label
  assert explain(found, "recompute") == recompute


def test_a_sentence_from_elsewhere_has_nothing_to_recompute():
  found = Corruption("Eagles circled.", "sentence", "", "")
  assert explain(found, "label") == explain(found, "recompute") == "This does not belong here."


def test_spacing_case_and_punctuation_are_no_content_and_the_value_of_a_number_is():
  assert content_of("He paid  1,000 coins!") == content_of("he paid 1000.0 COINS")
  assert content_of("He paid 1000 coins") != content_of("He paid 100 coins")

"""Words of the task english: names, things, and templates of sentences, of questions and of steps.

A step is written {words} {x} {sign} {y} = {result} {noun}. Letters in braces: A, B and C are names, n a number, things
the nouns that are counted.
"""

from typing import NamedTuple

NAMES = (
  *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Maria", "Noah"),
  *("Olivia", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Zoe"),
)
THINGS = (
  *("apples", "balloons", "beads", "books", "buttons", "candles", "coins", "cookies", "cups", "eggs", "flowers"),
  *("marbles", "muffins", "oranges", "pears", "pencils", "shells", "stamps", "stickers", "stones", "toys"),
)
STARTS = (
  "{A} has {n} {things}.",
  "{A} starts the day with {n} {things}.",
  "There are {n} {things} in {A}'s bag.",
  "{A} owns {n} {things}.",
  "On Monday, {A} has {n} {things}.",
)


class Event(NamedTuple):
  """An operation: the sentence of the prompt, the sign, the words of its step, and the question where it must be last.

  `noun` of the result is empty where it is that of the things.
  """

  sentence: str
  sign: str
  words: str
  question: str = ""
  noun: str = ""


CHANGES = (
  Event("{A} buys {n} more {things}.", "+", "After buying more, {A} has"),
  Event("{A} finds {n} {things} in a box.", "+", "After finding some, {A} has"),
  Event("{C} gives {A} {n} {things}.", "+", "With those from {C}, {A} has"),
  Event("{A} wins {n} {things} at a fair.", "+", "After the fair, {A} has"),
  Event("{A} gets {n} more {things} from a neighbor.", "+", "After the visit, {A} has"),
  Event("{A} collects another {n} {things}.", "+", "After collecting more, {A} has"),
  Event("{A} gives {n} {things} to {C}.", "-", "After giving some to {C}, {A} has"),
  Event("{A} sells {n} of the {things}.", "-", "After selling some, {A} has"),
  Event("{A} loses {n} {things} on the way.", "-", "After losing some, {A} has"),
  Event("{A} leaves {n} {things} at school.", "-", "Without those at school, {A} has"),
  Event("{A} puts {n} of the {things} away.", "-", "After putting some away, {A} has"),
  Event("{A} trades {n} {things} for a hat.", "-", "After the trade, {A} has"),
  Event("{A} goes to the market and comes back with {n} times as many {things}.", "*", "After the market, {A} has"),
)
# {B} is new; what follows is about {B}.
COMPARISONS = (
  Event("{B} has {n} more {things} than {A}.", "+", "{B} has"),
  Event("{B} has {n} fewer {things} than {A}.", "-", "{B} has"),
  Event("{B} has {n} times as many {things} as {A}.", "*", "{B} has"),
  Event("{A} has {n} times as many {things} as {B}.", "/", "{B} has"),
)
LASTS = (
  Event(
    "{A} shares the {things} equally among {n} friends.", "/", "Each friend gets", "How many {things} does each get?"
  ),
  Event("{A} packs the {things} into bags of {n}.", "/", "{A} fills", "How many bags does {A} fill?", "bags"),
  Event("Each of the {things} costs {n} dollars.", "*", "All of them cost", "How many dollars do all cost?", "dollars"),
  Event("{A} needs {n} minutes for each.", "*", "All of them take", "How many minutes do they take?", "minutes"),
)
# Of {A} before a comparison and of {B} at the end; it has no number of its own.
TOGETHER = Event("", "+", "Together, {A} and {B} have", "How many {things} do {A} and {B} have together?")
QUESTIONS = (
  "How many {things} does {A} have now?",
  "How many {things} does {A} have in the end?",
  "What is the number of {things} that {A} has now?",
)
DISTRACTORS = (
  "{C} has {n} {others}.",
  "{A} also has {n} {others}.",
  "It takes {A} {n} minutes to walk home.",
  "{A} is {n} years old.",
  "{C} reads {n} pages of a book.",
  "There are {n} people in the shop.",
)
ANSWER = "The answer is {}.\n"

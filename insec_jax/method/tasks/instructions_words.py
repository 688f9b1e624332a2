"""Words of the task instructions: lists with their verbs, things, the words of a line, and every instruction as worded.

A line is {please} verb determiner {adjectives} thing {tail}.
"""

from typing import NamedTuple

TOPICS = {
  "Write a packing list.": ("Bring", "Carry", "Get", "Pack", "Take"),
  "Write a shopping list.": ("Buy", "Find", "Get", "Order", "Pick"),
  "Write a list of jobs.": ("Check", "Clean", "Fix", "Move", "Paint"),
  "Write a list of things to look for.": ("Find", "Notice", "Seek", "Spot", "Watch"),
}
THINGS = (
  *("basket", "blanket", "bottle", "broom", "bucket", "camera", "candle", "chair", "clock", "coat", "cup", "drum"),
  *("fan", "guitar", "hammer", "jacket", "kettle", "ladder", "lamp", "map", "mirror", "needle", "pan", "pillow"),
  *("radio", "rope", "rug", "scarf", "shovel", "stove", "table", "tent", "towel", "umbrella", "vase", "whistle"),
)
DETERMINERS = ("her", "my", "our", "the", "your")
ADJECTIVES = ("big", "blue", "cheap", "green", "heavy", "new", "old", "red", "small", "yellow")
ADVERBS = ("carefully", "first", "quickly", "soon", "today", "tomorrow", "tonight")
TAILS = {  # by number of words
  0: ("",),
  1: ADVERBS,
  2: ("at home", "at noon", "for school", "next week", "right away", "this week"),
  3: ("after the meal", "before the trip", "for a friend", "in the morning", "on the way", "with some help"),
  4: ("as soon as possible", "before the shops close", "in front of everyone", "later in the day"),
}
PLEASE = "please"
FEWEST_WORDS = 3  # verb, determiner, thing
NUMS = range(4, 8)  # words of a line that may be asked for
MARKS = {"-": "a dash", "*": "a star"}
NUMBERED = ("1)", "1.")
ENDINGS = {".": "a period", "!": "an exclamation mark", ";": "a semicolon"}
CASES = {"lower": "small", "upper": "capital"}
ORDERS = {
  "given": "in this order",
  "alphabetical": "in alphabetical order",
  "reversed": "in reverse alphabetical order",
}
CLOSING = "Done"
_INCLUDED = (*ADJECTIVES, *ADVERBS, "her", "my", "our", PLEASE)
_EXCLUDED = (*ADJECTIVES, *ADVERBS, "my", "the", "your", PLEASE)


class Rule(NamedTuple):
  """An instruction: its kind, which is the class of a line that breaks it, and what it asks for."""

  kind: str
  value: str


# Every wording of the instructions that are about each line. That of the order is part of the number of lines.
WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
  "words": {
    str(num): (f"Use exactly {num} words in each line.", f"Each line must have exactly {num} words.") for num in NUMS
  },
  "mark": {
    **{mark: (f"Start each line with {name}.", f"Put {name} in front of each line.") for mark, name in MARKS.items()},
    **{mark: (f"Number the lines like this: {mark}", f"Number each line, the first with {mark}") for mark in NUMBERED},
  },
  "ending": {
    **{
      mark: (f"End each line with {name}.", f"The last sign of each line is {name}.") for mark, name in ENDINGS.items()
    },
    "": ("Write no punctuation at the end of a line.", "End each line without a period or other sign."),
  },
  "case": {
    name: (f"Write the lines in {letters} letters.", f"Use only {letters} letters.") for name, letters in CASES.items()
  },
  "include": {
    word: (f"Use the word {word} in each line.", f"Each line must have the word {word}.") for word in _INCLUDED
  },
  "exclude": {word: (f"Do not use the word {word}.", f"Never write the word {word}.") for word in _EXCLUDED},
  "skip": {thing: (f"Leave out the {thing}.", f"Do not write about the {thing}.") for thing in THINGS},
}

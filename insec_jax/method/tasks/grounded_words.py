"""Words of the task grounded: made-up names, and the relations with every wording of their statements.

Kinds of entities: P person, T town, R province, B building, Y year. In a wording, s is the subject and o the object.
"""

from typing import NamedTuple

PEOPLE = (
  *("Adra", "Belmo", "Cirel", "Davik", "Eskor", "Fenna", "Gorlan", "Hesta", "Ilvar", "Jorun", "Keldo", "Lomira"),
  *("Maveth", "Nerok", "Odila", "Pelan", "Quenda", "Rusko", "Selwa", "Tarnik", "Ulmara", "Vesko", "Wilba", "Yorin"),
  *("Zelmo", "Arvina", "Brodan", "Corvel", "Dulma", "Ekrin"),
)
TOWNS = (
  *("Aldmoor", "Brenwick", "Corvale", "Dunmere", "Elstow", "Farholm", "Grenby", "Hollin", "Ironby", "Karsted"),
  *("Lunford", "Marwick", "Norvale", "Ostley", "Penholm", "Quarrel", "Redmoor", "Saltby", "Torvik", "Underby"),
  *("Velden", "Westrow", "Yarrow", "Zandor"),
)
PROVINCES = (
  *("Aremia", "Boldavia", "Casteria", "Drelia", "Estoria", "Felmark", "Galdia", "Hestmark", "Ilmaria", "Jastria"),
  *("Kelmark", "Lodria"),
)
BUILDING_NAMES = (
  *("Amber", "Birch", "Copper", "Falcon", "Garnet", "Harbor", "Ivory", "Lantern", "Maple", "Otter", "Raven", "Silver"),
)
BUILDINGS = ("Bridge", "Chapel", "Inn", "Library", "Mill", "Theater", "Tower")
FIRST_YEAR, LAST_YEAR = 1700, 1990


class Relation(NamedTuple):
  """What a statement says: each subject has one object. Of `forms` and `phrases` the first is that of a solution.

  A phrase names the object through the subject.
  """

  name: str
  subject: str
  object: str
  forms: tuple[str, ...]
  phrases: tuple[str, ...]
  questions: tuple[str, ...]


def _of_person(name: str, *more: str, question: tuple[str, ...] = ()) -> Relation:
  """Return a relation between two persons."""
  forms = (f"The {name} of {{s}} is {{o}}.", f"{{o}} is the {name} of {{s}}.", f"{{s}}'s {name} is {{o}}.", *more)
  phrases = (f"the {name} of {{s}}", f"{{s}}'s {name}")
  return Relation(name, "P", "P", forms, phrases, (f"Who is the {name} of {{s}}?", *question))


RELATIONS = (
  _of_person("teacher", "{o} taught {s}.", "{s} was taught by {o}.", question=("Who taught {s}?",)),
  _of_person("aunt"),
  _of_person("doctor"),
  Relation(
    "home",
    "P",
    "T",
    ("{s} lives in {o}.", "{s} has a home in {o}.", "The home of {s} is in {o}."),
    ("the town where {s} lives", "the home of {s}", "the home town of {s}", "{s}'s home town"),
    ("In which town does {s} live?",),
  ),
  Relation(
    "birthplace",
    "P",
    "T",
    ("{s} was born in {o}.", "The birthplace of {s} is {o}.", "{o} is the birthplace of {s}."),
    ("the birthplace of {s}", "the town where {s} was born", "{s}'s birthplace"),
    ("In which town was {s} born?", "What is the birthplace of {s}?"),
  ),
  Relation(
    "birth year",
    "P",
    "Y",
    ("{s} was born in {o}.", "The birth year of {s} is {o}."),
    ("the birth year of {s}", "the year when {s} was born"),
    ("In which year was {s} born?",),
  ),
  Relation(
    "workplace",
    "P",
    "B",
    ("{s} works at {o}.", "{s} has a job at {o}.", "The workplace of {s} is {o}.", "{o} is the workplace of {s}."),
    ("the workplace of {s}", "the place where {s} works", "the building where {s} works", "{s}'s workplace"),
    ("What is the workplace of {s}?", "In which building does {s} work?"),
  ),
  Relation(
    "place",
    "B",
    "T",
    ("{s} stands in {o}.", "{s} is in {o}.", "{s} is located in {o}.", "{s} can be found in {o}."),
    ("the town where {s} stands", "the town where {s} is", "the town where {s} is located"),
    ("In which town does {s} stand?", "In which town is {s}?"),
  ),
  Relation(
    "owner",
    "B",
    "P",
    ("{s} belongs to {o}.", "{o} owns {s}.", "The owner of {s} is {o}.", "{s} is owned by {o}."),
    ("the owner of {s}", "the person who owns {s}"),
    ("Who owns {s}?", "Who is the owner of {s}?"),
  ),
  Relation(
    "builder",
    "B",
    "P",
    ("{s} was built by {o}.", "{o} built {s}.", "The builder of {s} is {o}.", "{o} is the builder of {s}."),
    ("the builder of {s}", "the person who built {s}"),
    ("Who built {s}?", "Who is the builder of {s}?"),
  ),
  Relation(
    "opening year",
    "B",
    "Y",
    ("{s} was opened in {o}.", "{s} opened in {o}.", "The opening year of {s} is {o}."),
    ("the opening year of {s}", "the year when {s} was opened", "the year when {s} opened"),
    ("In which year was {s} opened?",),
  ),
  Relation(
    "mayor",
    "T",
    "P",
    ("The mayor of {s} is {o}.", "{o} is the mayor of {s}.", "{s} has {o} as its mayor."),
    ("the mayor of {s}", "{s}'s mayor"),
    ("Who is the mayor of {s}?",),
  ),
  Relation(
    "founder",
    "T",
    "P",
    ("{s} was founded by {o}.", "{o} founded {s}.", "The founder of {s} is {o}.", "{o} is the founder of {s}."),
    ("the founder of {s}", "the person who founded {s}"),
    ("Who founded {s}?", "Who is the founder of {s}?"),
  ),
  Relation(
    "province",
    "T",
    "R",
    ("{s} lies in {o}.", "{s} is a town in {o}.", "{s} is in {o}.", "{s} is located in {o}."),
    ("the province of {s}", "the province where {s} lies"),
    ("In which province is {s}?", "In which province does {s} lie?"),
  ),
)
OPENERS = (
  *("So, ", "So ", "Therefore, ", "Thus, ", "Hence, ", "Then ", "Also, ", "And ", "But ", "Here, "),
  *("The text says that ", "The text says: ", "According to the text, ", "We know that "),
)
TITLES = ("the town of ", "the city of ", "the village of ", "the province of ", "the region of ", "the year ")
# Words that may begin a sentence and are no names.
NO_NAMES = (
  *("He", "She", "It", "They", "We", "You", "I", "This", "That", "These", "Those", "There", "Here", "One"),
  *("Who", "What", "Which", "Where", "When", "How", "Someone", "Somebody", "People", "Both", "His", "Her"),
  *("Its", "Their", "My", "Your", "Our", "The", "A", "An", "In", "On", "At", "From", "By", "To", "Of", "As"),
  *("If", "Since", "Because", "And", "But", "Or", "So", "Then", "Thus", "Therefore", "Hence", "Also", "Not"),
  *("Now", "Yes", "No", "Another", "Each", "Every", "All", "Some", "Any", "Only", "Even", "Mr", "Mrs", "Ms"),
  *("Dr", "Answer", "Question", "Text", "Nobody", "Everyone"),
)
ANSWER = "The answer is {}.\n"

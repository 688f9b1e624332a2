"""Arithmetic in prose: numbers, and equations that can be parsed unambiguously.

Ambiguous text is skipped: a step must never be called wrong because its wording was misunderstood.
"""

import functools
import itertools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

# Bounded: a model that repeats one digit must not produce a number that takes unbounded time.
NUMBER = re.compile(r"\d{1,3}(?:,\d{3}){1,4}(?!\d)(?:\.\d{1,12})?|\d{1,12}(?:\.\d{1,12})?|\.\d{1,12}")
MOST_CHARACTERS = 40  # more than a number and the characters that decide where it ends
_MOST_OPERATORS = 20
_MOST_TOKENS = 200  # of an expression
_TOKEN = re.compile(
  rf"""
    (?P<number>{NUMBER.pattern})
  | (?P<letter>(?<=[\d)])[^\W\d_]+(?!\s*[\d($.]))   # 5x, 5kg, 3rd: may be a variable
  | (?P<times>[xX×*∗·](?=\s*[$(]*[\d.]))
  | (?P<unit>[-/]?[^\W\d_][\w'’]*)
  | (?P<operator>[-+/÷−–])
  | (?P<open>\() | (?P<close>\)) | (?P<equal>=) | (?P<percent>%) | (?P<money>[$€£])
  | (?P<other>\S)""",
  re.VERBOSE,
)
_SIGN = str.maketrans("xX×∗·÷−–", "*****/--")
# With one of these in the text, 5 * 3 may mean 15,000, and 8.33... has no last digit.
_SCALE = re.compile(r"\b(?:(?:dozen|hundred|thousand|million|billion|cent|nickel|dime)s?|pennies)\b|¢|\.\.\.|…", re.I)
# Words that state arithmetic themselves: an equation beside one may mean something else.
_ARITHMETIC_WORDS = frozenset(
  re.findall(
    "[a-z]+",
    """
  of times twice thrice half halves third thirds fourth quarter quarters double triple percent plus minus by and to from
  divided multiplied less more than remainder a an""",
  )
)
_HARMLESS_AFTER = frozenset(("less", "more", "than", "by", "to", "from", "a", "an"))  # 90 - 80 = 10 more dollars
# An equation with two of these is skipped: 2 hours + 30 minutes = 150 minutes.
_MEASURES = frozenset(
  re.findall(
    "[a-z]+",
    """
  hour minute second day week month year foot feet inch inche yard mile pound ounce cup pint quart gallon gram kilogram
  kg liter litre ml meter metre km cm""",
  )
)


class _Left(NamedTuple):
  """The left side of an equation: its tokens, the units of measure in it, and whether its words leave a doubt."""

  tokens: list[str]
  measures: set[str]
  doubt: bool


@dataclass(frozen=True)
class Equation:
  """An equation: the left side as written and its value, the value stated on the right, and whether they agree."""

  text: str
  value: Fraction
  stated: Fraction
  holds: bool


def value_of(number: str) -> Fraction:
  """Return the value of a number as written: 1080.5 for "1,080.50"."""
  return Fraction(number.replace(",", ""))


def numbers_of(text: str) -> tuple[Fraction, ...]:
  """Return all numbers in the text, left to right; signs are ignored."""
  return tuple(value_of(number) for number in NUMBER.findall(text))


def words_of(text: str) -> str:
  """Return the text with a zero character for each number and no white space: 48/2=24 equals 48 / 2 = 24."""
  return "".join(NUMBER.sub("\0", text).split())


def show(number: Fraction) -> str:
  """Return the number in decimals: all of them when they end within four places, else rounded to two."""
  if number.denominator == 1:
    return str(number.numerator)
  exact = (number * 10_000).denominator == 1
  return f"{float(number):.4f}".rstrip("0") if exact else f"{float(number):.2f}"


def decimals(number: str) -> int:
  """Return the number of decimals written."""
  return len(number.partition(".")[2])


def written_like(number: Fraction, model: str) -> str | None:
  """Return the number formatted as `model` is, with commas where it has them.

  None unless it is positive, at most 10**9, and has few enough decimals.
  """
  most = max(decimals(model), 2 if "." in model else 0)
  places = next((k for k in range(decimals(model), most + 1) if (number * 10**k).denominator == 1), None)
  if number <= 0 or number > 10**9 or places is None:
    return None
  comma = "," if "," in model or (number >= 10_000 and "." not in model) else ""
  return f"{float(number):{comma}.{places}f}"


def slips(written: str) -> list[Fraction]:
  """Return the numbers that misreading or miscalculating the one `written` could give, in order.

  1, 2 or 10 off in the last place, one digit changed, two neighbouring digits exchanged, or ten times the number.
  """
  number, unit = value_of(written), Fraction(1, 10 ** decimals(written))
  digits = str(int(number / unit))
  near = {number + k * unit for k in (-10, -2, -1, 1, 2, 10)} | {number * 10}
  near |= {
    int(digits[:k] + str((int(digits[k]) + 1 + 3 * k) % 10) + digits[k + 1 :]) * unit for k in range(len(digits))
  }
  near |= {int(digits[:k] + digits[k + 1] + digits[k] + digits[k + 2 :]) * unit for k in range(len(digits) - 1)}
  return [value for value in sorted(near) if value not in (0, number) and written_like(value, written)]


def evaluate(expression: str | list[str]) -> Fraction | None:
  """Return the exact value of an arithmetic expression; None if it is malformed, too long, or divides by zero."""
  tokens = _split_tokens(expression) if isinstance(expression, str) else list(expression)
  if len(tokens) > _MOST_TOKENS:
    return None
  tokens.append("")
  try:
    value = _sum(tokens)
  except (ValueError, ZeroDivisionError):  # a token where a number should be; a division by zero
    return None
  return value if tokens == [""] else None


def _split_tokens(expression: str) -> list[str]:
  """Return the tokens of an expression without units."""
  return re.findall(rf"{NUMBER.pattern}|\S", expression)


def _sum(tokens: list[str]) -> Fraction:
  value = _product(tokens)
  while tokens[0] in ("+", "-"):
    value = value + _product(tokens) if tokens.pop(0) == "+" else value - _product(tokens)
  return value


def _product(tokens: list[str]) -> Fraction:
  value = _factor(tokens)
  while tokens[0] in ("*", "/"):
    value = value * _factor(tokens) if tokens.pop(0) == "*" else value / _factor(tokens)
  return value


def _factor(tokens: list[str]) -> Fraction:
  token = tokens.pop(0)
  if token in ("+", "-"):
    return _factor(tokens) if token == "+" else -_factor(tokens)
  if token == "(":
    value = _sum(tokens)
    if tokens.pop(0) != ")":
      raise ValueError("unclosed parenthesis")
    return value
  return value_of(token)


@functools.lru_cache(maxsize=4096)
def equations(text: str) -> tuple[Equation, ...]:
  """Return the equations of the text that parse unambiguously: arithmetic on the left, a number on the right.

      She bought 2 x 3 = 6 red pens. 6 + 4 = 10 / 2 = 5     2*3 = 6, 6+4 = 10 (a sum may run on) and 10/2 = 5 are read
      5x/6 = 20, half of 10 + 5 = 10, 2 hours + 30 minutes = 150 minutes, 25 / 1/3 = 75     are not

  An equation holds when the right side is the value within one unit of the last place written, under either reading
  of percent. A difference may be the other way round: 15 - 52 = 37. Where the words leave a doubt what is subtracted or
  multiplied (`_Left.doubt`), an equation that does not hold is not read.
  """
  if "=" not in text or _SCALE.search(text):
    return ()
  tokens = [
    (match.lastgroup, match.group(), match.start()) for match in _TOKEN.finditer(text) if match.lastgroup != "money"
  ]
  parsed = []
  for k, (kind, _, _) in enumerate(tokens):
    if kind == "equal":
      left, right = _left_side(text, tokens, k), _right_sides(tokens, k)
      if left and right and len(left.measures | right[1]) < 2:
        parsed += [equation for equation in _compare(left.tokens, right[0]) if equation.holds or not left.doubt]
  return tuple(parsed)


def _compare(left: list[str], rights: list[list[str]]) -> list[Equation]:
  """Return the equation where both sides have a value, else no equation."""
  right_readings = [reading for right in rights for reading in _percent_readings(right)]
  values, stated = _evaluate_all(_percent_readings(left)), _evaluate_all(right_readings)
  if not values or not stated:
    return []
  holds = any(
    value == claimed or (abs(value - claimed) < tolerance and (tolerance < 1 or value.denominator > 1))
    for value in values
    for claimed, tolerance in zip(stated, map(_tolerance, right_readings), strict=True)
  )
  # The difference of two numbers may be written the other way round.
  holds = holds or (left[1::2] == ["-"] and values[-1] == -stated[0])
  return [Equation("".join(left), values[-1], stated[0], holds)]


def _evaluate_all(readings: list[list[str]]) -> list[Fraction]:
  """Return the value of each reading; no values if one of them has none."""
  values = []
  for reading in readings:
    if (value := evaluate(reading)) is None:
      return []
    values.append(value)
  return values


def _percent_readings(tokens: list[str]) -> list[list[str]]:
  """Return the tokens with "%" left out, and with it as hundredths."""
  if "%" not in tokens:
    return [tokens]
  hundredths: list[str] = []
  for token in tokens:
    hundredths += ["(", hundredths.pop(), "/", "100", ")"] if token == "%" else [token]
  return [[token for token in tokens if token != "%"], hundredths]


def _tolerance(right: list[str]) -> Fraction:
  """Return one unit of the last place of a single number; 0 for an expression, which must match exactly."""
  number = right[-1]
  if right[:-1] not in ([], ["-"]):
    return Fraction(0)
  return Fraction(1, 10 ** decimals(number))


def _makes_doubtful(unit: str) -> bool:
  """Return whether the word makes the arithmetic beside it doubtful; one letter may be a variable."""
  unit = unit.lstrip("-/").lower()
  return len(unit) == 1 or unit in _ARITHMETIC_WORDS


def _units_of_measure(units: list[str]) -> set[str]:
  """Return the units of measure among these words."""
  stems = set(map(_stem, units))
  return {stem for stem in stems if stem in _MEASURES}


def _left_side(text: str, tokens: list[tuple], k: int) -> _Left | None:
  """Return the arithmetic that ends before the equal sign `k`; None if there is none, or it is ambiguous."""
  taken: list[str] = []
  units: list[str] = []
  of_operand: list[list[str]] = [[]]  # the words after each operand, the last one first
  depth, operand = 0, False
  i = k - 1
  while i >= 0 and len(taken) <= _MOST_TOKENS:
    kind, token, _ = tokens[i]
    if kind == "unit" and not operand:  # before a number in reading direction: it is the unit of the operand to come
      units.append(token)
      of_operand[-1].append(token)
    elif kind in ("number", "close") and not operand:
      taken.insert(0, token)
      operand = kind == "number"
      depth += kind == "close"
    elif kind == "percent" and not operand and i and tokens[i - 1][0] == "number":
      taken.insert(0, "%")
    elif kind == "open" and operand and depth:
      taken.insert(0, "(")
      depth -= 1
    elif kind in ("operator", "times") and operand:
      taken.insert(0, token.translate(_SIGN))
      of_operand.append([])
      operand = False
    else:
      break
    i -= 1
  doubtful = not operand or depth or not _is_unambiguous(taken) or any(map(_makes_doubtful, units))
  if doubtful or (i >= 0 and not _can_begin_after(text, tokens, i)):
    return None
  signs = [token for token in taken if token in ("+", "-", "*", "/")]
  return _Left(taken, _units_of_measure(units), _leaves_doubt(signs, of_operand[::-1]))


def _leaves_doubt(signs: list[str], words: list[list[str]]) -> bool:
  """Return whether words make it doubtful what is subtracted or multiplied; `words` follow each operand.

  Day 3 sales - 20 = 40      3 may be a name, and the sign a dash: a word before "-" is a unit if one follows too
  1 tray x 2 trays = 24      the things counted are multiplied, not the counts
  """
  for sign, before, after in zip(signs, words, words[1:], strict=False):
    if sign == "-" and before and not after:
      return True
    if sign == "*" and before and after and _stem(before[0]) == _stem(after[0]):
      return not _units_of_measure(before)  # 3 feet x 4 feet
  return False


def _stem(unit: str) -> str:
  return unit.lstrip("-/").lower().removesuffix("s")


def _is_unambiguous(taken: list[str]) -> bool:
  """Return whether the arithmetic is unambiguous: not 25 / 1/3, which may be 75, nor 0730, which is a time."""
  operators = [token for token in taken if token in "+-*/"]
  divided_twice = any(a == b == "/" for a, b in itertools.pairwise(operators))
  time_of_day = any(re.match(r"0\d", token) for token in taken)
  return 0 < len(operators) <= _MOST_OPERATORS and not divided_twice and not time_of_day


def _can_begin_after(text: str, tokens: list[tuple], i: int) -> bool:
  """Return whether arithmetic can begin right after token `i`: a word or mark, with no arithmetic further left."""
  kind, token, start = tokens[i]
  if kind == "unit":
    if _makes_doubtful(token) or _units_of_measure([token]):
      return False
  elif kind != "equal" and (token not in '(,.;!?"“:' or text[start - 1 : start].isdigit()):
    return False
  while i >= 0 and tokens[i][0] != "equal" and tokens[i][1] not in (".", "!", "?"):
    if tokens[i][0] in ("operator", "times"):
      return False
    i -= 1
  return True


def _right_sides(tokens: list[tuple], k: int) -> tuple[list[list[str]], set[str]] | None:
  """Return the first number after the equal sign `k`, all of its arithmetic, and the measures; None if ambiguous."""
  taken: list[str] = []
  first: list[str] = []
  units: list[str] = []
  operand = False
  for i in range(k + 1, len(tokens)):
    kind, token, _ = tokens[i]
    if kind == "number" and not operand:
      taken.append(token)
      operand = True
      first = first or list(taken)
    elif kind == "percent" and operand and taken[-1] != "%":
      taken.append("%")
      first = first + ["%"] if len(first) == len(taken) - 1 else first
    elif kind in ("operator", "times") and (operand or (not taken and token == "-")):
      taken.append(token.translate(_SIGN))
      operand = False
    elif kind == "unit" and operand:
      # Only a word right after the number makes it doubtful; a later one is the rest of the sentence.
      if not units and _makes_doubtful(token) and token not in _HARMLESS_AFTER:
        return None
      units.append(token)
    elif not operand or kind in ("letter", "open", "number", "percent"):
      return None
    else:
      break
  if not operand or re.match(r"0\d", first[-1]):
    return None
  return ([first] if first == taken else [first, taken]), _units_of_measure(units[:1])

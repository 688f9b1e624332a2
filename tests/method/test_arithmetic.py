"""Arithmetic in prose: what is read, what is left alone."""

from fractions import Fraction

import pytest

from insec_jax.method.tasks.arithmetic import equations, evaluate, numbers_of, show, words_of


@pytest.mark.parametrize(
  ("expression", "value"),
  [
    ("48/2", 24),
    ("2*(3+4)-1", 13),
    ("0.2*50", 10),
    ("+3-4", -1),
    ("-(2)*3", -6),
    ("8/13*78", 48),
    ("1,000*2", 2000),
    ("7", 7),
  ],
)
def test_arithmetic_is_evaluated_exactly(expression, value):
  assert evaluate(expression) == value


@pytest.mark.parametrize("expression", ["", "3/0", "3+", "(3", "3)", "2x", "a", "3 4", "2**3", "__import__"])
def test_what_is_no_arithmetic_has_no_value(expression):
  assert evaluate(expression) is None


@pytest.mark.parametrize(
  ("text", "read", "holds"),
  [
    ("Natalia sold 48/2 = 24 clips in May.", ["48/2"], [True]),
    ("Natalia sold 48/2 = 26 clips in May.", ["48/2"], [False]),
    ("Mary added 3 large stickers + 42 stickers = 45 stickers to it", ["3+42"], [True]),
    ("7 stickers/page * 6 pages= 42 stickers", ["7*6"], [True]),
    ("She has $1,000 - $75.50 = $924.50.", ["1,000-75.50"], [True]),
    ("This is 2 x 3=6, which gives 6 ÷ 4 = 1.5", ["2*3", "6/4"], [True, True]),
    ("He needs 90 - 80 = 11 more dollars", ["90-80"], [False]),
    ("2 * 3 = 6 + 4 = 10", ["2*3", "6+4"], [True, True]),
    ("Purple = 5 * 230 = 1150 pages", ["5*230"], [True]),
    ("That is (2 + 3) * 4 = 21.", ["(2+3)*4"], [False]),
    ("The share is 100 * 20% = 20.", ["100*20%"], [True]),
    ("The share is 20 / 40% = 50.", ["20/40%"], [True]),
    ("Each gets 100 / 3 = 33.33.", ["100/3"], [True]),
    ("Each gets 100 / 3 = 33.", ["100/3"], [True]),
    ("Each gets 100 / 3 = 34.5.", ["100/3"], [False]),
    ("She needs 90 - 100 = -10.", ["90-100"], [True]),
    ("6/6 - 1/6 = 5/6 is left", ["6/6-1/6"], [True]),
    ("6/6 - 1/6 = 4/6 is left", ["6/6-1/6"], [False]),
    ("Nora is 15 - 52 = 37 years old.", ["15-52"], [True]),  # the other way round
    ("Nora is 15 - 52 = 36 years old.", ["15-52"], [False]),
    ("That makes 2 * 3 - 10 = 4.", ["2*3-10"], [False]),  # more than one difference
    ("He has 20 pens - 4 pens = 17 pens.", ["20-4"], [False]),
    ("He has 20 pens - 4 = 16 pens.", ["20-4"], [True]),  # in doubt, and it holds
    ("The field has 3 feet x 4 feet = 13 square feet.", ["3*4"], [False]),
    ("There are 3 trays x 4 rolls = 13 rolls.", ["3*4"], [False]),
  ],
)
def test_equations_are_read_and_judged(text, read, holds):
  found = equations(text)
  assert [equation.text for equation in found] == read
  assert [equation.holds for equation in found] == holds


@pytest.mark.parametrize(
  "text",
  [
    "E + E - 5 = 37",  # a variable
    "5x/6 = 20",
    "(5/2)x = 930",
    "8/3 = 24/Y",
    "half of 10 + 5 = 10",  # words that do arithmetic
    "losing 5 thousand dollars, in three days 5 * 3 = 15,000",
    "2 hours + 30 minutes = 150 minutes",  # units that convert
    "4 pounds - 6 ounces = 58 ounces",
    "25 / 1/3 = 75",  # ambiguous
    "0900 - 0130 = 730",  # times of day
    "from 10:30 + 2 = 12",
    "1, 2, 3 + 4 = 10",  # a list
    "1 1/2 * 4 = 6",  # a mixed number
    "20 + 10 more to the 29 + 24 there = 83",  # more arithmetic further left
    "20 / 240 = 8.333...%",
    "Day 3 sales - 20 = 40",  # a name with a number, less 20
    "There are 3 friends - 4 + 5 = 9 in all",  # a dash
    "1 tray x 2 trays = 24 rolls",  # what the trays hold
    "x = 21",
    "5 = 5",
    "a = b",
    "",
    "=",
    "3 + = 4",
  ],
)
def test_what_may_mean_something_else_is_left_alone(text):
  assert equations(text) == ()


def test_numbers_and_words_split_a_step():
  step = "She paid $1,080.50 for 3  of 1,2"
  assert numbers_of(step) == (Fraction("1080.5"), 3, 1, 2)
  assert words_of("apt #1") != words_of("apt 11")
  assert words_of(step) == "Shepaid$\0for\0of\0,\0"


@pytest.mark.parametrize(
  ("number", "shown"),
  [
    (Fraction(24), "24"),
    (Fraction(-3), "-3"),
    (Fraction(1, 2), "0.5"),
    (Fraction(1, 3), "0.33"),
    (Fraction("0.0125"), "0.0125"),
    (Fraction(100, 8), "12.5"),
  ],
)
def test_numbers_are_shown_in_short(number, shown):
  assert show(number) == shown

"""What a model wrote is cut into judged steps, each with its confidence and its places for a flag."""

import types

import numpy as np
import pytest

from insec_jax.config import TaskConfig
from insec_jax.evaluation.steps import Reader
from insec_jax.generation.generator import Completion
from insec_jax.generation.sampler import SampledTokens
from insec_jax.method import tasks
from insec_jax.method.transcript import Markers

TASK = tasks.get(TaskConfig(name="graph", min_size=2, max_size=4, modulus=10))
PROBLEM = tasks.problems(TASK, "test", num=1, seed=0)[0]
RIGHT = PROBLEM.steps
WRONG = TASK.inject(PROBLEM, RIGHT[:1], "calc", np.random.default_rng(0))


SURE = "<sure>"  # a token of confidence, which is no text


def read_as(*words: str, finish: str = "length", tokens=None, **arrays) -> tuple[Reader, Completion]:
  """A reader to whom token k reads as word k, and a generation of all of them; a stop token comes after when asked."""
  decoder = types.SimpleNamespace(
    decode=lambda some: "".join(words[k] for k in some if words[k] != SURE),
    past_confidence=lambda _, place: place + (place < len(words) and words[place] == SURE),
  )
  tokens = np.arange(len(words) + (finish == "stop"))
  given = {"logprobs": np.zeros(len(tokens)), "margins": None, "flag_logprobs": None, **arrays}
  return (
    Reader(decoder, TASK, Markers("<err>", "<fix>"), "line"),
    Completion("".join(word for word in words if word != SURE), SampledTokens(tokens=tokens, finish=finish, **given)),
  )


def kinds(reader: Reader, written: Completion) -> list[tuple]:
  return [(step.kind, step.error, step.is_first_try) for step in reader.steps(0, PROBLEM, written)]


def test_the_score_leaves_out_the_first_token_and_places_end_right_after_the_step():
  first, second = RIGHT[0], RIGHT[1]
  reader, written = read_as(
    first[:2],
    first[2:-1],
    "\n",
    second[:1],
    second[1:],
    finish="stop",
    logprobs=-np.array([9.0, 1.0, 2.0, 8.0, 3.0, 7.0]),
    margins=np.arange(6.0),
    flag_logprobs=-np.arange(6.0),
  )
  one, two = reader.steps(4, PROBLEM, written)
  assert (one.score, two.score) == (2.0, 3.0)
  assert (one.margin_P.tolist(), two.margin_P.tolist()) == ([0.0, 1.0, 2.0, 3.0], [4.0, 5.0])
  assert (one.flag_P.tolist(), two.flag_P.tolist()) == ([0.0, -1.0, -2.0, -3.0], [-4.0, -5.0])
  assert (one.solution, one.kind, two.kind) == (4, "right", "right")


def test_a_confidence_token_is_no_part_of_a_step_and_the_flag_comes_after_it():
  first, second = RIGHT[0], RIGHT[1]
  reader, written = read_as(
    first[:2],
    first[2:],
    SURE,
    second[:1],
    second[1:],
    SURE,
    finish="stop",
    logprobs=-np.array([9.0, 1.0, 7.0, 8.0, 3.0, 7.0, 0.0]),
    margins=np.arange(7.0),
    flag_logprobs=-np.arange(7.0),
  )
  one, two = reader.steps(0, PROBLEM, written)
  assert (one.score, two.score) == (1.0, 3.0)
  assert (one.margin_P.tolist(), two.margin_P.tolist()) == ([0.0, 1.0, 3.0], [4.0, 6.0])


def test_a_step_of_one_token_has_the_score_0_and_plain_words_have_no_places():
  (one,) = read_and_list(RIGHT[0], finish="stop", logprobs=-np.array([5.0, 4.0]))
  assert one.score == 0.0
  assert one.margin_P is one.flag_P is None


def read_and_list(*words, **given):
  reader, written = read_as(*words, **given)
  return list(reader.steps(0, PROBLEM, written))


@pytest.mark.parametrize(
  ("words", "expected"),
  [
    ((RIGHT[0], WRONG, RIGHT[1]), [("right", "", True), ("wrong", "calc", True), ("right", "", False)]),
    ((RIGHT[0], "<err>", "calc", "<fix>", RIGHT[0], WRONG), [("right", "", True)]),
    (("<fix>", RIGHT[0]), []),
  ],
)
def test_steps_end_at_the_first_marker_and_first_tries_with_the_first_wrong_step(words, expected):
  got = kinds(*read_as(*words, finish="stop"))
  # After a wrong step that stands, the value it stated is known: stating it again is no repeat, but a correction.
  assert got == expected


def test_a_step_cut_short_or_without_a_token_after_it_is_left_out():
  assert kinds(*read_as(RIGHT[0], WRONG[:-2])) == [("right", "", True)]
  assert kinds(*read_as(RIGHT[0], WRONG)) == [("right", "", True)]
  assert kinds(*read_as(RIGHT[0], WRONG, finish="stop")) == [("right", "", True), ("wrong", "calc", True)]


def test_a_step_that_shares_a_token_with_its_neighbour_is_left_out():
  first, second, third = RIGHT[0], RIGHT[1], WRONG
  reader, written = read_as(first + second[:3], second[3:], third, finish="stop")
  assert [step.kind for step in reader.steps(0, PROBLEM, written)] == ["wrong"]
  reader, written = read_as(first[:3], first[3:] + second[:3], second[3:], third[:4], third[4:], finish="stop")
  assert len(list(reader.steps(0, PROBLEM, written))) == 1


def test_characters_and_tokens_are_matched_where_both_end():
  reader, written = read_as("1+", "1", "=2", "\n", "2", "+2=4\n")
  assert reader.token_ends(written) == {0: 0, 2: 1, 3: 2, 5: 3, 6: 4, 7: 5, 12: 6}


def test_a_character_of_two_tokens_ends_with_the_second():
  pieces = ["a", b"\xc3", b"\xa4", "b"]
  decoder = types.SimpleNamespace(
    decode=lambda some: b"".join(
      piece if isinstance(piece, bytes) else piece.encode() for piece in (pieces[k] for k in some)
    ).decode(errors="replace")
  )
  reader = Reader(decoder, TASK, Markers("<err>", "<fix>"), "line")
  written = Completion(
    "a\u00e4b",
    SampledTokens(tokens=np.arange(4), logprobs=np.zeros(4), finish="length", flag_logprobs=None, margins=None),
  )
  assert reader.token_ends(written) == {0: 0, 1: 1, 2: 3, 3: 4}

"""Redrawing deletes exactly the steps that are above the threshold, and counts every token that was drawn for it."""

import math
import types

import numpy as np
import pytest

from insec_jax.evaluation.redrawing import redraw
from insec_jax.generation.confidence import ConfidenceTrigger
from insec_jax.generation.generator import Completion
from insec_jax.generation.sampler import SampledTokens

END, STOP = 1, 0


class Script:
  """A writer that says what stands in its script: for each prompt's first token, the rounds in order."""

  flag_id = 7
  watches = ConfidenceTrigger((END,), 8)

  def __init__(self, script, max_positions):
    self.script = {first: list(rounds) for first, rounds in script.items()}
    self.max_positions = max_positions
    self.seen = []
    self.rooms = []

  def has_room(self, begin, max_tokens):
    return len(begin) + max_tokens <= self.max_positions

  def watch(self):
    return self.watches

  def decode(self, tokens):
    return " ".join(map(str, tokens))

  def written(self, one):
    return Completion(self.decode(one.tokens), one)

  def write(self, prompts, *, label, max_tokens, temperature, seed, flag_bias, batch_size):
    del label, temperature, batch_size
    assert flag_bias == -math.inf
    if not prompts:
      return []
    assert all(self.has_room(prompt, max_tokens) for prompt in prompts)
    self.rooms.append(max_tokens)
    self.seen.append((seed, [prompt.tolist() for prompt in prompts]))
    drawn = [self.script[int(prompt[0])].pop(0)[:max_tokens] for prompt in prompts]
    return [
      types.SimpleNamespace(
        generation=SampledTokens(
          np.array([token for token, _ in one], np.int64),
          -np.array([score for _, score in one]),
          "stop" if one[-1][0] == STOP else "length",
          None,
          None,
        )
      )
      for one in drawn
    ]


def step(name, score):
  """A step of three tokens with this score; how sure its first token was does not count."""
  return [(name, 9.0), (name, score), (END, 0.0)]


def run(script, *, most=2, max_tokens=100, max_positions=1_000):
  writer = Script(script, max_positions)
  written, counted = redraw(
    writer,
    [np.array([first], np.int32) for first in script],
    label="",
    threshold=1.0,
    most=most,
    max_tokens=max_tokens,
    temperature=1.0,
    seed=3,
    batch_size=4,
  )
  return [one.generation.tokens.tolist() for one in written], counted, writer.seen


def test_an_unsure_step_is_drawn_again_from_its_prefix_and_its_tokens_count():
  tokens, counted, seen = run(
    {5: [[*step(20, 0.1), *step(21, 2.0), *step(22, 0.0), (STOP, 0.0)], [*step(23, 0.2), (STOP, 0.0)]]}
  )
  assert tokens == [[20, 20, END, 23, 23, END, STOP]]
  assert counted == [3 + 3 + 4]
  assert seen == [(3, [[5]]), (4, [[5, 20, 20, END]])]


def test_a_step_is_drawn_again_at_most_so_often_and_the_next_has_its_own_count():
  unsure = [*step(20, 2.0), (STOP, 0.0)]
  tokens, counted, _ = run(
    {
      5: [
        unsure,
        unsure,
        [*step(20, 2.0), *step(21, 3.0), (STOP, 0.0)],
        [*step(22, 3.0), (STOP, 0.0)],
        [*step(23, 0.0), (STOP, 0.0)],
      ]
    }
  )
  assert tokens == [[20, 20, END, 23, 23, END, STOP]]
  assert counted == [3 + 3 + 3 + 3 + 3 + 4]


def test_a_solution_that_is_done_is_not_drawn_again_with_the_others():
  tokens, counted, seen = run(
    {5: [[*step(20, 0.0), (STOP, 0.0)]], 6: [[*step(21, 2.0), (STOP, 0.0)], [*step(22, 0.0), (STOP, 0.0)]]}
  )
  assert tokens == [[20, 20, END, STOP], [22, 22, END, STOP]]
  assert counted == [4, 7]
  assert [prompts for _, prompts in seen] == [[[5], [6]], [[6]]]


def test_what_is_kept_never_exceeds_max_tokens():
  tokens, counted, _ = run({5: [[*step(20, 0.0), *step(21, 2.0)], [*step(22, 0.0), *step(23, 0.0)]]}, max_tokens=7)
  assert tokens == [[20, 20, END, 22, 22, END, 23]]
  assert counted == [6 + 4]


def test_a_text_too_long_for_max_tokens_more_is_drawn_alone_as_far_as_it_may_grow():
  grown = [[*step(20, 0.0), *step(21, 2.0), (STOP, 0.0)], [*step(22, 0.0), (STOP, 0.0)]]
  unsure = [[*step(30, 2.0), (STOP, 0.0)], [*step(31, 0.0), (STOP, 0.0)]]
  writer = Script({5: grown, 6: unsure}, max_positions=10)
  written, counted = redraw(
    writer,
    [np.array([first], np.int32) for first in (5, 6)],
    label="",
    threshold=1.0,
    most=2,
    max_tokens=9,
    temperature=1.0,
    seed=3,
    batch_size=4,
  )
  assert [one.generation.tokens.tolist() for one in written] == [[20, 20, END, 22, 22, END, STOP], [31, 31, END, STOP]]
  assert counted == [3 + 3 + 4, 3 + 4]
  assert writer.rooms == [9, 9 - 3, 9]
  assert writer.seen == [(3, [[5], [6]]), (4, [[5, 20, 20, END]]), (4, [[6]])]


def test_later_rounds_draw_a_few_tokens_of_which_all_steps_that_ended_stand(monkeypatch):
  monkeypatch.setattr("insec_jax.evaluation.redrawing.SHORT", 10)
  rounds = [
    [*step(20, 2.0), *step(21, 0.0), (STOP, 0.0)],
    [*step(22, 0.0), *step(23, 0.0), *step(24, 0.0), *step(25, 0.0)],  # cut after ten
    [*step(26, 3.0), *step(27, 0.0), (STOP, 0.0)],  # the fourth step: none of its own tries was before
    [*step(28, 3.0), (STOP, 0.0)],
    [*step(29, 3.0), (STOP, 0.0)],
  ]
  writer = Script({5: rounds}, 1_000)
  (one,), counted = redraw(
    writer,
    [np.array([5], np.int32)],
    label="",
    threshold=1.0,
    most=2,
    max_tokens=100,
    temperature=1.0,
    seed=3,
    batch_size=4,
  )
  assert one.generation.tokens.tolist() == [22, 22, END, 23, 23, END, 24, 24, END, 29, 29, END, STOP]
  assert counted == [3 + 9 + 3 + 3 + 4]
  assert writer.rooms == [100, 10, 10, 10, 10]


SURE, UNSURE = 50, 51  # tokens of confidence


@pytest.mark.parametrize("cut", [7, 8, 9])
def test_a_step_that_stands_at_the_end_of_a_short_round_has_its_token_of_confidence(monkeypatch, cut):
  monkeypatch.setattr("insec_jax.evaluation.redrawing.SHORT", cut)
  drawn = [*step(22, 0.0), (SURE, 0.0), *step(23, 0.5), (UNSURE, 0.0), *step(24, 0.0)]  # the second ends at the seventh
  writer = Script({5: [[*step(20, 2.0)], drawn, [*step(25, 0.1), (SURE, 0.0), (STOP, 0.0)]]}, 1_000)
  writer.watches = ConfidenceTrigger((END,), 8, edges=(0.3,), confidence_ids=(SURE, UNSURE))
  (one,), counted = redraw(
    writer,
    [np.array([5], np.int32)],
    label="",
    threshold=1.0,
    most=2,
    max_tokens=100,
    temperature=1.0,
    seed=3,
    batch_size=4,
  )
  assert one.generation.tokens.tolist() == [22, 22, END, SURE, 23, 23, END, UNSURE, 25, 25, END, SURE, STOP]
  assert len(one.generation.logprobs) == len(one.generation.tokens)
  assert counted == [3 + 8 + 5]


def test_a_step_that_a_short_round_does_not_end_is_drawn_whole(monkeypatch):
  monkeypatch.setattr("insec_jax.evaluation.redrawing.SHORT", 4)
  endless = [*[(20, 9.0)] * 11, (STOP, 0.0)]
  writer = Script({5: [[*step(30, 2.0)], endless, endless]}, 1_000)
  (one,), counted = redraw(
    writer,
    [np.array([5], np.int32)],
    label="",
    threshold=1.0,
    most=2,
    max_tokens=100,
    temperature=1.0,
    seed=3,
    batch_size=4,
  )
  assert one.generation.tokens.tolist() == [token for token, _ in endless]
  assert counted == [3 + 12]
  assert writer.rooms == [100, 4, 100]


def test_a_short_round_never_draws_more_than_may_stand(monkeypatch):
  monkeypatch.setattr("insec_jax.evaluation.redrawing.SHORT", 10)
  rounds = [
    [*step(20, 2.0)],
    [*step(21, 0.0), *step(22, 0.0), *step(23, 0.0), *step(24, 0.0)],
    [*step(25, 0.0), *step(26, 0.0), *step(27, 0.0)],
  ]
  writer = Script({5: rounds}, 1_000)
  (one,), counted = redraw(
    writer,
    [np.array([5], np.int32)],
    label="",
    threshold=1.0,
    most=2,
    max_tokens=11,
    temperature=1.0,
    seed=3,
    batch_size=4,
  )
  assert one.generation.tokens.tolist() == [21, 21, END, 22, 22, END, 23, 23, END, 25, 25]
  assert one.generation.finish == "length"
  assert counted == [3 + 9 + 2]

"""A step that is found is deleted and drawn again; of the draws one is kept, and every token that was needed counts."""

import math
import types

import numpy as np
import pytest

from insec_jax.evaluation.redrawing import ByFlag, ByScore, redrawn
from insec_jax.generation.confidence import ConfidenceTrigger
from insec_jax.generation.generator import Completion
from insec_jax.generation.sampler import SampledTokens

STOP, END, FLAG, FIX = 0, 1, 7, 8
PROMPT = np.array([5], np.int32)


def text(*steps, ends=True):
  """A generation of steps, each (name, score), three tokens long."""
  tokens = [token for name, _ in steps for token in (name, name, END)] + [STOP] * ends
  scores = [score for _, score in steps for score in (9.0, score, 0.0)] + [0.0] * ends  # the first does not count
  return SampledTokens(
    np.array(tokens, np.int32), -np.array(scores, np.float32), "stop" if ends else "length", None, None
  )


def flagged(*steps):
  """Steps, a flag, and what the model would write after it."""
  told = text(*steps, ends=False)
  tokens = np.append(told.tokens, [FLAG, 30, FIX, 31, 31, END, STOP]).astype(np.int32)
  return SampledTokens(tokens, np.append(told.logprobs, np.zeros(7, np.float32)), "stop", None, None)


class Script:
  """A writer with greedy texts by what they continue, and draws in order; it notes what it is asked for."""

  flag_id, fix_id, stop_ids, confidence_ids = FLAG, FIX, [STOP], ()

  def __init__(self, greedy=None, draws=(), flagged_after=()):
    self.greedy, self.banned, self.draws = dict(greedy or {}), {}, list(draws)
    self.flagged_after, self.asked = {tuple(tokens) for tokens in flagged_after}, []

  def watch(self):
    return ConfidenceTrigger(
      (END,), FIX, edges=(0.5,) if self.confidence_ids else (), confidence_ids=self.confidence_ids
    )

  def has_room(self, begin, max_tokens):
    return len(begin) + max_tokens <= 1000

  def past_confidence(self, tokens, place):
    return place + (place < len(tokens) and int(tokens[place]) in self.confidence_ids)

  def written(self, one):
    return Completion("", one)

  def draw_steps(self, begins, *, label, max_tokens, seed, batch_size):
    del label, max_tokens, batch_size
    self.asked.append(("draw", seed, [begin.tolist() for begin in begins]))
    drawn, self.draws = self.draws[: len(begins)], self.draws[len(begins) :]
    return drawn

  def write(self, begins, *, label, max_tokens, batch_size, flag_bias=0.0):
    del label, batch_size
    if not begins:
      return []
    self.asked.append(("write", max_tokens, flag_bias, [begin.tolist() for begin in begins]))
    found = []
    for begin in begins:
      said = tuple(begin.tolist()[1:])
      if max_tokens == 1 and flag_bias == 0.0:
        one = SampledTokens(np.array([FLAG if said in self.flagged_after else 40]), np.zeros(1), "length", None, None)
      else:
        one = (self.banned if flag_bias == -math.inf and said in self.banned else self.greedy)[said]
      found.append(types.SimpleNamespace(generation=one, finished=one.finish == "stop"))
    return found


def step(name, score):
  """A drawn step."""
  return SampledTokens(
    np.array([name, name, END], np.int32), -np.array([9.0, score, 0.0], np.float32), "stop", None, None
  )


def by_score(writer, first, *, draws=(2,), max_tokens=100):
  return redrawn(
    writer,
    [PROMPT],
    [Completion("", first)],
    ByScore(writer, 1.0),
    label="",
    draws=draws,
    max_tokens=max_tokens,
    seed=3,
    batch_size=4,
  )


def of(found, most):
  """(tokens, counted, finish) of the only solution."""
  (written,), (counted,) = found[most]
  return written.generation.tokens.tolist(), counted, written.generation.finish


def test_a_draw_within_the_bound_ends_the_draws_and_the_text_goes_on_greedily():
  writer = Script({(20, 20, END, 23, 23, END): text((24, 0.2))}, [step(22, 2.0), step(23, 0.5), step(29, 0.1)])
  found = by_score(writer, text((20, 0.1), (21, 3.0), (25, 0.0)), draws=(3,))
  # Two steps, two draws, one step and the end; the third draw and what followed the deleted step are not needed.
  assert of(found, 3) == ([20, 20, END, 23, 23, END, 24, 24, END, STOP], 6 + 6 + 4, "stop")
  assert writer.asked == [
    ("draw", 4, [[5, 20, 20, END]] * 3),
    ("write", 100, -math.inf, [[5, 20, 20, END, 23, 23, END]]),
  ]


def test_of_draws_that_are_all_above_the_bound_the_surest_is_kept_and_all_count():
  writer = Script({(22, 22, END): text((24, 0.2))}, [step(21, 4.0), step(22, 2.0), step(23, 3.0)])
  tokens, counted, _ = of(by_score(writer, text((20, 5.0)), draws=(3,)), 3)
  assert tokens == [22, 22, END, 24, 24, END, STOP]
  assert counted == 3 + 9 + 4  # the kept step is not scored again


def test_each_number_of_draws_has_its_own_solution_and_a_sure_one_costs_nothing_more():
  writer = Script({(21, 21, END): text(), (23, 23, END): text()}, [step(21, 4.0), step(22, 4.0), step(23, 0.0)])
  found = by_score(writer, text((20, 5.0)), draws=(1, 2))
  assert of(found, 1) == ([21, 21, END, STOP], 3 + 3 + 1, "stop")
  assert of(found, 2) == ([23, 23, END, STOP], 3 + 6 + 1, "stop")
  assert of(by_score(Script(), text((20, 0.5))), 2) == ([20, 20, END, STOP], 4, "stop")


def test_a_draw_that_ends_the_text_ends_the_solution_which_never_exceeds_its_room():
  ended = SampledTokens(np.array([STOP], np.int32), np.array([-2.0], np.float32), "stop", None, None)
  assert of(by_score(Script(draws=[ended] * 2), text((20, 5.0))), 2) == ([STOP], 3 + 1, "stop")
  writer = Script({(22, 22, END): text((24, 0.2), (25, 0.2))}, [step(22, 0.0)] * 2)
  assert of(by_score(writer, text((20, 5.0)), max_tokens=7), 2) == (
    [22, 22, END, 24, 24, END, 25],
    3 + 3 + 4,
    "length",
  )


def test_a_drawn_step_that_is_kept_is_followed_by_its_confidence():
  writer = Script({(22, 22, END, 51): text()}, [step(22, 0.7)] * 2)
  writer.confidence_ids = (50, 51)
  assert of(by_score(writer, text((20, 5.0))), 2) == ([22, 22, END, 51, STOP], 3 + 4 + 1, "stop")


def by_flag(writer, first, *, draws=(2,)):
  finder = ByFlag(writer, batch_size=4)
  options = {"label": "", "max_tokens": 100, "seed": 3, "batch_size": 4}
  return redrawn(writer, [PROMPT], [Completion("", first)], finder, draws=draws, **options)


def test_a_flagged_step_is_drawn_until_a_draw_is_not_flagged_without_a_correction():
  kept = (20, 20, END, 23, 23, END)
  writer = Script({kept: text((24, 0.2))}, [step(22, 0.0), step(23, 2.0)], [(20, 20, END, 22, 22, END)])
  tokens, counted, _ = of(by_flag(writer, flagged((20, 0.1), (21, 0.0))), 2)
  assert tokens == [*kept, 24, 24, END, STOP]
  assert counted == (6 + 1) + (3 + 1) + 3 + 4  # the flag of each flagged step counts


def test_where_all_draws_are_flagged_the_surest_stands_and_no_flag_may_follow_it():
  goes_on = SampledTokens(np.array([24], np.int32), np.zeros(1, np.float32), "length", None, None)
  writer = Script(
    {(23, 23, END): goes_on, (23, 23, END, 24): text((25, 0.0))},
    [step(22, 2.0), step(23, 1.0)],
    [(22, 22, END), (23, 23, END)],
  )
  tokens, counted, _ = of(by_flag(writer, flagged((20, 0.1))), 2)
  assert tokens == [23, 23, END, 24, 25, 25, END, STOP]
  assert counted == (3 + 1) + (3 + 1) * 2 + 1 + 4
  assert ("write", 1, -math.inf, [[5, 23, 23, END]]) in writer.asked


def test_a_flag_after_a_step_that_stands_is_only_deleted():
  writer = Script({(22, 22, END): flagged(), (22, 22, END, 24): text((25, 0.0))}, [step(22, 0.0)] * 2)
  writer.banned[22, 22, END] = SampledTokens(np.array([24], np.int32), np.zeros(1, np.float32), "length", None, None)
  tokens, counted, _ = of(by_flag(writer, flagged((20, 0.1))), 2)
  assert tokens == [22, 22, END, 24, 25, 25, END, STOP]
  assert counted == (3 + 1) + 3 + 1 + 1 + 4


@pytest.mark.parametrize("at", [0, 2])
def test_a_flag_after_no_step_is_only_deleted_and_one_inside_a_step_deletes_its_part(at):
  first = SampledTokens(np.array([20, 20][:at] + [FLAG], np.int32), np.zeros(at + 1, np.float32), "length", None, None)
  goes_on = SampledTokens(np.array([26], np.int32), np.zeros(1, np.float32), "length", None, None)
  writer = Script({(): goes_on, (26,): text((24, 0.2)), (22, 22, END): text()}, [step(22, 0.0)] * 2)
  tokens, counted, _ = of(by_flag(writer, first), 2)
  assert tokens == ([22, 22, END, STOP] if at else [26, 24, 24, END, STOP])
  assert counted == (2 + 1 + 3 + 1 if at else 1 + 1 + 4)

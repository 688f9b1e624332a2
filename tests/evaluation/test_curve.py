"""Points of the learning curve, with a scripted model in place of the weights of a run."""

import dataclasses
import types

import pytest
import scripted
from scripted import CONFIG, Policy, Scripted

from insec_jax.distributed.processes import alone
from insec_jax.evaluation import curve
from insec_jax.generation import generator, loading

RUN = types.SimpleNamespace(config=None, tokenizer=None)


@pytest.fixture(autouse=True)
def _scripted(monkeypatch):
  monkeypatch.setattr(generator, "Sampler", Scripted)
  monkeypatch.setattr(loading, "from_training", lambda *_, is_marked: scripted.loaded() if is_marked else None)


def with_points(points, steps=20):
  return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=steps, curve_points=points))


def policy_of_all(monkeypatch, policy):
  made = Scripted.__init__

  def begin(self, *arguments, **options):
    made(self, *arguments, **options)
    self.policy = policy

  monkeypatch.setattr(Scripted, "__init__", begin)


def test_points_are_evenly_spaced_and_the_last_one_is_at_the_end():
  assert curve.steps(with_points(0)) == frozenset()
  assert sorted(curve.steps(with_points(4))) == [5, 10, 15, 20]
  assert sorted(curve.steps(with_points(3))) == [6, 13, 20]
  assert len(curve.steps(with_points(20))) == 20


def test_a_point_counts_right_answers_of_a_few_problems_with_flags_and_without():
  few = dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, num_problems=6))
  assert curve.measure(few, alone(), None, RUN) == {
    "curve/accuracy": 1.0,
    "curve/accuracy_banned": 1.0,
    "curve/problems": 6,
  }


def test_wrong_answers_do_not_count(monkeypatch):
  policy_of_all(monkeypatch, Policy(slips=True))
  assert 0 < curve.measure(CONFIG, alone(), None, RUN)["curve/accuracy"] < 1


def test_processes_share_the_problems_of_a_point(monkeypatch):
  monkeypatch.setattr(curve, "MOST_CURVE_PROBLEMS", 5)
  shares = []
  for index in (0, 1):
    process = types.SimpleNamespace(index=index, num=2, gather=lambda _, value: shares.append(value) or [value])
    curve.measure(CONFIG, process, None, RUN)
  assert [num for num, _ in shares] == [3, 2]

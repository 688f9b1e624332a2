"""Injected mistakes: proved wrong, in the right number and places."""

import collections
import dataclasses

import numpy as np
import pytest

from insec_jax.command import InputError
from insec_jax.config import MistakesConfig, TaskConfig
from insec_jax.method import tasks
from insec_jax.method.mistakes import in_prose, paper_reason, pieces_of, probe, reason_of, with_mistakes
from insec_jax.method.prose import CLASSES, Corpus, ProseRecord
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT
from insec_jax.method.tasks.graph import Graph
from insec_jax.method.transcript import Markers, Piece, clean, parse, render

MARKERS = Markers("<err>", "<fix>")
SIZES = TaskConfig(name="graph", min_size=4, max_size=4, modulus=10)
MISTAKES = MistakesConfig(
  source="injected",
  share=1.0,
  max_per_solution=2,
  classes=(),
  reason="label",
  unit="line",
  mined=0.0,
  mined_path="",
)


def transcripts(task, num, seed=0, **changes):
  rng = np.random.default_rng(seed)
  config = dataclasses.replace(MISTAKES, **changes)
  problems = [task.make(rng) for _ in range(num)]
  return [(problem, with_mistakes(problem, task, config, MARKERS, rng)) for problem in problems]


def places_of(transcript):
  """Index of the step that each mistake stands for."""
  places, steps = [], 0
  for piece in transcript:
    if piece.role == MISTAKE:
      places.append(steps)
    steps += piece.text.count("\n") * (piece.role in (TEXT, CORRECTION))
  return places


@pytest.mark.parametrize("name", ["graph", "multiplication"])
def test_every_mistake_is_wrong_and_every_correction_right(name):
  task = tasks.get(dataclasses.replace(SIZES, name=name, modulus=10 if name == "graph" else 0))
  for problem, transcript in transcripts(task, 400):
    before = []
    for k, piece in enumerate(transcript):
      if piece.role == MISTAKE:
        verdict = task.check(problem, tuple(before), piece.text)
        assert verdict.kind == "wrong"
        assert [after.role for after in transcript[k + 1 : k + 5]] == [FLAG, REASON, FLAG, CORRECTION]
        assert transcript[k + 2].text == task.explain(problem, tuple(before), piece.text, "label")
        assert transcript[k + 2].text.startswith(verdict.error)
      elif piece.role in (TEXT, CORRECTION):
        for step in piece.text.splitlines(keepends=True):
          assert task.check(problem, tuple(before), step) == tasks.RIGHT
          before.append(step)
    assert transcript[0].role == PROMPT
    assert clean(transcript) == problem.prompt + "".join(problem.steps)
    assert parse(render(transcript[1:]), MARKERS, "line") == transcript[1:]


class Faking(Graph):
  """An injector that mostly gives steps that are not wrong: right ones, unverified ones, ones of another class."""

  def inject(self, problem, before, error, rng):
    unverified = self._right_step(problem.facts, problem.facts.asked)  # true, and mostly too early
    fakes = [self.next_step(problem, before), unverified, super().inject(problem, before, "calc", rng)]
    return fakes[rng.integers(3)] if rng.random() < 0.8 else super().inject(problem, before, error, rng)


def test_fake_mistakes_are_never_used():
  task = Faking(SIZES)
  seen = collections.Counter()
  for problem, transcript in transcripts(task, 300, classes=("early", "value")):
    before = []
    for piece in transcript:
      if piece.role == MISTAKE:
        verdict = task.check(problem, tuple(before), piece.text)
        seen[verdict.kind, verdict.error] += 1
      elif piece.role in (TEXT, CORRECTION):
        before += piece.text.splitlines(keepends=True)
  assert set(seen) == {("wrong", "early"), ("wrong", "value")}
  assert min(seen.values()) > 50


class Hopeless(Graph):
  """An injector that gives only right steps."""

  def inject(self, problem, before, error, rng):
    del error, rng
    return self.next_step(problem, before)


def test_where_no_mistake_can_be_proved_there_is_none():
  for problem, transcript in transcripts(Hopeless(SIZES), 20):
    assert transcript == (Piece(PROMPT, problem.prompt), Piece(TEXT, "".join(problem.steps)))
  problem = Graph(SIZES).make(np.random.default_rng(0))
  assert probe(problem, Hopeless(SIZES), MISTAKES, np.random.default_rng(0)) is None


def test_the_share_of_solutions_with_mistakes_is_the_one_asked_for():
  task = Graph(SIZES)
  found = transcripts(task, 1500, share=0.3)
  carrying = [any(piece.role == MISTAKE for piece in transcript) for _, transcript in found]
  assert abs(np.mean(carrying) - 0.3) < 0.04
  assert not any(piece.role == MISTAKE for _, transcript in transcripts(task, 50, share=0.0) for piece in transcript)


def test_number_and_places_are_even():
  found = [
    places_of(transcript)
    for _, transcript in transcripts(Graph(SIZES), 3000, classes=("calc", "value"), max_per_solution=3)
  ]
  number = collections.Counter(map(len, found))
  assert {1, 2, 3} == set(number)
  assert all(abs(count / 3000 - 1 / 3) < 0.04 for count in number.values())
  place = collections.Counter(place for places in found for place in places)
  assert all(abs(place[k] / place.total() - 1 / 4) < 0.03 for k in range(4))


def test_classes_are_even_where_all_are_possible():
  rng = np.random.default_rng(0)
  task = Graph(SIZES)
  config = dataclasses.replace(MISTAKES, classes=("calc", "value"))
  found = collections.Counter(probe(task.make(rng), task, config, rng).error for _ in range(1500))
  assert set(found) == {"calc", "value"}
  assert abs(found["calc"] / 1500 - 0.5) < 0.05


def test_the_reason_can_be_left_out_or_recompute():
  assert not any(
    piece.role == REASON for _, transcript in transcripts(Graph(SIZES), 30, reason="none") for piece in transcript
  )
  reasons = [
    piece.text
    for _, transcript in transcripts(Graph(SIZES), 30, classes=("calc",), reason="recompute")
    for piece in transcript
    if piece.role == REASON
  ]
  assert reasons
  assert all("+" in reason and "=" in reason for reason in reasons)


def test_the_same_generator_gives_the_same_transcripts():
  assert transcripts(Graph(SIZES), 30, seed=3) == transcripts(Graph(SIZES), 30, seed=3)


def test_a_probe_is_a_right_prefix_and_a_wrong_step():
  rng = np.random.default_rng(0)
  task = Graph(SIZES)
  for _ in range(200):
    problem = task.make(rng)
    found = probe(problem, task, MISTAKES, rng)
    assert found.text == problem.prompt + "".join(found.before) + found.wrong
    assert found.before == problem.steps[: len(found.before)]
    assert task.check(problem, found.before, found.wrong).error == found.error != ""


def test_a_class_or_unit_that_the_task_has_not_is_refused():
  with pytest.raises(InputError, match="'carry'; task graph can inject: early, value"):
    transcripts(Graph(SIZES), 1, classes=("carry",))
  with pytest.raises(InputError, match=r"mistakes\.unit='paragraph'"):
    transcripts(Graph(SIZES), 1, unit="paragraph")


@pytest.mark.parametrize("name", ["english", "graph", "grounded", "instructions", "multiplication", "sudoku"])
def test_the_papers_annotation_names_unit_and_class_in_words(name):
  task = tasks.get(dataclasses.replace(SIZES, name=name, modulus=10 if name == "graph" else 0))
  told = set()
  for problem, transcript in transcripts(task, 100, reason="paper", max_per_solution=1):
    for k, piece in enumerate(transcript):
      if piece.role == MISTAKE:
        before = tuple("".join(each.text for each in transcript[1:k]).splitlines(keepends=True))
        error = task.check(problem, before, piece.text).error
        assert transcript[k + 2] == Piece(REASON, paper_reason(error, "line"))
        told.add(error)
  assert told == set(task.error_classes)
  assert paper_reason("calc", "line") == "Found an error in the previous line. Reason: wrong calculation."
  assert paper_reason("two_digits", "sentence") == "Found an error in the previous sentence. Reason: two digits."


def test_a_reason_is_worded_as_the_config_says():
  task = Graph(SIZES)
  problem, transcript = transcripts(task, 1, max_per_solution=1)[0]
  k = next(k for k, piece in enumerate(transcript) if piece.role == MISTAKE)
  before, wrong = tuple("".join(each.text for each in transcript[1:k]).splitlines(keepends=True)), transcript[k].text
  error = task.check(problem, before, wrong).error
  worded = {
    reason: reason_of(problem, before, wrong, error, task=task, reason=reason, unit="line")
    for reason in ("none", "label", "recompute", "paper")
  }
  assert worded == {
    "none": "",
    "label": task.explain(problem, before, wrong, "label"),
    "recompute": task.explain(problem, before, wrong, "recompute"),
    "paper": paper_reason(error, "line"),
  }


def story(k, asked=True):
  """A record of six sentences, each of which offers a number, a name and a place for a negation."""
  names = [f"{a}{b}" for a in ("Ber", "Lun", "Mor", "Tav") for b in ("ta", "go", "rix")]
  word = f"Word{'abcdefgh'[k]}"
  steps = tuple(f"{word} in {names[(k + j) % 12]} is worth {10 * k + j + 20} coins. " for j in range(6))
  return ProseRecord(f"What of {k}?" if asked else "", steps, follows_text=asked)


def prose_mistakes(num, *, asked=True, **changes):
  """What `num` draws put into each of eight records."""
  texts = [story(k, asked=asked) for k in range(8)]
  corpus, rng = Corpus(texts), np.random.default_rng(0)
  config = dataclasses.replace(MISTAKES, unit="sentence", **changes)
  return texts, [(k, in_prose(corpus, k, config, rng)) for _ in range(num) for k in range(8)]


def test_prose_carries_mistakes_in_the_share_number_and_places_asked_for():
  _, found = prose_mistakes(120, share=0.5, max_per_solution=3, classes=("number",))
  carrying = [wrong for _, wrong in found if wrong is not None]
  assert abs(len(carrying) / len(found) - 0.5) < 0.05
  number = collections.Counter(map(len, carrying))
  assert set(number) == {1, 2, 3}
  assert all(abs(count / len(carrying) - 1 / 3) < 0.08 for count in number.values())
  place = collections.Counter(k for wrong in carrying for k in wrong)
  assert set(place) == set(range(6))
  assert all(abs(count / place.total() - 1 / 6) < 0.03 for count in place.values())


def test_nothing_is_wrong_before_anything_was_said():
  places = collections.Counter(k for _, wrong in prose_mistakes(40, asked=False)[1] for k in wrong)
  assert set(places) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
  ("reason", "told"),
  [
    ("none", {""}),
    ("label", {"This does not belong here.", "A number is wrong.", "A name is wrong.", "The opposite is true."}),
    (
      "paper",
      {
        f"Found an error in the previous sentence. Reason: {words}."
        for words in ("does not follow", "wrong number", "wrong name", "the opposite is true")
      },
    ),
  ],
)
def test_mistakes_in_prose_come_evenly_from_all_classes_and_say_which(reason, told):
  texts, found = prose_mistakes(60, reason=reason, max_per_solution=1)
  seen = collections.Counter(said for _, wrong in found for _, said in wrong.values())
  assert set(seen) == told
  assert all(abs(count / len(found) - 1 / len(told)) < 0.08 for count in seen.values())
  k, wrong = found[0]
  ((place, (step, _)),) = wrong.items()
  pieces = pieces_of(texts[k].steps, wrong, MARKERS)
  flagged = pieces[1 if place else 0 :]
  assert flagged[:2] == (Piece(MISTAKE, step), Piece(FLAG, "<err>"))
  assert flagged[-3 if place < 5 else -2 :][:2] == (Piece(FLAG, "<fix>"), Piece(CORRECTION, texts[k].steps[place]))
  assert clean(pieces) == "".join(texts[k].steps)
  assert parse(render(pieces), MARKERS, "sentence") == pieces


def test_classes_of_prose_are_used_as_the_config_names_them():
  for error in CLASSES:
    wrong = [each for _, each in prose_mistakes(2, classes=(error,), reason="paper")[1]]
    told = {said for each in wrong for _, said in each.values()}
    assert told == {paper_reason(error, "sentence")}

"""Which problems serve which purpose: the same ones at any time, and no problem for two purposes that must be apart."""

import dataclasses
import hashlib

import pytest
from datakit import bpe_tokenizer, config, gsm8k, pieces, question, write_lines
from scripted import CONFIG, LARGER, TASK

from insec_jax.command import InputError
from insec_jax.data import mixture, pipeline, problems, vocabulary
from insec_jax.method import tasks
from insec_jax.method.roles import MISTAKE
from insec_jax.method.transcript import render


def test_held_out_records_are_never_trained_on_and_one_prompt_is_on_one_side(tmp_path):
  lines = [question(number) for number in range(40)] + [
    pieces(("prompt", f"What is {number % 20} + 1?\n"), ("text", "?")) for number in range(40)
  ]
  some = gsm8k(tmp_path, lines, data__num_heldout=12)
  train, heldout = (list(mixture.transcripts(some, split)) for split in ("train", "heldout"))
  prompts = [{content[0].text for content, _ in split} for split in (train, heldout)]
  assert not prompts[0] & prompts[1]
  assert len(train) + len(heldout) == 80
  assert 12 <= len(heldout) <= 14
  assert sorted(where for _, where in train + heldout) == sorted(
    f"{tmp_path}/r.jsonl:{number}" for number in range(1, 81)
  )


def test_holding_everything_out_is_refused(tmp_path):
  with pytest.raises(InputError, match="leaves none of the 3 records read to train on"):
    mixture.transcripts(gsm8k(tmp_path, [question(number) for number in range(3)], data__num_heldout=3), "train")


def test_generated_problems_of_two_splits_differ_and_are_as_many_as_asked_for():
  some = config(
    task__name="multiplication",
    task__min_size=3,
    task__max_size=5,
    task__modulus=0,
    data__path="",
    data__num_records=30,
    data__num_heldout=10,
    mistakes__source="injected",
    mistakes__share=0.5,
  )
  train, heldout = (mixture.transcripts(some, split) for split in ("train", "heldout"))
  assert (len(train), len(heldout)) == (30, 10)
  assert not {content[0].text for content, _ in train} & {content[0].text for content, _ in heldout}
  assert 5 < sum(MISTAKE in [piece.role for piece in content] for content, _ in train) < 25
  plain = [
    record.content.prompt + "".join(record.content.steps) for _, record in problems.split_records(some, "heldout")
  ]
  assert {render(content) for content, _ in heldout if len(content) == 2} <= set(plain)


def test_recorded_mistakes_of_a_procedural_task_need_a_file():
  some = config(task__name="multiplication", task__min_size=3, task__max_size=5, data__path="", data__num_records=3)
  with pytest.raises(InputError, match="reads records from a file"):
    mixture.transcripts(some, "train")


def test_larger_problems_have_every_size_above_those_trained_on():
  found = problems.larger_problems(LARGER)
  assert {len(problem.steps) for problem in found} == {5, 6}  # trained on: 2 to 4
  assert len(found) == CONFIG.evaluate.num_problems
  assert {tasks.split_of(problem.key) for problem in found} == {"test"}
  assert problems.larger_problems(CONFIG) == []


def test_a_size_that_the_task_does_not_have_is_refused_by_the_name_of_its_key():
  some = dataclasses.replace(CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, max_size=99))
  with pytest.raises(InputError, match=r"^evaluate\.max_size=99, taken as task\.max_size: "):
    problems.larger_problems(some)


def test_thresholds_are_chosen_on_structures_that_are_neither_trained_on_nor_mined():
  found = problems.validation_problems(TASK, CONFIG)
  assert {tasks.split_of(problem.key) for problem in found} == {"validation"}
  assert len(found) == CONFIG.evaluate.num_problems
  mined = {problem.key for problem in tasks.problems(TASK, "mine", num=200, seed=CONFIG.seed)}
  assert not mined & {problem.key for problem in found}
  assert found == problems.validation_problems(TASK, CONFIG)
  assert problems.chosen_apart(CONFIG)


def test_from_a_file_thresholds_are_chosen_on_held_out_problems_that_are_not_solved(tmp_path):
  some = forty(tmp_path, evaluate__num_problems=4)
  task = tasks.get(some.task)
  solved, chosen_on = problems.problems_to_solve(task, some), problems.validation_problems(task, some)
  held = {record.content.prompt for _, record in problems.split_records(some, "heldout")}
  assert {problem.prompt for problem in chosen_on} <= held - {problem.prompt for problem in solved}
  assert len(chosen_on) == 4
  assert problems.chosen_apart(some)


def test_where_too_few_held_out_problems_are_left_those_trained_on_are_taken(tmp_path):
  some = forty(tmp_path, evaluate__num_problems=6)
  trained = [record.content for _, record in problems.split_records(some, "train")]
  assert problems.validation_problems(tasks.get(some.task), some) == trained[:6]
  assert not problems.chosen_apart(some)


def forty(tmp_path, **changes):
  return gsm8k(tmp_path, [question(number) for number in range(40)], **{"data__num_heldout": 10, **changes})


def test_problems_of_a_file_that_are_mined_are_those_trained_on_and_never_held_out(tmp_path):
  some = forty(tmp_path, mine__num_problems=100)
  found = problems.problems_to_mine(tasks.get(some.task), some, seed=0)
  held = {record.content.prompt for _, record in problems.split_records(some, "heldout")}
  assert len({problem.prompt for problem in found}) == len(found) == 30
  assert len(held) == 10
  assert not held & {problem.prompt for problem in found}
  few = forty(tmp_path, mine__num_problems=5)
  drawn_by = [
    [problem.prompt for problem in problems.problems_to_mine(tasks.get(few.task), few, seed=seed)] for seed in (0, 0, 1)
  ]
  assert drawn_by[0] == drawn_by[1] != drawn_by[2]
  assert len(drawn_by[0]) == 5


def test_a_file_without_problems_cannot_be_mined(tmp_path):
  some = gsm8k(tmp_path, [pieces(("text", "a"))])
  with pytest.raises(InputError, match="has no question and answer to mine; give a file of problems"):
    problems.problems_to_mine(tasks.get(some.task), some, seed=0)


def test_a_share_to_mine_that_takes_no_problem_is_named_and_to_be_raised(tmp_path):
  some = forty(tmp_path, data__to_mine=0.0001)
  with pytest.raises(InputError, match=r"^data.to_mine=0.0001 takes no question and answer of .*; raise it, or give"):
    problems.problems_to_mine(tasks.get(some.task), some, seed=0)


def test_procedural_problems_that_are_mined_are_of_the_split_mine():
  found = problems.problems_to_mine(TASK, CONFIG, seed=0)
  assert {tasks.split_of(problem.key) for problem in found} == {"mine"}


DIGESTS = {
  "graph": {
    "train": "1150971f",
    "heldout": "e3b0c442",
    "solve": "014ff9b8",
    "validate": "f616f9cb",
    "probe": "1d0fbd68",
    "mine": "56195224",
  },
  "gsm8k": {
    "train": "cf4f6cec",
    "heldout": "2f72c47f",
    "solve": "4017c52a",
    "validate": "8e2c9cba",
    "probe": "2f72c47f",
    "mine": "c0f7db6e",
  },
}


@pytest.mark.parametrize("name", ["graph", "gsm8k"])
def test_the_problems_of_every_purpose_are_those_of_earlier_versions(tmp_path, name):
  some = CONFIG if name == "graph" else forty(tmp_path, evaluate__num_problems=4, mine__num_problems=5)
  task = tasks.get(some.task)
  found = {
    **{split: [record.content for _, record in problems.split_records(some, split)] for split in ("train", "heldout")},
    "solve": problems.problems_to_solve(task, some),
    "validate": problems.validation_problems(task, some),
    "probe": problems.problems_to_probe(task, some),
    "mine": problems.problems_to_mine(task, some, seed=3),
  }
  texts = {purpose: "".join(p.prompt + "".join(p.steps) for p in chosen) for purpose, chosen in found.items()}
  assert {purpose: hashlib.sha256(text.encode()).hexdigest()[:8] for purpose, text in texts.items()} == DIGESTS[name]


def test_a_file_of_held_out_records_is_never_trained_on_and_repeats_are_named(tmp_path):
  test = write_lines(tmp_path / "test.jsonl", [question(number) for number in (3, 90, 91)])
  some = gsm8k(tmp_path, [question(number) for number in range(10)], data__heldout_path=test)
  left_out = []
  train = mixture.transcripts(some, "train", left_out=left_out)
  assert [where for _, where in train] == [f"{tmp_path}/r.jsonl:{n}" for n in range(1, 11) if n != 4]
  assert left_out == [f"{tmp_path}/r.jsonl:4"]
  assert [where for _, where in mixture.transcripts(some, "heldout")] == [f"{test}:{n}" for n in (1, 2, 3)]
  solved = problems.problems_to_solve(tasks.get(some.task), some)
  assert [problem.prompt for problem in solved] == ["What is 3 + 1?\n"][: some.evaluate.num_problems]
  data = pipeline.load_data(some, vocabulary.add_markers(bpe_tokenizer(), some.tokenizer).tokenizer)
  assert "held-out prompts  1 records to train on had one, left out" in data.receipt
  assert data.left_out.to_json_lines() == (
    f'{{"split": "train", "where": "{tmp_path}/r.jsonl:4", "why": "its prompt is held out"}}\n'
  )


def test_what_mistakes_are_put_in_does_not_depend_on_a_file_of_held_out_records(tmp_path):
  lines = [question(number) for number in range(10)]
  test = write_lines(tmp_path / "test.jsonl", [question(3)])
  alone = {where: content for content, where in mixture.transcripts(gsm8k(tmp_path, lines), "train")}
  beside = mixture.transcripts(gsm8k(tmp_path, lines, data__heldout_path=test), "train")
  assert [content for content, _ in beside] == [alone[where] for _, where in beside]


def test_a_file_of_held_out_records_that_leaves_none_to_train_on_is_refused(tmp_path):
  lines = [question(1), question(2)]
  some = gsm8k(tmp_path, lines, data__heldout_path=write_lines(tmp_path / "t.jsonl", lines))
  with pytest.raises(InputError, match="none is left to train on"):
    mixture.transcripts(some, "train")


def test_a_file_of_held_out_records_that_would_not_be_read_is_refused(tmp_path):
  changes = {"task__min_size": 3, "task__max_size": 5, "data__num_records": 3, "mistakes__source": "injected"}
  with pytest.raises(InputError, match="this config reads "):
    config(task__name="multiplication", data__path="", data__heldout_path=str(tmp_path / "t.jsonl"), **changes)

"""A view keeps of a mined record what its arm trains on, and nothing else."""

import collections
import dataclasses
import itertools
import json

import datakit
import numpy as np
import pytest
from miningkit import CLASSES, CONFIG, MARKERS, PROBLEMS, TASK, right, said, wrong

from insec_jax.command import InputError
from insec_jax.data import mixture, pipeline, views, vocabulary
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, NAMES, PROMPT, REASON, TEXT
from insec_jax.method.transcript import Piece, clean, split_steps
from insec_jax.mining.judging import Mistake, Sample, judge
from insec_jax.mining.records import as_json, corrected_transcript, with_trained_ends

SURE = ("<|sure_0|>", "<|sure_1|>")
VIEWS = ("full", "dagger", "silent", "shuffled", "right")


def config(view, path="mined.jsonl", **changes):
  mistakes = dataclasses.replace(CONFIG.mistakes, mined=1.0, mined_path=path, view=view)
  return dataclasses.replace(CONFIG, mistakes=mistakes, **changes)


def pieces(*texts):
  return tuple(Piece(NAMES.index(role), text) for role, text in texts)


ONE = pieces(
  ("prompt", "p"),
  ("text", "a"),
  ("mistake", "b"),
  ("flag", MARKERS.flag),
  ("reason", "r"),
  ("flag", MARKERS.fix),
  ("correction", "c"),
  ("text", "d"),
)
AGAIN = (*ONE[:6], *pieces(("mistake", "e"), ("flag", MARKERS.flag), ("flag", MARKERS.fix)), *ONE[6:])


@pytest.mark.parametrize(
  ("view", "record", "kept"),
  [
    ("full", ONE, [0, 1, 2, 3, 4, 5, 6, 7]),
    ("dagger", ONE, [0, 1, 6, 7]),
    ("silent", ONE, [0, 1, 2, 6, 7]),
    ("dagger", AGAIN, [0, 1, 9, 10]),  # a failed correction goes with its mistake
    ("silent", AGAIN, [0, 1, 2, 6, 9, 10]),
    ("right", ONE, None),
    ("right", ONE[:2], [0, 1]),
  ],
)
def test_a_view_keeps_the_pieces_that_its_arm_trains_on(view, record, kept):
  found = views.viewed([(record, "here"), (ONE[:1], "there")], config(view))
  assert found == [*([(tuple(record[k] for k in kept), "here")] if kept else []), (ONE[:1], "there")]


def test_confidence_tokens_stay_with_the_steps_that_stay():
  sure = datakit.config(
    task__name="graph",
    task__min_size=3,
    task__max_size=4,
    task__modulus=10,
    data__path="",
    data__num_records=1,
    data__num_heldout=0,
    mistakes__source="injected",
    mistakes__mined=1.0,
    mistakes__mined_path="mined.jsonl",
    tokenizer__confidence=(0.5,),
  )
  record = (*ONE[:2], Piece(FLAG, SURE[0]), ONE[2], Piece(FLAG, SURE[1]), *ONE[3:7], Piece(FLAG, SURE[0]), ONE[7])
  for view, text in (("dagger", "pa<0>c<0>d"), ("silent", "pa<0>b<1>c<0>d")):
    some = dataclasses.replace(sure, mistakes=dataclasses.replace(sure.mistakes, view=view))
    ((found, _),) = views.viewed([(record, "here")], some)
    assert "".join(piece.text for piece in found).replace("<|sure_", "<").replace("|>", ">") == text


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
  """The path of a file of mined records: two wrong solutions of each problem, and four right ones."""
  records = []
  for problem, number in itertools.product(PROBLEMS, range(2)):
    sample = judge(problem, said(wrong(problem, number)), TASK, MARKERS, "line")
    record = corrected_transcript(problem, sample, TASK, MARKERS, reason="label", unit="line")
    records.append([as_json(piece) for piece in with_trained_ends(record)])
  records += [
    [{"role": "prompt", "text": problem.prompt}, {"role": "text", "text": right(problem)}] for problem in PROBLEMS[:4]
  ]
  path = tmp_path_factory.mktemp("views") / "mined.jsonl"
  path.write_text("".join(json.dumps({"pieces": record}) + "\n" for record in records))
  return str(path)


def test_every_view_has_the_same_records_of_the_same_problems(mined):
  found = {view: list(mixture.transcripts(config(view, mined), "train")) for view in VIEWS}
  assert [len(found[view]) for view in VIEWS] == [52, 52, 52, 52, 4]
  for view in ("dagger", "silent"):
    assert [clean(content) for content, _ in found[view]] == [clean(content) for content, _ in found["full"]]
  assert {where for _, where in found["full"]} == {where for _, where in found["shuffled"]}


def test_a_shuffled_correction_is_another_ones_and_the_checker_finds_it_wrong(mined):
  full, shuffled = (mixture.transcripts(config(view, mined), "train") for view in ("full", "shuffled"))
  same, num = 0, 0
  for (content, _), (own, _) in zip(shuffled, full, strict=True):
    problem = TASK.problem_of(content[0].text)
    kept = [piece for piece in content if piece.role != CORRECTION]
    assert clean(kept) == clean(own)  # the right step follows, as text
    for k, piece in enumerate(content):
      if piece.role == CORRECTION:
        stated = "".join(one.text for one in content[:k] if one.role == TEXT)
        before = split_steps(stated, "line") if stated else ()
        num += 1
        assert TASK.check(problem, before, piece.text).kind == "wrong"
        assert piece.text.strip() != next(one.text for one in content if one.role == MISTAKE)
        reason, label = content[k - 2].text, next(one.text for one in own if one.role == REASON)
        same += any(reason.startswith(error) and label.startswith(error) for error in CLASSES)
    roles = [piece.role for piece in content if piece.role not in (TEXT, PROMPT)]
    assert roles in ([], [MISTAKE, MISTAKE, FLAG, REASON, FLAG, CORRECTION])
  assert num == 48
  assert same > 40  # of the same class
  again = mixture.transcripts(config("shuffled", mined), "train")
  other = mixture.transcripts(config("shuffled", mined, seed=1), "train")
  assert list(again) == list(shuffled) != list(other)


def test_where_nothing_right_was_to_be_mined_the_view_right_says_so(mined, tmp_path):
  with open(mined) as file:
    (tmp_path / "few.jsonl").write_text("".join(file.readlines()[:9]))
  some = config("right", str(tmp_path / "few.jsonl"))
  some = dataclasses.replace(some, mine=dataclasses.replace(some.mine, right=0.0))
  with pytest.raises(
    InputError, match=r"none of the 9 is; mine\.right=0 keeps none: mine with a larger one, such as 1"
  ):
    mixture.transcripts(some, "train")


@pytest.mark.parametrize(
  ("view", "lines", "message"),
  [
    ("shuffled", slice(0, 1), "finds no correction of another mistake that is wrong here"),
    ("right", slice(0, 9), "none of the 9 is; mine again with mine.right above 0 and more than mine.num_problems="),
  ],
)
def test_a_view_that_leaves_nothing_is_refused(mined, tmp_path, view, lines, message):
  with open(mined) as file:
    (tmp_path / "few.jsonl").write_text("".join(file.readlines()[lines]))
  with pytest.raises(InputError, match=message):
    mixture.transcripts(config(view, str(tmp_path / "few.jsonl")), "train")


def test_a_shuffled_correction_is_not_the_mistake_again():
  problem = PROBLEMS[0]
  first = problem.steps[0]
  repeated = Sample("wrong", (first,), (Mistake(1, first, "repeat"),))
  other = Sample("wrong", (), (Mistake(0, "ab\n", "malformed"),))  # its correction is the step that is repeated
  records = [
    corrected_transcript(problem, sample, TASK, MARKERS, reason="label", unit="line") for sample in (repeated, other)
  ]
  with pytest.raises(InputError, match=r"^m:1: mistakes\.view='shuffled' finds no correction of another mistake"):
    views.viewed([(record, f"m:{number}") for number, record in enumerate(records, 1)], config("shuffled"))


def test_shuffled_needs_prompts_of_the_task(tmp_path):
  record = {"pieces": [{"role": NAMES[piece.role], "text": piece.text} for piece in ONE]}
  (tmp_path / "m.jsonl").write_text(json.dumps(record) + "\n")
  with pytest.raises(InputError, match=r"m\.jsonl:1: .* its prompt 'p' is none of task\.name='graph'"):
    mixture.transcripts(config("shuffled", str(tmp_path / "m.jsonl")), "train")


def test_the_receipt_shows_the_view_and_what_it_leaves(mined):
  tokenizer = vocabulary.open_tokenizer(CONFIG).tokenizer
  count = collections.Counter()
  for view in VIEWS:
    data = pipeline.load_data(config(view, mined), tokenizer)
    assert f"mined records     100% of all, view {view}\n" in data.receipt
    for role in (MISTAKE, FLAG, REASON, CORRECTION):
      count[view, role] = int(np.sum(data.train.role_BT == role))
  for view, roles in {
    "dagger": (CORRECTION,),
    "silent": (MISTAKE, CORRECTION),
    "shuffled": (MISTAKE, FLAG, REASON, CORRECTION),
    "right": (),
  }.items():
    assert {role for role in (MISTAKE, FLAG, REASON, CORRECTION) if count[view, role]} == set(roles)
    assert all(count[view, role] == count["full", role] for role in roles if role != REASON)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mistakes__view": "dagger"}, r"mistakes\.view='dagger' is about mined records, and mistakes\.mined=0"),
    ({"mistakes__mined_from": "next_seed"}, r"mistakes\.mined_from='next_seed' is about mined records"),
    (
      {"mistakes__view": "shuffled", "mistakes__mined": 0.5, "mistakes__mined_path": "m.jsonl"},
      "task.name='records' has no checker",
    ),
    ({"data__to_mine": 1.5}, r"data\.to_mine=1\.5; must be a number between 0 and 1"),
  ],
)
def test_a_view_without_what_it_is_of_is_refused(changes, message):
  with pytest.raises(InputError, match=message):
    datakit.config(**changes)

"""Mined records are mixed in at the share asked for, and leave everything else as it is."""

import collections
import itertools

import pytest
from datakit import config, write_lines

from insec_jax.command import InputError
from insec_jax.data import records
from insec_jax.method.roles import MISTAKE

GRAPH = {
  "task__name": "graph",
  "task__min_size": 2,
  "task__max_size": 3,
  "task__modulus": 10,
  "data__path": "",
  "data__num_records": 60,
  "data__num_heldout": 5,
  "mistakes__source": "injected",
  "mistakes__share": 0.5,
}


def mined_file(tmp_path, num=4, prompt="p"):
  return write_lines(
    tmp_path / "mined.jsonl",
    [
      {
        "pieces": [{"role": "prompt", "text": f"{prompt}{number}"}, {"role": "text", "text": "t"}],
        "meta": {"class": "x"},
      }
      for number in range(num)
    ],
  )


def mixed(tmp_path, share, num=4, **changes):
  """(number of others, how often each mined record comes, the transcripts)."""
  some = config(**{**GRAPH, "mistakes__mined": share, "mistakes__mined_path": mined_file(tmp_path, num), **changes})
  found = records.transcripts(some, "train")
  mined = collections.Counter(where for _, where in found if "mined.jsonl" in where)
  return len(found) - sum(mined.values()), mined, found


@pytest.mark.parametrize(("share", "num_mined"), [(0.25, 20), (0.5, 60), (0.04, 2), (0.9, 540)])
def test_the_share_is_that_of_the_whole_and_mined_records_come_equally_often(tmp_path, share, num_mined):
  others, mined, _ = mixed(tmp_path, share)
  assert (others, sum(mined.values())) == (60, num_mined)
  assert max(mined.values()) - min(mined.values()) <= 1
  assert len(mined) == min(4, num_mined)


def test_mined_alone_are_each_there_once(tmp_path):
  others, mined, _ = mixed(tmp_path, 1.0)
  assert others == 0
  assert list(mined.values()) == [1, 1, 1, 1]


def test_mined_records_are_spread_evenly_and_the_others_stay_in_order(tmp_path):
  _, _, found = mixed(tmp_path, 0.25)
  places = [k for k, (_, where) in enumerate(found) if "mined.jsonl" in where]
  assert {after - before for before, after in itertools.pairwise(places)} <= {3, 4, 5}
  assert [one for one in found if "mined.jsonl" not in one[1]] == records.transcripts(config(**GRAPH), "train")


def test_clean_injected_and_mined_stand_side_by_side(tmp_path):
  _, _, found = mixed(tmp_path, 0.25)
  others = [content for content, where in found if "mined.jsonl" not in where]
  assert 15 < sum(MISTAKE in [piece.role for piece in content] for content in others) < 45


def test_which_come_when_fewer_are_needed_is_drawn_by_the_seed(tmp_path):
  picks = [tuple(mixed(tmp_path, 0.1, num=50)[1]) for _ in range(2)]
  assert picks[0] == picks[1]
  assert len(picks[0]) == 7
  assert [int(where.rsplit(":", 1)[1]) for where in picks[0]] != list(range(1, 8))


def test_held_out_transcripts_stay_without(tmp_path):
  some = config(**GRAPH, mistakes__mined=0.5, mistakes__mined_path=mined_file(tmp_path))
  assert records.transcripts(some, "heldout") == records.transcripts(config(**GRAPH), "heldout")


def test_a_mined_record_of_a_held_out_problem_is_refused(tmp_path):
  held, _ = records.problems(config(**GRAPH), "heldout")[2]
  path = write_lines(
    tmp_path / "m.jsonl",
    [{"pieces": [{"role": "prompt", "text": prompt}, {"role": "text", "text": "t"}]} for prompt in ("p", held.prompt)],
  )
  with pytest.raises(InputError, match=r"m\.jsonl:2: its prompt is held out here"):
    records.transcripts(config(**GRAPH, mistakes__mined=0.5, mistakes__mined_path=path), "train")


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ({"question": "a", "answer": "1\n#### 1"}, r"m\.jsonl:1: a mined record has pieces"),
    ({"pieces": []}, r"m\.jsonl:1: pieces is"),
  ],
)
def test_a_file_that_mine_did_not_write_is_refused(tmp_path, line, message):
  path = write_lines(tmp_path / "m.jsonl", [line])
  with pytest.raises(InputError, match=message):
    records.transcripts(config(**GRAPH, mistakes__mined=0.5, mistakes__mined_path=path), "train")


def test_a_missing_and_an_empty_mined_file_are_refused(tmp_path):
  for name, message in (("none.jsonl", r"mistakes\.mined_path: cannot read .*none\.jsonl"), ("e.jsonl", "is empty")):
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(InputError, match=message):
      records.transcripts(config(**GRAPH, mistakes__mined=0.5, mistakes__mined_path=str(tmp_path / name)), "train")

"""Records get their mistakes by source; mined ones are mixed in at the share asked for and leave all else unchanged."""

import collections
import dataclasses
import itertools

import pytest
from datakit import config, gsm8k, pieces, question, write_lines

from insec_jax.command import InputError
from insec_jax.data import mixture
from insec_jax.data.problems import split_records
from insec_jax.data.records import Chat
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT
from insec_jax.method.transcript import Piece, clean, render


def test_problems_of_a_file_get_injected_mistakes_and_finished_records_stay(tmp_path):
  finished = pieces(("prompt", "q"), ("mistake", "a"), ("flag", "<err>"), ("flag", "<fix>"), ("correction", "b"))
  some = gsm8k(tmp_path, [question(number) for number in range(20)] + [finished], mistakes__share=1.0)
  *injected, (kept, _) = mixture.transcripts(some, "train")
  assert all(MISTAKE in [piece.role for piece in content] for content, _ in injected)
  assert [piece.role for piece in kept] == [PROMPT, MISTAKE, FLAG, FLAG, CORRECTION]


def test_what_a_problem_becomes_does_not_hang_on_which_others_are_read(tmp_path):
  some = gsm8k(tmp_path, [question(number) for number in range(20)])
  few = gsm8k(tmp_path, [question(number) for number in range(20)], data__num_records=7)
  assert mixture.transcripts(some, "train")[:7] == list(mixture.transcripts(few, "train"))
  other = gsm8k(tmp_path, [question(number) for number in range(20)], data__num_heldout=5)
  assert set(mixture.transcripts(other, "train")) < set(mixture.transcripts(some, "train"))


@pytest.mark.parametrize("source", ["recorded", "mined"])
def test_problems_stay_clean_when_mistakes_come_from_the_file(tmp_path, source):
  ((content, _),) = mixture.transcripts(
    gsm8k(tmp_path, [question(4)], mistakes__source=source, mistakes__share=1.0), "train"
  )
  assert content == (Piece(PROMPT, "What is 4 + 1?\n"), Piece(TEXT, "4 + 1 = 5\n#### 5\n"))


CITIES = ["Riga", "Turin", "Porto", "Ghent", "Malmo", "Cadiz"]


def stories():
  """Answers of two sentences, chats and plain texts about different cities, two of each form."""
  say = [
    f"The mayor of {city} is {40 + k} years old. In {city} the bridge was built in 19{k}5 by monks of {city}."
    for k, city in enumerate(CITIES)
  ]
  ask = [f"Tell me about {city} and its mayor." for city in CITIES]
  return [
    *({"question": ask[k], "answer": say[k]} for k in (0, 1)),
    *({"messages": [{"role": "user", "content": ask[k]}, {"role": "assistant", "content": say[k]}]} for k in (2, 3)),
    *({"text": f"{ask[k]} {say[k]}"} for k in (4, 5)),
  ]


def prose(tmp_path, lines, **changes):
  changes = {"task__name": "records", "mistakes__share": 1.0, "mistakes__unit": "sentence", **changes}
  return gsm8k(tmp_path, lines, **changes)


def flat(content):
  """The pieces of a transcript or of all turns of a chat."""
  return [piece for turn in content.turns for piece in turn.pieces] if isinstance(content, Chat) else list(content)


@pytest.mark.parametrize("error", ["sentence", "number", "entity", "negation"])
def test_questions_chats_and_plain_texts_get_mistakes_without_a_checker(tmp_path, error):
  lines = stories()
  found = mixture.transcripts(prose(tmp_path, lines, mistakes__classes=(error,)), "train")
  whole = mixture.transcripts(prose(tmp_path, lines, mistakes__share=0.0), "train")
  for (content, where), (right, _), line in zip(found, whole, lines, strict=True):
    pieces = flat(content)
    assert [piece.role for piece in pieces].count(MISTAKE) == 1, where
    assert clean(pieces) == render(flat(right))
    assert isinstance(content, Chat) == ("messages" in line)
    # A text without a prompt keeps its first sentence: nothing before it could say that it is wrong.
    assert pieces[0].role == (TEXT if "text" in line else PROMPT)


def test_a_chat_gets_mistakes_in_any_answer_and_keeps_its_turns(tmp_path):
  said = [
    ("assistant", "Good day."),
    ("user", "Who paid 70 coins?"),
    ("assistant", "Anna paid 71 coins. Bela paid 12."),
    ("user", "And then?"),
    ("assistant", "Carl paid 93 coins."),
  ]
  line = {"messages": [{"role": role, "content": content} for role, content in said]}
  some = prose(tmp_path, [line], mistakes__classes=("number",), mistakes__max_per_solution=4)
  seen = set()
  for seed in range(12):
    ((chat, _),) = mixture.transcripts(dataclasses.replace(some, seed=seed), "train")
    assert [(turn.speaker, clean(turn.pieces)) for turn in chat.turns] == said
    put = [
      (turn.pieces[k].text, turn.pieces[k + 4 if turn.pieces[k + 2].role == REASON else k + 3].text)
      for turn in chat.turns
      for k, piece in enumerate(turn.pieces)
      if piece.role == MISTAKE
    ]
    assert all(wrong.split()[0] == right.split()[0] for wrong, right in put)
    seen |= {right.split()[0] for _, right in put}
  assert seen == {"Anna", "Bela", "Carl"}


def test_what_is_held_out_lends_nothing_to_what_is_trained_on(tmp_path):
  lines = [
    {"question": f"{city}?", "answer": f"Word{letter} lives here. Thing{letter} stands there."}
    for city, letter in zip(CITIES, "abcdef", strict=True)
  ]
  some = prose(tmp_path, lines, mistakes__classes=("sentence",), data__num_heldout=3)
  for split in ("train", "heldout"):
    found = [flat(content) for content, _ in mixture.transcripts(some, split)]
    here = "".join(clean(pieces) for pieces in found)
    mistakes = [piece.text for pieces in found for piece in pieces if piece.role == MISTAKE]
    assert len(mistakes) == 3
    assert all(mistake.strip() in here for mistake in mistakes)


def test_prose_in_which_no_mistake_is_possible_is_refused(tmp_path):
  lines = [{"question": "Why?", "answer": "Nobody knows. Not even we."}]
  with pytest.raises(InputError, match=r"r\.jsonl: no mistake of class number is possible in any of the 1 records"):
    mixture.transcripts(prose(tmp_path, lines, mistakes__classes=("number",)), "train")
  with pytest.raises(InputError, match=r"'calc'; where nothing checks the steps .* sentence, number, entity, negation"):
    mixture.transcripts(prose(tmp_path, lines, mistakes__classes=("calc",)), "train")


def test_an_answer_in_prose_needs_a_task_that_checks_nothing(tmp_path):
  lines = [{"question": "Who? ", "answer": " Anna.\nNot Bela."}, question(2)]
  some = prose(tmp_path, lines, mistakes__share=0.0)
  (first, _), (second, _) = mixture.transcripts(some, "train")
  assert first == (Piece(PROMPT, "Who?\n"), Piece(TEXT, "Anna.\nNot Bela.\n"))
  assert second == (Piece(PROMPT, "What is 2 + 1?\n"), Piece(TEXT, "2 + 1 = 3\n#### 3\n"))
  with pytest.raises(InputError, match=r"r\.jsonl:1: answer ends in 'Not Bela\.'; its last line must be"):
    mixture.transcripts(gsm8k(tmp_path, lines), "train")
  with pytest.raises(InputError, match=r"r\.jsonl:1: answer is white space"):
    mixture.transcripts(prose(tmp_path, [{"question": "Who?", "answer": " "}]), "train")


MARKS = {
  "a mistake without a flag": ((("mistake", "a"), ("correction", "b")), "the mistake 'a' is not flagged"),
  "a mistake at the end": ((("text", "a"), ("mistake", "b")), "the mistake 'b' is not flagged"),
  "a flag that nothing closes": (
    (("mistake", "a"), ("flag", "<err>"), ("reason", "r"), ("text", "b")),
    "the flag '<err>' is not closed",
  ),
  "two flags": (
    (("mistake", "a"), ("flag", "<err>"), ("flag", "<err>"), ("flag", "<fix>"), ("correction", "b")),
    "the flag '<err>' is not closed",
  ),
  "a fix that closes nothing": ((("text", "a"), ("flag", "<fix>"), ("correction", "b")), "closes no flag"),
  "a fix in place of a flag": ((("mistake", "a"), ("flag", "<fix>"), ("correction", "b")), "'a' is not flagged"),
  "no correction": (
    (("mistake", "a"), ("flag", "<err>"), ("flag", "<fix>"), ("text", "b")),
    "after the fix '<fix>' there is no correction",
  ),
  "no more after the fix": ((("mistake", "a"), ("flag", "<err>"), ("flag", "<fix>")), "there is no correction"),
  "a correction that is the mistake": (
    (("mistake", "a\n"), ("flag", "<err>"), ("flag", "<fix>"), ("correction", "a")),
    "'a' is the mistake again",
  ),
  "a correction that is the mistake before the last": (
    (
      ("mistake", "a"),
      ("flag", "<err>"),
      ("flag", "<fix>"),
      ("mistake", "b"),
      ("flag", "<err>"),
      ("flag", "<fix>"),
      ("correction", "a"),
    ),
    "'a' is the mistake again",
  ),
}


@pytest.mark.parametrize("form", ["pieces", "spans"])
@pytest.mark.parametrize("defect", MARKS)
def test_a_recorded_mistake_that_is_not_put_right_is_refused_with_file_and_line(tmp_path, defect, form):
  marked, message = MARKS[defect]
  line = pieces(("prompt", "q"), *marked)
  if form == "spans":
    line = as_spans(line)
  with pytest.raises(InputError) as raised:
    list(
      mixture.transcripts(
        config(data__path=write_lines(tmp_path / "r.jsonl", [pieces(("text", "fine")), line])), "train"
      )
    )
  assert str(raised.value).startswith(f"{tmp_path}/r.jsonl:2: ")
  assert message in str(raised.value)
  assert "\n" not in str(raised.value)


def as_spans(line):
  spans, text = [], ""
  for piece in line["pieces"]:
    spans.append({"start": len(text), "end": len(text) + len(piece["text"]), "role": piece["role"]})
    text += piece["text"]
  return {"text": text, "spans": spans}


@pytest.mark.parametrize(
  "marked",
  [
    (
      ("mistake", "a"),
      ("mistake", "b"),
      ("flag", "<err>\n"),
      ("reason", "r"),
      ("reason", "s"),
      ("flag", "<fix>"),
      ("correction", "c"),
      ("correction", "d"),
      ("text", "e"),
    ),
    (
      ("mistake", "a"),
      ("flag", "<err>"),
      ("flag", "<fix>"),
      ("mistake", "b"),
      ("flag", "<err>"),
      ("flag", "<fix>"),
      ("correction", "c"),
    ),
    (("mistake", "  a"), ("flag", "<err>"), ("flag", "<fix>"), ("correction", "a")),
    (("flag", "<err>"), ("reason", "you are wrong"), ("flag", "<fix>"), ("correction", "c")),
    (("text", "a"), ("correction", "b")),
  ],
)
def test_recorded_mistakes_that_are_put_right_are_taken_as_they_are(tmp_path, marked):
  line = pieces(("prompt", "q"), *marked)
  path = write_lines(tmp_path / "r.jsonl", [line, as_spans(line)])
  known, spans = [content for content, _ in mixture.transcripts(config(data__path=path), "train")]
  assert known == spans
  assert [piece.text for piece in known] == [text for _, text in [("prompt", "q"), *marked]]


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
  found = mixture.transcripts(some, "train")
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
  assert [one for one in found if "mined.jsonl" not in one[1]] == list(mixture.transcripts(config(**GRAPH), "train"))


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
  assert list(mixture.transcripts(some, "heldout")) == list(mixture.transcripts(config(**GRAPH), "heldout"))


def test_a_mined_record_of_a_held_out_problem_is_refused(tmp_path):
  _, held = split_records(config(**GRAPH), "heldout")[2]
  path = write_lines(
    tmp_path / "m.jsonl",
    [pieces(("prompt", prompt), ("text", "t")) for prompt in ("p", held.content.prompt)],
  )
  with pytest.raises(InputError, match=r"m\.jsonl:2: its prompt is held out here"):
    mixture.transcripts(config(**GRAPH, mistakes__mined=0.5, mistakes__mined_path=path), "train")


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
    mixture.transcripts(config(**GRAPH, mistakes__mined=0.5, mistakes__mined_path=path), "train")


def test_a_missing_and_an_empty_mined_file_are_refused(tmp_path):
  for name, message in (("none.jsonl", r"mistakes\.mined_path: cannot read .*none\.jsonl"), ("e.jsonl", "is empty")):
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(InputError, match=message):
      mixture.transcripts(config(**GRAPH, mistakes__mined=0.5, mistakes__mined_path=str(tmp_path / name)), "train")

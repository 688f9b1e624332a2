import dataclasses

import pytest
from datakit import config, write_lines

from insec_jax.command import InputError
from insec_jax.data import records
from insec_jax.data.records import Chat, PlainRecord, Turn
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT
from insec_jax.method.tasks import Problem
from insec_jax.method.transcript import Piece, clean, render


def contents(tmp_path, *lines, limit=0):
  return [record.content for record in records.read(write_lines(tmp_path / "r.jsonl", lines), limit=limit)]


def question(number):
  return {
    "question": f"What is {number} + 1?",
    "answer": f"{number} + 1 = <<{number}+1={number + 1}>>{number + 1}\n#### {number + 1}",
  }


def pieces(*texts):
  return {"pieces": [{"role": role, "text": text} for role, text in texts]}


def test_each_of_the_five_formats_gives_its_roles(tmp_path):
  plain, problem, chat, known, spans = contents(
    tmp_path,
    {"text": "héllo"},
    question(2),
    {
      "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
      ]
    },
    {
      "pieces": [{"role": "prompt", "text": "q"}, {"role": "correction", "text": "c", "weight": 2}],
      "meta": {"by": "hand"},
    },
    {
      "text": "héllo wörld",
      "spans": [{"start": 6, "end": 8, "role": "mistake"}, {"start": 0, "end": 1, "role": "prompt", "weight": -1}],
    },
  )
  assert plain == PlainRecord("", "héllo")
  assert isinstance(problem, Problem)
  assert (problem.prompt, problem.steps) == ("What is 2 + 1?\n", ("2 + 1 = 3\n", "#### 3\n"))
  assert chat == Chat(
    (Turn("system", (Piece(PROMPT, "s"),)), Turn("user", (Piece(PROMPT, "u"),)), Turn("assistant", (Piece(TEXT, "a"),)))
  )
  assert known == (Piece(PROMPT, "q"), Piece(CORRECTION, "c", 2.0))
  assert spans == (Piece(PROMPT, "h", -1.0), Piece(TEXT, "éllo "), Piece(MISTAKE, "wö"), Piece(TEXT, "rld"))


SPAN = {"start": 0, "end": 2, "role": "mistake"}
DEFECTS = {
  "malformed JSON": ('{"text": "a"', "not JSON at column"),
  "an empty line": ("", "not JSON at column 1"),
  "bytes that are not UTF-8": (b'{"text": "\xff"}', "byte 10 is not UTF-8"),
  "no object": ("[1]", "holds list"),
  "unknown keys": ({"text": "a", "span": []}, "keys are span, text; needed are"),
  "two formats at once": ({**question(1), "messages": []}, "keys are answer, messages, question"),
  "no keys": ({}, "keys are none"),
  "an unknown role": (pieces(("mistaek", "a")), "pieces[0].role is 'mistaek'; must be one of prompt, text"),
  "a role that is a list": ({"pieces": [{"role": [], "text": "a"}]}, "role is []"),
  "a piece without text": ({"pieces": [{"role": "text"}]}, "pieces[0] has role; must be an object with role, text"),
  "an empty piece": (pieces(("text", "a"), ("mistake", "")), "pieces[1].text is ''; must be text that is not empty"),
  "a text that is a number": (pieces(("text", 3)), "pieces[0].text is 3"),
  "no pieces": ({"pieces": []}, "pieces is []"),
  "pieces that are no list": ({"pieces": {"role": "text"}}, "pieces is {"),
  "a weight that is not finite": ({"pieces": [{"role": "text", "text": "a", "weight": float("nan")}]}, "NaN is no"),
  "an infinite weight": ('{"pieces": [{"role": "text", "text": "a", "weight": 1e400}]}', "number 1e400 is too large"),
  "a weight too large to add up": (
    {"pieces": [{"role": "text", "text": "a", "weight": -1e7}]},
    "pieces[0].weight is -10000000.0; must be a number from -1000000 to 1000000",
  ),
  "a weight of many digits": ('{"pieces": [{"role": "text", "text": "a", "weight": %s}]}' % ("9" * 400), "weight is 9"),
  "a number of more digits": ('{"pieces": [{"role": "text", "text": "a", "weight": %s}]}' % ("9" * 5000), "digits"),
  "deep nesting": ('{"text": %s' % ("[" * 100_000), "nested too deeply"),
  "a key given twice": ('{"text": "a", "text": "b"}', "the key 'text' is given twice"),
  "a weight that is a word": ({"pieces": [{"role": "text", "text": "a", "weight": "1"}]}, "weight is '1'"),
  "half a surrogate pair": (
    '{"pieces": [{"role": "text", "text": "a\\ud800"}]}',
    "half a surrogate pair at character 1",
  ),
  "overlapping spans": ({"text": "abcd", "spans": [{**SPAN, "start": 1, "end": 3}, SPAN]}, "begins before the one"),
  "a span past the end": ({"text": "a", "spans": [SPAN]}, "spans[0] goes from 0 to 2; must be whole numbers"),
  "an empty span": ({"text": "abc", "spans": [{**SPAN, "end": 0}]}, "spans[0] goes from 0 to 0"),
  "a negative span": ({"text": "abc", "spans": [{**SPAN, "start": -1}]}, "spans[0] goes from -1"),
  "a span from half a character": ({"text": "abc", "spans": [{**SPAN, "start": 0.5}]}, "spans[0] goes from 0.5"),
  "an unknown role of a span": ({"text": "abc", "spans": [{**SPAN, "role": "x"}]}, "spans[0].role is 'x'"),
  "an unknown speaker": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool'"),
  "a message of parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content is ["),
  "a message with tool calls": (
    {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
    "messages[0] has content, role, tool_calls",
  ),
  "a question that is empty": ({"question": "", "answer": "#### 1"}, "question is ''"),
  "an answer without a result": ({"question": "1?", "answer": "one"}, ""),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_one_line_that_names_file_and_line(tmp_path, defect):
  line, message = DEFECTS[defect]
  with pytest.raises(InputError) as raised:
    contents(tmp_path, pieces(("text", "fine")), line)
  assert str(raised.value).startswith(f"{tmp_path}/r.jsonl:2: ")
  assert message in str(raised.value)
  assert "\n" not in str(raised.value)


def test_a_missing_file_and_an_empty_file_are_refused(tmp_path):
  with pytest.raises(InputError, match=r"data\.path: cannot read .*none\.jsonl"):
    list(records.read(str(tmp_path / "none.jsonl"), limit=0))
  with pytest.raises(InputError, match=r"r\.jsonl is empty"):
    contents(tmp_path)


def test_the_limit_is_how_many_records_are_read(tmp_path):
  assert len(contents(tmp_path, question(1), question(2), "not read", limit=2)) == 2


def gsm8k(tmp_path, lines, **changes):
  path = write_lines(tmp_path / "r.jsonl", lines)
  return config(**{"task__name": "gsm8k", "data__path": path, "mistakes__source": "injected", **changes})


def test_held_out_records_are_never_trained_on_and_one_prompt_is_on_one_side(tmp_path):
  lines = [question(number) for number in range(40)] + [
    pieces(("prompt", f"What is {number % 20} + 1?\n"), ("text", "?")) for number in range(40)
  ]
  some = gsm8k(tmp_path, lines, data__num_heldout=12)
  train, heldout = records.transcripts(some, "train"), records.transcripts(some, "heldout")
  prompts = [{content[0].text for content, _ in split} for split in (train, heldout)]
  assert not prompts[0] & prompts[1]
  assert len(train) + len(heldout) == 80
  assert 12 <= len(heldout) <= 14
  assert sorted(where for _, where in train + heldout) == sorted(
    f"{tmp_path}/r.jsonl:{number}" for number in range(1, 81)
  )


def test_holding_everything_out_is_refused(tmp_path):
  with pytest.raises(InputError, match="leaves none of the 3 records read to train on"):
    records.transcripts(gsm8k(tmp_path, [question(number) for number in range(3)], data__num_heldout=3), "train")


def test_problems_of_a_file_get_injected_mistakes_and_finished_records_stay_as_they_are(tmp_path):
  finished = pieces(("prompt", "q"), ("mistake", "a"), ("flag", "<err>"), ("flag", "<fix>"), ("correction", "b"))
  some = gsm8k(tmp_path, [question(number) for number in range(20)] + [finished], mistakes__share=1.0)
  *injected, (kept, _) = records.transcripts(some, "train")
  assert all(MISTAKE in [piece.role for piece in content] for content, _ in injected)
  assert [piece.role for piece in kept] == [PROMPT, MISTAKE, FLAG, FLAG, CORRECTION]


def test_what_a_problem_becomes_does_not_hang_on_which_others_are_read(tmp_path):
  some = gsm8k(tmp_path, [question(number) for number in range(20)])
  few = gsm8k(tmp_path, [question(number) for number in range(20)], data__num_records=7)
  assert records.transcripts(some, "train")[:7] == records.transcripts(few, "train")
  other = gsm8k(tmp_path, [question(number) for number in range(20)], data__num_heldout=5)
  assert set(records.transcripts(other, "train")) < set(records.transcripts(some, "train"))


@pytest.mark.parametrize("source", ["recorded", "mined"])
def test_problems_stay_clean_when_mistakes_come_from_the_file(tmp_path, source):
  ((content, _),) = records.transcripts(
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
  found = records.transcripts(prose(tmp_path, lines, mistakes__classes=(error,)), "train")
  whole = records.transcripts(prose(tmp_path, lines, mistakes__share=0.0), "train")
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
    ((chat, _),) = records.transcripts(dataclasses.replace(some, seed=seed), "train")
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
    found = [flat(content) for content, _ in records.transcripts(some, split)]
    here = "".join(clean(pieces) for pieces in found)
    mistakes = [piece.text for pieces in found for piece in pieces if piece.role == MISTAKE]
    assert len(mistakes) == 3
    assert all(mistake.strip() in here for mistake in mistakes)


def test_prose_in_which_no_mistake_is_possible_is_refused(tmp_path):
  lines = [{"question": "Why?", "answer": "Nobody knows. Not even we."}]
  with pytest.raises(InputError, match=r"r\.jsonl: no mistake of class number is possible in any of the 1 records"):
    records.transcripts(prose(tmp_path, lines, mistakes__classes=("number",)), "train")
  with pytest.raises(InputError, match=r"'calc'; where nothing checks the steps .* sentence, number, entity, negation"):
    records.transcripts(prose(tmp_path, lines, mistakes__classes=("calc",)), "train")


def test_an_answer_in_prose_needs_a_task_that_checks_nothing(tmp_path):
  lines = [{"question": "Who? ", "answer": " Anna.\nNot Bela."}, question(2)]
  some = prose(tmp_path, lines, mistakes__share=0.0)
  (first, _), (second, _) = records.transcripts(some, "train")
  assert first == (Piece(PROMPT, "Who?\n"), Piece(TEXT, "Anna.\nNot Bela.\n"))
  assert second == (Piece(PROMPT, "What is 2 + 1?\n"), Piece(TEXT, "2 + 1 = 3\n#### 3\n"))
  with pytest.raises(InputError, match=r"r\.jsonl:1: answer ends in 'Not Bela\.'; its last line must be"):
    records.transcripts(gsm8k(tmp_path, lines), "train")
  with pytest.raises(InputError, match=r"r\.jsonl:1: answer is white space"):
    records.transcripts(prose(tmp_path, [{"question": "Who?", "answer": " "}]), "train")


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
    records.transcripts(config(data__path=write_lines(tmp_path / "r.jsonl", [pieces(("text", "fine")), line])), "train")
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
  known, spans = [content for content, _ in records.transcripts(config(data__path=path), "train")]
  assert known == spans
  assert [piece.text for piece in known] == [text for _, text in [("prompt", "q"), *marked]]


def test_procedural_problems_of_the_two_splits_are_different_and_as_many_as_asked_for():
  some = config(
    task__name="chain_sum",
    task__min_size=3,
    task__max_size=5,
    task__modulus=0,
    data__path="",
    data__num_records=30,
    data__num_heldout=10,
    mistakes__source="injected",
    mistakes__share=0.5,
  )
  train, heldout = (records.transcripts(some, split) for split in ("train", "heldout"))
  assert (len(train), len(heldout)) == (30, 10)
  assert not {content[0].text for content, _ in train} & {content[0].text for content, _ in heldout}
  assert 5 < sum(MISTAKE in [piece.role for piece in content] for content, _ in train) < 25
  plain = [problem.prompt + "".join(problem.steps) for problem, _ in records.problems(some, "heldout")]
  assert {render(content) for content, _ in heldout if len(content) == 2} <= set(plain)


def test_recorded_mistakes_of_a_procedural_task_need_a_file():
  some = config(task__name="chain_sum", task__min_size=3, task__max_size=5, data__path="", data__num_records=3)
  with pytest.raises(InputError, match="reads records from a file"):
    records.transcripts(some, "train")

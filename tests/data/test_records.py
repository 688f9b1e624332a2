import pytest
from datakit import pieces, question, write_lines

from insec_jax.command import InputError
from insec_jax.data import records
from insec_jax.data.records import Chat, PlainRecord, Turn
from insec_jax.method.roles import CORRECTION, MISTAKE, PROMPT, TEXT
from insec_jax.method.tasks import Problem
from insec_jax.method.transcript import Piece


def contents(tmp_path, *lines, limit=0):
  return [record.content for record in records.read(write_lines(tmp_path / "r.jsonl", lines), limit=limit)]


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
  "an empty line": ("", "the line is empty; each must be one JSON object: delete it"),
  "a line of spaces": (" \t", "the line is empty"),
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

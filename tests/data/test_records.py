import pytest
from datakit import config, write_lines

from insec_jax.command import InputError
from insec_jax.data import records
from insec_jax.data.records import Chat, Turn
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, TEXT
from insec_jax.method.tasks import Problem
from insec_jax.method.transcript import Piece, render


def contents(tmp_path, *lines, limit=0):
  return [record.content for record in records.read(write_lines(tmp_path / "r.jsonl", lines), limit=limit)]


def question(number):
  return {
    "question": f"What is {number} + 1?",
    "answer": f"{number} + 1 = <<{number}+1={number + 1}>>{number + 1}\n#### {number + 1}",
  }


def pieces(*texts):
  return {"pieces": [{"role": role, "text": text} for role, text in texts]}


def test_each_of_the_four_formats_gives_its_roles(tmp_path):
  problem, chat, known, spans = contents(
    tmp_path,
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
  "a weight that is not finite": ({"pieces": [{"role": "text", "text": "a", "weight": float("nan")}]}, "weight is nan"),
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
  with pytest.raises(InputError, match=r"no file .*none\.jsonl"):
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


def test_a_task_without_a_checker_refuses_to_inject(tmp_path):
  with pytest.raises(InputError, match=r"r\.jsonl:1: task\.name='records' has no checker"):
    records.transcripts(gsm8k(tmp_path, [question(1)], task__name="records"), "train")


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

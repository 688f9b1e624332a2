"""Other people's data sets: their columns become our records, or a line says why not."""

import pytest
import shapes
from datakit import question, write_lines

from insec_jax.command import InputError
from insec_jax.data import fields, records
from insec_jax.data.records import Chat, PlainRecord, prompt_text


def read(folder, name):
  path, columns = shapes.write(folder, name)
  return [record.content for record in records.read(path, limit=0, checked=False, columns=columns)]


@pytest.mark.parametrize("name", ["math", "metamathqa", "completion"])
def test_pairs_of_columns_are_questions_with_answers(tmp_path, name):
  assert read(tmp_path, name) == [PlainRecord(f"{ask}\n", f"{answer}\n") for ask, answer in shapes.PAIRS]


def test_an_instruction_with_input_is_one_question_and_an_empty_input_is_left_out(tmp_path):
  found = [content.prompt for content in read(tmp_path, "alpaca")]
  assert found[:2] == ["What\n\n2 plus 3?\n", "What\n\n3 plus 4?\n"]
  assert found[4] == "What\n"
  assert fields.mapped(fields.parse("text=a+b+c"), {"a": "x", "b": "", "c": None}, "here") == {"text": "x"}


@pytest.mark.parametrize(("name", "speakers"), [("sharegpt", "uaua"), ("openhermes", "sua"), ("tulu", "ua")])
def test_conversations_are_chats_whoever_is_named_in_them(tmp_path, name, speakers):
  chats = read(tmp_path, name)
  assert all(isinstance(chat, Chat) for chat in chats)
  assert {"".join(turn.speaker[0] for turn in chat.turns) for chat in chats} == {speakers}
  assert [ask in prompt_text(chat) for chat, (ask, _) in zip(chats, shapes.PAIRS, strict=True)] == [True] * 10


def test_lists_of_messages_in_two_columns_are_one_chat(tmp_path):
  row = {"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]}
  path = write_lines(tmp_path / "r.jsonl", [row])
  [record] = records.read(path, limit=0, columns="messages=prompt+completion")
  assert [turn.speaker for turn in record.content.turns] == ["user", "assistant"]


@pytest.mark.parametrize("name", [name for name, (columns, *_) in shapes.SHAPES.items() if columns])
def test_without_fields_the_error_proposes_the_line_that_reads_the_file(tmp_path, name):
  path, columns = shapes.write(tmp_path, name)
  with pytest.raises(InputError, match=rf"{name}.*(:1|object 1|row 1): keys are ") as error:
    list(records.read(path, limit=0, checked=False))
  assert f"data.fields={columns} reads these" in str(error.value)


ROW = {"problem": "p", "solution": "s", "chat": [{"from": "bot", "value": "v"}], "n": 3, "none": None}
WRONG = {
  "question=problem": "makes question; needed are answer and question; or messages",
  "question=problem,answer=": "'answer=' is not KEY=COLUMN; write such as question=problem,answer=solution",
  "text=problem,text=solution": "text is given twice",
  "question=problem,answer=problem": "the column problem is given twice; each belongs to one key",
  "text=problem+problem": "the column problem is given twice",
  "question=problm,answer=solution": ":1: has no column 'problm', it has chat, n, none, problem, solution",
  "question=problem,answer=none": ":1: answer is ''; must be text that is not empty",
  "question=problem,answer=n": ":1: answer is [3]; the columns of a key must all be texts, or all be lists",
  "text=problem+chat": ":1: text is ['p', ",
  "messages=chat": ":1: messages[0].role is 'bot'; must be one of system, user, assistant",
}


@pytest.mark.parametrize("columns", WRONG)
def test_fields_that_do_not_fit_are_refused_with_their_place(tmp_path, columns):
  path = write_lines(tmp_path / "r.jsonl", [ROW])
  with pytest.raises(InputError) as error:
    list(records.read(path, limit=0, columns=columns))
  assert WRONG[columns] in str(error.value)


def test_questions_by_other_names_are_checked_as_those_of_gsm8k(tmp_path):
  rows = [{"q": row["question"], "a": row["answer"]} for row in (question(3),)]
  path = write_lines(tmp_path / "r.jsonl", rows)
  [named] = records.read(path, limit=0, columns="question=q,answer=a")
  [plain] = records.read(write_lines(tmp_path / "p.jsonl", [question(3)]), limit=0)
  assert named.content == plain.content
  assert fields.columns_of(fields.parse("question=q+b, answer=a")) == ("q", "b", "a")

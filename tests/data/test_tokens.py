import itertools
import re

import numpy as np
import pytest
import tokenizers
from datakit import IM_TEMPLATE, LLAMA_TEMPLATE, bpe_tokenizer, config, write_lines
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.data import encoding, mixture, tokens, vocabulary
from insec_jax.data.encoding import Span
from insec_jax.data.records import Chat, Turn
from insec_jax.data.template import DATE, DATE_KEY, fix_date
from insec_jax.method import roles
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, PROMPT, REASON, TEXT
from insec_jax.method.transcript import Markers, Piece, mistake_pieces, render

SPARE = {"tokenizer__flag": "<|spare_0|>", "tokenizer__fix": "<|spare_1|>"}
MARKERS = Markers("<|spare_0|>", "<|spare_1|>")
SOLUTION = (
  Piece(PROMPT, "What is 12 + 30?\n"),
  Piece(TEXT, "He adds 12 and 30.\n"),
  *mistake_pieces(MARKERS, wrong="12 + 30 = 43\n", reason=" wrong sum", right="12 + 30 = 42\n"),
  Piece(TEXT, "#### 42\n"),
)
QUESTION = Turn("user", (Piece(PROMPT, "What is 12 + 30?\n"),))


def bpe(**changes):
  """A tokenizer like Llama 3's with its spare tokens as markers, and the config that names them."""
  template = changes.pop("chat", None)
  some = config(**{**SPARE, **({"data__template": "chat"} if template else {}), **changes})
  return vocabulary.add_markers(bpe_tokenizer(template), some.tokenizer).tokenizer, some


def toy(symbols="0123456789+=\n", **changes):
  some = config(**changes)
  return vocabulary.build_tokenizer(tuple(symbols), some.tokenizer), some


def one(pieces, tokenizer, some):
  return tokens.tokenize(pieces, "file:3", tokenizer, some)


def runs(example, tokenizer):
  """[(role, weight, text)] of runs of tokens with the same role and weight."""
  found = []
  for token, role, weight in zip(example.token_T, example.role_T, example.weight_T, strict=True):
    if found and found[-1][:2] == (role, weight):
      found[-1][2].append(token)
    else:
      found.append((role, weight, [token]))
  return [(role, weight, tokenizer.decode(some)) for role, weight, some in found]


def test_owners_are_those_in_the_docstring():
  owner_N, is_boundary_N = encoding.owner_of_tokens(
    np.array([0, 1, 3, 4]), np.array([1, 3, 4, 9]), np.array([2, 4, 9]), np.array([1, 2, 3]), np.array([1.0, 0.0, 1.0])
  )
  np.testing.assert_array_equal(owner_N, [0, 1, 1, 2])
  np.testing.assert_array_equal(is_boundary_N, [False, True, False, False])


def test_of_equal_weights_the_first_piece_has_the_token_and_equal_roles_no_boundary():
  args = np.array([0]), np.array([2]), np.array([1, 2])
  owner_N, is_boundary_N = encoding.owner_of_tokens(*args, np.array([1, 3]), np.array([1.0, 1.0]))
  assert (owner_N.tolist(), is_boundary_N.tolist()) == ([0], [True])
  owner_N, is_boundary_N = encoding.owner_of_tokens(*args, np.array([1, 1]), np.array([1.0, 1.0]))
  assert (owner_N.tolist(), is_boundary_N.tolist()) == ([0], [False])


def test_each_token_has_the_role_of_its_characters_bos_is_prompt_the_end_is_text():
  tokenizer, some = bpe()
  example = one(SOLUTION, tokenizer, some)
  assert runs(example, tokenizer) == [
    (PROMPT, 0.0, "<|bos|>What is 12 + 30?\n"),
    (TEXT, 1.0, "He adds 12 and 30.\n"),
    (MISTAKE, 0.0, "12 + 30 = 43\n"),
    (FLAG, 1.0, "<|spare_0|>"),
    (REASON, 1.0, " wrong sum"),
    (FLAG, 1.0, "<|spare_1|>"),
    (CORRECTION, 1.0, "12 + 30 = 42\n"),
    (TEXT, 1.0, "#### 42\n"),
    (TEXT, 0.5, "<|eos|>"),
  ]
  assert (example.num_boundary, example.num_end, example.where) == (0, 1, "file:3")
  assert (example.token_T.dtype, example.role_T.dtype, example.weight_T.dtype) == (np.int32, np.int8, np.float32)


def test_tokens_are_those_of_the_whole_text_encoded_once():
  tokenizer, some = bpe()
  whole = tokenizer(render(SOLUTION) + "<|eos|>").input_ids
  assert one(SOLUTION, tokenizer, some).token_T.tolist() == whole


def test_many_transcripts_at_once_give_what_each_gives_alone():
  tokenizer, some = bpe()
  contents = [(SOLUTION[:number], f"file:{number}") for number in range(2, len(SOLUTION) + 1)]
  for together, (content, where) in zip(tokens.tokenize_all(contents, tokenizer, some), contents, strict=True):
    alone = tokens.tokenize(content, where, tokenizer, some)
    assert together.where == where
    for name in ("token_T", "role_T", "weight_T", "num_boundary", "num_end"):
      np.testing.assert_array_equal(getattr(together, name), getattr(alone, name))


def test_characters_from_the_lengths_of_tokens_are_those_of_the_tokenizers_offsets(monkeypatch):
  tokenizer, _ = bpe()
  texts = ["4 + 3 = 7\n", "  two\n\n\tlines ", "naïve 漢字 😀 = 1", "x" * 40, "<err> as text", ""]
  parts = [[Span("<s>", PROMPT, 0.0, 0), Span(text, TEXT, 1.0), Span("7", CORRECTION, 1.0)] for text in texts]
  fast = encoding.encode(parts, texts, tokenizer)
  assert (encoding.byte_lengths(tokenizer)[fast.token_N[~fast.special_N]] > 0).all()
  monkeypatch.setattr(encoding, "byte_lengths", lambda tokenizer: np.full(len(tokenizer), -1))
  slow = encoding.encode(parts, texts, tokenizer)
  assert all(map(np.array_equal, fast, slow))


def test_lengths_of_tokens_are_used_only_where_no_character_is_added_or_dropped():
  tokenizer, _ = bpe()
  assert encoding.byte_lengths(tokenizer).max() > 1
  plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
  spaces = pre_tokenizers.Split(" ", "removed")
  for changed in (pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Sequence([spaces, plain])):
    tokenizer, _ = bpe()
    tokenizer.backend_tokenizer.pre_tokenizer = changed
    assert encoding.byte_lengths(tokenizer).max() == -1


def test_white_space_in_front_of_a_word_belongs_to_its_own_piece():
  # This tokenizer's own offsets leave the space out, and give a token of spaces no character at all.
  tokenizer, some = bpe()
  example = one((Piece(PROMPT, "What   "), Piece(TEXT, "   is"), Piece(MISTAKE, " 12")), tokenizer, some)
  assert "".join(text for _, _, text in runs(example, tokenizer)) == "<|bos|>What      is 12<|eos|>"
  assert [role for role, _, _ in runs(example, tokenizer)] == [PROMPT, TEXT, MISTAKE, TEXT]


def test_a_token_across_a_boundary_takes_the_smaller_weight_and_is_counted():
  tokenizer, some = bpe()
  assert len(tokenizer("He adds", add_special_tokens=False).input_ids) == 2
  example = one((Piece(TEXT, "He ad"), Piece(MISTAKE, "ds 12")), tokenizer, some)
  assert runs(example, tokenizer)[1:3] == [(TEXT, 1.0, "He"), (MISTAKE, 0.0, " adds 12")]
  assert example.num_boundary == 1
  unlikely = one((Piece(TEXT, "He ad", -1.0), Piece(MISTAKE, "ds 12")), tokenizer, some)
  assert runs(unlikely, tokenizer)[1:3] == [(TEXT, -1.0, "He adds"), (MISTAKE, 0.0, " 12")]


def test_an_explicit_weight_wins_over_that_of_the_role():
  tokenizer, some = bpe()
  example = one((Piece(PROMPT, "What", 0.25), Piece(MISTAKE, " is", -2.0), Piece(TEXT, " sum")), tokenizer, some)
  assert [weight for _, weight, _ in runs(example, tokenizer)] == [0.0, 0.25, -2.0, 1.0, 0.5]


def test_several_tokens_of_one_character_have_its_role():
  tokenizer, some = bpe()
  example = one((Piece(PROMPT, "é"), Piece(TEXT, "你"), Piece(MISTAKE, "😀")), tokenizer, some)
  assert example.role_T.tolist() == [PROMPT] * 3 + [TEXT] * 3 + [MISTAKE] * 4 + [TEXT]


@pytest.mark.parametrize("marker", ["<|spare_0|>", "<|spare_1|>"])
@pytest.mark.parametrize("special", [True, False])
def test_text_that_forges_a_marker_is_refused_with_its_line(marker, special):
  tokenizer, some = bpe(tokenizer__special=special)
  with pytest.raises(InputError, match=rf"^file:3: the text holds the marker '{re.escape(marker)}'"):
    one((Piece(PROMPT, "What is" + marker[:4]), Piece(TEXT, marker[4:] + " it")), tokenizer, some)


def test_marker_text_encoded_as_plain_gives_no_special_token_and_keeps_its_role():
  tokenizer, some = bpe(data__marker_text="plain")
  example = one((Piece(PROMPT, "a<|spare_0|>"), Piece(TEXT, "b<|eos|><|bos|>")), tokenizer, some)
  assert example.token_T.tolist() == [
    1,
    *tokenizer("a<|spare_0|>b<|eos|><|bos|>", add_special_tokens=False, split_special_tokens=True).input_ids,
    2,
  ]
  assert (example.token_T[1:-1] >= 8).all()


def test_the_tokenizer_is_left_as_it_was():
  tokenizer, some = bpe()
  before = tokenizer.backend_tokenizer.to_str(), tokenizer("a<|eos|> b").input_ids
  one(SOLUTION, tokenizer, some)
  with pytest.raises(InputError):
    one((Piece(PROMPT, "a"),), tokenizer, some)
  assert (tokenizer.backend_tokenizer.to_str(), tokenizer("a<|eos|> b").input_ids) == before
  assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_markers_as_plain_words_are_encoded_like_any_text_and_have_role_flag():
  tokenizer, some = bpe(tokenizer__special=False, tokenizer__flag=" Wait,", tokenizer__fix=" rather:")
  pieces = (
    Piece(PROMPT, "What"),
    Piece(MISTAKE, " 43"),
    Piece(FLAG, " Wait,"),
    Piece(FLAG, " rather:"),
    Piece(CORRECTION, " 42"),
  )
  example = one(pieces, tokenizer, some)
  assert example.token_T.tolist() == tokenizer(render(pieces) + "<|eos|>").input_ids
  assert (FLAG, 1.0, " Wait, rather:") in runs(example, tokenizer)


def test_white_space_around_a_marker_in_a_flag_piece_is_kept():
  tokenizer, some = bpe()
  example = one((Piece(TEXT, "a b"), Piece(FLAG, "\n<|spare_0|> "), Piece(TEXT, "c")), tokenizer, some)
  assert (FLAG, 1.0, "\n<|spare_0|> ") in runs(example, tokenizer)


REFUSED = {
  "only prompt": ((Piece(PROMPT, "What is 12?"),), {}, "no token is trained"),
  "every weight 0": ((Piece(PROMPT, "What"), Piece(TEXT, " is", 0.0)), {}, "no token is trained"),
  "only the first token has weight": (
    (Piece(TEXT, "a", 1.0), Piece(PROMPT, " is")),
    {"toy": "a is"},
    "no token is trained",
  ),
  "a span that gets no token": (
    (Piece(MISTAKE, "Wh"), Piece(TEXT, "a"), Piece(MISTAKE, "t is")),
    {},
    "the text piece 'a' gets no token of its own",
  ),
  "a flag that is no marker": ((Piece(TEXT, "a"), Piece(FLAG, "<oops>")), {}, "the flag piece '<oops>' is neither"),
  "longer than a row": (SOLUTION, {"data__row_length": 30}, "tokens do not fit in a row of data.row_length=30"),
  "a character without a token": ((Piece(PROMPT, "1"), Piece(TEXT, "2x3")), {"toy": "123"}, "has no token for 'x'"),
  "messages without the chat template": (Chat((QUESTION,)), {}, "set data.template='chat'"),
  "messages without an assistant": (Chat((QUESTION,)), {"chat": LLAMA_TEMPLATE}, "no end of text is trained"),
  "a template that refuses": (
    Chat((QUESTION, QUESTION)),
    {"chat": "{{ raise_exception('no two users') }}"},
    "no two users",
  ),
  "a template that forgets": (
    SOLUTION,
    {"chat": "{{ messages[0]['content'] }}<|eot|>"},
    "leaves a message out or repeats it",
  ),
  "a template that repeats": (SOLUTION, {"chat": IM_TEMPLATE + IM_TEMPLATE}, "leaves a message out or repeats it"),
  "a template that rewrites": (
    SOLUTION,
    {"chat": IM_TEMPLATE.replace("['content']", "['content'] | upper")},
    "changes what is said",
  ),
  "a template that ends no turn": (
    SOLUTION,
    {"chat": IM_TEMPLATE.replace("<|eot|>", " .")},
    "would never learn to stop",
  ),
  "a template that opens answers otherwise": (
    SOLUTION,
    {"chat": IM_TEMPLATE + "{% if add_generation_prompt %}think{% endif %}"},
    "opens an answer to be generated otherwise",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_record_that_would_be_silently_wrong_is_refused_with_its_line(case):
  content, changes, message = REFUSED[case]
  changes = dict(changes)
  tokenizer, some = toy(changes.pop("toy"), **changes) if "toy" in changes else bpe(**changes)
  with pytest.raises(InputError, match=r"^file:3: ") as raised:
    one(content, tokenizer, some)
  assert message in str(raised.value)
  assert "\n" not in str(raised.value)


def test_the_line_named_is_that_of_the_wrong_record_among_many():
  tokenizer, some = toy("0123456789", data__row_length=8)
  fine = (Piece(PROMPT, "1"), Piece(TEXT, "23"))
  for wrong in ((Piece(PROMPT, "1"), Piece(TEXT, "2x3")), (Piece(PROMPT, "11"),), (Piece(TEXT, "1" * 8),)):
    with pytest.raises(InputError, match=r"^file:2: "):
      tokens.tokenize_all([(fine, "file:1"), (wrong, "file:2"), (fine, "file:3")], tokenizer, some)


def test_a_tokenizer_without_end_of_text_or_markers_or_template_is_refused():
  tokenizer, some = bpe()
  tokenizer.eos_token = None
  with pytest.raises(InputError, match="names no end-of-text token"):
    one(SOLUTION, tokenizer, some)
  with pytest.raises(InputError, match="no special token '<err>'"):
    one(SOLUTION, bpe_tokenizer(), config())
  with pytest.raises(InputError, match="has no chat template"):
    one(SOLUTION, bpe_tokenizer(), config(**SPARE, data__template="chat"))


def test_a_tokenizer_that_puts_a_space_in_front_of_every_stretch_is_refused():
  backend = tokenizers.Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2, "<|eos|>": 3}, []))
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
  backend.decoder = decoders.Metaspace()
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
  some = config()
  vocabulary.add_markers(tokenizer, some.tokenizer)
  with pytest.raises(InputError, match="encodes what follows a special token otherwise"):
    one((Piece(TEXT, "a"), Piece(FLAG, "<err>"), Piece(TEXT, "b")), tokenizer, some)


def test_a_tokenizer_that_drops_characters_is_refused():
  backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "<|eos|>": 2}, []))
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
  with pytest.raises(InputError, match="file:3: the tokenizer drops a character at or before 'b'"):
    one((Piece(TEXT, "axb"),), tokenizer, config(tokenizer__special=False))


CHAT = Chat(
  (
    Turn("system", (Piece(PROMPT, "  Be brief.\n"),)),
    QUESTION,
    Turn("assistant", (Piece(TEXT, "It is 42.\n"),)),
    Turn("user", (Piece(PROMPT, "Wrong?"),)),
    Turn("assistant", (Piece(TEXT, "\nThe sum is 42."),)),
  )
)


@pytest.mark.parametrize("template", [LLAMA_TEMPLATE, IM_TEMPLATE], ids=["llama", "im"])
def test_messages_have_the_templates_tokens_and_train_only_answers_and_ends_of_turn(template):
  tokenizer, some = bpe(chat=template)
  messages = [{"role": turn.speaker, "content": render(turn.pieces)} for turn in CHAT.turns]
  text = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE.strftime("%d %b %Y"))
  example = one(CHAT, tokenizer, some)
  assert example.token_T.tolist() == tokenizer(text, add_special_tokens=False).input_ids
  answers = ["It is 42.", "The sum is 42."] if template == LLAMA_TEMPLATE else ["It is 42.\n", "\nThe sum is 42."]
  trained = [run for run in runs(example, tokenizer) if run[1]]
  assert trained == [run for answer in answers for run in ((TEXT, 1.0, answer), (TEXT, 0.5, "<|eot|>"))]
  assert {role for role, weight, _ in runs(example, tokenizer) if not weight} == {PROMPT}
  assert example.num_end == 2


CLOCK_TEMPLATE = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + IM_TEMPLATE


def test_a_template_that_asks_the_clock_is_told_the_day_of_the_run(tmp_path):
  tokenizer = bpe_tokenizer(CLOCK_TEMPLATE)
  read = tokenizer.decode(tokens.encode_prompt("a", tokenizer, "chat"))
  assert read.startswith("26 Jul 2024 00:00:00")
  fix_date(tokenizer, "2026-02-03")
  tokenizer.save_pretrained(tmp_path)
  again = vocabulary.load(str(tmp_path))
  for some in (tokenizer, again):
    assert some.decode(tokens.encode_prompt("a", some, "chat")).startswith("03 Feb 2026 00:00:00")
  # One tokenizer's day is not another's, though the template is the same.
  other = bpe_tokenizer(CLOCK_TEMPLATE)
  assert other.decode(tokens.encode_prompt("a", other, "chat")) == read


def test_a_day_is_kept_only_for_a_template_that_asks_the_clock():
  tokenizer = bpe_tokenizer(IM_TEMPLATE)
  fix_date(tokenizer, "2026-02-03")
  assert DATE_KEY not in tokenizer.init_kwargs


@pytest.mark.parametrize("draw", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_at_random_is_refused(draw):
  with pytest.raises(InputError, match="draws at random"):
    tokens.encode_prompt("a", bpe_tokenizer(draw + IM_TEMPLATE), "chat")


def test_a_day_that_is_none_is_refused():
  tokenizer = bpe_tokenizer(CLOCK_TEMPLATE)
  tokenizer.init_kwargs[DATE_KEY] = "today"
  with pytest.raises(InputError, match="chat_template_date is 'today'; must be a day"):
    tokens.encode_prompt("a", tokenizer, "chat")


@pytest.mark.parametrize("template", [LLAMA_TEMPLATE, IM_TEMPLATE], ids=["llama", "im"])
def test_a_transcript_in_the_chat_template_keeps_its_roles(template):
  tokenizer, some = bpe(chat=template)
  example = one(SOLUTION, tokenizer, some)
  last = "#### 42" if template == LLAMA_TEMPLATE else "#### 42\n"
  assert runs(example, tokenizer)[1:9] == [
    (TEXT, 1.0, "He adds 12 and 30.\n"),
    (MISTAKE, 0.0, "12 + 30 = 43\n"),
    (FLAG, 1.0, "<|spare_0|>"),
    (REASON, 1.0, " wrong sum"),
    (FLAG, 1.0, "<|spare_1|>"),
    (CORRECTION, 1.0, "12 + 30 = 42\n"),
    (TEXT, 1.0, last),
    (TEXT, 0.5, "<|eot|>"),
  ]


@pytest.mark.parametrize("template", ["plain", LLAMA_TEMPLATE, IM_TEMPLATE], ids=["plain", "llama", "im"])
def test_the_end_token_is_the_last_that_is_trained(template):
  name = "plain" if template == "plain" else "chat"
  tokenizer, some = bpe(**({} if name == "plain" else {"chat": template}))
  example = one(SOLUTION, tokenizer, some)
  assert example.token_T[example.weight_T > 0][-1] == tokens.end_token(tokenizer, name)


def test_words_of_a_message_cannot_end_a_turn():
  tokenizer, some = bpe(chat=IM_TEMPLATE)
  example = one(
    Chat(
      (Turn("user", (Piece(PROMPT, "a<|eot|>\n<|head|>assistant"),)), Turn("assistant", (Piece(TEXT, "b<|eot|>"),)))
    ),
    tokenizer,
    some,
  )
  eot, head = tokenizer.convert_tokens_to_ids(["<|eot|>", "<|head|>"])
  assert ((example.token_T == eot).sum(), (example.token_T == head).sum()) == (2, 2)


def test_plain_characters_that_a_template_puts_before_the_end_are_trained_with_it():
  tokenizer, some = bpe(chat=IM_TEMPLATE.replace("'<|eot|>'", "' <|eot|>'"))
  assert runs(one(SOLUTION, tokenizer, some), tokenizer)[-2:] == [(TEXT, 0.5, " <|eot|>"), (PROMPT, 0.0, "\n")]


@pytest.mark.parametrize("template", ["plain", LLAMA_TEMPLATE, IM_TEMPLATE], ids=["plain", "llama", "im"])
def test_an_encoded_prompt_is_how_the_transcript_begins(template):
  name = "plain" if template == "plain" else "chat"
  tokenizer, some = bpe(**({} if name == "plain" else {"chat": template}))
  example = one(SOLUTION, tokenizer, some)
  prompt_T = tokens.encode_prompt(SOLUTION[0].text, tokenizer, name)
  probe_T = tokens.encode_prompt(SOLUTION[0].text, tokenizer, name, answer=SOLUTION[1].text + SOLUTION[2].text)
  assert prompt_T.dtype == np.int32
  assert len(prompt_T) == (example.role_T == PROMPT).argmin()
  assert len(probe_T) == (example.role_T == FLAG).argmax()
  np.testing.assert_array_equal(example.token_T[: len(probe_T)], probe_T)
  np.testing.assert_array_equal(probe_T[: len(prompt_T)], prompt_T)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_no_special_token_comes_out_of_a_prompt(template):
  tokenizer, _ = bpe(chat=IM_TEMPLATE)
  prompt_T = tokens.encode_prompt("a <|eot|><|spare_0|><|eos|>", tokenizer, template, answer="<|spare_1|>")
  special = {"plain": ["<|bos|>"], "chat": ["<|head|>", "<|eot|>", "<|head|>"]}[template]
  assert [tokenizer.convert_ids_to_tokens(int(token)) for token in prompt_T if token < 8] == special


def test_a_prompt_of_unknown_characters_or_without_tokens_is_refused():
  tokenizer, _ = toy("01")
  with pytest.raises(InputError, match="the prompt: the tokenizer has no token for 'é'"):
    tokens.encode_prompt("0é", tokenizer, "plain")
  with pytest.raises(InputError, match="the prompt is empty"):
    tokens.encode_prompt("", tokenizer, "plain")


def test_a_text_ends_with_the_models_tokens_the_tokenizers_and_the_templates():
  tokenizer = bpe_tokenizer(IM_TEMPLATE)
  eos, turn = tokenizer.convert_tokens_to_ids(["<|eos|>", "<|eot|>"])
  assert tokens.stop_ids((9, eos), tokenizer, vocab_size=300) == (9, eos, turn)
  assert tokens.stop_ids((), bpe_tokenizer(), vocab_size=300) == (eos,)
  with pytest.raises(InputError, match="use the tokenizer that belongs to the model"):
    tokens.stop_ids((), tokenizer, vocab_size=turn)


@pytest.mark.parametrize(
  "template",
  [
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[7].content }}",
    "{{ range(10**12) }}",
  ],
)
def test_a_template_that_cannot_be_rendered_breaks_only_its_readers(template):
  tokenizer = bpe_tokenizer(template)
  assert tokens.stop_ids((), tokenizer, vocab_size=300) == (tokenizer.eos_token_id,)
  assert len(tokens.encode_prompt("12", tokenizer, "plain"))
  with pytest.raises(InputError, match=r"the chat template (refuses|leaves)"):
    tokens.encode_prompt("12", tokenizer, "chat")


@pytest.mark.parametrize(
  ("template", "reason"),
  [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "1 second"),
    ("{{ 'x' * 10**10 }}", "1024 MB"),
    ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "1024 MB"),
  ],
)
def test_a_template_without_an_end_is_refused_and_plain_prompts_are_not(template, reason):
  tokenizer = bpe_tokenizer(template)
  assert tokens.stop_ids((), tokenizer, vocab_size=300) == (tokenizer.eos_token_id,)
  with pytest.raises(InputError, match=f"the chat template takes more than {reason}"):
    tokens.encode_prompt("12", tokenizer, "chat")


def test_one_record_from_its_line_to_its_tokens(tmp_path):
  path = write_lines(
    tmp_path / "r.jsonl",
    [{"question": "What did Anna do?", "answer": "In May Anna sold 12 goats. Then Anna was glad."}],
  )
  some = config(
    data__path=path,
    mistakes__source="injected",
    mistakes__share=1.0,
    mistakes__classes=("negation",),
    mistakes__reason="paper",
    mistakes__unit="sentence",
    tokenizer__flag="<|spare_0|>",
    tokenizer__fix="<|spare_1|>",
  )
  (pair,) = mixture.transcripts(some, "train")
  marked = vocabulary.add_markers(bpe_tokenizer(), some.tokenizer)
  example = tokens.tokenize(*pair, marked.tokenizer, some)
  assert example.where == f"{path}:1"
  runs = [
    (roles.NAMES[role], {float(weight) for _, _, weight in run}, [token for token, _, _ in run])
    for role, run in (
      (role, list(run))
      for role, run in itertools.groupby(
        zip(example.token_T.tolist(), example.role_T.tolist(), example.weight_T.tolist(), strict=True),
        key=lambda token: token[1],
      )
    )
  ]
  assert [(name, weights, marked.tokenizer.decode(some)) for name, weights, some in runs] == [
    ("prompt", {0.0}, "<|bos|>What did Anna do?\n"),
    ("text", {1.0}, "In May Anna sold 12 goats. "),
    ("mistake", {0.0}, "Then Anna was not glad.\n"),
    ("flag", {1.0}, "<|spare_0|>"),
    ("reason", {1.0}, "Found an error in the previous sentence. Reason: the opposite is true."),
    ("flag", {1.0}, "<|spare_1|>"),
    ("correction", {1.0}, "Then Anna was glad.\n"),
    ("text", {0.5}, "<|eos|>"),
  ]
  assert [some for name, _, some in runs if name == "flag"] == [[marked.flag_id], [marked.fix_id]]


def test_a_token_of_confidence_is_one_special_token_that_is_never_trained():
  some = config(tokenizer__confidence=(0.1, 1.0), loss__flag=2.0)
  marked = vocabulary.add_markers(bpe_tokenizer(), some.tokenizer)
  assert len(marked.confidence_ids) == 3
  pieces = (
    Piece(PROMPT, "12 + 30 = "),
    Piece(MISTAKE, "43\n"),
    Piece(FLAG, "<|sure_2|>"),
    Piece(FLAG, "<err>"),
    Piece(FLAG, "<fix>"),
    Piece(CORRECTION, "42\n"),
    Piece(FLAG, "<|sure_0|>", 1.0),
  )
  example = one(pieces, marked.tokenizer, some)
  for number, name in ((2, "<|sure_2|>"), (0, "<|sure_0|>")):
    place = example.token_T.tolist().index(marked.confidence_ids[number])
    assert marked.tokenizer.convert_ids_to_tokens(int(example.token_T[place])) == name
    assert example.weight_T[place] == 0
  assert example.weight_T[example.token_T.tolist().index(marked.flag_id)] == 2


def test_text_cannot_forge_confidence():
  some = config(tokenizer__confidence=(0.1,))
  tokenizer = vocabulary.add_markers(bpe_tokenizer(), some.tokenizer).tokenizer
  with pytest.raises(InputError, match=r"the text holds the marker '<\|sure_1\|>'"):
    one((Piece(PROMPT, "12 <|sure_1|>"), Piece(TEXT, "a\n")), tokenizer, some)


@pytest.mark.parametrize(("edges", "special"), [((1.0, 0.5), True), ((0.0,), True), ((0.5,), False)])
def test_edges_of_confidence_that_make_no_sense_are_refused(edges, special):
  with pytest.raises(InputError, match=r"tokenizer\.confidence"):
    config(tokenizer__confidence=edges, tokenizer__special=special)


def test_there_is_a_token_for_each_bin_of_a_step_and_of_its_first_token():
  some = config(tokenizer__confidence=(0.1, 1.0), tokenizer__confidence_first=(0.5,))
  assert len(vocabulary.add_markers(bpe_tokenizer(), some.tokenizer).confidence_ids) == 6
  with pytest.raises(InputError, match=r"tokenizer\.confidence_first=\(0\.5,\) parts tokens that .* does not have"):
    config(tokenizer__confidence_first=(0.5,))
  with pytest.raises(InputError, match=r"tokenizer\.confidence_first=\(2\.0, 0\.5\); must be scores above 0"):
    config(tokenizer__confidence=(0.1,), tokenizer__confidence_first=(2.0, 0.5))


def negatives_of(pieces, tokenizer, some):
  """[(what is trained there, what the mistake has there)] of the tokens that have a negative."""
  example = one(pieces, tokenizer, some)
  assert example.negative_T.dtype == np.int32
  assert len(example.negative_T) == len(example.token_T)
  return [
    (tokenizer.decode([token]), tokenizer.decode([negative]))
    for token, negative in zip(example.token_T, example.negative_T, strict=True)
    if negative >= 0
  ]


def test_a_negative_is_the_mistakes_token_where_its_correction_first_differs():
  tokenizer, some = toy("0123456789+=\nds")
  markers = Markers("<err>", "<fix>")
  sums = mistake_pieces(markers, wrong="4+3=8\n", reason="s", right="4+3=7\n")
  first = mistake_pieces(markers, wrong="d\n", reason="", right="4+3=7\n")
  again = (Piece(MISTAKE, "4+2\n"), *sums)  # two wrong steps in a row: the correction stands for both
  assert negatives_of((Piece(TEXT, "d"), *sums, Piece(TEXT, "s\n"), *first), tokenizer, some) == [
    ("7", "8"),
    ("4", "d"),
  ]
  assert negatives_of((Piece(TEXT, "d"), *again), tokenizer, some) == [("3", "2")]
  example = one((Piece(PROMPT, "d"), *sums), tokenizer, some)
  negative = tokenizer.convert_tokens_to_ids("8")
  # d 4+3=8\n <err> s <fix> 4+3= 7 \n <end>
  assert example.negative_T.tolist() == [-1] * 1 + [-1] * 6 + [-1] * 3 + [-1] * 4 + [negative] + [-1] * 2


NO_NEGATIVES = {
  "nothing was wrong": (Piece(TEXT, "1"), Piece(CORRECTION, "2")),
  "the mistake is the correction": (Piece(TEXT, "d"), Piece(MISTAKE, "12"), Piece(CORRECTION, "12")),
  "the mistake ends first": (Piece(TEXT, "d"), Piece(MISTAKE, "1"), Piece(CORRECTION, "12"), Piece(TEXT, "3")),
  "the mistake ends first, and then the text": (Piece(TEXT, "d"), Piece(MISTAKE, "1"), Piece(CORRECTION, "12")),
  "the correction ends first": (Piece(TEXT, "d"), Piece(MISTAKE, "12"), Piece(CORRECTION, "1"), Piece(TEXT, "3")),
  "the correction comes first": (Piece(TEXT, "d"), Piece(CORRECTION, "1"), Piece(MISTAKE, "2"), Piece(TEXT, "3")),
}


@pytest.mark.parametrize("case", NO_NEGATIVES)
def test_where_no_token_of_a_mistake_could_stand_there_is_no_negative(case):
  assert negatives_of(NO_NEGATIVES[case], *toy("123d")) == []


def test_a_mistake_has_one_correction():
  pieces = Piece(TEXT, "d"), Piece(MISTAKE, "12"), Piece(CORRECTION, "13"), Piece(TEXT, "d"), Piece(CORRECTION, "14")
  assert negatives_of(pieces, *toy("1234d")) == [("3", "2")]


@pytest.mark.parametrize("special", [True, False])
def test_a_mistake_is_read_as_it_would_be_written_in_the_place_of_its_correction(special):
  # In its own place the mistake begins with a token " 12", which never follows a marker.
  tokenizer, some = bpe(tokenizer__special=special)
  flags = (Piece(FLAG, "<|spare_0|>"), Piece(FLAG, "<|spare_1|>"))
  pieces = (Piece(TEXT, "He adds "), Piece(MISTAKE, "12 + 30 = 43\n"), *flags, Piece(CORRECTION, "12 + 30 = 42\n"))
  mistake = [text for role, _, text in runs(one(pieces, tokenizer, some), tokenizer) if role == MISTAKE]
  assert mistake == [" 12 + 30 = 43\n"]
  assert negatives_of(pieces, tokenizer, some) == [(" 42", " 43")]


def test_a_correction_that_begins_inside_a_token_differs_where_that_token_does():
  tokenizer, some = bpe()
  pieces = (Piece(TEXT, "He"), Piece(MISTAKE, " is"), Piece(TEXT, " ad"), Piece(CORRECTION, "ds 12"))
  ids = [tokenizer(text, add_special_tokens=False).input_ids for text in ("He is adds 12", "He is ad is")]
  n = next(n for n, (token, other) in enumerate(zip(*ids, strict=False)) if token != other)
  expected = [tuple(tokenizer.decode([some_ids[n]]) for some_ids in ids)]
  assert expected[0][0] == " adds"
  assert negatives_of(pieces, tokenizer, some) == expected


@pytest.mark.parametrize("template", ["plain", LLAMA_TEMPLATE, IM_TEMPLATE], ids=["plain", "llama", "im"])
def test_negatives_of_many_transcripts_are_those_of_each_alone_also_in_a_template(template):
  tokenizer, some = bpe(**({} if template == "plain" else {"chat": template}))
  contents = [(SOLUTION[:number], f"file:{number}") for number in range(2, len(SOLUTION) + 1)]
  for together, (content, where) in zip(tokens.tokenize_all(contents, tokenizer, some), contents, strict=True):
    np.testing.assert_array_equal(together.negative_T, tokens.tokenize(content, where, tokenizer, some).negative_T)
  assert negatives_of(SOLUTION, tokenizer, some) == [(" 42", " 43")]


def test_an_unreadable_chat_template_is_refused_also_where_only_its_end_counts():
  tokenizer = bpe_tokenizer(IM_TEMPLATE.replace("endfor", "endfr"))
  with pytest.raises(InputError, match=r"the chat template of .* cannot be read: line 1: .*endfr.*; mend "):
    tokens.stop_ids((), tokenizer, vocab_size=1000)
  marked = "{% generation %}" + IM_TEMPLATE + "{% endgeneration %}{% break %}"  # tags of transformers
  tokens.stop_ids((), bpe_tokenizer(marked), vocab_size=1000)

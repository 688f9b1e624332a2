"""Bad records and prompts by the thousand: one line that names file and line, or exactly what the record says."""

import collections
import copy
import gzip
import itertools
import json
import random

import numpy as np
import pytest
from datakit import IM_TEMPLATE, bpe_tokenizer, config
from tokenizers import Regex, pre_tokenizers

from insec_jax.command import InputError
from insec_jax.data import mixture, records, tokens, vocabulary
from insec_jax.generation.prompts import read_prompts
from insec_jax.method import roles
from insec_jax.method.tasks import Problem

pytestmark = pytest.mark.faults

LEAST_CASES = 2400
BASES = {
  "question": {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
  "messages": {
    "messages": [
      {"role": "system", "content": "Be brief."},
      {"role": "user", "content": "2 + 3?"},
      {"role": "assistant", "content": "It is 5."},
    ]
  },
  "text": {"text": "Héllo wörld."},
  "pieces": {
    "pieces": [
      {"role": "prompt", "text": "2 + 3?\n"},
      {"role": "mistake", "text": "6\n", "weight": 0.5},
      {"role": "flag", "text": "<err>"},
      {"role": "reason", "text": "sum"},
      {"role": "flag", "text": "<fix>"},
      {"role": "correction", "text": "5\n"},
    ],
    "meta": {"by": "hand"},
  },
  "spans": {
    "text": "2 + 3? It is 5.",
    "spans": [{"start": 0, "end": 6, "role": "prompt"}, {"start": 7, "end": 15, "role": "text", "weight": 2}],
  },
  "prompt": {"prompt": "2 + 3?", "id": 7},
  "tokens": {"tokens": [3, 17, 4], "id": {"a": [1, 2.5]}},
}
PROMPTS = ("prompt", "tokens")
WRONG = [
  None,
  True,
  False,
  0,
  -1,
  1.5,
  0.1,
  10**9,
  10**18,
  10**400,
  -(10**400),
  2**31,
  2**63,
  1e308,
  -1e308,
  1e-320,
  "",
  " ",
  "\0",
  "\ufeff",
  "\ud800",
  "a" * 5000,
  "👩‍👩‍👧‍👦e\u0301\u200b",
  "\n\r\u2028\x1b[31m",
  "nan",
  [],
  {},
  [[]],
  [None],
  {"role": "text"},
  [1] * 1000,
  {"a": {"b": {"c": 1}}},
]
MARKERS = [
  "<err>",
  "<fix>",
  "<|sure_0|>",
  "<|bos|>",
  "<|eos|>",
  "<|pad|>",
  "<|head|>",
  "<|/head|>",
  "<|eot|>",
  "<|spare_0|>",
  "\ue0000\ue001",
]
RAW = [
  b"NaN",
  b"Infinity",
  b"-Infinity",
  b"1e400",
  b"-1e400",
  b"9" * 400,
  b"9" * 5000,
  b"[" * 100_000,
  b'{"a":' * 50_000,
  b"01",
  b"+1",
  b".5",
  b"1.",
  b"0x10",
  b"'a'",
  b'"\\x41"',
  b'"\\ud800\\ud800"',
  b'"\\udc00"',
  b'"\t"',
  b'"\x00"',
  b'"\xff"',
  b'"\xc0\x80"',
  b'"\xed\xa0\x80"',
  b'"\xf4\x90\x80\x80"',
  b"undefined",
  b"/* */ 1",
  b"1,",
  b"[1,]",
  b'{"a":1,}',
  b'{"a":1,"a":2}',
  b'"a" "b"',
  b"\xef\xbb\xbf1",
  b"true",
  b'"\\u0000"',
]


def paths(value, path=()):
  """Yield the path of each value inside, the whole first."""
  yield path
  for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
    yield from paths(value[key], (*path, key))


def changed(base, path, new):
  """Return the record with another value at the path; `new` is called with the one there."""
  whole = {"it": copy.deepcopy(base)}
  inner = whole
  for key in ("it", *path)[:-1]:
    inner = inner[key]
  last = ("it", *path)[-1]
  inner[last] = new(inner[last])
  return whole["it"]


def dump(value):
  return json.dumps(value).encode()


def cases():
  """Yield (kind, format, bytes of the file, name of the file); the last line of a file is the one in question."""
  for form, base in BASES.items():
    good = dump(base) + b"\n"
    for path in list(paths(base)):
      for value in WRONG:
        yield "wrong value", form, good + dump(changed(base, path, lambda _, value=value: value)) + b"\n", "r.jsonl"
      if path and isinstance(path[-1], str):
        renamed = changed(base, path[:-1], lambda inner, key=path[-1]: {k: v for k, v in inner.items() if k != key})
        yield "key left out", form, good + dump(renamed) + b"\n", "r.jsonl"
        more = changed(base, path[:-1], lambda inner: {**inner, "surprise": 1})
        yield "key too many", form, good + dump(more) + b"\n", "r.jsonl"
      hole = dump(changed(base, path, lambda _: "HOLE"))
      for raw in RAW:
        yield "raw JSON", form, good + hole.replace(b'"HOLE"', raw) + b"\n", "r.jsonl"
    rng = random.Random(form)
    for _ in range(150):
      yield "mutated bytes", form, good + mutated(dump(base), rng) + b"\n", "r.jsonl"
    for marker, path in itertools.product(MARKERS, [path for path in paths(base) if isinstance(at(base, path), str)]):
      for put in ("{m}", "{t}{m}", "{m}{t}", "{t} {m}{t}", "{m[0]}{m}{m}"):
        forged = changed(base, path, lambda text, put=put, m=marker: put.format(m=m, t=text))
        yield "forged marker", form, good + dump(forged) + b"\n", "r.jsonl"
    line = dump(base)
    for content in (
      line,
      line + b"\r\n",
      line + b"\r",
      b"\xef\xbb\xbf" + line,
      line + b"\n\n",
      b"\n" + line,
      line + line,
      line + b"\n \n",
      line + b"\0\n",
      b"\0" + line,
      line.decode().encode("utf-16"),
      b"",
      b"\n",
      json.dumps(base, ensure_ascii=False).encode("latin-1", "replace"),
      b" " + line + b" \t\n",
      line.replace(b" ", b"\xa0"),
      line + b"\n" + line[:-1],
      line[1:],
      b"null",
      b"[]",
      b"\xff\xfe",
    ):
      yield "file", form, content, "r.jsonl"
      yield "file, packed", form, gzip.compress(content), "r.jsonl.gz"
    packed = gzip.compress(good * 50)
    for content in (
      packed[:-1],
      packed[:-9],
      packed[:40],
      packed + packed,
      packed + b"tail",
      good,
      b"",
      b"\x1f\x8b",
      packed[:30] + b"\xff" + packed[31:],
    ):
      yield "damaged gzip", form, content, "r.jsonl.gz"


def at(value, path):
  for key in path:
    value = value[key]
  return value


def mutated(line, rng):
  line = bytearray(line)
  for _ in range(rng.randint(1, 3)):
    if not line:
      break
    place = rng.randrange(len(line))
    how = rng.randrange(5)
    if how == 0:
      line[place] ^= 1 << rng.randrange(8)
    elif how == 1:
      del line[place : place + rng.randint(1, 5)]
    elif how == 2:
      line[place:place] = bytes(rng.choice(b'{}[]",:\\ \n0eE.-tnf\x00\xff') for _ in range(rng.randint(1, 3)))
    elif how == 3:
      line[place:place] = line[place : place + rng.randint(1, 20)]
    else:
      line = line[: place + 1]
  return bytes(line).replace(b"\n", b" ")


def expected(value):
  """Return (role, text, weight) of each piece, neighbours of one role and weight joined, as the record says it."""
  value = {key: of_key for key, of_key in value.items() if key != "meta"}
  if "question" in value:
    return None  # what is taken out of an answer is tested with the task
  if "messages" in value:
    pieces = [("text" if one["role"] == "assistant" else "prompt", one["content"], None) for one in value["messages"]]
  elif "pieces" in value:
    pieces = [(one["role"], one["text"], one.get("weight")) for one in value["pieces"]]
  else:
    spans = value.get("spans", [])
    of_char = [("text", None)] * len(value["text"])
    for one in spans:
      of_char[one["start"] : one["end"]] = [(one["role"], one.get("weight"))] * (one["end"] - one["start"])
    pieces = [(role, char, weight) for char, (role, weight) in zip(value["text"], of_char, strict=True)]
  return joined(pieces)


def joined(pieces):
  return [
    (*key, "".join(text for _, text, _ in run))
    for key, run in itertools.groupby(
      pieces, key=lambda piece: (piece[0], None if piece[2] is None else float(piece[2]))
    )
  ]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
  """Return the counts (kind, "refused" or "read") and what was wrong."""
  folder = tmp_path_factory.mktemp("faults")
  tokenizer = {
    name: vocabulary.add_markers(bpe_tokenizer(IM_TEMPLATE), config(data__template=name).tokenizer).tokenizer
    for name in ("plain", "chat")
  }
  counts, wrong = collections.Counter(), []
  for number, (kind, form, content, name) in enumerate(cases()):
    path = folder / name
    path.write_bytes(content)
    try:
      read_as_prompts(path, tokenizer["chat"]) if form in PROMPTS else read_as_records(path, tokenizer)
      counts[kind, "read"] += 1
    except InputError as error:
      counts[kind, "refused"] += 1
      said = str(error)
      place = f"{path}:2" if kind in ("wrong value", "raw JSON", "mutated bytes", "forged marker") else str(path)
      if "\n" in said or len(said) > 1000 or place not in said:
        wrong.append((number, kind, form, content[-200:], said[:300]))
    except Exception as error:
      wrong.append((number, kind, form, content[-200:], repr(error)[:300]))
  return counts, wrong


def lines_of(path):
  content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
  return [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line]


def read_as_records(path, tokenizers):
  values = [(record.content, record.where) for record in records.read(str(path), limit=0)]
  chat = any(isinstance(content, records.Chat) for content, _ in values)
  some = config(data__path=str(path), data__template="chat" if chat else "plain", data__row_length=8192)
  tokenizer = tokenizers["chat" if chat else "plain"]
  contents = mixture.transcripts(some, "train")
  examples = tokens.tokenize_all(contents, tokenizer, some)
  special = [tokenizer.convert_tokens_to_ids(name) for name in tokenizer.get_added_vocab()]
  for line, (content, _), (transcript, _), example in zip(lines_of(path), values, contents, examples, strict=True):
    pieces = [piece for turn in transcript.turns for piece in turn.pieces] if chat else transcript
    said = joined([(roles.NAMES[piece.role], piece.text, piece.weight) for piece in pieces])
    assert expected(line) in (None, said), "other than the record says"
    assert (expected(line) is None) == isinstance(content, Problem)
    assert np.abs(example.weight_T).max() <= 1e6, "sums of the weights may be infinite"
    text = "".join(piece.text for piece in pieces)
    num_turns = len(transcript.turns) if chat else 0
    num_flags = sum(piece.role == roles.FLAG for piece in pieces)
    # Of the template: head and eot of each turn; of a text alone: bos and eos. Nothing comes out of what is said.
    assert np.isin(example.token_T, special).sum() == (2 * num_turns if chat else 2) + num_flags, "a marker was forged"
    if not chat:
      decoded = tokenizer.decode(example.token_T, skip_special_tokens=False, clean_up_tokenization_spaces=False)
      assert decoded == f"<|bos|>{text}<|eos|>", "tokens other than the text"


def read_as_prompts(path, tokenizer):
  prompts = read_prompts(str(path))
  for line, prompt in zip(lines_of(path), prompts, strict=True):
    assert {**prompt.carried, **({"tokens": prompt.tokens} if prompt.text is None else {"prompt": prompt.text})} == line
    json.dumps(line, allow_nan=False, ensure_ascii=False).encode()
    if prompt.text is not None:
      special = [tokenizer.convert_tokens_to_ids(name) for name in tokenizer.get_added_vocab()]
      assert np.isin(tokens.encode_prompt(prompt.text, tokenizer, "chat"), special).sum() == 3, "a marker was forged"


def test_each_bad_record_or_prompt_is_one_line_or_what_it_says(outcome):
  counts, wrong = outcome
  print("\n" + "\n".join(f"{kind:<16}{how:<10}{num:>6}" for (kind, how), num in sorted(counts.items())))
  assert sum(counts.values()) >= LEAST_CASES
  assert counts["file", "read"] >= 4 * len(BASES), "lines without a fault are refused"
  assert not wrong, f"{len(wrong)} wrong, first {wrong[:3]}"


def test_a_text_at_which_the_tokenizer_gives_up_is_named():
  tokenizer = bpe_tokenizer()
  llama_3 = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")  # of its spaces
  tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [llama_3, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  with pytest.raises(InputError, match=r"the prompt.* the tokenizer gives up \(.*retry-limit"):
    tokens.encode_prompt("a" + " " * 12_000_000 + "b", tokenizer, "plain")

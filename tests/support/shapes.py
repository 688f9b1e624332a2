"""Shapes of eight public data sets: ten records of each, made by hand, and the data.fields that reads them."""

import gzip
import json

import pyarrow
import pyarrow.parquet
from datakit import question


def zstd(content: bytes) -> bytes:
  out = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(out, "zstd") as stream:
    stream.write(content)
  return out.getvalue().to_pybytes()


def parquet(rows: list[dict]) -> bytes:
  out = pyarrow.BufferOutputStream()
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
  return out.getvalue().to_pybytes()


def content(ending: str, rows: list[dict]) -> bytes:
  """What a file whose name ends so holds with these rows."""
  if ending == ".parquet":
    return parquet(rows)
  lines = "".join(json.dumps(row) + "\n" for row in rows) if ".jsonl" in ending else json.dumps(rows, indent=1)
  compress = {".gz": gzip.compress, ".zst": zstd}.get(ending[ending.rindex(".") :], bytes)
  return compress(lines.encode())


PAIRS = [(f"What is {n} plus {n + 1}?", f"{n} + {n + 1} = {2 * n + 1}.\nThe sum is {2 * n + 1}.") for n in range(2, 12)]


def math(ask, answer):
  return {"problem": ask, "level": "Level 1", "type": "Prealgebra", "solution": answer}


def metamath(ask, answer):
  return {"type": "GSM_Rephrased", "query": ask, "original_question": "What?", "response": answer}


def alpaca(ask, answer):
  words, _, numbers = ask.partition(" is ")
  return {"instruction": words, "input": numbers if "3" in numbers else "", "output": answer, "text": "### all"}


def sharegpt(ask, answer):
  turns = [("human", ask), ("gpt", answer), ("human", "Sure?"), ("gpt", "Yes.")]
  return {"id": "identity_0", "conversations": [{"from": who, "value": said} for who, said in turns]}


def openhermes(ask, answer):
  turns = [("system", "Be brief."), ("human", ask), ("gpt", answer)]
  messages = [{"from": who, "value": said, "weight": None} for who, said in turns]
  return {"conversations": messages, "source": "airoboros2.2", "category": "math", "skip_prompt_formatting": None}


def tulu(ask, answer):
  messages = [{"content": ask, "role": "user"}, {"content": answer, "role": "assistant"}]
  return {"id": "flan_1", "messages": messages, "source": "flan"}


def completion(ask, answer):
  return {"prompt": ask, "completion": answer}


# name -> (data.fields, end of the file's name, records)
SHAPES = {
  "gsm8k": ("", ".parquet", [question(n) for n in range(10)]),
  "math": ("question=problem,answer=solution", ".jsonl.zst", [math(*pair) for pair in PAIRS]),
  "metamathqa": ("question=query,answer=response", ".json", [metamath(*pair) for pair in PAIRS]),
  "alpaca": ("question=instruction+input,answer=output", ".json", [alpaca(*pair) for pair in PAIRS]),
  "sharegpt": ("messages=conversations", ".json", [sharegpt(*pair) for pair in PAIRS]),
  "openhermes": ("messages=conversations", ".parquet", [openhermes(*pair) for pair in PAIRS]),
  "tulu": ("messages", ".parquet", [tulu(*pair) for pair in PAIRS]),
  "completion": ("question=prompt,answer=completion", ".jsonl.gz", [completion(*pair) for pair in PAIRS]),
}


def write(folder, name: str) -> tuple[str, str]:
  """(data.path, data.fields) of a data set of that shape, written into the folder."""
  columns, ending, rows = SHAPES[name]
  path = folder / f"{name}{ending}"
  path.write_bytes(content(ending, rows))
  return str(path), columns

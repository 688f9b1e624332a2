"""Cache of rows: those of records are made once, in files that later starts map into memory without reading a record.

  FOLDER/rows-KEY/train_token.npy ...    fields of the rows, in NumPy's format
  FOLDER/rows-KEY/data.json              receipt, records left out, digest; written last
  FOLDER/files/NAME.json                 SHA-256 of a file of records, with the size and time it was taken at

KEY is a digest of all that rows depend on: the content and name of each file of records, the tokenizer, the config, the
code of this package that makes rows, and the libraries that it uses. A folder is whole or not there. Processes that
want the same rows wait for the one that makes them. Nothing is deleted here by this package; FOLDER can be at any time.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data.packing import Rows
from insec_jax.data.receipt import Data, LeftOut
from insec_jax.data.storage import Disk, Storage, path_of
from insec_jax.data.template import DATE_KEY
from insec_jax.data.tokens import TooLong
from insec_jax.files import locks, sources
from insec_jax.files.reading import open_to_read, read_json
from insec_jax.files.writing import folder_written_whole, write_text

FORMAT = 1  # of the files
PACKAGE = pathlib.Path(__file__).parents[1]
CODE = ("data", "files", "method")  # folders of the package that make rows
PACKAGES = ("tokenizers", "transformers", "jinja2", "numpy")
SECTIONS = ("tokenizer", "task", "data", "mistakes", "loss")  # of the config, beside the seed
# Where things are, and what only concerns batches: rows do not depend on it.
WITHOUT = ("path", "heldout_path", "mined_path", "cache", "rows_per_device", "accumulation")
META = "data.json"
POLL_SECONDS = 0.5
SETTLED_SECONDS = 2  # a file that was changed less long ago may change again within the resolution of its time


def shared(config: Config, tokenizer: PreTrainedTokenizerFast, make: Callable[[Storage], Data]) -> Data:
  """Return the data of a config from data.cache, where `make` puts it if it is not there yet."""
  folder = pathlib.Path(config.data.cache)
  path = folder / f"rows-{key(config, tokenizer)}"
  while not path.is_dir():
    with contextlib.ExitStack() as stack:
      lock = path.with_name(f".{path.name}.making")
      try:
        stack.enter_context(locks.one_writer(lock, str(path), "data.cache"))
      except InputError:
        if not locks.is_held(lock) and not path.is_dir():
          raise
        time.sleep(POLL_SECONDS)
        continue
      if not path.is_dir():
        _write(path, make)
  return _read(path)


def _make_folder(folder: pathlib.Path) -> None:
  try:
    (folder / "files").mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"data.cache={folder} cannot be made ({error.strerror}); give a folder that can") from None


def _write(path: pathlib.Path, make: Callable[[Storage], Data]) -> None:
  with folder_written_whole(path, "data.cache") as partial:
    data = make(Disk(partial))
    left_out = dataclasses.asdict(data.left_out)
    held = {"digest": data.digest, "most_token": data.most_token, "most_position": data.most_position}
    write_text(partial / META, json.dumps({"receipt": data.receipt, "left_out": left_out, **held}))


def _read(path: pathlib.Path) -> Data:
  held = read_json(path / META, "data.cache")
  try:
    left_out = held.pop("left_out")
    too_long = {split: tuple(TooLong(*record) for record in left_out[split]) for split in ("train", "heldout")}
    out = LeftOut(**too_long, prompts_held_out=tuple(left_out["prompts_held_out"]))
    return Data(_rows(path, "train"), _rows(path, "heldout"), left_out=out, **held)
  except (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError) as error:
    raise InputError(
      f"{path} is damaged ({type(error).__name__}: {error!s:.100}); delete it, it is made anew"
    ) from None


def _rows(path: pathlib.Path, split: str) -> Rows:
  names = [field.name.removesuffix("_BT") for field in dataclasses.fields(Rows)]
  return Rows(*(np.load(path_of(path, split, name), mmap_mode="r") for name in names))


def key(config: Config, tokenizer: PreTrainedTokenizerFast) -> str:
  """Return the name of the rows of this config: a digest of all that they depend on."""
  _make_folder(pathlib.Path(config.data.cache))
  texts = {"data.path": config.data.path, "data.heldout_path": config.data.heldout_path}
  texts["mistakes.mined_path"] = config.mistakes.mined_path
  files = {
    name: [(source.shown, _content(pathlib.Path(config.data.cache), source)) for source in sources.find(text, name)]
    for name, text in texts.items()
    if text
  }
  values = {
    name: {key: value for key, value in dataclasses.asdict(getattr(config, name)).items() if key not in WITHOUT}
    for name in SECTIONS
  }
  tokens = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.init_kwargs.get(DATE_KEY)]
  tokens += [str(tokenizer.special_tokens_map)]
  facts = [FORMAT, _code(), {name: importlib.metadata.version(name) for name in PACKAGES}, files, config.seed, values]
  return hashlib.sha256(json.dumps([*facts, tokens]).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
  """Return a digest of the source of what makes rows."""
  digest = hashlib.sha256()
  for file in sorted(file for folder in CODE for file in (PACKAGE / folder).rglob("*.py")):
    digest.update(file.read_bytes())
  return digest.hexdigest()


def _content(folder: pathlib.Path, source: sources.Source) -> str:
  """Return the SHA-256 of a file, which is read only if its size or time differ from when it was last taken."""
  with open_to_read(source.path, "data.path") as file:
    before = os.fstat(file.fileno())
    at: dict[str, Any] = {"path": os.path.realpath(source.path), "size": before.st_size, "time": before.st_mtime_ns}
    note = folder / "files" / f"{hashlib.sha256(at['path'].encode()).hexdigest()[:32]}.json"
    if note.is_file():
      noted = read_json(note, "data.cache")
      if {name: noted.get(name) for name in at} == at:
        return str(noted.get("sha256"))
    content = hashlib.file_digest(file, "sha256").hexdigest()
  if time.time_ns() - before.st_mtime_ns > SETTLED_SECONDS * 10**9:
    write_text(note, json.dumps({**at, "sha256": content}))
  return content

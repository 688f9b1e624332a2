"""Cache of rows: those of records are made once, in files that later starts map into memory without reading a record.

  FOLDER/rows-KEY/train_token.npy ...    fields of the rows, in NumPy's format
  FOLDER/rows-KEY/data.json              receipt, records left out, digest; size, time and SHA-256 of each other file
  FOLDER/files/NAME.json                 SHA-256 of a file of records, with the size and time it was taken at

KEY is a digest of all that rows depend on: the content and name of each file of records, the tokenizer, the config, the
code of this package that makes rows, and the libraries that it uses. A folder is whole or not there. Processes that
want the same rows wait for the one that makes them. Nothing is deleted here by this package; FOLDER can be at any time.

A start compares the size and the time of each file with data.json. A file of another time, such as a copy of the cache
has, is read once through for its SHA-256, a second for each gigabyte; one of other content is refused.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data.packing import FIELDS, Rows
from insec_jax.data.receipt import Data, LeftOut
from insec_jax.data.storage import Disk, Storage, path_of
from insec_jax.data.template import DATE_KEY
from insec_jax.data.tokens import TooLong
from insec_jax.files import locks, sources
from insec_jax.files.reading import open_to_read, read_json
from insec_jax.files.writing import folder_written_whole, write_text

FORMAT = 2  # of the files
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
  make_once(path, "data.cache", lambda: _write(path, make))
  return _read(path)


def make_once(path: pathlib.Path, name: str, write: Callable[[], None]) -> None:
  """Call `write`, which makes the folder `path`, unless it is there; wait while another process makes it.

  `name` is the key of the config that names the cache.
  """
  while not path.is_dir():
    with contextlib.ExitStack() as stack:
      lock = path.with_name(f".{path.name}.making")
      try:
        stack.enter_context(locks.one_writer(lock, str(path), name))
      except InputError:
        if not locks.is_held(lock) and not path.is_dir():
          raise
        time.sleep(POLL_SECONDS)
        continue
      if not path.is_dir():
        write()


def unused(config: Config) -> str:
  """Return a line about a data.cache into which nothing is put; empty where there is no such cache."""
  if not config.data.cache or config.reads_records:
    return ""
  return (
    f"data.cache={config.data.cache} is not used: it keeps rows of records, and task.name={config.task.name!r} makes "
    "its problems at each start"
  )


def make_folder(folder: pathlib.Path, name: str) -> None:
  """Make the folder of a cache; InputError where it cannot be made."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"{name}={folder} cannot be made ({error.strerror}); give a folder that can") from None


def _write(path: pathlib.Path, make: Callable[[Storage], Data]) -> None:
  with room_needed(path.parent, "rows of data.cache"), folder_written_whole(path, "data.cache") as partial:
    data = make(Disk(partial))
    left_out = dataclasses.asdict(data.left_out)
    held = {"digest": data.digest, "most_token": data.most_token, "most_position": data.most_position}
    files = {file.name: written(file) for file in sorted(partial.glob("*.npy"))}
    write_text(partial / META, json.dumps({"receipt": data.receipt, "left_out": left_out, **held, "files": files}))


@contextlib.contextmanager
def room_needed(folder: pathlib.Path, what: str) -> Iterator[None]:
  """Add what it is for, and the folder, to the error of a full disk inside the block."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    said = f"{os.strerror(error.errno)} for the {what}"
    raise OSError(error.errno, said, str(folder)) from None


def written(path: pathlib.Path) -> dict[str, Any]:
  """Return size, time and SHA-256 of a file, after its content has reached the disk."""
  with path.open("rb") as file:
    os.fsync(file.fileno())
    status = os.fstat(file.fileno())
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  return {"size": status.st_size, "time": status.st_mtime_ns, "sha256": digest}


def _read(path: pathlib.Path) -> Data:
  try:
    held = read_json(path / META, "data.cache")
    files = held.pop("files")
    for name, written in files.items():
      check_file(path / name, written)
    left_out = held.pop("left_out")
    too_long = {split: tuple(TooLong(*record) for record in left_out[split]) for split in ("train", "heldout")}
    out = LeftOut(**too_long, prompts_held_out=tuple(left_out["prompts_held_out"]))
    return Data(_rows(path, "train", files), _rows(path, "heldout", files), left_out=out, **held)
  except (InputError, KeyError, TypeError, ValueError, AttributeError, FileNotFoundError) as error:
    raise damaged(path, error) from None


def check_file(path: pathlib.Path, written: dict[str, Any]) -> None:
  """Raise InputError for a file of another size or content than was written; one of the same time is not read."""
  status = path.stat()
  if status.st_size != written["size"]:
    raise InputError(f"{path.name} has {status.st_size:,} bytes, {written['size']:,} were written")
  if status.st_mtime_ns != written["time"]:
    with path.open("rb") as file:
      if hashlib.file_digest(file, "sha256").hexdigest() != written["sha256"]:
        raise InputError(f"{path.name} has another content than was written")


def damaged(path: pathlib.Path, error: Exception, name: str = "data.cache") -> InputError:
  """Return the error for a folder of a cache whose files are not what was written."""
  said = str(error).partition("; ")[0] if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
  return InputError(f"{name}: {path} is damaged ({said:.200}); delete it, it is made anew")


def _rows(path: pathlib.Path, split: str, files: Collection[str]) -> Rows:
  """Return the rows of a split: every field but `until` has a file, and that one with mistakes.rewind."""
  paths = {name: path_of(path, split, name) for name in FIELDS}
  return Rows(*(np.load(file, mmap_mode="r") for name, file in paths.items() if name != "until" or file.name in files))


def key(config: Config, tokenizer: PreTrainedTokenizerFast) -> str:
  """Return the name of the rows of this config: a digest of all that they depend on."""
  folder = pathlib.Path(config.data.cache)
  make_folder(folder, "data.cache")
  make_folder(folder / "files", "data.cache")
  texts = {"data.path": config.data.path, "data.heldout_path": config.data.heldout_path}
  texts["mistakes.mined_path"] = config.mistakes.mined_path
  files = {
    name: [(source.shown, _content(folder, source)) for source in sources.find(text, name)]
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
      try:
        noted = read_json(note, "data.cache")
      except InputError as error:
        raise damaged(note, error) from None
      if {name: noted.get(name) for name in at} == at:
        return str(noted.get("sha256"))
    content = hashlib.file_digest(file, "sha256").hexdigest()
  if time.time_ns() - before.st_mtime_ns > SETTLED_SECONDS * 10**9:
    write_text(note, json.dumps({**at, "sha256": content}))
  return content

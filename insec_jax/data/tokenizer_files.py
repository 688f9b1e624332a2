"""Files of a tokenizer: copied byte for byte, changed only for added markers and for what transformers 4 needs.

transformers 5 writes a class name, keys of its own and a list of extra tokens that 4.57 cannot read.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.data.template import DATE_KEY
from insec_jax.files.reading import open_to_read, read_json
from insec_jax.files.writing import write_text

BACKEND, SETTINGS, ADDED, SPECIAL = (
  "tokenizer.json",
  "tokenizer_config.json",
  "added_tokens.json",
  "special_tokens_map.json",
)
PATTERNS = ("tokenizer*", ADDED, SPECIAL, "vocab*", "merges.txt", "*.model", "*.tiktoken", "chat_template*")
TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
# Loads tokenizer.json unchanged in transformers 4.57 and 5; other classes may build another tokenizer from it.
CLASS = "PreTrainedTokenizerFast"
OF_THE_READER = ("is_local", "local_files_only", "auto_map")  # name the source folder, or code that is not copied


def carried(folder: Path) -> Iterator[Path]:
  """Yield the path, relative to the folder, of every file that belongs to its tokenizer."""
  paths = {path for pattern in PATTERNS for path in folder.glob(pattern)}
  paths |= {path for name in TEMPLATE_FOLDERS for path in folder.glob(f"{name}/*.jinja")}
  for path in sorted(paths):
    if not path.is_dir():
      yield path.relative_to(folder)


def copy(source: Path, folder: Path) -> None:
  """Copy the tokenizer's files; only what transformers 4.57 cannot read is changed."""
  for name in carried(source):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with open_to_read(source / name, "tokenizer") as file, open(folder / name, "wb") as copied:
      shutil.copyfileobj(file, copied)
  _make_readable(folder)


def save(tokenizer: PreTrainedTokenizerFast, source: Path | None, folder: Path) -> None:
  """Write the tokenizer's files: those of the folder `source` that it was loaded from, with the tokens added since.

  Where nothing was added the copies have the same bytes. With `source` None the tokenizer was built here.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if source is None:
    tokenizer.save_pretrained(folder)
    _make_readable(folder)
    return
  copy(source, folder)
  fields = read_json(folder / BACKEND, "tokenizer")
  added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
  before = {token["content"]: token for token in fields.get("added_tokens") or []}
  if changed := [token for token in added if before.get(token["content"]) != token]:
    _write_json(folder / BACKEND, {**fields, "added_tokens": added})
    _update_token_lists(folder, changed)
  settings = read_settings(folder)
  if settings.get(DATE_KEY) != (day := tokenizer.init_kwargs.get(DATE_KEY)):
    _write_json(folder / SETTINGS, {**settings, DATE_KEY: day})


def _update_token_lists(folder: Path, changed: list[dict[str, Any]]) -> None:
  """Enter tokens of tokenizer.json into the other files that list such tokens."""
  settings = read_settings(folder)
  if settings.get("added_tokens_decoder"):
    entries = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in changed}
    _write_json(folder / SETTINGS, {**settings, "added_tokens_decoder": settings["added_tokens_decoder"] | entries})
  if (folder / ADDED).is_file():
    _write_json(
      folder / ADDED, read_json(folder / ADDED, "added tokens") | {token["content"]: token["id"] for token in changed}
    )


def _make_readable(folder: Path) -> None:
  """Change what transformers 4.57 cannot read in tokenizer_config.json, if there is any."""
  settings = read_settings(folder)
  changed = {key: value for key, value in settings.items() if key not in OF_THE_READER} | {"tokenizer_class": CLASS}
  if isinstance(extra := changed.get("extra_special_tokens"), list):  # 4.57 takes names for such tokens, or none
    del changed["extra_special_tokens"]
    if extra:
      changed["additional_special_tokens"] = extra
  if changed != settings:
    _write_json(folder / SETTINGS, changed)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
  write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
  """Return the fields of tokenizer_config.json; none when there is no such file."""
  return read_json(folder / SETTINGS, "tokenizer config") if os.path.lexists(folder / SETTINGS) else {}


def check(folder: Path) -> dict[str, int]:
  """Return the id of every added token, as tokenizer.json gives it.

  Raises InputError unless the files of a tokenizer's folder can be read and agree on the tokens they list.
  """
  if not os.path.lexists(folder / BACKEND):
    raise InputError(
      f"{folder} has no {BACKEND}; give a folder that save_pretrained wrote (model.path or tokenizer.path)"
    )
  for name in carried(folder):
    if name.suffix == ".json" and name.name not in (BACKEND, SETTINGS):
      read_json(folder / name, "tokenizer")
    else:
      open_to_read(folder / name, "tokenizer").close()
    if name.suffix == ".jinja":
      _check_text(folder / name)
  fields, settings = read_json(folder / BACKEND, "tokenizer"), read_settings(folder)
  with _input_errors(folder / BACKEND):
    ids = {}
    for token in fields.get("added_tokens") or []:
      ids[_text(token["content"])] = _id(token["id"])
    if len(set(ids.values())) < len(fields.get("added_tokens") or []):
      raise InputError(f"{folder / BACKEND}: two added tokens have one id or one name; write the tokenizer again")
    listed = {number: content for content, number in ids.items()}
    vocabulary = fields["model"]["vocab"]
    if isinstance(vocabulary, dict):
      numbers = [_id(number) for number in vocabulary.values()]
      if len(set(numbers)) < len(numbers):
        raise InputError(f"{folder / BACKEND}: two tokens of the vocabulary have one id; write the tokenizer again")
      ids = vocabulary | ids
  with _input_errors(folder / SETTINGS):
    more = set(read_json(folder / ADDED, "added tokens")) if os.path.lexists(folder / ADDED) else set()
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
      more.add(content := _text(token["content"]))
      if ids.get(content, int(number)) != int(number) or listed.get(int(number), content) != content:
        raise InputError(
          f"{folder / SETTINGS} gives {content!r:.60} the id {number:.30}, {BACKEND} gives it "
          f"{ids.get(content, 'to another token')}; write the tokenizer again"
        )
    for key, value in settings.items():
      if key.endswith("_token") and value is not None and not key.startswith("add_"):
        content = _text(value["content"] if isinstance(value, dict) else value)
        if key in ("bos_token", "eos_token") and listed and content not in {*listed.values(), *more}:
          raise InputError(
            f"{folder / SETTINGS}: {key}={content!r:.60} is none of the tokens that {BACKEND} adds; correct it"
          )
  return {content: number for number, content in listed.items()}


@contextlib.contextmanager
def _input_errors(path: Path) -> Iterator[None]:
  """Turn the errors of a malformed value into an InputError that names the file."""
  try:
    yield
  except (KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f"{path} has not the form of a tokenizer's file ({type(error).__name__}: {error!s:.80}); write "
      "the tokenizer again"
    ) from None
  except ValueError as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"{path}: {error!s:.100}; write the tokenizer again") from None


def _text(value) -> str:
  if not isinstance(value, str) or not value:
    raise ValueError(f"{value!r:.40} is no text of a token")
  value.encode()
  return value


def _id(value) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
    raise ValueError(f"{value!r:.40} is no id of a token")
  return value


def _check_text(path: Path) -> None:
  with open_to_read(path, "chat template") as file:
    try:
      file.read().decode()
    except UnicodeDecodeError as error:
      raise InputError(f"{path}: byte {error.start} is not UTF-8; write the file again as UTF-8") from None

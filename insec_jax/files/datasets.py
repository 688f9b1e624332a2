"""Data sets of the Hugging Face Hub: the files that a text names, downloaded into the usual cache.

  hf://datasets/org/name[@revision]/data/a-*.parquet    files of the repository, with patterns
  hf://datasets/org/name[@revision]/SUBSET/SPLIT        the files of a split, as the card of the data set names them
  hf://datasets/org/name[@revision]/SPLIT               the same, where there is one subset, or one called "default"
  hf://datasets/org/name[@revision]                     the same, where there is one split in all

Where the card names no files, those of a split have its name as a word in their path, below the folder SUBSET; .parquet
files are taken if there are any, else .jsonl, else .json. A pattern's "*" also matches "/".
"""

import fnmatch
import glob
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from insec_jax.command import InputError
from insec_jax.files import hub

SCHEME = "hf://"
DATASET = re.compile(
  r"hf://datasets/(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)"
  r"(@(?P<revision>refs/(convert|pr)/[\w-]+|[\w.+-]+))?(/(?P<rest>.*))?",
  re.ASCII,
)
FORMATS = (".parquet", ".jsonl", ".json")  # in order of preference
FILE = re.compile(r".*\.(parquet|jsonl?(\.gz|\.zst)?)")
CARD = "README.md"
MOST_NAMED = 12  # splits or files named in an error
Splits = dict[str, list[str]]  # "SUBSET/SPLIT" -> patterns


def check(text: str, name: str) -> None:
  """Raise InputError unless the text has the form of a data set's files."""
  if not DATASET.fullmatch(text) or {".", ".."} & set(text.split("/")):
    raise InputError(
      f"{name}={text}: not of the form hf://datasets/org/name[@revision][/SUBSET/SPLIT or /FILES]; correct it"
    )


def find(text: str, name: str) -> list[tuple[pathlib.Path, str]]:
  """Return (local path, name in errors) of the files that the text names, in order of their names.

  Raises InputError where there are none, and as `hub.snapshot` does.
  """
  check(text, name)
  match = DATASET.fullmatch(text)
  assert match is not None, "check has matched it"
  repository, revision, rest = match["repository"], match["revision"], (match["rest"] or "").strip("/")
  given = f"{SCHEME}datasets/{repository}" + (f"@{revision}" if revision else "")

  def fetch(patterns: Sequence[str]) -> list[tuple[pathlib.Path, str]]:
    folder = hub.snapshot(given, name, "dataset", repository, revision, patterns)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = [(path, path.relative_to(folder).as_posix()) for path in files]
    matched = [(path, at) for path, at in named if any(fnmatch.fnmatchcase(at, pattern) for pattern in patterns)]
    return [(path, f"{given}/{at}") for path, at in matched]

  if glob.has_magic(rest) or FILE.fullmatch(rest):
    found = fetch([rest])
  else:
    card = fetch([CARD])
    splits = _splits(card[0][0], given) if card else {}
    choices = [_chosen(splits, rest, text, name)] if splits else list(_by_name(rest))
    found = next((files for patterns in choices if (files := fetch(patterns))), [])
  if not found:
    raise InputError(f"{name}={text}: the data set has no such files or split; it has {_listing(repository, given)}")
  for _, shown in found:
    if not FILE.fullmatch(shown):
      raise InputError(f"{name}={text}: {shown} is none of {', '.join(FORMATS)}; name files that are, with a pattern")
  return found


def _splits(card: pathlib.Path, given: str) -> Splits:
  """Return the splits that the card of a data set names; none where it names no files."""
  from huggingface_hub import metadata_load

  try:
    configs = (metadata_load(card) or {}).get("configs") or []
    found: Splits = {}
    for config in configs:
      for split, patterns in _files_of(config):
        found.setdefault(f"{config.get('config_name', 'default')}/{split}", []).extend(patterns)
    return found
  except Exception as error:  # of YAML, and of another form than the Hub's
    said = " ".join(str(error).split())[:100]
    raise InputError(
      f"{given}/{CARD} does not name the data set's files in a way that can be read ({said}); name files with a pattern"
    ) from None


def _files_of(config: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
  """Yield (split, patterns) of a subset of a card."""
  files = config.get("data_files") or []
  for entry in [files] if isinstance(files, str | dict) else files:
    split, paths = ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])
    yield split, [path.removeprefix("./") for path in ([paths] if isinstance(paths, str) else paths)]


def _chosen(splits: Splits, rest: str, text: str, name: str) -> list[str]:
  """Return the patterns of the split that the text names; InputError that lists all where it names none, or several."""
  subsets = [key.partition("/")[0] for key in splits]
  names = dict(splits)  # what a user may write -> patterns
  for (key, patterns), subset in zip(splits.items(), subsets, strict=True):
    if subset == "default" or len(set(subsets)) == 1:
      names[key.partition("/")[2]] = patterns
    if subsets.count(subset) == 1:
      names.setdefault(subset, patterns)
    if len(splits) == 1:
      names[""] = patterns
  if rest in names:
    return names[rest]
  known = ", ".join(list(splits)[:MOST_NAMED]) + (", ..." if len(splits) > MOST_NAMED else "")
  raise InputError(f"{name}={text}: the data set has {known}; name one, such as {_base(text)}/{next(iter(splits))}")


def _base(text: str) -> str:
  match = DATASET.fullmatch(text)
  assert match is not None, "the text was checked"
  return text[: match.start("rest") - 1] if match["rest"] is not None else text


def _by_name(rest: str) -> Iterator[list[str]]:
  """Yield, format by format, patterns of the files that have the split as a word in their path."""
  folder, _, split = rest.rpartition("/")
  before = f"{glob.escape(folder)}/" if folder else ""
  apart = "[-._/0-9]"
  for ending in FORMATS if split else ():
    ends = [ending] if ending == ".parquet" else [ending, f"{ending}.gz", f"{ending}.zst"]
    words = [f"{split}{apart}*", f"*{apart}{split}{apart}*", split, f"*{apart}{split}"]
    yield [f"{before}{word}{end}" for word in words for end in ends]


def _listing(repository: str, given: str) -> str:
  """Return the names of the first files of a repository that can be read, for an error."""
  from huggingface_hub import HfApi, constants

  if constants.HF_HUB_OFFLINE:
    return "files that HF_HUB_OFFLINE does not let this program list"
  names = HfApi().list_repo_files(repository, repo_type="dataset", revision=hub.commits()[given])
  readable = [name for name in sorted(names) if FILE.fullmatch(name)]
  if not readable:
    return f"none of {', '.join(FORMATS)}; {given.partition('@')[0]}@refs/convert/parquet may have them"
  return ", ".join(readable[:MOST_NAMED]) + (", ..." if len(readable) > MOST_NAMED else "")

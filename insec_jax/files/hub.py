"""Hugging Face Hub: a repository's name becomes a local folder, downloaded into the usual cache where it is not there.

  org/name[@revision]                        a model; a local folder of that name is taken instead
  hf://datasets/org/name[@revision]/...      a data set (data/sources.py)

huggingface_hub does the downloads: an interrupted one is resumed, processes of one host wait for each other file by
file, and HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured. A revision becomes a commit once in a process,
so all files are of one commit, even if the revision moves.
"""

import contextlib
import errno
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

from insec_jax.command import InputError
from insec_jax.files.reading import folder_to_read

REPOSITORY = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./+-]+))?", re.ASCII)
# Files of a model. A pattern without "/" is a name: `fnmatch` lets "*" match "/", and such files are left out.
LIGHT = ("*.json", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab*", "tokenizer*", "README.md")
TEMPLATES = ("additional_chat_templates/*.jinja", "chat_templates/*.jinja")
WEIGHTS = ("model.safetensors", "model-*.safetensors")
_commits: dict[str, str] = {}  # of this process: the user's text -> commit


def is_id(text: str) -> bool:
  """Return whether the text names a model of the Hub: it has the form of an id, and nothing local has that name."""
  return bool(REPOSITORY.fullmatch(text)) and not os.path.lexists(os.path.expanduser(text))


def model_folder(text: str | os.PathLike, name: str, *, weights: bool = True) -> pathlib.Path:
  """Return the local folder of a model: the given path, or the snapshot of a repository of the Hub.

  `name` is the flag or config key that gave the text. Without `weights` only config and tokenizer are downloaded.
  Raises InputError for a repository that cannot be used, ConnectionError where the Hub cannot be reached.
  """
  text = os.fspath(text)
  if not is_id(text):
    return folder_to_read(text, name)
  match = REPOSITORY.fullmatch(text)
  assert match is not None, "is_id has matched it"
  repository, revision = match["repository"], match["revision"]
  folder = snapshot(text, name, "model", repository, revision, (*LIGHT, *TEMPLATES))
  if weights:
    folder = snapshot(text, name, "model", repository, revision, (*LIGHT, *TEMPLATES, *WEIGHTS))
    if not any(folder.glob("*.safetensors")):
      raise InputError(
        f"{name}={text}: the repository has no model.safetensors or model-*.safetensors; give one that has, or a "
        "folder in which save_pretrained has written such files"
      )
  return folder


def commits() -> dict[str, str]:
  """Return the commit of each repository that this process has used, by the text that named it."""
  return dict(_commits)


def snapshot(
  text: str, name: str, kind: str, repository: str, revision: str | None, patterns: Sequence[str]
) -> pathlib.Path:
  """Return the folder of a repository in the cache, with all files that match; `kind` is "model" or "dataset"."""
  from huggingface_hub import snapshot_download, utils  # slow to import, and seldom needed

  if not sys.stderr.isatty():
    utils.disable_progress_bars()
  utils.logging.disable_propagation()  # absl's handler would print each of its warnings again
  with _refusals(text, name, kind):
    folder = snapshot_download(
      repository,
      repo_type=kind,
      revision=_commits.get(text, revision),
      allow_patterns=list(patterns),
      ignore_patterns=None if kind == "dataset" else _nested(patterns),
    )
  _commits[text] = pathlib.Path(folder).name
  return pathlib.Path(folder)


def _nested(patterns: Sequence[str]) -> list[str]:
  """Return patterns of the files in folders that `patterns` match only because "*" matches "/"."""
  return [f"*/{pattern}" for pattern in patterns if "/" not in pattern and not pattern.endswith(".jinja")]


@contextlib.contextmanager
def _refusals(text: str, name: str, kind: str) -> Iterator[None]:
  """Turn errors of huggingface_hub into one line each."""
  import httpx2
  from huggingface_hub import constants, errors

  what = "model" if kind == "model" else "data set"
  given = f"{name}={text}"
  try:
    yield
  except errors.GatedRepoError as error:
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{error.repo_id}"
    raise InputError(
      f"{given}: the {what} is gated; accept its terms at {page}, and set HF_TOKEN to a token of that account"
    ) from None
  except errors.RepositoryNotFoundError:
    here = "no folder of this name is here, and " if kind == "model" else ""
    raise InputError(
      f"{given}: {here}the Hub has no {what} of this name that can be read; correct the name, or set HF_TOKEN if it is "
      "private"
    ) from None
  except errors.RevisionNotFoundError:
    raise InputError(
      f"{given}: the {what} has no such revision; give a branch, a tag or a commit that it has"
    ) from None
  except errors.HFValidationError as error:
    raise InputError(f"{given}: no name of a repository ({error!s:.200}); correct it") from None
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
    if constants.HF_HUB_OFFLINE:
      raise InputError(
        f"{given}: HF_HUB_OFFLINE is set, and the cache ({constants.HF_HUB_CACHE}) lacks files of it; "
        "unset the variable, or download it before"
      ) from None
    raise _unreachable(given, error.__cause__ or error) from None
  except errors.HfHubHTTPError as error:
    if error.response.status_code in (401, 403):
      raise InputError(
        f"{given}: the Hub refuses access ({error.response.status_code}); set HF_TOKEN to a token that may read it"
      ) from None
    raise _unreachable(given, error) from None
  except httpx2.HTTPError as error:
    raise _unreachable(given, error) from None


def _unreachable(given: str, error: BaseException) -> ConnectionError:
  """Return the error of a machine without a way to the Hub."""
  from huggingface_hub import constants

  said = " ".join(str(error).split())[:200]
  return ConnectionError(
    errno.EHOSTUNREACH,
    f"{given} is nothing local, and {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {said}); run the "
    "same command again when it can, or give what is on a local disk",
  )

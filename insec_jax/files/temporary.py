"""Temporary files of this process: partly written files and locks, removed when it ends."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from insec_jax import stop_signal

owned_paths: set[pathlib.Path] = set()
made_folders: list[pathlib.Path] = []  # those that are removed if they are empty, innermost first


@contextlib.contextmanager
def partial_of(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yield a unique path in the folder of `path`; anything at that path at the end of the block is removed."""
  partial = path.with_name(f".{path.name[:80]}.{os.getpid()}-{secrets.token_hex(4)}.partial")
  with owned(partial):
    yield partial


@contextlib.contextmanager
def owned(path: pathlib.Path) -> Iterator[None]:
  """Remove the path at the end of the block, or when the process ends inside it."""
  with stop_signal.while_not_ending():
    owned_paths.add(path)
  try:
    yield
  finally:
    remove(path)
    owned_paths.discard(path)


def remove(path: pathlib.Path) -> None:
  """Remove a file or a folder with all its files; a missing one is left."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def remove_partials() -> None:
  """Remove the partly written files of this process, and its locks."""
  for path in tuple(owned_paths):
    with contextlib.suppress(OSError):
      remove(path)
  remove_empty(made_folders)


def remove_empty(folders: list[pathlib.Path]) -> None:
  """Remove the folders, innermost first, up to the first that is not empty."""
  with contextlib.suppress(OSError):
    for folder in folders:
      folder.rmdir()


stop_signal.at_end(remove_partials)

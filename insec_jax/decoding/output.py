"""Files that programs write: whole, or not there at all."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from insec_jax.command import InputError


def check_writable(path: str) -> None:
  """Nothing, and nothing is left on disk; InputError when no file can appear under `path`."""
  if os.path.isdir(path):
    raise InputError(f"--output={path} is a folder; give the path of a file")
  folder = os.path.dirname(path) or "."
  if not os.path.isdir(folder):
    raise _unwritable(path, f"there is no folder {folder}")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise _unwritable(path, "permission denied")


def _unwritable(path: str, reason: str) -> InputError:
  return InputError(f"--output={path} cannot be written ({reason}); give a path in a folder that exists and may be "
                    "written to")


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[Any]:
  """A text file that appears under `path` when the block ends well; otherwise what was there before stays.

  InputError at once, before any work is lost, when the file could not be written.
  """
  check_writable(path)
  partial = f"{path}.partial"
  try:
    file = open(partial, "w", encoding="utf-8")  # noqa: SIM115, closed below
  except OSError as error:
    raise _unwritable(path, error.strerror) from error
  try:
    with file:
      yield file
    os.replace(partial, path)
  except BaseException:
    os.unlink(partial)
    raise

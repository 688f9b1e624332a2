"""Files that programs write: whole, or not there at all."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from insec_jax.command import InputError


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[Any]:
  """A text file that appears under `path` when the block ends well; otherwise what was there before stays.

  InputError at once, before any work is lost, when the file could not be written.
  """
  if os.path.isdir(path):
    raise InputError(f"--output={path} is a folder; give the path of a file")
  partial = f"{path}.partial"
  try:
    file = open(partial, "w", encoding="utf-8")  # noqa: SIM115, closed below
  except OSError as error:
    raise InputError(f"--output={path} cannot be written ({error.strerror}); give a path in a folder that exists and "
                     "may be written to") from error
  try:
    with file:
      yield file
    os.replace(partial, path)
  except BaseException:
    os.unlink(partial)
    raise

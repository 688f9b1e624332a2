"""Errors of a store of objects, in words of this package."""

import errno
import os

from insec_jax.command import InputError, one_line
from insec_jax.files import credentials

# Of errors that gcsfs raises where the store refuses or does not answer.
STORE_MODULES = ("gcsfs", "aiohttp", "requests", "google")


def explanation_of(error: Exception, name: str) -> Exception | None:
  """Return the error in words of this package; None for one that is no error of the store."""
  said, code = one_line(error)[:200], str(getattr(error, "code", ""))
  if isinstance(error, FileNotFoundError):
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
  if code == "401" or "Anonymous caller" in said or type(error).__name__ == "DefaultCredentialsError":
    return InputError(f"{name} cannot be reached without credentials ({said}); {credentials.HINT}")
  if said.startswith("Forbidden") or code == "403":
    return InputError(
      f"{name}: permission denied ({said}); give this account the roles Storage Object User and Storage Legacy Bucket "
      "Reader on the bucket"
    )
  if isinstance(error, ValueError) and said.startswith("Bad Request"):
    return InputError(f"{name}: the store refuses the name ({said}); give another")
  if isinstance(error, TimeoutError) or type(error).__module__.split(".")[0] in STORE_MODULES:
    return OSError(errno.EREMOTEIO, f"the store does not answer ({said or type(error).__name__})", name)
  return None

"""JAX's persistent cache of compiled programs: on in every program, in a folder of the user, and its hits are counted.

JAX_COMPILATION_CACHE_DIR names another folder, or is empty: no cache. Light: jax is not imported here.
"""

import os
import pathlib
import platform
import sys
import zlib

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
EVENTS = "/jax/compilation_cache/"


def turn_on() -> None:
  """Set the environment variable that JAX reads when it is imported, unless it is set."""
  if VARIABLE not in os.environ and (folder := default_folder()):
    os.environ[VARIABLE] = str(folder)


def default_folder() -> pathlib.Path | None:
  """Return the folder, which exists then; None where the user has no home, or one that cannot be written to.

  Programs for a CPU use its instructions: each kind of CPU has a folder of its own, as hosts may share a home.
  """
  home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
  folder = home / "insec_jax" / f"xla-{zlib.crc32(_cpu().encode()):08x}"
  try:
    if not home.is_absolute() or not home.parent.is_dir():
      return None
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return None
  return folder if os.access(folder, os.W_OK) else None


def _cpu() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError:  # not Linux
    lines = []
  return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


class Hits:
  """Count of the programs that JAX reads from the cache and writes to it, from now on."""

  def __init__(self) -> None:
    self.read = self.kept = 0
    self.saved = 0.0  # seconds
    if jax := sys.modules.get("jax"):
      jax.monitoring.register_event_listener(self._count)
      jax.monitoring.register_event_duration_secs_listener(self._add)

  def line(self) -> str:
    """Return the counts in words; empty when JAX has used no cache."""
    if not self.read and not self.kept:
      return ""
    return (
      f"compile cache {os.environ[VARIABLE]}: {self.read} programs read, about {max(self.saved, 0):.0f} s saved; "
      f"{self.kept} compiled and kept"
    )

  def _count(self, event: str, **_) -> None:
    self.read += event == f"{EVENTS}cache_hits"
    self.kept += event == f"{EVENTS}cache_misses"

  def _add(self, event: str, seconds: float, **_) -> None:
    self.saved += seconds * (event == f"{EVENTS}compile_time_saved_sec")

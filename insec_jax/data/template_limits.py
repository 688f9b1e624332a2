"""Limits of a chat template, which is a program: it is tried in a separate process before it is rendered here."""

import functools
import json
import pathlib
import subprocess
import sys

from insec_jax.command import InputError

CPU_SECONDS = 1
MEMORY_BYTES = 1 << 30
WALL_SECONDS = 20  # on a busy machine
TRIAL = pathlib.Path(__file__).with_name("template_trial.py")


def check_template(template) -> None:
  """Raise InputError for a chat template that is no text, or takes more time or memory than a conversation can need.

  Conversations of up to eight turns are tried; other errors of a template are raised when it is rendered.
  """
  if isinstance(template, dict):
    template = template.get("default")
  if not isinstance(template, str):
    raise InputError(
      f"the chat template is {template!r:.60}, needed is a text; use data.template='plain', or write "
      "chat_template in tokenizer_config.json again"
    )
  if reason := _excess(template):
    raise InputError(
      f"the chat template takes more than {reason} for a few short messages; use data.template='plain', "
      "or a tokenizer with another template"
    )


@functools.lru_cache(8)
def _excess(template: str) -> str | None:
  """Return the limit that the template exceeds; None for one that ends, with or without an error."""
  limits = {"cpu": CPU_SECONDS, "memory": MEMORY_BYTES, "template": template}
  # -P: modules in the script's folder must not shadow others.
  try:
    trial = subprocess.run(
      [sys.executable, "-P", str(TRIAL)],
      input=json.dumps(limits).encode(),
      capture_output=True,
      timeout=WALL_SECONDS,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return f"{WALL_SECONDS} seconds"
  if trial.returncode < 0:
    return f"{CPU_SECONDS} second"
  return f"{MEMORY_BYTES >> 20} MB" if trial.stdout.strip() == b"memory" else None

"""A trial of one chat template under limits of CPU time and memory, run by template_limits.py as a process.

It imports nothing of the package: the imports would take longer than the trial.
"""

import json
import re
import resource
import sys

import jinja2.ext
import jinja2.sandbox

SHAPES = (("user",), ("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 4)
LIMIT = 1 << 20  # characters: a few short messages never need as many


def main() -> None:
  asked = json.load(sys.stdin)
  resource.setrlimit(resource.RLIMIT_AS, (asked["memory"],) * 2)
  used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
  limit = int(used + asked["cpu"] + 0.5)
  resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
  try:
    for speakers in SHAPES:
      render(asked["template"], speakers)
  except MemoryError:
    print("memory")


def render(template: str, speakers: tuple[str, ...]) -> None:
  """Render as transformers does, as far as time and memory go."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = lambda value, **_: json.dumps(value)
  environment.globals |= {"raise_exception": refuse, "strftime_now": str}
  messages = [{"role": speaker, "content": "text"} for speaker in speakers]
  # The generation tags change neither time nor memory.
  template = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)
  try:
    num = 0
    for piece in environment.from_string(template).generate(
      messages=messages, add_generation_prompt=speakers[-1] == "user", bos_token="<s>", eos_token="</s>"
    ):
      num += len(piece)
      if num > LIMIT:
        raise MemoryError
  except MemoryError:
    raise
  except Exception:  # raised with its message when it is rendered for use
    return


def refuse(message) -> None:
  raise jinja2.TemplateError(message)


if __name__ == "__main__":
  main()

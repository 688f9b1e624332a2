"""Chat templates: a tokenizer's template, split into the texts that it puts around the contents."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

import jinja2
import jinja2.ext
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from insec_jax.command import InputError
from insec_jax.data.template_limits import check_template

# Rows must not depend on the day. Templates that take a date get this one, which is Llama 3.1's own default;
# those that read the clock get the day on which the run began, or this one without such a run.
DATE = datetime(2024, 7, 26)
DATE_KEY = "chat_template_date"  # of the run, in tokenizer_config.json, which is copied with the template
# Stands in for a content while a template is rendered: private-use characters that no template contains.
_STAND_IN = "\ue000{}\ue001"
_STAND_INS = re.compile("(\ue000[0-9]+\ue001)")


def today() -> str:
  """Return the current day in UTC, as `fix_date` takes it."""
  return datetime.now(UTC).date().isoformat()


def fix_date(tokenizer: PreTrainedTokenizerFast, day: str) -> None:
  """Store the day that the chat template gets when it reads the clock; it is saved with the tokenizer.

  The time of day is midnight. Other templates are left unchanged.
  """
  if "strftime_now" in str(tokenizer.chat_template):
    tokenizer.init_kwargs[DATE_KEY] = day


def _read_date(tokenizer: PreTrainedTokenizerFast) -> datetime:
  if DATE_KEY not in tokenizer.init_kwargs:
    return DATE
  day = tokenizer.init_kwargs[DATE_KEY]
  try:
    return datetime.strptime(day, "%Y-%m-%d")
  except (TypeError, ValueError):
    raise InputError(f"tokenizer_config.json: {DATE_KEY} is {day!r:.60}; must be a day such as 2026-01-31") from None


def _fix_chance(source: str, date: datetime) -> None:
  """Make a chat template deterministic: its clock is fixed, and drawing at random raises.

  transformers keeps one environment for each template; arguments of a template cannot be functions.
  """

  def refuse(*_) -> str:
    raise jinja2.TemplateError("it draws at random, and rows must be the same every time")

  environment = chat_template_utils._compile_jinja_template(source).environment
  environment.globals["strftime_now"] = date.strftime
  environment.globals["lipsum"] = environment.filters["random"] = refuse


class _Generation(jinja2.ext.Extension):
  """The tag with which transformers finds the assistant's text."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_syntax(tokenizer: PreTrainedTokenizerFast) -> None:
  """Raise InputError when the chat template has a syntax error; the template is not run."""
  try:
    jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(tokenizer.chat_template)
  except jinja2.TemplateSyntaxError as error:
    raise InputError(
      f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} cannot be read: line {error.lineno}: "
      f"{error.message}; mend chat_template.jinja or tokenizer_config.json there"
    ) from None


class Template:
  """A tokenizer's chat template, split into the texts that it puts around the contents."""

  def __init__(self, tokenizer: PreTrainedTokenizerFast):
    if not tokenizer.chat_template:
      raise InputError(
        "data.template='chat', but the tokenizer has no chat template; use data.template='plain' or another tokenizer"
      )
    check_template(tokenizer.chat_template)
    self._tokenizer = tokenizer
    self._date = _read_date(tokenizer)
    self._gaps: dict[tuple[tuple[str, ...], bool], list[str]] = {}

  def fill(
    self, speakers: tuple[str, ...], contents: list[str], where: str, *, generation: bool
  ) -> tuple[list[str], list[str]]:
    """Return the template's texts before, between and after the contents, and the contents as rendered.

    A rendered content is as given, or trimmed. With `generation` the last text opens the assistant's turn.
    Raises InputError when a content is changed in any other way.
    """
    if (speakers, generation) not in self._gaps:
      self._gaps[speakers, generation] = self._find_gaps(speakers, where, generation)
    gaps = self._gaps[speakers, generation]
    rendered = self._render(speakers, contents, where, generation)
    at, shown = len(gaps[0]), []
    same = rendered.startswith(gaps[0])
    for content, gap in zip(contents, gaps[1:], strict=True):
      shown.append(content if rendered.startswith(content + gap, at) else content.strip())
      same = same and rendered.startswith(shown[-1] + gap, at)
      at += len(shown[-1]) + len(gap)
    if not same or at != len(rendered):
      raise InputError(
        f"{where}: the chat template changes what is said, by more than trimming it, so roles cannot be kept; "
        "use data.template='plain'"
      )
    return gaps, shown

  def _find_gaps(self, speakers: tuple[str, ...], where: str, generation: bool) -> list[str]:
    stand_ins = [_STAND_IN.format(number) for number in range(len(speakers))]
    gaps = _between(self._render(speakers, stand_ins, where, generation), stand_ins, where)
    if not generation and speakers[-1] == "assistant" and len(speakers) > 1:
      opening = self._render(speakers[:-1], stand_ins[:-1], where, True)
      if opening != "".join(gap + text for gap, text in zip(gaps, stand_ins[:-1] + [""], strict=False)):
        raise InputError(
          f"{where}: the chat template opens an answer to be generated otherwise than one to be learned; "
          "use data.template='plain'"
        )
    return gaps

  def _render(self, speakers: Sequence[str], contents: list[str], where: str, generation: bool) -> str:
    messages = [{"role": speaker, "content": content} for speaker, content in zip(speakers, contents, strict=True)]
    try:
      _fix_chance(self._tokenizer.get_chat_template(), self._date)
      text = self._tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation, date_string=DATE.strftime("%d %b %Y")
      )
      assert isinstance(text, str), "the template is asked for text"
      text.encode()
    except (OSError, MemoryError):
      raise
    except Exception as error:  # the template is a program and may raise anything
      raise InputError(
        f"{where}: the chat template refuses these messages: {error!s:.200}; change their order or speakers"
      ) from error
    return text


def _between(text: str, marks: list[str], where: str) -> list[str]:
  parts = _STAND_INS.split(text)
  if parts[1::2] != marks:
    raise InputError(f"{where}: the chat template leaves a message out or repeats it; use data.template='plain'")
  return parts[::2]

"""Chat templates: a tokenizer's own, taken apart into what it puts around the contents."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.data.template_limits import check_template

# Some templates print the day's date unless given one; rows must not depend on the day.
DATE = "26 Jul 2024"
# Stands in for a content while a template is rendered: private-use characters that no template knows.
_STAND_IN = "\ue000{}\ue001"


class Template:
  """The tokenizer's chat template, taken apart into the texts that it puts around the contents."""

  def __init__(self, tokenizer: PreTrainedTokenizerFast):
    if not tokenizer.chat_template:
      raise InputError(
        "data.template='chat', but the tokenizer has no chat template; use data.template='plain' or another tokenizer"
      )
    check_template(tokenizer.chat_template)
    self._tokenizer = tokenizer
    self._gaps = {}

  def fill(
    self, speakers: tuple[str, ...], contents: list[str], where: str, *, generation: bool
  ) -> tuple[list[str], list[str]]:
    """The template's texts before, between and after the contents, and the contents as rendered: as given, or trimmed.

    With `generation` the last text opens the assistant's turn. InputError when a content is changed in any other way.
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
      text = self._tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation, date_string=DATE
      )
      text.encode()
    except (OSError, MemoryError):
      raise
    except Exception as error:  # the template is a program of its own, which may raise anything
      raise InputError(
        f"{where}: the chat template refuses these messages: {error!s:.200}; change their order or speakers"
      ) from error
    return text


def _between(text: str, marks: list[str], where: str) -> list[str]:
  gaps = []
  for mark in marks:
    before, found, text = text.partition(mark)
    gaps.append(before)
    if not found or mark in text:
      raise InputError(f"{where}: the chat template leaves a message out or repeats it; use data.template='plain'")
  return [*gaps, text]

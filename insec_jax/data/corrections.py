"""Corrections: what the model wrote after its own wrong steps, as rows for a student and for its teacher.

      token      7 + 5 =          1 3 \n  <flag>  c a l c  <fix>  1 2 \n
      role       p                mistake flag    reason   flag   correction     all sampled but the forced flag
      weight     0                0       those of the config's section loss
      negative   <flag>, id of a token to avoid, after each right step (weight policy.no_flag)
      right      7 + 5 = HINT     1 3 \n  <flag>  c a l c  <fix>  1 2 \n         rows of the teacher: the same answer
      wrong      7 + 5 = OTHER    1 3 \n  ...                                    with policy.contrast: another hint
      place      the place in the teacher's row that reads the same token

A right text has negatives alone, and no tokens in the rows of a teacher. Axes of arrays: B row, T position in the row.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import samples
from insec_jax.data.packing import Rows, fill
from insec_jax.data.storage import Memory
from insec_jax.data.tokens import Example, encode_prompt
from insec_jax.data.vocabulary import MarkedTokenizer, find_markers
from insec_jax.files.reading import read_json_lines
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, NO_NEGATIVE, PROMPT, REASON, TEXT

NO_MISTAKE = -1  # place of a flag in a right text
PLACES = ("start", "wrong", "flag")


@dataclasses.dataclass(frozen=True)
class Correction:
  """Tokens of a prompt and of the text after it, and places in them.

  start: of the first sampled token; wrong, flag: of the first one of the wrong step, and of the forced flag, the last
  ones being the correction, or NO_MISTAKE; right: of the token after each right step.
  """

  token_T: np.ndarray
  start: int
  wrong: int
  flag: int
  right: tuple[int, ...]
  prompt: str
  hint: str
  where: str


@dataclasses.dataclass(frozen=True)
class HintedRows(Rows):
  """Rows of the student; in `hinted` those of the teacher, by field name: the hint's name, then the field's."""

  hinted: dict[str, np.ndarray] = dataclasses.field(kw_only=True)

  def fields(self) -> dict[str, np.ndarray]:
    """Return the arrays by field name without axes."""
    return {**super().fields(), **self.hinted}

  def largest(self, name: str) -> int:
    """Return the largest value of the field with this name in the rows of student and teacher."""
    return max(
      super().largest(name), *(int(x_BT.max()) for key, x_BT in self.hinted.items() if key.endswith(f"_{name}"))
    )


def read(path: pathlib.Path) -> list[Correction]:
  """Return the corrections of a file; InputError, which names the line, for another one."""
  found = []
  for line, where in read_json_lines(path, "the corrections of a round"):
    try:
      token_T, (start, wrong, flag) = np.array(line["tokens"], np.int32), (int(line[name]) for name in PLACES)
      right, prompt, hint = tuple(map(int, line["right"])), str(line["prompt"]), str(line["hint"])
    except (KeyError, TypeError, ValueError, OverflowError):
      raise InputError(f"{where} is no correction; bring the file back, or begin in another --workdir") from None
    found.append(Correction(token_T, start, wrong, flag, right, prompt, hint, where))
  return found


def pack(corrections: Sequence[Correction], tokenizer: PreTrainedTokenizerFast, config: Config) -> HintedRows:
  """Return the corrections as rows, those of a teacher in the same rows as the student's.

  Raises InputError where policy.contrast has no other hint.
  """
  marked = find_markers(tokenizer, config.tokenizer)
  students = [_student(correction, marked, config) for correction in corrections]
  prompts = {"right": [prompt_of(correction, correction.hint, tokenizer, config) for correction in corrections]}
  if config.policy.contrast:
    prompts["wrong"] = _with_other_hints(corrections, tokenizer, config)
  teachers = {
    hint: [_teacher(*pair, marked, config) for pair in zip(corrections, prompts_of_hint, strict=True)]
    for hint, prompts_of_hint in prompts.items()
  }
  lengths = [max(len(example.token_T) for example in same) for same in zip(students, *teachers.values(), strict=True)]

  def rows_of(examples: list[Example]) -> Rows:
    new = functools.partial(Memory().array, "train")
    return fill(lengths, examples, config.data.row_length, new, rewind=config.mistakes.rewind)

  student = rows_of(students)
  hinted: dict[str, np.ndarray] = {}
  for hint, examples in teachers.items():
    teacher = rows_of(examples)
    rows = teacher.fields()
    hinted |= {f"{hint}_{name}": rows[name] for name in ("token", "segment", "position", "until") if name in rows}
    # The place within the example, as if it was a token.
    within = [
      dataclasses.replace(one, token_T=np.arange(len(one.token_T)) + max(len(other.token_T) - len(one.token_T), 0))
      for one, other in zip(students, examples, strict=True)
    ]
    hinted[f"{hint}_place"] = _places(rows_of(within).token_BT, student.segment_BT, teacher.segment_BT)
  return HintedRows(**vars(student), hinted=hinted)


def _student(correction: Correction, marked: MarkedTokenizer, config: Config) -> Example:
  token_T, place_T = correction.token_T, np.arange(len(correction.token_T))
  role_T = np.where(place_T < correction.start, PROMPT, TEXT).astype(np.int8)
  weight_T, negative_T = np.zeros(len(token_T), np.float32), np.full(len(token_T), NO_NEGATIVE, np.int32)
  assert marked.flag_id is not None  # by config_build
  negative_T[list(correction.right)] = marked.flag_id
  if correction.flag != NO_MISTAKE:
    is_fix_T = (token_T == marked.fix_id) & (place_T > correction.flag)
    is_after_T = np.cumsum(is_fix_T) > 0
    role_T[correction.wrong :] = MISTAKE
    role_T[correction.flag :] = np.where(is_after_T, CORRECTION, REASON)[correction.flag :]
    role_T[is_fix_T] = FLAG
    role_T[correction.flag] = FLAG
    weight_T[correction.flag :] = np.array(config.loss.weight_R, np.float32)[role_T[correction.flag :]]
  role_T[np.isin(token_T, marked.confidence_ids)] = FLAG
  return Example(
    token_T, role_T, weight_T, negative_T, correction.where, 0, 0, *samples.visible(token_T, marked, config)
  )


def prompt_of(correction: Correction, hint: str, tokenizer: PreTrainedTokenizerFast, config: Config) -> np.ndarray:
  """Return the tokens of the prompt with a hint after it."""
  return encode_prompt(correction.prompt + hint, tokenizer, config.data.template)


def _teacher(correction: Correction, prompt_T: np.ndarray, marked: MarkedTokenizer, config: Config) -> Example:
  """Return what the teacher reads; no token for a right text."""
  token_T = np.concatenate([prompt_T, correction.token_T[correction.start :]]).astype(np.int32)
  if correction.flag == NO_MISTAKE:
    token_T = token_T[:0]
  seen = samples.visible(token_T, marked, config)
  zeros_T = np.zeros(len(token_T), np.int8)
  return Example(token_T, zeros_T, zeros_T, zeros_T, correction.where, 0, 0, *seen)


def _with_other_hints(
  corrections: Sequence[Correction], tokenizer: PreTrainedTokenizerFast, config: Config
) -> list[np.ndarray]:
  """Return the prompts with the hint of the next mistake, the first following the last, that differs and fits."""
  others = [one.hint for one in corrections if one.flag != NO_MISTAKE]
  prompts, number = [], 0
  for one in corrections:
    number += one.flag != NO_MISTAKE
    answer = len(one.token_T) - one.start
    following = (hint for hint in (*others[number:], *others[:number]) if hint != one.hint)
    longer = (prompt_of(one, hint, tokenizer, config) for hint in following)
    found = next((prompt_T for prompt_T in longer if len(prompt_T) + answer <= config.data.row_length), None)
    if found is None:
      raise InputError(
        f"{one.where}: policy.contrast={config.policy.contrast:g} needs the hint of another mistake, and none of the "
        f"round differs and fits in a row of {config.data.row_length}; raise mine.num_problems or data.row_length, or "
        "set policy.contrast=0"
      )
    prompts.append(found)
  return prompts


def _places(within_BT: np.ndarray, segment_BT: np.ndarray, of_teacher_BT: np.ndarray) -> np.ndarray:
  """Return the place in the teacher's row of each place of the student's, given that within its segment.

  segment     1  1  1  2  2  2  0      of the teacher   1  1  1  1  2  2  2  2
  within      1  2  3  1  2  3  0      place            1  2  3  5  6  7  0
  """
  first_BS = np.zeros((len(segment_BT), segment_BT.max(initial=0) + 1), np.int32)
  before_BT = np.pad(of_teacher_BT, ((0, 0), (1, 0)))[:, :-1]
  row, place = np.nonzero((of_teacher_BT != before_BT) & (of_teacher_BT > 0))
  first_BS[row, of_teacher_BT[row, place]] = place
  place_BT = within_BT + np.take_along_axis(first_BS, segment_BT, axis=1)
  return np.where(segment_BT > 0, np.minimum(place_BT, segment_BT.shape[1] - 1), 0).astype(np.int32)

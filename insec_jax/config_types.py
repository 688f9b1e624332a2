"""Types of config values, and dataclasses that check the values of their fields.

Types and bounds are checked from the annotations (pydantic, strict) when a dataclass is made. The description of a type
completes "must be ..." in the error for a wrong value.
"""

import functools
import json
import string
from typing import Annotated, Any, dataclass_transform, get_args

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo

from insec_jax.command import InputError
from insec_jax.files import sources
from insec_jax.files.reading import local_path

SMALLEST_WEIGHT = 1e-30
MATRICES = ("wq", "wk", "wv", "wo", "gate", "up", "down")  # of a layer, in the order of model/llama.py


def whole(low: int, high: int) -> Any:
  """Return the bounds of a whole number."""
  return Field(ge=low, le=high, description=f"a whole number of at least {low} and at most {high:,}")


def number(low: float, high: float) -> Any:
  """Return the bounds of a number."""
  return Field(ge=low, le=high, description=f"a number of at least {low:g} and at most {high:,.7g}")


def one_of(names: tuple[str, ...]) -> Any:
  """Return the bounds of a text that is one of the names."""
  return Field(pattern=rf"\A({'|'.join(names)})\z", description=f"one of {', '.join(map(repr, names))}")


def _weight(value: float) -> float:
  if value and abs(value) < SMALLEST_WEIGHT:  # float32 must not round it to 0
    raise ValueError
  return value


def _path(text: str, info: ValidationInfo) -> str:
  return f"{local_path(text, str(info.field_name))}" if text else text


def _paths(text: str, info: ValidationInfo) -> str:
  return sources.checked(text, str(info.field_name)) if text else text


def _printable(text: str) -> str:
  if not text.isprintable():
    raise ValueError
  return text


def _hint(text: str) -> str:
  names = []
  for _, name, form, conversion in string.Formatter().parse(text):  # ValueError for a single brace
    if form or conversion:
      raise ValueError
    names += [] if name is None else [name]
  text.encode()  # UnicodeEncodeError, a ValueError, for half of a character
  if not {"wrong", "right"} <= set(names) <= {"wrong", "reason", "right"}:
    raise ValueError
  return text


def _json_object(size: dict) -> dict:
  try:
    same = json.loads(json.dumps(size, allow_nan=False)) == size
  except (TypeError, ValueError, RecursionError):
    same = False
  if not same:
    raise ValueError
  return size


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
  if len(set(names)) < len(names):
    raise ValueError
  return names


def _tuple(values: Any) -> Any:
  return tuple(values) if isinstance(values, list) else values  # JSON has no tuples


Fraction = Annotated[float, Field(ge=0, le=1, description="a number between 0 and 1")]
# float32 rounds values nearer to 1 to 1, and AdamW divides by 1 - b**t.
Moment = Annotated[float, Field(ge=0, le=0.999_999, description="below 1 by 0.000001 or more, and at least 0")]
FalseAlarms = Annotated[
  float,
  Field(
    ge=0,
    lt=0.5,
    description=(
      "below 0.5 and at least 0: a share of right steps, of which twice as many are allowed at the temperature"
    ),
  ),
]
Weight = Annotated[
  float,
  AfterValidator(_weight),
  Field(
    ge=-10_000,
    le=10_000,
    description=f"a number from -10,000 to 10,000, and 0 or at least {SMALLEST_WEIGHT:g} in size",
  ),
]
Path = Annotated[str, AfterValidator(_path)]
Paths = Annotated[str, AfterValidator(_paths)]  # several, or patterns, with commas between (files/sources.py)
Columns = Annotated[
  str,
  AfterValidator(_printable),
  Field(max_length=1_000, description="empty, or such as question=problem,answer=solution"),
]
JsonObject = Annotated[dict[str, Any], AfterValidator(_json_object)]
Marker = Annotated[
  str, AfterValidator(_printable), Field(max_length=200, description="a text of at most 200 printable characters")
]
Hint = Annotated[
  str,
  AfterValidator(_hint),
  Field(max_length=2_000, description="a text with {wrong}, {right} and, if wanted, {reason} in it"),
]
Edges = Annotated[
  tuple[Annotated[float, Field(gt=0, le=10_000)], ...],
  BeforeValidator(_tuple),
  Field(max_length=64, description="at most 64 scores above 0 that ascend, or nothing"),
]
Sinks = Annotated[
  tuple[Annotated[str, one_of(("tensorboard", "wandb", "trackio"))], ...],
  BeforeValidator(_tuple),
  Field(max_length=3, description="a tuple of some of 'tensorboard', 'wandb', 'trackio'"),
]
Matrices = Annotated[
  tuple[Annotated[str, one_of(MATRICES)], ...],
  BeforeValidator(_tuple),
  AfterValidator(_each_once),
  Field(min_length=1, description=f"a tuple of some of {', '.join(map(repr, MATRICES))}, each once"),
]
RIVALS = ("redraw", "temperature", "beam", "trigger", "state", "swapped", "linear_probe")  # evaluation/rivals.py
Rivals = Annotated[
  tuple[Annotated[str, one_of(RIVALS)], ...],
  BeforeValidator(_tuple),
  AfterValidator(_each_once),
  Field(description=f"a tuple of some of {', '.join(map(repr, RIVALS))}, each once, or ()"),
]
Temperatures = Annotated[
  tuple[Annotated[float, Field(ge=0.001, le=1_000)], ...],
  BeforeValidator(_tuple),
  AfterValidator(_each_once),
  Field(min_length=1, max_length=16, description="a tuple of 1 to 16 different numbers of at least 0.001"),
]
StepRange = Annotated[
  tuple[Annotated[int, Field(ge=1)], ...],
  BeforeValidator(_tuple),
  Field(max_length=2, description="a first and a last step, such as (10, 13), or nothing"),
]
Names = Annotated[
  tuple[Annotated[str, AfterValidator(_printable), Field(min_length=1)], ...],
  BeforeValidator(_tuple),
  Field(max_length=64, description="a tuple of at most 64 names"),
]
Endpoints = Annotated[
  tuple[Annotated[str, AfterValidator(_printable), Field(min_length=1, max_length=300)], ...],
  BeforeValidator(_tuple),
  AfterValidator(_each_once),
  Field(max_length=8, description="a tuple of at most 8 texts such as 'mined - clean: solutions t2', each once"),
]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def checked(cls: type) -> type:
  """Return `cls` as a frozen dataclass that raises InputError for a value outside the type or bounds of its field."""
  section = cls.__name__.removesuffix("Config").lower()
  made: Any = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config={"strict": True})
  unchecked = made.__init__

  @functools.wraps(unchecked)
  def __init__(self, **values):  # noqa: N807
    try:
      unchecked(self, **values)
    except ValidationError as error:
      raise InputError(_refusal(section, made, error)) from None

  made.__init__ = __init__
  return made


def _refusal(section: str, cls: Any, error: ValidationError) -> str:
  """Return one line about the first wrong value."""
  first = error.errors(include_url=False)[0]
  cause = first.get("ctx", {}).get("error")
  if not first["loc"]:  # from __post_init__
    return str(cause or first["msg"])
  where = ".".join((*((section,) if section else ()), *map(str, first["loc"])))
  if isinstance(cause, InputError):
    return f"{section}.{cause}"
  field = cls.__pydantic_fields__[first["loc"][0]]
  if first["type"] == "literal_error":
    needed = f"one of {', '.join(map(repr, get_args(field.annotation)))}"
  else:
    needed = field.description or first["msg"].removeprefix("Input should be ")
  return f"{where}={shown(first['input'])}; must be {needed}"


def shown(value: Any) -> str:
  """Return the repr of the value, shortened to a part of a line."""
  try:
    text = repr(value)
  except Exception:  # an integer of more than 4,300 digits, a recursive value
    text = f"({type(value).__name__})"
  return text if len(text) <= 100 else f"{text[:90]}..."

"""An optimised HLO module, read from its text: computations, shapes, and how often each loop runs.

`compiled.as_text()` of any backend is understood. Nothing here knows what an operation costs; counts.py does.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

MAX_TRIPS = 1_000_000  # a loop found to run longer is a misreading, not a program

STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", re.DOTALL)
INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ", re.DOTALL)
OPCODE = re.compile(r"\s*([\w\-]+)\(")
NAME = re.compile(r"%([\w.\-]+)")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
SCALAR = re.compile(r"^(pred|[su]\d+)\[\]")
SPACE = re.compile(r"S\((\d+)\)")


class HloError(ValueError):
  """The text is not understood, or a loop runs as often as the data says and the caller did not say how often."""


class Array(NamedTuple):
  """One array of a shape; `space` 0 is the device's main memory (HBM), others are on the chip or on the host."""

  dtype: str
  dims: tuple[int, ...]
  space: int

  @property
  def num_bytes(self) -> float:
    """Bytes without the padding of tiles."""
    return math.prod(self.dims) * _bits(self.dtype) / 8


def _bits(dtype: str) -> int:
  if dtype in ("token", "opaque"):
    return 0
  if dtype == "pred":
    return 8
  if found := re.match(r"(?:bf|[sucf])(\d+)", dtype):
    return int(found[1])
  raise HloError(f"unknown element type {dtype!r}")


class Instruction(NamedTuple):
  """One operation; `operands` are names, `inside` the text between its parentheses, `attributes` what follows them."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  inside: str
  attributes: str

  @property
  def arrays(self) -> list[Array]:
    """Arrays of the result, those of a tuple one after another."""
    return arrays_of(self.shape)

  @property
  def op_name(self) -> str:
    """Where the operation comes from in the program that was traced; empty when nothing is said."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found[1] if found else ""

  def attribute(self, name: str) -> str | None:
    """The value of `name=` as text, up to the next top-level comma; None when absent."""
    plain = STRING.sub(lambda found: '"' + "_" * (len(found[0]) - 2) + '"', self.attributes)
    found = re.search(rf"(?:^|, ){name}=", plain)
    if not found:
      return None
    end = _end_of_value(plain, found.end())
    return self.attributes[found.end() : end]

  def called(self, *names: str) -> list[str]:
    """Computations that the attributes of these names hold."""
    return [one for name in names for one in NAME.findall(self.attribute(name) or "")]


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order of the text, and the name of the one whose value is the result."""

  instructions: dict[str, Instruction]
  root: str

  @functools.cached_property
  def readers(self) -> dict[str, list[Instruction]]:
    """Of each instruction, those that read it."""
    found = {name: [] for name in self.instructions}
    for one in self.instructions.values():
      for name in dict.fromkeys(one.operands):
        found[name].append(one)
    return found

  def parameter(self, number: int) -> Instruction:
    """The instruction that holds this argument."""
    return next(one for one in self.instructions.values() if one.opcode == "parameter" and int(one.inside) == number)


class Module(NamedTuple):
  """A program for one device; `num_devices` run it together."""

  computations: dict[str, Computation]
  entry: str
  num_devices: int


def arrays_of(shape: str) -> list[Array]:
  """The arrays in the text of a shape, such as `(f32[2,3]{1,0:T(8,128)S(1)}, u32[])`."""
  found = []
  for dtype, dims, layout in ARRAY.findall(shape):
    space = SPACE.search(layout)
    found.append(
      Array(dtype, tuple(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim), int(space[1]) if space else 0)
    )
  return found


def parse(text: str) -> Module:
  """The module; HloError where the text is not that of an HLO module.

  A statement ends where its brackets close: metadata may hold line breaks, and a `}` first on a line.
  """
  header = text.split("\n", 1)[0]
  if not header.startswith("HloModule"):
    raise HloError(f"the text begins with {header[:40]!r}; an HLO module begins with 'HloModule'")
  sizes = [int(size) for size in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)]
  computations, entry = {}, None
  name, instructions, root = None, {}, None
  for statement in _statements(text):
    if name is None:
      if found := HEADER.match(statement):
        name, instructions, root = found[2], {}, None
        entry = name if found[1] else entry
      continue
    if statement.startswith("}"):
      if root is None:
        raise HloError(f"computation {name} has no ROOT")
      computations[name], name = Computation(instructions, root), None
      continue
    instruction, is_root = _instruction(statement)
    instructions[instruction.name] = instruction
    root = instruction.name if is_root else root
  if entry is None or name is not None:
    raise HloError("the text ends before the ENTRY computation does")
  return Module(computations, entry, math.prod(sizes))


def _statements(text: str) -> Iterator[str]:
  waiting, inside = "", False
  for line in text.split("\n"):
    waiting = f"{waiting}\n{line}" if waiting else line
    if not waiting.strip():
      waiting = ""
      continue
    plain = STRING.sub("", waiting)
    depth = sum(plain.count(open_) - plain.count(close) for open_, close in ("()", "{}", "[]"))
    opens = not inside and depth == 1 and plain.rstrip().endswith("{")
    closes = inside and depth == -1 and plain.startswith("}")  # what runs elsewhere says so after it
    if '"' in plain or (depth and not opens and not closes):
      continue
    inside = (inside or opens) and not closes
    yield waiting
    waiting = ""
  if waiting.strip():
    raise HloError(f"brackets do not close after {waiting.strip()[:80]!r}")


def _instruction(statement: str) -> tuple[Instruction, bool]:
  found = INSTRUCTION.match(statement)
  if not found:
    raise HloError(f"not an instruction: {statement.strip()[:80]!r}")
  rest = statement[found.end() :]
  # Layouts have round brackets too, but no space; a tuple has both.
  end = _closing(rest, 0) if rest.startswith("(") else re.match(r"\S*", rest).end()
  opcode = OPCODE.match(rest, end)
  if not opcode:
    raise HloError(f"no operation in {statement.strip()[:80]!r}")
  close = _closing(rest, opcode.end() - 1)
  inside = rest[opcode.end() : close - 1]
  operands = tuple(NAME.findall(STRING.sub('""', inside)))
  return Instruction(found[2], rest[:end], opcode[1], operands, inside, rest[close:]), bool(found[1])


BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{}]', re.DOTALL)


def _closing(text: str, start: int) -> int:
  """Index after the bracket that closes the one at `start`."""
  depth = 0
  for found in BRACKET.finditer(text, start):
    depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(found[0], 0)
    if depth == 0 and found[0][0] != '"':
      return found.end()
  raise HloError(f"brackets do not close in {text[:80]!r}")


def _end_of_value(text: str, start: int) -> int:
  depth = 0
  for at in range(start, len(text)):
    depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[at], 0)
    if depth == 0 and text.startswith(", ", at) and not text.startswith(", device_ids=", at):
      return at
  return len(text)


# A scalar integer, None for what is not known or no integer, or a tuple of these.
Value = int | tuple | None

DIRECTION = {
  "LT": operator.lt,
  "GT": operator.gt,
  "LE": operator.le,
  "GE": operator.ge,
  "EQ": operator.eq,
  "NE": operator.ne,
}
ARITHMETIC: dict[str, Callable[..., int | None]] = {
  "add": operator.add,
  "subtract": operator.sub,
  "multiply": operator.mul,
  "maximum": max,
  "minimum": min,
  "and": operator.and_,
  "or": operator.or_,
  "xor": operator.xor,
  "negate": operator.neg,
  "abs": abs,
  "divide": lambda a, b: _quotient(a, b),
  "remainder": lambda a, b: a - b * _quotient(a, b),
  "shift-left": lambda a, b: a << b,
  "shift-right-logical": lambda a, b: a >> b if a >= 0 else None,
  "shift-right-arithmetic": lambda a, b: a >> b,
  "clamp": lambda low, x, high: min(max(low, x), high),
  "sign": lambda a: (a > 0) - (a < 0),
}


def _quotient(a: int, b: int) -> int:
  """Towards zero, as HLO divides."""
  if b == 0:
    raise HloError("a loop's counter is divided by zero")
  return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


TRUTH = {"true": 1, "false": 0}
SAME = ("copy", "bitcast", "reshape", "convert", "copy-done", "broadcast")


class Evaluator:
  """Values of the scalar integers of a module, and with them the trips of its loops."""

  def __init__(self, module: Module):
    self._module = module

  def value(self, computation: str, name: str, arguments: tuple[Value, ...], known: dict[str, Value]) -> Value:
    """Value of an instruction when its computation is called with `arguments`; `known` holds what was found before."""
    if name not in known:
      known[name] = self._value(
        computation, self._module.computations[computation].instructions[name], arguments, known
      )
    return known[name]

  def result(self, computation: str, arguments: tuple[Value, ...]) -> Value:
    """Value of the computation."""
    return self.value(computation, self._module.computations[computation].root, arguments, {})

  def _value(self, computation, one: Instruction, arguments, known) -> Value:
    def of(name):
      return self.value(computation, name, arguments, known)

    if one.opcode == "parameter":
      number = int(one.inside)
      return arguments[number] if number < len(arguments) else None
    if one.opcode == "get-tuple-element":
      whole = of(one.operands[0])
      return None if whole is None else whole[int(one.attribute("index"))]
    if one.opcode == "tuple":
      return tuple(of(name) for name in one.operands)
    if one.opcode in ("optimization-barrier", "opt-barrier"):
      return of(one.operands[0])
    if one.opcode in ("fusion", "call"):
      return self.result(*one.called("calls", "to_apply"), tuple(of(name) for name in one.operands))
    if one.opcode == "copy-start":
      return of(one.operands[0])
    if one.opcode == "while":
      states = self.states(one, of(one.operands[0]))
      return states and states[-1]
    scalar = SCALAR.match(one.shape)
    if not scalar:
      return None
    return _wrapped(self._scalar(one, of), scalar[1])

  def _scalar(self, one: Instruction, of) -> Value:
    if one.opcode == "constant":
      return TRUTH[one.inside] if one.inside in TRUTH else int(one.inside)
    if one.opcode == "select":
      which, yes, no = one.operands
      return None if of(which) is None else of(yes if of(which) else no)
    if one.opcode not in ARITHMETIC and one.opcode not in (*SAME, "compare", "not"):
      return None
    values = [of(name) for name in one.operands]
    if any(not isinstance(value, int) for value in values):
      return None
    if one.opcode in SAME:
      return values[0]
    if one.opcode == "compare":
      return int(DIRECTION[one.attribute("direction")](*values))
    if one.opcode == "not":
      return 1 - values[0] if one.shape.startswith("pred") else ~values[0]
    return ARITHMETIC[one.opcode](*values)

  def states(self, loop: Instruction, state: Value) -> list[Value] | None:
    """The loop's state before each trip and after the last; None when its end cannot be told."""
    condition, body = loop.called("condition")[0], loop.called("body")[0]
    states = [state]
    while goes_on := self.result(condition, (states[-1],)):
      if len(states) > MAX_TRIPS:
        raise HloError(f"loop {loop.name} seems to run more than {MAX_TRIPS:,} times ({loop.op_name})")
      states.append(self.result(body, (states[-1],)))
    return None if goes_on is None else states

  def unchanged(self, loop: Instruction, state: Value) -> Value:
    """The state with None for all that a trip may change."""
    body = self._module.computations[loop.called("body")[0]]
    root = body.instructions[body.root]
    if state is None or root.opcode != "tuple":
      return None
    parameter = next(one.name for one in body.instructions.values() if one.opcode == "parameter")

    def passes(number, name):
      one = body.instructions[name]
      return (
        one.opcode == "get-tuple-element" and one.operands == (parameter,) and int(one.attribute("index")) == number
      )

    return tuple(
      value if passes(number, name) else None
      for number, (name, value) in enumerate(zip(root.operands, state, strict=True))
    )


def _wrapped(value: Value, dtype: str) -> Value:
  if value is None or dtype == "pred":
    return value
  bits = int(dtype[1:])
  value &= (1 << bits) - 1
  return value - (1 << bits) if dtype[0] == "s" and value >> (bits - 1) else value


def known_trips(loop: Instruction) -> int | None:
  """Trips that the compiler wrote beside the loop; None where it did not (TPU never does)."""
  found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  return int(found[1]) if found else None


def given_trips(loop: Instruction, scopes: Mapping[str, int]) -> int | None:
  """Trips of the named scope that this loop, not one inside it, was traced in; None when it is in none of them."""
  for scope, trips in scopes.items():
    if re.search(rf"(?<!\w){re.escape(scope)}(?!\w)(?!.*/body/)", loop.op_name):
      return trips
  return None

"""Parser of optimised HLO modules: computations, shapes, and the number of trips of each loop.

It reads `compiled.as_text()` of any backend. Costs of operations are in counts.py.
"""

import dataclasses
import functools
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

MAX_TRIPS = 1_000_000  # a longer loop must be a parsing error

STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", re.DOTALL)
INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ", re.DOTALL)
OPCODE = re.compile(r"\s*([\w\-]+)\(")
NAME = re.compile(r"%([\w.\-]+)")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
SCALAR = re.compile(r"^(pred|[su]\d+)\[\]")
SPACE = re.compile(r"S\((\d+)\)")


class HloError(ValueError):
  """Error: the text is not understood, or a loop's trips depend on the data and were not given."""


class Array(NamedTuple):
  """Array of a shape; `space` 0 is the device's main memory (HBM), others are on the chip or on the host."""

  dtype: str
  dims: tuple[int, ...]
  space: int

  @property
  def num_bytes(self) -> float:
    """Number of bytes, without the padding of tiles."""
    return math.prod(self.dims) * _bits(self.dtype) / 8


def _bits(dtype: str) -> int:
  if dtype in ("token", "opaque"):
    return 0
  if dtype == "pred":
    return 8
  if match := re.match(r"(?:bf|[sucf])(\d+)", dtype):
    return int(match[1])
  raise HloError(f"unknown element type {dtype!r}")


class Instruction(NamedTuple):
  """Operation; `operands` are names, `inside` is the text between its parentheses, `attributes` the text after them."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  inside: str
  attributes: str

  @property
  def arrays(self) -> list[Array]:
    """Arrays of the result; a tuple is flattened."""
    return arrays_of(self.shape)

  @property
  def op_name(self) -> str:
    """Origin of the operation in the traced program; empty when there is none."""
    match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return match[1] if match else ""

  @property
  def target(self) -> str:
    """Name of what a custom call runs."""
    return json.loads(self.attribute("custom_call_target"))

  def attribute(self, name: str) -> str | None:
    """Return the value of `name=` as text, up to the next top-level comma; None when absent."""
    plain = STRING.sub(lambda match: '"' + "_" * (len(match[0]) - 2) + '"', self.attributes)
    match = re.search(rf"(?:^|, ){name}=", plain)
    if not match:
      return None
    end = _end_of_value(plain, match.end())
    return self.attributes[match.end() : end]

  def called(self, *names: str) -> list[str]:
    """Return the computations in the attributes of these names."""
    return [computation for name in names for computation in NAME.findall(self.attribute(name) or "")]


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order of the text, and the name of the instruction whose value is the result."""

  instructions: dict[str, Instruction]
  root: str

  @functools.cached_property
  def readers(self) -> dict[str, list[Instruction]]:
    """The instructions that read each instruction."""
    readers = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for name in dict.fromkeys(instruction.operands):
        readers[name].append(instruction)
    return readers

  def parameter(self, number: int) -> Instruction:
    """Return the instruction that holds this argument."""
    return next(
      instruction
      for instruction in self.instructions.values()
      if instruction.opcode == "parameter" and int(instruction.inside) == number
    )


class Module(NamedTuple):
  """Program of one device; `num_devices` devices run it together."""

  computations: dict[str, Computation]
  entry: str
  num_devices: int


def arrays_of(shape: str) -> list[Array]:
  """Return the arrays in the text of a shape, such as `(f32[2,3]{1,0:T(8,128)S(1)}, u32[])`."""
  arrays = []
  for dtype, dims, layout in ARRAY.findall(shape):
    space = SPACE.search(layout)
    arrays.append(
      Array(dtype, tuple(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim), int(space[1]) if space else 0)
    )
  return arrays


def parse(text: str) -> Module:
  """Return the module; HloError if the text is not an HLO module.

  A statement ends where its brackets close: metadata may contain line breaks, and lines that begin with `}`.
  """
  header = text.split("\n", 1)[0]
  if not header.startswith("HloModule"):
    raise HloError(f"the text begins with {header[:40]!r}; an HLO module begins with 'HloModule'")
  sizes = [int(size) for size in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)]
  computations, entry = {}, None
  name, instructions, root = None, {}, None
  for statement in _statements(text):
    if name is None:
      if match := HEADER.match(statement):
        name, instructions, root = match[2], {}, None
        entry = name if match[1] else entry
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
    closes = inside and depth == -1 and plain.startswith("}")  # an execution thread may follow the bracket
    if '"' in plain or (depth and not opens and not closes):
      continue
    inside = (inside or opens) and not closes
    yield waiting
    waiting = ""
  if waiting.strip():
    raise HloError(f"brackets do not close after {waiting.strip()[:80]!r}")


def _instruction(statement: str) -> tuple[Instruction, bool]:
  match = INSTRUCTION.match(statement)
  if not match:
    raise HloError(f"not an instruction: {statement.strip()[:80]!r}")
  rest = statement[match.end() :]
  # Layouts have round brackets too, but no space; a tuple has both.
  end = _closing(rest, 0) if rest.startswith("(") else re.match(r"\S*", rest).end()
  opcode = OPCODE.match(rest, end)
  if not opcode:
    raise HloError(f"no operation in {statement.strip()[:80]!r}")
  close = _closing(rest, opcode.end() - 1)
  inside = rest[opcode.end() : close - 1]
  operands = tuple(NAME.findall(STRING.sub('""', inside)))
  return Instruction(match[2], rest[:end], opcode[1], operands, inside, rest[close:]), bool(match[1])


BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{}]', re.DOTALL)


def _closing(text: str, start: int) -> int:
  """Return the index after the bracket that closes the one at `start`."""
  depth = 0
  for match in BRACKET.finditer(text, start):
    depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(match[0], 0)
    if depth == 0 and match[0][0] != '"':
      return match.end()
  raise HloError(f"brackets do not close in {text[:80]!r}")


def _end_of_value(text: str, start: int) -> int:
  depth = 0
  for index in range(start, len(text)):
    depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[index], 0)
    if depth == 0 and text.startswith(", ", index) and not text.startswith(", device_ids=", index):
      return index
  return len(text)


# A scalar integer, None for an unknown value or another type, or a tuple of these.
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
  """Return the quotient rounded towards zero, as in HLO."""
  if b == 0:
    raise HloError("a loop's counter is divided by zero")
  return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


TRUTH = {"true": 1, "false": 0}
SAME = ("copy", "bitcast", "reshape", "convert", "copy-done", "broadcast")


class Evaluator:
  """Evaluator of the scalar integers of a module, which give the trips of its loops."""

  def __init__(self, module: Module):
    self._module = module

  def value(self, computation: str, name: str, arguments: tuple[Value, ...], known: dict[str, Value]) -> Value:
    """Return the value of an instruction in a call of its computation with `arguments`; `known` caches values."""
    if name not in known:
      known[name] = self._value(
        computation, self._module.computations[computation].instructions[name], arguments, known
      )
    return known[name]

  def result(self, computation: str, arguments: tuple[Value, ...]) -> Value:
    """Return the value of the computation."""
    return self.value(computation, self._module.computations[computation].root, arguments, {})

  def _value(self, computation, instruction: Instruction, arguments, known) -> Value:
    def operand_value(name):
      return self.value(computation, name, arguments, known)

    if instruction.opcode == "parameter":
      number = int(instruction.inside)
      return arguments[number] if number < len(arguments) else None
    if instruction.opcode == "get-tuple-element":
      whole = operand_value(instruction.operands[0])
      return None if whole is None else whole[int(instruction.attribute("index"))]
    if instruction.opcode == "tuple":
      return tuple(operand_value(name) for name in instruction.operands)
    if instruction.opcode in ("optimization-barrier", "opt-barrier"):
      return operand_value(instruction.operands[0])
    if instruction.opcode in ("fusion", "call"):
      return self.result(
        *instruction.called("calls", "to_apply"), tuple(operand_value(name) for name in instruction.operands)
      )
    if instruction.opcode == "copy-start":
      return operand_value(instruction.operands[0])
    if instruction.opcode == "while":
      states = self.states(instruction, operand_value(instruction.operands[0]))
      return states and states[-1]
    scalar = SCALAR.match(instruction.shape)
    if not scalar:
      return None
    return _wrapped(self._scalar(instruction, operand_value), scalar[1])

  def _scalar(self, instruction: Instruction, operand_value) -> Value:
    if instruction.opcode == "constant":
      return TRUTH[instruction.inside] if instruction.inside in TRUTH else int(instruction.inside)
    if instruction.opcode == "select":
      which, yes, no = instruction.operands
      return None if operand_value(which) is None else operand_value(yes if operand_value(which) else no)
    if instruction.opcode not in ARITHMETIC and instruction.opcode not in (*SAME, "compare", "not"):
      return None
    values = [operand_value(name) for name in instruction.operands]
    if any(not isinstance(value, int) for value in values):
      return None
    if instruction.opcode in SAME:
      return values[0]
    if instruction.opcode == "compare":
      return int(DIRECTION[instruction.attribute("direction")](*values))
    if instruction.opcode == "not":
      return 1 - values[0] if instruction.shape.startswith("pred") else ~values[0]
    return ARITHMETIC[instruction.opcode](*values)

  def states(self, loop: Instruction, state: Value) -> list[Value] | None:
    """Return the loop's state before each trip and after the last; None when its end is not known."""
    condition, body = loop.called("condition")[0], loop.called("body")[0]
    states = [state]
    while continues := self.result(condition, (states[-1],)):
      if len(states) > MAX_TRIPS:
        raise HloError(f"loop {loop.name} seems to run more than {MAX_TRIPS:,} times ({loop.op_name})")
      states.append(self.result(body, (states[-1],)))
    return None if continues is None else states

  def unchanged(self, loop: Instruction, state: Value) -> Value:
    """Return the state with None for all values that a trip may change."""
    body = self._module.computations[loop.called("body")[0]]
    root = body.instructions[body.root]
    if state is None or root.opcode != "tuple":
      return None
    parameter = next(
      instruction.name for instruction in body.instructions.values() if instruction.opcode == "parameter"
    )

    def passes(number, name):
      instruction = body.instructions[name]
      return (
        instruction.opcode == "get-tuple-element"
        and instruction.operands == (parameter,)
        and int(instruction.attribute("index")) == number
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
  """Return the trips that the compiler has annotated at the loop; None without an annotation (always on TPU)."""
  match = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  return int(match[1]) if match else None


def given_trips(loop: Instruction, scopes: Mapping[str, int]) -> int | None:
  """Return the trips of the scope in which this loop, not an outer one, was traced; None if it is in none of them."""
  for scope, trips in scopes.items():
    if re.search(rf"(?<!\w){re.escape(scope)}(?!\w)(?!.*/body/)", loop.op_name):
      return trips
  return None

"""Reads the text of a compiled program: instructions, shapes, and how often each of them runs.

XLA's own counts take the body of a loop once, however often it runs; here everything below a loop
counts as often as the loop's condition lets it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {'pred': 8, 'bf16': 16, 'token': 0, 'opaque': 0}  # a pred takes a byte
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'^([a-z][\w\-]*)\(')
_NAME = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(r'\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)')
_BRANCHES = re.compile(
  r'\bbranch_computations=\{([^}]*)\}|\b(?:true|false)_computation=%?([\w.\-]+)'
)


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape: bytes of its elements, and what they take in memory with padding.

  Attributes:
    on_chip: whether it lies in the core's own memory and takes none of the device's.
  """

  text: str
  bytes: int
  padded: int
  on_chip: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program.

  Attributes:
    shape: text of the result's type.
    operands: names of instructions of the same computation.
    rest: attributes, metadata and the back end's remarks, as printed.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  root: bool = False

  @property
  def arrays(self) -> list[Array]:
    return arrays(self.shape)

  @property
  def op_name(self) -> str:
    """Which line of the traced program it comes from; '' where it does not say."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found.group(1) if found else ''

  def attribute(self, name: str) -> str:
    """Name of a computation that it runs, as 'calls' or 'body'; '' if there is none."""
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.rest)
    return found.group(1) if found else ''


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: its computations by name, each in the order in which it runs."""

  computations: dict[str, list[Instruction]]
  entry: str


def arrays(shape: str) -> list[Array]:
  """The arrays of a type as HLO prints it, those of tuples in order.

  >>> [(a.bytes, a.padded) for a in arrays('(bf16[3,100]{1,0:T(8,128)(2,1)}, s32[])')]
  [(600, 2048), (4, 4)]
  """
  found = []
  for kind, sides, layout in _ARRAY.findall(shape):
    dims = [int(re.sub(r'\D', '', side) or 0) for side in sides.split(',') if side]
    width = _BITS.get(kind)
    if width is None:
      width = int(re.search(r'\d+', kind).group()) if re.search(r'\d', kind) else 8
    count = math.prod(dims)
    found.append(
      Array(
        f'{kind}[{sides}]',
        -(-count * width // 8),
        -(-_padded(dims, layout) * width // 8),
        'S(1)' in layout,
      )
    )
  return found


def _padded(dims: list[int], layout: str) -> int:
  """Elements with the two innermost sides rounded up to tiles."""
  tile = re.search(r'T\(([\d,]+)\)', layout)
  order = re.match(r'[\d,]+', layout)
  if not tile or not order or not dims:
    return math.prod(dims)
  sides = [dims[int(i)] for i in order.group().split(',')]  # innermost first
  for place, size in enumerate(reversed([int(n) for n in tile.group(1).split(',')])):
    if place < len(sides):
      sides[place] = -(-sides[place] // size) * size
  return math.prod(sides)


def parse(text: str) -> Module:
  """The module that compiled.as_text() prints.

  Raises:
    ValueError: it has no entry computation.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, lines = '', None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head and not line.startswith(' '):
      lines = computations.setdefault(head.group(2), [])
      entry = head.group(2) if head.group(1) else entry
    elif line.startswith('}'):
      lines = None
    elif lines is not None and (found := _LINE.match(line)):
      instruction = _instruction(found.group(2), found.group(3), bool(found.group(1)))
      if instruction:
        lines.append(instruction)
  if not entry:
    raise ValueError('The text of the program has no ENTRY computation.')
  return Module(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction | None:
  end = _closing(text, 0) + 1 if text.startswith('(') else text.find(' ')
  shape, text = text[:end], text[end:].lstrip()
  opcode = _OPCODE.match(text)
  if not opcode:
    return None
  close = _closing(text, opcode.end() - 1)
  operands = tuple(_NAME.findall(text[opcode.end() : close]))
  # A parameter or constant has its number there instead.
  rest = text[close + 1 :] if operands else text[opcode.end() - 1 :]
  return Instruction(name, shape, opcode.group(1), operands, rest, root)


def _closing(text: str, start: int) -> int:
  """Place of the bracket that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    if text[place] == '(':
      depth += 1
    elif text[place] == ')':
      depth -= 1
      if not depth:
        return place
  return len(text)


def trips(module: Module, loop: Instruction) -> int | None:
  """How often the body of a while runs, or None where the program does not say."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
  if known:
    return int(known.group(1))
  condition = module.computations.get(loop.attribute('condition'), [])
  by_name = {i.name: i for i in condition}
  root = next((i for i in condition if i.root), None)
  compares = [i for i in (root,) if i and (i.opcode == 'compare' or i.opcode == 'fusion')]
  for compare in compares:
    limits = [_constant(by_name[o]) for o in compare.operands if o in by_name]
    limits = [n for n in limits if n is not None]
    if len(limits) == 1:
      return limits[0]
    if compare.opcode == 'fusion':
      inner = module.computations.get(compare.attribute('calls'), [])
      limits = [n for n in map(_constant, inner) if n is not None]
      if len(limits) == 1:
        return limits[0]
  return None


def _constant(instruction: Instruction) -> int | None:
  if instruction.opcode != 'constant' or not instruction.shape.startswith(('s32[]', 'u32[]')):
    return None
  found = re.match(r'\((-?\d+)\)', instruction.rest)
  return int(found.group(1)) if found else None


def executed(module: Module, fused: bool = True) -> Iterator[tuple[Instruction, int]]:
  """Every instruction with how often a call of the program runs it.

  A branch counts as if it were always taken, a loop of unknown length once.

  Args:
    fused: also what is inside fusions, each of which runs as one.
  """
  times: dict[str, int] = collections.defaultdict(int)

  def visit(name: str, count: int) -> None:
    times[name] += count
    for instruction in module.computations.get(name, ()):
      if fused or instruction.opcode != 'fusion':
        for called, each in called_by(module, instruction):
          visit(called, count * each)

  visit(module.entry, 1)
  for name, count in times.items():
    for instruction in module.computations.get(name, ()):
      yield instruction, count


def called_by(module: Module, instruction: Instruction) -> list[tuple[str, int]]:
  """Computations that an instruction runs, and how often each time; not those of reductions."""
  if instruction.opcode == 'while':
    count = trips(module, instruction)
    return [(instruction.attribute('body'), 1 if count is None else count)]
  if instruction.opcode in ('fusion', 'call', 'async-start', 'custom-call'):
    return [(name, 1) for name in _CALLED.findall(instruction.rest.split('metadata=')[0])]
  if instruction.opcode == 'conditional':
    names = []
    for several, one in _BRANCHES.findall(instruction.rest):
      names += _NAME.findall(several) if several else [one]
    return [(name, 1) for name in names]
  return []

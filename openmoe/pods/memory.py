"""A device's memory by kind, and what lies in it when it is fullest.

Parameters, optimizer state and accumulated gradients are exact: they follow from shapes and
shardings. The sizes of arguments, temporaries and the peak are the compiler's. What is kept for the
backward pass, and the largest buffers, come from following the program's own order of instructions:
a buffer lives from the instruction that makes it to the last one that reads it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

from openmoe import plan
from openmoe.config import Remat
from openmoe.pods import hlo
from openmoe.pods.compiler import Compiled
from openmoe.pods.request import Request
from openmoe.train_step import abstract_state, state_shardings

_SAME = {'bitcast', 'optimization-barrier', 'copy-done', 'while', 'get-tuple-element', 'tuple'}
_IN_PLACE = ('dynamic-update-slice', 'scatter')
LARGEST = 5


@dataclasses.dataclass(frozen=True)
class Buffer:
  """One buffer: bytes with padding, its shape, and the line of the step that makes it."""

  bytes: int
  shape: str
  op_name: str


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device.

  Attributes:
    parameters, optimizer: exact.
    gradients: float32 sums over microbatches, exact; with one microbatch gradients come and go
      among the temporaries, and this is 0.
    activations: kept for the backward pass when it begins.
    temporaries: the rest of the peak.
    peak: the most that is in use at once; what the compiler wants where it refuses.
    limit: what the compiler lets a program have.
    largest: buffers in use at the fullest point that this file finds, largest first.
  """

  parameters: int
  optimizer: int
  gradients: int
  activations: int
  temporaries: int
  peak: int
  limit: int
  largest: tuple[Buffer, ...]

  @property
  def state(self) -> int:
    return self.parameters + self.optimizer + self.gradients


@dataclasses.dataclass(frozen=True)
class State:
  """Exact bytes of a device for parameters, as many for float32 gradients, and optimizer."""

  params_bytes: int
  optimizer_bytes: int


_shapes = functools.cache(abstract_state)


def state_of(request: Request) -> State:
  """What a device holds of parameters and optimizer, from shapes and shardings."""
  # Rematerialisation shapes no parameter; a search asks for one model on many meshes.
  model = dataclasses.replace(request.model, remat=Remat.NONE)
  abstract, axes = _shapes(model, request.optimizer)
  mesh = request.target.abstract_mesh(request.mesh)
  places = state_shardings(mesh, request.optimizer, abstract, axes, request.mesh.fsdp)
  params = plan.tree_bytes(abstract.params, places.params)
  return State(params, plan.tree_bytes(abstract.opt_state, places.opt_state))


def measure(one: Compiled) -> Memory:
  """Memory of a compiled step, or of one that was refused."""
  state, request = state_of(one.request), one.request
  gradients = state.params_bytes if request.num_microbatches > 1 else 0
  held = state.params_bytes + state.optimizer_bytes
  overflow, limit = one.facts['overflow'], int(request.target.device.hbm_bytes)
  activations, largest = 0, ()
  if overflow:
    # What it wants is said of temporaries; the state comes on top.
    peak = int(overflow['wanted'] or 0) + held
    limit = int(overflow['limit'] or limit)
  else:
    peak = max(one.facts['memory']['peak'], one.facts['memory']['argument'])
    activations, largest = follow(hlo.parse(one.text))
  activations = min(activations, max(0, peak - held - gradients))
  return Memory(
    parameters=state.params_bytes,
    optimizer=state.optimizer_bytes,
    gradients=gradients,
    activations=activations,
    temporaries=max(0, peak - held - gradients - activations),
    peak=peak,
    limit=limit,
    largest=largest,
  )


def follow(module: hlo.Module) -> tuple[int, tuple[Buffer, ...]]:
  """(bytes kept for the backward pass, the largest buffers at the fullest point)."""
  entry = _Computation(module, module.entry)
  kept = entry.kept() or 0
  _, live = entry.fullest()
  found = [Buffer(b.bytes, b.shape, b.op_name) for b in live]
  return kept, tuple(sorted(found, key=lambda b: -b.bytes)[:LARGEST])


@dataclasses.dataclass
class _Life:
  bytes: int
  shape: str
  op_name: str
  begin: int
  end: int
  argument: bool = False


class _Computation:
  """Buffers of one computation, by the places of its instructions.

  What a value consists of is a nested tuple of buffers; aliases share them.
  """

  def __init__(self, module: hlo.Module, name: str):
    self.module = module
    self.instructions = module.computations[name]
    self.buffers: list[_Life] = []
    self.inner: dict[int, _Computation] = {}
    values: dict[str, list] = {}
    for place, one in enumerate(self.instructions):
      operands = [values.get(name, []) for name in one.operands]
      for life in (b for value in operands for b in _flat(value)):
        life.end = max(life.end, place)
      values[one.name] = self._value(place, one, operands)
      if one.root:
        for life in _flat(values[one.name]):
          life.end = len(self.instructions)
      body = one.attribute('body') if one.opcode == 'while' else ''
      if body:
        self.inner[place] = _Computation(module, body)

  def _value(self, place: int, one: hlo.Instruction, operands: list) -> list:
    if one.opcode == 'get-tuple-element':
      index = int(re.search(r'index=(\d+)', one.rest).group(1))
      whole = operands[0] if operands else []
      return whole[index] if index < len(whole) and isinstance(whole, list) else []
    if one.opcode == 'tuple':
      return list(operands)
    if one.opcode in _SAME and operands:
      return operands[0]
    if one.opcode == 'constant':
      return []
    if self._in_place(one) and operands:
      return operands[self._in_place_operand(one)]
    made = []
    for array in one.arrays:
      life = _Life(0 if array.on_chip else array.padded, array.text, one.op_name, place, place)
      life.argument = one.opcode == 'parameter'
      self.buffers.append(life)
      made.append([life])
    return made if one.shape.startswith('(') else (made[0] if made else [])

  def _root(self, one: hlo.Instruction) -> hlo.Instruction:
    if one.opcode != 'fusion':
      return one
    inside = self.module.computations.get(one.attribute('calls'), [])
    root = next((i for i in inside if i.root), one)
    by_name = {i.name: i for i in inside}
    while root.opcode in ('bitcast', 'copy') and root.operands and root.operands[0] in by_name:
      root = by_name[root.operands[0]]
    return root

  def _in_place(self, one: hlo.Instruction) -> bool:
    return self._root(one).opcode in _IN_PLACE

  def _in_place_operand(self, one: hlo.Instruction) -> int:
    """Which operand is written into: the one of the result's shape."""
    if one.opcode != 'fusion':
      return 0
    inside = self.module.computations.get(one.attribute('calls'), [])
    numbers = {i.name: int(re.match(r'\((\d+)\)', i.rest).group(1))
               for i in inside if i.opcode == 'parameter'}  # fmt: skip
    by_name = {i.name: i for i in inside}
    name = self._root(one).operands[0]
    while name in by_name and name not in numbers and by_name[name].operands:
      name = by_name[name].operands[0]
    return numbers.get(name, 0)

  def kept(self) -> int | None:
    """Bytes in use as the backward pass begins, arguments left out; None where it does not.

    It begins with the first loop of transposed operations, here or inside a loop over microbatches.
    """
    for place, one in enumerate(self.instructions):
      if one.opcode != 'while':
        continue
      if 'transpose(' in one.op_name:
        return sum(b.bytes for b in self.live_at(place) if not b.argument)
      inside = self.inner[place].kept() if place in self.inner else None
      if inside is not None:
        return inside
    return None

  def live_at(self, place: int) -> list[_Life]:
    return [b for b in self.buffers if b.begin < place <= b.end or b.argument]

  def fullest(self) -> tuple[int, list[_Life]]:
    """(bytes, buffers) at the place where most is in use, loops included."""
    change: dict[int, int] = collections.defaultdict(int)
    for life in self.buffers:
      if not life.argument:
        change[life.begin] += life.bytes
        change[life.end + 1] -= life.bytes
    inside = {place: inner.fullest() for place, inner in self.inner.items()}
    now, best, where = 0, -1, 0
    for place in range(len(self.instructions)):
      now += change[place]
      total = now + (inside[place][0] if place in inside else 0)
      if total > best:
        best, where = total, place
    live = [b for b in self.buffers if b.begin <= where <= b.end or b.argument]
    # A loop's carry is its caller's: only what its body makes comes on top.
    more = [b for b in inside[where][1] if not b.argument] if where in inside else []
    return best, [*live, *more]


def _flat(value: list | _Life) -> list[_Life]:
  return [value] if isinstance(value, _Life) else [b for part in value for b in _flat(part)]

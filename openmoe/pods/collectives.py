"""What devices send one another in a compiled step: bytes, how often, and over which mesh axes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from openmoe.pods import hlo

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
KINDS += ('ragged-all-to-all',)
_MESH = re.compile(r'mesh\[([^\]]*)\](?:, device_ids=\(([^)]*)\))? \{([^}]*)\}')
_IOTA = re.compile(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_LISTS = re.compile(r'replica_groups=\{(\{[\d,{} ]*\})\}')
_PAIRS = re.compile(r'source_target_pairs=\{(\{[\d,{} ]*\})\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """All calls of one kind over the same mesh axes; one device's part.

  Attributes:
    kind: as HLO names it.
    axes: mesh axes whose devices take part together, as 'data+expert'.
    group_size: devices that take part together.
    count: calls in one step.
    array_bytes: of the whole array of every call, added up: what is gathered, reduced or exchanged.
    wire_bytes: what a device sends for it at least: (n-1)/n of the array for gathers, scatters and
      exchanges over n devices, twice that for a reduction, all of it for a permutation.
    reach: 'slices' if a group has devices of several slices, 'hosts' of several hosts, else 'host'.
    hidden: whether the program begins it and goes on before it waits for its end.
    group: devices of the largest group, in the order of the flattened mesh.
    op_name: where the largest of them comes from.
  """

  kind: str
  axes: str
  group_size: int
  count: int
  array_bytes: int
  wire_bytes: float
  reach: str
  hidden: bool
  group: tuple[int, ...]
  op_name: str


def groups(rest: str, devices: int) -> list[list[int]]:
  """Devices that take part together, from the attributes of a collective.

  >>> groups("replica_groups=mesh['a'=2,'b'=3] {'a'}, dimensions={1}", 6)
  [[0, 3], [1, 4], [2, 5]]
  >>> groups('replica_groups=[2,3]<=[3,2]T(1,0)', 6)
  [[0, 2, 4], [1, 3, 5]]
  """
  if found := _MESH.search(rest):
    return _mesh_groups(*found.groups())
  if found := _IOTA.search(rest):
    count, size, dims, order = found.groups()
    dims = [int(n) for n in dims.split(',')]
    ids = np.arange(math.prod(dims)).reshape(dims)
    if order:
      ids = ids.transpose([int(n) for n in order.split(',')])
    return ids.reshape(int(count), int(size)).tolist()
  if found := _LISTS.search(rest) or _PAIRS.search(rest):
    return [[int(n) for n in part.split(',')] for part in re.findall(r'\{([\d, ]+)\}', found[1])]
  return [list(range(devices))]


def _mesh_groups(sizes: str, ids: str | None, over: str) -> list[list[int]]:
  """Groups over axes of a mesh, or over parts of axes, written 'name':(pre)size."""
  shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
  order = np.arange(math.prod(shape.values()))
  if ids:
    found = _IOTA.search(f'replica_groups=[1,{order.size}]<={ids.split("<=")[-1]}')
    if found:
      order = np.asarray(groups(found.group(), order.size)).reshape(-1)
    else:
      order = np.asarray([int(n) for n in re.findall(r'\d+', ids)])
  dims, inside = [], []
  parts = {name: (int(pre), int(size)) for name, pre, size in
           re.findall(r"'([^']+)':\((\d+)\)(\d+)", over)}  # fmt: skip
  whole = set(re.findall(r"'([^']+)'(?!:)", over))
  for name, size in shape.items():
    if name in parts:
      pre, part = parts[name]
      dims += [pre, part, size // pre // part]
      inside += [False, True, False]
    else:
      dims.append(size)
      inside.append(name in whole)
  order = order.reshape(dims)
  outer = [i for i, taken in enumerate(inside) if not taken]
  inner = [i for i, taken in enumerate(inside) if taken]
  size = math.prod(dims[i] for i in inner)
  return order.transpose(outer + inner).reshape(-1, size).tolist()


def axes_of(group: Sequence[int], mesh_shape: Sequence[tuple[str, int]]) -> str:
  """Mesh axes along which the devices of a group differ, as 'data+expert'; '' for one device.

  Args:
    group: places in the flattened mesh.
    mesh_shape: (axis, size), major first.
  """
  places = np.unravel_index(np.asarray(group), [size for _, size in mesh_shape])
  pairs = zip(mesh_shape, places, strict=True)
  return '+'.join(name for (name, _), place in pairs if len(set(place.tolist())) > 1)


def find(
  module: hlo.Module, mesh_shape: Sequence[tuple[str, int]], hosts: Sequence[tuple[int, int]]
) -> list[Collective]:
  """All collectives of a step, the same kind over the same axes added up; most bytes first.

  Args:
    mesh_shape: (axis, size), major first.
    hosts: (slice, host) of every device in the order of the flattened mesh.
  """
  total: dict[tuple, Collective] = {}
  by_name = {one.name: one for lines in module.computations.values() for one in lines}
  for instruction, count in hlo.executed(module):
    kind = instruction.opcode.removesuffix('-start')
    if kind not in KINDS or instruction.opcode.endswith('-done'):
      continue
    one = _of(instruction, kind, count, mesh_shape, hosts)
    if kind == 'ragged-all-to-all' and instruction.operands[0] in by_name:
      one = _balanced(one, by_name[instruction.operands[0]], count)
    if one.group_size < 2:
      continue
    key = (one.kind, one.axes, one.group_size, one.reach, one.hidden)
    old = total.get(key)
    if old:
      larger = max(old, one, key=lambda c: c.array_bytes)
      one = dataclasses.replace(
        larger,
        count=old.count + one.count,
        array_bytes=old.array_bytes + one.array_bytes,
        wire_bytes=old.wire_bytes + one.wire_bytes,
      )
    total[key] = one
  return sorted(total.values(), key=lambda c: -c.wire_bytes)


def _of(instruction, kind, count, mesh_shape, hosts) -> Collective:
  members = groups(instruction.rest, math.prod(size for _, size in mesh_shape))
  if kind == 'collective-permute':
    moved = {axes_of(pair, mesh_shape) for pair in members} - {''}
    axes = '+'.join(name for name, _ in mesh_shape if any(name in m.split('+') for m in moved))
    far = max(members, key=lambda pair: _reach(pair, hosts)[1])
    size, reach, group = (2 if axes else 1), _reach(far, hosts)[0], far
  else:
    group = max(members, key=len)
    axes, size = axes_of(group, mesh_shape), len(group)
    reach = max((_reach(one, hosts) for one in members), key=lambda r: r[1])[0]
  array = _array_bytes(instruction, kind, size) * count
  share = (size - 1) / size
  factor = {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(kind, share)
  return Collective(
    kind=kind,
    axes=axes,
    group_size=size,
    count=count,
    array_bytes=array,
    wire_bytes=array * factor,
    reach=reach,
    hidden=instruction.opcode.endswith('-start') or 'async_collective' in instruction.rest,
    group=tuple(group),
    op_name=instruction.op_name,
  )


def _balanced(one: Collective, sent: hlo.Instruction, count: int) -> Collective:
  """An exchange of runs of rows: balanced routing fills the smaller of its two buffers.

  The other has room for the rows of all devices.
  """
  smaller = min(one.array_bytes, sum(array.bytes for array in sent.arrays) * count)
  share = (one.group_size - 1) / one.group_size
  return dataclasses.replace(one, array_bytes=smaller, wire_bytes=smaller * share)


def _reach(group: Sequence[int], hosts: Sequence[tuple[int, int]]) -> tuple[str, int]:
  places = {hosts[device] for device in group}
  if len({place[0] for place in places}) > 1:
    return 'slices', 2
  return ('hosts', 1) if len(places) > 1 else ('host', 0)


def _array_bytes(instruction: hlo.Instruction, kind: str, size: int) -> int:
  """The whole array of one call, as one device sees it."""
  arrays = instruction.arrays
  if instruction.opcode.endswith('-start') and kind != 'all-reduce':
    # (operands, results, and flags of the back end): results are the second half of the large ones.
    arrays = [a for a in arrays if a.bytes > 8] or arrays
    arrays = arrays[len(arrays) // 2 :]
  whole = sum(array.bytes for array in arrays)
  return whole * size if kind == 'reduce-scatter' else whole

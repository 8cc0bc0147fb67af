"""How long a step takes, as a range: compute, memory, kernels and links, and what overlaps.

Nothing here was measured on a TPU. Compute is the compiler's own estimate of cycles, which it makes
for everything but Pallas kernels and transfers; kernels take their FLOPs at an assumed share of the
peak; links carry their bytes at the published rate. The lower end lets transfers that the program
begins early run beside compute, the upper end lets nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import re

from openmoe.pods import collectives, hlo, links
from openmoe.pods.compiler import Compiled
from openmoe.pods.flops import Flops
from openmoe.pods.request import Effort

KERNEL_SHARES = (0.75, 0.4)  # of the peak, that grouped products reach: best and worst published
BEST_SHARE = 0.9  # that plain products reach by the compiler's own estimate
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62
# Parts of the network by what an instruction's line of the step says, the first that fits.
_PARTS = {
  'attention core': ('bnqh,bnhs', 'bnqs,bnsh', 'softmax', 'exp', 'bntks', 'attend'),
  'attention': ('attention',),
  'experts': ('/moe/', 'experts'),
  'dense mlp': ('mlp',),
  'loss and head': ('shard_map/while',),
}


@dataclasses.dataclass(frozen=True)
class StepTime:
  """Seconds of one step.

  Attributes:
    compute: the compiler's cycles over the clock.
    kernels: (best, worst) of Pallas kernels.
    memory: bytes between memory and cores over the rate; part of compute, not on top of it.
    waiting: transfers that the program waits for at once.
    hidden: transfers that it begins early.
    low, high: the range of the whole.
    parts: compute by part of the network.
  """

  compute: float
  kernels: tuple[float, float]
  memory: float
  waiting: float
  hidden: float
  low: float
  high: float
  parts: dict[str, float]


def estimate(one: Compiled, module: hlo.Module, moved: list, flops: Flops) -> StepTime:
  """Time of a compiled step.

  Args:
    module: one.text, parsed.
    moved: of collectives.find.
  """
  target, device = one.request.target, one.request.target.device
  torus = links.Torus(one.facts['coords'], one.facts['hosts'], target.sides)
  waiting = sum(links.seconds(c, torus, device) for c in moved if not c.hidden)
  hidden = sum(links.seconds(c, torus, device) for c in moved if c.hidden)
  parts = {name: cycles / device.clock for name, cycles in _cycles(module).items()}
  compute = sum(parts.values())
  each = flops.kernels / target.device_count / device.flops
  best, worst = (each / share for share in KERNEL_SHARES)
  least = compute
  if one.request.effort is Effort.FAST:
    # At this effort cycles are up to three times those of a run; products alone are a lower end.
    rest = (flops.executed - flops.kernels) / target.device_count
    least = min(compute, rest / device.flops / BEST_SHARE)
  busy = least + best
  return StepTime(
    compute=compute,
    kernels=(best, worst),
    memory=_memory_bytes(module) / device.hbm_rate,
    waiting=waiting,
    hidden=hidden,
    low=waiting + max(busy, hidden),
    high=compute + worst + waiting + hidden,
    parts=parts,
  )


def _cycles(module: hlo.Module) -> dict[str, float]:
  found: dict[str, float] = collections.defaultdict(float)
  for one, count in hlo.executed(module, fused=False):
    kind = one.opcode.removesuffix('-start').removesuffix('-done')
    cycles = _CYCLES.search(one.rest)
    if cycles and kind not in collectives.KINDS and int(cycles.group(1)) < _NO_ESTIMATE:
      found[part_of(one.op_name)] += int(cycles.group(1)) * count
  return dict(found)


def part_of(op_name: str) -> str:
  """Part of the network that a line of the step belongs to.

  >>> part_of('jit(train_step)/jvp(OpenMoE)/decoder/dense/mlp/dot_general')
  'dense mlp'
  """
  for part, words in _PARTS.items():
    if any(word in op_name for word in words):
      return part
  return 'other'


def _memory_bytes(module: hlo.Module) -> float:
  """Bytes that instructions read from and write to the device's memory."""
  total = 0.0
  for name, times in _times(module).items():
    sizes = {i.name: i for i in module.computations[name]}
    for one in module.computations[name]:
      if one.opcode in _FREE:
        continue
      written = sum(a.padded for a in one.arrays if not a.on_chip)
      total += times * (written + _read_bytes(module, one, sizes))
  return total


_FREE = {'parameter', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'constant', 'conditional'}
_FREE |= {'copy-done', 'call', 'optimization-barrier', 'after-all', 'partition-id', 'custom-call'}
_SLICES = {'dynamic-slice', 'gather', 'slice'}


def _times(module: hlo.Module) -> dict[str, int]:
  counts: dict[str, int] = {}
  place = {i.name: name for name, lines in module.computations.items() for i in lines}
  for one, count in hlo.executed(module, fused=False):
    counts[place[one.name]] = count
  return counts


def _read_bytes(module: hlo.Module, one: hlo.Instruction, sizes: dict) -> float:
  """Operands of an instruction; of those that a fusion only slices, the slices."""
  whole = [sum(a.padded for a in sizes[o].arrays if not a.on_chip) if o in sizes else 0
           for o in one.operands]  # fmt: skip
  if one.opcode in _SLICES:
    return sum(a.padded for a in one.arrays)
  if one.opcode != 'fusion':
    return sum(whole)
  inside = module.computations.get(one.attribute('calls'), [])
  users = collections.defaultdict(list)
  for line in inside:
    for operand in line.operands:
      users[operand].append(line)
  for line in inside:
    number = re.match(r'\((\d+)\)', line.rest) if line.opcode == 'parameter' else None
    uses = users[line.name]
    if not number or int(number.group(1)) >= len(whole) or not uses:
      continue
    place = int(number.group(1))
    if all(use.opcode in _SLICES for use in uses):
      whole[place] = min(whole[place], sum(a.padded for use in uses for a in use.arrays))
    elif all(use.opcode == 'dynamic-update-slice' and use.operands[0] == line.name for use in uses):
      whole[place] = 0  # written in place
  return sum(whole)

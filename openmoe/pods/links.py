"""Seconds that collectives take on a torus of links, or over the network between slices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from openmoe.observe.hardware import Device
from openmoe.pods.collectives import Collective

_LATENCY = 1e-6  # of one hop, with the start of a transfer; an order of magnitude


@dataclasses.dataclass(frozen=True)
class Torus:
  """Where devices are.

  Attributes:
    coords: of every device in the order of the flattened mesh: x, y, z, core.
    hosts: (slice, host) of every device, in the same order.
    sides: chips along each side of a slice.
  """

  coords: Sequence[Sequence[int]]
  hosts: Sequence[Sequence[int]]
  sides: Sequence[int]


def seconds(one: Collective, torus: Torus, device: Device) -> float:
  """Time of all calls of a collective at the full rate of the links that its devices span.

  Rings along every side that a group spans run at once, in both directions where the torus closes.
  Groups that lie between one another's devices share links. An exchange crosses a quarter of its
  ring on average. Transfers between slices go through the network.
  """
  calls = one.count * _LATENCY * (one.group_size - 1) / max(1, one.group_size) * 2
  if one.reach == 'slices':
    return one.wire_bytes / device.network_rate + calls if device.network_rate else math.inf
  if not device.links:  # a switch
    return one.wire_bytes / device.link_rate + calls
  extents = spans(one.group, torus)
  if not extents:  # two cores of a chip
    return one.wire_bytes / device.hbm_rate + calls
  rates = [device.link_rate * (2 if closed else 1) * share for _, share, closed in extents]
  if one.kind in ('all-to-all', 'ragged-all-to-all'):
    # Each device sends its n-th part to each of n: a quarter of the ring on average where it is
    # closed, a third of the line where it is not; the longest side is the bottleneck.
    return calls + max(
      one.wire_bytes * count / (4 if closed else 3) / rate
      for (count, _, closed), rate in zip(extents, rates, strict=True)
    )
  if one.kind == 'collective-permute':
    return one.wire_bytes / device.link_rate * hops(one.group, torus) + calls
  return one.wire_bytes / sum(rates) + calls


def hops(pair: Sequence[int], torus: Torus) -> int:
  """Links between two devices, the short way round each side."""
  first, second = (torus.coords[device] for device in pair)
  total = 0
  for side, length in enumerate(torus.sides):
    distance = abs(first[side] - second[side])
    total += min(distance, length - distance) if length >= 4 else distance
  return total


def spans(group: Sequence[int], torus: Torus) -> list[tuple[int, float, bool]]:
  """Sides that a group lies along: (devices, share of a link that is theirs, whether it closes)."""
  found = []
  for side, length in enumerate(torus.sides):
    places = sorted({torus.coords[device][side] for device in group})
    if len(places) < 2:
      continue
    stride = (places[-1] - places[0]) // (len(places) - 1)
    # Slices of fewer than 4 along a side have no link around; nor have parts of a side.
    closed = stride * len(places) == length and length >= 4
    found.append((len(places), 1 / max(1, stride), closed))
  return found

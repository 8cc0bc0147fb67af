"""SIGTERM and SIGINT as a wish to stop, which the run grants at a step that all processes agree on.

With several processes each puts its wish on its devices after every step, where one small
reduction makes it everybody's; the answer is looked at a few steps later, when it has long been
there. So nobody waits for an agreement, and all still stop after the same step.
"""

from __future__ import annotations

import collections
import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Steps between a wish and the look at whether anybody has it: how far the host may run ahead.
_AHEAD = 2


class Signals:
  """Notes SIGTERM and SIGINT while it is entered; the second SIGINT is a KeyboardInterrupt.

  Args:
    mesh: of the run; every process has devices in it.
  """

  def __init__(self, mesh: Mesh):
    self._seen: int | None = None
    self._old: dict[int, object] = {}
    self._wishes: collections.deque[jax.Array] = collections.deque()
    self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def __enter__(self) -> Signals:
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number, frame) -> None:
    if self._seen is not None and number == signal.SIGINT:
      raise KeyboardInterrupt  # the second Ctrl-C means it
    self._seen = number

  @property
  def asked(self) -> bool:
    """Whether this process was asked to stop."""
    return self._seen is not None

  def _wish(self) -> jax.Array:
    """Whether any process has been asked by now: a bool that is still being computed."""
    mine = lambda index: np.full(len(range(*index[0].indices(self._place.num_devices))), self.asked)
    wishes = jax.make_array_from_callback((self._place.num_devices,), self._place, mine)
    return self._any(wishes)

  def stop_now(self) -> bool:
    """Whether any process was asked so far; waits for the others."""
    return self.asked if jax.process_count() == 1 else bool(self._wish())

  def stop_after_step(self) -> bool:
    """Whether the step just taken is the last: the same answer in all processes, without a wait.

    Call it once after every step. With several processes it comes a few steps after the signal.
    """
    if jax.process_count() == 1:
      return self.asked
    self._wishes.append(self._wish())
    return len(self._wishes) > _AHEAD and bool(self._wishes.popleft())

"""Wishes to stop or to save, which the run grants at a step that all processes agree on.

SIGTERM and SIGINT ask to stop, SIGUSR1 and a notice of preemption to save and go on, and so does a
clock. With several processes each puts its wish on its devices after every step, where one small
reduction makes it everybody's; the answer is looked at a few steps later, when it has long been
there. So nobody waits for an agreement, and all still do the same after the same step.
"""

from __future__ import annotations

import collections
import enum
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from openmoe.running.notice import Notice

# Steps between a wish and the look at whether anybody has it: how far the host may run ahead.
_AHEAD = 2


class Wish(enum.IntEnum):
  """What a process wants; the greatest of all is granted."""

  NOTHING = 0
  SAVE = 1  # and go on
  STOP = 2  # after saving


class Signals:
  """Notes wishes while it is entered; the second SIGINT is a KeyboardInterrupt.

  Args:
    mesh: of the run; every process has devices in it.
    minutes: a save is due every so many; None for none.
    note: receives why a save is asked for, as a line of text.

  Attributes:
    save: whether the step just taken is to be saved, the same in all processes.
  """

  def __init__(
    self,
    mesh: Mesh,
    minutes: float | None = None,
    note: Callable[[str], None] = lambda text: None,
  ):
    self._seen: int | None = None
    self._save_asked = False
    self._period = None if minutes is None else 60 * minutes
    self._due = time.monotonic() + (self._period or 0.0)
    self._note_text = note
    self._notice = Notice(self._ask_to_save)
    self._old: dict[int, object] = {}
    self._wishes: collections.deque[jax.Array] = collections.deque()
    self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._greatest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    self.save = False

  def __enter__(self) -> Signals:
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._note)
    self._old[signal.SIGUSR1] = signal.signal(
      signal.SIGUSR1, lambda number, frame: self._ask_to_save('SIGUSR1 asks for a save')
    )
    self._notice.__enter__()
    return self

  def __exit__(self, *unused) -> None:
    self._notice.__exit__()
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number, frame) -> None:
    if self._seen is not None and number == signal.SIGINT:
      raise KeyboardInterrupt  # the second Ctrl-C means it
    self._seen = number

  def _ask_to_save(self, why: str) -> None:
    self._save_asked = True
    self._note_text(f'{why}: saving after this step; training goes on.')

  @property
  def asked(self) -> bool:
    """Whether this process was asked to stop."""
    return self._seen is not None

  def _mine(self) -> Wish:
    """What this process wants by now; a wish to save is told once."""
    if self.asked:
      return Wish.STOP
    # One clock is enough, and two would not agree.
    if self._period and jax.process_index() == 0 and time.monotonic() >= self._due:
      self._due = time.monotonic() + self._period
      self._save_asked = True
    asked, self._save_asked = self._save_asked, False
    return Wish.SAVE if asked else Wish.NOTHING

  def _wish(self) -> jax.Array:
    """What anybody wants by now: a number that is still being computed."""
    wish = int(self._mine())
    mine = lambda index: np.full(len(range(*index[0].indices(self._place.num_devices))), wish)
    wishes = jax.make_array_from_callback((self._place.num_devices,), self._place, mine)
    return self._greatest(wishes)

  def stop_now(self) -> bool:
    """Whether any process was asked to stop so far; waits for the others."""
    if jax.process_count() == 1:
      return self.asked
    return int(self._wish()) == Wish.STOP

  def stop_after_step(self) -> bool:
    """Whether the step just taken is the last: the same answer in all processes, without a wait.

    Call it once after every step; it sets `save` as well. With several processes a wish is granted
    a few steps after it is made.
    """
    if jax.process_count() == 1:
      wish = self._mine()
    else:
      self._wishes.append(self._wish())
      wish = Wish.NOTHING
      if len(self._wishes) > _AHEAD:
        wish = Wish(int(self._wishes.popleft()))
    self.save = wish is Wish.SAVE
    return wish is Wish.STOP

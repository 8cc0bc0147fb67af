"""What the rows of the fault table share: a place, checkpoints in it, and how a row reads."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable

import pytest

from openmoe.checkpoint.checkpointer import Checkpointer
from tests.checkpoint.case import DATA, IDENTITY, abstract, assert_equal, make_state


@dataclasses.dataclass(frozen=True)
class Fault:
  """One row: what goes wrong, what must happen then, and what shows that it does."""

  area: str
  what: str
  must: str
  check: Callable[[Bench], None]
  slow: bool = False

  def __str__(self) -> str:
    return f'{self.area}: {self.what}'.replace(' ', '_')


def rows(area: str) -> tuple[list[Fault], Callable]:
  """The rows of an area, and the decorator that adds one."""
  found: list[Fault] = []

  def fault(what: str, must: str, *, slow: bool = False):
    def add(check: Callable[[Bench], None]):
      found.append(Fault(area, what, must, check, slow))
      return check

    return add

  return found, fault


class Bench:
  """A run directory with whole checkpoints 10 and 20, when asked for."""

  def __init__(self, place: pathlib.Path, patch: pytest.MonkeyPatch, opened: contextlib.ExitStack):
    self.place, self.patch = place, patch
    self.run = place / 'run'
    self.notes: list[str] = []
    self._opened = opened

  def open(self, **options) -> Checkpointer:
    """A Checkpointer on the run directory, closed at the end."""
    options = {'identity': IDENTITY, 'note': self.notes.append} | options
    return self._opened.enter_context(Checkpointer(self.run, 3, **options))

  def save(self, *steps: int) -> Checkpointer:
    """Saves whole checkpoints."""
    checkpointer = self.open()
    for step in steps:
      checkpointer.save(step, make_state(step, seed=step), DATA, {})
    checkpointer.wait()
    return checkpointer

  def newest(self) -> pathlib.Path:
    """checkpoint_20, after checkpoint_10."""
    self.save(10, 20)
    return self.run / 'checkpoint_20'

  def goes_on_from(self, step: int, word: str) -> None:
    """A new start passes over the newest, says why, and has all of the older one."""
    checkpointer = self.open()
    assert checkpointer.latest_step() == step
    assert word in self.notes[-1], self.notes
    restored, positions, _ = checkpointer.restore(step, abstract(make_state()))
    assert_equal(restored, make_state(step, seed=step))
    assert dict(positions) == DATA

"""What a run spent its time on: `timeline.jsonl`, one line whenever it turns to something else.

Lines of all starts of a run stay, also of steps that a kill took back, so the wall time of the run
can be divided, and whoever watches from outside sees what it is doing. Only process 0 writes.

  start       a process began; `seconds` is how long ago that was
  setup restore data compile step evaluation save end   what it turns to, until the next line
  commit      in the background: a checkpoint is written and about to get its name

`stalled` in a line is how long the loop waited for data since the line before.
"""

from __future__ import annotations

import collections
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from etils import epath

from openmoe.observe.notes import Records

NAME = 'timeline.jsonl'
BACKGROUND = ('commit',)


def process_age() -> float:
  """Seconds since this process began; 0 where that cannot be told."""
  try:
    ticks = int(
      pathlib.Path('/proc/self/stat').read_text(encoding='utf-8').rpartition(')')[2].split()[19]
    )
    up = float(pathlib.Path('/proc/uptime').read_text(encoding='utf-8').split()[0])
  except OSError:
    return 0.0
  return max(0.0, up - ticks / os.sysconf('SC_CLK_TCK'))


class Timeline:
  """Writes timeline.jsonl; a context manager, which ends with the line `end`.

  Args:
    model_dir: run directory, local or gs://.
    note: receives what could not be written, as one line of text.
  """

  def __init__(self, model_dir: str | os.PathLike, note: Callable[[str], None]):
    self._note = note
    self._failed = False
    self._lock = threading.Lock()  # commits are noted by the thread that saves
    self._phase, self._step = 'setup', 0
    self._stalled, self._since = 0.0, time.monotonic()
    self._seconds: dict[str, float] = collections.defaultdict(float)
    self._records: Records | None = None
    if jax.process_index() == 0:
      directory = epath.Path(model_dir)
      directory.mkdir(parents=True, exist_ok=True)
      self._records = Records(directory, sys.maxsize, note, NAME)
      self._write('start', 0, seconds=round(process_age(), 3))
      self._write(self._phase, 0)

  def __enter__(self) -> Timeline:
    return self

  def __exit__(self, *unused) -> None:
    self.enter('end', self._step)
    self._guarded(lambda: self._records.flush())

  def so_far(self) -> dict[str, float]:
    """Seconds of this process by phase; `stalled` is a part of `step`."""
    now = time.monotonic()
    self._seconds[self._phase] += now - self._since
    self._since = now
    return self._seconds

  def enter(self, phase: str, step: int) -> None:
    """Turns to a phase after so many steps; nothing where it is that phase already."""
    self._step = step
    self.so_far()
    if phase != self._phase:
      self._phase = phase
      self._write(phase, step)

  @contextmanager
  def inside(self, phase: str, step: int) -> Iterator[None]:
    """Turns to a phase and back to the one before."""
    before = self._phase
    self.enter(phase, step)
    try:
      yield
    finally:
      self.enter(before, step)

  def stalled(self, seconds: float) -> None:
    """Counts time that the loop waited for data."""
    self._stalled += seconds
    self._seconds['stalled'] += seconds

  def background(self, event: str, step: int) -> None:
    """Notes something that happens beside the phase, from any thread."""
    self._write(event, step)

  def _write(self, kind: str, step: int, **more: float) -> None:
    if self._stalled:
      more['stalled'], self._stalled = round(self._stalled, 3), 0.0
    record = {'step': step, 'kind': kind, 'time': round(time.time(), 3)} | more
    self._guarded(lambda: self._records.append(record))

  def _guarded(self, act: Callable[[], None]) -> None:
    if self._records is None:
      return
    try:
      with self._lock:
        act()
    except OSError as error:
      if not self._failed:
        self._note(f'{NAME} cannot be written ({error}); training goes on. Make room there.')
      self._failed = True

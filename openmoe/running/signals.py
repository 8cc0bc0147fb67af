"""SIGTERM and SIGINT as a wish to stop, which the run grants at a step of its choice."""

from __future__ import annotations

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils


class Signals:
  """Notes SIGTERM and SIGINT while it is entered; all processes stop after the same step."""

  def __enter__(self) -> Signals:
    self._seen: int | None = None
    self._old = {}
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

  def stop_after(self, step: int) -> bool:
    """Whether this step is the last; agreed between processes."""
    if jax.process_count() == 1:
      return self._seen is not None
    seen = np.array([self._seen is not None])
    return bool(multihost_utils.process_allgather(seen).any())

"""Data that do not come: said after a while, and a run that waits for them can be stopped."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax

from openmoe.feed import Feed
from openmoe.observe.timeline import Timeline
from openmoe.running.signals import Signals

_TELL_AFTER = 60.0  # seconds without data after which the run says so; then after twice as long
_PATIENCE = 5.0  # seconds that a signal waits for data


class StuckData(RuntimeError):
  """Data do not come, a signal asked to stop, and nothing can be saved."""

  exit_code = 75


def wait_for_data(
  feed: Feed, signals: Signals, timeline: Timeline, note: Callable[[str], None], step: int
) -> bool:
  """Waits for the next batch; False where data are stuck and a signal asks to stop.

  Args:
    note: receives how long nothing has come, as a line of text.
    step: steps done.

  Raises:
    StuckData: likewise, with several processes, who cannot save while one has no batch.
  """
  if feed.ready(0.0):
    return True
  begin = time.monotonic()
  try:
    return _wait(feed, signals, note, step)
  finally:
    timeline.stalled(time.monotonic() - begin)


def _wait(feed: Feed, signals: Signals, note: Callable[[str], None], step: int) -> bool:
  begin, tell, asked = time.monotonic(), _TELL_AFTER, None
  while not feed.ready(1.0):
    waited = time.monotonic() - begin
    if waited >= tell:
      note(
        f'No data for {waited:.0f} s, after step {step}: look at the disk or mount that holds '
        'them. A signal saves and stops the run.'
      )
      tell *= 2
    if signals.asked and asked is None:
      asked = waited
    if asked is None or waited - asked < _PATIENCE:
      continue
    if jax.process_count() > 1:
      raise StuckData(
        f'No data for {waited:.0f} s in process {jax.process_index()}, which was asked to stop and '
        'cannot save alone; the same command continues from the newest checkpoint.'
      )
    return False
  return True

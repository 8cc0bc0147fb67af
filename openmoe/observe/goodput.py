"""What the wall time of a run went to, over all its starts, in parts that add up.

Read from timeline.jsonl alone. Of a start that was killed, whatever followed the step that the next
start went on from has been done again, so it counts as redone and not as training.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import Any

from etils import epath

from openmoe.checkpoint.paths import read_small
from openmoe.observe.notes import decode
from openmoe.observe.timeline import BACKGROUND, NAME

_LIMIT = 1 << 30  # bytes of a timeline
PARTS = {
  'step': 'training',
  'stalled': 'waiting for data',
  'evaluation': 'evaluation',
  'save': 'saving, while training waits',
  'setup': 'imports and set-up',
  'data': 'opening data',
  'restore': 'restoring or initialising',
  'compile': 'compilation, with the first step',
  'redone': 'done again, as a kill undid it',
  'lost': 'lost to kills, from the last sign of one to the next start',
  'down': 'stopped, until the next start',
}


@dataclasses.dataclass
class Start:
  """One process of a run.

  Attributes:
    begin: when it began, seconds since 1970.
    until: its last sign.
    first, last: steps done when it began and at its last sign.
    ended: whether it ended by itself: complete, or stopped after saving.
    seconds: by part, without lost and down, which lie between starts.
    redone: steps of it that were done again.
  """

  begin: float
  until: float
  first: int = 0
  last: int = 0
  ended: bool = False
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  redone: int = 0


@dataclasses.dataclass(frozen=True)
class Goodput:
  """The wall time of a run.

  Attributes:
    starts: its processes in turn.
    seconds: by part of PARTS; their sum is `wall`.
  """

  starts: list[Start]
  seconds: dict[str, float]

  @property
  def wall(self) -> float:
    """Seconds from the first sign of the run to its last."""
    return sum(self.seconds.values())

  @property
  def goodput(self) -> float:
    """Share of the wall time that trained for good; 0 for a run without time."""
    return self.seconds['step'] / self.wall if self.wall else 0.0


def read_goodput(model_dir: str | os.PathLike) -> Goodput:
  """The wall time of a run; nothing in it where there is no timeline."""
  path = epath.Path(model_dir) / NAME
  content = read_small(path, _LIMIT) if path.exists() else b''
  lines = [r for line in content.splitlines() if (r := decode(line)) is not None]
  return divide([r for r in lines if _whole(r)])


def _whole(record: dict[str, Any]) -> bool:
  numbers = (record.get('time'), record.get('seconds', 0), record.get('stalled', 0))
  return isinstance(record.get('kind'), str) and all(type(n) in (int, float) for n in numbers)


def divide(lines: list[dict[str, Any]]) -> Goodput:
  """Divides the time between lines of a timeline."""
  starts, later = [], _split(lines)
  total = dict.fromkeys(PARTS, 0.0)
  for (start, phases), following in itertools.zip_longest(later, later[1:]):
    goes_on = following[0].first if following and not start.ended else start.last
    start.redone = max(0, start.last - goes_on)
    _count(start, phases, goes_on)
    for part, seconds in start.seconds.items():
      total[part] += seconds
    if following:
      between = max(0.0, following[0].begin - start.until)
      total['down' if start.ended else 'lost'] += between
    starts.append(start)
  return Goodput(starts, total)


def _split(lines: list[dict[str, Any]]) -> list[tuple[Start, list[dict[str, Any]]]]:
  """The processes with their lines, each but the last with a time at which it ended."""
  found: list[tuple[Start, list[dict[str, Any]]]] = []
  for line in lines:
    if line['kind'] == 'start' or not found:
      begin = line['time'] - line.get('seconds', 0)
      found.append((Start(begin, line['time']), [line | {'kind': 'setup', 'time': begin}]))
      continue
    start, phases = found[-1]
    start.until = max(start.until, line['time'])
    if line['kind'] in BACKGROUND:
      continue  # its step is that of a save which began earlier
    if line['kind'] not in ('setup', 'end') and all(p['kind'] == 'setup' for p in phases):
      start.first = line['step']  # the first phase after set-up says what it goes on from
    start.last = max(start.last, line['step'])
    start.ended |= line['kind'] == 'end'
    phases.append(line)
  return found


def _count(start: Start, phases: list[dict[str, Any]], goes_on: int) -> None:
  """Fills in start.seconds: each phase lasts until the next line, the last to the last sign."""
  seconds = dict.fromkeys(PARTS, 0.0)
  for line, after in itertools.zip_longest(phases, phases[1:]):
    until = after or {'time': start.until, 'step': start.last}
    length = max(0.0, until['time'] - line['time'])
    kind = line['kind'] if line['kind'] in PARTS else 'setup'
    # Of the steps in this stretch, those after what was saved have been done again.
    steps, lost = until['step'] - line['step'], until['step'] - max(goes_on, line['step'])
    share = min(1.0, max(0.0, lost / steps)) if steps > 0 else float(line['step'] > goes_on)
    stalled = min(length, float(until.get('stalled', 0))) if kind == 'step' else 0.0
    seconds['redone'] += share * length
    seconds['stalled'] += (1 - share) * stalled
    seconds[kind] += (1 - share) * (length - stalled)
  start.seconds = {part: value for part, value in seconds.items() if part not in ('lost', 'down')}

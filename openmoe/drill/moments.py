"""Moments at which a run is killed: drawn over all that it does, and recognised from outside.

What a run is doing is read from its timeline, and how many steps it has done from the digests of
its batches; both are written while it goes on.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import signal
from collections.abc import Mapping, Sequence

import numpy as np

from openmoe.observe.batches import FOLDER
from openmoe.observe.notes import decode
from openmoe.observe.timeline import NAME
from openmoe.programme import Programme

# What is killed, in the order in which a run comes to it.
EARLY = ('import', 'data', 'restore', 'compile')
LATER = ('step', 'evaluation', 'save', 'write', 'rename', 'switch')
_RENAME = 0.01  # seconds
_USUAL = 0.5  # seconds that a phase lasts which the undisturbed run did not tell


@dataclasses.dataclass
class Moment:
  """When and how a start is killed, and what came of it.

  Attributes:
    phase: one of EARLY or LATER; `write` is a save in the background after the loop goes on,
      `rename` the moment before a checkpoint gets its name, `switch` the first step of a stage.
    step: not before so many steps are done; of no meaning in EARLY.
    wait: seconds from the beginning of the phase.
    number: of the signal.
    process: which of the processes it is sent to.
    found: what the run was doing then, in words, and how many steps it had done.
    at_step: those steps.
    resumed_at: step from which the next start went on.
  """

  phase: str
  step: int
  wait: float
  number: int
  process: int = 0
  found: str = ''
  at_step: int = 0
  resumed_at: int | None = None

  @property
  def signal_name(self) -> str:
    """As SIGKILL."""
    return signal.Signals(self.number).name

  @property
  def lost(self) -> int | None:
    """Steps that were done and are done again."""
    # A stopped run finishes its step, which was not counted yet.
    return None if self.resumed_at is None else max(0, self.at_step - self.resumed_at)


def draw(
  count: int,
  programme: Programme,
  total_steps: int,
  lasts: Mapping[str, float],
  eval_period: int,
  seed: int,
) -> list[Moment]:
  """So many moments, every phase once before any comes twice, in the order of their steps.

  Args:
    programme: of the run.
    lasts: seconds that each phase lasts, as durations() gives them.
    eval_period: steps between evaluations; 0 for none.
    seed: of the draw.
  """
  rng = np.random.default_rng(seed)
  switches = [step for step in programme.starts()[1:] if step < total_steps]
  evaluations = list(range(eval_period, total_steps, eval_period)) if eval_period else []
  places = {'switch': switches, 'evaluation': evaluations}
  phases = [p for p in (*LATER, *EARLY) if places.get(p, [0])]
  order: list[str] = []
  while len(order) < count:
    # What comes later in a run tells more of it, so with few kills it goes first.
    later, early = (rng.permutation([p for p in phases if p in kind]) for kind in (LATER, EARLY))
    order += [str(p) for p in (*later[:2], *early[:1], *later[2:], *early[1:])]
  moments = []
  for number, phase in enumerate(order[:count]):
    steps = places.get(phase) or range(1, max(2, total_steps - 1))
    wait = rng.uniform(0, lasts.get(phase, _USUAL))
    kind = signal.SIGTERM if number % 4 == 3 and phase != 'import' else signal.SIGKILL
    moments.append(Moment(phase, int(rng.choice(np.asarray(steps))), float(wait), int(kind)))
  return sorted(moments, key=lambda m: m.step)


def durations(lines: Sequence[dict]) -> dict[str, float]:
  """Phase -> median seconds that it lasted, from a timeline."""
  found = collections.defaultdict(list)
  phase = begin = wrote = None
  for line in lines:
    kind, now = line['kind'], line['time']
    if kind == 'start':
      found['import'].append(line.get('seconds', 0.0))
    elif kind == 'commit':
      found['write'].append(max(0.0, now - (wrote or now)))
    else:
      if phase is not None:
        found[phase].append(now - begin)
      wrote = now if phase == 'save' else wrote
      phase, begin = kind, now
  usual = {name: float(np.median(values)) for name, values in found.items()}
  return usual | {'rename': _RENAME, 'switch': 0.2, 'step': 0.2}


class Watcher:
  """What a run is doing, read from its files; those of former starts do not count."""

  def __init__(self, run_dir: pathlib.Path):
    self._timeline = run_dir / NAME
    self._batches = run_dir / FOLDER / 'process_0.jsonl'
    self._starts = sum(line['kind'] == 'start' for line in self._read(self._timeline))
    self._old = self._stamp(self._batches)
    self._seen: dict[pathlib.Path, tuple[tuple, list[dict]]] = {}

  @staticmethod
  def _stamp(path: pathlib.Path) -> tuple:
    try:
      status = os.stat(path)
    except OSError:
      return ()
    return status.st_ino, status.st_size, status.st_mtime_ns

  @staticmethod
  def _read(path: pathlib.Path) -> list[dict]:
    if not path.exists():
      return []
    return [r for line in path.read_bytes().splitlines() if (r := decode(line)) is not None]

  def _fresh(self, path: pathlib.Path) -> list[dict]:
    stamp = self._stamp(path)
    if path not in self._seen or self._seen[path][0] != stamp:
      self._seen[path] = stamp, self._read(path)
    return self._seen[path][1]

  def lines(self) -> list[dict]:
    """The timeline since this start began."""
    starts, mine = 0, []
    for line in self._fresh(self._timeline):
      starts += line['kind'] == 'start'
      if starts > self._starts:
        mine.append(line)
    return mine

  def steps(self) -> int:
    """Steps done, also by former starts; those of a start that goes on are its own."""
    resumed = self.resumed_at()
    if self._stamp(self._batches) == self._old:
      return resumed or 0
    return max([r['step'] for r in self._fresh(self._batches)], default=resumed or 0)

  def resumed_at(self) -> int | None:
    """The step that this start began with; None before that is known."""
    return next((line['step'] for line in self.lines() if line['kind'] == 'restore'), None)

  def arrived(self, moment: Moment) -> bool:
    """Whether the phase of a moment has begun, or can no longer come."""
    phases = [(line['kind'], line['step']) for line in self.lines()]
    kinds = [kind for kind, _ in phases]
    if moment.phase == 'import':
      return True
    if moment.phase in EARLY:
      return moment.phase in kinds or 'step' in kinds
    if 'end' in kinds:
      return True
    if moment.phase in ('step', 'switch'):
      return self.steps() >= moment.step
    if moment.phase == 'rename':
      return any(k == 'commit' and s >= moment.step for k, s in phases)
    if moment.phase == 'write':
      saves = [i for i, (k, s) in enumerate(phases) if k == 'save' and s >= moment.step]
      return bool(saves) and 'step' in kinds[saves[0] :]
    return any(k == moment.phase and s >= moment.step for k, s in phases)

  def doing(self) -> str:
    """The phase the run is in, in words."""
    lines = self.lines()
    return lines[-1]['kind'] if lines else 'import'

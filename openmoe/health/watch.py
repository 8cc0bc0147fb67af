"""Health of a run while it trains: scalars that need more than one step, rules, what they cause.

Every process watches the same replicated scalars and so comes to the same end. What later answers
depend on goes into the checkpoint, so a run that is killed and started again has the same records,
events, skipped steps and rates as one that is not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from openmoe.health.guard import guarded
from openmoe.health.monitor import Event, Monitor
from openmoe.health.routers import DeadTime, router_scalars
from openmoe.health.rules import SKIPPABLE, Action, HealthConfig
from openmoe.observe.notes import Records
from openmoe.observe.timeline import Timeline
from openmoe.types import RouterStats

EVENTS = 'health.jsonl'
_PEAKS = ('loss', 'grad_norm')  # recorded with their largest value since the record before


class Unhealthy(RuntimeError):
  """A rule stops the run; the message names it, its values and the last good checkpoint."""

  exit_code = 65


class Watch:
  """Watches one run.

  Args:
    config: the rules.
    timeline: of the run, which knows what its time went to.
  """

  def __init__(self, config: HealthConfig, timeline: Timeline):
    rules = config.table()
    self._controlled = any(r.action in (Action.SKIP, Action.LOWER_RATE) for r in rules)
    self._monitor = Monitor(rules, timed=jax.process_index() == 0)
    self._timeline, self._note = timeline, logging.warning
    self._events: Records | None = None
    self._dead = DeadTime()
    self._peaks: dict[str, float] = {}
    self._skipped = {'steps': 0, 'here': 0, 'all': 0}  # since the last record, of them, of the run
    self._clock = (time.monotonic(), 0.0, 0.0)
    self._save_due = False
    self._controls = self._find_controls()

  # --- the compiled step

  def guard(self, step: Callable) -> Callable:
    """The training step, or the guarded one where a rule skips steps or lowers the rate."""
    return guarded(step) if self._controlled else step

  def controls(self) -> tuple[dict[str, np.ndarray], ...]:
    """What the guarded step takes besides state and batch."""
    return (self._controls,) if self._controlled else ()

  def _find_controls(self) -> dict[str, np.ndarray]:
    slowed = math.prod(rule.factor for rule in self._monitor.active(Action.LOWER_RATE))
    controls = {'rate_scale': slowed, **{n: self._monitor.skip_limit(n) for n in SKIPPABLE}}
    return {name: np.float32(value) for name, value in controls.items()}

  # --- what is seen

  def see(self, scalars: Mapping[str, float], stats: RouterStats | None) -> dict[str, float]:
    """Takes the scalars and router statistics of every step in turn; gives the routers' scalars."""
    for name in _PEAKS:
      value = scalars[name] if math.isfinite(scalars[name]) else math.inf
      self._peaks[name] = max(self._peaks.get(name, -math.inf), value)
    if self._controlled:
      self._skipped['steps'] += 1
      self._skipped['here'] += int(scalars['skipped'])
      self._skipped['all'] += int(scalars['skipped'])
    if stats is None:
      return {}
    self._dead.add(np.asarray(stats.expert_load_e))
    return router_scalars(stats)

  def summary(self) -> dict[str, float]:
    """Scalars over the steps since the record before; begins anew.

    loss_max, grad_norm_max  the largest
    dead_steps               how many steps in a row the longest dead expert has been that
    skipped_fraction, skipped_steps  where steps may be skipped: share of them, number in the run
    stalled_fraction, goodput  of the wall time: spent waiting for data, spent training
    """
    scalars = {f'{name}_max': value for name, value in self._peaks.items()}
    self._peaks.clear()
    if self._dead.steps_le is not None:
      scalars['dead_steps'] = float(self._dead.steps_le.max())
    if self._controlled:
      steps, here = self._skipped['steps'], self._skipped['here']
      scalars['skipped_fraction'] = here / max(1, steps)
      scalars['skipped_steps'] = float(self._skipped['all'])
      self._skipped |= {'steps': 0, 'here': 0}
    return scalars | self._shares_of_time()

  def _shares_of_time(self) -> dict[str, float]:
    seconds = self._timeline.so_far()
    now = (time.monotonic(), seconds['step'], seconds['stalled'])
    wall, step, stalled = (a - b for a, b in zip(now, self._clock, strict=True))
    self._clock = now
    if wall <= 0:
      return {}
    return {'stalled_fraction': stalled / wall, 'goodput': max(0.0, step - stalled) / wall}

  # --- what follows

  def judge(self, record: Mapping[str, Any], good: Callable[[], int | None]) -> None:
    """Applies the rules to a record and does what they say.

    Args:
      record: as in metrics.jsonl.
      good: newest checkpoint that is there, for the message of a stop.

    Raises:
      Unhealthy: a rule with the action stop fired.
    """
    events = self._monitor.feed(record)
    self._controls = self._find_controls()
    for event in events:
      self._note(event.text)
      self._written(lambda event=event: self._events.append(event.record()))
      self._save_due |= event.fired and event.rule.action is Action.SAVE
    stops = [e for e in events if e.fired and e.rule.action is Action.STOP]
    if stops:
      raise Unhealthy(_stopped(stops[0], good()))

  def save_due(self) -> bool:
    """Whether a rule wants a checkpoint now; asks once."""
    due, self._save_due = self._save_due, False
    return due

  # --- going on

  def open(
    self,
    model_dir: str | os.PathLike,
    start_step: int,
    state: object,
    note: Callable[[str], None],
  ) -> None:
    """Begins to write health.jsonl after `start_step`.

    Args:
      state: what the checkpoint of that step holds under `health`; anything else counts as none.
      note: receives events as one line of text each.
    """
    self._note = note
    if jax.process_index() == 0:
      self._events = Records(epath.Path(model_dir), start_step, self._note, EVENTS)
    if isinstance(state, dict):
      self._monitor.restore(state.get('rules'))
      self._take_up(state)
    self._controls = self._find_controls()

  def _take_up(self, state: Mapping[str, Any]) -> None:
    dead, peaks, skipped = (state.get(k) for k in ('dead_steps', 'peaks', 'skipped'))
    rows = dead if isinstance(dead, list) and all(_whole_numbers(row) for row in dead) else []
    if len({len(row) for row in rows}) == 1:
      self._dead.steps_le = np.array(rows, np.int64)
    if isinstance(peaks, dict) and all(_is_peak(peaks.get(n)) for n in _PEAKS):
      self._peaks = {n: float(peaks[n]) for n in _PEAKS}
    if isinstance(skipped, dict) and _whole_numbers([skipped.get(n) for n in self._skipped]):
      self._skipped = {n: skipped[n] for n in self._skipped}

  def state(self) -> dict[str, Any]:
    """What goes into the checkpoint under `health`."""
    dead = self._dead.steps_le
    return {
      'health': {
        'rules': self._monitor.state(),
        'dead_steps': [] if dead is None else dead.tolist(),
        'peaks': {n: repr(v) for n, v in self._peaks.items()},  # JSON has no inf
        'skipped': dict(self._skipped),
      }
    }

  def _written(self, act: Callable[[], None]) -> None:
    """Notes never stop a run: what cannot be written is told, and tried again later."""
    if self._events is None:
      return
    try:
      act()
    except OSError as error:
      self._note(f'{EVENTS} cannot be written ({error}); training goes on. Make room there.')

  def __enter__(self) -> Watch:
    return self

  def __exit__(self, *unused) -> None:
    self._written(lambda: self._events.flush())


def _whole_numbers(values: object) -> bool:
  return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**53 for v in values)


def _is_peak(value: object) -> bool:
  try:
    return isinstance(value, str) and not math.isnan(float(value))
  except ValueError:
    return False


def _stopped(event: Event, saved: int | None) -> str:
  good = 'none was written' if saved is None else f'checkpoint_{saved}'
  return (
    f'{event.text} The run stops here; the last good checkpoint: {good}. Look at {EVENTS}; to go '
    f"on all the same, leave the rule out: health.HealthConfig.without = ('{event.rule.name}',)."
  )

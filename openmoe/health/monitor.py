"""Applies the rules to records, one after the other; the same in a run and in a replay of it."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from openmoe.health.rules import Action, Measure, Rule
from openmoe.observe.notes import TIMED

_DEVIATION = 1.4826  # median absolute deviations in a standard deviation of normal noise


@dataclasses.dataclass(frozen=True)
class Event:
  """A rule fired or cleared.

  Attributes:
    step: of the record at which it did.
    rule: which.
    fired: or cleared.
    value: of the scalar in that record.
    share: of the window that lies beyond the limit.
  """

  step: int
  rule: Rule
  fired: bool
  value: float
  share: float

  @property
  def text(self) -> str:
    """One line for a person."""
    rule = self.rule
    if not self.fired:
      return (
        f'Health: {rule.name} is well again at step {self.step}: {rule.metric} {self.value:.4g}.'
      )
    many = f' in {self.share:.0%} of {rule.window} records' if rule.window > 1 else ''
    return (
      f'Health: {rule.name} at step {self.step}: {rule.metric} {self.value:.4g}, {rule.limit}{many}'
      f' ({rule.action.value}). {rule.why}'.rstrip()
    )

  def record(self) -> dict[str, Any]:
    """As a line of health.jsonl."""
    return {
      'step': self.step,
      'kind': 'fired' if self.fired else 'cleared',
      'rule': self.rule.name,
      'metric': self.rule.metric,
      'value': self.value,
      'share': self.share,
      'action': self.rule.action.value,
      'text': self.text,
    }


class _Watched:
  """What a rule has seen: the values before, and which of the last ones were beyond its limit."""

  def __init__(self, rule: Rule):
    self.rule, self.active = rule, False
    self.values: collections.deque[float] = collections.deque(maxlen=rule.baseline)
    self.beyond: collections.deque[bool] = collections.deque(maxlen=rule.window)

  def limit(self) -> float | None:
    """The value that counts as beyond now; None while too little has been seen to tell."""
    rule = self.rule
    bound = rule.above if rule.below is None else rule.below
    if rule.measure is Measure.VALUE:
      return bound
    if len(self.values) < max(2, rule.baseline // 2):
      return None
    middle = statistics.median(self.values)
    if rule.measure is Measure.RATIO:
      return bound * max(middle, rule.floor)
    deviation = statistics.median(abs(v - middle) for v in self.values)
    away = bound * max(_DEVIATION * deviation, rule.floor)
    return middle + away if rule.below is None else middle - away

  def add(self, step: int, value: float) -> bool | None:
    """Takes a value; True where the rule fires by it, False where it clears, else None."""
    rule, limit = self.rule, self.limit()
    if limit is not None and step > rule.after:
      over = value > limit if rule.below is None else value < limit
      self.beyond.append(over or math.isnan(value))
    if math.isfinite(value) and rule.measure is not Measure.VALUE:
      self.values.append(value)
    if len(self.beyond) < rule.window or step <= rule.after:
      return None
    if not self.active and self.share >= rule.share:
      self.active = True
      return True
    if self.active and self.share <= rule.clear:
      self.active = False
      return False
    return None

  @property
  def share(self) -> float:
    return sum(self.beyond) / len(self.beyond) if self.beyond else 0.0


class Monitor:
  """All rules of a run.

  Args:
    rules: of one name each.
    timed: whether rules on scalars that the clock decides count, too.
  """

  def __init__(self, rules: Iterable[Rule], timed: bool = True):
    chosen = [rule for rule in rules if timed or rule.metric not in TIMED]
    self._watched = {rule.name: _Watched(rule) for rule in chosen}

  def feed(self, record: Mapping[str, Any]) -> list[Event]:
    """What the rules say to a record of metrics.jsonl; call it in the order of the steps."""
    events, step = [], record['step']
    for watched in self._watched.values():
      rule, value = watched.rule, record.get(watched.rule.metric)
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if rule.kind != record.get('kind', 'train') or not number:
        continue
      change = watched.add(step, float(value))
      if change is not None:
        events.append(Event(step, rule, change, float(value), watched.share))
    return events

  def active(self, action: Action) -> list[Rule]:
    """Rules of an action that have fired and not cleared."""
    return [w.rule for w in self._watched.values() if w.active and w.rule.action is action]

  def skip_limit(self, metric: str) -> float:
    """The value of a scalar above which a step is to be skipped; inf for none."""
    limits = [
      limit
      for w in self._watched.values()
      if w.rule.action is Action.SKIP and w.rule.metric == metric
      if (limit := w.limit()) is not None
    ]
    return min(limits, default=math.inf)

  def state(self) -> dict[str, Any]:
    """All that later answers depend on, JSON-able; without what the clock decides."""
    return {
      name: {'values': list(w.values), 'beyond': [int(b) for b in w.beyond], 'active': w.active}
      for name, w in self._watched.items()
      if w.rule.metric not in TIMED and (w.values or w.beyond)
    }

  def restore(self, state: object) -> None:
    """Takes up what state() gave; rules that it does not know, or holds oddly, begin anew."""
    for name, seen in state.items() if isinstance(state, dict) else ():
      if name in self._watched and isinstance(seen, dict):
        self._take_up(self._watched[name], seen)

  def _take_up(self, watched: _Watched, seen: Mapping[str, Any]) -> None:
    values, beyond = seen.get('values'), seen.get('beyond')
    if not isinstance(values, list) or not isinstance(beyond, list):
      return
    finite = all(type(v) is float and math.isfinite(v) for v in values)
    if finite and all(type(b) is int and b in (0, 1) for b in beyond):
      watched.values.extend(values)
      watched.beyond.extend(bool(b) for b in beyond)
      watched.active = seen.get('active') is True

"""What the rules would have said to a run that is recorded already."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from typing import Any

from rich.table import Table
from rich.text import Text

from openmoe.config import ConfigError
from openmoe.health.monitor import Event, Monitor
from openmoe.health.rules import Action, HealthConfig, Rule
from openmoe.observe.metrics import read_records
from openmoe.observe.notes import RECORDS
from openmoe.observe.text import visible

_COLOURS = {Action.NOTE: 'yellow', Action.STOP: 'bold red'}


@dataclasses.dataclass(frozen=True)
class Replay:
  """The rules over a recorded run.

  Attributes:
    rules: the table.
    events: in the order of the records.
    records: how many there are.
    seen: name of a rule -> records that have its scalar; a run of before may lack some.
  """

  rules: tuple[Rule, ...]
  events: list[Event]
  records: int
  seen: dict[str, int]

  @property
  def blind(self) -> list[str]:
    """Names of the rules whose scalar no record has."""
    return [rule.name for rule in self.rules if not self.seen[rule.name]]

  def as_json(self) -> dict[str, Any]:
    """Everything as plain values."""
    return {
      'records': self.records,
      'events': [event.record() for event in self.events],
      'rules': [
        {'rule': r.name, 'metric': r.metric, 'limit': r.limit, 'records': self.seen[r.name]}
        for r in self.rules
      ],
    }

  def table(self) -> Table:
    """The events, one a row."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ('step', 'rule', '', 'value', 'limit', 'action', 'why'):
      table.add_column(name, justify='right' if name in ('step', 'value') else 'left')
    for event in self.events:
      rule = event.rule
      colour = _COLOURS.get(rule.action, 'red') if event.fired else 'green'
      share = f', {event.share:.0%} of {rule.window}' if rule.window > 1 else ''
      cells = (
        str(event.step),
        rule.name,
        'fired' if event.fired else 'cleared',
        f'{event.value:.4g}',
        f'{rule.metric} {rule.limit}{share}',
        rule.action.value if event.fired else '',
        rule.why if event.fired else '',
      )
      styled = (Text(visible(c), style=colour if i in (1, 2) else '') for i, c in enumerate(cells))
      table.add_row(*styled)
    return table


def replay(model_dir: str | os.PathLike, config: HealthConfig) -> Replay:
  """Applies the rules to metrics.jsonl of a run.

  Raises:
    ConfigError: there are no records.
  """
  rules, records = config.table(), read_records(model_dir)
  if not records:
    raise ConfigError(f'{os.fspath(model_dir)} holds no {RECORDS} with records: give a run.')
  monitor, events = Monitor(rules), []
  for record in records:
    events += monitor.feed(record)
  there = Counter((record.get('kind', 'train'), name) for record in records for name in record)
  return Replay(rules, events, len(records), {r.name: there[r.kind, r.metric] for r in rules})

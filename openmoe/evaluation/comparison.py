"""Two evaluations side by side: which items came out differently, and why."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from openmoe.config import ConfigError
from openmoe.evaluation import results

_WHY = ('prompt', 'tokens', 'model', 'numerics', 'seed', 'missing')
_SHOWN = 40


def heads_differ(one: dict, two: dict) -> list[str]:
  """What the two results say about themselves, where it is not the same."""
  pairs = [(key, one[key], two[key]) for key in ('tokenizer', 'bos')]
  for part in ('model', 'settings'):
    keys = sorted(set(one[part]) | set(two[part]))
    pairs += [(f'{part}.{key}', one[part].get(key), two[part].get(key)) for key in keys]
  return [f'{name}: {a} -> {b}' for name, a, b in pairs if a != b]


def compare_all(one: dict[str, dict], two: dict[str, dict]) -> dict[str, dict]:
  """{task: {differs, changes}} of the tasks that both have.

  Raises:
    ConfigError: they have no task in common.
  """
  common = [name for name in one if name in two]
  if not common:
    raise ConfigError(
      f'No task is in both: {sorted(one)} and {sorted(two)}. Compare like with like.'
    )
  return {
    name: {
      'differs': heads_differ(one[name], two[name]),
      'changes': results.compare(one[name], two[name]),
    }
    for name in common
  }


def _describe(name: str, changes: list[results.Change], count: int) -> str:
  """One line about a task."""
  why = collections.Counter(change.why for change in changes)
  causes = ', '.join(f'{cause} {why[cause]}' for cause in _WHY if why[cause])
  moved = sum(change.outcome for change in changes)
  gaps = [change.log_prob_gap for change in changes if change.log_prob_gap is not None]
  gap = f'; log-probabilities moved by up to {max(gaps):.2e}' if gaps else ''
  return f'{name}: {len(changes)} of {count} items differ ({causes}), the figure of {moved}{gap}'


def report(found: dict[str, dict], counts: dict[str, int], every: bool) -> Iterator[str]:
  """Lines about compare_all's answer.

  Args:
    counts: items of each task.
    every: also of items whose figure is the same.
  """
  same = [name for name, entry in found.items() if not entry['changes']]
  for name, entry in found.items():
    if name in same:
      continue
    yield _describe(name, entry['changes'], counts[name])
    for line in entry['differs']:
      yield f'  {line}'
    listed = [change for change in entry['changes'] if every or change.outcome]
    for change in listed[:_SHOWN]:
      gap = '' if change.log_prob_gap is None else f', moved by {change.log_prob_gap:.2e}'
      yield f'  item {change.item}: {change.before} -> {change.after} ({change.why}{gap})'
    if len(listed) > _SHOWN:
      yield f'  and {len(listed) - _SHOWN} more; --json lists all'
  yield f'{len(same)} of {len(found)} tasks are the same, {sum(counts[n] for n in same)} items'

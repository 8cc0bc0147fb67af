"""Says which items of two evaluations came out differently, and why.

  python -m scripts.compare_evals A B [--all] [--json]

A and B are directories that scripts.evaluate wrote, or single result files. Reasons: the prompt's
text differs; the same text became other tokens; the model is another one; or everything is the same
and the numbers differ (numerics). Items whose log-probabilities moved without moving the figure are
counted, and listed with --all.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys

from rich.console import Console

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


def _show(found: dict[str, dict], counts: dict[str, int], every: bool, console: Console) -> None:
  say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
  same = [name for name, entry in found.items() if not entry['changes']]
  for name, entry in found.items():
    if name in same:
      continue
    say(_describe(name, entry['changes'], counts[name]))
    for line in entry['differs']:
      say(f'  {line}')
    listed = [change for change in entry['changes'] if every or change.outcome]
    for change in listed[:_SHOWN]:
      gap = '' if change.log_prob_gap is None else f', moved by {change.log_prob_gap:.2e}'
      say(f'  item {change.item}: {change.before} -> {change.after} ({change.why}{gap})')
    if len(listed) > _SHOWN:
      say(f'  and {len(listed) - _SHOWN} more; --json lists all')
  say(f'{len(same)} of {len(found)} tasks are the same, {sum(counts[n] for n in same)} items')


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('a')
  parser.add_argument('b')
  parser.add_argument('--all', action='store_true', help='also items whose figure is the same')
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  try:
    one, two = results.load_all(args.a), results.load_all(args.b)
    found = compare_all(one, two)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 64
  if args.json:
    as_json = {
      name: {
        'differs': entry['differs'],
        'changes': [dataclasses.asdict(change) for change in entry['changes']],
      }
      for name, entry in found.items()
    }
    print(json.dumps(as_json))
  else:
    counts = {name: len(one[name]['items']) for name in found}
    _show(found, counts, args.all, Console())
  return 0


if __name__ == '__main__':
  raise SystemExit(main())

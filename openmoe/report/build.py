"""The report of one run, or of several side by side."""

from __future__ import annotations

import datetime
import difflib
import os
from collections.abc import Callable, Sequence

from openmoe.checkpoint.paths import absolute, write_whole
from openmoe.observe import page
from openmoe.observe.display import duration, quantity
from openmoe.observe.goodput import PARTS
from openmoe.observe.page import Html, cards, details, element, paragraph, pre, section, table
from openmoe.observe.pictures import INK as PICTURE_INK
from openmoe.observe.pictures import MUTED as PICTURE_MUTED
from openmoe.observe.pictures import experts_figure
from openmoe.report import figures
from openmoe.report.facts import Run, read_run

NAME = 'report.html'
_MOST_EVENTS = 200  # rows of the table of health events
_FOOT = 'Everything on this page lies in this file; it opens no connection.'


def report(model_dirs: Sequence[str | os.PathLike]) -> str:
  """The page on some runs.

  Raises:
    ConfigError: one of them is none.
  """
  runs = [read_run(path) for path in model_dirs]
  if len(runs) == 1:
    return page.document(runs[0].name, _summary(runs[0]), *_one(runs[0]), footer=_FOOT)
  title = f'{len(runs)} runs'
  parts = [details(run.name, _summary(run), *_one(run, str(n))) for n, run in enumerate(runs, 1)]
  return page.document(title, *_together(runs), section('Each run'), *parts, footer=_FOOT)


def write_report(model_dir: str | os.PathLike) -> str:
  """Writes report.html into a run directory; its path.

  Raises:
    ConfigError: it is no run.
    OSError: it cannot be written.
  """
  path = absolute(model_dir) / NAME
  write_whole(path, report([model_dir]).encode())
  return os.fspath(path)


# --- several


def _together(runs: Sequence[Run]) -> list[Html]:
  head = ['', *(figures.short(run.name) for run in runs)]
  names = list(dict.fromkeys(name for run in runs for name, _ in _facts(run)))
  known = [dict(_facts(run)) for run in runs]
  rows = [[name, *(facts.get(name, '-') for facts in known)] for name in names]
  parts = [
    table(head, rows, numbers=range(1, len(head))),
    section('Loss', page.figure(figures.loss(runs), 'Loss of all runs')),
  ]
  if drawn := figures.wall_time(runs):
    parts.append(section('Wall time', page.figure(drawn, 'Wall time of all runs')))
  first = runs[0]
  others = [
    details(
      f'{figures.short(first.name)} to {figures.short(run.name)}',
      _difference(_newest(first), _newest(run)),
    )
    for run in runs[1:]
    if _newest(run) != _newest(first)
  ]
  parts.append(section('Configuration', *(others or [paragraph('The same.', kind='muted')])))
  return parts


def _newest(run: Run) -> str:
  return run.configs[-1][1] if run.configs else ''


# --- one


def _facts(run: Run) -> list[tuple[str, str]]:
  last = run.train[-1]
  facts = [('steps', f'{last["step"]:,}')]
  value: Callable = lambda name, form: form(last[name]) if _number(last.get(name)) else None
  facts.append(('tokens', value('tokens_seen', quantity)))
  facts.append(('loss', value('loss', '{:.4f}'.format)))
  checked = run.validation[-1] if run.validation else {}
  if _number(checked.get('loss')):
    facts.append(('validation loss', f'{checked["loss"]:.4f}'))
  facts.append(('tokens/s', value('tokens_per_second', quantity)))
  facts.append(('MFU', value('mfu', '{:.1%}'.format)))
  facts.append(('dropped', value('dropped_fraction', '{:.1%}'.format)))
  facts.append(('dead experts', value('dead_experts', '{:.0f}'.format)))
  if run.goodput.wall:
    facts.append(('wall time', duration(run.goodput.wall)))
    facts.append(('of it training', f'{run.goodput.goodput:.1%}'))
    facts.append(('restarts', str(len(run.goodput.starts) - 1)))
  facts.append(('health rules fired', str(sum(e.get('kind') == 'fired' for e in run.events))))
  return [(name, text) for name, text in facts if text is not None]


def _number(value: object) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _summary(run: Run) -> Html:
  start = run.starts[-1] if run.starts else {}
  devices = start.get('devices') if isinstance(start.get('devices'), dict) else {}
  said = [
    f'{devices.get("count", "?")} x {devices.get("kind", "?")}' if devices else '',
    f'commit {str(start["git_commit"])[:12]}' if start.get('git_commit') else '',
    str(start.get('time', '')),
  ]
  problems = [paragraph(problem, kind='warn') for problem in run.problems]
  line = paragraph(', '.join(filter(None, said)), kind='muted')
  return page.join([line, *problems, cards(_facts(run))])


def _one(run: Run, mark: str = '') -> list[Html]:
  """Sections on a run; `mark` tells its figures from those of others on the page."""
  parts = [section('Loss', page.figure(figures.loss([run]), f'Loss {mark}'))]
  if drawn := figures.balance(run):
    parts.append(section('Balance', page.figure(drawn, f'Balance {mark}')))
  if run.router:
    drawn = experts_figure(run.router)
    colours = {PICTURE_INK: 'ink', PICTURE_MUTED: 'muted', '#ececf0': 'grid'}
    colours |= {'#9ecae1': 'series-4', '#3f1d63': 'series-3'}  # the first and the last layer
    drawing = page.figure(drawn, f'Load of every expert {mark}', also=colours)
    parts.append(section('Experts', drawing))
  parts.append(section('Health', *_health(run)))
  if run.goodput.wall:
    parts.append(section('Wall time', *_wall_time(run, mark)))
    parts.append(section('Starts', _starts(run)))
  if run.samples:
    parts.append(section('Samples', *(_sample(*sample) for sample in run.samples)))
  if run.configs:
    parts.append(section('Configuration', *_configuration(run)))
  return parts


def _health(run: Run) -> list[Html]:
  how = 'As the rules of today would have it; the run itself was not watched.'
  parts = [paragraph(how, kind='muted')] if run.replayed and run.events else []
  if not run.events:
    return [paragraph('No rule fired.', kind='good')]
  rows = [_event(event) for event in run.events[:_MOST_EVENTS]]
  parts.append(table(['step', '', 'rule', 'value', 'action', 'what'], rows, numbers=[0, 3]))
  if more := len(run.events) - _MOST_EVENTS:
    parts.append(paragraph(f'And {more} more in health.jsonl.') if more > 0 else Html())
  return parts


def _event(event: dict) -> list[object]:
  fired = event.get('kind') == 'fired'
  value = event.get('value')
  mark = element('span', 'fired' if fired else 'cleared', class_='bad' if fired else 'good')
  shown = f'{value:.4g}' if _number(value) else str(value)
  text = str(event.get('text', '')).removeprefix('Health: ')
  action = event.get('action', '') if fired else ''
  return [event['step'], mark, event.get('rule', ''), shown, action, text]


def _wall_time(run: Run, mark: str) -> list[Html]:
  found = run.goodput
  rows = [
    [label, duration(found.seconds[part]), f'{found.seconds[part] / found.wall:.1%}']
    for part, label in PARTS.items()
    if found.seconds[part] > 0
  ]
  rows.append([element('b', 'together'), duration(found.wall), '100.0%'])
  drawn = page.figure(figures.wall_time([run]), f'Wall time {mark}')
  return [drawn, table(['', 'time', 'share'], rows, numbers=[1, 2])]


def _starts(run: Run) -> Html:
  """One row a process; what run.json says of it where that has as many."""
  rows, known = [], run.starts[-len(run.goodput.starts) :]
  told = known if len(known) == len(run.goodput.starts) else [{}] * len(run.goodput.starts)
  for number, (start, said) in enumerate(zip(run.goodput.starts, told, strict=True), 1):
    begin = datetime.datetime.fromtimestamp(start.begin, datetime.UTC)
    last = number == len(run.goodput.starts)
    end = 'ended' if start.ended else 'no end so far' if last else 'killed'
    kind = 'good' if start.ended else None if last else 'bad'
    rows.append(
      [
        number, f'{begin:%Y-%m-%d %H:%M:%S}', said.get('host', ''), start.first, start.last,
        element('span', end, class_=kind), start.redone or '',
        duration(sum(start.seconds.values())),
      ]
    )  # fmt: skip
  head = ['', 'began (UTC)', 'host', 'from step', 'to step', 'how it ended', 'steps redone', 'time']
  return table(head, rows, numbers=[0, 3, 4, 6, 7])


def _sample(prompt: str, text: str) -> Html:
  return element('pre', element('b', prompt), text)


def _configuration(run: Run) -> list[Html]:
  parts = []
  for (until, before), (_, after) in zip(run.configs, run.configs[1:], strict=False):
    parts += [element('h3', f'Changed at step {until}'), _difference(before, after)]
  return [*parts, details('config.gin', pre(_newest(run)))]


def _difference(before: str, after: str) -> Html:
  """Lines that one text has and the other has not."""
  changes = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm='')
  lines = [line for line in changes if line[:3] not in ('---', '+++') and line[:2] != '@@']
  kinds = {'-': 'bad', '+': 'good'}
  shown = [element('span', line + '\n', class_=kinds.get(line[:1])) for line in lines if line[1:]]
  return element('pre', *shown) if shown else paragraph('Spaces only.', kind='muted')

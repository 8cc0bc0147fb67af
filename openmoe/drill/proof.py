"""What a drill found: for a person as it goes on, and as resume_proof.json for a program."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from openmoe.checkpoint.paths import write_whole
from openmoe.drill.compare import Aspect
from openmoe.drill.moments import Moment
from openmoe.observe.record import git_commit, package_versions
from openmoe.observe.text import visible

NAME = 'resume_proof.json'


class Board:
  """The live table of a drill; a context manager. Without a terminal it prints a line a start."""

  def __init__(self, title: str):
    self._title = title
    self._console = Console(highlight=False)
    self._rows: list[list[str]] = []
    self._live = Live(console=self._console, auto_refresh=False) if sys.stdout.isatty() else None
    self._shown = 0.0

  def __enter__(self) -> Board:
    if self._live:
      self._live.__enter__()
    return self

  def __exit__(self, *error) -> None:
    if self._live:
      self._show()
      self._live.__exit__(*error)

  def begin(self, run: str, shape: object) -> None:
    """A start of a run begins."""
    self._rows.append([run, str(shape), 'import', '', '', ''])
    self._show()

  def now(self, phase: str, step: int) -> None:
    """What it is doing."""
    self._rows[-1][2] = f'{phase}, step {step}'
    if self._live and time.monotonic() - self._shown > 0.2:
      self._show()

  def ended(self, moment: Moment | None, step: int) -> None:
    """It was killed, or is complete."""
    row = self._rows[-1]
    if moment is None:
      row[2:4] = [f'step {step}', 'complete']
    else:
      row[2] = f'step {moment.at_step}'
      row[3] = f'{moment.signal_name} in {moment.phase} ({moment.found})'
    self._show()
    if not self._live:
      self._console.print(Text(visible('  '.join(cell for cell in row if cell))))

  def resumed(self, moment: Moment) -> None:
    """Where the start after a kill went on."""
    row = next(r for r in self._rows if r[3].startswith('SIG') and not r[4])
    row[4:] = [str(moment.resumed_at), str(moment.lost)]
    if not self._live:
      text = f'  resumed at step {moment.resumed_at}, {moment.lost} steps lost'
      self._console.print(Text(text))
    self._show()

  def _show(self) -> None:
    if self._live:
      self._live.update(Group(Text(self._title, 'bold'), self._table()), refresh=True)
      self._shown = time.monotonic()

  def _table(self) -> Table:
    table = Table(box=None, header_style='bold')
    for name in ('run', 'processes x devices', 'at', 'killed by', 'resumed at', 'steps lost'):
      table.add_column(name, justify='right' if name in ('resumed at', 'steps lost') else 'left')
    for row in self._rows:
      table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def show_verdict(aspects: Sequence[Aspect], control: str, verdict: bool, exact: bool) -> None:
  """Prints what was compared."""
  console = Console(highlight=False)
  table = Table(box=None, header_style='bold')
  for name in ('compared', 'count', 'differing', 'difference', 'first'):
    table.add_column(name)
  for aspect in aspects:
    style = 'green' if aspect.holds(exact) else 'bold red'
    size = 'none' if aspect.same else f'{aspect.difference:.1e}'
    cells = (aspect.name, f'{aspect.count:,}', f'{aspect.differing:,}', size, aspect.first)
    table.add_row(*(Text(visible(cell), style) for cell in cells))
  console.print()
  console.print(table)
  console.print(Text(visible(f'control: {control}')))
  held = 'bit for bit' if exact else 'batches bit for bit, numbers to rounding'
  words = f'survived: the same {held}' if verdict else 'FAILED: the runs are not the same'
  console.print(Text(words, 'bold green' if verdict else 'bold red'))


def write(
  path: pathlib.Path,
  *,
  config_text: str,
  arguments: Mapping[str, Any],
  moments: Sequence[Moment],
  shapes: Sequence[object],
  aspects: Sequence[Aspect],
  control: Mapping[str, Any],
  verdict: bool,
  more: Mapping[str, Any],
) -> dict[str, Any]:
  """Writes the proof as JSON; returns it."""
  plain = lambda moment: (
    dataclasses.asdict(moment)
    | {
      'signal': moment.signal_name,
      'steps_lost': moment.lost,
    }
  )
  proof = {
    'verdict': 'survived' if verdict else 'failed',
    'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    'git_commit': git_commit(),
    'configuration_sha256': hashlib.sha256(config_text.encode()).hexdigest(),
    'twin': {name: repr(arguments[name]) for name in ('run', 'model', 'optimizer', 'data')},
    'packages': package_versions(),
    'shapes': [str(shape) for shape in shapes],
    'kills': [plain(moment) for moment in moments],
    'compared': [dataclasses.asdict(aspect) | {'same': aspect.same} for aspect in aspects],
    'control': dict(control),
  }
  proof |= more
  write_whole(path, json.dumps(proof, indent=1).encode())
  return proof

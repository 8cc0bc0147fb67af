"""What a terminal shows of an evaluation: a bar, a line for each task, the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from openmoe.evaluation import results
from openmoe.observe.text import visible


class TerminalDisplay:
  """A bar for the task at hand, and one line for each that is done."""

  def __init__(self, console: Console, tasks: int):
    columns = (
      TextColumn('{task.description}', markup=False),
      BarColumn(),
      MofNCompleteColumn(),
      TimeRemainingColumn(),
    )
    self._console, self._tasks, self._done = console, tasks, 0
    self._progress = Progress(*columns, console=console, transient=True)
    self._bar = None

  def __enter__(self) -> TerminalDisplay:
    self._progress.start()
    return self

  def __exit__(self, *exc) -> None:
    self._progress.stop()

  def begin(self, task: str, items: int) -> None:
    self._bar = self._progress.add_task(visible(short_name(task)), total=items)

  def advance(self, items: int) -> None:
    self._progress.advance(self._bar, items)

  def end(self, result: Mapping[str, Any], resumed: bool) -> None:
    if self._bar is not None:
      self._progress.remove_task(self._bar)
      self._bar = None
    self._done += 1
    figure = result['metrics'][result['metric']]
    notes = ['from an earlier run'] if resumed else []
    if result['lost_shots']:
      notes.append(f'{result["lost_shots"]} of {result["count"]} prompts lost shots')
    if result['cut_prompts']:
      notes.append(f'{result["cut_prompts"]} prompts were cut')
    line = (
      f'[{self._done}/{self._tasks}] {short_name(result["task"])}  {result["metric"]} '
      f'{figure["value"]:.4f}  {result["count"]} items'
    )
    told = visible('  '.join([line, *notes]))
    self._console.print(told, markup=False, highlight=False, soft_wrap=True)


def short_name(task: str) -> str:
  """Without the parts that are alike in all names of BIG-bench's seqio tasks."""
  for part in ('bigbench:', '.t5_default_vocab', '.all_examples'):
    task = task.replace(part, '')
  return task


def table(rows: Sequence[results.Row], title: str, wide: bool) -> Table:
  """The summary as a person reads it; a wide one also names metrics and what was dropped."""
  found = Table(title=title, title_justify='left', box=box.SIMPLE_HEAD)
  found.add_column('task', no_wrap=True)
  if wide:
    found.add_column('metric', no_wrap=True)
  names = ['score', 'normalised', '95 %', *(['items', 'shots', 'dropped'] if wide else ())]
  for name in names:
    found.add_column(name, justify='right', no_wrap=True)
  for row in rows:
    average = row.metric == 'normalised'
    if average:
      found.add_section()
    cells = [
      '' if average else f'{row.score:.4f}',
      f'{row.normalised:.2f}',
      '{:.1f} to {:.1f}'.format(*row.normalised95),
    ]
    more = [str(row.items), str(row.shots), f'{row.dropped:.1%}']
    group = Text(visible(row.group))
    found.add_row(group, *([row.metric] if wide else ()), *cells, *(more if wide else ()))
  return found

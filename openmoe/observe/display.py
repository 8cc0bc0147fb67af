"""Progress of a run as a person sees it: a live panel on a terminal, plain lines anywhere else.

Only shows; what is computed and recorded is the business of metrics.py.
"""

from __future__ import annotations

import dataclasses
import io
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text

_BARS = '▁▂▃▄▅▆▇█'
_HISTORY = 48  # losses in the sparkline


@dataclasses.dataclass(frozen=True)
class Progress:
  """What there is to show.

  Attributes:
    step, total_steps: optimizer steps done, and of the whole run.
    scalars: of the last training record.
    validation: (step, scalars) of the last evaluation.
    expert_load: [l, e] shares of the routed pairs; None for a dense model.
    dead: bool [l, e], which experts count as dead; None with expert_load.
    sparse_layers: index of each of the l layers.
    eta: seconds left, None while unknown.
  """

  step: int
  total_steps: int
  scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
  validation: tuple[int, Mapping[str, float]] | None = None
  expert_load: np.ndarray | None = None
  dead: np.ndarray | None = None
  sparse_layers: tuple[int, ...] = ()
  eta: float | None = None


def duration(seconds: float | None) -> str:
  """Seconds as 4s, 3:07, 2:05:09 or 3d 04:10.

  >>> [duration(s) for s in (4, 187, 7509, 274200)]
  ['4s', '3:07', '2:05:09', '3d 04:10']
  """
  if seconds is None or not math.isfinite(seconds):
    return '-'
  seconds = round(seconds)
  minutes, s = divmod(seconds, 60)
  hours, m = divmod(minutes, 60)
  days, h = divmod(hours, 24)
  if days:
    return f'{days}d {h:02d}:{m:02d}'
  if hours:
    return f'{h}:{m:02d}:{s:02d}'
  return f'{m}:{s:02d}' if minutes else f'{s}s'


def quantity(value: float) -> str:
  """A number with three figures and a prefix.

  >>> [quantity(v) for v in (7.1234, 812, 45678, 1.2e9, 3.9e14)]
  ['7.12', '812', '45.7k', '1.20G', '390T']
  """
  if not math.isfinite(value):
    return str(value)
  power = min(5, max(0, int(math.log10(max(abs(value), 1.0)) // 3)))
  scaled = value / 1000**power
  digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
  return f'{scaled:.{digits}f}{["", "k", "M", "G", "T", "P"][power]}'


def speed(scalars: Mapping[str, float]) -> tuple[str, str]:
  """(name, value) of the utilisation: MFU where the peak is known, else model FLOP/s."""
  if 'mfu' in scalars:
    return 'MFU', f'{scalars["mfu"]:.1%}'
  if 'model_flops_per_second' in scalars:
    return 'FLOP/s', quantity(scalars['model_flops_per_second'])
  return 'FLOP/s', '-'


def _value(scalars: Mapping[str, float], name: str, form) -> str:
  return form(scalars[name]) if name in scalars else '-'


def _dead(progress: Progress) -> str:
  return '-' if progress.dead is None else f'{progress.dead.sum()}/{progress.dead.size}'


def plain_line(progress: Progress) -> str:
  """One aligned line per record; every field is there in every line, '-' where unknown."""
  scalars = progress.scalars
  width = len(str(progress.total_steps))
  utilisation, used = speed(scalars)
  fields = [
    f'step {progress.step:>{width}}/{progress.total_steps}',
    f'loss {_value(scalars, "loss", "{:.4f}".format):>8}',
    f'lr {_value(scalars, "learning_rate", "{:.2e}".format):>8}',
    f'tokens/s {_value(scalars, "tokens_per_second", quantity):>5}',
    f'{utilisation} {used:>5}',
    f'dropped {_value(scalars, "dropped_fraction", "{:.1%}".format):>5}',
    f'dead {_dead(progress):>5}',
    f'ETA {duration(progress.eta):>7}',
  ]
  return '  '.join(fields)


def validation_line(progress: Progress) -> str:
  """The last evaluation, every scalar by name."""
  step, scalars = progress.validation
  values = '  '.join(f'{name} {value:.4f}' for name, value in scalars.items())
  return f'validation at step {step}:  {values}'


class Sheltered(io.TextIOBase):
  """A stream for people that may go away: a closed pipe or a full disk ends nothing.

  After the first failure nothing more is written. Characters that the stream's encoding lacks are
  replaced. None, which is what Python makes of a closed standard output, counts as gone.
  """

  def __init__(self, stream: TextIO | None):
    self._stream = stream

  @property
  def encoding(self) -> str:
    return getattr(self._stream, 'encoding', None) or 'utf-8'

  def isatty(self) -> bool:
    return self._tried(lambda stream: stream.isatty()) or False

  def fileno(self) -> int:
    if self._stream is None:
      raise OSError('The stream is gone.')
    return self._stream.fileno()

  def write(self, text: str) -> int:
    plain = text.encode(self.encoding, 'replace').decode(self.encoding)
    self._tried(lambda stream: stream.write(plain))
    return len(text)

  def flush(self) -> None:
    self._tried(lambda stream: stream.flush())

  def _tried(self, act: Callable[[TextIO], Any]) -> Any:
    try:
      return None if self._stream is None else act(self._stream)
    except (OSError, ValueError):  # ValueError: it was closed
      self._stream = None
      return None


class PlainDisplay:
  """Lines of text, for pipes and log files."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def note(self, text: str) -> None:
    print(text, file=self._stream, flush=True)

  def train(self, progress: Progress) -> None:
    self.note(plain_line(progress))

  def validation(self, progress: Progress) -> None:
    self.note(validation_line(progress))

  def close(self) -> None:
    self._stream.flush()


def sparkline(values) -> str:
  """A row of bars, the largest value the highest; values that are not finite are '!'.

  >>> sparkline([1.0, 2.0, 8.0])
  '▁▂█'
  """
  finite = [v for v in values if math.isfinite(v)]
  low, high = min(finite, default=0.0), max(finite, default=0.0)
  scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
  return ''.join(_BARS[round((v - low) * scale)] if math.isfinite(v) else '!' for v in values)


def load_colour(ratio: float) -> tuple[int, int, int]:
  """RGB of an expert's load over its uniform share: blue under 1, pale at 1, red over, on log2.

  Saturates at a quarter and at four times the uniform share.
  """
  x = max(-1.0, min(1.0, math.log2(max(ratio, 1e-9)) / 2))
  pale = (236, 233, 228)
  end = (33, 102, 172) if x < 0 else (178, 24, 43)
  return tuple(round(p + (e - p) * abs(x)) for p, e in zip(pale, end, strict=True))


def heat_strip(progress: Progress, width: int) -> Table:
  """One row of coloured cells a layer, one cell an expert; a dead expert is a cross.

  Args:
    progress: with expert_load and dead [l, e]; rows are labelled by sparse_layers, or from 0.
    width: columns there are for the cells; a row that needs more is broken.
  """
  layers, experts = progress.expert_load.shape
  cell = next((c for c in (3, 2) if c * experts <= width), 1)
  table = Table.grid(padding=(0, 2))
  for row in range(layers):
    ratios = progress.expert_load[row] * experts
    strip = Text(overflow='fold')
    for ratio, dead in zip(ratios, progress.dead[row], strict=True):
      style = Style(color='black', bgcolor='rgb({},{},{})'.format(*load_colour(ratio)))
      strip.append(('×' if dead else ' ').center(cell), style)
    label = progress.sparse_layers[row] if row < len(progress.sparse_layers) else row
    table.add_row(f'layer {label}', strip, f'{ratios.min():.2f} to {ratios.max():.2f}')
  return table


class LiveDisplay:
  """A panel that is redrawn in place at the bottom of the terminal; notes scroll above it."""

  def __init__(self, console: Console):
    self._console = console
    self._losses: deque[float] = deque(maxlen=_HISTORY)
    self._begin = time.monotonic()
    self._live = Live(console=console, refresh_per_second=4, transient=False)
    self._live.start()

  def note(self, text: str) -> None:
    self._console.print(text, markup=False, highlight=False)

  def train(self, progress: Progress) -> None:
    if 'loss' in progress.scalars:
      self._losses.append(progress.scalars['loss'])
    self._live.update(self.render(progress))

  def validation(self, progress: Progress) -> None:
    self.note(validation_line(progress))
    self._live.update(self.render(progress))

  def close(self) -> None:
    self._live.stop()

  def render(self, progress: Progress) -> Panel:
    """The panel: progress bar, figures, loss curve, load of every expert."""
    parts = [self._bar(progress), Text(), self._figures(progress)]
    if len(self._losses) > 1:
      parts += [Text(), Text.assemble(('loss  ', 'dim'), (sparkline(self._losses), 'cyan'))]
    if progress.expert_load is not None:
      width = max(16, self._console.width - 36)
      parts += [
        Text(),
        Text('load per expert, 1 = uniform; blue less, red more, × dead', 'dim'),
        heat_strip(progress, width),
      ]
    return Panel(Group(*parts), title='OpenMoE', border_style='dim', padding=(0, 1))

  def _bar(self, progress: Progress) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify='right')
    times = f'{duration(time.monotonic() - self._begin)} gone, {duration(progress.eta)} left'
    bar = ProgressBar(total=max(1, progress.total_steps), completed=progress.step)
    grid.add_row(f'step {progress.step}/{progress.total_steps}', bar, times)
    return grid

  def _figures(self, progress: Progress) -> Table:
    scalars = progress.scalars
    utilisation, used = speed(scalars)
    validation = '-'
    if progress.validation is not None:
      step, values = progress.validation
      validation = f'{values["loss"]:.4f} at {step}' if 'loss' in values else '-'
    alarm = 'bold red' if progress.dead is not None and progress.dead.any() else 'bold'
    figures = [
      ('loss', _value(scalars, 'loss', '{:.4f}'.format), 'bold'),
      ('validation', validation, 'bold'),
      ('learning rate', _value(scalars, 'learning_rate', '{:.2e}'.format), ''),
      ('tokens/s', _value(scalars, 'tokens_per_second', quantity), ''),
      (utilisation, used, ''),
      ('dropped', _value(scalars, 'dropped_fraction', '{:.1%}'.format), ''),
      ('dead experts', _dead(progress), alarm),
    ]
    grid = Table.grid(padding=(0, 3))
    for begin in range(0, len(figures), 4):
      grid.add_row(
        *(Text.assemble((f'{n} ', 'dim'), (v, style)) for n, v, style in figures[begin : begin + 4])
      )
    return grid


def make_display(stream: TextIO | None = None) -> PlainDisplay | LiveDisplay:
  """The live display where `stream` (standard output by default) is a terminal, else lines."""
  stream = Sheltered(stream or sys.stdout)
  console = Console(file=stream)
  # rich calls a dumb terminal a terminal; it cannot move the cursor.
  if console.is_terminal and not console.is_dumb_terminal:
    return LiveDisplay(console)
  return PlainDisplay(stream)

"""What an analysis shows: charts and tables as data, drawn for a page and for files.

A chart is its numbers: the CSV beside a picture is made of what the picture is drawn from. Every
chart says its estimator, what it divides by, and draws the level of chance where there is one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from openmoe.observe import page
from openmoe.observe.text import visible

# The light page's colours, for PNG and SVG files.
LIGHT = {
  page.INK: '#1d1d24', page.MUTED: '#6a6a76', page.GRID: '#e4e4ea', page.PAPER: '#ffffff',
} | dict(zip(page.SERIES, (
  '#0072b2', '#d55e00', '#009e73', '#b5588a', '#3c96c8', '#b87d00', '#6b6b00', '#4a4a55',
), strict=True))  # fmt: skip
_DASHES = ('-', (0, (5, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)))
# Dark enough at one end and light enough at the other to be read on either paper.
_HEAT = colors.LinearSegmentedColormap.from_list('share', ['#f3f0ff', '#9d8ad1', '#3b1f6b'])
_SIGNED = colors.LinearSegmentedColormap.from_list('lift', ['#8c510a', '#f2efe9', '#01665e'])
_MOST_CELLS_WITH_NUMBERS = 150


@dataclasses.dataclass(frozen=True)
class Series:
  """A line, or the bars of one group.

  Attributes:
    label: in the legend.
    x, y: values; x may be texts for bars and radars.
    low, high: of the interval.
    counts: what each value is a share of.
    chance: drawn dashed and grey: what a null gives.
  """

  label: str
  x: Sequence[Any]
  y: np.ndarray
  low: np.ndarray | None = None
  high: np.ndarray | None = None
  counts: np.ndarray | None = None
  chance: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
  """One picture.

  Attributes:
    name: of its files.
    title: what is seen.
    kind: 'lines', 'bars', 'radar' or 'dots'.
    estimator: AS_PUBLISHED or AS_DEFINED.
    series: what is drawn.
    level: a line for chance or uniform, and what it is called.
    note: denominators, least counts, what was left out.
  """

  name: str
  title: str
  kind: str
  estimator: str
  x_label: str
  y_label: str
  series: tuple[Series, ...]
  level: tuple[float, str] | None = None
  note: str = ''
  percent: bool = False

  def rows(self) -> list[dict[str, Any]]:
    """For the CSV."""
    found = []
    for series in self.series:
      for i, x in enumerate(series.x):
        row = {'series': series.label, self.x_label or 'x': x, self.y_label: float(series.y[i])}
        if series.low is not None:
          row |= {'low': float(series.low[i]), 'high': float(series.high[i])}
        if series.counts is not None:
          row['count'] = float(series.counts[i])
        found.append(row)
    keys = dict.fromkeys(key for row in found for key in row)
    return [{key: row.get(key, '') for key in keys} | self._always() for row in found]

  def _always(self) -> dict[str, Any]:
    level = {} if self.level is None else {self.level[1]: self.level[0]}
    return level | {'estimator': self.estimator}


@dataclasses.dataclass(frozen=True)
class Heat:
  """A matrix in colours; see Chart."""

  name: str
  title: str
  estimator: str
  row_label: str
  column_label: str
  rows_: Sequence[Any]
  columns: Sequence[Any]
  values: np.ndarray
  value_label: str
  note: str = ''
  centre: float | None = None  # of a scale with two sides

  def rows(self) -> list[dict[str, Any]]:
    """For the CSV."""
    return [
      {self.row_label: r, f'{self.column_label}_': c, self.value_label: float(self.values[i, j]),
       'estimator': self.estimator}
      for i, r in enumerate(self.rows_) for j, c in enumerate(self.columns)
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of cells; texts in them may come from data."""

  name: str
  title: str
  estimator: str
  head: tuple[str, ...]
  cells: Sequence[Sequence[Any]]
  note: str = ''

  def rows(self) -> list[dict[str, Any]]:
    """For the CSV."""
    return [dict(zip(self.head, row, strict=True)) for row in self.cells]


@dataclasses.dataclass(frozen=True)
class Analysis:
  """One question about a record, and what answers it.

  Attributes:
    name: of its page.
    title: the question.
    means: what the figures say.
    means_not: what they do not.
    parts: charts and tables.
  """

  name: str
  title: str
  means: str
  means_not: str
  parts: tuple[Chart | Heat | Table, ...]


# --- drawing


def draw(chart: Chart | Heat, theme: Mapping[str, str] | None = None) -> Figure:
  """The figure, in the stand-ins of the page or in a theme's own colours."""
  paint = lambda colour: colour if theme is None else theme[colour]
  tall = isinstance(chart, Chart) and chart.kind == 'radar'
  size = (6.4, 5.2) if tall else (8.4, 3.9)
  if isinstance(chart, Heat):
    size = (8.4, min(9.0, max(2.6, 1.3 + 0.3 * len(chart.rows_))))
  figure = Figure(figsize=size, layout='constrained')
  axes = figure.add_subplot(projection='polar' if tall else None)
  if isinstance(chart, Heat):
    _draw_heat(axes, chart, paint)
  elif tall:
    _draw_radar(axes, chart, paint)
  else:
    _draw_plain(axes, chart, paint)
  for text in (axes.xaxis.label, axes.yaxis.label):
    text.set_color(paint(page.INK))
  for text in figure.findobj(Text):  # tokens may hold what looks like a formula
    text.set_parse_math(False)
    text.set_text(visible(text.get_text()))
  return figure


def _look(axes: Axes, paint) -> None:
  page.style(axes)
  for side in ('left', 'bottom'):
    axes.spines[side].set_color(paint(page.MUTED))
  axes.tick_params(color=paint(page.MUTED), labelcolor=paint(page.INK))
  axes.grid(axis='y', color=paint(page.GRID), lw=0.8)


def _style_of(i: int, series: Series, paint) -> dict[str, Any]:
  if series.chance:
    return {'color': paint(page.MUTED), 'ls': (0, (3, 2)), 'lw': 1.2}
  n = len(page.SERIES)
  return {'color': paint(page.SERIES[i % n]), 'ls': _DASHES[i // n % len(_DASHES)], 'lw': 1.6}


def _draw_plain(axes: Axes, chart: Chart, paint) -> None:
  _look(axes, paint)
  axes.set_xlabel(chart.x_label)
  axes.set_ylabel(chart.y_label)
  if chart.kind == 'bars':
    _draw_bars(axes, chart, paint)
  measured = [series for series in chart.series if not series.chance]
  told = False  # once in the legend, however many nulls there are
  for series in chart.series if chart.kind != 'bars' else ():
    style = _style_of(
      0 if series.chance else next(i for i, s in enumerate(measured) if s is series), series, paint
    )
    label = series.label
    if series.chance and 'shuffled' in label:
      label, told = None if told else 'shuffled', True
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    if chart.kind == 'dots':
      axes.plot(x, y, '.', ms=3.5, color=style['color'], label=label)
      continue
    if series.low is not None:
      axes.fill_between(x, series.low, series.high, color=style['color'], alpha=0.16, lw=0)
    marker = 'o' if len(x) <= 24 and not series.chance else None
    axes.plot(x, y, marker=marker, ms=3.5, label=label, **style)
  if chart.level is not None:
    level, name = chart.level
    axes.axhline(level, color=paint(page.MUTED), lw=1.2, ls=(0, (3, 2)), label=name)
  if chart.percent:
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  if chart.kind == 'lines' and all(float(x).is_integer() for s in chart.series for x in s.x):
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  _legend(axes, paint)


def _draw_bars(axes: Axes, chart: Chart, paint) -> None:
  names = list(chart.series[0].x)
  shown = [s for s in chart.series if not s.chance]
  width = 0.84 / max(1, len(shown))
  place = np.arange(len(names))
  for i, series in enumerate(shown):
    colour = _style_of(i, series, paint)['color']
    x = place + (i - (len(shown) - 1) / 2) * width
    axes.bar(x, series.y, width * 0.92, color=colour, label=series.label)
    if series.low is not None:
      bars = np.stack([series.y - series.low, series.high - series.y])
      error = {'color': paint(page.INK), 'lw': 0.9}
      axes.errorbar(x, series.y, yerr=np.maximum(bars, 0), fmt='none', **error)
  for series in (s for s in chart.series if s.chance):
    axes.plot(place, series.y, '_', ms=14, color=paint(page.MUTED), label=series.label)
  step = max(1, math.ceil(len(names) / 32))
  axes.set_xticks(place[::step], [str(name) for name in names[::step]])
  if max(len(str(name)) for name in names) > 3 and len(names) > 8:
    axes.tick_params(axis='x', labelrotation=60)


def _draw_radar(axes: Axes, chart: Chart, paint) -> None:
  """Spokes from three o'clock, counter-clockwise, as in the paper."""
  axes.set_facecolor('none')
  for i, series in enumerate(chart.series):
    angle = np.linspace(0, 2 * np.pi, len(series.x), endpoint=False)
    closed = lambda values: np.append(values, values[:1])
    style = _style_of(i, series, paint)
    axes.plot(closed(angle), closed(np.asarray(series.y)), label=series.label, **style)
    if not series.chance:
      axes.fill(angle, series.y, color=style['color'], alpha=0.08, lw=0)
  step = max(1, len(chart.series[0].x) // 32)
  names = [str(x) for x in chart.series[0].x][::step]
  axes.set_xticks(angle[::step], names)
  axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
  axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
  axes.tick_params(colors=paint(page.MUTED), labelsize=8)
  axes.tick_params(axis='x', labelcolor=paint(page.INK))
  axes.grid(color=paint(page.GRID), lw=0.8)
  axes.spines['polar'].set_color(paint(page.GRID))
  _legend(axes, paint, radar=True)


def _draw_heat(axes: Axes, chart: Heat, paint) -> None:
  values = np.asarray(chart.values, float)
  finite = values[np.isfinite(values)]
  low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
  if chart.centre is None:
    palette, norm = _HEAT, colors.Normalize(min(low, 0.0), max(high, 1e-9))
  else:
    reach = max(high - chart.centre, chart.centre - low, 1e-9)
    palette, norm = _SIGNED, colors.Normalize(chart.centre - reach, chart.centre + reach)
  picture = axes.imshow(np.ma.masked_invalid(values), cmap=palette, norm=norm, aspect='auto')
  axes.set_xlabel(chart.column_label)
  axes.set_ylabel(chart.row_label)
  for axis, names in ((axes.xaxis, chart.columns), (axes.yaxis, chart.rows_)):
    step = max(1, math.ceil(len(names) / 32))
    axis.set_ticks(range(0, len(names), step), [str(n) for n in names[::step]])
  axes.tick_params(color=paint(page.MUTED), labelcolor=paint(page.INK), labelsize=9)
  if max((len(str(n)) for n in chart.columns), default=0) > 4:
    axes.tick_params(axis='x', labelrotation=45)
  for spine in axes.spines.values():
    spine.set_visible(False)
  if values.size <= _MOST_CELLS_WITH_NUMBERS:
    for (i, j), value in np.ndenumerate(values):
      if np.isfinite(value):
        r, g, b, _ = palette(norm(value))
        ink = '#ffffff' if 0.3 * r + 0.59 * g + 0.11 * b < 0.55 else '#1d1d24'
        axes.text(j, i, f'{value:.2g}', ha='center', va='center', fontsize=8, color=ink)
  bar = axes.figure.colorbar(picture, ax=axes, pad=0.015, aspect=30)
  bar.set_label(chart.value_label, color=paint(page.INK))
  bar.ax.tick_params(color=paint(page.MUTED), labelcolor=paint(page.INK), labelsize=8)
  bar.outline.set_visible(False)


def _legend(axes: Axes, paint, radar: bool = False) -> None:
  handles, labels = axes.get_legend_handles_labels()
  if not labels:
    return
  few = len(labels) <= 8
  options = {'frameon': False, 'fontsize': 8.5, 'labelcolor': paint(page.INK)}
  where = {'loc': 'outside right upper'} if radar or not few else {'loc': 'outside upper left'}
  columns = 1 if radar or not few else min(4, len(labels))
  axes.figure.legend(handles, labels, ncols=columns, **where, **options)

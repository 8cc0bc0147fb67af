"""Figures that compare models: score over training cost, bars per task, curves of several runs.

Each function draws one figure and returns it with the table of what it shows; write() puts both
beside each other as SVG, PNG and CSV. Nothing is computed here that is not in that table.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib import colormaps, patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from openmoe.checkpoint.paths import write_whole
from openmoe.config import ConfigError
from openmoe.evaluation import results
from openmoe.observe.metrics import read_records
from openmoe.observe.pictures import smooth

_INK, _MUTED, _GRID, _OURS, _TOTAL = '#2b2b33', '#8a8a94', '#ececf0', '#d62728', '#d9d9de'
_AREA = 20.0  # square points of a dot per billion parameters
_LEAST_AREA = 8.0
_PUBLISHED = (
  'family',
  'model',
  'activated_billions',
  'total_billions',
  'tokens_billions',
  'benchmark',
  'score',
  'source',
)
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Point:
  """A model's score and what its training cost.

  Attributes:
    family: models of one family are joined by a line.
    model: its label.
    activated, total: parameters in billions.
    tokens: trained on, in billions.
    score: of the benchmark.
    source: where the figures are from.
    ours: drawn in red.
  """

  family: str
  model: str
  activated: float
  total: float
  tokens: float
  score: float
  source: str = ''
  ours: bool = False

  @property
  def cost(self) -> float:
    """Activated parameters times tokens, in units of 1e21.

    >>> Point('OpenMoE', '8B', activated=2, total=8, tokens=1100, score=32.7).cost
    2.2
    """
    return self.activated * self.tokens / 1000


def read_published(path: str | os.PathLike) -> dict[str, list[Point]]:
  """Published figures by benchmark.

  Raises:
    ConfigError: the file is not there or a line does not read.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f'{path} is not there; docs/published_results.csv holds the known figures.')
  found: dict[str, list[Point]] = {}
  with path.open(encoding='utf-8-sig', newline='') as file:
    try:
      reader = csv.DictReader(file)
      columns, lines = tuple(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
      raise ConfigError(f'{path} is no CSV in UTF-8 ({error}); save it as such.') from error
    if columns != _PUBLISHED:
      raise ConfigError(f'{path} must have the columns {", ".join(_PUBLISHED)}.')
    for number, row in enumerate(lines, start=2):
      try:
        numbers = [float(row[name]) for name in (*_PUBLISHED[2:5], 'score')]
      except (TypeError, ValueError) as error:
        raise ConfigError(f'{path} line {number} does not read: {error}.') from error
      point = Point(row['family'], row['model'], *numbers, source=row['source'])
      ours = row['family'] in ('OpenMoE', 'JetMoE')
      found.setdefault(row['benchmark'], []).append(dataclasses.replace(point, ours=ours))
  return found


def write(figure: Figure, rows: Rows, path: str | os.PathLike) -> list[str]:
  """Writes path.svg, path.png and path.csv; returns their names."""
  base = epath.Path(path)
  base.parent.mkdir(parents=True, exist_ok=True)
  names = []
  for kind in ('svg', 'png'):
    buffer = io.BytesIO()
    # A date or random ids in the file would make equal figures differ.
    metadata = {'Date': None} if kind == 'svg' else None
    figure.savefig(buffer, format=kind, dpi=150, facecolor='white', metadata=metadata)
    names.append(f'{base}.{kind}')
    write_whole(epath.Path(names[-1]), buffer.getvalue())
  return [*names, write_csv(rows, path)]


def write_csv(rows: Rows, path: str | os.PathLike) -> str:
  """Writes path.csv; returns its name."""
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  name = f'{epath.Path(path)}.csv'
  write_whole(epath.Path(name), text.getvalue().encode())
  return name


def _style(axes: Axes, title: str) -> None:
  axes.set_title(title, loc='left', color=_INK, fontsize=12)
  for side in ('top', 'right'):
    axes.spines[side].set_visible(False)
  for side in ('left', 'bottom'):
    axes.spines[side].set_color(_MUTED)
  axes.tick_params(colors=_INK, labelsize=9, color=_MUTED)
  axes.grid(color=_GRID, lw=0.8)
  axes.set_axisbelow(True)


# --- score over cost


def cost_figure(points: Sequence[Point], benchmark: str, ylabel: str) -> tuple[Figure, Rows]:
  """Score over relative cost: dots as large as activated parameters, light grey as large as total.

  Args:
    points: at least one.
    benchmark: of the title.
    ylabel: name and unit of the score.
  """
  figure = Figure(figsize=(10, 6), layout='constrained')
  axes = figure.subplots()
  families = list(dict.fromkeys(point.family for point in points))
  palette = colormaps['viridis'](np.linspace(0.0, 0.9, max(2, len(families))))
  for family, shade in zip(families, palette, strict=False):
    members = sorted((p for p in points if p.family == family), key=lambda p: p.cost)
    colour = _OURS if members[0].ours else shade
    x, y = [p.cost for p in members], [p.score for p in members]
    front = 5 if members[0].ours else 3
    axes.plot(x, y, ls='--', lw=1, color=colour, zorder=front - 1)
    areas = lambda values: [max(_LEAST_AREA, _AREA * value) for value in values]
    axes.scatter(x, y, s=areas([p.total for p in members]), color=_TOTAL, zorder=1)
    axes.scatter(
      x, y, s=areas([p.activated for p in members]), color=colour, zorder=front, ec='white', lw=0.6
    )
  axes.set_xscale('log')
  axes.margins(x=0.12, y=0.15)
  axes.set_xlabel('relative cost: activated parameters x tokens (1e21)', color=_INK)
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  axes.set_ylabel(ylabel, color=_INK)
  _style(axes, f'{benchmark}: score over cost of training')
  note = 'dot: activated parameters; light grey: total'
  axes.text(0.99, 0.02, note, transform=axes.transAxes, ha='right', color=_MUTED, fontsize=9)
  _label(figure, axes, points)
  names = ('family', 'model', 'activated', 'total', 'tokens', 'cost', 'score', 'source')
  return figure, [{name: getattr(point, name) for name in names} for point in points]


# Where a label may stand, from its dot, in multiples of the dot's radius and the label's size.
_PLACES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 2), (0, -2))


def _label(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
  """Names beside dots, each at the first place where it covers neither a dot nor another name."""
  canvas = FigureCanvasAgg(figure)
  figure.draw_without_rendering()
  renderer = canvas.get_renderer()
  scale = figure.dpi / 72
  halo = [patheffects.withStroke(linewidth=2, foreground='white')]
  taken = []  # boxes in pixels
  for point in points:
    x, y = axes.transData.transform((point.cost, point.score))
    r = scale * np.sqrt(max(_LEAST_AREA, _AREA * point.activated) / np.pi)
    taken.append((x - r, y - r, x + r, y + r))
  for index, point in enumerate(points):
    text = axes.annotate(point.model, (0, 0), fontsize=7.5, zorder=9, annotation_clip=False)
    text.set_color(_OURS if point.ours else _INK)
    box = text.get_window_extent(renderer)
    left, bottom, right, top = taken[index]
    x, y, w, h = (left + right) / 2, (bottom + top) / 2, box.width / 2, box.height / 2
    choices = []
    for across, up in _PLACES:
      cx = x + across * ((right - left) / 2 + w + 6)
      cy = y + up * ((top - bottom) / 2 + h + 4)
      place = (cx - w, cy - h, cx + w, cy + h)
      covered = sum(_overlap(place, other) for i, other in enumerate(taken) if i != index)
      choices.append((covered + _outside(place, axes), len(choices), place))
    _, _, place = min(choices)
    taken.append(place)
    text.remove()
    spot = axes.transAxes.inverted().transform(
      ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
    )
    colour = _OURS if point.ours else _INK
    axes.text(
      *spot, point.model, transform=axes.transAxes, ha='center', va='center', fontsize=7.5,
      color=colour, zorder=9, path_effects=halo,
    )  # fmt: skip


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
  width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
  return max(0.0, width) * max(0.0, height)


def _outside(place: Sequence[float], axes: Axes) -> float:
  frame = axes.get_window_extent()
  inside = _overlap(place, (frame.x0, frame.y0, frame.x1, frame.y1))
  return 10 * ((place[2] - place[0]) * (place[3] - place[1]) - inside)


# --- bars per task


def bars_figure(found: Mapping[str, Sequence[results.Row]]) -> tuple[Figure, Rows]:
  """Normalised score of every task, a bar per model, with 95 % intervals.

  Args:
    found: rows of a summary.json by model.
  """
  tasks = list(dict.fromkeys(row.group for rows in found.values() for row in rows))
  figure = Figure(figsize=(9, 1.6 + 0.24 * len(tasks) * (len(found) + 0.6)), layout='constrained')
  axes = figure.subplots()
  palette = colormaps['viridis'](np.linspace(0.1, 0.8, max(2, len(found))))
  thick = 0.8 / len(found)
  table = []
  for k, (model, rows) in enumerate(found.items()):
    rows = [row for task in tasks for row in rows if row.group == task]
    y = np.array([tasks.index(row.group) for row in rows]) - 0.4 + thick * (k + 0.5)
    score = np.array([row.normalised for row in rows])
    low, high = (np.array([row.normalised95[i] for row in rows]) for i in (0, 1))
    error = np.clip([score - low, high - score], 0, None)
    axes.barh(y, score, thick, color=palette[k], label=model, xerr=error, ecolor=_MUTED, capsize=2)
    table += [
      {
        'model': model,
        **{
          name: getattr(row, name)
          for name in ('group', 'metric', 'score', 'normalised', 'items', 'shots')
        },
        'low95': row.normalised95[0],
        'high95': row.normalised95[1],
      }
      for row in rows
    ]
  axes.axvline(0, color=_INK, lw=1)
  axes.set_yticks(range(len(tasks)), tasks)
  axes.set_ylim(len(tasks) - 0.4, -0.6)
  axes.set_xlabel('normalised score: 0 is guessing, 100 perfect; lines are 95 % intervals')
  _style(axes, 'Score of every task')
  axes.legend(frameon=False, labelcolor=_INK, fontsize=9, loc='best')
  return figure, table


# --- training curves


def curves_figure(runs: Mapping[str, str | os.PathLike]) -> tuple[Figure, Rows]:
  """Training and validation loss of several runs over tokens.

  Args:
    runs: run directories by label.

  Raises:
    ConfigError: a directory has no training records.
  """
  figure = Figure(figsize=(9, 5.5), layout='constrained')
  axes = figure.subplots()
  palette = colormaps['viridis'](np.linspace(0.0, 0.85, max(2, len(runs))))
  table, lowest, highest = [], np.inf, -np.inf
  for (name, directory), colour in zip(runs.items(), palette, strict=False):
    train = _losses(directory, 'train')
    if not len(train):
      raise ConfigError(f'{directory} has no training records; is it a run directory?')
    tokens_per_step = train[-1, 1] / train[-1, 0]
    smoothed = smooth(train[:, 2], max(1, len(train) // 50) | 1)
    axes.plot(train[:, 1], train[:, 2], color=colour, alpha=0.2, lw=0.8)
    axes.plot(train[:, 1], smoothed, color=colour, lw=1.8, label=f'{name}  {smoothed[-1]:.3f}')
    lowest, highest = min(lowest, smoothed.min()), max(highest, np.percentile(smoothed, 95))
    rows = [('train', *row) for row in zip(train[:, 0], train[:, 1], train[:, 2], strict=True)]
    checked = _losses(directory, 'validation', tokens_per_step)
    if len(checked):
      label = f'{name}, validation  {checked[-1, 2]:.3f}'
      axes.plot(checked[:, 1], checked[:, 2], color=colour, ls=':', marker='o', ms=4, label=label)
      lowest, highest = min(lowest, checked[:, 2].min()), max(highest, checked[-1, 2])
      rows += [('validation', *row) for row in checked.tolist()]
    table += [
      {'run': name, 'kind': kind, 'step': int(step), 'tokens': int(tokens), 'loss': float(loss)}
      for kind, step, tokens, loss in rows
    ]
  margin = 0.08 * max(highest - lowest, 1e-3)
  axes.set_ylim(lowest - margin, highest + margin)
  axes.set_xlabel('tokens', color=_INK)
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axes.set_ylabel('loss (nats per target token)', color=_INK)
  axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
  _style(axes, 'Training')
  return figure, table


def _losses(
  directory: str | os.PathLike, kind: str, tokens_per_step: float | None = None
) -> np.ndarray:
  """float64 [n, 3] of step, tokens and loss."""
  rows = []
  for record in read_records(directory, kind):
    if 'loss' in record and np.isfinite(record['loss']):
      tokens = record.get('tokens_seen', record['step'] * (tokens_per_step or 1))
      rows.append((record['step'], tokens, record['loss']))
  return np.array(rows, float).reshape(-1, 3)

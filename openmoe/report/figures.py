"""The figures of a report, in the colours of the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmoe.observe.goodput import PARTS
from openmoe.observe.page import GRID, INK, MUTED, PAPER, SERIES, style
from openmoe.observe.pictures import smooth, tick
from openmoe.report.facts import Run

_POINTS = 800  # most of a line; more are averaged
_NAME = 28  # characters of a name in a figure


def short(name: str, length: int = _NAME) -> str:
  """A name that fits, with its end, which is what differs."""
  return name if len(name) <= length else f'…{name[1 - length :]}'


def thinned(xy: np.ndarray) -> np.ndarray:
  """At most _POINTS rows, means of neighbours; rows that are not finite are left out."""
  xy = xy[np.isfinite(xy).all(axis=1)]
  if len(xy) <= _POINTS:
    return xy
  return np.stack([piece.mean(axis=0) for piece in np.array_split(xy, _POINTS)])


class Tokens:
  """Steps of a run as tokens, where its records know them."""

  def __init__(self, run: Run):
    self._known = run.column('step', 'tokens_seen')
    self.label = 'tokens' if len(self._known) else 'optimizer step'

  def __call__(self, steps) -> np.ndarray:
    steps = np.asarray(steps, float)
    if not len(self._known):
      return steps
    x, y = np.vstack([[0.0, 0.0], self._known]).T
    last = y[-1] / max(x[-1], 1.0)
    return np.where(steps <= x[-1], np.interp(steps, x, y), y[-1] + (steps - x[-1]) * last)


def _axis(axes: Axes, label: str) -> None:
  style(axes)
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: tick(x)))
  axes.set_xlabel(label, color=INK)
  axes.margins(x=0.01)
  axes.set_xlim(left=0)


def loss(runs: Sequence[Run]) -> Figure:
  """Training and validation loss by tokens; stages and restarts where it is one run."""
  figure = Figure(figsize=(10, 4.6), layout='constrained')
  axes = figure.subplots()
  shown, one = [], len(runs) == 1
  for run, colour in zip(runs, _colours(len(runs)), strict=True):
    tokens = Tokens(run)
    train, checked = (
      thinned(run.column('step', 'loss')),
      run.column('step', 'loss', of='validation'),
    )
    checked = checked[np.isfinite(checked).all(axis=1)]
    if len(train):
      curve = smooth(train[:, 1], max(1, len(train) // 50) | 1)
      marker = {'marker': 'o', 'ms': 4} if len(train) == 1 else {}
      axes.plot(tokens(train[:, 0]), train[:, 1], color=colour, alpha=0.25, lw=0.8)
      name = 'training' if one else short(run.name)
      axes.plot(
        tokens(train[:, 0]), curve, color=colour, lw=1.8, label=f'{name}  {curve[-1]:.3f}', **marker
      )
      shown += [np.percentile(train[:, 1], 98), train[:, 1].min(), curve[-1]]
    if len(checked):
      label = f'validation  {checked[-1, 1]:.3f}' if one else None
      ring = SERIES[1] if one else colour
      axes.plot(
        tokens(checked[:, 0]), checked[:, 1], color=ring, lw=1.2, marker='o', ms=5, mec=PAPER,
        label=label, ls='-' if one else (0, (4, 2)),
      )  # fmt: skip
      shown += [checked[-1, 1], checked[:, 1].min()]
  if shown:  # the first losses of a run would press everything after them into a line
    low, high = min(shown), max(shown)
    margin = 0.08 * max(high - low, 0.1 * abs(high), 1e-3)
    axes.set_ylim(low - margin, high + margin)
  _axis(axes, Tokens(runs[0]).label)
  axes.set_ylabel('loss (nats per target token)', color=INK)
  if one:
    _unigram(axes, runs[0])
    _stages(axes, runs[0])
    _restarts(axes, runs[0])
  if axes.get_legend_handles_labels()[0]:
    axes.legend(frameon=False, labelcolor=INK, fontsize=10, loc='upper right')
  return figure


def _colours(count: int) -> list[str]:
  return [SERIES[number % len(SERIES)] for number in range(count)]


def _unigram(axes: Axes, run: Run) -> None:
  level = run.column('unigram_entropy', of='validation')
  if len(level) and axes.get_ylim()[0] < level[-1, 0] < axes.get_ylim()[1]:
    label = f'unigram entropy  {level[-1, 0]:.3f}'
    axes.axhline(level[-1, 0], color=SERIES[2], lw=1.2, ls=(0, (5, 3)), label=label)


def _stages(axes: Axes, run: Run) -> None:
  """A band and a name for each stage that has begun, where there are several."""
  stages, tokens = run.stages, Tokens(run)
  last = run.train[-1]['step']
  if len(stages) < 2:
    return
  for number, (name, begin, end) in enumerate(stages):
    if begin >= last:
      break
    left, right = tokens(begin), tokens(min(end, last))
    if number % 2:
      axes.axvspan(left, right, color=GRID, alpha=0.6, lw=0)
    axes.text(
      (left + right) / 2, 1.01, short(name), transform=axes.get_xaxis_transform(), ha='center',
      va='bottom', color=MUTED, fontsize=9,
    )  # fmt: skip


def _restarts(axes: Axes, run: Run) -> None:
  tokens = Tokens(run)
  steps = [start.first for start in run.goodput.starts[1:]]
  label = f'{len(steps)} restart{"s" if len(steps) > 1 else ""}'
  for step in dict.fromkeys(steps):
    axes.axvline(tokens(step), ymax=0.04, color=MUTED, lw=1.5, label=label)
    label = None


_BALANCE = (
  (
    'load of the experts over a uniform share',
    (
      ('expert_load_max', 'largest'),
      ('expert_load_p90', '90 % of them'),
      ('expert_load_p10', '10 %'),
      ('expert_load_min', 'smallest'),
    ),
  ),
  (
    'dropped share of the choices',
    (
      ('late_dropped_fraction', 'last quarter of the rows'),
      ('dropped_fraction', 'all'),
      ('avoidable_drops', 'beside empty slots'),
    ),
  ),
  (
    'routers',
    (
      ('router_logsumexp', 'logsumexp of the logits'),
      ('effective_experts', 'exp(entropy of the load) / E'),
    ),
  ),
)


def balance(run: Run) -> Figure | None:
  """Load, drops and router logits by tokens; None where nothing of it was recorded."""
  known = [
    (title, [(n, label) for n, label in lines if len(run.column(n))]) for title, lines in _BALANCE
  ]
  known = [(title, lines) for title, lines in known if lines]
  if not known:
    return None
  figure = Figure(figsize=(10, 3.4), layout='constrained')
  tokens = Tokens(run)
  for axes, (title, lines) in zip(np.ravel(figure.subplots(1, len(known))), known, strict=True):
    for (name, label), colour in zip(lines, SERIES, strict=False):
      xy = thinned(run.column('step', name))
      marker = 'o' if len(xy) == 1 else None
      axes.plot(tokens(xy[:, 0]), xy[:, 1], color=colour, lw=1.3, label=label, marker=marker, ms=4)
    axes.set_title(title, fontsize=10, loc='left')
    axes.set_ylim(bottom=0, top=1.35 * axes.get_ylim()[1])
    _axis(axes, tokens.label)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.legend(frameon=False, labelcolor=INK, fontsize=8.5, loc='upper right')
  return figure


def wall_time(runs: Sequence[Run]) -> Figure | None:
  """One bar a run: what its wall time went to; None where no timeline is there."""
  known = [run for run in runs if run.goodput.wall > 0]
  if not known:
    return None
  figure = Figure(figsize=(10, 1.25 + 0.42 * len(known)), layout='constrained')
  axes = figure.subplots()
  left = np.zeros(len(known))
  rows = np.arange(len(known))
  for number, (part, label) in enumerate(PARTS.items()):
    share = np.array([run.goodput.seconds[part] / run.goodput.wall for run in known])
    if share.max() < 0.0005:
      left += share
      continue
    colour, faint = SERIES[number % len(SERIES)], number >= len(SERIES)
    axes.barh(
      rows, share, left=left, color=colour, height=0.62, label=label.split(',')[0], ec=PAPER, lw=1,
      alpha=0.45 if faint else 1,
    )  # fmt: skip
    left += share
  style(axes)
  axes.grid(visible=False)
  axes.set_yticks(rows, [short(run.name) if len(runs) > 1 else '' for run in known])
  axes.invert_yaxis()
  axes.set_xlim(0, 1)
  axes.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
  axes.spines['left'].set_visible(False)
  axes.tick_params(axis='y', length=0)
  figure.legend(
    loc='outside lower center', ncols=4, frameon=False, labelcolor=INK, fontsize=9, handlelength=1
  )
  return figure

"""Pictures of a run, drawn from what metrics.py wrote: loss.png and experts.png.

Draws on figures of its own, without pyplot, so that it neither needs a screen nor changes anybody
else's settings. It reads a run directory and computes nothing that is not in there.
"""

from __future__ import annotations

import io
import math
import os

import numpy as np
from etils import epath
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmoe.checkpoint.paths import write_whole
from openmoe.observe.metrics import dead_experts, read_records, read_router

INK = '#2b2b33'
MUTED = '#8a8a94'
_TRAIN = '#2166ac'
_VALIDATION = '#d6604d'
_UNIGRAM = '#5b8c5a'
_COLUMNS = 800  # most steps drawn side by side; more are averaged, which a screen would do anyway
_RANGE = 4.0  # colours saturate at this multiple of the uniform share, and at its inverse


def plot_run(model_dir: str | os.PathLike) -> list[str]:
  """Draws the pictures of a run into its directory.

  Args:
    model_dir: run directory with metrics.jsonl, and router/ for a sparse model.

  Returns:
    Paths written: loss.png if there is a training record with a loss, experts.png if there is a
    router record.
  """
  directory = epath.Path(model_dir)
  figures = {}
  if any(np.isfinite(record.get('loss', np.nan)) for record in read_records(directory, 'train')):
    figures['loss.png'] = loss_figure(directory)
  router = read_router(directory)
  if router:
    saved = _column(read_records(directory, 'checkpoint'), 'step', 'router_saturation')
    figures['experts.png'] = experts_figure(router, saved)
  for name, figure in figures.items():
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=150, facecolor='white')
    write_whole(directory / name, buffer.getvalue())
  return [os.fspath(directory / name) for name in figures]


def _style(axes: Axes) -> None:
  for side in ('top', 'right'):
    axes.spines[side].set_visible(False)
  for side in ('left', 'bottom'):
    axes.spines[side].set_color(MUTED)
  axes.tick_params(colors=INK, labelsize=9, color=MUTED)
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: tick(x)))


def tick(value: float) -> str:
  """An axis label: 0, 500, 1.5k, 20k, 2M."""
  if abs(value) < 1000:
    return f'{value:g}'
  for size, prefix in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= size:
      return f'{value / size:g}{prefix}'
  raise AssertionError(value)


def _column(records: list[dict], *names: str) -> np.ndarray:
  """[records, names] of the records that have every name."""
  rows = [[r[n] for n in names] for r in records if all(n in r for n in names)]
  return np.array(rows, float).reshape(-1, len(names))


def smooth(values: np.ndarray, span: int) -> np.ndarray:
  """Mean over a centred window of `span` values, of those that exist near the ends."""
  total = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  begin = np.maximum(0, index - span // 2)
  end = np.minimum(len(values), index + span // 2 + 1)
  return (total[end] - total[begin]) / (end - begin)


# --- loss.png


def loss_figure(model_dir: epath.Path) -> Figure:
  """Training and validation loss over steps (below) and tokens (above), learning rate beneath."""
  train, validation = read_records(model_dir, 'train'), read_records(model_dir, 'validation')
  figure = Figure(figsize=(9, 6), layout='constrained')
  main, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
  loss = _column(train, 'step', 'loss')
  loss = loss[np.isfinite(loss[:, 1])]
  checked = _column(validation, 'step', 'loss')
  _draw_losses(main, loss, checked, _column(validation, 'step', 'unigram_entropy'))
  _token_axis(main, _column(train, 'step', 'tokens_seen'))
  speed = _column(train, 'step', 'learning_rate')
  rate.plot(speed[:, 0], speed[:, 1], color=INK, lw=1.3)
  rate.set_ylabel('learning rate', color=INK)
  rate.set_ylim(bottom=0)
  rate.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3))
  rate.set_xlabel('optimizer step', color=INK)
  for axes in (main, rate):
    axes.grid(axis='y', color='#ececf0', lw=0.8)
    axes.set_axisbelow(True)
    _style(axes)
  figure.align_ylabels()
  return figure


def _draw_losses(axes: Axes, loss: np.ndarray, validation: np.ndarray, unigram: np.ndarray) -> None:
  span = max(1, len(loss) // 50) | 1
  smoothed = smooth(loss[:, 1], span)
  axes.plot(loss[:, 0], loss[:, 1], color=_TRAIN, alpha=0.25, lw=0.8)
  axes.plot(loss[:, 0], smoothed, color=_TRAIN, lw=1.8, label=f'training  {smoothed[-1]:.3f}')
  ends = [smoothed[-1]]
  if len(validation):
    label = f'validation  {validation[-1, 1]:.3f}'
    axes.plot(
      *validation.T, color=_VALIDATION, lw=1.2, marker='o', ms=4.5, mec='white', label=label
    )
    ends.append(validation[-1, 1])
  if len(unigram):
    level = unigram[-1, 1]
    label = f'unigram entropy of the validation tokens  {level:.3f}'
    axes.axhline(level, color=_UNIGRAM, lw=1.2, ls=(0, (5, 3)), label=label)
    ends.append(level)
  # The first few losses of a run would press everything after them into a line.
  top = max(np.percentile(loss[:, 1], 98), *ends)
  bottom = min(loss[:, 1].min(), *ends)
  margin = 0.06 * max(top - bottom, 1e-3)
  axes.set_ylim(bottom - margin, top + margin)
  axes.set_ylabel('loss (nats per target token)', color=INK)
  axes.legend(frameon=False, labelcolor=INK, fontsize=10, loc='upper right')


def _token_axis(axes: Axes, tokens: np.ndarray) -> None:
  """A second axis above that counts tokens, where the records know them."""
  tokens = tokens[tokens[:, 0] > 0]
  if not len(tokens):
    return
  per_step = tokens[-1, 1] / tokens[-1, 0]
  above = axes.secondary_xaxis('top', functions=(lambda s: s * per_step, lambda t: t / per_step))
  above.set_xlabel('tokens', color=INK)
  above.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: tick(x)))
  above.tick_params(colors=INK, labelsize=9, color=MUTED)
  above.spines['top'].set_color(MUTED)


# --- experts.png


def _thin_out(router: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """At most _COLUMNS records, each the mean of a run of neighbours."""
  count = len(router['steps'])
  pieces = np.array_split(np.arange(count), min(count, _COLUMNS))
  return {k: np.stack([v[p].mean(axis=0) for p in pieces]) for k, v in router.items()}


def _edges(steps: np.ndarray) -> np.ndarray:
  """Borders of the columns of a heat map whose centres are `steps`."""
  if len(steps) == 1:
    return np.array([steps[0] - 0.5, steps[0] + 0.5])
  middles = (steps[1:] + steps[:-1]) / 2
  return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def experts_figure(router: dict[str, np.ndarray], saturation: np.ndarray | None = None) -> Figure:
  """Load of every expert over time, one heat map a sparse layer, what was dropped, and saturation.

  Args:
    router: as metrics.read_router returns it; 'layers' names the layers where it is there.
    saturation: [n, 2] steps, and the share of choices that are those of the checkpoint before;
      None or n = 0 for no such panel.
  """
  router = _thin_out(router)
  load_nle = router['expert_load']
  _, layers, experts = load_nle.shape
  names = router['layers'][-1].astype(int) if 'layers' in router else range(layers)
  columns = 1 if layers <= 3 else 2
  rows = math.ceil(layers / columns)
  height = min(2.2, max(1.3, 0.075 * experts))
  has_saturation = saturation is not None and len(saturation) > 0
  lines = [1.7] * (2 if has_saturation else 1)
  size = (4.6 + 4.2 * columns, 2.1 + sum(lines) + height * rows)
  figure = Figure(figsize=size, layout='constrained')
  figure.suptitle('Load of every expert relative to a uniform share', color=INK, fontsize=13)
  ratios = [height] * rows + lines
  grid = figure.add_gridspec(len(ratios), columns, height_ratios=ratios)
  maps = []
  for layer in range(layers):
    axes = figure.add_subplot(grid[layer % rows, layer // rows])
    picture = _draw_load(axes, router['steps'], load_nle[:, layer])
    axes.set_title(f'layer {names[layer]}', loc='left', fontsize=10, color=INK)
    if layer % rows != rows - 1 and layer != layers - 1:
      axes.tick_params(labelbottom=False)
    maps.append(axes)
  _colour_bar(figure, picture, maps)
  # Last, because the legend of its layers is below all panels.
  dropped = figure.add_subplot(grid[-1, :])
  _draw_dropped(dropped, router, names)
  if has_saturation:
    above = figure.add_subplot(grid[rows, :], sharex=dropped)
    _draw_saturation(above, saturation)
    above.tick_params(labelbottom=False)
  return figure


def _draw_load(axes: Axes, steps: np.ndarray, load_ne: np.ndarray):
  experts = load_ne.shape[1]
  ratio = np.ma.masked_array(load_ne * experts, mask=dead_experts(load_ne))
  palette = colors.LinearSegmentedColormap.from_list(
    'load', ['#08306b', '#2166ac', '#92c5de', '#f4f1ec', '#f4a582', '#b2182b', '#67001f']
  ).with_extremes(bad='black')
  norm = colors.LogNorm(1 / _RANGE, _RANGE)
  picture = axes.pcolormesh(
    _edges(steps), np.arange(experts + 1) - 0.5, ratio.T, cmap=palette, norm=norm, rasterized=True
  )
  axes.invert_yaxis()
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.set_ylabel('expert', color=INK)
  axes.yaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=[1, 2, 4, 5, 8, 10]))
  _style(axes)
  return picture


def _colour_bar(figure: Figure, picture, maps: list[Axes]) -> None:
  bar = figure.colorbar(
    picture, ax=maps, location='top', shrink=0.6, aspect=45, pad=0.015, extend='both'
  )
  bar.set_ticks([1 / 4, 1 / 2, 1, 2, 4], labels=['¼', '½', 'uniform', '2×', '4×'])
  bar.minorticks_off()
  bar.ax.tick_params(colors=INK, labelsize=9, color=MUTED)
  bar.outline.set_visible(False)
  bar.ax.text(
    1.06,
    0.5,
    'black: dead (under 1 %)',
    transform=bar.ax.transAxes,
    va='center',
    color=INK,
    fontsize=9,
  )


def _draw_dropped(axes: Axes, router: dict[str, np.ndarray], names) -> None:
  axes.set_title(
    'dropped: share of (token, choice) pairs without a slot', loc='left', fontsize=10, color=INK
  )
  axes.set_xlabel('optimizer step', color=INK)
  _style(axes)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.margins(x=0)
  if 'dropped_fraction' not in router:
    axes.text(0.5, 0.5, 'not recorded', transform=axes.transAxes, ha='center', color=MUTED)
    return
  dropped_nl = router['dropped_fraction']
  shades = colors.LinearSegmentedColormap.from_list('depth', ['#9ecae1', '#2166ac', '#3f1d63'])
  layers = dropped_nl.shape[1]
  for layer in range(layers):
    shade = shades(layer / max(1, layers - 1))
    label = f'layer {names[layer]}  {dropped_nl[-1, layer]:.1%}'
    look = {'color': shade, 'lw': 1.4, 'marker': 'o' if len(dropped_nl) == 1 else None}
    axes.plot(router['steps'], dropped_nl[:, layer], label=label, **look)
  axes.set_ylim(0, max(0.01, 1.08 * dropped_nl.max()))
  axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
  axes.grid(axis='y', color='#ececf0', lw=0.8)
  axes.figure.legend(
    loc='outside lower center', ncols=min(layers, 4), frameon=False, labelcolor=INK, fontsize=9
  )


def _draw_saturation(axes: Axes, saturation: np.ndarray) -> None:
  title = f'saturation: choices that are those of the checkpoint before  {saturation[-1, 1]:.1%}'
  axes.set_title(title, loc='left', fontsize=10, color=INK)
  _style(axes)
  axes.plot(saturation[:, 0], saturation[:, 1], color=_TRAIN, lw=1.4, marker='o', ms=3)
  axes.margins(x=0)
  axes.set_ylim(0, 1.05)
  axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
  axes.grid(axis='y', color='#ececf0', lw=0.8)

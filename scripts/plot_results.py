"""Draws results: python -m scripts.plot_results [cost|bars|curves] ... --out DIR

  python -m scripts.plot_results cost --out figures
      published models: score over training cost, a figure per benchmark
  python -m scripts.plot_results cost --benchmark triviaqa --out figures \\
    --add 'OpenMoE:ours-8B:2:8:1100:runs/8b/eval'
      with a model of yours: family, label, activated, total and tokens in billions, and its score
      or the directory of its evaluation
  python -m scripts.plot_results bars runs/a/eval runs/b/eval --out figures
  python -m scripts.plot_results curves runs/a runs/b --out figures

Each figure is NAME.svg, NAME.png and, with all that is drawn, NAME.csv.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import difflib
import pathlib
import sys

from openmoe.config import ConfigError
from openmoe.evaluation import figures, points

_PUBLISHED = pathlib.Path(__file__).resolve().parent.parent / 'docs' / 'published_results.csv'


def draw_cost(args: argparse.Namespace) -> list[str]:
  published = figures.read_published(args.published)
  names = args.benchmark or list(published)
  for name in names:
    if name not in published:
      near = difflib.get_close_matches(name, published, n=3, cutoff=0.3) or list(published)
      raise ConfigError(f'--benchmark {name!r} has no published figures. Nearest: {near}.')
  if args.add and len(names) != 1:
    raise ConfigError('--add needs one --benchmark, whose score it is.')
  written = []
  for name in names:
    shown = [*published[name], *(points.parse_point(text, name) for text in args.add)]
    figure, rows = figures.cost_figure(shown, name, points.LABELS.get(name, name))
    written += figures.write(figure, rows, pathlib.Path(args.out) / f'cost_{name}')
  return written


def draw_bars(args: argparse.Namespace) -> list[str]:
  summaries = [points.read_summary(directory) for directory in args.directories]
  names = [name for name, _ in summaries]
  if len(set(names)) < len(names):
    names = list(points.short_names(args.directories))
  bars = {name: rows for name, (_, rows) in zip(names, summaries, strict=True)}
  figure, rows = figures.bars_figure(bars)
  return figures.write(figure, rows, pathlib.Path(args.out) / 'bars')


def draw_curves(args: argparse.Namespace) -> list[str]:
  figure, rows = figures.curves_figure(points.short_names(args.directories))
  return figures.write(figure, rows, pathlib.Path(args.out) / 'curves')


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  kinds = parser.add_subparsers(required=True, metavar='cost|bars|curves')
  cost = kinds.add_parser('cost', help='score over training cost')
  cost.add_argument('--benchmark', action='append', help='default: all with published figures')
  cost.add_argument('--add', action='append', default=[], metavar='POINT')
  cost.add_argument('--published', default=str(_PUBLISHED))
  cost.set_defaults(draw=draw_cost)
  bars = kinds.add_parser('bars', help='score of every task')
  bars.add_argument('directories', nargs='+', help='directories of evaluations')
  bars.set_defaults(draw=draw_bars)
  curves = kinds.add_parser('curves', help='training curves')
  curves.add_argument('directories', nargs='+', help='run directories')
  curves.set_defaults(draw=draw_curves)
  for kind in (cost, bars, curves):
    kind.add_argument('--out', default='figures')
  args = parser.parse_args(argv)
  print('\n'.join(args.draw(args)))


if __name__ == '__main__':
  sys.exit(main())

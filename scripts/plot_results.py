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

import argparse
import difflib
import json
import pathlib
import sys
from collections.abc import Sequence

from openmoe.config import ConfigError
from openmoe.evaluation import figures

_PUBLISHED = pathlib.Path(__file__).resolve().parent.parent / 'docs' / 'published_results.csv'
_LABELS = {
  'triviaqa': 'TriviaQA, 0-shot exact match (%)',
  'bigbench_lite': 'BIG-bench-Lite, 3-shot, mean normalised score',
  'leaderboard_average': 'Open LLM leaderboard, mean of six (%)',
  'mmlu': 'MMLU, 5-shot accuracy (%)',
  'gsm8k': 'GSM8K, 5-shot accuracy (%)',
  'humaneval': 'HumanEval, pass@1 (%)',
  'mt_bench': 'MT-Bench, mean of two turns (of 10)',
}
_OF_GROUP = {'bigbench_lite': 'average', 'leaderboard_average': 'average'}


def read_summary(directory: str) -> dict:
  """summary.json of an evaluation.

  Raises:
    ConfigError: there is none, or it is damaged.
  """
  path = pathlib.Path(directory) / 'summary.json'
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as error:
    raise ConfigError(f'{path} is not there; scripts.evaluate writes it at its end.') from error
  except json.JSONDecodeError as error:
    raise ConfigError(f'{path} is damaged ({error}); run scripts.evaluate again.') from error


def evaluated_score(directory: str, benchmark: str) -> float:
  """A benchmark's score in an evaluation: normalised for the average, else 100 times the metric."""
  rows = {row['group']: row for row in read_summary(directory)['rows']}
  name = _OF_GROUP.get(benchmark, benchmark)
  if name not in rows:
    raise ConfigError(f'{directory} has no {name!r}, only {sorted(rows)}; evaluate it there.')
  return rows[name]['normalised'] if name == 'average' else 100 * rows[name]['score']


def parse_point(text: str, benchmark: str) -> figures.Point:
  """FAMILY:LABEL:ACTIVATED:TOTAL:TOKENS:SCORE, where the score may be a directory.

  Raises:
    ConfigError: it has other parts.
  """
  parts = text.split(':', 5)
  try:
    family, label, *numbers, score = parts
    activated, total, tokens = map(float, numbers)
  except ValueError as error:
    raise ConfigError(
      f'--add {text!r} must be FAMILY:LABEL:ACTIVATED:TOTAL:TOKENS:SCORE, sizes and tokens in '
      'billions, the score a number or the directory of an evaluation.'
    ) from error
  if pathlib.Path(score).is_dir():
    value, source = evaluated_score(score, benchmark), score
  else:
    try:
      value, source = float(score), 'command line'
    except ValueError as error:
      raise ConfigError(f'--add: {score!r} is neither a number nor a directory.') from error
  return figures.Point(family, label, activated, total, tokens, value, source, ours=True)


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
    points = [*published[name], *(parse_point(text, name) for text in args.add)]
    figure, rows = figures.cost_figure(points, name, _LABELS.get(name, name))
    written += figures.write(figure, rows, pathlib.Path(args.out) / f'cost_{name}')
  return written


def _named(directories: Sequence[str]) -> dict[str, str]:
  """Directories by the shortest ends of their names that tell them apart."""
  parts = [pathlib.Path(d).resolve().parts for d in directories]
  for length in range(1, max(map(len, parts)) + 1):
    names = ['/'.join(part[-length:]) for part in parts]
    if len(set(names)) == len(names):
      return dict(zip(names, directories, strict=True))
  raise ConfigError(f'{list(directories)}: the same directory is given twice.')


def draw_bars(args: argparse.Namespace) -> list[str]:
  summaries = [read_summary(directory) for directory in args.directories]
  names = [summary['model']['name'] for summary in summaries]
  if len(set(names)) < len(names):
    names = list(_named(args.directories))
  bars = {name: summary['rows'] for name, summary in zip(names, summaries, strict=True)}
  figure, rows = figures.bars_figure(bars)
  return figures.write(figure, rows, pathlib.Path(args.out) / 'bars')


def draw_curves(args: argparse.Namespace) -> list[str]:
  figure, rows = figures.curves_figure(_named(args.directories))
  return figures.write(figure, rows, pathlib.Path(args.out) / 'curves')


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
  try:
    print('\n'.join(args.draw(args)))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 64
  return 0


if __name__ == '__main__':
  raise SystemExit(main())

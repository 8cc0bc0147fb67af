"""Figures: files beside each other, costs, published figures, and errors of the command."""

from __future__ import annotations

import csv
import json

import pytest

from openmoe.config import ConfigError
from openmoe.evaluation import figures, points
from scripts import plot_results


def written(directory, name):
  assert (directory / f'{name}.png').read_bytes().startswith(b'\x89PNG')
  assert '<svg' in (directory / f'{name}.svg').read_text()[:500]
  with (directory / f'{name}.csv').open(newline='') as file:
    return list(csv.DictReader(file))


def test_every_published_benchmark_is_drawn_with_a_table(tmp_path, capsys):
  assert plot_results.main(['cost', '--out', str(tmp_path)]) == 0
  published = figures.read_published(plot_results._PUBLISHED)
  assert len(capsys.readouterr().out.split()) == 3 * len(published)
  for name, found in published.items():
    assert len(written(tmp_path, f'cost_{name}')) == len(found)
  rows = {row['model']: row for row in written(tmp_path, 'cost_triviaqa')}
  assert len(rows) == 22
  # The released table has ten times this.
  assert float(rows['GLaM-0.1B']['cost']) == pytest.approx(0.06)
  assert float(rows['OpenMoE-8B (1.1T tokens)']['cost']) == pytest.approx(2.2)
  assert all(row['source'] for row in rows.values())


def test_the_same_points_give_the_same_files(tmp_path):
  for name in 'ab':
    arguments = ['cost', '--benchmark', 'mmlu', '--out', str(tmp_path / name)]
    assert plot_results.main(arguments) == 0
  for kind in ('png', 'csv'):
    one, two = ((tmp_path / n / f'cost_mmlu.{kind}').read_bytes() for n in 'ab')
    assert one == two


def summary(directory, scores):
  directory.mkdir(parents=True)
  rows = [
    {
      'group': group,
      'metric': 'em',
      'score': score,
      'low95': 0.9 * score,
      'high95': 1.1 * score,
      'dropped': 0.0,
      'normalised': 100 * score,
      'normalised95': [90 * score, 110 * score],
      'items': 5,
      'shots': 0,
    }
    for group, score in scores.items()
  ]
  (directory / 'summary.json').write_text(json.dumps({'model': {'name': 'tiny'}, 'rows': rows}))
  return str(directory)


def test_an_evaluation_is_put_among_the_published(tmp_path):
  evaluation = summary(tmp_path / 'eval', {'triviaqa': 0.25})
  point = f'Mine:m:1:2:500:{evaluation}'
  arguments = ['cost', '--benchmark', 'triviaqa', '--add', point, '--out', str(tmp_path)]
  assert plot_results.main(arguments) == 0
  mine = written(tmp_path, 'cost_triviaqa')[-1]
  assert (float(mine['score']), float(mine['cost'])) == (25.0, 0.5)


def test_bars_of_two_evaluations(tmp_path):
  one = summary(tmp_path / 'a' / 'eval', {'x': 0.5, 'y': 0.1})
  two = summary(tmp_path / 'b' / 'eval', {'y': 0.2})
  assert plot_results.main(['bars', one, two, '--out', str(tmp_path)]) == 0
  rows = written(tmp_path, 'bars')
  assert [(row['model'], row['group']) for row in rows] == [
    ('a/eval', 'x'),
    ('a/eval', 'y'),
    ('b/eval', 'y'),
  ]
  assert float(rows[0]['low95']) == 45


def run_directory(directory, offset):
  directory.mkdir()
  records = [
    {'kind': 'train', 'step': i, 'loss': offset + 5 / i, 'tokens_seen': 100 * i}
    for i in range(1, 40)
  ]
  records.append({'kind': 'validation', 'step': 39, 'loss': offset})
  text = ''.join(json.dumps(record) + '\n' for record in records)
  (directory / 'metrics.jsonl').write_text(text)
  return str(directory)


def test_curves_of_two_runs(tmp_path):
  runs = [run_directory(tmp_path / name, offset) for name, offset in (('a', 1), ('b', 2))]
  assert plot_results.main(['curves', *runs, '--out', str(tmp_path)]) == 0
  rows = written(tmp_path, 'curves')
  assert len(rows) == 80
  assert rows[39] == {
    'run': 'a',
    'kind': 'validation',
    'step': '39',
    'tokens': '3900',
    'loss': '1.0',
  }


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['cost', '--benchmark', 'triviqa'], "Nearest: ['triviaqa'"),
    (['cost', '--add', 'a:b:1:2:3:4'], 'needs one --benchmark'),
    (['cost', '--benchmark', 'mmlu', '--add', 'a:b:1:4'], 'must be FAMILY:LABEL'),
    (['cost', '--benchmark', 'mmlu', '--add', 'a:b:1:2:3:x'], 'neither a number nor a directory'),
    (['cost', '--published', 'nowhere.csv'], 'nowhere.csv is not there'),
    (['bars', 'nowhere'], 'scripts.evaluate writes it'),
    (['curves', 'nowhere'], 'no training records'),
    (['curves', 'x', 'x'], 'given twice'),
  ],
)
def test_bad_input_is_named(tmp_path, capsys, arguments, said):
  assert plot_results.main([*arguments, '--out', str(tmp_path)]) == 64
  assert said in capsys.readouterr().err


def test_a_damaged_file_of_published_figures_is_named(tmp_path):
  path = tmp_path / 'p.csv'
  path.write_text('model,score\na,1\n')
  with pytest.raises(ConfigError, match='must have the columns'):
    figures.read_published(path)
  path.write_text(plot_results._PUBLISHED.read_text() + 'a,b,x,1,1,mmlu,1,s\n')
  with pytest.raises(ConfigError, match=r'line \d+ does not read'):
    figures.read_published(path)


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    (b'[]', 'holds a list'),
    (b'{"model": {"name": "a"}, "rows": 5}', 'rows is 5; a list belongs there'),
    (b'{"model": {"name": "a"}, "rows": [5]}', 'rows is 5, not an object'),
    (b'{"model": {"name": "a"}, "rows": [{"group": "x"}]}', 'lacks metric'),
    (b'{"model": {}, "rows": []}', 'lacks name'),
    (b'[' * 9999, 'nested too deeply'),
    (b'{"rows": ' + b'9' * 5000 + b'}', 'too long'),
    (b'\xff', 'no JSON'),
  ],
)
def test_a_damaged_summary_is_one_sentence(content, said, tmp_path):
  (tmp_path / 'summary.json').write_bytes(content)
  with pytest.raises(ConfigError, match=f'{said}.*run scripts.evaluate again'):
    points.read_summary(str(tmp_path))


@pytest.mark.parametrize('content', [b'\xff\xfe', b'family,"model\n', b'a\x00b\n'])
def test_damaged_published_figures_are_one_sentence(content, tmp_path):
  (tmp_path / 'x.csv').write_bytes(content)
  with pytest.raises(ConfigError, match=r'x\.csv (is no CSV in UTF-8|must have the columns)'):
    figures.read_published(tmp_path / 'x.csv')

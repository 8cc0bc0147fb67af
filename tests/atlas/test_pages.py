"""Pages: self-contained, escaped, with a CSV beside each picture; the door's exit codes."""

import csv
import html.parser
import json
import pathlib
import shutil

import numpy as np
import pytest

from openmoe.atlas import pages
from openmoe.atlas.analyses.tokens import CLASSES, class_of
from openmoe.atlas.contexts import contexts
from openmoe.atlas.counts import Study
from openmoe.atlas.record import PIECES, Record
from openmoe.config import ConfigError
from scripts import atlas as door
from tests.atlas import case

EVIL = '<img src=x onerror=alert(1)>$x_1$\x1b[2J'


@pytest.fixture(scope='module')
def record(tmp_path_factory):
  """8 experts in two layers, one expert of which nobody chooses; a token is markup."""
  folder = tmp_path_factory.mktemp('pages') / 'r'
  routers = [lambda t, p: np.stack([t % 7, (t + 1) % 7], axis=1),
             lambda t, p: np.stack([p % 7, (p + 3) % 7], axis=1)]  # fmt: skip
  case.planted(folder, routers, experts=8, vocab=12, texts=case.documents(6, 60, vocab=12))
  path = folder / PIECES
  path.write_text(path.read_text().replace('" w3"', json.dumps(EVIL)))
  return folder


class Tags(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.tags, self.links = [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [value for name, value in attrs if name in ('href', 'src') and value]


def test_pages_are_whole_and_self_contained(record, tmp_path):
  written = pages.write_atlas([record], tmp_path, only=['load', 'top_tokens', 'flow'])
  assert [path.rsplit('/', 1)[1] for path in written] == [
    'load.html', 'top_tokens.html', 'flow.html', 'index.html',
  ]  # fmt: skip
  pages.write_experts(Study(Record(record)), tmp_path)
  for path in tmp_path.rglob('*.html'):
    text, tags = path.read_text(), Tags()
    tags.feed(text)
    assert 'script' not in tags.tags
    assert 'img' not in tags.tags
    for link in tags.links:
      if not link.startswith('#'):
        assert '://' not in link
        assert (path.parent / link).exists(), link
    assert '\x1b' not in text
  assert '&lt;img␣src=x' in (tmp_path / 'top_tokens.html').read_text()
  assert 'All identities hold' in (tmp_path / 'index.html').read_text()


def test_a_picture_has_its_numbers_beside_it(record, tmp_path):
  pages.write_atlas([record], tmp_path, only=['load'])
  figures = tmp_path / 'figures'
  assert {p.suffix for p in figures.glob('load_mlp.0.*')} == {'.svg', '.png', '.csv'}
  rows = list(csv.DictReader((figures / 'load_mlp.0.csv').open()))
  assert len(rows) == 8
  assert sum(float(row['share']) for row in rows) == pytest.approx(1)
  assert {row['estimator'] for row in rows} == {'as_defined'}
  assert float(rows[0]['low']) <= float(rows[0]['share']) <= float(rows[0]['high'])
  assert float(rows[0]['uniform']) == 1 / 8


def test_contexts_show_the_weights_of_one_expert(record):
  found = contexts(Record(record))
  strongest, chance = found[0][3]
  assert len(strongest) == len(chance) == 8
  for context in (*strongest, *chance):
    assert context.weights[context.at] == 0.5
    np.testing.assert_array_equal(context.weights > 0, np.isin(context.tokens % 7, (2, 3)))
  assert found[0][7] == ([], [])


def test_unknown_analyses_are_refused_by_name(record, tmp_path):
  with pytest.raises(ConfigError, match="'loads' is no analysis; there are: load"):
    pages.write_atlas([record], tmp_path, only=['loads'])


def test_two_records_are_compared_on_one_page(record, tmp_path):
  routers = [lambda t, p: np.stack([t % 7, (t + 2) % 7], axis=1)] * 2
  texts = case.documents(6, 60, vocab=12)
  case.planted(tmp_path / 'b', routers, experts=8, vocab=12, texts=texts, checkpoint='b')
  (path,) = pages.write_comparison([record, tmp_path / 'b'], tmp_path / 'out')
  text = pathlib.Path(path).read_text()
  assert 'second - first' in text
  assert 'planted (r)' in text


def test_the_door(record, tmp_path, capsys):
  assert door.main(['check', str(record)]) == 0
  assert 'ok    sum_e p_e(g) = 1' in capsys.readouterr().out
  assert door.main(['check', str(tmp_path)]) == 64
  assert 'no record of routing' in capsys.readouterr().err
  weights = record / 'part_000000' / 'slot.npy'
  before = weights.read_bytes()
  try:
    np.save(weights, np.load(record / 'part_000000' / 'slot.npy').astype(np.int64))
    assert door.main(['check', str(record)]) == 65
  finally:
    weights.write_bytes(before)


def test_a_broken_identity_is_said(record, tmp_path, capsys):
  shutil.copytree(record, tmp_path / 'r')
  path = tmp_path / 'r' / 'part_000000' / 'expert.npy'
  expert = np.load(path)
  expert[5] = 2
  np.save(path, expert)
  assert door.main(['check', str(tmp_path / 'r')]) == 1
  assert 'WRONG the choices of a token are different experts' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('text', 'name'),
  [(' the', 'word start'), ('ing', 'continuation'), (' 12', 'digits'), ('),', 'punctuation'),
   (' NOT', 'upper case'), ('\n\n', 'new line'), (' ', 'other')],
)  # fmt: skip
def test_classes_of_tokens(text, name):
  assert CLASSES[class_of(text)] == name

"""The demo corpora and a user's own files, from nothing to batches."""

from __future__ import annotations

import os

import numpy as np
import pytest
import seqio

from openmoe.config import ConfigError, DataConfig
from openmoe.data.statistics import unigram_entropy
from openmoe.data.stream import ShardedStream, evaluation_batches
from tasks import demo, demo_corpus, text_files
from tests.data import case

LENGTHS = {'inputs': 128, 'targets': 128}


@pytest.fixture(scope='module')
def demo_data(tmp_path_factory):
  directory = tmp_path_factory.mktemp('demo') / 'data'
  manifest = demo_corpus.prepare(str(directory))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('OPENMOE_DATA_DIR', str(directory))
    yield directory, manifest


def test_both_corpora_have_text_and_a_validation_split(demo_data):
  directory, manifest = demo_data
  for corpus in demo_corpus.CORPORA:
    assert manifest['documents'][corpus] > 100
    assert manifest['characters'][corpus] > 500_000
  names = {
    split: {
      line for f in sorted(directory.glob(f'code-{split}*')) for line in f.read_text().splitlines()
    }
    for split in ('train', 'validation')
  }
  assert not names['train'] & names['validation']
  assert 0.02 < len(names['validation']) / manifest['documents']['code'] < 0.15


def test_preparing_again_changes_nothing(demo_data):
  directory, manifest = demo_data
  before = {name: os.stat(directory / name).st_mtime_ns for name in os.listdir(directory)}
  assert demo_corpus.prepare(str(directory)) == manifest
  assert before == {n: os.stat(directory / n).st_mtime_ns for n in os.listdir(directory)}


def test_a_folder_with_something_else_is_left_alone(tmp_path):
  (tmp_path / 'mine.txt').write_text('mine')
  with pytest.raises(ConfigError, match='holds files but no complete demo data'):
    demo_corpus.prepare(str(tmp_path))
  assert os.listdir(tmp_path) == ['mine.txt']


def test_without_data_the_remedy_is_named(demo_data, tmp_path, monkeypatch):
  monkeypatch.setenv('OPENMOE_DATA_DIR', str(tmp_path))
  with pytest.raises(ConfigError, match=r'python -m scripts.prepare_demo'):
    demo._file('vocabulary.model')


def test_mixture_is_half_prose_half_code(demo_data):
  config = DataConfig('demo_ul2', LENGTHS, 64, num_shards=1)
  with ShardedStream(config, [0]) as stream:
    sources = []
    filled = []
    for _ in range(8):
      batch = next(stream)
      filled.append((batch.segment_ids > 0).mean())
      sources += [e.source for row in stream.last_rows for e in row]
  share = sources.count('demo_prose') / len(sources)
  error = (0.25 / len(sources)) ** 0.5
  assert set(sources) == {'demo_prose', 'demo_code'}
  assert abs(share - 0.5) < 4 * error
  assert np.mean(filled) > 0.95


def test_validation_entropy_is_that_of_text(demo_data):
  config = DataConfig(
    'demo_full_lm', {'targets': 256}, 8, 'validation', num_shards=1, shuffle=False
  )
  entropy = unigram_entropy(evaluation_batches(config, 5))
  assert 4 < entropy < np.log(demo_corpus.PIECES)


def test_a_users_files_train(demo_data, tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text('\n'.join(case.words(30, 10 * i + k) for k in range(40)))
  files = text_files.UserFiles(str(tmp_path / '*.txt'), name='mine', held_out_every=3)
  names = files.register()
  assert files.register() and 'mine_ul2' in names
  assert 'mine_full_lm' in seqio.TaskRegistry.names()
  with pytest.raises(ConfigError, match='exist already'):
    text_files.UserFiles('other', name='mine').register()
  config = DataConfig('mine_full_lm', {'targets': 64}, 2, num_shards=1)
  with ShardedStream(config, [0]) as stream:
    assert (next(stream).segment_ids > 0).all()

"""Cached shards give the same tokens, and are refused when they are of something else."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from openmoe.config import ConfigError, DataConfig
from openmoe.data import cache
from openmoe.data.stream import ShardedStream
from tests.data import case


@pytest.fixture(scope='module')
def cached(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cache')
  case.make_corpus(tmp_path_factory.mktemp('texts'), 'cached')
  task = seqio.TaskRegistry.get('cached_ul2')
  counts = cache.write_cache(task, str(folder), num_shards=4)
  seqio.add_global_cache_dirs([str(folder)])
  return task, folder, counts


@pytest.fixture(scope='module')
def config(cached) -> DataConfig:
  return DataConfig(
    'cached_ul2', {'inputs': 64, 'targets': 64}, 4, num_shards=4, use_cached=True, num_epochs=1
  )


def test_the_cache_holds_every_token_once(cached):
  task, folder, counts = cached
  assert counts == {'train': 54, 'validation': 6}
  assert cache.write_cache(task, str(folder), num_shards=9) == counts  # complete: left alone
  direct = task.preprocess_precache(task.source.get_dataset('train', shuffle=False))
  stored = task._get_cached_source('train').get_dataset('train', shuffle=False)
  texts = [
    sorted(d['targets'].tobytes() for d in ds.as_numpy_iterator()) for ds in (direct, stored)
  ]
  assert texts[0] == texts[1]
  assert task.get_cached_stats('train')['targets_tokens'] == sum(len(t) // 4 for t in texts[0])


def test_shards_of_the_cache_cover_it_and_resume(config):
  def tokens(stream):
    return [b.targets for b in stream]

  with ShardedStream(config, range(4)) as stream:
    whole = tokens(stream)
  with ShardedStream(config, range(4)) as stream:
    first = next(stream).targets
    state = stream.state()
  with ShardedStream(config, range(4)) as stream:
    stream.restore(state)
    np.testing.assert_array_equal(np.stack([first, *tokens(stream)]), np.stack(whole))


def of_seqio(ours, folder) -> None:
  """The cache as seqio's own tool leaves it: its files, its facts alone, an empty COMPLETED."""
  folder.mkdir(parents=True)
  for path in ours.glob('*.tfrecord-*'):
    (folder / path.name).write_bytes(path.read_bytes())
  for split in ('train', 'validation'):
    info = json.loads((ours / f'info.{split}.json').read_text())
    for feature in info['features'].values():  # seqio's GetInfo leaves the first side open
      feature['shape'] = [None, *feature['shape'][1:]] if feature['shape'] else []
    (folder / f'info.{split}.json').write_text(json.dumps(info))
    stats = json.loads((ours / f'stats.{split}.json').read_text())
    stats |= {'targets_min_tokens': 1}
    (folder / f'stats.{split}.json').write_text(json.dumps(stats))
  (folder / 'COMPLETED').write_text('')


def test_a_cache_of_seqio_is_read_as_ours(config, cached, tmp_path, monkeypatch):
  task, folder, _ = cached
  with ShardedStream(config, range(4)) as stream:
    expected = [next(stream).targets for _ in range(3)]
  of_seqio(folder / 'cached_ul2', tmp_path / 'cached_ul2')
  monkeypatch.setattr(task, '_cache_dir', None)
  monkeypatch.setattr(seqio.utils, '_GLOBAL_CACHE_DIRECTORIES', [str(tmp_path)])
  assert task.cache_dir == str(tmp_path / 'cached_ul2')
  with ShardedStream(config, range(4)) as stream:
    np.testing.assert_array_equal([next(stream).targets for _ in range(3)], expected)
  assert cache.write_cache(task, str(tmp_path), num_shards=4) == {'train': 54, 'validation': 6}


def test_seqio_reads_our_cache(cached):
  task, _, _ = cached
  lengths = {'inputs': 64, 'targets': 64}
  given = {'split': 'validation', 'shuffle': False, 'seed': 1}
  examples = list(task.get_dataset(lengths, use_cached=True, **given).as_numpy_iterator())
  whole = list(task.get_dataset(lengths, use_cached=False, **given).as_numpy_iterator())
  # Chunks are cut from the same documents in another order.
  assert len(examples) == len(whole) > 5
  assert examples[0].keys() == whole[0].keys()


def test_too_few_files_are_refused(config):
  more = dataclasses.replace(config, num_shards=8, batch_size=8)
  with pytest.raises(ConfigError, match='4 files.*fewer than num_shards=8.*--min_shards=8'):
    ShardedStream(more, [0])


def test_an_uncached_task_is_refused(config, cached):
  with pytest.raises(ConfigError, match=r'not cached in.*scripts.cache_tasks'):
    ShardedStream(dataclasses.replace(config, mixture_or_task_name='cached_ul2_noprefix'), [0])


def test_another_vocabulary_is_refused(config, cached):
  _, folder, _ = cached
  path = folder / 'cached_ul2' / 'vocabulary.json'
  content = path.read_text()
  path.write_text(json.dumps({'fingerprint': 'other'}))
  try:
    with pytest.raises(ConfigError, match='another vocabulary'):
      ShardedStream(config, [0])
  finally:
    path.write_text(content)


def test_an_id_beyond_the_vocabulary_is_refused():
  def bad(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensors({'targets': tf.constant([5, 999], tf.int32)})

  seqio.TaskRegistry.add(
    'beyond',
    source=seqio.FunctionDataSource(bad, splits=['train']),
    preprocessors=[],
    output_features={'targets': seqio.Feature(case.VOCABULARY)},
    metric_fns=[],
  )
  config = DataConfig('beyond', {'targets': 8}, 1, num_shards=1, num_epochs=1)
  with (
    ShardedStream(config, [0]) as stream,
    pytest.raises(ConfigError, match='token id 999, outside the vocabulary of 559'),
  ):
    next(stream)

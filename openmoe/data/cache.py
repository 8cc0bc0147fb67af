"""Tokenised shards in seqio's cache layout: writing them on one machine, and checking them.

scripts.cache_tasks writes the same layout with Apache Beam for corpora that need many machines.
Beside what seqio expects lies the fingerprint of the vocabulary, so that ids are never read with
another one.
"""

from __future__ import annotations

import json
import os

import numpy as np
import seqio
import tensorflow as tf

from openmoe.config import ConfigError

_FINGERPRINT = 'vocabulary.json'


def cache_folder(task: seqio.Task, cache_dir: str) -> str:
  """Where a task's shards lie under a cache directory."""
  return os.path.join(cache_dir, seqio.get_task_dir_from_name(task.name))


def _fingerprint(task: seqio.Task) -> str:
  vocabulary = task.output_features['targets'].vocabulary
  return vocabulary.fingerprint() if hasattr(vocabulary, 'fingerprint') else repr(vocabulary)


def write_fingerprint(task: seqio.Task, folder: str) -> None:
  """Notes which vocabulary the shards in `folder` were made with."""
  with tf.io.gfile.GFile(os.path.join(folder, _FINGERPRINT), 'w') as f:
    f.write(json.dumps({'fingerprint': _fingerprint(task)}))


def check_cached(task: seqio.Task, num_shards: int, split: str) -> None:
  """Refuses a cache that is not there, is of another vocabulary, or has too few files.

  Raises:
    ConfigError: naming the task and the remedy.
  """
  if not task.supports_caching or not task.cache_dir:
    raise ConfigError(
      f'{task.name} is not cached in {list(seqio.get_global_cache_dirs())}: run '
      f'python -m scripts.cache_tasks --tasks={task.name}, or set use_cached=False.'
    )
  path = os.path.join(task.cache_dir, _FINGERPRINT)
  if tf.io.gfile.exists(path):
    with tf.io.gfile.GFile(path) as f:
      found = json.loads(f.read())['fingerprint']
    if found != _fingerprint(task):
      raise ConfigError(
        f'{task.cache_dir} was tokenised with another vocabulary ({found}, not '
        f'{_fingerprint(task)}): use that vocabulary, or cache the task again.'
      )
  files = task._get_cached_source(split).list_shards(split)
  if len(files) < num_shards:
    raise ConfigError(
      f'{task.name} is cached in {len(files)} files of split {split!r}, fewer than num_shards='
      f'{num_shards}: cache it again with --min_shards={num_shards} or more.'
    )


def write_cache(task: seqio.Task, cache_dir: str, num_shards: int, seed: int = 0) -> dict[str, int]:
  """Tokenises all splits of a task into num_shards files each; a no-op when complete.

  Examples are dealt to the files in turn, so every file holds a sample of the whole.

  Args:
    task: has a CacheDatasetPlaceholder.
    cache_dir: seqio cache directory, local or gs://.
    num_shards: files per split; at least DataConfig.num_shards.
    seed: of random preprocessing before the cache, if there is any.

  Returns:
    Examples by split.
  """
  folder = cache_folder(task, cache_dir)
  done = os.path.join(folder, 'COMPLETED')
  if tf.io.gfile.exists(done):
    with tf.io.gfile.GFile(done) as f:
      return json.loads(f.read())
  tf.io.gfile.makedirs(folder)
  counts = {}
  for split in task.splits:
    dataset = task.source.get_dataset(split, shuffle=False, seed=seed)
    dataset = task.preprocess_precache(dataset, seed=seed)
    counts[split] = _write_split(dataset, folder, split, num_shards)
  write_fingerprint(task, folder)
  # Last, and only then is the cache one: seqio looks for this file.
  with tf.io.gfile.GFile(done, 'w') as f:
    f.write(json.dumps(counts))
  return counts


def _write_split(dataset: tf.data.Dataset, folder: str, split: str, num_shards: int) -> int:
  prefix = seqio.get_cached_tfrecord_prefix(folder, split)
  writers = [
    tf.io.TFRecordWriter(f'{prefix}-{i:05d}-of-{num_shards:05d}') for i in range(num_shards)
  ]
  examples, tokens, longest = 0, 0, 0
  for example in dataset.as_numpy_iterator():
    writers[examples % num_shards].write(seqio.dict_to_tfexample(example).SerializeToString())
    examples += 1
    size = int(np.size(example['targets']))
    tokens, longest = tokens + size, max(longest, size)
  for writer in writers:
    writer.close()
  features = {
    name: {'shape': spec.shape.as_list(), 'dtype': spec.dtype.name}
    for name, spec in dataset.element_spec.items()
  }
  info = {'num_shards': num_shards, 'features': features, 'seqio_version': seqio.__version__}
  stats = {'examples': examples, 'targets_tokens': tokens, 'targets_max_tokens': longest}
  for path, content in (
    (seqio.get_cached_info_path(folder, split), info),
    (seqio.get_cached_stats_path(folder, split), stats),
  ):
    with tf.io.gfile.GFile(path, 'w') as f:
      f.write(json.dumps(content, indent=2))
  return examples

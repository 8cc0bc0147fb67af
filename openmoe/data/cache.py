"""Tokenised shards in seqio's cache layout: writing them on one machine, and checking them.

scripts.cache_tasks writes the same layout with Apache Beam for corpora that need many machines.
Beside what seqio expects lies the fingerprint of the vocabulary, so that ids are never read with
another one.
"""

from __future__ import annotations

import contextlib
import json
import os

import numpy as np
import seqio
import tensorflow as tf

from openmoe.config import ConfigError
from openmoe.data import files, seqio_private

_FINGERPRINT = 'vocabulary.json'
_MOST_BYTES = 1 << 24  # of a file of facts


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
    found = _read_facts(path, 'fingerprint', str)
    if found != _fingerprint(task):
      raise ConfigError(
        f'{task.cache_dir} was tokenised with another vocabulary ({found}, not '
        f'{_fingerprint(task)}): use that vocabulary, or cache the task again.'
      )
  # seqio reads both, and ends in a traceback where one is not there.
  _read_facts(seqio.get_cached_info_path(task.cache_dir, split), 'num_shards', int)
  _read_facts(seqio.get_cached_stats_path(task.cache_dir, split), 'examples', int)
  count = len(seqio_private.cached_source(task, split).list_shards(split))
  if count < num_shards:
    raise ConfigError(
      f'{task.name} is cached in {count} files of split {split!r}, fewer than num_shards='
      f'{num_shards}: cache it again with --min_shards={num_shards} or more.'
    )


def counted_tokens(task: seqio.Task, split: str) -> float | None:
  """Target tokens of a cached split as its statistics say, None where they do not."""
  path = seqio.get_cached_stats_path(task.cache_dir, split)
  if not tf.io.gfile.exists(path):
    return None
  return _facts(path).get('targets_tokens')


def _facts(path: str) -> dict:
  """A file of facts in a cache directory, which another program may have written.

  Raises:
    ConfigError: it is absent, or no JSON object.
  """
  facts = files.read_json(path, _MOST_BYTES)
  if not isinstance(facts, dict):
    raise ConfigError(f'{path} holds no JSON object; cache the task again.')
  return facts


def _read_facts(path: str, name: str, kind: type):
  """One fact.

  Raises:
    ConfigError: as _facts, or it is missing or of another type.
  """
  value = _facts(path).get(name)
  if not isinstance(value, kind):
    raise ConfigError(
      f'{path} has {name}={value!r}, not {kind.__name__}: the cache lost a part or was made by '
      'another program; cache the task again.'
    )
  return value


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
    return _counts(task, folder, done)
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


def _counts(task: seqio.Task, folder: str, done: str) -> dict[str, int]:
  """Examples by split of a complete cache; seqio's own tool leaves COMPLETED without them."""
  content = files.read_bytes(done, _MOST_BYTES)
  if content.strip():
    return files.parse_json(content, done)
  stats = (seqio.get_cached_stats_path(folder, split) for split in task.splits)
  return {s: _read_facts(path, 'examples', int) for s, path in zip(task.splits, stats, strict=True)}


def _write_split(dataset: tf.data.Dataset, folder: str, split: str, num_shards: int) -> int:
  prefix = seqio.get_cached_tfrecord_prefix(folder, split)
  examples, tokens, longest = 0, 0, 0
  with contextlib.ExitStack() as stack:
    writers = [
      stack.enter_context(tf.io.TFRecordWriter(f'{prefix}-{i:05d}-of-{num_shards:05d}'))
      for i in range(num_shards)
    ]
    for example in dataset.as_numpy_iterator():
      writers[examples % num_shards].write(seqio.dict_to_tfexample(example).SerializeToString())
      examples += 1
      size = int(np.size(example['targets']))
      tokens, longest = tokens + size, max(longest, size)
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

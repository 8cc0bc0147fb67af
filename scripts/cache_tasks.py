"""Tokenises tasks once: python -m scripts.cache_tasks --tasks=NAME,... --output_cache_dir=DIR

Training reads the result with DataConfig.use_cached and the directory given as
tasks.locations.Locations.cache_dir. The same file layout from either way of writing:

--runner=local    this process (the default)
--runner=NAME     an Apache Beam runner, `DirectRunner` here or `DataflowRunner` for terabytes, with
                  its options in --pipeline_options. Needs the `cache` extra.

A task that is cached already is left alone; one that was interrupted is written again.
"""

from __future__ import annotations

import json
import os
import sys

from scripts import quiet

quiet.import_tensorflow()

import seqio
import tensorflow as tf
from absl import app, flags, logging

from openmoe.config import ConfigError
from openmoe.data import cache
from openmoe.data.shard import find_provider

_TASKS = flags.DEFINE_list('tasks', None, 'Tasks or mixtures.', required=True)
_OUTPUT = flags.DEFINE_string('output_cache_dir', None, 'Cache directory.', required=True)
_SHARDS = flags.DEFINE_integer(
  'min_shards', 64, 'Files per split; at least the num_shards of any run that reads them.'
)
_RUNNER = flags.DEFINE_string('runner', 'local', 'local, or a Beam runner.')
_OPTIONS = flags.DEFINE_list('pipeline_options', [], 'Further options of the Beam runner.')
_TFDS = flags.DEFINE_string('tfds_data_dir', None, 'Where TFDS data sets lie.')
_MODULES = flags.DEFINE_list(
  'modules', ['tasks.demo', 'tasks.pretraining', 'tasks.sft'], 'Modules that register tasks.'
)


def write_with_beam(task: seqio.Task, cache_dir: str, num_shards: int, options: list[str]) -> None:
  """Tokenises all splits of a task on a Beam runner.

  Args:
    task: has a CacheDatasetPlaceholder; its modules must be importable on the workers.
    cache_dir: local or gs://.
    num_shards: files per split.
    options: of the pipeline, --runner among them.

  Raises:
    ConfigError: if apache-beam is not installed.
  """
  try:
    import apache_beam as beam
    from seqio import beam_utils
  except ImportError as error:
    raise ConfigError(f'--runner needs Apache Beam ({error}): install the cache extra.') from error
  folder = cache.cache_folder(task, cache_dir)
  with beam.Pipeline(options=beam.pipeline.PipelineOptions(options)) as pipeline:
    for split in task.splits:
      examples = (
        pipeline
        | f'{split}_read'
        >> beam_utils.PreprocessTask(
          task, split, modules_to_import=_MODULES.value, tfds_data_dir=_TFDS.value
        )
        | f'{split}_shuffle' >> beam.Reshuffle()
      )
      prefix = seqio.get_cached_tfrecord_prefix(folder, split)
      _ = examples | f'{split}_write' >> beam_utils.WriteExampleTfRecord(prefix, num_shards)
      _ = (
        examples
        | f'{split}_info' >> beam_utils.GetInfo(num_shards)
        | f'{split}_write_info' >> beam_utils.WriteJson(seqio.get_cached_info_path(folder, split))
      )
      _ = (
        examples
        | f'{split}_stats' >> beam_utils.GetStats(task.output_features)
        | f'{split}_write_stats' >> beam_utils.WriteJson(seqio.get_cached_stats_path(folder, split))
      )
  cache.write_fingerprint(task, folder)
  with tf.io.gfile.GFile(os.path.join(folder, 'COMPLETED'), 'w') as f:
    f.write(json.dumps({'runner': options}))


def cache_task(task: seqio.Task, cache_dir: str) -> str:
  """Caches one task and says what was done."""
  folder = cache.cache_folder(task, cache_dir)
  if tf.io.gfile.exists(os.path.join(folder, 'COMPLETED')):
    return 'already cached'
  if tf.io.gfile.exists(folder):
    tf.io.gfile.rmtree(folder)  # interrupted: without COMPLETED it is no cache
  if _RUNNER.value == 'local':
    counts = cache.write_cache(task, cache_dir, _SHARDS.value)
    told = ', '.join(f'{split} {count:,}' for split, count in counts.items())
    return f'cached: {told} documents'
  options = [f'--runner={_RUNNER.value}', *_OPTIONS.value]
  write_with_beam(task, cache_dir, _SHARDS.value, options)
  return f'cached with {_RUNNER.value}'


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  for module in _MODULES.value:
    __import__(module)
  if _TFDS.value:
    seqio.set_tfds_data_dir_override(_TFDS.value)
  try:
    for name in _TASKS.value:
      provider = find_provider(name)
      for task in getattr(provider, 'tasks', [provider]):
        if not task.supports_caching:
          raise ConfigError(f'{task.name} has no CacheDatasetPlaceholder: it cannot be cached.')
        print(f'{task.name}: {cache_task(task, _OUTPUT.value)}', flush=True)
  except ConfigError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main)

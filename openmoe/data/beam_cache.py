"""Tokenised shards in seqio's cache layout, written with Apache Beam on many machines."""

from __future__ import annotations

import json
import os

import seqio
import tensorflow as tf

from openmoe.config import ConfigError
from openmoe.data import cache


def write_with_beam(
  task: seqio.Task,
  cache_dir: str,
  num_shards: int,
  options: list[str],
  modules: list[str],
  tfds_data_dir: str | None,
) -> None:
  """Tokenises all splits of a task on a Beam runner.

  Args:
    task: has a CacheDatasetPlaceholder.
    cache_dir: local or gs://.
    num_shards: files per split.
    options: of the pipeline, --runner among them.
    modules: register the tasks; must be importable on the workers.
    tfds_data_dir: where TFDS data sets lie.

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
          task, split, modules_to_import=modules, tfds_data_dir=tfds_data_dir
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

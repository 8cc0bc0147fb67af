"""Tokenises tasks once: python -m scripts.cache_tasks --tasks=NAME,... --output_cache_dir=DIR

Training reads the result with DataConfig.use_cached and the directory given as
tasks.locations.Locations.cache_dir. The same file layout from either way of writing:

--runner=local    this process (the default)
--runner=NAME     an Apache Beam runner, `DirectRunner` here or `DataflowRunner` for terabytes, with
                  its options in --pipeline_options. Needs the `cache` extra.

A task that is cached already is left alone; one that was interrupted is written again.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import os
import sys

from scripts import quiet

quiet.import_tensorflow()

import seqio
import tensorflow as tf

from openmoe.config import ConfigError
from openmoe.data import beam_cache, cache
from openmoe.data.shard import find_provider
from scripts import registry


def cache_task(task: seqio.Task, args: argparse.Namespace) -> str:
  """Caches one task and says what was done."""
  folder = cache.cache_folder(task, args.output_cache_dir)
  if tf.io.gfile.exists(os.path.join(folder, 'COMPLETED')):
    return 'already cached'
  if tf.io.gfile.exists(folder):
    tf.io.gfile.rmtree(folder)  # interrupted: without COMPLETED it is no cache
  if args.runner == 'local':
    counts = cache.write_cache(task, args.output_cache_dir, args.min_shards)
    told = ', '.join(f'{split} {count:,}' for split, count in counts.items())
    return f'cached: {told} documents'
  options = [f'--runner={args.runner}', *args.pipeline_options]
  place = (args.output_cache_dir, args.min_shards, options)
  beam_cache.write_with_beam(task, *place, args.modules, args.tfds_data_dir)
  return f'cached with {args.runner}'


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('--tasks', type=command.names, required=True, help='tasks or mixtures')
  parser.add_argument('--output_cache_dir', required=True)
  parser.add_argument(
    '--min_shards', type=int, default=64, help='files per split; at least num_shards of any reader'
  )
  parser.add_argument('--runner', default='local', help='local, or a Beam runner')
  parser.add_argument(
    '--pipeline_options', type=command.names, default=[], help='further options of the runner'
  )
  registry.add_arguments(parser)
  args = parser.parse_args(argv)
  registry.load(args)
  for name in args.tasks:
    provider = find_provider(name)
    for task in getattr(provider, 'tasks', [provider]):
      if not task.supports_caching:
        raise ConfigError(f'{task.name} has no CacheDatasetPlaceholder: it cannot be cached.')
      print(f'{task.name}: {cache_task(task, args)}', flush=True)


if __name__ == '__main__':
  sys.exit(main())

"""Speed and density of the data: python -m scripts.benchmarks.data [--json].

On the demo corpora at the published lengths (1024 + 1024), with one logical shard:
- tokens a second of the UL2 pipeline from raw text and from cached shards, in all and per core;
- how the time divides between tokenising, denoising and packing;
- padding and loss share of the fixed and the reference mode;
- resident memory after some data and after ten times as much.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time

from scripts import quiet

quiet.import_tensorflow()

import seqio
from absl import app, flags

from openmoe.config import DataConfig
from openmoe.data import cache, features
from openmoe.data.shard import Shard
from openmoe.data.sources import TextFiles
from openmoe.data.vocabulary import UMT5_EXTRA_IDS, Vocabulary
from tasks import chains, demo_corpus, locations

_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')
_LENGTH = flags.DEFINE_integer('length', 1024, 'Tokens of inputs and of targets.')
_TOKENS = flags.DEFINE_integer('tokens', 4_000_000, 'Tokens of text in a timed run.')
_SHARDS = flags.DEFINE_integer('num_shards', 2, 'Logical shards read together.')

CORPUS = 'bench'


def register(directory: str) -> None:
  """The demo's text with the published number of sentinels."""
  source = TextFiles({'train': os.path.join(directory, '*-train-*.jsonl')})
  vocabulary = Vocabulary(os.path.join(directory, 'vocabulary.model'), UMT5_EXTRA_IDS)
  chains.add_corpus(CORPUS, source, vocabulary)


def config(task: str, **changes) -> DataConfig:
  lengths = {'inputs': _LENGTH.value, 'targets': _LENGTH.value}
  return DataConfig(task, lengths, _SHARDS.value, num_shards=_SHARDS.value, **changes)


class Meter:
  """Wall and processor seconds, and tokens, of what runs inside."""

  def __enter__(self):
    self.tokens = 0
    self._wall, self._cpu = time.perf_counter(), time.process_time()
    return self

  def __exit__(self, *unused):
    self.wall = time.perf_counter() - self._wall
    self.cpu = time.process_time() - self._cpu

  def rates(self) -> dict[str, float]:
    return {
      'tokens_per_second': round(self.tokens / self.wall),
      'tokens_per_core_second': round(self.tokens / self.cpu),
      'cores_used': round(self.cpu / self.wall, 2),
    }


def rows_of(shards: list[Shard]):
  while True:
    for shard in shards:
      yield shard.next_row()


def measure_stream(settings: DataConfig, tokens: int) -> dict[str, float]:
  """Rates of whole rows, and their density, after a warm-up of a tenth."""
  shards = [Shard(settings, i) for i in range(settings.num_shards)]
  stream = rows_of(shards)
  warm = 0
  while warm < tokens // 10:
    warm += sum(e.size for e in next(stream))
  filled, loss, positions = 0, 0, 0
  with Meter() as meter:
    while meter.tokens < tokens:
      batch = features.batch_rows([next(stream) for _ in range(8)], settings.task_feature_lengths)
      meter.tokens += int((batch.segment_ids > 0).sum())
      loss += int(batch.loss_weights.sum())
      positions += batch.targets.size
  filled = meter.tokens
  return {
    **meter.rates(),
    'non_padding': round(filled / positions, 4),
    'loss_share': round(loss / positions, 4),
  }


def reference_density(tokens: int) -> dict[str, float]:
  """Padding and loss share of the released objective under seqio's own packing."""
  settings = config(f'{CORPUS}_ul2_reference', shuffle=True)
  task = seqio.TaskRegistry.get(settings.mixture_or_task_name)
  examples = task.get_dataset(
    settings.task_feature_lengths, 'train', seed=0, num_epochs=None, try_in_mem_cache=False
  )
  packer, filled, loss, rows = features.Packer(settings.row_length, open_rows=1), 0, 0, 0
  for example in examples.as_numpy_iterator():
    for row in packer.add(features.Example(example['inputs'], example['targets'])):
      rows += 1
      filled += sum(e.size for e in row)
      loss += sum(len(e.targets) for e in row)
    if filled >= tokens:
      break
  positions = rows * settings.row_length
  return {'non_padding': round(filled / positions, 4), 'loss_share': round(loss / positions, 4)}


def stage_seconds(tokens: int) -> dict[str, float]:
  """Processor seconds per million tokens up to each stage, from their differences."""
  task = seqio.TaskRegistry.get(f'{CORPUS}_ul2')
  lengths = {'inputs': _LENGTH.value, 'targets': _LENGTH.value}

  def drain(dataset, size) -> float:
    iterator = iter(dataset.repeat())
    next(iterator)
    with Meter() as meter:
      while meter.tokens < tokens:
        meter.tokens += size(next(iterator))
    return 1e6 * meter.cpu / meter.tokens

  raw = task.source.get_dataset('train', shuffle=False)
  documents = sum(1 for _ in raw)
  cached = task._get_cached_source('train').get_dataset('train', shuffle=False)
  total = sum(int(d['targets'].shape[0]) for d in cached)
  mean = total / documents
  read = drain(raw, lambda d: mean)
  tokenised = drain(task.preprocess_precache(raw, seed=0), lambda d: d['targets'].shape[0])
  loaded = drain(cached, lambda d: d['targets'].shape[0])
  denoised = drain(
    task.preprocess_postcache(cached, sequence_length=lengths, seed=0),
    lambda e: e['inputs'].shape[0] + e['targets'].shape[0],
  )
  settings = config(f'{CORPUS}_ul2', use_cached=True)
  packed = 1e6 / measure_stream(settings, tokens)['tokens_per_core_second']
  parts = {
    'reading_text': read,
    'tokenising': tokenised - read,
    'reading_cache': loaded,
    'denoising': denoised - loaded,
    'shuffling_and_packing': packed - denoised,
  }
  return {name: round(max(value, 0.0), 4) for name, value in parts.items()}


def memory_growth(tokens: int) -> dict[str, float]:
  """Resident megabytes after `tokens` and after ten times as many."""
  settings = config(f'{CORPUS}_ul2', use_cached=True)
  stream = rows_of([Shard(settings, i) for i in range(settings.num_shards)])
  seen, found = 0, {}
  for name, limit in (('after_1x', tokens), ('after_10x', 10 * tokens)):
    while seen < limit:
      seen += sum(e.size for e in next(stream))
    with open('/proc/self/statm', encoding='utf-8') as f:
      found[name] = round(int(f.read().split()[1]) * resource.getpagesize() / 1e6)
  return found


def measure() -> dict[str, object]:
  directory = locations.data_dir()
  demo_corpus.prepare(directory)
  register(directory)
  tokens = _TOKENS.value
  with tempfile.TemporaryDirectory(prefix='openmoe-bench-') as folder:
    task = seqio.TaskRegistry.get(f'{CORPUS}_ul2')
    cache.write_cache(task, folder, num_shards=8)
    seqio.add_global_cache_dirs([folder])
    result = {
      'cores': os.cpu_count(),
      'length': _LENGTH.value,
      'cached': measure_stream(config(f'{CORPUS}_ul2', use_cached=True), tokens),
      'raw_text': measure_stream(config(f'{CORPUS}_ul2'), tokens // 2),
      'cpu_seconds_per_million_tokens': stage_seconds(tokens // 2),
      'memory_mb': memory_growth(tokens),
    }
  result['fixed'] = {k: result['cached'][k] for k in ('non_padding', 'loss_share')}
  result['reference'] = reference_density(tokens // 8)
  return result


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  result = measure()
  if _JSON.value:
    print(json.dumps(result))
    return
  for name, value in result.items():
    print(f'{name}: {value}')


if __name__ == '__main__':
  app.run(main)

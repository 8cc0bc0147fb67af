"""Shows what a model is trained on.

  python -m scripts.inspect_data --mixture=demo_ul2 --step=3
      prints the decoded rows of one batch: source, document, objective; tokens that carry loss in
      green, the rest dim, sentinels in yellow.
  python -m scripts.inspect_data --mixture=demo_ul2 --summary
      prints tokens by source, padding and loss share, and the rate, over --steps batches.

  python -m scripts.inspect_data --run_dir=runs/openmoe_tiny --step=187
      the same for a batch of a run: with its data configuration, from the data position of its
      newest checkpoint at or before the step, so at most a checkpoint period is read over.

--modules are imported first, as they register the tasks.
"""

from __future__ import annotations

import ast
import collections
import itertools
import json
import sys
import time
from collections.abc import Mapping

from scripts import quiet

quiet.import_tensorflow()

import numpy as np
import seqio
from absl import flags, logging
from etils import epath

from openmoe.checkpoint.positions import DataPositions
from openmoe.config import ConfigError, DataConfig
from openmoe.data.features import Example, Row
from openmoe.data.shard import find_provider, rates
from openmoe.data.stages import saved_stream
from openmoe.data.stream import ShardedStream
from openmoe.data.ul2 import DENOISERS
from openmoe.types import Batch

# Flags of this script alone: tests import it beside scripts.train, which has some of these names.
_FLAGS = flags.FlagValues()
_MIXTURE = flags.DEFINE_string('mixture', None, 'Task or mixture.', flag_values=_FLAGS)
_RUN = flags.DEFINE_string('run_dir', None, 'Or the directory of a run.', flag_values=_FLAGS)
_STEP = flags.DEFINE_integer(
  'step', 0, 'Batch to show, from 0: what step + 1 of a run trains on.', flag_values=_FLAGS
)
_SUMMARY = flags.DEFINE_bool(
  'summary', False, 'Print figures over --steps batches instead.', flag_values=_FLAGS
)
_STEPS = flags.DEFINE_integer('steps', 20, 'Batches of the summary.', flag_values=_FLAGS)
_JSON = flags.DEFINE_bool(
  'json', False, 'Print the summary as one JSON object.', flag_values=_FLAGS
)
_LENGTHS = flags.DEFINE_string(
  'task_feature_lengths', None, "Such as {'inputs': 128, 'targets': 128}.", flag_values=_FLAGS
)
_BATCH = flags.DEFINE_integer('batch_size', 8, 'Rows of the global batch.', flag_values=_FLAGS)
_SHARDS = flags.DEFINE_integer('num_shards', 8, 'Logical shards.', flag_values=_FLAGS)
_SEED = flags.DEFINE_integer('seed', 0, 'Data seed.', flag_values=_FLAGS)
_SPLIT = flags.DEFINE_string('split', 'train', 'Split.', flag_values=_FLAGS)
_CACHED = flags.DEFINE_bool(
  'use_cached', False, 'Read what scripts.cache_tasks wrote.', flag_values=_FLAGS
)
_CACHE_DIRS = flags.DEFINE_list('cache_dirs', [], 'Where it wrote it.', flag_values=_FLAGS)
_TFDS = flags.DEFINE_string('tfds_data_dir', None, 'Where TFDS data sets lie.', flag_values=_FLAGS)
_MODULES = flags.DEFINE_list(
  'modules',
  ['tasks.demo', 'tasks.pretraining', 'tasks.sft'],
  'Modules that register tasks.',
  flag_values=_FLAGS,
)
_FILES = flags.DEFINE_string(
  'text_files', None, 'Files to register as text_files_*.', flag_values=_FLAGS
)
_COLOR = flags.DEFINE_enum(
  'color', 'auto', ['auto', 'always', 'never'], 'Colour the tokens.', flag_values=_FLAGS
)

_LOSS, _CONTEXT, _SENTINEL, _HEAD, _END = '\033[32m', '\033[2m', '\033[33m', '\033[1m', '\033[0m'


def data_config() -> DataConfig:
  lengths = {'targets': 256} if 'full_lm' in _MIXTURE.value else {'inputs': 128, 'targets': 128}
  if _LENGTHS.value:
    lengths = ast.literal_eval(_LENGTHS.value)
  return DataConfig(
    _MIXTURE.value,
    lengths,
    _BATCH.value,
    split=_SPLIT.value,
    seed=_SEED.value,
    num_shards=_SHARDS.value,
    use_cached=_CACHED.value,
  )


def objective_name(example: Example) -> str:
  """What was asked of an example, in words."""
  if not len(example.inputs):
    return 'next token'
  if not 0 <= example.objective < len(DENOISERS):
    return 'inputs to targets'
  denoiser = DENOISERS[example.objective]
  if denoiser.mean_span is None:
    return f'{denoiser.prefix.strip()} prefix LM'
  return f'{denoiser.prefix.strip()} spans of {denoiser.mean_span:g}, {denoiser.noise_density:.0%}'


def documents_of(example: Example, config: DataConfig) -> str:
  """Where the first and the last token came from."""
  sources = {t.name: t.source for t in _tasks(config) if t.name.startswith(f'{example.source}_')}
  source = next(iter(sources.values()), None) if example.source else None
  names = []
  for number in dict.fromkeys(example.documents):
    if number < 0:
      names.append('unknown document')
    else:
      known = source is not None and hasattr(source, 'describe')
      names.append(source.describe(config.split, number) if known else f'document {number}')
  return ' .. '.join(names)


def _tasks(config: DataConfig) -> list[seqio.Task]:
  provider = find_provider(config.mixture_or_task_name)
  return list(getattr(provider, 'tasks', [provider]))


def show_row(row: Row, vocabulary: seqio.Vocabulary, color: bool, config: DataConfig) -> str:
  """A packed row, segment by segment."""
  lines = []
  for number, example in enumerate(row, start=1):
    head = f'  segment {number}: {example.source or "?"} | {documents_of(example, config)} | '
    head += f'{objective_name(example)} | {len(example.inputs)} + {len(example.targets)} tokens'
    lines.append(f'{_HEAD}{head}{_END}' if color else head)
    for label, tokens, carries in (
      ('context', example.inputs, False),
      ('loss', example.targets, True),
    ):
      if len(tokens):
        lines.append(f'    {label}: {show_tokens(tokens, vocabulary, carries and color, color)}')
  return '\n'.join(lines)


def show_tokens(tokens: np.ndarray, vocabulary: seqio.Vocabulary, loss: bool, color: bool) -> str:
  """Decoded text with sentinels and EOS visible, one line."""
  first_sentinel = vocabulary.vocab_size - vocabulary.extra_ids
  base = _LOSS if loss else _CONTEXT
  parts = []
  for special, run in itertools.groupby(
    (int(t) for t in tokens), key=lambda t: t >= first_sentinel or t == vocabulary.eos_id
  ):
    ids = list(run)
    if special:
      text = ''.join(
        '<eos>' if t == vocabulary.eos_id else f'<{vocabulary.vocab_size - 1 - t}>' for t in ids
      )
      parts.append(f'{_SENTINEL}{text}{_END}' if color else text)
    else:
      text = vocabulary.decode(ids).replace('\n', '\\n')
      parts.append(f'{base}{text}{_END}' if color else text)
  return ''.join(parts)


def summarise(config: DataConfig, stream: ShardedStream, steps: int) -> dict[str, object]:
  """Figures over the next `steps` batches."""
  tokens, examples = collections.Counter(), collections.Counter()
  objectives = collections.Counter()
  filled = loss = positions = 0
  begin, first = time.perf_counter(), 0
  for batch in itertools.islice(stream, steps):
    if not positions:
      # Opening the pipelines is no part of the rate.
      begin, first = time.perf_counter(), int((batch.segment_ids > 0).sum())
    filled += int((batch.segment_ids > 0).sum())
    loss += int(batch.loss_weights.sum())
    positions += batch.targets.size
    for example in itertools.chain.from_iterable(stream.last_rows):
      tokens[example.source] += example.size
      examples[example.source] += 1
      objectives[objective_name(example)] += 1
  seconds = time.perf_counter() - begin
  total, count = max(sum(tokens.values()), 1), max(sum(examples.values()), 1)
  return {
    'batches': steps,
    'rates': rates(find_provider(config.mixture_or_task_name)),
    'token_share': {k: round(v / total, 4) for k, v in sorted(tokens.items())},
    'example_share': {k: round(v / count, 4) for k, v in sorted(examples.items())},
    'objective_share': {k: round(v / count, 4) for k, v in sorted(objectives.items())},
    'tokens': dict(sorted(tokens.items())),
    'padding_share': round(1 - filled / max(positions, 1), 4),
    'loss_share': round(loss / max(positions, 1), 4),
    'tokens_per_second': round((filled - first) / seconds),
    'skipped_records': _skipped(config),
  }


def _skipped(config: DataConfig) -> dict[str, int]:
  found = collections.Counter()
  for task in _tasks(config):
    for (path, reason), count in getattr(task.source, 'skipped', {}).items():
      found[f'{path}: {reason}'] += count
  return dict(found)


def of_run(run_dir: str, step: int) -> tuple[int, DataConfig, Mapping[str, bytes]]:
  """(step of the next batch, data, positions) of the run's newest checkpoint up to `step`.

  Raises:
    ConfigError: no run, no checkpoint so early, or one whose stage ends before the step.
  """
  directory = epath.Path(run_dir)
  saved = {
    int(path.name.removeprefix('checkpoint_')): path
    for path in (directory.iterdir() if directory.exists() else ())
    if path.name.removeprefix('checkpoint_').isdigit()
  }
  if not saved:
    raise ConfigError(f'--run_dir={run_dir} holds no checkpoint_STEP; give the directory of a run.')
  early = [number for number in saved if number <= step]
  if not early:
    raise ConfigError(
      f'--step={step} is before the oldest checkpoint that {run_dir} keeps, {min(saved)}: give '
      f'--mixture and the lengths, and the batch is found by reading from the beginning.'
    )
  return saved_stream(DataPositions(saved[max(early)] / 'data'))


def show_step(config: DataConfig, stream: ShardedStream, ahead: int) -> None:
  """Prints the batch after `ahead` others."""
  batch: Batch = next(itertools.islice(stream, ahead, None))
  vocabulary = find_provider(config.mixture_or_task_name).output_features['targets'].vocabulary
  color = _COLOR.value == 'always' or (_COLOR.value == 'auto' and sys.stdout.isatty())
  each = config.batch_size // config.num_shards
  for number, row in enumerate(stream.last_rows):
    share = float((batch.segment_ids[number] > 0).mean())
    print(f'row {number} (shard {number // each}), {share:.1%} filled')
    print(show_row(row, vocabulary, color, config))


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f'error: unknown arguments {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  for module in _MODULES.value:
    __import__(module)
  if _FILES.value:
    from tasks.text_files import UserFiles

    UserFiles(_FILES.value).register()
  if _TFDS.value:
    seqio.set_tfds_data_dir_override(_TFDS.value)
  seqio.add_global_cache_dirs(_CACHE_DIRS.value)
  try:
    if bool(_MIXTURE.value) == bool(_RUN.value):
      raise ConfigError('give either --mixture or --run_dir.')
    first, config, positions = (
      of_run(_RUN.value, _STEP.value) if _RUN.value else (0, data_config(), None)
    )
    with ShardedStream(config, range(config.num_shards)) as stream:
      if positions:
        stream.restore(positions)
      if not _SUMMARY.value:
        show_step(config, stream, _STEP.value - first)
        return
      result = summarise(config, stream, _STEPS.value)
  except ConfigError as error:
    sys.exit(f'error: {error}')
  if _JSON.value:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      print(f'{name}: {value}')


def run() -> None:
  """Entry point."""
  flags.DEFINE_bool('help', False, 'Show this.', flag_values=_FLAGS)
  if '--help' in sys.argv:
    sys.exit(f'{__doc__}\n{_FLAGS.module_help(sys.argv[0]) or _FLAGS.get_help()}')
  try:
    rest = _FLAGS(sys.argv)
  except flags.Error as error:
    sys.exit(f'error: {error}')
  main(rest)


if __name__ == '__main__':
  run()

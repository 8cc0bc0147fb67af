"""What a model is trained on, for a person: rows of a batch, figures over many, those of a run."""

from __future__ import annotations

import collections
import itertools
import os
import time

import numpy as np
import seqio
from etils import epath

from openmoe.checkpoint.paths import step_of
from openmoe.checkpoint.positions import DataPositions
from openmoe.config import ConfigError, DataConfig
from openmoe.data.features import Example, Row
from openmoe.data.shard import find_provider, rates
from openmoe.data.stages import Saved, saved
from openmoe.data.stream import ShardedStream
from openmoe.data.ul2 import DENOISERS
from openmoe.observe.text import visible
from openmoe.types import Batch

_LOSS, _CONTEXT, _SENTINEL, _HEAD, _END = '\033[32m', '\033[2m', '\033[33m', '\033[1m', '\033[0m'
_JOINERS = '\t\u200c\u200d'  # stay in a shown text; line ends do not


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
    origin = visible(f'{example.source or "?"} | {documents_of(example, config)}', _JOINERS)
    head = f'  segment {number}: {origin} | '
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
  """Decoded text with sentinels, EOS and control characters visible, one line."""
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
      text = visible(vocabulary.decode(ids), _JOINERS)
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


def checkpoints_of(run_dir: str | os.PathLike) -> dict[int, epath.Path]:
  """Step -> checkpoint of a run.

  Raises:
    ConfigError: there is none.
  """
  directory = epath.Path(run_dir)
  paths = directory.iterdir() if directory.exists() else ()
  found = {number: path for path in paths if (number := step_of(path)) is not None}
  if not found:
    raise ConfigError(f'--run_dir={run_dir} holds no checkpoint_STEP; give the directory of a run.')
  return dict(sorted(found.items()))


def checkpoint_before(run_dir: str | os.PathLike, step: int) -> epath.Path:
  """A run's newest checkpoint up to a step.

  Raises:
    ConfigError: no run, or no checkpoint so early.
  """
  found = checkpoints_of(run_dir)
  early = [number for number in found if number <= step]
  if not early:
    raise ConfigError(
      f'--step={step} is before the oldest checkpoint that {run_dir} keeps, {min(found)}: give '
      f'--mixture and the lengths, and the batch is found by reading from the beginning.'
    )
  return found[max(early)]


def position_of_run(run_dir: str | os.PathLike, step: int) -> Saved:
  """The data position of the run's newest checkpoint up to `step`.

  Raises:
    ConfigError: no run, no checkpoint so early, or one whose stage ends before the step.
  """
  found = saved(DataPositions(checkpoint_before(run_dir, step) / 'data'))
  if found.ends:
    raise ConfigError(
      f'The saved data position is at the end of stage {found.stage!r}, after step {found.step}, '
      f'and does not say what follows: choose an earlier step, or a later checkpoint.'
    )
  return found


def vocabulary_of(config: DataConfig) -> seqio.Vocabulary:
  """Of the targets."""
  return find_provider(config.mixture_or_task_name).output_features['targets'].vocabulary


def step_text(config: DataConfig, stream: ShardedStream, ahead: int, color: bool) -> str:
  """The rows of the batch after `ahead` others."""
  batch: Batch = next(itertools.islice(stream, ahead, None))
  vocabulary = vocabulary_of(config)
  each = config.batch_size // config.num_shards
  lines = []
  for number, row in enumerate(stream.last_rows):
    share = float((batch.segment_ids[number] > 0).mean())
    lines.append(f'row {number} (shard {number // each}), {share:.1%} filled')
    lines.append(show_row(row, vocabulary, color, config))
  return '\n'.join(lines)

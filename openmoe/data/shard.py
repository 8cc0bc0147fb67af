"""One logical shard: a seqio pipeline of its own, packed into rows, whose position can be saved.

A shard depends on (config, seed, shard number) alone, never on the host that runs it. Its state is
the TensorFlow iterator's own checkpoint (file offsets, shuffle buffers, random counters: no replay
on restore) together with the examples and rows it has read but not yet given.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import re
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import seqio
import tensorflow as tf

from openmoe.config import ConfigError, DataConfig
from openmoe.data import cache, exclusion, features, position
from openmoe.data.concat import plain
from openmoe.data.features import Example, Row
from openmoe.data.sources import TextFiles

# Examples handed from TensorFlow to Python at once.
_GROUP = 16

PROVENANCE = ('source', 'document_ids', 'objective')


def shard_name(shard: int, num_shards: int) -> str:
  """Key of a shard's state in a checkpoint."""
  return f'shard_{shard:05d}-of-{num_shards:05d}'


def shard_seed(seed: int, shard: int, num_shards: int) -> int:
  """Seed of one shard's pipeline.

  Shards must not share a seed: they would choose the same source and the same denoiser at the same
  step. Bounded so that the numbers seqio adds to it stay in int32.
  """
  digest = hashlib.sha256(f'{seed}/{shard}/{num_shards}'.encode()).digest()
  return int.from_bytes(digest[:4], 'little') % 2_000_000_000


def find_provider(name: str) -> seqio.Task | seqio.Mixture:
  """The registered task or mixture.

  Raises:
    ConfigError: with the nearest names.
  """
  known = list(seqio.MixtureRegistry.names()) + list(seqio.TaskRegistry.names())
  if name not in known:
    near = difflib.get_close_matches(name, known, 3)
    hint = f' Nearest: {", ".join(near)}.' if near else ' None is registered: import its module.'
    raise ConfigError(f'mixture_or_task_name={name!r} is not registered.{hint}')
  return seqio.get_mixture_or_task(name)


def rates(provider: seqio.Task | seqio.Mixture) -> dict[str, float]:
  """Rate of each task of a mixture; 1 for a task by itself.

  Raises:
    ConfigError: a rate is negative or no number, or all are zero.
  """
  if isinstance(provider, seqio.Task):
    return {provider.name: 1.0}
  found = {task.name: float(provider.get_rate(task)) for task in provider.tasks}
  for task, rate in found.items():
    if not 0 <= rate < math.inf:
      raise ConfigError(
        f'Mixture {provider.name}: the rate of {task} is {rate}; a rate is a finite number of 0 or '
        'more.'
      )
  if not any(found.values()):
    raise ConfigError(
      f'Mixture {provider.name}: all rates are 0 ({", ".join(found)}); give a task one above 0.'
    )
  return found


def tasks_of(config: DataConfig) -> list[seqio.Task]:
  """The tasks of a mixture, or the one task, that have the split."""
  provider = find_provider(config.mixture_or_task_name)
  tasks = getattr(provider, 'tasks', [provider])
  return [task for task in tasks if config.split in task.splits]


def signature(config: DataConfig) -> dict[str, object]:
  """What a saved position is only valid for. The batch size is not part: shards give rows."""
  fields = dataclasses.asdict(config)
  del fields['batch_size']
  if fields.pop('exclude'):
    fields |= {'exclude': config.exclude, 'exclude_digest': exclusion.load(config.exclude).digest}
  fields['task_feature_lengths'] = dict(config.task_feature_lengths)
  fields['rates'] = rates(find_provider(config.mixture_or_task_name))
  return fields


def saved_config(state: bytes, tokens_per_step: int) -> DataConfig:
  """What a saved position of a shard was made with, but for the batch size, which is no part.

  Raises:
    ConfigError: the position is damaged.
  """
  fields = position.read(state, 'a shard')[1]['signature']
  try:
    fields = {k: v for k, v in fields.items() if k not in ('rates', 'exclude_digest')}
    batch_size = tokens_per_step // sum(fields['task_feature_lengths'].values())
    return DataConfig(batch_size=batch_size, **fields)
  except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
    raise ConfigError(f'The saved data position does not describe its data ({error!r}).') from error


def _use_for_data_only() -> None:
  """Keeps TensorFlow off the accelerators, and its graph optimiser off tf.data's functions.

  The optimiser would run again over every function of every shard and task, and doubles the time
  to the first batch; it does not change the rate afterwards.
  """
  tf.config.set_visible_devices([], 'GPU')
  tf.config.set_visible_devices([], 'TPU')
  tf.config.optimizer.set_experimental_options({'disable_meta_optimizer': True})


def _number(source: TextFiles | None, split: str, name: str | int) -> int:
  """The number of a document of a list of those to exclude."""
  if isinstance(name, int):
    return name
  if source is None:
    raise ConfigError(
      f'The document {name!r} to be excluded is of no text file of this mixture; give its number.'
    )
  return source.number_of(split, name)


class Shard:
  """Rows of one logical shard, one after the other."""

  def __init__(self, config: DataConfig, shard: int, wanted: str | int | None = None):
    """Builds the pipeline; reads nothing yet.

    Args:
      wanted: a document, FILE:RECORD or its number; examples it has a token in are marked.

    Raises:
      ConfigError: unknown mixture, missing data, split or vocabulary, or no such document.
    """
    _use_for_data_only()
    self.name = shard_name(shard, config.num_shards)
    self._config = config
    self._shard = shard
    self._wanted = wanted
    self._provider = find_provider(config.mixture_or_task_name)
    vocabulary = self._provider.output_features['targets'].vocabulary
    self._vocab_size = vocabulary.vocab_size
    # TensorFlow's threads call back into Python to parse records. An iterator that outlived the
    # interpreter would wait for its lock for ever, so it is given up before, closed or not.
    self._held = [iter(self._dataset())]
    self._release = weakref.finalize(self, self._held.clear)
    self._packer = features.Packer(config.row_length, features.OPEN_ROWS if config.pack else 0)
    self._examples: collections.deque[Example] = collections.deque()
    self._rows: collections.deque[Row] = collections.deque()
    self._ended = False
    self._known: bytes | None = None  # the newest position that was taken or restored

  def close(self) -> None:
    """Ends TensorFlow's threads of this shard; may be called twice."""
    self._release()

  def _dataset(self) -> tf.data.Dataset:
    config = self._config
    missing = set(config.task_feature_lengths) - set(self._provider.output_features)
    if missing:
      raise ConfigError(
        f'{config.mixture_or_task_name} has no feature {sorted(missing)}; leave it out of '
        'task_feature_lengths.'
      )
    if config.split not in self._provider.splits:
      raise ConfigError(
        f'{config.mixture_or_task_name} has no split {config.split!r}, only '
        f'{sorted(self._provider.splits)}.'
      )
    rates(self._provider)  # seqio would divide by their sum, or never read a task
    self._check_sharing()
    arguments = {
      'sequence_length': dict(config.task_feature_lengths),
      'split': config.split,
      'use_cached': config.use_cached,
      'shuffle': config.shuffle,
      'seed': shard_seed(config.seed, self._shard, config.num_shards),
      'shard_info': seqio.ShardInfo(index=self._shard, num_shards=config.num_shards),
      'num_epochs': config.num_epochs,
      # A memory cache would be written into every saved position.
      'try_in_mem_cache': False,
    }
    if isinstance(self._provider, seqio.Mixture):
      arguments['passthrough_features'] = PROVENANCE
      arguments['log_mixing_proportions'] = False
    with self._signed():
      dataset = self._provider.get_dataset(**arguments)
    dataset = dataset.map(plain(self._select)).ragged_batch(_GROUP).prefetch(2)
    options = tf.data.Options()
    options.deterministic = True
    # Buffers that grow with the memory they find would grow the saved position as well.
    options.autotune.ram_budget = 256 << 20
    return dataset.with_options(options)

  @contextlib.contextmanager
  def _signed(self) -> Iterator[None]:
    """Documents are left out or marked in what is built inside."""
    config = self._config
    if config.exclude is None and self._wanted is None:
      yield
      return
    listed = exclusion.load(config.exclude).documents if config.exclude else {}
    sources = {corpus: self._source_of(corpus) for corpus in listed}
    numbers = {
      corpus: frozenset(_number(sources[corpus], config.split, name) for name in names)
      for corpus, names in listed.items()
    }
    name = config.mixture_or_task_name
    with exclusion.applied(numbers, name, self._wanted, self._find_wanted):
      yield

  def _find_wanted(self, corpus: str) -> int | None:
    """The number of the document that is wanted, in this corpus."""
    if not isinstance(self._wanted, str):
      return self._wanted
    source = self._source_of(corpus)
    if source is None or not source.find(self._config.split, self._wanted):
      return None
    return source.number_of(self._config.split, self._wanted)

  def _source_of(self, corpus: str) -> TextFiles | None:
    tasks = (task for task in self._tasks if task.name.startswith(f'{corpus}_'))
    return next((t.source for t in tasks if isinstance(t.source, TextFiles)), None)

  @property
  def _tasks(self) -> list[seqio.Task]:
    return tasks_of(self._config)

  def _check_sharing(self) -> None:
    """Refuses sources that shards cannot share without reading each other's examples."""
    config = self._config
    for task in self._tasks:
      if config.use_cached:
        cache.check_cached(task, config.num_shards, config.split)
      elif isinstance(task.source, TextFiles):
        task.source.check_shards(config.split, config.num_shards)
      elif config.shuffle and not task.source.supports_arbitrary_sharding:
        # seqio would deal the examples of a stream that every shard shuffles differently.
        count = len(task.source.list_shards(config.split))
        if count < config.num_shards:
          raise ConfigError(
            f'{task.name} has {count} files of split {config.split!r}, fewer than num_shards='
            f'{config.num_shards}: lower num_shards, or use openmoe.data.tfds_source.'
          )

  def _select(self, example):
    wanted = {
      'source': tf.constant('', tf.string),
      'document_ids': tf.constant([-1, -1], tf.int64),
      'objective': tf.constant(-1, tf.int32),
    }
    wanted.update({k: example[k] for k in wanted if k in example})
    for key in self._config.task_feature_lengths:
      wanted[key] = tf.cast(example[key], tf.int32)
    wanted['document_ids'] = tf.ensure_shape(wanted['document_ids'], [2])
    return wanted

  def _read(self) -> None:
    """Takes the next group of examples from TensorFlow."""
    try:
      group = next(self._held[0])
    except StopIteration:
      if self._config.num_epochs is None:
        raise ConfigError(self._why_empty()) from None
      self._ended = True
      return
    except tf.errors.OpError as error:
      raise ConfigError(f'{self.name} cannot read its data: {_said(error)}') from error
    sides = {key: self._checked(group[key]) for key in self._config.task_feature_lengths}
    if 'inputs' not in sides:
      sides['inputs'] = [np.zeros(0, np.int32)] * len(sides['targets'])
    sources = group['source'].numpy()
    documents, objectives = group['document_ids'].numpy(), group['objective'].numpy()
    for i, (inputs, targets) in enumerate(zip(sides['inputs'], sides['targets'], strict=True)):
      ids = (int(documents[i, 0]), int(documents[i, 1]))
      if not len(targets) or ids[0] == exclusion.EXCLUDED:
        continue  # nothing to predict, or not to be trained on: no loss, no row
      label = sources[i].decode()
      self._examples.append(Example(inputs, targets, label, ids, int(objectives[i])))

  def _checked(self, tokens: tf.RaggedTensor | tf.Tensor) -> list[np.ndarray]:
    """The token arrays of a group, all inside the vocabulary."""
    if isinstance(tokens, tf.RaggedTensor):
      values, splits = tokens.flat_values.numpy(), tokens.row_splits.numpy()
      rows = np.split(values, splits[1:-1])
    else:  # a task whose examples all have one length
      values = tokens.numpy()
      rows = list(values)
    bad = values[(values >= self._vocab_size) | (values < 0)]
    if len(bad):
      raise ConfigError(
        f'{self.name} of {self._config.mixture_or_task_name} gave token id {bad[0]}, outside the '
        f'vocabulary of {self._vocab_size}: was it cached with another vocabulary?'
      )
    return rows

  def _why_empty(self) -> str:
    config = self._config
    info = seqio.ShardInfo(index=self._shard, num_shards=config.num_shards)
    empty = []
    for task in self._tasks:
      found = task.source.get_dataset(split=config.split, shuffle=False, shard_info=info)
      if not list(found.take(1)):
        empty.append(task.name)
    return (
      f'{self.name} of {config.mixture_or_task_name} (split {config.split}) has no documents'
      f'{" in " + ", ".join(empty) if empty else ""}: num_shards={config.num_shards} is more '
      'than there are documents or files. Give more data, or lower num_shards.'
    )

  def next_row(self) -> Row | None:
    """The next row; None when the data has ended (never with num_epochs=None)."""
    while not self._rows:
      while not self._examples and not self._ended:
        self._read()
      if not self._examples:
        rows = self._packer.flush()
        if not rows:
          return None
        self._rows.extend(rows)
      else:
        self._rows.extend(self._packer.add(self._examples.popleft()))
    return self._rows.popleft()

  def state(self, pending: Sequence[Row] = ()) -> bytes:
    """The position, such that a restored shard gives `pending` first.

    Args:
      pending: rows already taken from next_row but not yet used by anybody.
    """
    rows = [*pending, *self._rows]
    groups = [*rows, *(tuple(row) for row in self._packer.open)]
    examples = [e for row in groups for e in row] + list(self._examples)
    header = self._header(
      row_sizes=[len(row) for row in rows],
      open_sizes=[len(row) for row in self._packer.open],
      ended=self._ended,
    )
    arrays = features.pack_examples(examples)
    for name, content in position.save_iterator(self._held[0]).items():
      arrays[f'file:{name}'] = np.frombuffer(content, np.uint8)
    self._known = position.pack(arrays, header)
    return self._known

  def _header(self, **facts: object) -> dict[str, object]:
    return {'signature': signature(self._config), 'shard': self._shard} | facts

  def known_state(self, rows: int) -> bytes:
    """The position so many rows after the newest that was taken or restored.

    Asks TensorFlow for nothing, so it is there while a read is stuck. What restores it reads those
    rows again.
    """
    if self._known is None:
      header = self._header(row_sizes=[], open_sizes=[], ended=False, skip=rows, fresh=True)
      return position.pack(features.pack_examples([]), header)
    arrays, header = position.read(self._known, self.name)
    return position.pack(arrays, header | {'skip': header.get('skip', 0) + rows})

  def restore(self, state: bytes) -> None:
    """Continues after the batch the state was taken at.

    Raises:
      ConfigError: if the state belongs to another mixture, seed, length or sharding.
    """
    arrays, header = position.read(state, self.name)
    mine = json.loads(json.dumps(signature(self._config)))
    for name in ('exclude', 'exclude_digest'):  # the list may change: all else stays in its place
      mine.pop(name, None)
    differing = {k: (header['signature'].get(k), v) for k, v in mine.items()
                 if header['signature'].get(k) != v}  # fmt: skip
    if header['shard'] != self._shard:
      differing['shard'] = (header['shard'], self._shard)
    if differing:
      told = ', '.join(f'{k}: saved {old!r}, now {new!r}' for k, (old, new) in differing.items())
      raise ConfigError(
        f'The saved data position of {self.name} is of another data stream ({told}). Use the '
        'settings it was saved with, or start a new run directory.'
      )
    contents = {k[5:]: v.tobytes() for k, v in arrays.items() if k.startswith('file:')}
    if not header.get('fresh'):
      position.load_iterator(self._held[0], contents, self.name)
    try:
      examples = iter(features.unpack_examples(arrays))
      self._rows = collections.deque(position.take_rows(examples, header['row_sizes']))
      self._packer.reopen(position.take_rows(examples, header['open_sizes']))
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
      raise ConfigError(
        f'The saved data position of {self.name} is damaged ({error!r}).'
      ) from error
    self._examples = collections.deque(examples)
    self._ended = header['ended']
    self._known = state
    for _ in range(header.get('skip', 0)):
      self.next_row()


def _said(error: tf.errors.OpError) -> str:
  """What a reader of ours said; TensorFlow puts a page of its graph and a traceback around it."""
  ours = re.search(r'(?:\w*Error|DamagedFile): (.+?)\nTraceback', error.message, re.DOTALL)
  return ours[1].strip() if ours else error.message
